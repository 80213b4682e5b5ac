"""The step of :class:`infnerf_ns.training.optimizer.NodeAdam` on CUDA with Triton.

Which rows and blocks were touched is known to the device alone, and asking for it would stop the host until all work is
done. So a launch covers all blocks of a bank; programs whose row has no flag return at once, and the others read the
flags (1/64 of the bank's bytes) and visit the flagged blocks only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from infnerf_ns.kernels.gradients import BankGradient
from infnerf_ns.kernels.triton_launch import BLOCK_FLOATS, launch

CHUNK = 64
"""blocks that a program visits together"""
TOO_LARGE: tl.constexpr = tl.constexpr(2.0**60)
"""its square is still finite"""
SPAN = 16 * CHUNK
"""blocks of one program"""


def step(
    bank: Tensor, held: BankGradient, state: dict[str, Tensor], group: dict, factor: Tensor, left_out: Tensor
) -> None:
    """One step of Adam on the flagged entries of bank [N, page]; clears their gradients and flags. Entries whose
    gradient is NaN, infinite or too large to be squared keep their values.

    Args:
        bank: contiguous values, changed in place.
        held: the gradient.
        state: ``exp_avg``, ``exp_avg_sq`` [N, page] and ``row_steps`` [N].
        group: ``lr``, ``betas``, ``eps`` and ``warmup`` of the optimizer.
        factor: [] float32, of the gradients.
        left_out: [] int64, the number of those entries is added.
    """
    state["row_steps"] += held.rows
    beta1, beta2 = group["betas"]
    launch(
        _step, _grid(held), bank.device, bank, held.grad, held.touched, held.rows, state["row_steps"], state["exp_avg"],
        state["exp_avg_sq"], factor, left_out, bank.shape[1], held.touched.shape[1], float(group["lr"]),
        float(max(group["warmup"], 1)),
        beta1, beta2, math.log(beta1) if beta1 else -math.inf, math.log(beta2), group["eps"], SPAN=SPAN, CHUNK=CHUNK,
    )  # fmt: skip
    held.rows.zero_()


def square(held: BankGradient) -> Tensor:
    """Sum [] float64 of the squares of the gradients that :func:`step` takes."""
    total = torch.zeros((), dtype=torch.float64, device=held.grad.device)
    launch(
        _square, _grid(held), held.grad.device, held.grad, held.touched, held.rows, total, held.grad.shape[1],
        held.touched.shape[1], SPAN=SPAN, CHUNK=CHUNK,
    )  # fmt: skip
    return total


def clear(held: BankGradient) -> None:
    """Clears gradients and flags of what was touched."""
    launch(
        _clear, _grid(held), held.grad.device, held.grad, held.touched, held.rows, held.grad.shape[1],
        held.touched.shape[1], SPAN=SPAN, CHUNK=CHUNK,
    )  # fmt: skip
    held.rows.zero_()


def _grid(held: BankGradient) -> tuple[int]:
    rows, blocks = held.touched.shape
    return (rows * -(-blocks // SPAN),)


@triton.jit
def _span_of(blocks, SPAN: tl.constexpr):
    """This program's row and its blocks, as a range."""
    spans = (blocks + SPAN - 1) // SPAN
    row = tl.program_id(0) // spans
    first = (tl.program_id(0) % spans) * SPAN
    return row.to(tl.int64), first, tl.minimum(first + SPAN, blocks)


@triton.jit
def _entries_of(flag, block, page):
    """Places [CHUNK, 16] in the page of the entries of blocks, and which of them are flagged."""
    place = block.to(tl.int64)[:, None] * BLOCK_FLOATS + tl.arange(0, BLOCK_FLOATS)[None, :]
    return place, (flag != 0)[:, None] & (place < page)


@triton.jit
def _step(
    bank, grad, touched, rows, row_steps, exp_avg, exp_avg_sq, factor, left_out, page, blocks, lr, warmup, beta1, beta2,
    log_beta1, log_beta2, eps, SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, first, stop = _span_of(blocks, SPAN)
    if tl.load(rows + row) == 0:
        return
    # The powers in float64: 1 - beta^steps loses digits for few steps.
    steps = tl.load(row_steps + row).to(tl.float64)
    rate = (lr * tl.minimum(1.0, steps / warmup) / (1 - tl.exp(steps * log_beta1))).to(tl.float32)
    correction = (1 / tl.sqrt(1 - tl.exp(steps * log_beta2))).to(tl.float32)
    scale = tl.load(factor)
    for chunk in range(first, stop, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        flag = tl.load(touched + row * blocks + block, mask=block < stop, other=0).to(tl.int32)
        if tl.max(flag, axis=0) > 0:
            tl.store(touched + row * blocks + block, 0, mask=block < stop)
            place, mask = _entries_of(flag, block, page)
            place = row * page + place
            g = tl.load(grad + place, mask=mask, other=0.0)
            usable = tl.abs(g) < TOO_LARGE  # not so NaN
            tl.store(grad + place, 0.0, mask=mask)
            bad = tl.sum(tl.sum((mask & (usable == 0)).to(tl.int64), axis=1), axis=0)
            if bad > 0:
                tl.atomic_add(left_out, bad)
            mask = mask & usable & (g != 0)
            g = g * scale
            m = beta1 * tl.load(exp_avg + place, mask=mask, other=0.0) + (1 - beta1) * g
            v = beta2 * tl.load(exp_avg_sq + place, mask=mask, other=0.0) + (1 - beta2) * g * g
            tl.store(exp_avg + place, m, mask=mask)
            tl.store(exp_avg_sq + place, v, mask=mask)
            value = tl.load(bank + place, mask=mask, other=0.0)
            tl.store(bank + place, value - rate * m / (tl.sqrt(v) * correction + eps), mask=mask)


@triton.jit
def _square(grad, touched, rows, total, page, blocks, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    row, first, stop = _span_of(blocks, SPAN)
    if tl.load(rows + row) == 0:
        return
    found = tl.zeros((CHUNK, BLOCK_FLOATS), dtype=tl.float64)
    for chunk in range(first, stop, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        flag = tl.load(touched + row * blocks + block, mask=block < stop, other=0).to(tl.int32)
        if tl.max(flag, axis=0) > 0:
            place, mask = _entries_of(flag, block, page)
            g = tl.load(grad + row * page + place, mask=mask, other=0.0)
            g = tl.where(tl.abs(g) < TOO_LARGE, g, 0.0).to(tl.float64)
            found += g * g
    tl.atomic_add(total, tl.sum(tl.sum(found, axis=1), axis=0))


@triton.jit
def _clear(grad, touched, rows, page, blocks, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    row, first, stop = _span_of(blocks, SPAN)
    if tl.load(rows + row) == 0:
        return
    for chunk in range(first, stop, CHUNK):
        block = chunk + tl.arange(0, CHUNK)
        flag = tl.load(touched + row * blocks + block, mask=block < stop, other=0).to(tl.int32)
        if tl.max(flag, axis=0) > 0:
            tl.store(touched + row * blocks + block, 0, mask=block < stop)
            place, mask = _entries_of(flag, block, page)
            tl.store(grad + row * page + place, 0.0, mask=mask)
