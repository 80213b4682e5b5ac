"""Splits a model's state into page files and the small state that is loaded at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.streaming.page_files import page_path, write_page

CHECKSUMS = "field.page_checksums"
"""Entry of a packed model's state: [N] checksums of the nodes' pages. Its presence says that the model is packed."""
_OF_TRAINING = {f"growth.{name}" for name in ("table", "watched", "age", "rest")}
"""Statistics that a growing tree decides from (:mod:`infnerf_ns.training.growth`)."""
_LARGEST_HALF = torch.finfo(torch.float16).max

Track = Callable[[Iterable[int]], Iterable[int]]
"""Shows the progress over nodes."""


def write_pages(
    model: dict[str, Tensor], octree: Octree, layout: PageLayout, folder: Path, half: bool, track: Track
) -> tuple[Tensor, float]:
    """Writes the page of every node below the root.

    Args:
        model: state of a model, with its banks.
        octree: its tree.
        layout: of its pages.
        folder: new.
        half: as float16.
        track: shows the progress over the nodes.

    Returns:
        Checksums [N], and the largest relative rounding error of a page.

    Raises:
        OSError: a file cannot be written.
        InputError: a number is not finite, or too large for float16.
    """
    checksums, rounding = torch.zeros(octree.num_nodes, dtype=torch.long), 0.0
    row, levels = octree.row.tolist(), octree.level.tolist()
    folder.mkdir(parents=True)  # also for a root alone
    for level in range(1, octree.depth + 1):
        (folder / f"level-{level}").mkdir()
    for node in track(range(1, octree.num_nodes)):
        level = levels[node]
        page = {kind: model[f"field.{kind}.{level}"][row[node]].clone() for kind in layout.node_page(level)}
        for kind, values in page.items():
            largest = float(values.abs().max())
            if not largest <= (_LARGEST_HALF if half else torch.finfo(torch.float32).max):
                remedy = "leave out --half" if largest < float("inf") else "pack an older checkpoint"
                raise InputError(f"node {node}: the {kind} hold {largest:g}, which cannot be packed: {remedy}")
            if half:
                page[kind] = values.half()
                error = (page[kind].float() - values).norm() / values.norm().clamp(min=1e-30)
                rounding = max(rounding, float(error))
        checksums[node] = write_page(page_path(folder, level, octree.coords[node]), page)
    return checksums, rounding


def small_state(model: dict[str, Tensor], octree: Octree, layout: PageLayout, checksums: Tensor) -> dict[str, Tensor]:
    """A model's state without what stands in page files, and without the statistics of a growing tree."""
    paged = {f"field.{kind}.{level}" for level in range(1, octree.depth + 1) for kind in layout.node_page(level)}
    kept = {name: value.clone() for name, value in model.items() if name not in paged | _OF_TRAINING}
    return {**kept, CHECKSUMS: checksums}
