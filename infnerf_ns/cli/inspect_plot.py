"""The figure of ``infnerf-inspect``: the tree in numbers, from above and from the side, and what views use of it.

A level has one colour throughout, that of the model's output `level`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infnerf_ns.cli.inspect_tree import PageCheck, StoredTree
from infnerf_ns.cli.inspect_view import View
from infnerf_ns.errors import InputError
from infnerf_ns.octree import Octree
from infnerf_ns.training.pictures import draw_nodes

_DRAWN_SAMPLES = 400
"""Most nodes of a level that are drawn as points beside its box."""
_PALE = 0.35
"""Opacity of the second of two bars of a level."""


def plot_tree(tree: StoredTree, check: PageCheck | None, views: list[View], path: Path) -> None:
    """Draws the figure.

    Args:
        tree: of the run.
        check: of its pages, if it is packed.
        views: a row of panels each.
        path: picture to write, .png, .svg or .pdf; its folder is there.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    octree = tree.octree
    colors = matplotlib.colormaps["turbo"](np.arange(octree.depth + 1) / max(octree.depth, 1))
    heights = [3.2, 5.5, *[3.7] * len(views)]
    figure = pyplot.figure(figsize=(15, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    nodes, memory, gsd, samples = rows[0].subplots(1, 4)
    _bars(nodes, colors, "{:,.0f}", octree.nodes_per_level)
    nodes.set_title("nodes")
    in_memory = [each / 2**20 for each in tree.memory_bytes]
    if check is None:
        _bars(memory, colors, "{:,.3g}", in_memory)
        memory.set_title("memory, MiB")
    else:
        files = torch.zeros(octree.depth + 1, dtype=torch.long).index_add(0, octree.level, check.bytes_on_disk)
        _bars(memory, colors, "{:,.3g}", in_memory, (files / 2**20).tolist())
        memory.set_title("memory (full) and page files (pale), MiB")
    _gsd(gsd, octree, colors)
    _samples(samples, tree, colors)
    everything = torch.ones(octree.num_nodes, dtype=torch.bool)
    planes = {(0, 1): "from above", (0, 2): "from the front", (1, 2): "from the side"}
    for axis, (plane, name) in zip(rows[1].subplots(1, 3), planes.items()):
        draw_nodes(axis, octree, everything, plane, colors)
        _frame(axis, octree, plane, f"the tree {name}")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    labels = [f"level {level}" for level in range(octree.depth + 1)]
    rows[1].legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for row, view in zip(rows[2:], views):
        _view(row, tree, view, colors)
    run = "/".join((tree.config.experiment_name or "", tree.config.method_name, tree.config.timestamp))
    rows[0].suptitle(
        f"{run}, step {tree.step}: {octree.num_nodes} nodes, {sum(in_memory):,.3g} MiB", fontsize="x-large"
    )
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise InputError(f"--plot {path}: cannot be written ({error.strerror or error})") from error
    finally:
        pyplot.close(figure)


def _bars(axis: Any, colors: np.ndarray, number: str, full: list[float], pale: list[float] | None = None) -> None:
    """A bar per level, or two, with their numbers on them."""
    both = [(full, 1.0)] if pale is None else [(full, 1.0), (pale, _PALE)]
    width = 0.7 if pale is None else 0.4
    for turn, (values, opacity) in enumerate(both):
        places = np.arange(len(values)) + (turn - (len(both) - 1) / 2) * width
        bars = axis.bar(places, values, color=colors, width=width, alpha=opacity)
        texts = [number.format(value) if value else "" for value in values]
        axis.bar_label(bars, texts, padding=2, fontsize="small" if pale is None else "x-small")
    axis.margins(y=0.12)
    _level_axis(axis, len(full))


def _level_axis(axis: Any, count: int) -> None:
    axis.set_xticks(range(count))
    axis.set(xlabel="level", xlim=(-0.6, count - 0.4))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _gsd(axis: Any, octree: Octree, colors: np.ndarray) -> None:
    values = [octree.gsd(level) for level in range(octree.depth + 1)]
    axis.plot(range(len(values)), values, color="0.6", zorder=1)
    axis.scatter(range(len(values)), values, color=colors, s=60, zorder=2)
    axis.set(yscale="log", title="GSD, scene units", ylim=(min(values) / 1.4, max(values) * 1.4))
    axis.set_yticks(values, [f"{value:.2g}" for value in values])
    axis.minorticks_off()
    _level_axis(axis, len(values))


def _samples(axis: Any, tree: StoredTree, colors: np.ndarray) -> None:
    """A box (quartiles, median; whiskers to the least and most) and the nodes themselves as points."""
    axis.set_title("training samples per node")
    if tree.node_samples is None:
        axis.text(0.5, 0.5, "not counted", transform=axis.transAxes, ha="center", va="center", color="0.5")
        axis.set_axis_off()
        return
    random = np.random.default_rng(0)
    for level in range(tree.octree.depth + 1):
        counts = tree.node_samples[tree.octree.level == level].numpy()
        outline = {"color": "0.25"}
        if len(counts) > 1:
            axis.boxplot(
                counts,
                positions=[level],
                widths=0.6,
                whis=(0, 100),
                manage_ticks=False,
                boxprops=outline,
                medianprops={**outline, "linewidth": 2},
                whiskerprops=outline,
                capprops=outline,
            )
        shown = random.permutation(counts)[:_DRAWN_SAMPLES]
        place = level + (random.random(len(shown)) - 0.5) * (0.45 if len(counts) > 1 else 0)
        axis.scatter(place, shown, s=10 if len(counts) > 1 else 60, color=colors[level], alpha=0.6, linewidths=0)
    some = tree.node_samples[tree.node_samples > 0]
    if len(some) == tree.octree.num_nodes:
        axis.set_yscale("log")
    else:  # a node that was never trained stands at 0, just below the one that was trained the least
        axis.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(some.min())), linscale=0.5)
        axis.set_ylim(bottom=0)
    axis.minorticks_off()
    _level_axis(axis, tree.octree.depth + 1)


def _frame(axis: Any, octree: Octree, plane: tuple[int, int], title: str) -> None:
    half = 0.53 * octree.cube.side
    axis.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", title=title)
    axis.set(xlabel=f"{'xyz'[plane[0]]} in the root cube, scene units", ylabel="xyz"[plane[1]])
    axis.spines[["top", "right"]].set_visible(False)


def _view(row: Any, tree: StoredTree, view: View, colors: np.ndarray) -> None:
    """The picture, its levels, their histogram, and the nodes on the map."""
    octree = tree.octree
    picture, level, histogram, above = row.subplots(1, 4)
    for axis, image, title in ((picture, view.rgb, "render"), (level, view.level_color, "mean level of each pixel")):
        axis.imshow(image, interpolation="lanczos")
        axis.set_title(title)
        axis.set_axis_off()
    _bars(histogram, colors, "{:.0f}", (100 * view.picture_share).tolist(), (100 * view.sample_share).tolist())
    histogram.set_title("% of picture (full) and samples (pale)")

    coarse_to_fine = octree.depth + 2
    unseen, unused = ~view.in_view, view.in_view & ~view.used
    draw_nodes(above, octree, view.used, (0, 1), colors)
    outline = {"facecolor": "none", "zorder": coarse_to_fine}
    draw_nodes(above, octree, unseen, (0, 1), colors, **{**outline, "edgecolor": "0.6", "linewidth": 0.6})
    draw_nodes(above, octree, unused, (0, 1), colors, **{**outline, "linestyle": "--", "linewidth": 1.5})
    _frame(above, octree, (0, 1), f"{int(view.used.sum())} nodes used, {int(unused.sum())} more in view (dashed)")
    pose, side = view.camera_to_world, octree.cube.side
    place = ((octree.cube.to_unit(pose[:, 3]) - 0.5) * side).tolist()
    ahead = (octree.cube.rotation @ -pose[:, 2] * 0.12 * side).tolist()
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.5}
    tip = (place[0] + ahead[0], place[1] + ahead[1])
    above.annotate("", tip, place[:2], arrowprops=arrow, zorder=coarse_to_fine + 1)
    above.plot(place[0], place[1], "o", color="black", zorder=coarse_to_fine + 1)
    row.suptitle(view.name, fontsize="large")
