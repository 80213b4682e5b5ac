"""What happens when a step's loss or gradient is NaN or infinite: skip, count, and after several in a row go back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from infnerf_ns.kernels import bank_gradient
from infnerf_ns.validation import Range

LARGEST_CHECKED_BANK = 1 << 20
"""Gradients of banks with more elements are not looked at before the step, which touches few of their rows: NodeAdam
leaves out what is not finite among the entries that it visits."""


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


def groups_not_finite(groups: Mapping[str, Iterable[Tensor]]) -> list[str]:
    """Names of the groups of parameters with a gradient that is not finite; synchronises once. Banks whose gradient is
    written in place count up to `LARGEST_CHECKED_BANK`."""
    sums = [
        (name, parameter.grad.sum(dtype=torch.float32))
        for name, parameters in groups.items()
        for parameter in parameters
        if parameter.grad is not None
        and (parameter.grad.numel() <= LARGEST_CHECKED_BANK or bank_gradient(parameter) is None)
    ]
    if not sums:
        return []
    finite = torch.isfinite(torch.stack([total for _, total in sums])).tolist()
    return sorted({name for (name, _), good in zip(sums, finite) if not good})


def values_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all elements of all floating tensors are finite, large ones included; reads every element once."""
    return all(
        bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors if tensor.is_floating_point()
    )
