"""Ties the numba kernels into autograd."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infnerf_ns.kernels import hash_numba, mlp_numba, route_numba, tree_numba
from infnerf_ns.kernels.batches import Groups, TreePaths
from infnerf_ns.kernels.contracts import mlp_page_size
from infnerf_ns.kernels.gradients import bank_gradient
from infnerf_ns.kernels.layout import HashLayout
from infnerf_ns.kernels.numba_lock import flat, numba_lock


def hash_encode(positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout) -> Tensor:
    """See :func:`infnerf_ns.kernels.hash_encode`."""
    return _HashEncode.apply(positions, row, bank, layout)


def route(unit: Tensor, footprints: Tensor | None, children: Tensor, gsd: list[float], path: Tensor) -> Tensor:
    """See :func:`infnerf_ns.kernels.route`."""
    radii = np.empty(0, np.float32) if footprints is None else flat(footprints.float())
    with numba_lock:
        route_numba.route(flat(unit), radii, flat(children), np.array(gsd), path.numpy())
    return path


def grouped_mlp(inputs: Tensor, groups: Groups, banks: list[Tensor], offset: int, widths: tuple[int, ...]) -> Tensor:
    """See :func:`infnerf_ns.kernels.grouped_mlp`."""
    return _GroupedMLP.apply(inputs, groups, offset, widths, *banks)


def path_features(
    paths: TreePaths,
    starts: list[int],
    footprints: Tensor | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
    width: int,
) -> Tensor:
    """See :func:`infnerf_ns.kernels.path_features`."""
    return _PathFeatures.apply(paths, starts, footprints, cells, layouts, width, _trains(banks), *banks)


def path_sum(
    paths: TreePaths,
    footprints: Tensor | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
) -> Tensor:
    """See :func:`infnerf_ns.kernels.path_sum`."""
    return _PathSum.apply(paths, footprints, cells, layouts, _trains(banks), *banks)


def _trains(banks: list[Tensor]) -> bool:
    """Whether a backward pass will ask for the gradient of one of the banks; inside of a Function nobody can tell."""
    return torch.is_grad_enabled() and any(bank.requires_grad for bank in banks)


@cache
def _layout_arrays(layout: HashLayout) -> tuple:
    return (layout.scales, layout.resolutions, layout.sizes, layout.offsets, layout.hashed)


@cache
def _balanced_order(num_levels: int) -> np.ndarray:
    """Cheap coarse levels paired with costly fine ones, so that contiguous shares cost about the same."""
    order = [level for pair in zip(range(num_levels), reversed(range(num_levels))) for level in pair]
    return np.array(order[:num_levels], dtype=np.int64)


class _HashEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout) -> Tensor:
        out = torch.empty(len(positions), layout.num_outputs)
        with numba_lock:
            hash_numba.forward(
                flat(positions), flat(row), flat(bank), out.numpy(), *_layout_arrays(layout), (0,) * layout.features
            )
        ctx.save_for_backward(positions, row)
        ctx.bank, ctx.layout = bank, layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        positions, row = ctx.saved_tensors
        bank, layout = ctx.bank, ctx.layout
        arrays, axis = _layout_arrays(layout), (0,) * layout.features
        p, r, g = flat(positions), flat(row), flat(grad_out)
        grad_bank = grad_positions = None
        with numba_lock:
            if ctx.needs_input_grad[2]:
                target = _target(bank)
                grad_bank = target.returned
                target.rows[r] = 1
                order = _balanced_order(layout.num_levels)
                hash_numba.backward_bank(p, r, g, target.grad, target.touched, *arrays, order, axis)
            if ctx.needs_input_grad[0]:
                grad_positions = torch.empty_like(positions)
                hash_numba.backward_positions(p, r, flat(bank), g, grad_positions.numpy(), *arrays, axis)
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


def _contracted(unit: np.ndarray, along: bool) -> tuple[np.ndarray, np.ndarray]:
    contracted, shrink = np.empty_like(unit), np.empty(len(unit), np.float32)
    tree_numba.contract(unit, along, contracted, shrink)
    return contracted, shrink


class _Footprints(NamedTuple):
    """What weighs the hash levels along paths."""

    radii: np.ndarray
    """[M], or [0]: nothing is weighted"""
    in_root: np.ndarray
    """[M] or [0]: the same where the root's contraction has shrunk them"""
    weights: np.ndarray
    """[M, all hash levels of the path], uninitialised; or [0, 0]: there is no backward pass that needs them"""


def _footprints(footprints: Tensor | None, shrink: np.ndarray, layouts: list[HashLayout], trains: bool) -> _Footprints:
    if footprints is None:
        none = np.empty(0, np.float32)
        return _Footprints(none, none, np.empty((0, 0), np.float32))
    radii, hash_levels = flat(footprints.float()), sum(layout.num_levels for layout in layouts)
    shape = (len(radii), hash_levels) if trains else (0, 0)
    return _Footprints(radii, shrink * radii, np.empty(shape, np.float32))


class _PathFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, starts, footprints, cells, layouts, width, trains, *banks) -> Tensor:
        unit, path, coords = flat(paths.unit), flat(paths.path), flat(paths.coords)
        count = len(unit)
        out = torch.zeros(count, width)
        column = weight_column = 0
        with numba_lock:
            contracted, shrink = _contracted(unit, along=False)
            sizes = _footprints(footprints, shrink, layouts, trains)
            for level, (bank, layout) in enumerate(zip(banks, layouts)):
                if starts[level] < count:
                    places, radii = (unit, sizes.radii) if level else (contracted, sizes.in_root)
                    tree_numba.encode(
                        places, path, level, starts[level], paths.first[level], coords, flat(bank), radii,
                        cells[level], out.numpy(), column, sizes.weights, weight_column, *_layout_arrays(layout),
                        (0,) * layout.features,
                    )  # fmt: skip
                column += layout.num_outputs
                weight_column += layout.num_levels
        ctx.arrays, ctx.weights = (contracted, unit, path, coords), sizes.weights
        ctx.paths, ctx.starts, ctx.layouts, ctx.banks = paths, starts, layouts, banks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        (contracted, unit, path, coords), gradient = ctx.arrays, flat(grad_out)
        returned = []
        column = weight_column = 0
        with numba_lock:
            for level, (bank, layout) in enumerate(zip(ctx.banks, ctx.layouts)):
                target = None
                if ctx.needs_input_grad[7 + level] and ctx.starts[level] < len(unit):
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
        return (None,) * 7 + tuple(returned)


class _PathSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, footprints, cells, layouts, trains, *banks) -> Tensor:
        unit, path, coords = flat(paths.unit), flat(paths.path), flat(paths.coords)
        out = torch.zeros(len(unit))
        weight_column = 0
        with numba_lock:
            contracted, shrink = _contracted(unit, along=True)
            sizes = _footprints(footprints, shrink, layouts, trains)
            for level, (bank, layout) in enumerate(zip(banks, layouts)):
                places, radii = (unit, sizes.radii) if level else (contracted, sizes.in_root)
                tree_numba.add_sum(
                    places, path, level, paths.first[level], coords, flat(bank), radii, cells[level], out.numpy(),
                    sizes.weights, weight_column, *_layout_arrays(layout),
                )  # fmt: skip
                weight_column += layout.num_levels
        ctx.arrays, ctx.weights = (contracted, unit, path, coords), sizes.weights
        ctx.paths, ctx.layouts, ctx.banks = paths, layouts, banks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        (contracted, unit, path, coords), gradient = ctx.arrays, flat(grad_out)[:, None]
        returned = []
        weight_column = 0
        with numba_lock:
            for level, (bank, layout) in enumerate(zip(ctx.banks, ctx.layouts)):
                target = _target(bank) if ctx.needs_input_grad[5 + level] else None
                if target is not None:
                    places = unit if level else contracted
                    tree_numba.add_sum_backward(
                        places, path, level, ctx.paths.first[level], coords, gradient, ctx.weights, weight_column,
                        target.grad, target.touched, target.rows, *_layout_arrays(layout),
                        _balanced_order(layout.num_levels), _parts(bank, layout.num_levels),
                    )  # fmt: skip
                returned.append(None if target is None else target.returned)
                weight_column += layout.num_levels
        return (None,) * 5 + tuple(returned)


class _LevelOfGroups(NamedTuple):
    """The groups of one octree level, whose weights lie in one bank."""

    level: int
    samples: slice
    tiles: tuple[np.ndarray, np.ndarray, np.ndarray]
    rows: np.ndarray
    used: np.ndarray


def _levels_of(groups: Groups) -> list[_LevelOfGroups]:
    starts, level, rows, used = (flat(part) for part in groups)
    edges = np.flatnonzero(np.diff(level)) + 1
    levels = []
    for first, last in zip([0, *edges], [*edges, len(level)]):
        if last > first:
            begin = starts[first]
            tiles = mlp_numba.tiles_of(starts[first : last + 1] - begin)
            samples = slice(int(begin), int(starts[last]))
            levels.append(_LevelOfGroups(int(level[first]), samples, tiles, rows[first:last], used[first:last]))
    return levels


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, groups, offset, widths, *banks) -> Tensor:
        out = torch.empty(len(inputs), widths[-1])
        levels, data, target = _levels_of(groups), flat(inputs), out.numpy()
        with numba_lock:
            for each in levels:
                mlp_numba.forward(
                    data[each.samples], *each.tiles, each.rows, flat(banks[each.level]), offset, np.array(widths),
                    each.used, target[each.samples], numba.get_num_threads(),
                )  # fmt: skip
        ctx.save_for_backward(inputs)
        ctx.levels, ctx.banks, ctx.offset, ctx.widths = levels, banks, offset, widths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        (inputs,) = ctx.saved_tensors
        want_inputs = ctx.needs_input_grad[0]
        grad_inputs = torch.empty_like(inputs if want_inputs else inputs[:0])
        returned: list[Tensor | None] = [None] * len(ctx.banks)
        for each in ctx.levels:
            target = None
            if ctx.needs_input_grad[4 + each.level]:
                target = _target(ctx.banks[each.level])
                returned[each.level] = target.returned
            samples = flat(inputs)[each.samples], flat(grad_out)[each.samples]
            _mlp_backward(ctx, each, *samples, grad_inputs.numpy()[each.samples], want_inputs, target)
        return (grad_inputs if want_inputs else None, None, None, None, *returned)


def _mlp_backward(
    ctx,
    each: _LevelOfGroups,
    inputs: np.ndarray,
    grad_out: np.ndarray,
    grad_inputs: np.ndarray,
    want_inputs: bool,
    target: _Target | None,
) -> None:
    """Writes the gradient of one level's inputs and adds that of its weights to the target, if there is one."""
    # As many shares as the process has threads, however many take part: the order of a sum, so its last bit, does not
    # depend on how many are fastest at the moment.
    size, threads, offset = mlp_page_size(ctx.widths), numba.config.NUMBA_NUM_THREADS, ctx.offset
    edge_groups = np.full((threads, 2), -1, np.int64)
    edges = np.zeros((threads, 2, size), np.float32)
    grad_bank = edges[0] if target is None else target.grad
    with numba_lock:
        mlp_numba.backward(
            inputs, *each.tiles, each.rows, flat(ctx.banks[each.level]), offset, np.array(ctx.widths), each.used,
            grad_out, grad_inputs, grad_bank, edge_groups, edges, threads, want_inputs, target is not None,
        )  # fmt: skip
    if target is None:
        return
    for group, gradient in zip(edge_groups.reshape(-1), edges.reshape(-1, size)):
        if group >= 0:
            target.grad[each.rows[group], offset : offset + size] += gradient
    target.rows[each.rows] = 1
    last = (offset + size - 1) >> hash_numba.BLOCK_SHIFT
    target.touched[each.rows, offset >> hash_numba.BLOCK_SHIFT : last + 1] = 1
