"""``infnerf-bench memory``: how much of the model a view needs while the demo town grows.

Every town has the cameras, SfM points and tree of ``ns-train ... infnerf-demo --size N`` and is trained in small steps
on rays cast into the town, whose depths are told to the density (:func:`.bench_training.depth_loss`), until its samples
lie on its surfaces. Then it is packed as ``infnerf-pack`` does it, and every view is rendered in a fresh process that
starts with the small checkpoint alone: counted are the pages that its samples touch. Beside them stands in how many
nodes the surfaces lie that the view shows, known from the town itself: what that number tends to with the training. The
views: in a street in the middle of the town, above a roof there with a quarter of the town before it, and as far above
that all of it is in the picture.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import torchvision
from jaxtyping import Float, UInt8
from nerfstudio.data.scene_box import SceneBox
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim.lr_scheduler import ExponentialLR

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_town import Town, TownRays, survey_town
from infnerf_ns.cli.bench_trainer import StepTrainer
from infnerf_ns.cli.bench_training import depth_loss, peak_bytes
from infnerf_ns.cli.bench_views import VIEWS, TownViews, view_camera
from infnerf_ns.cli.command import Command
from infnerf_ns.data.demo_dataparser import MAX_SIZE
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel, InfNeRFModelConfig
from infnerf_ns.presets import load_preset
from infnerf_ns.rendering import BLEND_SHARPENING
from infnerf_ns.state_validation import octree_from_state
from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE
from infnerf_ns.streaming.packing import small_state, write_pages
from infnerf_ns.streaming.page_files import PAGES
from infnerf_ns.streaming.views import FrameReport
from infnerf_ns.validation import Range, require_valid

_MIB = 2**20
_STATE = "small.pt"
_LAST_RATE = 0.02
"""Learning rates at the end of a training, relative to its start."""


@dataclass
class Memory(Command):
    """Memory of a view while the demo town grows: nodes and bytes that a street view, a view from a roof and one from
    far above need of a packed model."""

    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Blocks per side of the towns."""
    steps: Annotated[int, Range(high=10_000_000)] = 2000
    """Training steps of a town of one block; the others take this many times their blocks per side."""
    rays: Annotated[int, Range(high=1 << 20)] = 1024
    """Rays per step."""
    width: Annotated[int, Range(high=65_535)] = 960
    """Of the views, in pixels."""
    height: Annotated[int, Range(high=65_535)] = 540
    """Of the views, in pixels."""
    preset: str = "infnerf-big"
    """A preset, or a YAML file."""
    log2_table_size: int = 16
    """Most entries of a hash level of grids and proposals, as a power of two. With 17, as in the preset, pages are
    twice as large, and a town of 8 x 8 blocks does not fit into 24 GB while it is trained."""
    seed: Annotated[int, Range(high=2**32 - 1)] = 0
    """Of the towns."""
    output: Path = Path("memory")
    """Table, plot and pictures: this name with .csv, .png and _views.png."""

    def main(self) -> None:
        """Builds, trains and packs the towns, renders the views, prints a table and writes it, a plot and pictures."""
        self._check()
        require_valid(self)
        print(describe_machine())
        print(
            f"{self.preset}, tables of 2^{self.log2_table_size}, {self.steps} steps of {self.rays} rays per block of a"
            f" town's side, views of {self.width}x{self.height}",
            flush=True,
        )
        table, plot = table_and_plot(self.output)
        rows: list[dict] = []
        pictures = []
        for size in self.sizes:
            with tempfile.TemporaryDirectory() as folder:
                config = load_preset(self.preset, "cpu").pipeline.model
                config.field.log2_table_size = config.field.proposal_log2_table_size = self.log2_table_size
                self._train_and_pack(size, Path(folder), config)
                views = TownViews(size, self.seed)
                rendered = [self._render(Path(folder), config, pose) for pose in views.poses]
                octree = octree_from_state(torch.load(Path(folder) / _STATE, weights_only=True)[1], "field.")
            for view, pose, each in zip(VIEWS, views.poses, rendered):
                camera = view_camera(pose, self.width, self.height)
                rows.append(_row(size, view, each, views.surface_nodes(octree, camera, BLEND_SHARPENING)))
            pictures.append(torch.cat([torch.from_numpy(each.rgb) for each in rendered], dim=1))
            for row in rows[-len(VIEWS) :]:
                print(_line(row), flush=True)
            write_table(rows, table)
        _print_table(rows)
        _plot(rows, plot, f"{self.preset}, {self.width}x{self.height} pixels")
        pictured = self.output.with_name(f"{self.output.name}_views.png")
        torchvision.utils.save_image(torch.cat(pictures).permute(2, 0, 1).float() / 255, pictured)
        print(f"infnerf: wrote {table}, {plot} and {pictured}")

    def _check(self) -> None:
        sizes = self.sizes
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > MAX_SIZE:
            raise InputError(f"--sizes {' '.join(map(str, sizes))}: give rising numbers, 1 to {MAX_SIZE}")
        for name in ("steps", "rays", "width", "height"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: give 1 or more")
        if not 8 <= self.log2_table_size <= 26:
            raise InputError(f"--log2-table-size {self.log2_table_size}: give 8 to 26")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give 0 or more")

    def _train_and_pack(self, size: int, folder: Path, config: InfNeRFModelConfig) -> None:
        preset = load_preset(self.preset, "cpu")
        steps = size * self.steps
        town = survey_town(size, self.seed, preset.pipeline.datamanager, self.rays, steps)
        config.octree.level_start_steps = steps // (config.octree.max_level + 2)
        with contextlib.redirect_stdout(io.StringIO()):  # the tree's table
            trainer = StepTrainer(config, town.scene, len(town.cameras), preset.optimizers)
        needed, free = 4 * _model_bytes(trainer.model), psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"--sizes {' '.join(map(str, self.sizes))}: to train the town of {size} blocks per side takes"
                f" {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of memory are free: leave it out"
            )
        rays = TownRays(town.cameras, preset.pipeline.datamanager)
        decays = [ExponentialLR(optimizer, _LAST_RATE ** (1 / steps)) for optimizer in trainer.optimizers]
        for step in track(range(steps), f"training in a town of {size} x {size} blocks", transient=True):
            trainer.step(step, *rays(town, step), depth_loss)
            for decay in decays:
                decay.step()
        pack_model(trainer.model, town, folder)

    def _render(self, folder: Path, config: InfNeRFModelConfig, pose: Float[np.ndarray, "3 4"]) -> Rendered:
        """A view in a fresh process."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(render_view, folder, config, pose, self.width, self.height).result()
            except BrokenProcessPool as error:
                raise InputError(
                    "the process that rendered a view was ended: too little memory? leave out the largest town"
                ) from error


@dataclass
class Rendered:
    """A view, and what it took."""

    nodes: int
    """of the whole model"""
    model_bytes: int
    """of the whole model"""
    page_bytes: int
    """of a node below the root"""
    report: FrameReport
    """of the view"""
    idle_bytes: int
    """largest resident size of the process before the view"""
    peak_bytes: int
    """and with it"""
    rgb: UInt8[np.ndarray, "H W 3"]
    """the picture"""


def pack_model(model: InfNeRFModel, town: Town, folder: Path) -> None:
    """Writes the pages of a model that is in memory, and what else it takes to load it."""
    octree, layout = model.field.octree, model.field.pages
    state = {name: value.detach() for name, value in model.state_dict().items()}
    checksums, _ = write_pages(state, octree, layout, folder / PAGES, False, iter)
    torch.save((len(town.cameras), small_state(state, octree, layout, checksums)), folder / _STATE)


def render_view(
    folder: Path, config: InfNeRFModelConfig, pose: Float[np.ndarray, "3 4"], width: int, height: int
) -> Rendered:
    """Loads what :func:`pack_model` wrote and renders one view, with as much memory as it asks for."""
    photos, state = torch.load(folder / _STATE, weights_only=True)
    config.streaming.pages, config.streaming.budget_mib = folder / PAGES, 1 << 20
    os.environ.pop(BUDGET_VARIABLE, None)
    scene, box = SfMScene.placeholder(), SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    with contextlib.redirect_stdout(io.StringIO()):
        model: InfNeRFModel = config.setup(
            scene_box=box, num_train_data=photos, metadata={"sfm_scene": scene}, device="cpu", grad_scaler=None
        )
    model.load_state_dict(state)
    model.eval()
    idle = peak_bytes()
    outputs = model.get_outputs_for_camera(view_camera(pose, width, height))
    cache, report = model.views.cache, model.views.last_frame
    rgb = (outputs["rgb"].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Rendered(cache.octree.num_nodes, cache.model_bytes, cache.page_bytes, report, idle, peak_bytes(), rgb)


def _model_bytes(model: InfNeRFModel) -> int:
    return sum(model.field.pages.memory_bytes(model.field.octree, training=False))


def _row(size: int, view: str, rendered: Rendered, surface_nodes: int) -> dict:
    report = asdict(rendered.report)
    surface_bytes = rendered.model_bytes - (rendered.nodes - surface_nodes) * rendered.page_bytes
    return {
        "size": size,
        "area": size**2,
        "view": view,
        "nodes": rendered.nodes,
        "model_mib": round(rendered.model_bytes / _MIB, 2),
        "nodes_in_view": report["nodes_in_view"],
        "nodes_of_surfaces": surface_nodes,
        "nodes_used": report["nodes_used"],
        "surfaces_mib": round(surface_bytes / _MIB, 2),
        "resident_mib": round(report["bytes_used"] / _MIB, 2),
        "share": round(report["bytes_used"] / rendered.model_bytes, 5),
        "read_mib": round(report["bytes_read"] / _MIB, 2),
        "process_idle_mib": round(rendered.idle_bytes / _MIB),
        "process_peak_mib": round(rendered.peak_bytes / _MIB),
        "seconds": round(report["seconds"], 2),
    }


def _line(row: dict) -> str:
    return (
        f"area x{row['area']}, {row['view']}: {row['nodes_used']} of {row['nodes']} nodes,"
        f" {row['resident_mib']:.0f} of {row['model_mib']:.0f} MiB ({100 * row['share']:.1f} %)"
    )


def _print_table(rows: list[dict]) -> None:
    table = Table(title="memory of a view (MiB); process: its largest size before the view and with it")
    for name in ("area", "view", "nodes", "in view", "surfaces", "used", "model", "resident", "share", "process"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            f"x{row['area']}",
            row["view"],
            f"{row['nodes']:,}",
            str(row["nodes_in_view"]),
            str(row["nodes_of_surfaces"]),
            str(row["nodes_used"]),
            f"{row['model_mib']:,.0f}",
            f"{row['resident_mib']:,.0f}",
            f"{100 * row['share']:.1f} %",
            f"{row['process_idle_mib']:,} to {row['process_peak_mib']:,}",
        )
    Console(width=120).print(table)


def _plot(rows: list[dict], path: Path, title: str) -> None:
    """Bytes over the area: of the model and of each view."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    first = [row for row in rows if row["view"] == VIEWS[0]]
    axis.plot([row["area"] for row in first], [row["model_mib"] for row in first], "ks-", label="whole model")
    for view in VIEWS:
        own = [row for row in rows if row["view"] == view]
        area = [row["area"] for row in own]
        (line,) = axis.plot(area, [row["resident_mib"] for row in own], "o-", label=f"view: {view}")
        axis.plot(area, [row["surfaces_mib"] for row in own], ":", color=line.get_color())
    axis.plot([], [], "k:", label="the surfaces in view")
    area = [row["area"] for row in first]
    axis.set(xscale="log", yscale="log", xlabel="area of the town (blocks)", ylabel="MiB in memory", title=title)
    axis.set_xticks(area, [f"{each}\n{row['nodes']} nodes" for each, row in zip(area, first)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
