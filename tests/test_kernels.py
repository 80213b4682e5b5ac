"""Kernels against the torch reference (values and gradients), and the reference against numerical derivatives."""

from __future__ import annotations

import math

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    LAYOUTS,
    assert_close,
    flagged_blocks,
    hash_bank,
    hash_results,
    hash_samples,
    mlp_case,
    mlp_results,
)

from infnerf_ns.kernels import HashLayout, enable_bank_gradient, hash_encode

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@every_threads
def test_hash_encode_numba_is_the_reference(threads: int, layout: HashLayout) -> None:
    numba.set_num_threads(threads)
    reference, fast = (hash_results(backend, layout, 1000) for backend in ("torch", "numba"))
    for name, expected in reference.items():
        assert_close(fast[name], expected, name, 2e-5)


def test_hash_encode_reference_gradcheck() -> None:
    layout = HashLayout(2, 3, 6, 6, 2)
    bank = hash_bank(layout, 2, torch.float64).requires_grad_()
    positions, row = hash_samples(6, 2, torch.float64)
    positions.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, b: hash_encode(p, row, b, layout, "torch"), (positions, bank))


@given(st.floats(-5, 5), st.integers(0, 2**31))
@settings(max_examples=20)
def test_constant_grid_interpolates_to_the_constant(value: float, seed: int) -> None:
    layout = LAYOUTS["hashed"]
    bank = torch.full((2, layout.page_size), value)
    positions = torch.rand(50, 3, generator=torch.Generator().manual_seed(seed))
    out = hash_encode(positions, torch.ones(50, dtype=torch.long), bank, layout, "numba")
    assert torch.allclose(out, torch.full_like(out, value), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_positions_that_are_no_numbers_give_features_that_are_none(layout: HashLayout) -> None:
    """They stay within the page, forward and backward, and the others are what they are without them."""
    bank = hash_bank(layout, 2).requires_grad_()
    positions, row = hash_samples(40, 2)
    expected = hash_encode(positions, row, bank, layout, "numba").detach()
    positions[5, 0], positions[6] = math.nan, math.nan
    positions.requires_grad_()
    out = hash_encode(positions, row, bank, layout, "numba")
    out.sum().backward()
    assert bool(out[5:7].isnan().all())
    others = torch.tensor([i for i in range(40) if i not in (5, 6)])
    assert torch.equal(out[others], expected[others])
    assert bool(positions.grad[5].isnan().any()) and bool(torch.isfinite(positions.grad[others]).all())


def test_layout_follows_the_published_rule() -> None:
    """Level sizes and one hashed index computed by hand (Instant-NGP, section 3)."""
    layout = HashLayout(3, 16, 64, 13, 2)
    assert layout.resolutions.tolist() == [16, 32, 64]
    assert layout.sizes.tolist() == [4096, 8192, 8192]
    assert layout.hashed.tolist() == [False, True, True]
    assert layout.offsets.tolist() == [0, 4096, 12288, 20480]
    bank = torch.arange(layout.page_size, dtype=torch.float32)[None]
    vertex = torch.tensor([5, 9, 40])
    position = (vertex[None] - 0.5 + 1e-5) / 63.0  # grid coordinate of that vertex on level 2
    expected = ((5 * 1) ^ ((9 * 2654435761) % 2**32) ^ ((40 * 805459861) % 2**32)) % 8192
    out = hash_encode(position.float(), torch.zeros(1, dtype=torch.long), bank, layout, "torch")
    assert abs(out[0, 4].item() / 2 - (12288 + expected)) < 8


def test_in_place_gradient_equals_autograd_and_flags_what_was_touched() -> None:
    layout = LAYOUTS["hashed"]
    plain, held = (torch.nn.Parameter(hash_bank(layout, 4)) for _ in range(2))
    enable_bank_gradient(held)
    positions, row = hash_samples(6, 2)
    for bank in (plain, held):
        for _ in range(2):  # gradients accumulate over backward passes
            hash_encode(positions, row, bank, layout, "numba").square().sum().backward()
    assert torch.allclose(plain.grad, held.grad, rtol=1e-5, atol=1e-5)
    flags = held.infnerf_gradient
    assert flags.rows.tolist() == [1, 1, 0, 0]
    assert bool((flags.touched.bool() >= flagged_blocks(held.grad, flags.touched.shape[1])).all())
    assert flags.touched[:2].float().mean() < 0.5, "of what few samples visit, and no more"


@pytest.mark.parametrize("widths", [(12, 16, 3), (7, 3), (20, 16, 16, 5), (13, 24, 16), (39, 64, 64, 3), (6, 8, 7, 9)])
@pytest.mark.parametrize("sizes", [[5], [40, 0, 3, 100, 1], [64, 64], [1, 1, 1, 500]])
@every_threads
def test_grouped_mlp_numba_is_the_reference(threads: int, sizes: list[int], widths: tuple[int, ...]) -> None:
    numba.set_num_threads(threads)
    case = mlp_case(sizes, widths)
    reference, fast = (mlp_results(backend, case) for backend in ("torch", "numba"))
    for name, expected in reference.items():
        assert_close(fast[name], expected, name)
