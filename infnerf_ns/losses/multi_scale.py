"""Multi-scale outputs: the same rays rendered with the tree cut at several levels, each supervised by the photo.

Design section 7. A cut is a cap on the level to which samples are routed, so the deepest cut is the picture itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_FEWEST_SAMPLES = 4


def level_weights(levels: list[int], progress: float, coarse_first: float) -> Float[Tensor, "L"]:
    """Weights of the cuts, sum 1: ``2**(-level / 2)``, coarse levels first.

    A level's weight is there from the beginning for the coarsest, and fades in (smoothstep) one after the other for
    the finer ones.

    Args:
        levels: of the cuts, rising, at least one.
        progress: share of the training that is done.
        coarse_first: share of the training after which all levels have their whole weight; 0: from the beginning.
    """
    place = torch.arange(len(levels), dtype=torch.float32)
    shown = torch.ones_like(place)
    if coarse_first > 0:
        shown = (progress / coarse_first * (len(levels) - 1) - place + 1).clamp(0, 1)
        shown = shown * shown * (3 - 2 * shown)
    weights = shown * torch.exp2(-torch.tensor(levels) / 2)
    return weights / weights.sum()


def cut_samples(samples: int, level: int, deepest: int) -> int:
    """Samples per ray of a cut: half as many for two levels less, as what they resolve is coarser.

    Args:
        samples: of the whole tree.
        level: of the cut.
        deepest: level of the tree.
    """
    return max(_FEWEST_SAMPLES, round(samples * 2 ** ((level - deepest) / 2)))
