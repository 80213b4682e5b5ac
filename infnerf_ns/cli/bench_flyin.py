"""``infnerf-bench flyin``: frame time and bytes along a flight from orbit height to street level, within a budget.

Each frame is also drawn a thousandth of a frame's motion later. A picture that changes steadily hardly changes by that;
where a level switches with a jump, it does. Beside it stands the change of a still camera, which is what the rendering
itself adds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import torchvision
import tyro
from jaxtyping import Float
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.cameras import Cameras
from rich.progress import track
from torch import Tensor

from infnerf_ns.camera_paths import read_camera_path
from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.command import Command
from infnerf_ns.cli.fly_in_path import between, camera_path, fly_in
from infnerf_ns.cli.runs import open_run
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.pipeline import InfNeRFPipeline
from infnerf_ns.validation import Range, require_valid

_SMALL_STEP = 0.001
"""Of a frame."""
_FRAMES = 60
_FRAME_NAME = re.compile(r"\d{4,}\.png")
_MIB = 2**20


@dataclass
class Flyin(Command):
    """A flight from orbit height to street level through a packed run: frame time, bytes per frame, jumps."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a packed run, or its config.yml."""
    budget_mib: Annotated[int, Range(high=1 << 30)] = 64
    """Memory for nodes."""
    photo: int | None = None
    """Train photo that the flight ends at; by default the one with the nearest surroundings."""
    frames: Annotated[int, Range(high=1_000_000)] | None = None
    """Of the flight; by default 60."""
    camera_path: Path | None = None
    """Fly this path (nerfstudio's format) instead, at its own proportions."""
    width: Annotated[int, Range(high=65_535)] = 480
    """Of a frame, pixels."""
    height: Annotated[int, Range(high=65_535)] | None = None
    """Of a frame of the flight, pixels; by default 9 to 16 of the width."""
    output: Path = Path("flyin")
    """Table, plot and camera path (for ns-render camera-path): this name with .csv, .png and .json; the frames are
    written into a folder of this name."""

    def main(self) -> None:
        """Flies, prints what was found, writes table, plot, path and frames."""
        require_valid(self)
        self._check()
        pipeline, folder, _ = open_run(self.run)
        model = pipeline.model
        if model.views is None:
            raise InputError(f"{folder}: this run is not packed; make a packed one with infnerf-pack {folder}")
        print(describe_machine())
        table, plot = table_and_plot(self.output)
        path = self._path(pipeline)
        model.views.cache.set_budget(self.budget_mib << 20)
        rows = []
        for number in track(range(len(path)), "flying", transient=True):
            row, rgb = _frame(model, path, number)
            torchvision.utils.save_image(rgb.permute(2, 0, 1), self.output / f"{number:04d}.png")
            rows.append(row)
            write_table(rows, table)
        _print_summary(rows, model, self.budget_mib)
        _plot(rows, plot, self.budget_mib)
        print(f"infnerf: wrote {table}, {plot} and the frames in {self.output}")

    def _check(self) -> None:
        for name, least in (("budget_mib", 1), ("frames", 2), ("width", 1), ("height", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
        if self.camera_path is not None:
            if not self.camera_path.is_file():
                raise InputError(f"--camera-path {self.camera_path}: there is no such file")
            for name in ("photo", "frames", "height"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name} {getattr(self, name)}: --camera-path says that; leave it out")
        self._make_room()

    def _make_room(self) -> None:
        """The folder of the frames; those of an older flight, which may have been longer, go."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            there = list(self.output.iterdir())
            if there and not table_and_plot(self.output)[0].exists():
                raise InputError(f"--output {self.output}: the folder holds other files; choose another")
            for frame in there:
                if _FRAME_NAME.fullmatch(frame.name):
                    frame.unlink()
        except OSError as error:
            raise InputError(f"--output {self.output}: cannot be written ({error.strerror}); choose another") from error

    def _path(self, pipeline: InfNeRFPipeline) -> Cameras:
        """The cameras of the flight; one that is made here is written down."""
        if self.camera_path is not None:
            path = get_path_from_json(read_camera_path(self.camera_path, "--camera-path"))
            if len(path) < 2:
                raise InputError(f"--camera-path {self.camera_path}: a flight has two cameras or more")
            path.rescale_output_resolution(self.width / float(path.width[0]))
            return path.to(pipeline.device)
        cameras = pipeline.datamanager.train_dataset.cameras
        if self.photo is not None and not 0 <= self.photo < len(cameras):
            raise InputError(f"--photo {self.photo}: the run has {len(cameras)} train photos, numbered from 0")
        model = pipeline.model
        nears = model.near_planes(cameras) if model.near_planes is not None else torch.full((len(cameras),), 0.05)
        photo = int(nears.argmin()) if self.photo is None else self.photo
        cube = model.field.whole_tree.cube
        end, distance = cameras.camera_to_worlds[photo].cpu(), 2 * float(nears[photo])
        poses = fly_in(end, distance, cube.rotation[2].cpu(), 2.5 * cube.side, self.frames or _FRAMES)
        focal = float(cameras.fx[photo]) / float(cameras.width[photo]) * self.width
        height = self.height or max(1, round(self.width * 9 / 16))
        written = camera_path(poses, self.width, height, focal, frames_per_second=24)
        file = self.output.with_name(f"{self.output.name}.json")
        file.write_text(json.dumps(written), encoding="utf-8")
        print(f"infnerf: the flight ends at train photo {photo}; its path is {file}")
        return get_path_from_json(written).to(pipeline.device)


def _frame(model: InfNeRFModel, path: Cameras, number: int) -> tuple[dict, Float[Tensor, "H W 3"]]:
    """A row for a frame, and the frame."""
    assert model.views is not None
    views, cache = model.views, model.views.cache
    camera = path[number : number + 1]
    start = perf_counter()
    rgb = model.get_outputs_for_camera_ray_bundle(model.camera_rays(camera))["rgb"]
    seconds, report = perf_counter() - start, views.last_frame
    assert report is not None
    still = model.get_outputs_for_camera_ray_bundle(model.camera_rays(camera))["rgb"]
    following = path[min(number + 1, len(path) - 1) : min(number + 1, len(path) - 1) + 1]
    nearly = path[number : number + 1]
    nearly.camera_to_worlds = between(camera.camera_to_worlds[0], following.camera_to_worlds[0], _SMALL_STEP)[None]
    moved = model.get_outputs_for_camera_ray_bundle(model.camera_rays(nearly))["rgb"]
    read, prefetched = cache.counters.bytes_read, cache.counters.prefetched
    if number + 1 < len(path):
        views.prefetch(following, model.camera_rays)
        cache.settle()
    row = {
        "frame": number,
        "seconds": round(seconds, 3),
        "nodes_in_view": report.nodes_in_view,
        "nodes_used": report.nodes_used,
        "read_mib": round(report.bytes_read / _MIB, 3),
        "read_ahead_mib": round((cache.counters.bytes_read - read) / _MIB, 3),
        "prefetched_pages": cache.counters.prefetched - prefetched,
        "resident_mib": round(report.bytes_resident / _MIB, 3),
        "peak_mib": round(cache.counters.peak_bytes / _MIB, 3),
        "footprint_scale": round(report.footprint_scale, 4),
        "change_still": round(float((still - rgb).abs().mean()), 6),
        "change_small_step": round(float((moved - rgb).abs().mean()), 6),
        "change_small_step_max": round(float((moved - rgb).abs().amax()), 5),
    }
    return row, rgb.clamp(0, 1).cpu()


def _print_summary(rows: list[dict], model: InfNeRFModel, budget_mib: int) -> None:
    assert model.views is not None
    cache = model.views.cache
    seconds = np.array([row["seconds"] for row in rows])
    small = np.array([row["change_small_step"] for row in rows[:-1]])
    print(
        f"{len(rows)} frames, median {np.median(seconds):.2f} s; model {cache.model_bytes / _MIB:.0f} MiB, most"
        f" resident {rows[-1]['peak_mib']:.1f} of {budget_mib} MiB; {cache.counters.pages_read} pages read,"
        f" {cache.counters.prefetched} of them ahead; {cache.counters.evictions} given up"
    )
    print(
        f"change of a still camera {max(row['change_still'] for row in rows):.2g}; of a thousandth of a frame's motion"
        f" median {np.median(small):.2g}, largest {small.max():.2g} (1 = black to white)"
    )


def _plot(rows: list[dict], path: Path, budget_mib: int) -> None:
    """Time, bytes, nodes and change, over the frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory, nodes, change) = pyplot.subplots(4, 1, figsize=(7, 9), sharex=True)
    frame = [row["frame"] for row in rows]
    time.plot(frame, [row["seconds"] for row in rows])
    time.set(ylabel="s per frame", ylim=(0, None))
    memory.plot(frame, [row["resident_mib"] for row in rows], label="resident")
    read, ahead = ([row[name] for row in rows] for name in ("read_mib", "read_ahead_mib"))
    memory.bar(frame, read, color="tab:orange", label="read while the frame was drawn")
    memory.bar(frame, ahead, bottom=read, color="tab:green", label="read ahead for the next one")
    memory.axhline(budget_mib, color="k", ls="--", lw=1, label="budget")
    memory.set(ylabel="MiB")
    nodes.plot(frame, [row["nodes_in_view"] for row in rows], label="in view")
    nodes.plot(frame, [row["nodes_used"] for row in rows], label="used")
    nodes.set(ylabel="nodes")
    scale = nodes.twinx()
    scale.plot(frame, [row["footprint_scale"] for row in rows], "k:", label="footprint scale")
    scale.set(ylabel="footprint scale (dotted)", ylim=(0, None))
    change.plot(frame[:-1], [row["change_small_step"] for row in rows[:-1]], label="a thousandth of a frame's motion")
    change.plot(frame, [row["change_still"] for row in rows], label="still camera")
    change.axhline(0.5 / 255, color="k", ls="--", lw=1, label="half a step of 8 bits")
    change.set(ylabel="mean change", xlabel="frame, from orbit height to street level")
    for axis in (memory, nodes, change):
        axis.legend(fontsize="small")
    for axis in (time, memory, nodes, change):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
