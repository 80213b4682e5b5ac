"""What each kernel computes, whatever the backend."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels.backends import Backend, Chosen, choose_for
from infnerf_ns.kernels.batches import Groups, TreePaths
from infnerf_ns.kernels.hash_torch import hash_encode_torch
from infnerf_ns.kernels.layout import HashLayout
from infnerf_ns.kernels.mlp_torch import grouped_mlp_torch


def _operations(chosen: Chosen) -> ModuleType:
    """The module that ties a backend into autograd; imported when first needed."""
    return importlib.import_module(f"infnerf_ns.kernels.{chosen}_ops")


def hash_encode(
    positions: Float[Tensor, "P 3"],
    row: Int[Tensor, "P"],
    bank: Float[Tensor, "N page"],
    layout: HashLayout,
    backend: Backend = "auto",
) -> Float[Tensor, "P LF"]:
    """Features of (local position, node) pairs: trilinear interpolation in every hash level of the node's page.

    Args:
        positions: local positions in [0, 1).
        row: row of each sample's node in the bank.
        bank: one page per node; the hash grid stands first in the page.
        layout: sizes of the hash levels.
        backend: see :func:`infnerf_ns.kernels.choose`.

    Returns:
        Features, coarse level first. Gradients to the bank and, where required, to the positions are exact. A bank
        with an in-place gradient (:func:`infnerf_ns.kernels.enable_bank_gradient`) receives its gradient directly in
        ``bank.grad``, from all backends but torch and tcnn.
    """
    chosen = choose_for(backend, positions)
    if chosen == "torch":
        return hash_encode_torch(positions, row, bank, layout)
    return _operations(chosen).hash_encode(positions, row, bank, layout)


def route(
    unit: Float[Tensor, "M 3"],
    footprints: Float[Tensor, "M"] | None,
    children: Int[Tensor, "N 8"],
    gsd: list[float],
    path: Int[Tensor, "M K"],
    backend: Backend,
) -> Int[Tensor, "M K"]:
    """The walk of :meth:`infnerf_ns.octree.Octree.route` in one pass; fills and returns ``path``.

    Args:
        unit: unit coordinates.
        footprints: radii; None: the finest node there is.
        children: -1 = none.
        gsd: ground sampling distance of each of the K levels, same unit as the footprints.
        path: filled with the node per level, -1 below the sample's own.
        backend: numba or triton.
    """
    return _operations(choose_for(backend, unit)).route(unit, footprints, children, gsd, path)


def mlp_page_size(widths: tuple[int, ...]) -> int:
    """Number of weights of one MLP with these layer widths (no biases, as in tiny-cuda-nn)."""
    return sum(a * b for a, b in zip(widths[:-1], widths[1:]))


def grouped_mlp(
    inputs: Float[Tensor, "P in"],
    groups: Groups,
    banks: list[Tensor],
    offset: int,
    widths: tuple[int, ...],
    backend: Backend = "auto",
) -> Float[Tensor, "P out"]:
    """ReLU MLPs without biases, one per group of samples.

    Args:
        inputs: samples sorted by group.
        groups: whose samples they are.
        banks: pages [N, page] of each octree level; the weights stand at ``offset``, layer by layer, each
            [fan_in, fan_out].
        offset: first weight in the page.
        widths: layer widths, input first.
        backend: see :func:`infnerf_ns.kernels.choose`.

    Returns:
        Outputs. Gradients reach the inputs (those that are used) and the banks.
    """
    chosen = choose_for(backend, inputs)
    if chosen in ("torch", "tcnn"):
        return grouped_mlp_torch(inputs, groups, banks, offset, widths)
    return _operations(chosen).grouped_mlp(inputs, groups, banks, offset, widths)


def follows_paths(backend: Backend, samples: Tensor) -> bool:
    """Whether samples like these can be given to :func:`path_features` and :func:`path_sum`."""
    return choose_for(backend, samples) in ("numba", "triton")


def path_features(
    paths: TreePaths,
    starts: list[int],
    footprints: Float[Tensor, "M"] | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
    width: int,
    backend: Backend = "auto",
) -> Float[Tensor, "M width"]:
    """Features of all nodes on each sample's path side by side, zeros where there is none; gradients to the banks only.

    Args:
        paths: samples sorted by the level of their own node.
        starts: the first sample that has a node at each level (the number of samples: none has).
        footprints: radii, for the down-weighting; None: features are not weighted.
        cells: per octree level [L]: the weight of a hash level is erf(cells / footprint) (Zip-NeRF, eq. 9); in the root
            the footprint shrinks with the contraction.
        banks: grids of each level.
        layouts: their layouts.
        width: of the result.
        backend: one that :func:`follows_paths`.
    """
    operations = _operations(choose_for(backend, paths.unit))
    return operations.path_features(paths, starts, footprints, cells, banks, layouts, width)


def path_sum(
    paths: TreePaths,
    footprints: Float[Tensor, "M"] | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
    backend: Backend = "auto",
) -> Float[Tensor, "M"]:
    """Weighted sum of the features (one per entry) of all nodes on each sample's path; gradients to the banks only.

    Args:
        paths: samples in any order.
        footprints, cells: as for :func:`path_features`, but lengths along the ray, which in the root shrink with the
            square of the contraction's norm.
        banks: grids of each level.
        layouts: their layouts.
        backend: one that :func:`follows_paths`.
    """
    return _operations(choose_for(backend, paths.unit)).path_sum(paths, footprints, cells, banks, layouts)
