"""``infnerf-inspect``: prints and plots the octree of a trained run, packed or not.

Nodes, GSD, bytes and training samples of each level come from the configuration and the checkpoint alone. What a view
uses (``--photo``) is found by rendering it, which needs the data, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from nerfstudio.cameras.cameras import Cameras
from rich.console import Console
from rich.progress import track
from rich.table import Table

from infnerf_ns.cli.command import Command, run_command
from infnerf_ns.cli.inspect_plot import plot_tree
from infnerf_ns.cli.inspect_tree import PageCheck, StoredTree, check_pages, read_tree
from infnerf_ns.cli.inspect_view import View, load_model, look, path_cameras
from infnerf_ns.errors import InputError
from infnerf_ns.torch_compat import allow_numpy_scalars

_SUFFIXES = (".png", ".svg", ".pdf")
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass
class Inspect(Command):
    """The octree of a trained run: nodes, GSD, bytes and training samples of each level, and what views use of it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or its config.yml; packed or not."""
    photo: tuple[int, ...] = ()
    """Numbers of held-out photos, from 0: renders their views at full size and tells which levels and nodes they use.
    Without it the data are not needed."""
    camera_path: Path | None = None
    """Camera path (.json) of the viewer: --photo then numbers its cameras."""
    plot: Path | None = None
    """Picture to draw all that in, .png, .svg or .pdf."""
    verify: bool = False
    """Packed runs: read every page and compare its checksum. Exit code 1 if one is missing or damaged."""

    def main(self) -> None:
        """Reads, renders, prints and plots.

        Raises:
            InputError: also, at the end, if ``verify`` has found bad pages.
        """
        self._check_options()
        tree = read_tree(self.run)
        if self.verify and tree.pages is None:
            raise InputError(f"--verify: {self.run} is not packed, it has no pages; see infnerf-pack")
        check = None
        if tree.pages is not None:
            check = check_pages(tree.pages, tree.octree, _reading_bar if self.verify else None)
        console = Console() if sys.stdout.isatty() else Console(width=120)
        print_tree(tree, check, self.verify, console)
        views = list(self._views(tree, console))
        if self.plot is not None:
            plot_tree(tree, check, views, self.plot)
            print(f"infnerf: wrote {self.plot}")
        else:
            print("infnerf: --plot tree.png draws this")
        if self.verify and check is not None and check.problems:
            raise InputError(
                f"{len(check.problems)} of {tree.octree.num_nodes - 1} pages are missing or damaged, the first:"
                f" {check.problems[0]}; infnerf-pack with --overwrite writes them anew"
            )

    def _check_options(self) -> None:
        if self.camera_path is not None and not self.photo:
            raise InputError(f"--camera-path {self.camera_path}: say with --photo which of its cameras, e.g. --photo 0")
        if self.plot is None:
            return
        if self.plot.suffix.lower() not in _SUFFIXES:
            raise InputError(f"--plot {self.plot}: the name must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
        folder = self.plot.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--plot {self.plot}: {folder} cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK):
            raise InputError(f"--plot {self.plot}: {folder} cannot be written to; choose another folder")

    def _views(self, tree: StoredTree, console: Console) -> Iterable[View]:
        if not self.photo:
            return
        path = None if self.camera_path is None else path_cameras(self.camera_path)
        model, cameras = load_model(tree.folder)
        kind, names = "held-out photo", "the run has {} held-out photos"
        if path is not None:
            cameras, kind, names = path, "camera", "the camera path has {} cameras"
        count = len(cameras)
        for number in self.photo:
            if not 0 <= number < count:
                raise InputError(f"--photo {number}: {names.format(count)}, numbered from 0")
        for number in self.photo:
            camera: Cameras = cameras[number : number + 1]
            size = f"{int(camera.width)} x {int(camera.height)} pixels"
            with console.status(f"rendering {kind} {number}, {size}"):
                view = look(model, camera, f"{kind} {number}, {size}")
            print_view(tree, view, console)
            yield view


def _reading_bar(nodes: Iterable[int]) -> Iterable[int]:
    return track(nodes, "Reading pages", transient=True)


def print_tree(tree: StoredTree, check: PageCheck | None, verified: bool, console: Console) -> None:
    """The tables of the levels.

    Args:
        tree: of the run.
        check: of its pages, if it is packed.
        verified: the pages have been read.
        console: to print to.
    """
    octree, memory = tree.octree, tree.memory_bytes
    full = sum(8**level for level in range(octree.depth + 1))
    table = Table(title=f"Octree of {octree.num_nodes} nodes", show_footer=True)
    table.add_column("level", "total", justify="right", overflow="fold")
    table.add_column("nodes", f"{octree.num_nodes:,}", justify="right", overflow="fold")
    table.add_column("GSD", justify="right", overflow="fold")
    table.add_column("pruned", f"{100 * (1 - octree.num_nodes / full):.1f} %", justify="right", overflow="fold")
    table.add_column("memory", _size(sum(memory)), justify="right", overflow="fold")
    if check is not None:
        table.add_column("on disk", _size(int(check.bytes_on_disk.sum())), justify="right", overflow="fold")
    if check is not None and verified:
        table.add_column("missing", str(int(check.missing.sum())), justify="right", overflow="fold")
        table.add_column("damaged", str(int(check.damaged.sum())), justify="right", overflow="fold")
    for row in octree.summary(memory):
        at = octree.level == row["level"]
        cells = [str(row["level"]), f"{row['nodes']:,}", f"{row['gsd']:.4g}", f"{100 * row['pruned']:.1f} %"]
        cells.append(_size(row["bytes"]))
        if check is not None:
            cells.append(_size(int(check.bytes_on_disk[at].sum())) if row["level"] else "-")
        if check is not None and verified:
            cells += [str(int(check.missing[at].sum())), str(int(check.damaged[at].sum()))]
        table.add_row(*cells)
    print(tree.checkpoint)
    console.print(table)
    field = tree.config.pipeline.model.field
    decoders = {"node": "a decoder per node", "level": "a decoder per level", "tree": "one decoder"}
    print(
        f"{field.children} children, {decoders[field.decoder_sharing]}; root cube of side {octree.cube.side:.4g} scene"
        f" units; step {tree.step}"
    )
    if tree.active_level < octree.depth:
        print(f"levels deeper than {tree.active_level} have not started: the nodes there are not used yet")
    if check is not None and not verified:
        missing = int(check.missing.sum())
        found = f"{missing} page files are missing" if missing else "all page files are there"
        print(f"packed: {found}; --verify also reads them")
    _print_samples(tree, console)


def _print_samples(tree: StoredTree, console: Console) -> None:
    octree, samples = tree.octree, tree.node_samples
    if samples is None:
        print("training samples per node: not counted, the run was trained with an earlier version")
        return
    table = Table(title="Training samples per node", show_footer=True)
    table.add_column("level", "total", justify="right", overflow="fold")
    for name in ("least", "median", "most"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("all nodes", f"{int(samples.sum()):,}", justify="right", overflow="fold")
    table.add_column("never trained", str(int((samples == 0).sum())), justify="right", overflow="fold")
    for level in range(octree.depth + 1):
        here = samples[octree.level == level]
        numbers = [f"{int(each):,}" for each in (here.min(), here.double().quantile(0.5), here.max(), here.sum())]
        table.add_row(str(level), *numbers, str(int((here == 0).sum())))
    console.print(table)
    print("a sample counts at the node that evaluates it, not at its ancestors")


def print_view(tree: StoredTree, view: View, console: Console) -> None:
    """The table of a view's levels."""
    octree, used = tree.octree, int(view.used.sum())
    table = Table(title=view.name, show_footer=True)
    table.add_column("level", "total", justify="right", overflow="fold")
    table.add_column(
        "share of picture", f"{100 * float(view.picture_share.sum()):.1f} %", justify="right", overflow="fold"
    )
    table.add_column(
        "share of samples", f"{100 * float(view.sample_share.sum()):.1f} %", justify="right", overflow="fold"
    )
    table.add_column("nodes", f"{octree.num_nodes:,}", justify="right", overflow="fold")
    table.add_column("in view", f"{int(view.in_view.sum()):,}", justify="right", overflow="fold")
    table.add_column("used", f"{used:,}", justify="right", overflow="fold")
    for level, count in enumerate(octree.nodes_per_level):
        at = octree.level == level
        table.add_row(
            str(level),
            f"{100 * float(view.picture_share[level]):.1f} %",
            f"{100 * float(view.sample_share[level]):.1f} %",
            f"{count:,}",
            f"{int(view.in_view[at].sum()):,}",
            f"{int(view.used[at].sum()):,}",
        )
    console.print(table)
    mean = sum(level * share for level, share in enumerate(view.picture_share.tolist()))
    bytes_used, bytes_all = tree.bytes_of(view.used), sum(tree.memory_bytes)
    print(
        f"mean level {mean:.2f}; the view uses {used} of {octree.num_nodes} nodes, {_size(bytes_used)} of"
        f" {_size(bytes_all)} ({100 * bytes_used / bytes_all:.1f} %)"
    )
    if view.footprint_scale > 1:
        print(f"drawn coarser to fit the memory budget: footprints {view.footprint_scale:.3g} times as large")


def _size(count: int) -> str:
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), _UNITS[-1])
    return f"{count / unit:,.1f} {name}"


def entrypoint() -> None:
    """The console script."""
    allow_numpy_scalars()
    run_command(tyro.cli(Inspect))
