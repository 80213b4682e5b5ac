"""Schedules of loss weights over a training, as smooth curves with names that a YAML preset can say.

All are made of the smoothstep ``s(x) = x**2 * (3 - 2 * x)``, x clamped to 0..1, whose slope is 0 at both ends and at
most 3/2: a weight never jumps, and neither does its slope, which Adam's moments would take for news of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from infnerf_ns.validation import Range

ScheduleName = Literal["constant", "warm_up", "late_start", "peak_decay"]


@dataclass
class ScheduleShape:
    """Where the curves bend, as shares of the training."""

    warm_up: Annotated[float, Range(0.001, 1.0)] = 0.1
    """`warm_up` rises from 0 to 1 over this share of the training."""
    late_start: Annotated[float, Range(0.0, 0.99)] = 0.5
    """`late_start` is 0 up to here."""
    late_ramp: Annotated[float, Range(0.001, 1.0)] = 0.1
    """`late_start` then rises to 1 over this share of the training, or over what is left of it."""
    peak: Annotated[float, Range(0.01, 0.99)] = 0.3
    """`peak_decay` rises from 0 to 1 up to here."""
    floor: Annotated[float, Range(0.0, 1.0)] = 0.1
    """`peak_decay` then falls to this at the end of the training."""


def schedule_factor(name: ScheduleName, progress: float, shape: ScheduleShape) -> float:
    """The factor, in 0..1, of a weight at a point of the training::

        constant    1
        warm_up     s(p / warm_up)
        late_start  s((p - late_start) / min(late_ramp, 1 - late_start))
        peak_decay  s(p / peak)                                         up to the peak, then
                    1 - (1 - floor) * s((p - peak) / (1 - peak))

    Args:
        name: of the curve.
        progress: p, the step over the number of steps; values outside 0..1 count as the nearer end.
        shape: where it bends.

    Raises:
        ValueError: there is no curve of that name.
    """
    progress = min(max(progress, 0.0), 1.0)
    if name == "constant":
        return 1.0
    if name == "warm_up":
        return _smoothstep(progress / shape.warm_up)
    if name == "late_start":
        return _smoothstep((progress - shape.late_start) / min(shape.late_ramp, 1 - shape.late_start))
    if name == "peak_decay":
        if progress < shape.peak:
            return _smoothstep(progress / shape.peak)
        return 1 - (1 - shape.floor) * _smoothstep((progress - shape.peak) / (1 - shape.peak))
    raise ValueError(f"no schedule is called {name!r}")


def _smoothstep(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)
