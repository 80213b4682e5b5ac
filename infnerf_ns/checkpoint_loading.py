"""What a model does with a checkpoint before and after its tensors are copied: its own tree in place of the one it was
built with, the pages of a packed run, and one clear line where checkpoint and configuration do not fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.field import OctreeField
from infnerf_ns.near_plane import NearPlanes
from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.state_validation import require_model_state, require_tensor
from infnerf_ns.streaming.node_cache import NodeCache
from infnerf_ns.streaming.packing import CHECKSUMS
from infnerf_ns.streaming.page_files import PageFiles
from infnerf_ns.tree_building import require_memory


def checkpoint_octree(field: OctreeField, state: dict[str, Any], device: torch.device) -> Octree:
    """The tree of a checkpoint, all of whose numbers have been checked.

    Args:
        field: that is going to load it.
        state: of the model; what checkpoints of earlier versions lack is added.
        device: of the tree.

    Raises:
        InputError: it holds none, is not sound, or does not fit the configuration.
    """
    octree = require_model_state(state, field.config, field.pages.node_resolution, field.max_level).to(device)
    state.setdefault("field.node_samples", torch.zeros(octree.num_nodes, dtype=torch.long))
    state.setdefault("field.maturity", torch.ones(octree.num_nodes))
    return octree


def fit_whole(
    field: OctreeField, near_planes: NearPlanes | None, octree: Octree, state: dict[str, Any], training: bool
) -> None:
    """Makes the banks fit the checkpoint's tree in place, so that optimizers keep their Parameters.

    Args:
        field, near_planes: of the model.
        octree: of the checkpoint, on the device of the model.
        state: of the model.
        training: the banks will be trained, which takes more memory.

    Raises:
        InputError: the checkpoint does not fit the configuration, or the memory.
    """
    layout = PageLayout(field.config, octree.node_resolution, field.max_level)
    grown, held = (sum(layout.memory_bytes(tree, training=training)) for tree in (octree, field.octree))
    if grown > held:
        require_memory([grown - held], octree.level.device)
    field.set_octree(octree)
    _require_shapes(field, near_planes, state)


def open_pages(
    field: OctreeField,
    near_planes: NearPlanes | None,
    octree: Octree,
    state: dict[str, Any],
    pages: Path | None,
    budget: int,
) -> NodeCache:
    """From now on the field's nodes come from the pages of a packed run.

    Args:
        field, near_planes: of the model.
        octree: of the checkpoint, on the device of the model.
        state: of the model; loses what is about the pages.
        pages: their folder.
        budget: bytes for nodes.

    Raises:
        InputError: the folder of pages is not there, or checkpoint and configuration do not fit each other.
    """
    if pages is None or not pages.is_dir():
        raise InputError(f"the checkpoint is packed, but its folder of pages, {pages}, is not there")
    layout = field.pages
    files = PageFiles(pages, octree, layout, state.pop(CHECKSUMS))
    of_nodes = 4 * sum(sum(layout.node_page(int(level)).values()) for level in octree.level[1:])
    always = sum(layout.memory_bytes(octree, training=False)) - of_nodes
    cache = NodeCache(octree, files, always, budget, octree.level.device)
    field.stream(cache)
    _require_shapes(field, near_planes, state)
    return cache


def require_names_and_shapes(own: Mapping[str, Tensor], state: Mapping[str, Any], paged: set[str]) -> None:
    """Ends with one line if a state lacks something of the model, or holds something else: nerfstudio would leave out
    what differs, and say nothing.

    Args:
        own: the model's state, which has taken over the checkpoint's tree.
        state: of the checkpoint.
        paged: names that stand in page files.

    Raises:
        InputError: it does.
    """
    differing = sorted((set(own) - paged) ^ (set(state) - paged))
    if differing:
        raise InputError(
            f"the checkpoint does not fit the configuration ({differing[0]} is in one of them only): use the"
            " config.yml that was written beside it, or the same --pipeline.model options"
        )
    for name in sorted(set(own) - paged):
        dtype = own[name].dtype
        types = (dtype, torch.float32, torch.float64) if dtype.is_floating_point else (dtype,)
        require_tensor(name, state[name], tuple(own[name].shape), types)


def paged_names(layout: PageLayout, octree: Octree) -> set[str]:
    """Names of a model's tensors that stand in the pages of its packed run."""
    return {f"field.{kind}.{level}" for level in range(1, octree.depth + 1) for kind in layout.node_page(level)}


def _require_shapes(field: OctreeField, near_planes: NearPlanes | None, state: dict[str, Any]) -> None:
    if near_planes is not None:
        near_planes.fit(len(state["near_planes.points"]))
    for name, value in field.named_parameters():
        saved = state.get(f"field.{name}", value)  # a packed one lacks what is in its pages
        if name == "appearance.weight" and len(saved) != len(value) and saved.shape[1:] == value.shape[1:]:
            raise InputError(
                f"the checkpoint was trained on {len(saved)} photos, but the capture has {len(value)} to train on now:"
                " put them back, or take out what was added"
            )
        if saved.shape != value.shape:
            raise InputError(
                f"the checkpoint's field.{name} is {tuple(saved.shape)}, but the configuration asks for"
                f" {tuple(value.shape)}: use the same --pipeline.model.field options and photos as the checkpoint"
            )
