"""``infnerf-bench losses``: what each loss is worth, by held-out PSNR per pyramid level after equal minutes.

One training per row: the preset with one loss switched on, at the weight written here, or off where it is on by
default. Losses of patches are compared with a training that draws patches and has none of them. The row `seed` is the
preset once more with other random numbers: differences of its size mean nothing.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table

from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_quality import Quality, result_line
from infnerf_ns.errors import InputError

_LOSSES = "pipeline.model.losses."
_PATCHES = {"pipeline.datamanager.patch_size": 16, "pipeline.datamanager.patch_share": 0.25}
_BASE, _SEED, _PATCH_BASE = "preset", "seed", "patches"
ROWS: dict[str, dict[str, float | bool | str]] = {
    _BASE: {},
    _SEED: {},
    **{f"without {name}": {_LOSSES + name: 0.0} for name in ("distortion", "inter_level", "transparency")},
    "charbonnier": {_LOSSES + "rgb": "charbonnier"},
    "multi_scale": {_LOSSES + "multi_scale": 0.1},
    "depth_consistency": {_LOSSES + "depth_consistency": 1e-5},
    "normal_consistency": {_LOSSES + "normal_consistency": 3e-3},
    "sparsity": {_LOSSES + "sparsity": 0.01},
    "grid_decay": {_LOSSES + "grid_decay": 1e-3},
    "grid_variation": {_LOSSES + "grid_variation": 1e-3},
    "face_smoothness": {_LOSSES + "face_smoothness": 1.0},
    "depth": {_LOSSES + "depth": 0.01},
    "balance": {_LOSSES + "balance": True},
    _PATCH_BASE: _PATCHES,
    "patch_variation": {**_PATCHES, _LOSSES + "patch_variation": 2e-3},
    "ssim": {**_PATCHES, _LOSSES + "ssim": 0.01},
    "lpips": {**_PATCHES, _LOSSES + "lpips": 0.01},
    "adversarial": {**_PATCHES, _LOSSES + "adversarial": 5e-4},
    "depth_gradient": {**_PATCHES, _LOSSES + "depth_gradient": 1e-3},
}
"""Settings on top of the preset, by row. The weights make each loss a few per cent of the photometric one."""
_NEED_DEPTH = ("depth", "depth_gradient")


@dataclass
class Losses:
    """What each loss is worth: a training per loss, held-out PSNR per pyramid level against that without it."""

    data: Path
    """Capture: a folder with transforms.json or transforms_train.json, or the word `demo`, which alone has depth."""
    preset: str = "infnerf"
    """Preset that is trained."""
    rows: tuple[str, ...] = ()
    """Rows of the table (names of losses, `without ...`, `charbonnier`, `balance`); by default all that the capture
    allows. Those that they are compared with come by themselves."""
    minutes: float = 3.0
    """Length of each training."""
    clock: Literal["wall", "cpu"] = "wall"
    """As for `infnerf-bench quality`."""
    pixels: int = 2048
    """Held-out pixels per photo and pyramid level."""
    seed: int = 42
    """Of the trainings and of the pixels."""
    output: Path = Path("losses")
    """Table: this name with .csv."""

    def main(self) -> None:
        """Trains, measures, writes and prints the table."""
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown:
            raise InputError(f"--rows {unknown[0]}: there are {', '.join(ROWS)}")
        chosen = self.rows or tuple(name for name in ROWS if name != "lpips")
        if str(self.data) != "demo":
            chosen = tuple(name for name in chosen if name not in _NEED_DEPTH)
        wanted = {*chosen, _BASE, *(_PATCH_BASE for name in chosen if ROWS[name].keys() >= _PATCHES.keys())}
        table, _ = table_and_plot(self.output)
        rows: list[dict] = []
        for name in (name for name in ROWS if name in wanted):
            rows.append({"row": name, **self._train(name)})
            gc.collect()  # a trainer is a circle of few objects and much memory
            print(result_line({**rows[-1], "method": name}), flush=True)
            write_table(rows, table)
        self._print(rows)
        print(f"infnerf: wrote {table}")

    def _train(self, name: str) -> dict:
        method = method_of(self.preset, name)
        quality = Quality(
            self.data,
            methods=(method,),
            minutes=(self.minutes,),
            pixels=self.pixels,
            clock=self.clock,
            seed=self.seed + (name == _SEED),
            output=self.output,
        )
        (row,) = quality.measure()
        return row

    def _print(self, rows: list[dict]) -> None:
        """PSNR of the preset, and what each row changes."""
        of = {row["row"]: row for row in rows}
        levels = [name for name in rows[0] if name.startswith("psnr_")]
        table = Table(title=f"held-out PSNR after {self.minutes:g} min, dB: the preset, and what a loss changes")
        for column in ("", "steps", *(name.removeprefix("psnr_") for name in levels), "mean"):
            table.add_column(column, justify="left" if column == "" else "right")
        for name, row in of.items():
            against = None if name == _BASE else of[_BASE]
            if ROWS[name].keys() > _PATCHES.keys():
                against = of[_PATCH_BASE]
            values = [row[level] - (against[level] if against else 0.0) for level in levels]
            sign = "+.2f" if against else ".2f"
            table.add_row(
                name, str(row["steps"]), *(f"{value:{sign}}" for value in [*values, sum(values) / len(values)])
            )
        Console(width=120).print(table)


def method_of(preset: str, row: str) -> str:
    """What ``infnerf-bench quality`` calls the training of a row."""
    # YAML's way to write numbers: it reads Python's 1e-05 as a word.
    return preset + "".join(f":{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in ROWS[row].items())
