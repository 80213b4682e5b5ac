"""Depth supervision: by hand, what is invalid leaves no trace, and what is free is free."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infnerf_ns.losses.depth import log_gradient, scale_invariant_log

LOSSES = [scale_invariant_log, log_gradient]
seeds = st.integers(0, 2**31)


def _depths(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.5 + 3 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _all(depths: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(depths, dtype=torch.bool)


def test_scale_invariant_log_by_hand() -> None:
    target = _depths(2, 4, 4)
    factor = target * math.exp(0.3)
    for focus in (0.0, 0.5, 0.85):
        loss = scale_invariant_log(factor, target, _all(target), focus)
        assert loss.item() == pytest.approx(0.09 * (1 - focus))
    assert scale_invariant_log(factor, target, _all(target)).item() == pytest.approx(0.045), "Eigen's one half"
    apart = target * torch.exp(torch.tensor([[0.2, -0.2, 0.2, -0.2]], dtype=torch.float64))
    assert scale_invariant_log(apart, target, _all(target)).item() == pytest.approx(0.04)


def test_scale_invariant_log_is_per_patch() -> None:
    """Opposite factors on two patches would have no mean together."""
    target = _depths(2, 3, 3)
    predicted = target * torch.tensor([math.exp(0.2), math.exp(-0.2)]).reshape(2, 1, 1)
    assert scale_invariant_log(predicted, target, _all(target), 1.0).item() == pytest.approx(0, abs=1e-12)
    predicted[1] = target[1] * math.exp(0.4)
    expected = 0.5 * (0.04 + 0.16) / 2
    assert scale_invariant_log(predicted, target, _all(target)).item() == pytest.approx(expected)
    valid = _all(target)
    valid[0] = False
    assert scale_invariant_log(predicted, target, valid).item() == pytest.approx(0.5 * 0.16), "an empty patch is none"


def test_scale_invariant_log_of_single_rays() -> None:
    predicted, target = _depths(12), _depths(12, seed=1)
    difference = (predicted / target).log()
    expected = difference.square().mean() - 0.5 * difference.mean() ** 2
    rays = [each.reshape(1, 1, -1) for each in (predicted, target)]
    assert scale_invariant_log(*rays, _all(rays[0])).item() == pytest.approx(expected.item())


def test_log_gradient_by_hand() -> None:
    target = _depths(2, 8, 8)
    y, x = torch.meshgrid(*[torch.arange(8, dtype=torch.float64)] * 2, indexing="ij")
    predicted = target * torch.exp(0.1 * x - 0.2 * y)
    for scales, expected in ((1, 0.3), (2, 0.3 + 0.6), (3, 0.3 + 0.6 + 1.2), (6, 0.3 + 0.6 + 1.2)):
        assert log_gradient(predicted, target, _all(target), scales).item() == pytest.approx(expected)


def test_log_gradient_needs_both_neighbours() -> None:
    target = torch.ones(1, 3, 3)
    predicted, valid = target.clone(), _all(target)
    predicted[0, 1, 1] = math.e
    assert log_gradient(predicted, target, valid, 1).item() == pytest.approx(2 / 6 + 2 / 6), "2 of 6 pairs each way"
    valid[0, 1, 1] = False
    assert log_gradient(predicted, target, valid, 1).item() == 0, "its neighbours are no neighbours of each other"
    valid[0, 1, 1], valid[0, 1, 0] = True, False
    assert log_gradient(predicted, target, valid, 1).item() == pytest.approx(1 / 5 + 2 / 4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_invalid_depth_of_the_data_leaves_no_trace(loss, wrong: float) -> None:
    predicted, target, valid = _depths(2, 5, 5), _depths(2, 5, 5, seed=1), torch.rand(2, 5, 5) > 0.2
    hidden = torch.rand(2, 5, 5) < 0.3
    predicted[0, 0, 0], hidden[0, 0, 0], valid[0, 0, 0] = 50.0, True, True
    results = []
    for used, mask in ((target, valid & ~hidden), (torch.where(hidden, wrong, target), valid)):
        leaf = predicted.clone().requires_grad_()
        value = loss(leaf, used, mask)
        results.append((value.item(), *torch.autograd.grad(value, leaf)))
    assert results[0][0] == results[1][0] > 0
    assert torch.equal(results[0][1], results[1][1])
    assert bool((results[1][1][hidden | ~valid] == 0).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_predicted_depths_of_empty_rays_and_of_broken_ones(loss) -> None:
    predicted, target = _depths(1, 4, 4), _depths(1, 4, 4, seed=1)
    predicted[0, 0] = 0
    predicted.requires_grad_()
    value = loss(predicted, target, _all(target))
    (gradient,) = torch.autograd.grad(value, predicted)
    assert value > 0 and gradient.isfinite().all() and bool((gradient[0, 0] == 0).all())
    broken = predicted.detach().clone()
    broken[0, 2, 2] = math.nan
    assert loss(broken, target, _all(target)).isnan(), "a broken field must not go unseen"
    valid = _all(target)
    valid[0, 2, 2] = False
    assert loss(broken, target, valid).isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_valid(loss) -> None:
    predicted, target = _depths(2, 3, 3).requires_grad_(), _depths(2, 3, 3)
    value = loss(predicted, target, torch.zeros_like(target, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and bool((predicted.grad == 0).all())
    assert loss(predicted, torch.zeros_like(target), _all(target)).item() == 0


@given(seeds, st.floats(0.01, 100))
@settings(max_examples=25)
def test_a_common_factor_is_free(seed: int, factor: float) -> None:
    predicted, target = _depths(2, 6, 6, seed=seed), _depths(2, 6, 6, seed=seed + 1)
    for loss in (log_gradient, lambda *args: scale_invariant_log(*args, 1.0)):
        expected = loss(predicted, target, _all(target)).item()
        assert loss(factor * predicted, target, _all(target)).item() == pytest.approx(expected, rel=1e-9)
        assert loss(factor * target, target, _all(target)).item() == pytest.approx(0, abs=1e-12)


@given(seeds)
@settings(max_examples=25)
def test_scale_invariant_log_is_not_negative(seed: int) -> None:
    predicted, target = _depths(3, 4, 4, seed=seed), _depths(3, 4, 4, seed=seed + 1)
    valid = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed)) < 0.4
    values = [scale_invariant_log(predicted, target, valid, focus).item() for focus in (0.0, 0.5, 1.0)]
    assert values[0] >= values[1] >= values[2] >= -1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_depth_gradcheck(loss) -> None:
    predicted, target, valid = _depths(2, 5, 6), _depths(2, 5, 6, seed=1), torch.rand(2, 5, 6) > 0.2
    assert torch.autograd.gradcheck(lambda p: loss(p, target, valid), predicted.requires_grad_())
