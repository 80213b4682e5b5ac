"""``infnerf-bench losses``: what each loss is worth, by held-out PSNR per pyramid level after equal minutes.

One training per row and seed: the preset with one loss switched on, at the weight written here, or off where it is on
by default, against the preset with the same seed. Losses of patches are compared with trainings that draw patches and
have none of them. How much a change differs from seed to seed says what it means.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_quality import Quality, require_preset, result_line
from infnerf_ns.cli.command import Command
from infnerf_ns.errors import InputError
from infnerf_ns.validation import Range, require_valid

_LOSSES = "pipeline.model.losses."
_PATCHES = {"pipeline.datamanager.patch_size": 16, "pipeline.datamanager.patch_share": 0.25}
_BASE, _PATCH_BASE = "preset", "patches"
ROWS: dict[str, dict[str, float | bool | str]] = {
    _BASE: {},
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
class Losses(Command):
    """What each loss is worth: a training per loss, held-out PSNR per pyramid level against that without it."""

    data: Path
    """Capture: a folder with transforms.json or transforms_train.json, or the word `demo`, which alone has depth."""
    preset: str = "infnerf"
    """Preset that is trained."""
    rows: tuple[str, ...] = ()
    """Rows of the table (names of losses, `without ...`, `charbonnier`, `balance`); by default all that the capture
    allows. Those that they are compared with come by themselves."""
    minutes: Annotated[float, Range(0.001, 100_000)] = 3.0
    """Length of each training."""
    clock: Literal["wall", "cpu"] = "wall"
    """As for `infnerf-bench quality`."""
    pixels: Annotated[int, Range(1, 1 << 24)] = 2048
    """Held-out pixels per photo and pyramid level."""
    seeds: Annotated[tuple[int, ...], Range(0, 2**32 - 1)] = (42, 43)
    """Every row is trained once with each; the table's last column is the standard deviation between them. One row
    after the other with the first, then with the next: the table is written after each training, so it is of use
    before the last one ends."""
    output: Path = Path("losses")
    """Table: this name with .csv."""

    def main(self) -> None:
        """Trains, measures, writes and prints the table."""
        require_valid(self)
        require_preset(self.preset)
        unknown = [name for name in self.rows if name not in ROWS]
        if unknown:
            raise InputError(f"--rows {unknown[0]}: there are {', '.join(ROWS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: name at least one, and each only once")
        chosen = self.rows or tuple(name for name in ROWS if name != "lpips")
        if str(self.data) != "demo":
            chosen = tuple(name for name in chosen if name not in _NEED_DEPTH)
        wanted = {*chosen, _BASE, *(_PATCH_BASE for name in chosen if ROWS[name].keys() >= _PATCHES.keys())}
        for name in wanted:
            self._quality(name, self.seeds[0]).check()
        table, _ = table_and_plot(self.output)
        rows: list[dict] = []
        for seed in self.seeds:
            for name in (name for name in ROWS if name in wanted):
                (row,) = self._quality(name, seed).measure()
                rows.append({"row": name, "seed": seed, **row})
                gc.collect()  # a trainer is a circle of few objects and much memory
                print(result_line({**rows[-1], "method": name}), flush=True)
                write_table(rows, table)
        self._print(rows)
        print(f"infnerf: wrote {table}")

    def _quality(self, name: str, seed: int) -> Quality:
        return Quality(
            self.data,
            methods=(method_of(self.preset, name),),
            minutes=(self.minutes,),
            pixels=self.pixels,
            clock=self.clock,
            seed=seed,
            output=self.output,
        )

    def _print(self, rows: list[dict]) -> None:
        """PSNR of the preset, and what each row changes, means over the seeds; the last column is the standard
        deviation from seed to seed of the column before."""
        levels = [name for name in rows[0] if name.startswith("psnr_")]
        table = Table(
            title=f"held-out PSNR after {self.minutes:g} min, dB: the preset, and what a loss changes;"
            f" ±: the mean's standard deviation over {len(self.seeds)} seeds"
        )
        for column in ("", "steps", *(name.removeprefix("psnr_") for name in levels), "mean", "±"):
            table.add_column(column, justify="left" if column == "" else "right", overflow="fold")
        for name, steps, changes in changes_of(rows):
            sign = ".2f" if name == _BASE else "+.2f"
            mean = changes.mean(axis=1)
            spread = f"{mean.std(ddof=1):.2f}" if len(mean) > 1 else ""
            values = [*changes.mean(axis=0), mean.mean()]
            table.add_row(name, f"{steps:.0f}", *(f"{value:{sign}}" for value in values), spread)
        Console(width=120).print(table)


def changes_of(rows: list[dict]) -> Iterator[tuple[str, float, np.ndarray]]:
    """Name, mean number of steps, and per seed and pyramid level [S, L] the PSNR of the preset, or for every other row
    what it changes against the row that it is compared with, dB.

    Args:
        rows: of the table, every row with the same seeds.
    """
    levels = [name for name in rows[0] if name.startswith("psnr_")]

    def psnr(name: str) -> np.ndarray:
        return np.array([[float(row[level]) for level in levels] for row in rows if row["row"] == name])

    for name in dict.fromkeys(row["row"] for row in rows):
        steps = float(np.mean([float(row["steps"]) for row in rows if row["row"] == name]))
        against = _PATCH_BASE if ROWS[name].keys() > _PATCHES.keys() else _BASE
        yield name, steps, psnr(name) if name == _BASE else psnr(name) - psnr(against)


def method_of(preset: str, row: str) -> str:
    """What ``infnerf-bench quality`` calls the training of a row."""
    # YAML's way to write numbers: it reads Python's 1e-05 as a word.
    return preset + "".join(f":{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in ROWS[row].items())
