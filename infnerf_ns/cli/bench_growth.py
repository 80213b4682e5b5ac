"""``infnerf-bench growth``: does a growing tree find what its points do not know?

A demo town is trained three times for equal minutes: with all points, without the points of one district, so that the
tree has no nodes for it, and the latter with growth. Held-out pixels are told apart by where the town's exact depth
says that their surfaces lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.trainer import Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_quality import Quality, held_out_psnr, result_line
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.depth import downsample_depth, read_depth
from infnerf_ns.data.pyramid_rays import level_camera
from infnerf_ns.training.image_pictures import side_by_side

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
    """Table, plot and held-out photos beside their renders: this name with .csv, .png and -photos.png."""

    def main(self) -> None:
        """Trains, measures, prints a table, writes it, a plot and a picture of renders."""
        print(describe_machine())
        table, plot = table_and_plot(self.output)
        picture = plot.with_name(f"{self.output.name}-photos.png")
        trainings = {
            "all points": (None, self.preset),
            "without": (self.district, self.preset),
            "without, growing": (self.district, f"{self.preset}:{_GROWTH}={self.every}"),
        }
        rows: list[dict] = []
        images: dict[str, list[Tensor]] = {}
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
            quality.bounds = self.district
            for row in quality.measure():
                rows.append({**row, "method": name})
                print(result_line(rows[-1]), flush=True)
                write_table(rows, table)
            images |= {"photo": quality.photos, name: quality.renders}
        _print(rows)
        _plot(rows, plot)
        strips = torch.cat([side_by_side(dict(zip(images, row))) for row in zip(*images.values())])
        Image.fromarray((strips.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(picture)
        print(f"infnerf: wrote {table}, {plot} and {picture}")


class _ByDistrict(Quality):
    """Measures pixels in a district and elsewhere, and renders held-out photos that show it."""

    town: InfNeRFDemoDataParserConfig
    bounds: tuple[float, float, float, float]
    photos: list[Tensor]
    """that are shown"""
    renders: list[Tensor]
    """of these, by the last measurement"""
    _district: District | None = None

    def _dataparser(self) -> DataParserConfig:
        return self.town

    def _measure(self, trainer: Trainer, now: Callable[[], float]) -> dict:
        model, dataset = trainer.pipeline.model, trainer.pipeline.datamanager.eval_dataset
        if self._district is None:
            self._district = District(dataset, self.bounds)
        shown = self._district.shown()
        cameras = [dataset.cameras[number : number + 1].to(model.device) for number in shown]
        self.photos = [dataset[number]["image"] for number in shown]
        self.renders = [model.get_outputs_for_camera(camera)["rgb"].cpu() for camera in cameras]
        columns: dict[str, float] = {}
        for name, where in (("district", self._district.inside), ("elsewhere", self._district.elsewhere)):
            psnr, _ = held_out_psnr(model, dataset, self.pixels, self.seed, now, where)
            columns |= {f"psnr_{level} {name}": round(value, 2) for level, value in psnr.items()}
        return columns


class District:
    """Which pixels of photos with exact depth show a district of a demo town.

    Args:
        dataset: the photos.
        bounds: least x, least y, largest x, largest y, metres.
    """

    def __init__(self, dataset: InputDataset, bounds: tuple[float, float, float, float]) -> None:
        self._dataset = dataset
        self._scale = dataset._dataparser_outputs.dataparser_scale
        self._bounds = tuple(bound * self._scale for bound in bounds)
        self._masks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def inside(self, number: int, level: int, shape: tuple[int, int]) -> np.ndarray:
        """Pixels [h, w] of a photo's (its number) pyramid level whose surfaces lie in the district."""
        return self._both(number, level, shape)[0]

    def elsewhere(self, number: int, level: int, shape: tuple[int, int]) -> np.ndarray:
        """Pixels [h, w] of surfaces elsewhere in the town."""
        return self._both(number, level, shape)[1]

    def shown(self) -> list[int]:
        """Two photos to look at: of those that show much of the district the nearest and the middle one."""
        shares = [float(self.inside(number, 0, self._size(number)).mean()) for number in range(len(self._dataset))]
        showing = [number for number, share in enumerate(shares) if share >= max(shares) / 2]
        showing.sort(key=lambda number: float(np.median(self._depth(number))))
        return [showing[0], showing[len(showing) // 2]]

    def _both(self, number: int, level: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        if (number, level) not in self._masks:
            rays = level_camera(self._dataset.cameras[number : number + 1], level, *shape).generate_rays(
                camera_indices=0, keep_shape=True
            )
            depth = downsample_depth(self._depth(number), level)
            along = torch.from_numpy(depth)[..., None] * self._scale * rays.metadata["directions_norm"]
            x, y, _ = (rays.origins + rays.directions * along).unbind(dim=-1)
            x0, y0, x1, y1 = self._bounds
            within = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).numpy()
            self._masks[number, level] = within & (depth > 0), ~within & (depth > 0)
        return self._masks[number, level]

    def _size(self, number: int) -> tuple[int, int]:
        camera = self._dataset.cameras[number]
        return int(camera.height), int(camera.width)

    def _depth(self, number: int) -> np.ndarray:
        return read_depth(self._dataset.metadata["depth_filenames"][number], *self._size(number))


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
