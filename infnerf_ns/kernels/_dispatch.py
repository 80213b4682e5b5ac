"""Chooses the backend and ties the numba kernels into autograd."""

from __future__ import annotations

import threading
from functools import cache
from typing import Literal, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.kernels import hash_numba, mlp_numba, route_numba, tree_numba
from infnerf_ns.kernels.gradients import bank_gradient
from infnerf_ns.kernels.hash_torch import hash_encode_torch
from infnerf_ns.kernels.layout import HashLayout
from infnerf_ns.kernels.mlp_torch import grouped_mlp_torch

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
"""numba asks for TBB first and warns of an old one that it then leaves alone; it was measured with OpenMP."""

Backend = Literal["auto", "torch", "numba"]

_numba_lock = threading.Lock()
"""numba's built-in thread pool must not be entered by two threads at once, and the viewer renders from a thread of its
own."""


def use_numba(backend: Backend, tensor: Tensor) -> bool:
    """Whether samples like this tensor are evaluated by numba."""
    if backend == "numba" and tensor.device.type != "cpu":
        raise InputError(
            f"--pipeline.model.field.backend numba runs on the CPU, but the model is on {tensor.device}: use auto"
        )
    return backend == "numba" or (backend == "auto" and tensor.device.type == "cpu" and tensor.dtype == torch.float32)


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
        backend: ``auto``, ``torch`` or ``numba``.

    Returns:
        Features, coarse level first. Gradients to the bank and, where required, to the positions are exact. A bank
        with an in-place gradient (:func:`infnerf_ns.kernels.enable_bank_gradient`) receives its gradient directly in
        ``bank.grad``.
    """
    if not use_numba(backend, positions):
        return hash_encode_torch(positions, row, bank, layout)
    return _HashEncode.apply(positions, row, bank, layout)


def route_on_cpu(
    unit: Float[Tensor, "M 3"],
    footprints: Float[Tensor, "M"] | None,
    children: Int[Tensor, "N 8"],
    gsd: list[float],
    path: Int[Tensor, "M K"],
) -> Int[Tensor, "M K"]:
    """The numba form of :meth:`infnerf_ns.octree.Octree.route`; fills and returns ``path``."""
    radii = np.empty(0, np.float32) if footprints is None else _flat(footprints.float())
    with _numba_lock:
        route_numba.route(_flat(unit), radii, _flat(children), np.array(gsd), path.numpy())
    return path


def mlp_page_size(widths: tuple[int, ...]) -> int:
    """Number of weights of one MLP with these layer widths (no biases, as in tiny-cuda-nn)."""
    return sum(a * b for a, b in zip(widths[:-1], widths[1:]))


def grouped_mlp(
    inputs: Float[Tensor, "P in"],
    starts: Int[Tensor, "G1"],
    rows: Int[Tensor, "G"],
    bank: Float[Tensor, "N page"],
    offset: int,
    widths: tuple[int, ...],
    used_inputs: Int[Tensor, "G"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "P out"]:
    """ReLU MLPs without biases, one per group of samples.

    Args:
        inputs: samples sorted by group.
        starts: group g owns the samples ``starts[g] : starts[g + 1]``.
        rows: row of each group's node in the bank.
        bank: pages; the weights stand at ``offset``, layer by layer, each [fan_in, fan_out].
        offset: first weight in the page.
        widths: layer widths, input first.
        used_inputs: leading inputs of each group that can differ from zero (a promise that saves work); None: all.
        backend: ``auto``, ``torch`` or ``numba``.
    """
    if not use_numba(backend, inputs):
        return grouped_mlp_torch(inputs, starts, rows, bank, offset, widths)
    used = torch.full_like(rows, widths[0]) if used_inputs is None else used_inputs
    return _GroupedMLP.apply(inputs, starts, rows, bank, offset, widths, used)


class TreePaths(NamedTuple):
    """Where samples stand in the tree, for the kernels that follow their paths."""

    unit: Float[Tensor, "M 3"]
    """unit coordinates"""
    path: Int[Tensor, "M K"]
    """node per level, -1 below the sample's own"""
    coords: Int[Tensor, "N 3"]
    """integer coordinates of all nodes"""
    first: list[int]
    """first node of each level"""


def path_features(
    paths: TreePaths,
    starts: list[int],
    footprints: Float[Tensor, "M"] | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
    width: int,
) -> Float[Tensor, "M width"]:
    """Features of all nodes on each sample's path side by side, zeros where there is none; CPU only.

    Args:
        paths: samples sorted by the level of their own node.
        starts: the first sample that has a node at each level (the number of samples: none has).
        footprints: radii, for the down-weighting; None: features are not weighted.
        cells: per octree level [L]: the weight of a hash level is erf(cells / footprint) (Zip-NeRF, eq. 9); in the root
            the footprint shrinks with the contraction.
        banks: grids of each level.
        layouts: their layouts.
        width: of the result.
    """
    return _PathFeatures.apply(paths, starts, footprints, cells, layouts, width, *banks)


def path_sum(paths: TreePaths, banks: list[Tensor], layouts: list[HashLayout]) -> Float[Tensor, "M"]:
    """Sum of the features (one per entry) of all nodes on each sample's path; CPU only."""
    return _PathSum.apply(paths, layouts, *banks)


@cache
def _layout_arrays(layout: HashLayout) -> tuple:
    return (layout.scales, layout.resolutions, layout.sizes, layout.offsets, layout.hashed)


@cache
def _balanced_order(num_levels: int) -> np.ndarray:
    """Cheap coarse levels paired with costly fine ones, so that contiguous shares cost about the same."""
    order = [level for pair in zip(range(num_levels), reversed(range(num_levels))) for level in pair]
    return np.array(order[:num_levels], dtype=np.int64)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class _HashEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout) -> Tensor:
        out = torch.empty(len(positions), layout.num_outputs)
        with _numba_lock:
            hash_numba.forward(
                _flat(positions), _flat(row), _flat(bank), out.numpy(), *_layout_arrays(layout), (0,) * layout.features
            )
        ctx.save_for_backward(positions, row)
        ctx.bank, ctx.layout = bank, layout
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        positions, row = ctx.saved_tensors
        bank, layout = ctx.bank, ctx.layout
        arrays, axis = _layout_arrays(layout), (0,) * layout.features
        p, r, g = _flat(positions), _flat(row), _flat(grad_out)
        grad_bank = grad_positions = None
        with _numba_lock:
            if ctx.needs_input_grad[2]:
                target = _target(bank)
                grad_bank = target.returned
                target.rows[r] = 1
                order = _balanced_order(layout.num_levels)
                hash_numba.backward_bank(p, r, g, target.grad, target.touched, *arrays, order, axis)
            if ctx.needs_input_grad[0]:
                grad_positions = torch.empty_like(positions)
                hash_numba.backward_positions(p, r, _flat(bank), g, grad_positions.numpy(), *arrays, axis)
        return grad_positions, None, grad_bank, None


class _Target(NamedTuple):
    """Where a kernel adds a bank's gradient."""

    returned: Tensor | None
    """what autograd is given: None if the gradient is kept in place"""
    grad: np.ndarray
    touched: np.ndarray
    rows: np.ndarray


def _target(bank: Tensor) -> _Target:
    held = bank_gradient(bank)
    if held is not None:
        return _Target(None, held.grad.numpy(), held.touched.numpy(), held.rows.numpy())
    grad = torch.zeros_like(bank)
    touched = np.zeros((len(bank), (bank.shape[1] >> hash_numba.BLOCK_SHIFT) + 1), dtype=np.uint8)
    return _Target(grad, grad.numpy(), touched, np.zeros(len(bank), dtype=np.uint8))


def _parts(bank: Tensor, hash_levels: int) -> int:
    """Into how many tasks a hash level is split, so that all threads have work; at most one per row."""
    return max(1, min(len(bank), -(-2 * numba.get_num_threads() // hash_levels)))


def _contracted(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    contracted, shrink = np.empty_like(unit), np.empty(len(unit), np.float32)
    tree_numba.contract(unit, contracted, shrink)
    return contracted, shrink


class _PathFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, starts, footprints, cells, layouts, width, *banks) -> Tensor:
        unit, path, coords = _flat(paths.unit), _flat(paths.path), _flat(paths.coords)
        count = len(unit)
        out = torch.zeros(count, width)
        radii = np.empty(0, np.float32) if footprints is None else _flat(footprints.float())
        hash_levels = sum(layout.num_levels for layout in layouts)
        weights = np.empty((0, 0) if footprints is None else (count, hash_levels), np.float32)
        column = weight_column = 0
        with _numba_lock:
            contracted, shrink = _contracted(unit)
            for level, (bank, layout) in enumerate(zip(banks, layouts)):
                if starts[level] < count:
                    places, sizes = (unit, radii) if level else (contracted, shrink * radii if len(radii) else radii)
                    tree_numba.encode(
                        places, path, level, starts[level], paths.first[level], coords, _flat(bank), sizes,
                        cells[level], out.numpy(), column, weights, weight_column, *_layout_arrays(layout),
                        (0,) * layout.features,
                    )  # fmt: skip
                column += layout.num_outputs
                weight_column += layout.num_levels
        ctx.arrays, ctx.weights = (contracted, unit, path, coords), weights
        ctx.paths, ctx.starts, ctx.layouts, ctx.banks = paths, starts, layouts, banks
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (contracted, unit, path, coords), gradient = ctx.arrays, _flat(grad_out)
        returned = []
        column = weight_column = 0
        with _numba_lock:
            for level, (bank, layout) in enumerate(zip(ctx.banks, ctx.layouts)):
                target = None
                if ctx.needs_input_grad[6 + level] and ctx.starts[level] < len(unit):
                    target = _target(bank)
                    places = unit if level else contracted
                    tree_numba.encode_backward(
                        places, path, level, ctx.starts[level], ctx.paths.first[level], coords, gradient, column,
                        ctx.weights, weight_column, target.grad, target.touched, target.rows, *_layout_arrays(layout),
                        _balanced_order(layout.num_levels), _parts(bank, layout.num_levels), (0,) * layout.features,
                    )  # fmt: skip
                returned.append(None if target is None else target.returned)
                column += layout.num_outputs
                weight_column += layout.num_levels
        return (None,) * 6 + tuple(returned)


class _PathSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, layouts, *banks) -> Tensor:
        unit, path, coords = _flat(paths.unit), _flat(paths.path), _flat(paths.coords)
        out = torch.zeros(len(unit))
        with _numba_lock:
            contracted, _ = _contracted(unit)
            for level, (bank, layout) in enumerate(zip(banks, layouts)):
                places, first = unit if level else contracted, paths.first[level]
                tree_numba.add_sum(
                    places, path, level, first, coords, _flat(bank), out.numpy(), *_layout_arrays(layout)
                )
        ctx.arrays, ctx.paths, ctx.layouts, ctx.banks = (contracted, unit, path, coords), paths, layouts, banks
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (contracted, unit, path, coords), gradient = ctx.arrays, _flat(grad_out)
        returned = []
        with _numba_lock:
            for level, (bank, layout) in enumerate(zip(ctx.banks, ctx.layouts)):
                target = _target(bank) if ctx.needs_input_grad[2 + level] else None
                if target is not None:
                    places = unit if level else contracted
                    tree_numba.add_sum_backward(
                        places, path, level, ctx.paths.first[level], coords, gradient, target.grad, target.touched,
                        target.rows, *_layout_arrays(layout), _balanced_order(layout.num_levels),
                        _parts(bank, layout.num_levels),
                    )  # fmt: skip
                returned.append(None if target is None else target.returned)
        return (None, None, *returned)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, starts, rows, bank, offset, widths, used) -> Tensor:
        out = torch.empty(len(inputs), widths[-1])
        tiles = mlp_numba.tiles_of(_flat(starts))
        with _numba_lock:
            mlp_numba.forward(
                _flat(inputs), *tiles, _flat(rows), _flat(bank), offset, np.array(widths), _flat(used), out.numpy(),
                numba.get_num_threads(),
            )  # fmt: skip
        ctx.save_for_backward(inputs, rows, used)
        ctx.bank, ctx.offset, ctx.widths, ctx.tiles = bank, offset, widths, tiles
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        inputs, rows, used = ctx.saved_tensors
        bank, offset, widths = ctx.bank, ctx.offset, ctx.widths
        size, threads = mlp_page_size(widths), numba.get_num_threads()
        want_inputs = ctx.needs_input_grad[0]
        grad_inputs = torch.empty_like(inputs if want_inputs else inputs[:0])
        grad_groups = np.zeros((len(rows), size), np.float32)
        edge_groups = np.full((threads, 2), -1, np.int64)
        edges = np.zeros((threads, 2, size), np.float32)
        with _numba_lock:
            mlp_numba.backward(
                _flat(inputs), *ctx.tiles, _flat(rows), _flat(bank), offset, np.array(widths), _flat(used),
                _flat(grad_out),
                grad_inputs.numpy(), grad_groups, edge_groups, edges, threads, want_inputs,
            )  # fmt: skip
        for thread in range(threads):
            for side in range(2):
                if edge_groups[thread, side] >= 0:
                    grad_groups[edge_groups[thread, side]] += edges[thread, side]
        grad_bank = None
        if ctx.needs_input_grad[3]:
            held = bank_gradient(bank)
            if held is None:
                grad_bank = torch.zeros_like(bank)
                target = grad_bank
            else:
                target = held.grad
                held.rows[rows] = 1
                held.touched[
                    rows, offset >> hash_numba.BLOCK_SHIFT : ((offset + size - 1) >> hash_numba.BLOCK_SHIFT) + 1
                ] = 1
            target[:, offset : offset + size].index_add_(0, rows, torch.from_numpy(grad_groups))
        return grad_inputs if want_inputs else None, None, None, grad_bank, None, None, None
