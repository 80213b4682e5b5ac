"""Pictures of a training for TensorBoard and W&B: the tree over time and in space, and the samples along a ray.

Every function returns an image [H, W, 3] in 0..1 on the CPU, for nerfstudio's ``writer.put_image``. A level has one
colour throughout, that of the model's output `level`. Figures are drawn without pyplot, whose state is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from torch import Tensor

from infnerf_ns.octree import Octree
from infnerf_ns.tree_colors import level_colors

DOTS_PER_INCH = 130
"""Of all figures: labels can still be read when TensorBoard shows them at half their size."""
_BARS = 80
"""Equal parts of a training over which births and deaths are summed up."""
_INSET = 0.02
"""How far a cell is drawn inside its edges, relative to the smallest and per level: a child's lines then lie beside its
parent's."""
_THOUSANDS = FuncFormatter(lambda value, _: f"{abs(value):,.0f}")


def rendered(figure: Figure) -> Float[Tensor, "H W 3"]:
    """The pixels of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())  # a copy: the buffer goes with the canvas
    return torch.from_numpy(pixels)[..., :3].float() / 255


def tree_history_picture(
    steps: Int[Tensor, "T"], nodes: Int[Tensor, "T L"], births: Int[Tensor, "T L"], deaths: Int[Tensor, "T L"]
) -> Float[Tensor, "H W 3"]:
    """Nodes per octree level over the training, above the nodes that came and went.

    Args:
        steps: T >= 1 steps of the training, increasing.
        nodes: per level, after each of these steps.
        births: nodes added since the step before.
        deaths: nodes removed since the step before.
    """
    when, existing, born, died = (np.asarray(each.detach().cpu()) for each in (steps, nodes, births, deaths))
    colors = _palette(existing.shape[1] - 1)
    figure = Figure(figsize=(9, 5.6), dpi=DOTS_PER_INCH, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    total = existing.sum(axis=1)
    style: dict[str, Any] = {"drawstyle": "steps-post", "marker": "o" if len(when) == 1 else ""}
    above.plot(when, total, color="0.3", linestyle=":", label=f"all: {total[-1]:,}", **style)
    for level, color in enumerate(colors):
        some = np.where(existing[:, level] > 0, existing[:, level], np.nan)
        above.plot(when, some, color=color, linewidth=2, label=f"level {level}: {existing[-1, level]:,}", **style)
    most = max(total.max(), 1)
    above.set(yscale="log", ylim=(0.8, 1.5 * most), ylabel="nodes", title="nodes of the octree per level")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 200 else (1,)))
    above.yaxis.set_major_formatter(_THOUSANDS)
    above.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)

    span = max(when[-1] - when[0], 1)
    edges = np.linspace(when[0], when[0] + span, _BARS + 1)
    for counts, sign in ((born, 1), (died, -1)):
        bottom = np.zeros(_BARS)
        for level, color in enumerate(colors):
            height = sign * np.histogram(when, edges, weights=counts[:, level])[0]
            some = height != 0
            below.bar(edges[:-1][some], height[some], span / _BARS, bottom[some], align="edge", color=color)
            bottom += height
    low, high = below.get_ylim() if born.any() or died.any() else (0, 1)
    below.set(ylim=(min(1.05 * low, 0), max(1.05 * high, 0)), xlim=(edges[0], edges[-1]), xlabel="step")
    below.set_ylabel("removed   |   added" if died.any() else "added")
    below.axhline(0, color="0.3", linewidth=0.8)
    below.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below.yaxis.set_major_formatter(_THOUSANDS)
    below.xaxis.set_major_formatter(_THOUSANDS)
    for axis in (above, below):
        _plain(axis)
    return rendered(figure)


def draw_nodes(
    axis: Any, octree: Octree, nodes: Bool[Tensor, "N"], plane: tuple[int, int], colors: np.ndarray, **style: Any
) -> None:
    """Squares of nodes' cubes seen along the third axis; what is finer hides what is coarser.

    Args:
        axis: matplotlib's, in scene units from the middle of the root cube, along the cube's axes.
        octree: the tree.
        nodes: those that are drawn.
        plane: the two axes of the cube that are seen.
        colors: [L, 4] of the levels.
        style: of the squares, instead of a paler filling.
    """
    if not bool(nodes.any()):
        return
    cells = torch.cat([octree.level[:, None], octree.coords[:, list(plane)]], dim=1)[nodes].cpu().unique(dim=0)
    level, corner = cells[:, 0].numpy(), cells[:, 1:].double().numpy()
    size = octree.cube.side / 2.0**level
    gap = level * _INSET * octree.cube.side / 2**octree.depth
    low = corner * size[:, None] - octree.cube.side / 2 + gap[:, None]
    offsets = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    squares = low[:, None] + offsets * (size - 2 * gap)[:, None, None]
    paler = {"facecolor": 0.5 + 0.5 * colors[level], "edgecolor": colors[level]}
    axis.add_collection(PolyCollection(squares, **{**paler, "linewidth": np.maximum(0.4, 1.6 - 0.3 * level), **style}))


def octree_picture(octree: Octree) -> Float[Tensor, "H W 3"]:
    """The nodes of a tree as squares, seen from above and from the side along the root cube's axes; what is finer hides
    what is coarser."""
    colors = _palette(octree.depth)
    figure = Figure(figsize=(10, 5.4), dpi=DOTS_PER_INCH, layout="constrained")
    half = octree.cube.side / 2
    for axis, (plane, title) in zip(figure.subplots(1, 2), (((0, 1), "from above"), ((0, 2), "from the side"))):
        draw_nodes(axis, octree, torch.ones_like(octree.level, dtype=torch.bool), plane, colors)
        axis.set(xlim=(-1.04 * half, 1.04 * half), ylim=(-1.04 * half, 1.04 * half), aspect="equal", title=title)
        axis.set(xlabel=f"{'xyz'[plane[0]]} in the root cube, scene units", ylabel="xyz"[plane[1]])
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], marker="s", linestyle="", markersize=9, color=color) for color in colors]
    labels = [f"level {level}: {count:,}" for level, count in enumerate(octree.nodes_per_level)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    return rendered(figure)


def sampling_picture(
    edges: Sequence[Float[Tensor, "S1"]],
    weights: Sequence[Float[Tensor, "S"]],
    level: Float[Tensor, "S"] | Int[Tensor, "S"],
    depth: int,
) -> Float[Tensor, "H W 3"]:
    """How the samples of one ray were found: a row per proposal round and one for the samples that the field evaluates,
    on the left the whole ray, on the right where almost all of the weight is.

    Args:
        edges: of the intervals of each round, the field's last; distances > 0, scene units. Numbers of samples differ.
        weights: rendering weights of these intervals.
        level: octree level of each of the field's samples, the last round's.
        depth: of the tree, for the levels' colours.
    """
    distances = [each.detach().cpu().double().numpy() for each in edges]
    heights = [np.nan_to_num(each.detach().cpu().double().numpy()) for each in weights]
    near, far = np.clip(_weight_span(distances[-1], heights[-1]), distances[0][0], distances[0][-1])
    figure = Figure(figsize=(10, 1.3 + 1.5 * len(distances)), dpi=DOTS_PER_INCH, layout="constrained")
    rows = figure.subplots(len(distances), 2, sharex="col", sharey="row", squeeze=False, width_ratios=(3, 2))
    for number, (row, edge, height) in enumerate(zip(rows, distances, heights)):
        last = number == len(distances) - 1
        name = "the field" if last else f"proposal round {number + 1}"
        row[0].set_title(f"{name}: {len(height)} samples, weight {height.sum():.2f}", loc="left")
        top = 1.1 * max(height.max(), 0.01)
        row[0].set(ylabel="weight", ylim=(-0.1 * top, top))  # below 0 are the edges
        for axis in row:
            if last:
                colors = level_colors(level.detach().cpu().float(), depth).numpy()
                middle = (edge[1:] + edge[:-1]) / 2
                axis.vlines(middle, 0, height, colors=colors, linewidth=1.5)
                axis.scatter(middle, height, s=22, c=colors, zorder=3)
            else:
                axis.stairs(height, edge, fill=True, color="0.85")
                axis.stairs(height, edge, color="0.35")
            axis.vlines(edge, -0.08 * top, -0.01 * top, colors="black", linewidth=0.8)
            _plain(axis)
        row[0].axvspan(near, far, color="0.95", zorder=0)
    rows[-1, 0].set(xscale="log", xlim=(distances[0][0], distances[0][-1]), xlabel="distance, scene units (log)")
    rows[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    rows[-1, 1].set(xlim=(near, far), xlabel="distance, scene units: the shaded part")
    rows[-1, 1].ticklabel_format(axis="x", useOffset=False)
    rows[-1, 1].xaxis.set_major_locator(MaxNLocator(5))
    palette = _palette(depth)
    handles = [Line2D([], [], marker="o", linestyle="", color=color) for color in palette]
    labels = [f"level {each}" for each in range(depth + 1)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(depth + 1, 9), frameon=False)
    return rendered(figure)


def _weight_span(edges: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The part of a ray with 96 % of the weight and a little more; the whole of a ray without weight."""
    if not weights.sum() > 0:
        return edges[0], edges[-1]
    share = np.concatenate([[0], weights.cumsum() / weights.sum()])
    first, last = np.searchsorted(share, 0.02, "right") - 1, np.searchsorted(share, 0.98)
    margin = 0.1 * (edges[last] - edges[first])
    return edges[first] - margin, edges[last] + margin


def _palette(depth: int) -> Float[np.ndarray, "L 3"]:
    return level_colors(torch.arange(depth + 1).float(), depth).numpy()


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
