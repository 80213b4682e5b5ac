"""What stands between the decoders: the numba forms against the torch ones in float64."""

from __future__ import annotations

import math

import numba
import pytest
import torch
from torch import Tensor

from infnerf_ns.kernels.shading import activate, color_inputs, visible

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a loss in which every output counts with a weight of its own."""
    loss = sum((torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape) * x).sum() for x in outputs)
    return list(torch.autograd.grad(loss, inputs))


@every_threads
def test_activations_are_the_reference(threads: int) -> None:
    numba.set_num_threads(threads)
    hidden = 3 * _random(500, 16)
    hidden[0], hidden[1, 0], hidden[2, 0] = -100.0, 25.0, -30.0
    results = []
    for dtype in (torch.float32, torch.float64):
        x = hidden.to(dtype).requires_grad_()
        outputs = list(activate(x, 0.5))
        results.append([*outputs, *_gradients(outputs, [x])])
    for name, fast, reference in zip(("density", "geometry", "gradient"), *results):
        assert torch.allclose(fast, reference.float(), rtol=2e-5, atol=1e-6), name


def test_activations_keep_what_is_not_finite() -> None:
    density, geo = activate(torch.tensor([[math.nan, 0.0], [math.inf, math.inf], [0.0, math.nan]]), 1.0)
    assert density.isnan().tolist() == [True, False, False] and geo[:, 0].isnan().tolist() == [False, False, True]
    assert density[1] == geo[1, 0] == math.inf


def test_visible_samples_are_the_reference() -> None:
    weights = torch.rand(400, 9, generator=torch.Generator().manual_seed(0)) ** 8
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    weights[::5] = 0
    order = torch.randperm(3600, generator=torch.Generator().manual_seed(1))
    order = torch.cat([order, order[:500]]).sort().values  # some samples twice, as where levels blend
    fast, reference = visible(weights, order, 1e-3), visible(weights.double(), order, 1e-3)
    assert torch.equal(fast, reference) and 0 < len(fast) < len(order)
    kept = set(order[fast].tolist())
    assert {9 * ray + 8 for ray in range(0, 400, 5)} <= kept, "the background of rays that meet nothing"
    assert {index for index in range(3600) if weights.reshape(-1)[index] > 1e-3} <= kept


@pytest.mark.parametrize("with_appearance", [True, False])
@every_threads
def test_color_inputs_are_the_reference(threads: int, with_appearance: bool) -> None:
    numba.set_num_threads(threads)
    kept = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200].sort().values
    ray = torch.randint(40, (200,), generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        geo, appearance = _random(300, 15).to(dtype).requires_grad_(), _random(40, 8, seed=1).to(dtype).requires_grad_()
        code = _random(40, 16, seed=2).to(dtype)
        inputs = [geo, appearance] if with_appearance else [geo]
        out = color_inputs(geo, code, appearance if with_appearance else None, kept, ray)
        assert out.shape == (200, 15 + 16 + 8 * with_appearance)
        results.append([out, *_gradients([out], inputs)])
    for fast, reference in zip(*results):
        assert torch.allclose(fast, reference.float(), rtol=1e-5, atol=1e-5)


def test_a_code_that_wants_a_gradient_gets_it() -> None:
    """Pose refinement differentiates the directions."""
    code = torch.ones(4, 16, requires_grad=True)
    out = color_inputs(torch.ones(5, 3), code, None, torch.tensor([0, 4]), torch.tensor([1, 3]))
    (gradient,) = torch.autograd.grad(out.sum(), code)
    assert gradient.sum(1).tolist() == [0, 16, 0, 16]
