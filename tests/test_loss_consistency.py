"""Consistency of adjacent cuts by hand, and numerical normals of fields whose normals are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_field import tiny_field, tiny_samples

from infnerf_ns.losses.consistency import depth_consistency, normal_consistency, numerical_normals

seeds = st.integers(0, 2**31)


def _normals(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_depth_consistency_by_hand() -> None:
    coarse, fine = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 2.25, 2.0])
    scale = torch.tensor([1.0, 0.5, 2.0])  # apart by 0, 1/2 and 3/2 units
    assert depth_consistency(coarse, fine, scale).item() == pytest.approx((0.125 + 1.0) / 3)
    assert depth_consistency(fine, fine, scale).item() == 0


@given(seeds, st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_depth_consistency_does_not_depend_on_the_scale_of_the_scene(seed: int, factor: float) -> None:
    coarse, fine, scale = _normals(30, seed).abs().T + 0.1
    expected = depth_consistency(coarse, fine, scale).item()
    assert depth_consistency(factor * coarse, factor * fine, factor * scale).item() == pytest.approx(expected, rel=1e-9)


def test_normal_consistency_by_hand() -> None:
    x, y = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    coarse, fine = torch.stack([x, x, x, x]), torch.stack([x, y, -x, x + y])
    for weight, expected in (
        ([1.0, 1, 1, 1], (0 + 1 + 2 + 1 - math.sqrt(0.5)) / 4),
        ([0, 3.0, 1, 0], (3 * 1 + 1 * 2) / 4),
        ([0.5, 0, 0, 0], 0),
        ([0, 0, 0, 0], 0),
    ):
        assert normal_consistency(coarse, fine, torch.tensor(weight)).item() == pytest.approx(expected, abs=1e-6)


@given(seeds)
@settings(max_examples=25)
def test_normal_consistency_ignores_lengths(seed: int) -> None:
    coarse, fine, weight = _normals(20, seed), _normals(20, seed + 1), _normals(20, seed + 2).abs()[:, 0]
    loss = normal_consistency(coarse, fine, weight).item()
    lengths = 0.1 + _normals(20, seed + 3).abs()[:, :1]
    assert 0 < loss < 2
    assert normal_consistency(lengths * coarse, fine, 7 * weight).item() == pytest.approx(loss, rel=1e-6)
    assert normal_consistency(coarse, 2 * coarse, weight).item() == pytest.approx(0, abs=1e-12)


def test_consistency_gradients() -> None:
    coarse, fine = _normals(6).requires_grad_(), _normals(6, 1).requires_grad_()
    weight = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, f: normal_consistency(c, f, weight), (coarse, fine))
    depths = [(each.detach()[:, 0].abs() + 0.1).requires_grad_() for each in (coarse, fine)]
    assert torch.autograd.gradcheck(lambda c, f: depth_consistency(c, f, weight + 0.1), depths)
    weight.requires_grad_()
    normal_consistency(coarse, fine, weight).backward()
    assert weight.grad is None and bool(coarse.grad.any())


def test_gradients_stay_small_where_there_is_no_normal() -> None:
    nothing = torch.zeros(4, 3, requires_grad=True)
    loss = normal_consistency(nothing, torch.eye(3)[[0, 1, 2, 0]], torch.ones(4))
    loss.backward()
    assert loss.item() == 1 and nothing.grad.norm(dim=1).max() <= 1001 / 4


def test_normals_of_a_plane_a_ball_and_of_nothing() -> None:
    points, axis = _normals(20).float(), torch.tensor([1.0, -2.0, 0.5])
    plane = numerical_normals(points, lambda p: torch.exp(p @ axis), 0.01)
    assert torch.allclose(plane, (-axis / axis.norm()).expand(20, 3), atol=1e-4)
    ball = numerical_normals(points, lambda p: torch.exp(-p.square().sum(-1)), torch.linspace(0.01, 0.1, 20))
    assert torch.allclose(ball, points / points.norm(dim=1, keepdim=True), atol=1e-3)
    assert numerical_normals(points, lambda p: torch.full((len(p),), 3.0), 0.01).abs().max() == 0
    assert numerical_normals(points, lambda p: torch.zeros(len(p)), 0.01).abs().max() == 0


def test_numerical_normals_ask_once_at_four_corners() -> None:
    points, steps, asked = _normals(5), torch.linspace(0.1, 0.5, 5, dtype=torch.float64), []

    def density(positions: torch.Tensor) -> torch.Tensor:
        asked.append(positions)
        return positions.square().sum(-1)

    numerical_normals(points, density, steps)
    assert len(asked) == 1 and asked[0].shape == (20, 3)
    offsets = asked[0].reshape(4, 5, 3) - points
    assert torch.allclose(offsets.abs(), steps[:, None].expand(4, 5, 3))
    assert torch.allclose(offsets.sum(dim=0), torch.zeros(5, 3, dtype=torch.float64), atol=1e-12)


def test_numerical_normals_can_be_trained() -> None:
    points, goal = _normals(5), torch.nn.functional.normalize(_normals(5, 1), dim=-1)
    strength = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def loss(strength: torch.Tensor) -> torch.Tensor:
        def density(p: torch.Tensor) -> torch.Tensor:
            return torch.exp(p @ strength[:3] + strength[3] * torch.sin(p).prod(dim=-1))

        return normal_consistency(numerical_normals(points, density, 0.1), goal, torch.ones(5, dtype=torch.float64))

    assert torch.autograd.gradcheck(loss, strength)


def test_numerical_normals_of_an_octree_field() -> None:
    """They are the analytic ones but at kinks of the interpolation, and their gradient reaches grids and decoders."""
    field = tiny_field()
    points, _ = tiny_samples(field.octree, 200)
    normals = numerical_normals(points, field.density_at, 1e-3)
    cosine = (normals * field.normals(points, None)).sum(-1)
    assert cosine.median() > 0.999
    normal_consistency(normals, torch.ones_like(normals), torch.ones(200)).backward()
    for banks in (field.grids, field.decoders):
        for bank in banks:
            assert bank.grad is not None and bank.grad.isfinite().all() and bool(bank.grad.any())
