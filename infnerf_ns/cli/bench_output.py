"""Where a bench writes its table and its plot."""

from __future__ import annotations

import csv
from pathlib import Path


def table_and_plot(output: Path) -> tuple[Path, Path]:
    """The name with .csv and .png behind it, whatever dots are in it; its folder is made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.with_name(f"{output.name}.csv"), output.with_name(f"{output.name}.png")


def write_table(rows: list[dict], path: Path) -> None:
    """Rows with the keys of the first."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
