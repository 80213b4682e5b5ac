"""Which photo sees which SfM point."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Tracks(NamedTuple):
    """Which photo sees which point: K distinct pairs."""

    point: Int[Tensor, "k"]
    """row in the dataparser's points"""
    photo: Int[Tensor, "k"]
    """train photo"""
    pixel: Float[Tensor, "k 2"] | None = None
    """where structure from motion found the point in the photo, at the size of the dataparser's cameras, pixel centres
    at +0.5; None where that is not known"""
