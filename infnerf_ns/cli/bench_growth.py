"""``infnerf-bench growth``: does a growing tree find what its points do not know?

A capture is trained three times for equal minutes: with all points, without the points of one district, so that the
tree has no nodes for it, and the latter with growth. Held-out pixels are told apart by where their surfaces lie.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
from infnerf_ns.cli.bench_quality import Quality, held_out_psnr, require_preset
from infnerf_ns.cli.command import Command
from infnerf_ns.data.capture.parsers import parser_type, read_split
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.errors import InputError
from infnerf_ns.training.image_pictures import side_by_side
from infnerf_ns.validation import Range, require_valid

_GROWTH, _CUBE = "pipeline.model.growth.every", "pipeline.model.octree.cube"


@dataclass
class Growth(Command):
    """PSNR in a district whose points are missing, without growth and with it, and elsewhere."""

    data: Path = Path("demo")
    """Capture with SfM points: as for `infnerf-bench quality`."""
    scale: Annotated[float, Range(0.01, 1)] = 1.0
    """Size of the photos, relative."""
    size: int = 1
    """Blocks per side of the demo town."""
    district: tuple[float, float, float, float] = (0.5, 0.5, 1.0, 1.0)
    """Least x, least y, largest x, largest y in the root cube of all points, 0 to 1, seen from above: a quarter, for
    which the root then has no children. All trainings have that cube."""
    preset: str = "infnerf-small:pipeline.model.octree.node_resolution=64:pipeline.model.field.log2_table_size=14"
    """Preset that is trained, with settings behind colons as for `infnerf-bench quality`: nodes so small that a capture
    of some minutes needs many of them, as a large one does of large ones."""
    every: Annotated[int, Range(high=10_000_000)] = 500
    """Steps between two rounds of growth, the first of which is after `growth.start-step`."""
    minutes: Annotated[tuple[float, ...], Range(0.001, 100_000)] = (1.0, 2.0, 4.0, 8.0)
    """When the held-out photos are measured; the last is the length of each training."""
    clock: Literal["wall", "cpu"] = "wall"
    """As for `infnerf-bench quality`."""
    pixels: Annotated[int, Range(1, 1 << 24)] = 1024
    """Held-out pixels per photo and pyramid level, in the district and elsewhere each."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    """Of the trainings and of the pixels."""
    output: Path = Path("growth")
    """Table, plot and held-out photos beside their renders: this name with .csv, .png and -photos.png."""

    def main(self) -> None:
        """Trains, measures, prints a table, writes it, a plot and a picture of renders."""
        require_valid(self)
        print(describe_machine())
        require_preset(self.preset)
        if self.every < 1:
            raise InputError(f"--every {self.every}: give at least 1, or nothing grows")
        table, plot = table_and_plot(self.output)
        picture = plot.with_name(f"{self.output.name}-photos.png")
        trainings = {
            name: _ByDistrict(
                self.data,
                methods=(f"{self.preset}:{_GROWTH}={every}",),
                minutes=self.minutes,
                scale=self.scale,
                pixels=self.pixels,
                clock=self.clock,
                seed=self.seed,
                output=self.output,
            )
            for name, every in (("all points", 0), ("without", 0), ("without, growing", self.every))
        }
        parser = InfNeRFDemoDataParserConfig(size=self.size) if str(self.data) == "demo" else None
        for name, training in trainings.items():
            training.prepare(parser, self.district, complete=name == "all points")
        rows: list[dict] = []
        images: dict[str, list[Tensor]] = {}
        for name, training in trainings.items():
            for row in training.measure():
                rows.append({**row, "method": name})
                print(_line(rows[-1]), flush=True)
                write_table(rows, table)
            photos, renders = training.shown()
            images |= {"photo": photos, name: renders}
            gc.collect()  # a trainer is a circle of few objects and much memory
        _print(rows)
        _plot(rows, plot)
        _draw(images, picture)
        print(f"infnerf: wrote {table}, {plot} and {picture}")


class _ByDistrict(Quality):
    """Measures pixels in a district and elsewhere, and renders held-out photos that show it."""

    _trainer_at_hand: Trainer | None = None

    def prepare(
        self, parser: DataParserConfig | None, bounds: tuple[float, float, float, float], complete: bool
    ) -> None:
        """Says what is trained.

        Args:
            parser: None: the usual one of the capture.
            bounds: of the district.
            complete: with the points of the district.

        Raises:
            InputError: the options cannot be trained, the capture has no points, or no held-out photo shows the
                district, or anything else.
        """
        self._parser = super()._dataparser() if parser is None else parser
        self.check()
        training, held_out = (read_split(self._parser, split, points=True) for split in ("train", "val"))
        points = training.metadata.get("points3D_xyz")
        if points is None:
            raise InputError(f"--data {self.data}: has no SfM points, so none can be missing")
        self._points, self._district = points.float(), District(points.float(), bounds)
        kept = self._points[~self._district.holds(self._points)]
        pixels = DistrictPixels(held_out.cameras, self._points, self._district)
        told = f"--district {' '.join(f'{x:g}' for x in bounds)}"
        if len(kept) < 2 or not pixels.any_elsewhere():
            raise InputError(f"{told}: is the whole scene")
        if len(kept) == len(points) or not pixels.any_inside():
            raise InputError(f"{told}: no point lies there, or no held-out photo shows it")
        if complete:
            print(f"the district has {1 - len(kept) / len(points):.0%} of the points")
        else:
            self._parser = without_points(self._parser, self._district)
        cube = self._district.cube
        self.methods = (f"{self.methods[0]}:{_CUBE}={[*cube.center.tolist(), cube.side]}",)
        self._pixels: DistrictPixels | None = None

    def shown(self) -> tuple[list[Tensor], list[Tensor]]:
        """Held-out photos that show the district, and what the trained model renders there; forgets the model."""
        trainer, self._trainer_at_hand = self._trainer_at_hand, None
        trainer.pipeline.eval()
        model, dataset = trainer.pipeline.model, trainer.pipeline.datamanager.eval_dataset
        numbers = self._pixels.shown()
        cameras = [dataset.cameras[number : number + 1].to(model.device) for number in numbers]
        photos = [model.renderer_rgb.blend_background(dataset[number]["image"]).cpu() for number in numbers]
        return photos, [model.get_outputs_for_camera(camera)["rgb"].cpu() for camera in cameras]

    def _dataparser(self) -> DataParserConfig:
        return self._parser

    def _measure(self, trainer: Trainer, now: Callable[[], float]) -> dict:
        model, dataset = trainer.pipeline.model, trainer.pipeline.datamanager.eval_dataset
        self._trainer_at_hand = trainer
        if self._pixels is None:
            self._pixels = DistrictPixels(dataset.cameras, self._points, self._district)
        columns: dict[str, float] = {"births": int(model.growth.history[:, 2].sum())}
        for name, where in (("district", self._pixels.inside), ("elsewhere", self._pixels.elsewhere)):
            psnr, _ = held_out_psnr(model, dataset, self.pixels, self.seed, now, where)
            columns |= {f"psnr_{level} {name}": round(value, 2) for level, value in psnr.items()}
        return columns


def without_points(config: DataParserConfig, district: District) -> DataParserConfig:
    """The config of a dataparser that hands over what another one does, but for the points in a district."""

    class Pointless(parser_type(config)):
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


def _line(row: dict) -> str:
    """A row in words."""
    psnr = {
        part: " ".join(
            f"{value:.2f}" for name, value in row.items() if name.startswith("psnr_") and name.endswith(part)
        )
        for part in ("district", "elsewhere")
    }
    parts = ", ".join(f"{part} {values}" for part, values in psnr.items())
    return f"{row['method']} after {row['minutes']:g} min: {row['steps']} steps, {row['births']} births, {parts} dB"


def _print(rows: list[dict]) -> None:
    last = {row["method"]: row for row in rows}
    columns = [name for name in rows[0] if name.startswith("psnr_")]
    table = Table(title="held-out PSNR at the end, dB")
    for name in ("", "nodes", *(name.removeprefix("psnr_") for name in columns)):
        table.add_column(name, justify="left" if name == "" else "right", overflow="fold")
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


def _draw(images: dict[str, list[Tensor]], path: Path) -> None:
    """A row per photo: the photo and what every training renders there."""
    strips = [side_by_side(dict(zip(images, row))) for row in zip(*images.values())]
    widest = max(strip.shape[1] for strip in strips)
    padded = [torch.nn.functional.pad(strip, (0, 0, 0, widest - strip.shape[1]), value=1.0) for strip in strips]
    pixels = (torch.cat(padded).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
