"""Sparsity: by hand, and the same at every scale of the scene."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infnerf_ns.losses.ray import sparsity


def test_sparsity_by_hand() -> None:
    density, gsd = torch.tensor([0.0, 3.0, 10.0]), torch.tensor([5.0, 0.5, 0.1])
    expected = (math.log(1 + 2 * 1.5**2) + math.log(1 + 2 * 1.0**2)) / 3
    assert sparsity(density, gsd).item() == pytest.approx(expected, rel=1e-6)
    assert sparsity(torch.tensor([4.0]), 0.5).item() == pytest.approx(math.log(9), rel=1e-6)
    assert sparsity(torch.zeros(4), torch.rand(4)).item() == 0


@given(st.floats(1e-3, 1e3))
def test_sparsity_does_not_depend_on_the_scale_of_the_scene(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    density, gsd = (torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = sparsity(density, gsd).item()
    assert sparsity(density / scale, gsd * scale).item() == pytest.approx(expected, rel=1e-9)
    assert sparsity(density * 2, gsd).item() > expected


def test_sparsity_gradcheck() -> None:
    density, gsd = (torch.rand(7, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda d: sparsity(d, gsd), density.requires_grad_())
