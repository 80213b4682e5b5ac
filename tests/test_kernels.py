"""Kernels against the torch reference (values and gradients), and the reference against numerical derivatives."""

from __future__ import annotations

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infnerf_ns.kernels import Groups, HashLayout, enable_bank_gradient, grouped_mlp, hash_encode, mlp_page_size

LAYOUTS = {
    "dense": HashLayout(2, 4, 8, 14, 2),
    "hashed": HashLayout(4, 8, 64, 9, 2),
    "one feature": HashLayout(3, 4, 32, 10, 1),
    "four features": HashLayout(3, 4, 32, 8, 4),
    "one level": HashLayout(1, 16, 16, 12, 2),
}

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


def _bank(layout: HashLayout, nodes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(nodes, layout.page_size, generator=generator, dtype=dtype)


def _samples(count: int, nodes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.rand(count, 3, generator=generator, dtype=dtype),
        torch.randint(nodes, (count,), generator=generator),
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@every_threads
def test_hash_encode_numba_is_the_reference(threads: int, layout: HashLayout) -> None:
    numba.set_num_threads(threads)
    results = []
    for backend in ("torch", "numba"):
        bank = _bank(layout, 3).requires_grad_()
        positions, row = _samples(1000, 3)
        positions.requires_grad_()
        out = hash_encode(positions, row, bank, layout, backend)
        out.backward(torch.sin(torch.arange(out.numel()).reshape(out.shape).float()))
        results.append((out.detach(), bank.grad, positions.grad))
    for name, reference, fast in zip(("features", "bank gradient", "position gradient"), *results):
        scale = reference.abs().max()
        assert (reference - fast).abs().max() < 2e-5 * scale, name


def test_hash_encode_reference_gradcheck() -> None:
    layout = HashLayout(2, 3, 6, 6, 2)
    bank = _bank(layout, 2, torch.float64).requires_grad_()
    positions, row = _samples(6, 2, torch.float64)
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
    plain, held = (torch.nn.Parameter(_bank(layout, 4)) for _ in range(2))
    enable_bank_gradient(held)
    positions, row = _samples(6, 2)
    for bank in (plain, held):
        for _ in range(2):  # gradients accumulate over backward passes
            hash_encode(positions, row, bank, layout, "numba").square().sum().backward()
    assert torch.allclose(plain.grad, held.grad, rtol=1e-5, atol=1e-5)
    flags = held.infnerf_gradient
    assert flags.rows.tolist() == [1, 1, 0, 0]
    blocks = torch.nn.functional.pad(held.grad, (0, -held.grad.shape[1] % 16)).reshape(4, -1, 16).ne(0).any(-1)
    assert bool((flags.touched[:, : blocks.shape[1]].bool() >= blocks).all())
    assert flags.touched[:2].float().mean() < 0.5, "of what few samples visit, and no more"


@pytest.mark.parametrize("widths", [(12, 16, 3), (7, 3), (20, 16, 16, 5), (13, 24, 16), (39, 64, 64, 3), (6, 8, 7, 9)])
@pytest.mark.parametrize("sizes", [[5], [40, 0, 3, 100, 1], [64, 64], [1, 1, 1, 500]])
@every_threads
def test_grouped_mlp_numba_is_the_reference(threads: int, sizes: list[int], widths: tuple[int, ...]) -> None:
    numba.set_num_threads(threads)
    offset = 5
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(sum(sizes), widths[0], generator=generator)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    used = torch.randint(1, widths[0] + 1, (len(sizes),), generator=generator)
    for group in range(len(sizes)):
        inputs[starts[group] : starts[group + 1], used[group] :] = 0
    # Groups of two octree levels, the first and the last of three; rows in random order.
    of_first = (len(sizes) + 1) // 2
    level = torch.tensor([0] * of_first + [2] * (len(sizes) - of_first))
    row = torch.cat([torch.randperm(of_first + 1, generator=generator)[:of_first], torch.arange(len(sizes) - of_first)])
    groups = Groups(starts, level, row, used)
    pages = [
        torch.randn(nodes, mlp_page_size(widths) + 9, generator=generator) / widths[0] ** 0.5
        for nodes in (of_first + 1, 2, len(sizes) - of_first + 1)
    ]
    results = []
    for backend in ("torch", "numba"):
        x, banks = inputs.clone().requires_grad_(), [bank.clone().requires_grad_() for bank in pages]
        out = grouped_mlp(x, groups, banks, offset, widths, backend)
        out.backward(torch.cos(torch.arange(out.numel()).reshape(out.shape).float()))
        gradients = [torch.zeros_like(bank) if bank.grad is None else bank.grad for bank in banks]
        results.append([out.detach(), x.grad, *gradients])
    for group in range(len(sizes)):  # the promise of used_inputs: no gradient is owed beyond it
        results[0][1][starts[group] : starts[group + 1], used[group] :] = 0
    for name, reference, fast in zip(("outputs", "input gradient", "level 0", "level 1", "level 2"), *results):
        assert (reference - fast).abs().max() <= 3e-5 * reference.abs().max(), name
