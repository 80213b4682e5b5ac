"""What happens when a step's loss or gradient is NaN or infinite: skip, count, and after several in a row go back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from infnerf_ns.validation import Range

LARGEST_CHECKED_GRADIENT = 1 << 20
"""Gradients with more elements are not looked at: those are large banks, of which a step touches few rows. A NaN that
reaches one is found when the next checkpoint is due, which reads every parameter."""


@dataclass
class StabilityConfig:
    """How NaN and infinity are met."""

    max_bad_steps: Annotated[int, Range(1, 1000)] = 5
    """So many skipped steps in a row restore the last good checkpoint of the run."""
    lr_factor: Annotated[float, Range(0.01, 1.0)] = 0.5
    """After each restore, all learning rates are multiplied by this."""
    max_restores: Annotated[int, Range(0, 100)] = 3
    """So many restores are tried before training gives up with an error."""


class StepGuard:
    """Counts bad steps of one run."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.skipped = 0
        self.in_a_row = 0
        self.restores = 0

    def record(self, good: bool) -> bool:
        """Note one step; returns True if the last good checkpoint has to be restored now."""
        if good:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row < self.config.max_bad_steps:
            return False
        self.in_a_row = 0
        self.restores += 1
        return True


def gradients_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether the gradients of all parameters up to `LARGEST_CHECKED_GRADIENT` are finite; synchronises once."""
    sums = [
        parameter.grad.sum(dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None and parameter.grad.numel() <= LARGEST_CHECKED_GRADIENT
    ]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def values_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements of all floating tensors are finite, large ones included; reads every element once."""
    return all(
        bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors if tensor.is_floating_point()
    )
