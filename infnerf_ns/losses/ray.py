"""Losses on the weights along rays, beside nerfstudio's own.

``interlevel_loss`` (proposals, mip-NeRF 360) is nerfstudio's. Its distortion loss compares all pairs of samples, which
grows with the square of their number; this is the linear form of the same sum; the tests compare the two.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def distortion(weights: Float[Tensor, "R S"], edges: Float[Tensor, "R S1"]) -> Float[Tensor, ""]:
    """Distortion loss of mip-NeRF 360 (eq. 15), mean over rays, in O(S) by prefix sums (Sun et al. 2022, DVGO v2).

    Args:
        weights: rendering weights.
        edges: normalised distances of the interval edges, increasing.
    """
    middle, length = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)
    before = torch.cumsum(weights, dim=1) - weights
    before_middle = torch.cumsum(weights * middle, dim=1) - weights * middle
    between = 2 * (weights * (middle * before - before_middle)).sum(dim=1)
    return (between + (weights.square() * length).sum(dim=1) / 3).mean()


def sparsity(density: Float[Tensor, "M"], gsd: Float[Tensor, "M"] | float) -> Float[Tensor, ""]:
    """Sparsity loss ``log(1 + 2 sigma**2)`` of SNeRG (Hedman et al. 2021; a Cauchy prior), mean over samples.

    Args:
        density: of samples, per scene unit.
        gsd: ground sampling distance of each sample's node, scene units: density counts per that length, so that the
            strength depends neither on the scene's scale nor on the level.
    """
    return torch.log1p(2 * (density * gsd).square()).mean()
