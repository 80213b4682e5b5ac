"""Persistent gradients of the banks: written in place by the kernels, with flags for what was touched.

A bank can have hundreds of millions of entries of which a step touches a few thousand. A fresh dense gradient per step
would cost more than the step; so a bank Parameter keeps one gradient buffer for its lifetime, the backward kernels add
to it and set one flag per 16 floats, and :class:`infnerf_ns.training.optimizer.NodeAdam` visits, updates and clears the
flagged blocks only.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from infnerf_ns.kernels.hash_numba import BLOCK_SHIFT


class BankGradient:
    """Gradient buffer of one bank Parameter: ``grad [N, page]``, ``touched [N, blocks]`` uint8 (a multiple
    of 8 blocks), ``rows [N]`` uint8."""

    def __init__(self, bank: Tensor) -> None:
        rows, page = bank.shape
        self.grad = _zeros(bank.device, torch.float32, rows, page)
        self.touched = _zeros(bank.device, torch.uint8, rows, -(-page // (8 << BLOCK_SHIFT)) * 8)
        self.rows = _zeros(bank.device, torch.uint8, rows)


def _zeros(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros map fresh pages lazily: memory is used only where a step really writes.
    return torch.from_numpy(np.zeros(shape, dtype=np.float32 if dtype == torch.float32 else np.uint8))


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
