"""What a launch of the Triton kernels needs: the right device, and small tables there that say where banks lie and how
hash levels are laid out.

One launch covers many banks: a program looks up the address of its own, as in Triton's tutorial on grouped matrix
products. Tables are cached by their content, so that a training loop, whose banks and gradients stay where they are,
copies nothing to the device and never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels.gradients import BankGradient, bank_gradient
from infnerf_ns.kernels.hash_numba import BLOCK_SHIFT as _BLOCK_SHIFT
from infnerf_ns.kernels.layout import HashLayout

BLOCK_SHIFT: tl.constexpr = tl.constexpr(_BLOCK_SHIFT)
BLOCK_FLOATS: tl.constexpr = tl.constexpr(1 << _BLOCK_SHIFT)
"""floats that share one touched flag"""

GRID_FIELDS: tl.constexpr = tl.constexpr(6)
BANK_FIELDS: tl.constexpr = tl.constexpr(7)


def launch(kernel: Callable, grid: tuple[int, ...], device: torch.device, *arguments, **constants) -> None:
    """Runs a kernel on a device, which need not be the current one; an empty grid is nothing to do."""
    if all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants)


class Grids(NamedTuple):
    """The hash levels of one or more octree levels, one after the other."""

    fields: Int[Tensor, "E 6"]
    """resolution, number of entries, first float in the page, whether hashed, octree level, column of the features"""
    scales: Float[Tensor, "E"]
    """grid coordinate per unit of local coordinate"""


@cache
def grids_of(layouts: tuple[HashLayout, ...], device: torch.device) -> Grids:
    """The table of these octree levels' hash levels."""
    fields, scales, column = [], [], 0
    for level, layout in enumerate(layouts):
        for hash_level in range(layout.num_levels):
            resolution, size = int(layout.resolutions[hash_level]), int(layout.sizes[hash_level])
            base, hashed = int(layout.offsets[hash_level]) * layout.features, int(layout.hashed[hash_level])
            fields.append((resolution, size, base, hashed, level, column))
            scales.append(float(layout.scales[hash_level]))
            column += layout.features
    return Grids(torch.tensor(fields, device=device), floats(tuple(scales), device))


@lru_cache(maxsize=256)
def floats(values: tuple[float, ...], device: torch.device) -> Float[Tensor, "V"]:
    """Constants as a float32 tensor."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=256)
def _integers(values: tuple[tuple[int, ...], ...], device: torch.device) -> Int[Tensor, "K V"]:
    return torch.tensor(values, dtype=torch.int64, device=device)


class Target(NamedTuple):
    """Where a kernel adds a bank's gradient."""

    returned: Tensor | None
    """what autograd is given: None if the gradient is kept in place"""
    grad: Float[Tensor, "N page"]
    touched: Int[Tensor, "N blocks"]
    rows: Int[Tensor, "N"]


def target_of(bank: Tensor) -> Target:
    """The bank's gradient in place where it has one, else a fresh one."""
    held = bank_gradient(bank)
    returned = None
    if held is None:
        held = BankGradient(bank)
        returned = held.grad
    return Target(returned, held.grad, held.touched, held.rows)


def bank_table(
    pages: list[Tensor], first: list[int] | None = None, targets: list[Target | None] | None = None
) -> Int[Tensor, "K 7"]:
    """Per bank: address, page size, number of the node in row 0, and of the gradient's target the address of the
    gradient, address of the block flags, blocks per row, address of the row flags (0: no gradient wanted).

    Args:
        pages: contiguous banks [N, page]; they must live until the kernel is launched.
        first: number of the node in row 0 of each (default 0).
        targets: of the gradients; None where a bank gets none.
    """
    table = []
    for k, page in enumerate(pages):
        target, gradient = None if targets is None else targets[k], (0, 0, 0, 0)
        if target is not None:
            touched = target.touched
            gradient = (target.grad.data_ptr(), touched.data_ptr(), touched.shape[1], target.rows.data_ptr())
        table.append((page.data_ptr(), page.shape[1], 0 if first is None else first[k], *gradient))
    return _integers(tuple(table), pages[0].device)
