"""Photometric losses on rays."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def mse(predicted: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Mean squared error."""
    return torch.nn.functional.mse_loss(predicted, target)


def charbonnier(
    predicted: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], width: float = 1e-3
) -> Float[Tensor, ""]:
    """Smooth L1 ``sqrt(d**2 + width**2)`` (Charbonnier et al. 1994; Zip-NeRF's data term)."""
    return ((predicted - target).square() + width**2).sqrt().mean()
