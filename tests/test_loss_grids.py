"""Losses on hash grids: that single vertices are read, values by hand, and gradients as the field's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, hash_bank

from infnerf_ns.kernels import HashLayout, bank_gradient, enable_bank_gradient, hash_encode
from infnerf_ns.kernels.layout import PRIMES
from infnerf_ns.losses.grids import grid_decay, grid_total_variation, last_vertices, vertex_positions

LOSSES = [grid_decay, grid_total_variation]
DENSE = HashLayout(1, 9, 9, 12, 2)
"""a page is one dense grid of 9 x 9 x 9 vertices"""


def _entry(layout: HashLayout, level: int, vertex: list[int]) -> slice:
    """Where a page holds the features of a vertex."""
    x, y, z = vertex
    resolution, size = int(layout.resolutions[level]), int(layout.sizes[level])
    if layout.hashed[level]:
        number = (x * PRIMES[0] & 0xFFFFFFFF) ^ (y * PRIMES[1] & 0xFFFFFFFF) ^ (z * PRIMES[2] & 0xFFFFFFFF)
    else:
        number = x + resolution * (y + resolution * z)
    first = (int(layout.offsets[level]) + number % size) * layout.features
    return slice(first, first + layout.features)


def _dense_page(values: torch.Tensor) -> torch.Tensor:
    """A bank of one node in which vertex (x, y, z) has the features values[x, y, z]."""
    bank = torch.zeros(1, DENSE.page_size, dtype=values.dtype)
    bank[0, : values.numel()] = values.permute(2, 1, 0, 3).reshape(-1)
    return bank


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_vertex_is_read_alone(name: str, backend: str) -> None:
    layout, last = LAYOUTS[name], last_vertices(LAYOUTS[name])
    bank = hash_bank(layout, 2)
    for level in range(layout.num_levels):
        inner = torch.randint(1, int(last[level]) + 1, (20, 3)).tolist()
        vertices = torch.tensor([[1, 1, 1], [int(last[level])] * 3, [1, int(last[level]), 1], *inner])
        positions = vertex_positions(vertices, torch.tensor(layout.scales[level]).expand(len(vertices)))
        assert bool((positions >= 0).all() and (positions < 1).all())
        rows = torch.arange(len(vertices)) % 2
        encoded = hash_encode(positions, rows, bank, layout, backend)
        read = encoded[:, level * layout.features : (level + 1) * layout.features]
        expected = torch.stack([bank[row, _entry(layout, level, v)] for row, v in zip(rows, vertices.tolist())])
        assert torch.allclose(read, expected, atol=1e-4)


@given(st.integers(1, 8), st.integers(2, 40), st.integers(0, 600))
@settings(max_examples=100)
def test_the_last_vertex_is_the_last_inside(levels: int, base: int, more: int) -> None:
    layout = HashLayout(levels, base, base + more, 10)
    last = last_vertices(layout)
    assert bool((last >= 1).all() and (last < layout.resolutions).all())
    scales = torch.from_numpy(layout.scales)
    vertices = torch.from_numpy(last)[:, None].expand(-1, 3)
    assert bool((vertex_positions(vertices, scales) < 1).all())
    beyond = (last + 0.5) / layout.scales.astype(np.float64)
    assert bool((beyond >= 1).all())


@pytest.mark.parametrize("name", LAYOUTS)
def test_constant_grids(name: str) -> None:
    layout = LAYOUTS[name]
    bank = torch.full((3, layout.page_size), 0.3)
    rows = torch.arange(3)
    assert grid_decay(bank, layout, rows, 50).item() == pytest.approx(layout.num_levels * 0.09, rel=1e-4)
    assert grid_total_variation(bank, layout, rows, 50).item() == pytest.approx(0, abs=1e-12)
    assert grid_decay(0 * bank, layout, rows, 50).item() == 0


def test_decay_is_the_mean_per_hash_level() -> None:
    """However few entries a level has, its mean counts as much as another's."""
    layout = LAYOUTS["dense"]
    bank = torch.zeros(1, layout.page_size)
    coarse = int(layout.offsets[1]) * layout.features
    assert coarse < layout.page_size / 4
    bank[:, :coarse] = 2.0
    assert grid_decay(bank, layout, torch.zeros(1).long(), 50).item() == pytest.approx(4, rel=1e-4)


def test_estimates_are_those_of_all_vertices() -> None:
    values = torch.rand(9, 9, 9, 2) ** 4
    inner = values[1:, 1:, 1:]
    rows = torch.zeros(1).long()
    expected = inner.square().mean().item()
    assert grid_decay(_dense_page(values), DENSE, rows, 20_000).item() == pytest.approx(expected, rel=0.05)
    pairs = torch.stack([inner.diff(dim=axis).square().mean() for axis in range(3)])
    estimate = grid_total_variation(_dense_page(values), DENSE, rows, 20_000).item()
    assert estimate == pytest.approx(pairs.mean().item(), rel=0.05)


def test_total_variation_of_a_ramp() -> None:
    steps = torch.stack(torch.meshgrid(*[torch.arange(9.0)] * 3, indexing="ij"), dim=-1)
    rows = torch.zeros(1).long()

    def ramp(*slopes: float) -> torch.Tensor:
        return _dense_page((steps @ torch.tensor(slopes))[..., None].expand(-1, -1, -1, 2))

    assert grid_total_variation(ramp(0.5, -0.5, 0.5), DENSE, rows, 40).item() == pytest.approx(0.25, rel=1e-3)
    for slopes in ((0.6, 0, 0), (0, 0.6, 0), (0, 0, 0.6)):
        estimate = grid_total_variation(ramp(*slopes), DENSE, rows, 5_000).item()
        assert estimate == pytest.approx(0.36 / 3, rel=0.1), "every axis is drawn equally often"


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_rows_asked_for_are_touched(loss) -> None:
    layout = LAYOUTS["hashed"]
    bank = hash_bank(layout, 5).requires_grad_()
    loss(bank, layout, torch.tensor([1, 3]), 100).backward()
    assert bank.grad.any(dim=1).tolist() == [False, True, False, True, False]
    touched = [
        bank.grad[1, int(a) * layout.features : int(b) * layout.features].any()
        for a, b in zip(layout.offsets[:-1], layout.offsets[1:])
    ]
    assert all(touched), "every hash level takes part"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_go_where_the_optimizer_looks(loss, name: str) -> None:
    """Into the bank's own gradient, with flags, and with the reference's values."""
    layout, rows = LAYOUTS[name], torch.tensor([2, 0])
    reference = hash_bank(layout, 3).requires_grad_()
    in_place = torch.nn.Parameter(reference.detach().clone())
    enable_bank_gradient(in_place)
    values = []
    for bank, backend in ((reference, "torch"), (in_place, "numba")):
        torch.manual_seed(5)
        value = loss(bank, layout, rows, 30, backend)
        value.backward()
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    held = bank_gradient(in_place)
    assert in_place.grad.data_ptr() == held.grad.data_ptr()
    assert torch.allclose(held.grad, reference.grad, atol=1e-4 * reference.grad.abs().max().item())
    assert held.rows.tolist() == [1, 0, 1] and bool(held.touched.any())


@pytest.mark.parametrize("loss", LOSSES)
def test_grid_gradcheck(loss) -> None:
    layout = HashLayout(2, 3, 5, 5, 2)
    assert layout.hashed.tolist() == [False, True]
    bank = torch.randn(2, layout.page_size, dtype=torch.float64, requires_grad=True)

    def value(bank: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return loss(bank, layout, torch.arange(2), 20)

    assert torch.autograd.gradcheck(value, bank)


def test_levels_without_neighbours_are_left_out() -> None:
    """A level of 2 vertices per axis has one in [0, 1)."""
    both = HashLayout(2, 2, 9, 12, 2)
    assert last_vertices(both).tolist() == [1, 8]
    bank = torch.randn(1, both.page_size, requires_grad=True)
    grid_total_variation(bank, both, torch.zeros(1).long(), 50).backward()
    coarse = int(both.offsets[1]) * both.features
    assert bool(bank.grad[0, coarse:].any())
    assert bank.grad[0, :coarse].abs().max() < 1e-12
    alone = HashLayout(1, 2, 2, 12, 2)
    bank = torch.randn(1, alone.page_size, requires_grad=True)
    loss = grid_total_variation(bank, alone, torch.zeros(1).long(), 50)
    loss.backward()
    assert loss.item() == 0 and not bool(bank.grad.any())
