"""Smoothness across the faces between neighbouring nodes of one octree level.

Two nodes that share a face are two NeRFs which know nothing of each other; without this loss a seam may show where they
meet. Their *fields* are compared, not their parameters, which mean different things in different nodes. Densities are
per length: they are multiplied by the level's GSD, so that the strength does not depend on the scene's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.octree import Octree

FieldFn = Callable[[Float[Tensor, "M 3"], int], tuple[Float[Tensor, "M"], Float[Tensor, "M 3"]]]
"""density per scene unit and colour in 0..1 at world positions [M, 3] with the tree cut at a level"""

_HAIR = 0.25
"""distance from the face on both sides, in GSDs of the level"""
_LEAST_HAIR = 2.0**-20
"""the same in sides of the root cube: closer, float32 may put a position on the wrong side"""


class Faces(NamedTuple):
    """Q pairs of nodes that share a face."""

    node: Int[Tensor, "Q"]
    neighbour: Int[Tensor, "Q"]
    """the node behind it, in the direction of +x, +y or +z"""
    axis: Int[Tensor, "Q"]
    """that direction"""


class FacePoints(NamedTuple):
    """P world positions on both sides of faces between nodes of one level."""

    below: Float[Tensor, "P 3"]
    above: Float[Tensor, "P 3"]
    level: int


class FaceLosses(NamedTuple):
    """See :func:`across_faces`."""

    transparency: Float[Tensor, ""]
    color: Float[Tensor, ""]


def shared_faces(octree: Octree, level: int) -> Faces:
    """All faces that two nodes of a level share, found together by one sort of the nodes' cells."""
    first, last = octree.first_of_level[level : level + 2].tolist()
    stride = 2**level + 1  # one more than there are cells, so that no neighbour's key is that of a cell far away
    steps = torch.tensor([stride**2, stride, 1], device=octree.coords.device)
    keys = (octree.coords[first:last] * steps).sum(dim=1)
    ordered, order = keys.sort()
    wanted = keys[:, None] + steps
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys) - 1)
    node, axis = torch.nonzero(ordered[place] == wanted, as_tuple=True)
    return Faces(first + node, first + order[place[node, axis]], axis)


def random_points_on_faces(octree: Octree, deepest: int, num_faces: int, num_points: int) -> FacePoints | None:
    """Points on both sides of a few random faces of one random level in 1..deepest; None where no nodes share a face.

    Args:
        octree: the tree.
        deepest: level below which no node takes part.
        num_faces: number of faces drawn, with repetition.
        num_points: number of points P, spread evenly over the faces.
    """
    for level in (torch.randperm(max(0, min(deepest, octree.depth))) + 1).tolist():
        faces = shared_faces(octree, level)
        if len(faces.node):
            break
    else:
        return None
    device = faces.node.device
    drawn = torch.randint(len(faces.node), (num_faces,), device=device)
    drawn = drawn.repeat_interleave(-(-num_points // num_faces))[:num_points]
    across = torch.nn.functional.one_hot(faces.axis[drawn], 3)
    within = torch.rand(num_points, 3, device=device)
    unit = (octree.coords[faces.node[drawn]] + torch.where(across == 1, 1.0, within)) / 2**level
    hair = max(_HAIR * octree.gsd(level) / octree.cube.side, _LEAST_HAIR) * across
    return FacePoints(octree.cube.to_world(unit - hair), octree.cube.to_world(unit + hair), level)


def across_faces(points: FacePoints, octree: Octree, field_fn: FieldFn) -> FaceLosses:
    """MSE between the two sides of faces: of the transparency ``exp(-gsd * density)``, and of the colour.

    A colour counts by the lower opacity of the two sides, which gets no gradient from it: what is transparent has no
    colour, and a seam must not be mended by making it so.

    Args:
        points: of :func:`random_points_on_faces`.
        octree: the tree.
        field_fn: routes by position; called once, with both sides.
    """
    density, color = field_fn(torch.cat([points.below, points.above]), points.level)
    transparency = torch.exp(-octree.gsd(points.level) * density)
    below, above = transparency.chunk(2)
    opacity = 1 - torch.maximum(below, above).detach()
    color_below, color_above = color.chunk(2)
    difference = (color_below - color_above).square().mean(dim=-1)
    return FaceLosses(torch.nn.functional.mse_loss(below, above), (opacity * difference).mean())
