"""Colours that stand for the nodes of an octree and for its levels, in renders and in the viewer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from nerfstudio.utils import colormaps
from torch import Tensor

_WORD = 0xFFFFFFFF


def level_colors(level: Float[Tensor, "*bs"], depth: int) -> Float[Tensor, "*bs 3"]:
    """Colours of (mean) octree levels in a tree of that depth: from blue, the root, to red."""
    return colormaps.apply_colormap((level / max(depth, 1))[..., None].clamp(0, 1))


def node_colors(level: Int[Tensor, "*bs"], coords: Int[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
    """A colour per node, from nothing but its level and its integer cell there: neighbours differ, and a node keeps its
    colour wherever it is stored. The bits come from the hash of Instant-NGP and the finaliser of MurmurHash3."""
    x, y, z = coords.unbind(dim=-1)
    bits = (level * 374761393 ^ x ^ y * 2654435761 ^ z * 805459861) & _WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ bits >> shift) * factor) & _WORD
    bits = bits ^ bits >> 16
    hue, saturation, value = (bits >> shift & 255 for shift in (0, 8, 16))
    # From hue, saturation and value to red, green and blue (Smith, "Color gamut transform pairs", 1978).
    sector = (hue / 256 * 6)[..., None] + torch.tensor([5.0, 3.0, 1.0], device=level.device)
    sector = torch.remainder(sector, 6)
    lack = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return (0.6 + 0.4 * value / 255)[..., None] * (1 - (0.45 + 0.45 * saturation / 255)[..., None] * lack)
