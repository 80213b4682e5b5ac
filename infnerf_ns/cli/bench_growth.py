"""``infnerf-bench growth``: does a growing tree find what its points do not know?

A demo town is trained three times for equal minutes: with all points, without the points of one district, so that the
tree has no nodes for it, and the latter with growth. Held-out pixels are told apart by where the town's exact depth
says that their surfaces lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.engine.trainer import Trainer
from rich.console import Console
from rich.table import Table

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_quality import Quality, held_out_psnr, result_line
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.depth import downsample_depth, read_depth
from infnerf_ns.data.pyramid_rays import level_camera

_GROWTH = "pipeline.model.growth.every"


@dataclass
class Growth:
    """PSNR in a district of the demo town whose points are missing, without growth and with it, and elsewhere."""

    size: int = 2
    """Blocks per side of the town."""
    district: tuple[float, float, float, float] = (0.0, 0.0, 44.0, 44.0)
    """Least x, least y, largest x, largest y, metres: a quarter of a town of 2 x 2 blocks."""
    preset: str = "infnerf-small"
    """Preset that is trained, perhaps with settings behind colons as for `infnerf-bench quality`."""
    every: int = 1000
    """Steps between two rounds of growth."""
    minutes: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """When the held-out photos are measured; the last is the length of each training."""
    clock: Literal["wall", "cpu"] = "wall"
    """As for `infnerf-bench quality`."""
    pixels: int = 1024
    """Held-out pixels per photo and pyramid level, in the district and elsewhere each."""
    seed: int = 42
    """Of the trainings and of the pixels."""
    output: Path = Path("growth")
    """Table and plot: this name with .csv and .png."""

    def main(self) -> None:
        """Trains, measures, prints a table, writes it and a plot."""
        print(describe_machine())
        table, plot = table_and_plot(self.output)
        trainings = {
            "all points": (None, self.preset),
            "without": (self.district, self.preset),
            "without, growing": (self.district, f"{self.preset}:{_GROWTH}={self.every}"),
        }
        rows: list[dict] = []
        for name, (missing, method) in trainings.items():
            quality = _ByDistrict(
                Path("demo"),
                methods=(method,),
                minutes=self.minutes,
                pixels=self.pixels,
                clock=self.clock,
                seed=self.seed,
                output=self.output,
            )
            quality.town = InfNeRFDemoDataParserConfig(size=self.size, depth=True, pointless_district=missing)
            quality.district = self.district
            for row in quality.measure():
                rows.append({**row, "method": name})
                print(result_line(rows[-1]), flush=True)
                write_table(rows, table)
        _print(rows)
        _plot(rows, plot)
        print(f"infnerf: wrote {table} and {plot}")


class _ByDistrict(Quality):
    """Measures pixels in a district and elsewhere."""

    town: InfNeRFDemoDataParserConfig
    district: tuple[float, float, float, float]

    def _dataparser(self) -> DataParserConfig:
        return self.town

    def _measure(self, trainer: Trainer, now: Callable[[], float]) -> dict:
        dataset = trainer.pipeline.datamanager.eval_dataset
        scale = dataset._dataparser_outputs.dataparser_scale
        x0, y0, x1, y1 = (bound * scale for bound in self.district)

        @cache
        def inside(number: int, level: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
            """Pixels in the district, and pixels elsewhere in the town."""
            camera = dataset.cameras[number : number + 1]
            rays = level_camera(camera, level, *shape).generate_rays(camera_indices=0, keep_shape=True)
            height, width = int(camera.height), int(camera.width)
            depth = downsample_depth(read_depth(dataset.metadata["depth_filenames"][number], height, width), level)
            along = torch.from_numpy(depth)[..., None] * scale * rays.metadata["directions_norm"]
            x, y, _ = (rays.origins + rays.directions * along).unbind(dim=-1)
            within = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).numpy()
            return within & (depth > 0), ~within & (depth > 0)

        columns = {}
        for part, name in enumerate(("district", "elsewhere")):
            psnr, _ = held_out_psnr(
                trainer.pipeline.model,
                dataset,
                self.pixels,
                self.seed,
                now,
                lambda number, level, shape, part=part: inside(number, level, shape)[part],
            )
            columns |= {f"psnr_{level} {name}": round(value, 2) for level, value in psnr.items()}
        return columns


def _print(rows: list[dict]) -> None:
    last = {row["method"]: row for row in rows}
    columns = [name for name in rows[0] if name.startswith("psnr_")]
    table = Table(title="held-out PSNR at the end, dB")
    for name in ("", "nodes", *(name.removeprefix("psnr_") for name in columns)):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, row in last.items():
        table.add_row(name, str(row["nodes"]), *(f"{row[column]:.2f}" for column in columns))
    Console(width=160).print(table)


def _plot(rows: list[dict], path: Path) -> None:
    """Full-size PSNR over minutes, in the district and elsewhere, and nodes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"psnr_1 district": "in the district", "psnr_1 elsewhere": "elsewhere", "nodes": "nodes"}
    for axis, (column, title) in zip(figure.subplots(1, 3), panels.items()):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axis.plot([row["minutes"] for row in own], [row[column] for row in own], "o-", label=method)
        axis.set(xlabel="minutes", title=title, ylabel="nodes" if column == "nodes" else "held-out PSNR, dB")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
