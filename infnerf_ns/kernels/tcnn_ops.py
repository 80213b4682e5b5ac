"""``hash_encode`` by tiny-cuda-nn: its grid encoding reads the pages of our bank in place, one native call per node.

The layout of a page (:mod:`.layout` computes its sizes) is that of Instant-NGP (Mueller et al. 2022, section 3 and
appendix A) in tiny-cuda-nn's arrangement (``include/tiny-cuda-nn/encodings/grid.h``, ``grid_index`` and ``pos_fract``):

- *Place of a sample.* On a level of scale s, the local position x in [0, 1) has the grid coordinate ``s * x + 0.5``;
  its integer part is the cell, its fraction weights the cell's 8 vertices trilinearly. The half cell staggers the
  levels.
- *Resolution.* A level has ``N = ceil(s) + 1`` vertices per axis. The half cell lets a sample reach vertex N, one
  beyond the last.
- *Entries.* A level has ``min(N^3 rounded up to a multiple of 8, 2^log2_table_size)`` entries. Levels stand one after
  the other, coarse first; the F features of an entry stand side by side.
- *Dense levels*, whose N^3 vertices fit: the vertex (x, y, z) has the entry ``x + N y + N^2 z`` modulo the number of
  entries; vertices N thus wrap onto other ones.
- *Hashed levels*, the others: the coordinates times (1, 2654435761, 805459861), each modulo 2^32, are XORed; modulo the
  number of entries.

Why a page is not given to one native encoding of all levels: tiny-cuda-nn computes a level's scale in float32 as
``exp2(level * log2(growth)) * base - 1``, on the host for the table sizes and again on the device, with fast-math, for
the indices. Where the scale is a whole number, which our finest one always is, rounding decides whether N comes out one
too large: for the default root (8 levels from 32 to 512) it does, and our scales would be missed by some 1e-6 of their
size anyway. So the levels are split into runs (:func:`_runs`) whose scales tiny-cuda-nn cannot round: one level, for
which ``exp2(0)`` is 1, or levels whose resolutions double. A single level's scale in tiny-cuda-nn is the whole number
``N - 1``; where ours is smaller, the positions are scaled instead.

When a native encoding is made, it is compared with the reference once; one that differs ends in an InputError.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from infnerf_ns.errors import InputError
from infnerf_ns.kernels.hash_torch import hash_encode_torch
from infnerf_ns.kernels.layout import HashLayout


def hash_encode(
    positions: Float[Tensor, "P 3"], row: Int[Tensor, "P"], bank: Float[Tensor, "N page"], layout: HashLayout
) -> Float[Tensor, "P LF"]:
    """See :func:`infnerf_ns.kernels.hash_encode`; float32 only, and not twice differentiable.

    Raises:
        InputError: tiny-cuda-nn cannot be used here, or it does not compute what the reference computes.
    """
    if len(positions) == 0:
        return hash_encode_torch(positions, row, bank, layout)
    return _HashEncode.apply(positions, row, bank, layout, torch.is_grad_enabled())


# -- hash levels that one native encoding evaluates --------------------------------------------------------------------


class _Run(NamedTuple):
    """Consecutive hash levels of a page."""

    layout: HashLayout
    """of these levels alone"""
    floats: slice
    """their part of the page"""
    squeeze: float
    """factor of the positions; 1 for all runs but single levels whose scale is no whole number"""


@cache
def _runs(layout: HashLayout) -> tuple[_Run, ...]:
    """The page's hash levels in as few runs as tiny-cuda-nn evaluates exactly."""
    runs, level = [], 0
    while level < layout.num_levels:
        count = 1
        while level + count < layout.num_levels and _doubles(layout, level + count - 1):
            count += 1
        base = int(layout.resolutions[level])
        part = HashLayout(count, base, base << (count - 1), layout.log2_table_size, layout.features)
        first = int(layout.offsets[level]) * layout.features
        squeeze = float(layout.scales[level]) / (base - 1)
        runs.append(_Run(part, slice(first, first + part.page_size), squeeze))
        level += count
    return tuple(runs)


def _doubles(layout: HashLayout, level: int) -> bool:
    """Whether a hash level and the next have whole scales and the next twice the resolution."""
    pair = slice(level, level + 2)
    whole = layout.scales[pair] == layout.resolutions[pair] - 1
    return bool(whole.all()) and int(layout.resolutions[level + 1]) == 2 * int(layout.resolutions[level])


# -- native encodings --------------------------------------------------------------------------------------------------


@cache
def _native(layout: HashLayout, device: torch.device) -> Any:
    """tiny-cuda-nn's native encoding of a run. It holds no parameters; those are an argument of every call."""
    # The native object is used rather than the module around it: that one owns its parameters, and its gradient for a
    # page that is cut from the bank would be as large as the bank, once per node.
    configuration = {
        "otype": "Grid",
        "type": "Hash",
        "hash": "CoherentPrime",
        "interpolation": "Linear",
        "n_levels": layout.num_levels,
        "n_features_per_level": layout.features,
        "log2_hashmap_size": layout.log2_table_size,
        "base_resolution": layout.base_resolution,
        "per_level_scale": 2.0,
    }
    encoding = _library().Encoding(n_input_dims=3, encoding_config=configuration, dtype=torch.float32)
    native = encoding.native_tcnn_module
    _require_the_reference(native, layout, device)
    return native


def _library() -> ModuleType:
    try:
        importlib.import_module("tinycudann.modules")
        return importlib.import_module("tinycudann")
    except Exception as error:  # without a fitting GPU its import ends in one of many kinds of exception
        raise _refusal(f"tinycudann cannot be imported ({error})") from error


def _granularity() -> int:
    """tiny-cuda-nn only takes batches whose size is a multiple of this."""
    return int(_library().modules._C.batch_size_granularity())


def _refusal(reason: str) -> InputError:
    return InputError(f"--pipeline.model.field.backend tcnn: {reason}; use triton or torch")


def _require_the_reference(native: Any, layout: HashLayout, device: torch.device) -> None:
    """Compares sizes, and on random samples the features and gradients, with the reference.

    Raises:
        InputError: they differ; a checkpoint would not be the same field on this backend.
    """
    found, expected = (native.n_params(), native.n_output_dims()), (layout.page_size, layout.num_outputs)
    if found != expected:
        raise _refusal(
            f"tiny-cuda-nn has {found[0]} parameters and {found[1]} features for {layout}, this package {expected[0]}"
            f" and {expected[1]}"
        )
    generator = torch.Generator(device).manual_seed(0)  # its own: the training's random numbers stay what they are

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    with torch.inference_mode(False), torch.enable_grad():
        count = 4 * _granularity()
        positions, page = noise(count, 3).requires_grad_(), (noise(layout.page_size) - 0.5).requires_grad_()
        upstream = noise(count, layout.num_outputs) - 0.5
        context, features = native.fwd(positions, page)
        fast = (features, *native.bwd(context, positions, page, features, upstream))
        row = torch.zeros(count, dtype=torch.long, device=device)
        reference = hash_encode_torch(positions, row, page[None], layout)
        slow = (reference, *torch.autograd.grad(reference, (positions, page), upstream))
    for name, got, wanted in zip(("features", "position gradients", "parameter gradients"), fast, slow):
        # In the mean, as a sample at the face of a cell may be counted to either side.
        if not bool((got - wanted).abs().sum() < 0.03 * wanted.abs().sum()):
            raise _refusal(f"the {name} of tiny-cuda-nn for {layout} are not those of this package")


# -- autograd ----------------------------------------------------------------------------------------------------------


class _Segments(NamedTuple):
    """Samples sorted by node, each node's padded to a whole number of batches."""

    slots: Int[Tensor, "P"]
    """place of each sample among the padded ones"""
    total: int
    """padded samples"""
    nodes: list[tuple[int, slice]]
    """row of each node that has samples, and its padded samples"""


def _segments(row: Int[Tensor, "P"], granularity: int) -> _Segments:
    order = torch.argsort(row) if bool((row[1:] < row[:-1]).any()) else None
    nodes, counts = torch.unique_consecutive(row if order is None else row[order], return_counts=True)
    padded = (counts + granularity - 1) // granularity * granularity
    starts = padded.cumsum(0) - padded
    shifts = starts - (counts.cumsum(0) - counts)
    slots = torch.arange(len(row), device=row.device) + shifts.repeat_interleave(counts, output_size=len(row))
    if order is not None:
        slots = torch.empty_like(slots).index_copy_(0, order, slots)
    edges = torch.stack([nodes, starts, starts + padded], dim=1).tolist()
    return _Segments(slots, edges[-1][2], [(node, slice(start, end)) for node, start, end in edges])


def _spread(values: Float[Tensor, "P C"], segments: _Segments) -> Float[Tensor, "padded C"]:
    """The padded samples; padding is 0."""
    padded = torch.zeros(segments.total, values.shape[1], device=values.device)
    return padded.index_copy_(0, segments.slots, values.float())


def _part(values: Tensor, wanted: bool) -> Tensor:
    """A view whose ``requires_grad`` tells the native code whether to prepare or compute its gradient."""
    return values.detach().requires_grad_(wanted)


class _HashEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout, tracked: bool) -> Tensor:
        with torch.cuda.device_of(bank):
            segments, pages = _segments(row, _granularity()), bank.contiguous()
            padded = _spread(positions, segments)
            of_positions, _, of_bank, *_ = (tracked and needed for needed in ctx.needs_input_grad)
            contexts, features = [], []
            for run in _runs(layout):
                native, points = _native(run.layout, bank.device), padded * run.squeeze
                results = [
                    native.fwd(_part(points[samples], of_positions), _part(pages[node, run.floats], of_bank))
                    for node, samples in segments.nodes
                ]
                contexts.append([context for context, _ in results])
                features.append(torch.cat([part for _, part in results]))
        if tracked:
            ctx.save_for_backward(padded, pages, *features)
            ctx.segments, ctx.layout, ctx.contexts = segments, layout, contexts
        return torch.cat(features, dim=1).index_select(0, segments.slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        padded, pages, *features = ctx.saved_tensors
        of_positions, _, of_bank, *_ = ctx.needs_input_grad
        grad_points = torch.zeros_like(padded) if of_positions else None
        grad_bank = torch.zeros_like(pages) if of_bank else None
        runs = _runs(ctx.layout)
        with torch.cuda.device_of(pages):
            upstream = _spread(grad_out, ctx.segments).split([run.layout.num_outputs for run in runs], dim=1)
            upstream = [part.contiguous() for part in upstream]
            for run, contexts, outputs, grad_run in zip(runs, ctx.contexts, features, upstream):
                native, points = _native(run.layout, pages.device), padded * run.squeeze
                for context, (node, samples) in zip(contexts, ctx.segments.nodes):
                    to_points, to_page = native.bwd(
                        context,
                        _part(points[samples], of_positions),
                        _part(pages[node, run.floats], of_bank),
                        outputs[samples],
                        grad_run[samples],
                    )
                    if grad_points is not None:
                        grad_points[samples] += to_points * run.squeeze
                    if grad_bank is not None:
                        grad_bank[node, run.floats] = to_page
        if grad_points is not None:
            grad_points = grad_points.index_select(0, ctx.segments.slots)
        return grad_points, None, grad_bank, None, None
