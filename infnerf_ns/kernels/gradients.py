"""Persistent gradients of the banks: written in place by the kernels, with flags for what was touched.

A bank can have hundreds of millions of entries of which a step touches a few thousand. A fresh dense gradient per step
would cost more than the step; so a bank Parameter keeps one gradient buffer for its lifetime, the backward kernels add
to it and set one flag per 16 floats, and :class:`infnerf_ns.training.optimizer.NodeAdam` visits, updates and clears the
flagged blocks only.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Parameter

from infnerf_ns.kernels.hash_numba import BLOCK_SHIFT


class BankGradient:
    """Gradient buffer of one bank Parameter: ``grad [N, page]``, ``touched [N, blocks]`` uint8 (a multiple
    of 8 blocks), ``rows [N]`` uint8."""

    def __init__(self, bank: Tensor) -> None:
        rows, page = bank.shape
        self.grad = lazy_zeros(bank.device, torch.float32, rows, page)
        self.touched = lazy_zeros(bank.device, torch.uint8, rows, -(-page // (8 << BLOCK_SHIFT)) * 8)
        self.rows = lazy_zeros(bank.device, torch.uint8, rows)


_ROWS_AT_ONCE = 16
"""Rows that are copied together: a bank of all nodes must not stand in memory a third time."""


def lazy_zeros(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros; on a CPU numpy's, whose pages are mapped when they are first written: memory is used only where a step
    really writes."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def moved_rows(values: Tensor, rows: Int[Tensor, "n"], written: Tensor | None = None) -> Tensor:
    """A tensor whose rows are these of the given one; zero where the number is -1, and where nothing was written.

    Args:
        values: [N, ...].
        rows: 0 to N - 1, or -1.
        written: [N], zero for rows that hold zeros; None: all are copied.
    """
    moved = lazy_zeros(values.device, values.dtype, len(rows), *values.shape[1:])
    known = rows >= 0
    if written is not None:
        known &= (written[rows.clamp(min=0)] != 0) if len(written) else False
    places = torch.nonzero(known)[:, 0]
    for some in places.split(_ROWS_AT_ONCE):
        moved[some] = values[rows[some]]
    return moved


def enable_bank_gradient(bank: Parameter) -> None:
    """Let the kernels accumulate this Parameter's gradient in place; :func:`bank_gradient` finds it."""
    bank.infnerf_in_place_gradient = True  # type: ignore[attr-defined]


def bank_gradient(bank: Tensor) -> BankGradient | None:
    """The in-place gradient of a bank, made or remade when the bank's shape or device changed; None where it is not
    enabled."""
    if not getattr(bank, "infnerf_in_place_gradient", False):
        return None
    held: BankGradient | None = getattr(bank, "infnerf_gradient", None)
    # The flags tell the device: where a module moves, torch moves the gradient of a Parameter with it, in place.
    if held is None or held.grad.shape != bank.shape or held.rows.device != bank.device:
        held = BankGradient(bank)
        bank.infnerf_gradient = held  # type: ignore[attr-defined]
        bank.grad = held.grad
    elif bank.grad is None or bank.grad.data_ptr() != held.grad.data_ptr():
        bank.grad = held.grad
    return held


@torch.no_grad()
def move_bank(bank: Parameter, rows: Int[Tensor, "n"]) -> None:
    """A bank takes over these of its rows (:func:`moved_rows`), and so does its pending gradient, if there is one."""
    held: BankGradient | None = getattr(bank, "infnerf_gradient", None)
    pending, bank.grad = bank.grad, None
    bank.data = moved_rows(bank.data, rows)
    if held is not None:
        moved = BankGradient(bank)
        for name in ("grad", "touched", "rows"):
            setattr(moved, name, moved_rows(getattr(held, name), rows, held.rows))
        bank.infnerf_gradient, bank.grad = moved, moved.grad  # type: ignore[attr-defined]
    elif pending is not None:
        bank.grad = moved_rows(pending, rows)
