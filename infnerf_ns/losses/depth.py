"""Depth supervision on patches, in the logarithm of depth.

P patches of h x w pixels. Predicted depths and those of the data may differ in unit as far as a loss lets a common
factor go free. A pixel counts if it is marked valid, its target is finite and above 0, and the predicted depth is above
0 (a ray that meets nothing has none); a predicted depth that is not a number makes the loss so. Where no pixel counts,
a loss is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def scale_invariant_log(
    predicted: Float[Tensor, "P h w"],
    target: Float[Tensor, "P h w"],
    valid: Bool[Tensor, "P h w"],
    variance_focus: float = 0.5,
) -> Float[Tensor, ""]:
    """``mean(d**2) - variance_focus * mean(d)**2`` per patch, with ``d = log(predicted) - log(target)`` (Eigen et al.
    2014, eq. 4), mean over the patches that have a valid pixel.

    Args:
        predicted: rendered depths. R rays that are not a patch can be given as one patch [1, 1, R].
        target: depths of the data.
        valid: which of them count.
        variance_focus: 0: the mean squared error of log depth; 1: a common factor on a patch's depths is free.
    """
    difference, valid = _log_difference(predicted, target, valid)
    mean, mean_square = (_masked_mean(each, valid, dims=(1, 2)) for each in (difference, difference.square()))
    return _masked_mean(mean_square - variance_focus * mean.square(), valid.any(dim=2).any(dim=1), dims=(0,))


def log_gradient(
    predicted: Float[Tensor, "P h w"], target: Float[Tensor, "P h w"], valid: Bool[Tensor, "P h w"], scales: int = 4
) -> Float[Tensor, ""]:
    """Gradient matching in log depth (MegaDepth, Li & Snavely 2018; MiDaS, Ranftl et al. 2020).

    The mean absolute difference of ``d = log(predicted) - log(target)`` between horizontal neighbours plus that between
    vertical ones, where both are valid, summed over scales: the scales see every pixel, every 2nd, every 4th, ... A
    common factor on the depths is free.

    Args:
        predicted: rendered depths of patches whose pixels are neighbours.
        target: depths of the data.
        valid: which of them count.
        scales: number of scales; those at which a patch is one pixel are 0.
    """
    difference, valid = _log_difference(predicted, target, valid)
    total = difference.sum() * 0.0
    for scale in range(scales):
        step = 2**scale
        values, counts = difference[:, ::step, ::step], valid[:, ::step, ::step]
        down, right = counts[:, 1:] & counts[:, :-1], counts[:, :, 1:] & counts[:, :, :-1]
        total = total + _masked_mean(values.diff(dim=1).abs(), down, dims=(0, 1, 2))
        total = total + _masked_mean(values.diff(dim=2).abs(), right, dims=(0, 1, 2))
    return total


def _log_difference(predicted: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """``log(predicted) - log(target)``, 0 with gradient 0 where that is invalid, and where it is valid."""
    valid = valid.bool() & torch.isfinite(target) & (target > 0) & ~(predicted <= 0)
    # Depths are replaced before the logarithm: behind it, 0 times its infinite slope would be no number.
    predicted, target = (torch.where(valid, depth, torch.ones_like(depth)) for depth in (predicted, target))
    return predicted.log() - target.log(), valid


def _masked_mean(values: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.where(valid, values, 0.0).sum(dim=dims) / valid.sum(dim=dims).clamp(min=1)
