"""``infnerf-pack``: turns a trained run into a packed one, a small checkpoint and a page file per node below the root.

The packed run is a folder beside the run, with a config.yml of its own, so every ns-* command takes it as it takes any
run, and its octree can be larger than memory. It is written under another name and renamed when it is complete; the
run itself is only read.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
import yaml
from rich.progress import track

from infnerf_ns.cli.runs import load_run_config, newest_checkpoint, place_config
from infnerf_ns.data.capture.record import RECORD, CaptureRecord
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import TRANSFORMS, map_frame
from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.regular_files import read_small_file
from infnerf_ns.state_validation import require_model_state
from infnerf_ns.streaming.packing import CHECKSUMS, Track, small_state, write_pages
from infnerf_ns.streaming.page_files import PAGES
from infnerf_ns.torch_compat import allow_numpy_scalars
from infnerf_ns.training import checkpoints
from infnerf_ns.training.stopping import kept
from infnerf_ns.validation import warn

_SUFFIX = "-packed"


@dataclass
class Pack:
    """Makes a packed run beside a trained one: its nodes are loaded when a view needs them, within a memory budget."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or its config.yml."""
    half: bool = False
    """Pages in half precision: half the size on disk, the same in memory."""
    overwrite: bool = False
    """Replace an older packed run."""

    def main(self) -> None:
        """Packs and says what to do with the result."""

        def bar(nodes: Iterable[int]) -> Iterable[int]:
            return track(nodes, "Writing pages", transient=True)

        with kept("the run is as it was"):
            packed = pack_run(self.run, half=self.half, overwrite=self.overwrite, progress=bar)
        rounded = f", rounded by at most {packed.rounding:.1e} of a page's norm" if self.half else ""
        print(
            f"infnerf: packed {packed.octree.num_nodes} nodes: {packed.page_bytes / 2**20:.1f} MiB of pages{rounded}"
            f" and a checkpoint of {packed.checkpoint_bytes / 2**20:.1f} MiB, in {packed.folder}"
        )
        print(f"  ns-viewer --load-config {shlex.quote(str(packed.folder / 'config.yml'))}")


@dataclass
class Packed:
    """What packing has made."""

    folder: Path
    """the packed run"""
    octree: Octree
    """its tree"""
    page_bytes: int
    """of all files"""
    checkpoint_bytes: int
    """of the small checkpoint"""
    rounding: float
    """largest relative rounding error of a page (norm of the error over norm of the page); 0 for float32"""


def pack_run(run: Path, *, half: bool, overwrite: bool, progress: Track) -> Packed:
    """Packs the newest whole checkpoint of a run.

    Args:
        run: folder or config.yml.
        half: pages as float16.
        overwrite: an older packed run of the same name goes.
        progress: shows the progress over the nodes.

    Raises:
        InputError: the run cannot be packed, or the result cannot be written; the run is as it was.
    """
    config, folder = load_run_config(run)
    target = folder.with_name(folder.name + _SUFFIX)
    _bring_back(target)
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already: look at it with ns-viewer, or give --overwrite")
    state, path = newest_checkpoint(folder / config.relative_model_dir)
    model = checkpoints.model_state(state)
    if CHECKSUMS in model:
        raise InputError(f"{path} is packed already; pack the run that it was made from")
    settings = config.pipeline.model
    sizes = settings.field, settings.octree.node_resolution, settings.octree.max_level
    octree = require_model_state(model, *sizes, source=str(path))
    young = int((model.get("field.maturity", torch.ones(1)) < 1).sum())
    if young:
        warn(
            f"{path}: {young} nodes have not taken over from their parents yet; a packed run shows them as if they had:"
            " train on and pack a later checkpoint"
        )
    layout = PageLayout(*sizes)
    beside = _files_beside(folder)
    work = folder.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a packing that was killed
        _require_space(folder.parent, sum(value.nbytes for value in model.values()), layout, octree, half)
        work.mkdir()
        checksums, rounding = write_pages(model, octree, layout, work / PAGES, half, progress)
        small = small_state(model, octree, layout, checksums)
        others = {name: value for name, value in state["pipeline"].items() if not name.startswith(checkpoints.MODEL)}
        checkpoint = checkpoints.checkpoint_path(work / config.relative_model_dir, state["step"])
        failure = checkpoints.write_checkpoint(
            {
                "step": state["step"],
                "pipeline": {**others, **{checkpoints.MODEL + name: value for name, value in small.items()}},
                "optimizers": {},
            },
            checkpoint,
            keep=None,
        )
        if failure is not None:
            raise OSError(failure)
        config.timestamp += _SUFFIX
        place_config(config, target)
        (work / "config.yml").write_text(yaml.dump(config), encoding="utf-8")
        for name, content in beside.items():
            (work / name).write_bytes(content)
        sizes = sum(file.stat().st_size for file in (work / PAGES).rglob("*.safetensors")), checkpoint.stat().st_size
        _put_in_place(work, target)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror or error}): free disk space, or allow writing there; the run"
            " is as it was"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Packed(target, octree, *sizes, rounding)


def _files_beside(folder: Path) -> dict[str, bytes]:
    """What a run is rendered with beside its configuration and checkpoint, by name; both are read as the commands that
    use them do, so that what goes along is nothing else."""
    found = {}
    if os.path.lexists(folder / TRANSFORMS):
        map_frame(folder, np.array([0.0, 0.0, 1.0]))
        found[TRANSFORMS] = read_small_file(folder / TRANSFORMS, "the run's transform,")
    if os.path.lexists(folder / RECORD):
        CaptureRecord.read(folder / RECORD)
        found[RECORD] = (folder / RECORD).read_bytes()
    return found


def _require_space(folder: Path, model_bytes: int, layout: PageLayout, octree: Octree, half: bool) -> None:
    pages = sum(layout.page_bytes(level, training=False) for level in octree.level[1:].tolist())
    needed = 1.02 * (model_bytes - (pages // 2 if half else 0)) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the packed run needs {needed / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB free: make room,"
            " or give --half; the run is as it was"
        )


def _older(target: Path) -> Path:
    return target.with_name(f".{target.name}.older")


def _bring_back(target: Path) -> None:
    """The older packed run, if a packing was killed just before the new one took its place. Where that cannot be done
    nothing can be written, which the caller is going to say."""
    if _older(target).exists() and not target.exists():
        with contextlib.suppress(OSError):
            _older(target).rename(target)


def _put_in_place(work: Path, target: Path) -> None:
    """Renames the finished folder; an older one goes only when the new one is there."""
    older = _older(target)
    shutil.rmtree(older, ignore_errors=True)
    if target.exists():
        os.replace(target, older)
    try:
        os.replace(work, target)
    except OSError:
        if older.exists():
            os.replace(older, target)
        raise
    shutil.rmtree(older, ignore_errors=True)


def entrypoint() -> None:
    """The console script."""
    allow_numpy_scalars()
    tyro.cli(Pack).main()
