"""Ties the Triton kernels into autograd."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from infnerf_ns.kernels import hash_triton, mlp_triton, route_triton, tree_triton
from infnerf_ns.kernels.batches import Groups, TreePaths
from infnerf_ns.kernels.layout import HashLayout
from infnerf_ns.kernels.mlp_torch import grouped_mlp_torch
from infnerf_ns.kernels.triton_launch import Grids, bank_table, floats, grids_of, launch, target_of

BLOCK = 128
"""lanes per program of the kernels of hash grids and of the walk"""
MOST_LAYERS = 5


class MLPLimits(NamedTuple):
    """How the MLP kernels are launched, and for which MLPs: what keeps a tile's activations in registers.

    Chosen from the registers that the compiler reports for compute capability 8.0 and 9.0 (tests/triton_aot.py), not
    from timings.
    """

    most_width: int
    """of hidden and output layers; wider MLPs are left to torch"""
    tile: int
    """samples per program"""


EXACT, ROUNDED = MLPLimits(64, 32), MLPLimits(128, 64)
"""with fp32 factors, which tensor cores do not multiply, and with rounded ones"""
CHUNK, WARPS = 16, 8
"""inputs of an MLP that are read together, and warps of a program"""


def hash_encode(positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout) -> Tensor:
    """See :func:`infnerf_ns.kernels.hash_encode`."""
    return _HashEncode.apply(positions.float(), row, bank, layout)


def route(unit: Tensor, footprints: Tensor | None, children: Tensor, gsd: list[float], path: Tensor) -> Tensor:
    """See :func:`infnerf_ns.kernels.route`."""
    unit, children = _flat(unit.float()), _flat(children)
    radii = unit if footprints is None else _flat(footprints.float())
    written = path.contiguous()
    launch(
        route_triton.route, _blocks(unit), unit.device, unit, radii, children, floats(tuple(gsd), unit.device), written,
        len(unit), path.shape[1], HAS_FOOTPRINTS=footprints is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return path if written is path else path.copy_(written)


def grouped_mlp(inputs: Tensor, groups: Groups, banks: list[Tensor], offset: int, widths: tuple[int, ...]) -> Tensor:
    """See :func:`infnerf_ns.kernels.grouped_mlp`.

    The factors of the products are float32; TF32 where ``torch.backends.cuda.matmul.allow_tf32``; and half precision
    under CUDA's autocast. Sums and results are float32 always. MLPs that do not fit on the chip are left to torch.
    """
    precision = _precision()
    if len(widths) - 1 > MOST_LAYERS or max(widths[1:]) > _limits(precision).most_width:
        return grouped_mlp_torch(inputs, groups, banks, offset, widths)
    return _GroupedMLP.apply(inputs.float(), groups, offset, widths, precision, *banks)


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
    return _PathFeatures.apply(paths, starts, footprints, cells, layouts, width, *banks)


def path_sum(
    paths: TreePaths,
    footprints: Tensor | None,
    cells: list[np.ndarray],
    banks: list[Tensor],
    layouts: list[HashLayout],
) -> Tensor:
    """See :func:`infnerf_ns.kernels.path_sum`."""
    return _PathSum.apply(paths, footprints, cells, layouts, *banks)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _blocks(samples: Tensor, features: int = 1) -> tuple[int]:
    """Programs that have a lane for each feature of a hash level of each sample."""
    return (triton.cdiv(len(samples) * features, BLOCK),)


class _HashEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout) -> Tensor:
        positions, row, pages = _flat(positions), _flat(row), _flat(bank)
        device, width = positions.device, layout.num_outputs
        out = torch.empty(len(positions), width, device=device)
        grids = grids_of((layout,), device)
        launch(
            hash_triton.forward, (*_blocks(positions, layout.features), layout.num_levels), device, positions, row,
            bank_table([pages]), *grids, out, len(positions), width, FEATURES=layout.features, BLOCK=BLOCK,
        )  # fmt: skip
        ctx.save_for_backward(positions, row)
        ctx.bank, ctx.layout, ctx.grids = bank, layout, grids
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        positions, row = ctx.saved_tensors
        pages, gradient, layout = _flat(ctx.bank), _flat(grad_out), ctx.layout
        blocks = _blocks(positions, layout.features)
        count, device, width = len(positions), positions.device, layout.num_outputs
        grad_bank = grad_positions = None
        if ctx.needs_input_grad[2]:
            target = target_of(ctx.bank)
            grad_bank = target.returned
            launch(
                hash_triton.backward_bank, (*blocks, layout.num_levels), device, positions, row,
                bank_table([pages], targets=[target]), *ctx.grids, gradient, count, width,
                FEATURES=layout.features, BLOCK=BLOCK,
            )  # fmt: skip
        if ctx.needs_input_grad[0]:
            grad_positions = torch.empty_like(positions)
            launch(
                hash_triton.backward_positions, blocks, device, positions, row, bank_table([pages]), *ctx.grids,
                gradient, grad_positions, count, width, layout.num_levels, FEATURES=layout.features, BLOCK=BLOCK,
            )  # fmt: skip
        return grad_positions, None, grad_bank, None


def _weighing(unit: Tensor, footprints: Tensor | None, cells: list[np.ndarray], grids: Grids) -> tuple[Tensor, Tensor]:
    """Footprints and what they are compared with in every hash level; what is not read if there are none."""
    if footprints is None:
        return unit, grids.scales
    return _flat(footprints.float()), floats(tuple(np.concatenate(cells).tolist()), unit.device)


class _PathFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, starts, footprints, cells, layouts, width, *banks) -> Tensor:
        unit, path, coords = _flat(paths.unit.float()), _flat(paths.path), _flat(paths.coords)
        count, device = len(unit), unit.device
        out = torch.zeros(count, width, device=device)
        ctx.levels = sum(start < count for start in starts)  # those that have samples; deeper ones may have no column
        ctx.banks, ctx.paths, ctx.weighted = banks, paths, footprints is not None
        if ctx.levels == 0:
            return out
        grids = grids_of(tuple(layouts[: ctx.levels]), device)
        weighing = _weighing(unit, footprints, cells[: ctx.levels], grids)
        (ctx.features,) = {layout.features for layout in layouts}
        pages = [_flat(bank) for bank in banks[: ctx.levels]]
        launch(
            tree_triton.encode, (*_blocks(unit, ctx.features), len(grids.scales)), device, unit, path, coords,
            *weighing, bank_table(pages, paths.first), *grids, out, count, path.shape[1], width, FEATURES=ctx.features,
            WEIGHTED=ctx.weighted, BLOCK=BLOCK,
        )  # fmt: skip
        ctx.samples, ctx.grids = (unit, path, coords, *weighing), grids
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        wanted = [each and level < ctx.levels for level, each in enumerate(ctx.needs_input_grad[6:])]
        targets = [target_of(bank) if each else None for bank, each in zip(ctx.banks, wanted)]
        if any(wanted):
            _scatter(ctx, targets[: ctx.levels], grad_out, ctx.samples, ctx.features, ctx.weighted)
        return (None,) * 6 + tuple(target and target.returned for target in targets)


class _PathSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, paths, footprints, cells, layouts, *banks) -> Tensor:
        unit, path, coords = _flat(paths.unit.float()), _flat(paths.path), _flat(paths.coords)
        device, levels = unit.device, path.shape[1]
        out = torch.empty(len(unit), device=device)
        grids = grids_of(tuple(layouts[:levels]), device)
        weighing = _weighing(unit, footprints, cells[:levels], grids)
        ctx.banks, ctx.paths, ctx.weighted = banks, paths, footprints is not None
        pages = [_flat(bank) for bank in banks[:levels]]
        launch(
            tree_triton.add_sum, _blocks(unit), device, unit, path, coords, *weighing,
            bank_table(pages, paths.first), *grids, out, len(unit), levels, len(grids.scales), WEIGHTED=ctx.weighted,
            BLOCK=BLOCK,
        )  # fmt: skip
        ctx.samples, ctx.grids, ctx.levels = (unit, path, coords, *weighing), grids, levels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        targets = [target_of(bank) if each else None for bank, each in zip(ctx.banks, ctx.needs_input_grad[4:])]
        _scatter(ctx, targets[: ctx.levels], grad_out, ctx.samples, 1, ctx.weighted, summed=True)
        return (None,) * 4 + tuple(target and target.returned for target in targets)


def _scatter(
    ctx, targets: list, grad_out: Tensor, samples: tuple, features: int, weighted: bool, summed: bool = False
) -> None:
    """The backward pass of :class:`_PathFeatures` and :class:`_PathSum`."""
    unit, path = samples[:2]
    launch(
        tree_triton.encode_backward, (*_blocks(unit, features), len(ctx.grids.scales)), unit.device, *samples,
        bank_table(list(ctx.banks[: ctx.levels]), ctx.paths.first, targets), *ctx.grids, _flat(grad_out), len(unit),
        path.shape[1], 1 if summed else grad_out.shape[1], FEATURES=features, WEIGHTED=weighted, SUMMED=summed,
        BLOCK=BLOCK,
    )  # fmt: skip


def _precision() -> str:
    """Of the factors of products, as torch's own matrix products would have it now."""
    if torch.is_autocast_enabled("cuda"):
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(torch.get_autocast_dtype("cuda"), "ieee")
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _limits(precision: str) -> MLPLimits:
    return EXACT if precision == "ieee" else ROUNDED


def _mlp_constants(widths: tuple[int, ...], precision: str) -> dict:
    """Compile-time constants of the MLP kernels, and how they are launched."""
    padded = [max(16, triton.next_power_of_2(width)) for width in widths]
    missing = [0] * (MOST_LAYERS + 1 - len(widths))
    return {
        **{f"W{layer}": width for layer, width in enumerate([*widths, *missing])},
        **{f"P{layer + 1}": width for layer, width in enumerate([*padded[1:], *missing])},
        **{"WN": widths[-1], "PN": padded[-1], "LAYERS": len(widths) - 1},
        **{"TILE": _limits(precision).tile, "CHUNK": CHUNK, "PRECISION": precision, "num_warps": WARPS},
    }


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, groups, offset, widths, precision, *banks) -> Tensor:
        inputs, groups = _flat(inputs), Groups(*(_flat(part) for part in groups))
        out = torch.empty(len(inputs), widths[-1], device=inputs.device)
        pages = [_flat(bank) for bank in banks]
        ctx.constants = _mlp_constants(widths, precision)
        ctx.grid = (len(inputs) // ctx.constants["TILE"] + len(groups.row),)
        if len(inputs):
            launch(
                mlp_triton.forward, ctx.grid, inputs.device, inputs, *groups, len(groups.row), bank_table(pages),
                offset, out, **ctx.constants,
            )  # fmt: skip
        ctx.save_for_backward(inputs, *groups)
        ctx.banks, ctx.offset = banks, offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        inputs, *groups = ctx.saved_tensors
        groups, want_inputs = Groups(*groups), ctx.needs_input_grad[0]
        targets = [target_of(bank) if each else None for bank, each in zip(ctx.banks, ctx.needs_input_grad[5:])]
        grad_inputs = torch.empty_like(inputs) if want_inputs else None
        if len(inputs):
            pages = [_flat(bank) for bank in ctx.banks]
            launch(
                mlp_triton.backward, ctx.grid, inputs.device, inputs, *groups, len(groups.row),
                bank_table(pages, targets=targets), ctx.offset, _flat(grad_out),
                inputs if grad_inputs is None else grad_inputs, **ctx.constants, WANT_INPUTS=want_inputs,
            )  # fmt: skip
        return (grad_inputs, None, None, None, None, *(target and target.returned for target in targets))
