"""Losses that tie the levels of the octree together (InfNeRF, section 3.5 and supplement).

Densities are per length: they are multiplied by a node's GSD first, so that the strength does not depend on the
scene's scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from infnerf_ns.octree import Octree

DensityFn = Callable[[Float[Tensor, "M 3"], int], Float[Tensor, "M"]]
"""density at world positions [M, 3] with the tree cut at a level"""

_NEIGHBOURS = torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)])


def random_points_in_nodes(
    octree: Octree, deepest: int, num_nodes: int, num_points: int
) -> tuple[Float[Tensor, "P 3"], int] | None:
    """World points, uniform in a few random nodes of one random level in 1..deepest, and that level; None without such
    nodes."""
    deepest = min(deepest, octree.depth)
    if deepest < 1:
        return None
    level = int(torch.randint(1, deepest + 1, ()))
    first, last = octree.first_of_level[level : level + 2].tolist()
    nodes = torch.randint(first, last, (num_nodes,), device=octree.level.device)
    nodes = nodes.repeat_interleave(-(-num_points // num_nodes))[:num_points]
    unit = (octree.coords[nodes] + torch.rand(num_points, 3, device=nodes.device)) / 2**level
    return octree.cube.to_world(unit), level


def inter_level(points: Float[Tensor, "P 3"], level: int, octree: Octree, density_fn: DensityFn) -> Float[Tensor, ""]:
    """MSE between the parents' transparency at x and the mean of the children's over x and its six neighbours at +-gsd.

    Args:
        points: world positions inside nodes of ``level``.
        level: the children's level.
        octree: the tree.
        density_fn: density with the tree cut at a level.
    """
    gsd = octree.gsd(level)
    around = (points[:, None] + gsd * _NEIGHBOURS.to(points)).reshape(-1, 3)
    children = torch.exp(-gsd * density_fn(around, level)).reshape(len(points), 7).mean(dim=1)
    parents = torch.exp(-gsd * density_fn(points, level - 1))
    return torch.nn.functional.mse_loss(parents, children)


def transparency(points: Float[Tensor, "P 3"], level: int, octree: Octree, density_fn: DensityFn) -> Float[Tensor, ""]:
    """L1 between the transparency of random points and 1: space that no photo explains stays empty."""
    return (1 - torch.exp(-octree.gsd(level) * density_fn(points, level))).mean()
