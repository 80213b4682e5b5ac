"""Schedules and dynamic balancing of loss weights: values by hand, smoothness, and what must not change them."""

from __future__ import annotations

import statistics
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infnerf_ns.losses.balancing import LEAST, MOST, LossBalance
from infnerf_ns.losses.schedules import ScheduleName, ScheduleShape, schedule_factor
from infnerf_ns.validation import validate_config

names = st.sampled_from(get_args(ScheduleName))
shares = st.floats(0, 1)
shapes = st.builds(
    ScheduleShape,
    warm_up=st.floats(0.001, 1),
    late_start=st.floats(0, 0.99),
    late_ramp=st.floats(0.001, 1),
    peak=st.floats(0.01, 0.99),
    floor=shares,
)


@given(names, st.floats(-1, 2), shapes)
def test_factors_are_shares(name: ScheduleName, progress: float, shape: ScheduleShape) -> None:
    assert validate_config(shape).problems == []
    assert 0 <= schedule_factor(name, progress, shape) <= 1
    assert schedule_factor("constant", progress, shape) == 1


@given(names, shares, shares, shapes)
def test_no_jump_and_no_kink(name: ScheduleName, start: float, step: float, shape: ScheduleShape) -> None:
    """A smoothstep over the width w has a slope of at most 1.5 / w, which changes by at most 6 / w**2 per unit."""
    narrowest = min(shape.warm_up, shape.late_ramp, 1 - shape.late_start, shape.peak, 1 - shape.peak)
    here, there = (schedule_factor(name, progress, shape) for progress in (start, start + step))
    assert abs(there - here) <= 1.5 / narrowest * step + 1e-12
    small = 0.01 * narrowest
    before, middle, after = (schedule_factor(name, start + by, shape) for by in (-small, 0, small))
    inside = small <= start <= 1 - small  # elsewhere the progress is cut off
    assert not inside or abs(after - 2 * middle + before) <= 6 / narrowest**2 * small**2 + 1e-12


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1, 0.3: 1, 1: 1}),
        ("warm_up", {0: 0, 0.05: 0.15625, 0.1: 0.5, 0.2: 1, 0.7: 1, 1: 1}),
        ("late_start", {0: 0, 0.6: 0, 0.7: 0.5, 0.75: 0.84375, 0.8: 1, 1: 1}),
        ("peak_decay", {0: 0, 0.2: 0.5, 0.4: 1, 0.7: 0.625, 1: 0.25, 1.5: 0.25}),
    ],
)
def test_curves_by_hand(name: ScheduleName, expected: dict[float, float]) -> None:
    """s(1/4) = 10/64, s(1/2) = 1/2, s(3/4) = 54/64."""
    shape = ScheduleShape(warm_up=0.2, late_start=0.6, late_ramp=0.2, peak=0.4, floor=0.25)
    for progress, factor in expected.items():
        assert schedule_factor(name, progress, shape) == pytest.approx(factor), progress


@given(shapes)
def test_curves_reach_their_ends(shape: ScheduleShape) -> None:
    ends = {"warm_up": (0, 1), "late_start": (0, 1), "peak_decay": (0, shape.floor)}
    for name, (first, last) in ends.items():
        assert schedule_factor(name, 0, shape) == first
        assert schedule_factor(name, 1, shape) == pytest.approx(last)
    assert schedule_factor("peak_decay", shape.peak, shape) == 1


def test_a_late_start_without_room_for_its_ramp_is_shortened() -> None:
    shape = ScheduleShape(late_start=0.9, late_ramp=0.5)
    assert schedule_factor("late_start", 0.95, shape) == pytest.approx(0.5)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="no schedule is called 'sometimes'"):
        schedule_factor("sometimes", 0.5, ScheduleShape())  # type: ignore[arg-type]


# -- dynamic balancing


def _observed(balance: LossBalance, **sequences: list[float | None]) -> dict[str, float]:
    """Factors after sequences of equal length; None where a loss is absent."""
    for step in zip(*sequences.values()):
        balance.observe({name: torch.tensor(value) for name, value in zip(sequences, step) if value is not None})
    return {name: factor.item() for name, factor in balance.factors().items()}


def _noise(seed: int, spread: float, count: int = 100) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + spread * (torch.rand(count, generator=generator) - 0.5)).tolist()


def _by_hand(values: list[float]) -> float:
    """Coefficient of variation of the ratios to the mean of what came before."""
    ratios = [1.0] + [values[i] / statistics.mean(values[:i]) for i in range(1, len(values))]
    return statistics.pstdev(ratios) / statistics.mean(ratios)


def test_two_losses_by_hand() -> None:
    """Ratios 1, 2 (mean 3/2, deviation 1/2: 1/3) and 1, 1/2 (3/4, 1/4: 1/3): rising and falling count the same."""
    balance = LossBalance(["a", "b"], ready_after=2)
    assert _observed(balance, a=[1.0, 2.0], b=[4.0, 2.0]) == pytest.approx({"a": 1, "b": 1})
    assert balance.loss_mean.tolist() == pytest.approx([1.5, 3])
    assert balance.ratio_mean.tolist() == pytest.approx([1.5, 0.75])
    assert balance.ratio_variance.tolist() == pytest.approx([0.25, 0.0625])


def test_the_first_window_is_the_papers_formula() -> None:
    a, b = _noise(1, 1.0, 40), _noise(2, 0.2, 40)
    factors = _observed(LossBalance(["a", "b"], window=40), a=a, b=b)
    share = _by_hand(a) / (_by_hand(a) + _by_hand(b))
    expected = {"a": LEAST + (1 - LEAST) * 2 * share, "b": LEAST + (1 - LEAST) * 2 * (1 - share)}
    assert factors == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1000.0, 1e-6])
def test_the_scale_of_a_loss_does_not_matter(scale: float) -> None:
    a, b = _noise(1, 1.0), _noise(2, 0.2)
    factors = _observed(LossBalance(["a", "b"], window=20), a=a, b=b)
    scaled = _observed(LossBalance(["a", "b"], window=20), a=[scale * each for each in a], b=b)
    assert scaled == pytest.approx(factors, rel=1e-4)


def test_a_constant_loss_gets_the_least() -> None:
    factors = _observed(LossBalance(["still", "lively"]), still=[0.1] * 100, lively=_noise(3, 0.5))
    assert factors["still"] == pytest.approx(LEAST)
    assert factors["lively"] == pytest.approx(2 - LEAST)
    assert _observed(LossBalance(["x", "y"]), x=[0.1] * 50, y=[7.0] * 50) == {"x": 1, "y": 1}, "nothing to compare"


def test_only_what_is_recent_counts() -> None:
    calmed = _noise(4, 1.5, 100) + [1.0] * 400
    woken = [1.0] * 300 + _noise(5, 0.5, 200)
    factors = _observed(LossBalance(["calmed", "woken"], window=50), calmed=calmed, woken=woken)
    assert factors["calmed"] < 0.3 and factors["woken"] > 1.7


@given(st.lists(st.floats(0, 1.9), min_size=1, max_size=14), st.integers(0, 2**31))
def test_factors_have_mean_one_within_their_limits(spreads: list[float], seed: int) -> None:
    sequences = {f"loss {i}": _noise(seed + i, spread, 20) for i, spread in enumerate(spreads)}
    factors = list(_observed(LossBalance(list(sequences)), **sequences).values())
    assert all(LEAST - 1e-6 <= factor <= MOST for factor in factors)
    cut = max(factors) == MOST
    assert statistics.mean(factors) == pytest.approx(1, rel=1e-4) or (cut and statistics.mean(factors) < 1)


def test_no_factor_is_above_the_limit() -> None:
    sequences = {f"still {i}": [1.0] * 20 for i in range(15)}
    assert _observed(LossBalance([*sequences, "lively"]), **sequences, lively=_noise(6, 1.0, 20))["lively"] == MOST


def test_absent_losses_stay_as_they_were() -> None:
    """A loss of every fourth step has the factor that it would have if it were there in every step."""
    a, b = _noise(7, 1.0, 80), _noise(8, 0.4, 20)
    balance = LossBalance(["a", "b", "never"])
    rare = _observed(balance, a=a, b=[value for each in b for value in (each, None, None, None)])
    assert balance.count.tolist() == [80, 20, 0]
    both = LossBalance(["a", "b"])
    for value in a:
        both.observe({"a": torch.tensor(value)})
    for value in b:
        both.observe({"b": torch.tensor(value)})
    assert rare == pytest.approx({**{k: v.item() for k, v in both.factors().items()}, "never": 1})
    assert rare["a"] + rare["b"] == pytest.approx(2)
    balance.observe({})
    assert balance.count.tolist() == [80, 20, 0]


def test_a_factor_is_one_until_its_loss_was_seen_often_enough() -> None:
    a, b = _noise(9, 1.0, 16), [None] + _noise(10, 0.1, 15)
    balance = LossBalance(["a", "b"], ready_after=16)
    assert _observed(balance, a=a, b=b) == {"a": pytest.approx(1), "b": 1}
    balance.observe({"b": torch.tensor(1.0)})
    factors = balance.factors()
    assert factors["a"] > 1.5 and factors["b"] < 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_ignored(bad: float) -> None:
    a, b = _noise(11, 1.0), _noise(12, 0.2)
    factors = _observed(LossBalance(["a", "b"]), a=a, b=b)
    disturbed = LossBalance(["a", "b"])
    with_bad = {"a": [bad, *a[:50], bad, *a[50:], bad], "b": [None, *b[:50], None, *b[50:], None]}
    assert _observed(disturbed, **with_bad) == factors
    assert all(torch.isfinite(buffer).all() for buffer in disturbed.buffers())


def test_a_loss_that_has_become_zero_is_satisfied() -> None:
    a, b = _noise(17, 0.5, 30) + [0.0] * 400, _noise(18, 0.5, 430)
    assert _observed(LossBalance(["a", "b"], window=20), a=a, b=b)["a"] == pytest.approx(LEAST, abs=0.01)


def test_zeros_and_spikes_do_no_harm() -> None:
    balance = LossBalance(["a", "b"], window=20)
    assert _observed(balance, a=[0.0] * 20 + _noise(13, 0.2, 80), b=_noise(14, 0.2))["a"] == pytest.approx(1, abs=0.5)
    balance.observe({"a": torch.tensor(1e38)})
    assert _observed(balance, a=_noise(13, 0.2), b=_noise(14, 0.2))["a"] == pytest.approx(1, abs=0.5)


def test_a_resumed_run_goes_on_exactly() -> None:
    a, b = _noise(15, 1.0), _noise(16, 0.3)
    whole = _observed(LossBalance(["a", "b"], window=30), a=a, b=b)
    first, second = LossBalance(["a", "b"], window=30), LossBalance(["a", "b"], window=30)
    _observed(first, a=a[:40], b=b[:40])
    second.load_state_dict(first.state_dict())
    assert _observed(second, a=a[40:], b=b[40:]) == whole


def test_gradients_and_half_precision_are_left_outside() -> None:
    balance = LossBalance(["a"], ready_after=1)
    balance.observe({"a": torch.ones((), dtype=torch.bfloat16, requires_grad=True)})
    assert not any(buffer.requires_grad for buffer in balance.buffers())
    assert balance.factors()["a"].dtype == torch.float32


def test_a_name_that_was_not_announced() -> None:
    with pytest.raises(KeyError, match="not among the balanced losses: typo"):
        LossBalance(["a"]).observe({"typo": torch.tensor(1.0)})
