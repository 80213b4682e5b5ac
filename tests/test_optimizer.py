"""NodeAdam: torch's Adam where everything is touched, and nothing at all where nothing is."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from node_adam_cases import MOMENTS, PAGE, ROWS, adam_bank, adam_gradients, dense_step, give
from torch.nn import Parameter

from infnerf_ns.kernels import (
    Groups,
    HashLayout,
    bank_gradient,
    enable_bank_gradient,
    grouped_mlp,
    hash_encode,
    mlp_page_size,
)
from infnerf_ns.training.optimizer import NodeAdam, NodeAdamOptimizerConfig


@pytest.mark.parametrize("path", ["touched", "dense"])
@pytest.mark.parametrize(
    "config", [{}, {"betas": (0.8, 0.95), "eps": 1e-2}], ids=["defaults", "other betas, large eps"]
)
def test_where_everything_is_touched_it_is_adam(path: str, config: dict) -> None:
    bank = adam_bank()
    reference = Parameter(bank.detach().clone())
    optimizer = NodeAdam([bank], lr=0.03, **config)
    adam = torch.optim.Adam([reference], lr=0.03, **{"betas": (0.9, 0.99), "eps": 1e-15, **config})
    for gradient in adam_gradients(0, 8):
        reference.grad = gradient.clone()
        adam.step()
        if path == "dense":
            dense_step(bank, optimizer, gradient)
        else:
            give(bank, gradient)
            optimizer.step()
        assert torch.allclose(bank, reference, rtol=1e-5, atol=1e-6)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(optimizer.state[bank][moment], adam.state[reference][moment], rtol=1e-5, atol=1e-7)


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_the_dense_path_gives_the_same(seed: int) -> None:
    touched, dense = adam_bank(), adam_bank()
    first, second = NodeAdam([touched], lr=0.03), NodeAdam([dense], lr=0.03)
    for gradient in adam_gradients(seed, 6, density=0.2):
        give(touched, gradient)
        first.step()
        dense_step(dense, second, gradient)
    assert torch.allclose(touched, dense, rtol=1e-5, atol=1e-6)
    for moment in MOMENTS:
        assert torch.allclose(first.state[touched][moment], second.state[dense][moment], rtol=1e-5, atol=1e-7), moment


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_untouched_entries_stay_bit_for_bit(seed: int) -> None:
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    give(bank, adam_gradients(seed, 1)[0])
    optimizer.step()
    for gradient in adam_gradients(seed + 1, 3, density=0.2):
        values = {"bank": bank.detach().clone(), **{name: optimizer.state[bank][name].clone() for name in MOMENTS}}
        give(bank, gradient)
        optimizer.step()
        now = {"bank": bank.detach(), **optimizer.state[bank]}
        still, rows = gradient == 0, ~gradient.any(dim=1)
        for name in ("bank", "exp_avg", "exp_avg_sq"):
            assert torch.equal(now[name][still], values[name][still]), name
            assert bool((now[name][~still] != values[name][~still]).all()), name
        assert torch.equal(now["row_steps"] - values["row_steps"], (~rows).long())


def test_a_step_clears_what_it_used() -> None:
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    give(bank, adam_gradients(0, 1)[0])
    optimizer.step()
    held = bank_gradient(bank)
    assert not bool(held.grad.any()) and not bool(held.touched.any()) and not bool(held.rows.any())
    before = bank.detach().clone()
    optimizer.step()
    assert torch.equal(bank, before) and optimizer.state[bank]["row_steps"].tolist() == [1] * ROWS


def test_a_late_node_starts_like_a_new_one() -> None:
    """Bias correction counts a node's own steps: its first one has the size of the learning rate, whenever it comes."""
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    early = torch.zeros(ROWS, PAGE)
    early[:2] = 1.0
    for _ in range(50):
        give(bank, early)
        optimizer.step()
    before, late = bank.detach().clone(), torch.zeros(ROWS, PAGE)
    late[3] = torch.linspace(-4, 5, PAGE)
    give(bank, late)
    optimizer.step()
    assert torch.allclose(bank[3] - before[3], -0.03 * late[3].sign(), atol=1e-6)
    assert optimizer.state[bank]["row_steps"].tolist() == [50, 50, 0, 1, 0]


@pytest.mark.parametrize("path", ["touched", "dense"])
def test_a_node_warms_up_by_its_own_steps(path: str) -> None:
    """With a constant gradient every step of Adam has the size of the learning rate, here 1/4, 2/4, 3/4, 1, 1 of it."""
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.04, warmup=4)
    for step in range(7):
        gradient = torch.zeros(ROWS, PAGE)
        gradient[0] = 1.0
        gradient[1] = -1.0 if step >= 2 else 0.0
        before = bank.detach().clone()
        if path == "dense":
            dense_step(bank, optimizer, gradient)
        else:
            give(bank, gradient)
            optimizer.step()
        for row, steps, sign in ((0, step + 1, -1), (1, step - 1, 1)):
            expected = sign * 0.01 * min(max(steps, 0), 4)
            assert torch.allclose(bank[row] - before[row], torch.full((PAGE,), expected), atol=1e-6), (step, row)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forgets_a_backward_pass(set_to_none: bool) -> None:
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    before = bank.detach().clone()
    give(bank, adam_gradients(0, 1, density=0.3)[0])
    optimizer.zero_grad(set_to_none=set_to_none)
    held = bank_gradient(bank)
    assert not bool(held.grad.any()) and not bool(held.touched.any()) and not bool(held.rows.any())
    optimizer.step()
    assert torch.equal(bank, before)


def test_a_loaded_state_continues_bit_for_bit() -> None:
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    for gradient in adam_gradients(0, 4, density=0.4):
        give(bank, gradient)
        optimizer.step()
    twin = Parameter(bank.detach().clone())
    enable_bank_gradient(twin)
    resumed = NodeAdam([twin], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.03
    assert resumed.state[twin]["row_steps"].dtype == torch.int64, "torch casts a state to the Parameter's type"
    for gradient in adam_gradients(1, 4, density=0.4):
        for parameter, steps in ((bank, optimizer), (twin, resumed)):
            give(parameter, gradient)
            steps.step()
    assert torch.equal(bank, twin)
    for moment in MOMENTS:
        assert torch.equal(optimizer.state[bank][moment], resumed.state[twin][moment]), moment


def test_a_bank_that_grows_keeps_training() -> None:
    bank = adam_bank()
    optimizer = NodeAdam([bank], lr=0.03)
    for gradient in adam_gradients(0, 3):
        give(bank, gradient)
        optimizer.step()
    bank.data = torch.cat([bank.data, torch.zeros(2, PAGE)])
    optimizer.zero_grad()
    optimizer.step()  # nothing touched yet
    before = bank.detach().clone()
    give(bank, torch.ones(ROWS + 2, PAGE))
    optimizer.step()
    assert bank_gradient(bank).grad.shape == optimizer.state[bank]["exp_avg"].shape == (ROWS + 2, PAGE)
    assert bool((bank < before).all())
    assert torch.allclose(bank[ROWS:], torch.full((2, PAGE), -0.03)), "the first step of the new nodes"


def test_empty_and_unused_banks_are_left_alone() -> None:
    empty, unused = Parameter(torch.empty(0, PAGE)), adam_bank()
    before = unused.detach().clone()
    optimizer = NodeAdam([empty, unused], lr=0.03)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(unused, before) and len(empty) == 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_step_after_the_kernels_is_a_step_of_adam(backend: str) -> None:
    """From the kernels' backward pass to the parameters, for both kinds of gradient that they leave."""
    layout, widths = HashLayout(2, 4, 8, 9, 2), (4, 8, 3)
    generator = torch.Generator().manual_seed(0)
    positions, rows = torch.rand(60, 3, generator=generator), torch.arange(60) // 30
    zeros = torch.zeros(2, dtype=torch.long)
    groups = Groups(torch.tensor([0, 30, 60]), zeros, torch.tensor([0, 1]), zeros + widths[0])
    results = []
    for ours in (True, False):
        generator.manual_seed(3)
        grids = Parameter(torch.randn(3, layout.page_size, generator=generator))
        weights = Parameter(torch.randn(3, mlp_page_size(widths), generator=generator))
        if ours and backend == "numba":
            enable_bank_gradient(grids)
            enable_bank_gradient(weights)
        banks = [grids, weights]
        optimizer = NodeAdam(banks, lr=0.01) if ours else torch.optim.Adam(banks, lr=0.01, eps=1e-15)
        optimizer.zero_grad()
        features = hash_encode(positions, rows, grids, layout, backend)
        grouped_mlp(features, groups, [weights], 0, widths, backend).square().sum().backward()
        optimizer.step()
        results.append((grids.detach(), weights.detach()))
    for got, expected in zip(*results):
        # In a first step every entry moves by lr * sign; a gradient of a rounding error has a sign of its own.
        assert ((got - expected).abs() > 1e-6).float().mean() < 1e-3
        assert torch.equal(got[2], expected[2]), "the node that no sample saw"


def test_the_configuration_makes_it() -> None:
    bank = adam_bank()
    optimizer = NodeAdamOptimizerConfig(lr=0.02, betas=(0.8, 0.9), eps=1e-8, warmup=7).setup(params=[bank])
    assert isinstance(optimizer, NodeAdam)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in ("lr", "betas", "eps", "warmup")} == {
        **{"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-8, "warmup": 7}
    }


BAD = (float("nan"), float("inf"), -float("inf"), 2.0**60, -1e30)


@pytest.mark.parametrize("path", ["touched", "dense"])
@pytest.mark.parametrize("page", [PAGE, 64], ids=["with a rest", "whole blocks"])
def test_gradients_that_are_not_finite_change_nothing(path: str, page: int) -> None:
    """Regression: a NaN stayed in the bank and in its moments for good."""
    bank, clean = adam_bank(page=page), adam_bank(page=page)
    optimizer, other = NodeAdam([bank], lr=0.03), NodeAdam([clean], lr=0.03)
    for step, gradient in enumerate(adam_gradients(0, 4, page=page)):
        bad = torch.zeros_like(gradient, dtype=torch.bool)
        bad[1, :: page // 5] = step == 2
        poisoned = gradient.clone()
        poisoned[bad] = torch.tensor(BAD).repeat(2)[: int(bad.sum())]
        for each, adam, received in ((bank, optimizer, poisoned), (clean, other, gradient.masked_fill(bad, 0))):
            if path == "dense":
                each.infnerf_in_place_gradient, each.grad = False, received.clone()
                adam.step()
            else:
                give(each, received)
                adam.step()
        assert optimizer.left_out() == int(bad.sum()) and other.left_out() == 0
    assert torch.equal(bank, clean) and bool(torch.isfinite(bank).all())
    for moment in MOMENTS:
        assert torch.equal(optimizer.state[bank][moment], other.state[clean][moment]), moment


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    bank = adam_bank()
    reference = Parameter(bank.detach().clone())
    optimizer = NodeAdam([bank], lr=0.03, eps=1e-2, max_norm=max_norm)
    adam = torch.optim.Adam([reference], lr=0.03, betas=(0.9, 0.99), eps=1e-2)
    for gradient in adam_gradients(0, 5):
        reference.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([reference], max_norm)
        adam.step()
        give(bank, gradient)
        optimizer.step()
        assert torch.allclose(bank, reference, rtol=1e-5, atol=1e-6)


def test_one_nan_does_not_spoil_what_is_clipped_with_it() -> None:
    """Regression: with max_norm one NaN made 2,097,136 of 2,097,152 entries NaN."""
    bank, reference = adam_bank(), adam_bank()
    clipped, expected = (NodeAdam([each], lr=0.03, eps=1e-2, max_norm=0.5) for each in (bank, reference))
    gradient = adam_gradients(0, 1)[0]
    gradient[2, 3] = 0.0
    give(reference, gradient)
    expected.step()
    gradient[2, 3] = float("nan")
    give(bank, gradient)
    clipped.step()
    assert torch.equal(bank, reference) and clipped.left_out() == 1
