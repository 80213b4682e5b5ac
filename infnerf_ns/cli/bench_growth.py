"""``infnerf-bench growth``: does a growing tree find what its points do not know?

A capture is trained three times for equal minutes: with all points, without the points of one district, so that the
tree has no nodes for it, and the latter with growth. Held-out pixels are told apart by where their surfaces lie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.engine.trainer import Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infnerf_ns.cli.bench_district import District, DistrictPixels
from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_quality import Quality, held_out_psnr, result_line
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.pyramid_datamanager import with_points
from infnerf_ns.errors import InputError
from infnerf_ns.training.image_pictures import side_by_side

_GROWTH = "pipeline.model.growth.every"


@dataclass
class Growth:
    """PSNR in a district whose points are missing, without growth and with it, and elsewhere."""

    data: Path = Path("demo")
    """Capture with SfM points: as for `infnerf-bench quality`."""
    scale: float = 1.0
    """Size of the photos, relative."""
    size: int = 1
    """Blocks per side of the demo town."""
    district: tuple[float, float, float, float] = (0.22, 0.22, 0.78, 0.78)
    """Least x, least y, largest x, largest y in the root cube of all points, 0 to 1: the middle, without
    which the cube stays nearly as it is."""
    preset: str = "infnerf-small:pipeline.model.octree.node_resolution=64:pipeline.model.field.log2_table_size=14"
    """Preset that is trained, with settings behind colons as for `infnerf-bench quality`: nodes so small that a capture
    of some minutes needs many of them, as a large one does of large ones."""
    every: int = 500
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
            "all points": (True, self.preset),
            "without": (False, self.preset),
            "without, growing": (False, f"{self.preset}:{_GROWTH}={self.every}"),
        }
        rows: list[dict] = []
        images: dict[str, list[Tensor]] = {}
        for name, (complete, method) in trainings.items():
            quality = _ByDistrict(
                self.data,
                methods=(method,),
                minutes=self.minutes,
                scale=self.scale,
                pixels=self.pixels,
                clock=self.clock,
                seed=self.seed,
                output=self.output,
            )
            quality.prepare(self.size, self.district, complete)
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

    photos: list[Tensor]
    """that are shown"""
    renders: list[Tensor]
    """of these, by the last measurement"""

    def prepare(self, size: int, bounds: tuple[float, float, float, float], complete: bool) -> None:
        """Says what is trained.

        Args:
            size: of the demo town.
            bounds: of the district.
            complete: with the points of the district.

        Raises:
            InputError: the capture has no points, or the district none.
        """
        town = str(self.data) == "demo"
        self._parser = InfNeRFDemoDataParserConfig(size=size) if town else super()._dataparser()
        outputs = with_points(self._parser, True).setup().get_dataparser_outputs("train")
        points = outputs.metadata.get("points3D_xyz")
        if points is None:
            raise InputError(f"--data {self.data}: has no SfM points, so none can be missing")
        self._points, self._district = points.float(), District(points.float(), bounds)
        if not self._district.holds(self._points).any():
            raise InputError(f"--district {' '.join(f'{x:g}' for x in bounds)}: no point lies there")
        if not complete:
            self._parser = without_points(self._parser, self._district)
        self._pixels: DistrictPixels | None = None

    def _dataparser(self) -> DataParserConfig:
        return self._parser

    def _measure(self, trainer: Trainer, now: Callable[[], float]) -> dict:
        model, dataset = trainer.pipeline.model, trainer.pipeline.datamanager.eval_dataset
        if self._pixels is None:
            self._pixels = DistrictPixels(dataset.cameras, self._points, self._district)
        shown = self._pixels.shown()
        cameras = [dataset.cameras[number : number + 1].to(model.device) for number in shown]
        self.photos = [dataset[number]["image"] for number in shown]
        self.renders = [model.get_outputs_for_camera(camera)["rgb"].cpu() for camera in cameras]
        columns: dict[str, float] = {}
        for name, where in (("district", self._pixels.inside), ("elsewhere", self._pixels.elsewhere)):
            psnr, _ = held_out_psnr(model, dataset, self.pixels, self.seed, now, where)
            columns |= {f"psnr_{level} {name}": round(value, 2) for level, value in psnr.items()}
        return columns


def without_points(config: DataParserConfig, district: District) -> DataParserConfig:
    """The config of a dataparser that hands over what another one does, but for the points in a district."""

    class Pointless(config._target):
        def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
            outputs = super()._generate_dataparser_outputs(split, **kwargs)
            points = outputs.metadata.get("points3D_xyz")
            if points is not None:
                kept = ~district.holds(points.float())
                for name, value in outputs.metadata.items():
                    if isinstance(value, Tensor) and len(value.shape) and len(value) == len(points):
                        outputs.metadata[name] = value[kept]
            return outputs

    config = copy.copy(config)
    config._target = Pointless
    return config


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
