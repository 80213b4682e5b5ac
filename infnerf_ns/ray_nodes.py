"""Which nodes and levels have rendered a ray: what the outputs `level` and `node` show.

M routed samples (a sample that two levels are blended for is there twice), S samples per ray, R rays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from infnerf_ns.field import Routed
from infnerf_ns.octree import Octree
from infnerf_ns.sampler import weight_quantiles
from infnerf_ns.tree_colors import level_colors, node_colors


class Evaluated(NamedTuple):
    """Who has evaluated the samples of R rays, and what they weigh."""

    routed: Routed
    """M samples; each belongs to one of the R * S along the rays (``order``)"""
    share: Float[Tensor, "M"]
    """of the sample that this node's answer is"""
    weights: Float[Tensor, "R S 1"]
    """rendering weights"""


def level_image(octree: Octree, evaluated: Evaluated) -> Float[Tensor, "R 3"]:
    """Mean octree level of each ray as a colour, blue = root."""
    routed, share, weights = evaluated
    level = share.new_zeros(weights.numel()).index_add(0, routed.order, share * octree.level[routed.node])
    total = (weights[..., 0] * level.reshape(weights.shape[:2])).sum(1)
    mean = total / weights.sum(dim=(1, 2)).clamp(min=1e-6)
    return level_colors(mean, octree.depth)


def node_image(octree: Octree, evaluated: Evaluated) -> Float[Tensor, "R 3"]:
    """Colour of the node that has evaluated the middle of each ray's weight, so of the one with more than half of it,
    if that is one piece of the ray; black where there is no weight."""
    routed, share, weights = evaluated
    spare = weights.numel()
    node = routed.order.new_zeros(spare + 1)
    node[torch.where(share >= 0.5, routed.order, spare)] = routed.node
    of_ray = node[weight_quantiles(weights[..., 0], 1)[:, 0]]
    return node_colors(octree.level[of_ray], octree.coords[of_ray]) * (weights.sum(dim=1) > 0)
