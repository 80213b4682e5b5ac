"""Dynamic balancing: factors of loss weights from the recent variation of each loss.

Source: CoV-Weighting (Groenendijk et al. 2021, "Multi-Loss Weighting with Coefficient of Variations"): the weight of a
loss is proportional to the coefficient of variation, standard deviation over mean, of the ratio of its value to its
mean so far. A loss that no longer moves is satisfied, and its scale does not matter. Two changes: mean and deviation
are those of a window instead of the whole training, and no loss is ever switched off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

LEAST, MOST = 1 / 8, 8.0
"""Limits of a factor."""
_LARGEST_RATIO = 10.0
"""No value counts as more than so many times its loss's mean, else a single spike would fill the window; and no mean
ratio as less than the inverse, else a loss that has become 0 would have the largest variation of all."""


class LossBalance(nn.Module):
    """Observes losses and gives a factor for each. All state is in buffers: a resumed run goes on as if never stopped.

    Nothing here reads a value back to the CPU.

    Args:
        names: of the L losses, fixed.
        window: observations of a loss that its mean and deviation look back on: plain averages up to that number, an
            exponential moving average with this time constant from then on. A loss that is computed every 32 steps
            looks back on 32 times as many steps.
        ready_after: observations of a loss before it takes part; its factor is 1 until then. At least 1.
    """

    count: Tensor
    loss_mean: Tensor
    ratio_mean: Tensor
    ratio_variance: Tensor

    def __init__(self, names: Sequence[str], window: int = 200, ready_after: int = 16) -> None:
        super().__init__()
        self.names = tuple(names)
        self.window, self.ready_after = window, ready_after
        self.register_buffer("count", torch.zeros(len(self.names), dtype=torch.long))
        for name in ("loss_mean", "ratio_mean", "ratio_variance"):
            self.register_buffer(name, torch.zeros(len(self.names)))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Float[Tensor, ""]]) -> None:
        """Takes note of one step.

        Args:
            losses: their values without weights, at least 0. Those that are absent, NaN or infinite stay as they were.

        Raises:
            KeyError: a name that was not given at construction.
        """
        if unknown := losses.keys() - set(self.names):
            raise KeyError(f"not among the balanced losses: {', '.join(sorted(unknown))}")
        if not losses:
            return
        absent = self.loss_mean.new_full((), torch.nan)
        values = torch.stack([losses[name].to(absent) if name in losses else absent for name in self.names])
        seen = torch.isfinite(values)
        rate = 1 / (self.count + 1).clamp(max=self.window)
        has_mean = self.loss_mean > 0
        ratio = torch.where(has_mean, (values / self.loss_mean).clamp(max=_LARGEST_RATIO), 1.0)
        mean = torch.where(has_mean, torch.lerp(self.loss_mean, ratio * self.loss_mean, rate), values)
        change = ratio - self.ratio_mean
        # West 1979, "Updating mean and variance estimates": exact for rate 1 / n.
        variance = (1 - rate) * (self.ratio_variance + rate * change.square())
        self.loss_mean.copy_(torch.where(seen, mean, self.loss_mean))
        self.ratio_mean.copy_(torch.where(seen, self.ratio_mean + rate * change, self.ratio_mean))
        self.ratio_variance.copy_(torch.where(seen, variance, self.ratio_variance))
        self.count.add_(seen)

    @torch.no_grad()
    def factors(self) -> dict[str, Float[Tensor, ""]]:
        """A factor in 1/8..8 for the weight of each loss.

        Of n losses that take part, one with the share q of the sum of all coefficients of variation has the factor
        ``1/8 + 7/8 * n * q``: the mean is 1, unless one loss of ten or more has almost the whole sum and is cut at 8.
        """
        ready = self.count >= self.ready_after
        variation = self.ratio_variance.sqrt() / self.ratio_mean.clamp(min=1 / _LARGEST_RATIO)
        variation = torch.where(ready, variation, 0.0)
        total = variation.sum()
        share = (LEAST + (1 - LEAST) * variation * (ready.sum() / total)).clamp(max=MOST)
        return dict(zip(self.names, torch.where(ready & (total > 0), share, 1.0).unbind()))
