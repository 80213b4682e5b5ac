"""Which nodes a view can touch: frustum and footprint range per node cube (design section 8).

The pixels of a view are split into tiles. The rays of a tile lie in a hexahedron between the tile's near plane and the
far side of the root cube, and each has a footprint of at least ``radius * t``. A node below the root can be touched if
its cube meets the hexahedron of a tile, and if at the nearest point of the cube the footprint is smaller than the GSD
of the node's parent (which then passes the sample on). Nothing is assumed about cameras: perspective, fisheye,
equirectangular and parallel rays are all tiles of rays. No node is ever missed; too many are named where a tile's
hexahedron is larger than its rays.

The answer is not a set but a number per node, *up to which footprint scale* the view touches it: the nodes of the view
are those above 1, and the k nodes of the largest numbers are those of the finest picture that k nodes can give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from infnerf_ns.octree import Octree, RootCube

_TILE_ROWS = 12
_TILE_COLUMNS = 16
_SLACK = 1e-4
"""Relative: rounding must not lose a node."""
_PAIRS = 1 << 20
"""Node-tile pairs that are tested at once."""


@dataclass
class Tiles:
    """T bundles of rays, in unit coordinates (lengths over the side of the root cube)."""

    corners: Float[Tensor, "T 8 3"]
    """near rectangle, then far rectangle, each in the order of the signs (-,-), (-,+), (+,-), (+,+)"""
    origin: Float[Tensor, "T 3"]
    """mean origin of the rays"""
    spread: Float[Tensor, "T"]
    """largest distance of an origin from it"""
    near: Float[Tensor, "T"]
    """least near plane"""
    radius: Float[Tensor, "T"]
    """least footprint per distance"""
    constant: Float[Tensor, "T"]
    """least footprint of parallel rays, which does not grow with the distance; else 0"""


def view_tiles(
    cube: RootCube,
    origins: Float[Tensor, "H W 3"],
    directions: Float[Tensor, "H W 3"],
    pixel_area: Float[Tensor, "H W 1"],
    nears: Float[Tensor, "H W 1"] | None,
    parallel_footprint: Float[Tensor, "H W 1"] | None,
) -> Tiles:
    """The tiles of an image of rays.

    Args:
        cube: the root cube.
        origins: world.
        directions: unit length.
        pixel_area: solid angles, steradians.
        nears: near planes, scene units; None: 0.
        parallel_footprint: of orthographic cameras, scene units.
    """
    tiled = _tiled(torch.cat([cube.to_unit(origins), directions @ cube.rotation.to(directions).T], dim=-1))
    places, ways = tiled[..., :3], tiled[..., 3:]
    radius = (_tiled(pixel_area)[..., 0].amin(dim=1) / math.pi).sqrt()
    nothing = torch.zeros_like(radius)
    near = nothing if nears is None else _tiled(nears)[..., 0].amin(dim=1) / cube.side
    parallel = nothing if parallel_footprint is None else _tiled(parallel_footprint)[..., 0].amin(dim=1) / cube.side

    axis = torch.nn.functional.normalize(ways.mean(dim=1), dim=-1)
    helper = torch.zeros_like(axis).scatter_(1, axis.abs().argmin(dim=1, keepdim=True), 1.0)
    across = torch.nn.functional.normalize(torch.linalg.cross(axis, helper), dim=-1)
    frame = torch.stack([across, torch.linalg.cross(axis, across), axis], dim=2)  # its axes as columns
    middle = places.mean(dim=1)
    offset = places - middle[:, None]
    place, way = offset @ frame, ways @ frame
    # Rays at right angles to the axis of their tile only exist in views of a few pixels around a whole sphere.
    slope = way[..., :2] / way[..., 2:].clamp(min=1e-3)
    first = (place[..., 2] + near[:, None] * way[..., 2]).amin(dim=1)
    last = torch.maximum((middle - 0.5).norm(dim=-1) + 0.5 * 3**0.5, first + 1e-6)
    corners = []
    for depth in (first, last):
        at = place[..., :2] + slope * (depth[:, None, None] - place[..., 2:])
        low, high = at.amin(dim=1), at.amax(dim=1)
        pad = _SLACK * (high - low + depth.abs()[:, None]) + 1e-9
        low, high = low - pad, high + pad
        corners += [torch.stack([u, v, depth], dim=1) for u in (low[:, 0], high[:, 0]) for v in (low[:, 1], high[:, 1])]
    corner = torch.stack(corners, dim=1) @ frame.transpose(1, 2) + middle[:, None]
    return Tiles(corner, middle, offset.norm(dim=-1).amax(dim=1), near, radius, parallel)


def _tiled(image: Float[Tensor, "H W C"]) -> Float[Tensor, "T P C"]:
    """The pixels of each tile; the last row and column are repeated where the tiles reach beyond the image."""
    for axis, count in ((0, _TILE_ROWS), (2, _TILE_COLUMNS)):
        length = image.shape[axis]
        side = -(-length // min(length, count))
        index = torch.arange(-(-length // side) * side, device=image.device).clamp(max=length - 1)
        image = image.index_select(axis, index).unflatten(axis, (-1, side))
    # rows of tiles, rows in a tile, columns of tiles, columns in a tile
    return image.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def touched_up_to(octree: Octree, tiles: Tiles, sharpening: float = 1.0) -> Float[Tensor, "N"]:
    """The footprint scale up to which the view can touch each node; 0: not at any scale; the root's is infinite.

    Args:
        octree: the whole tree.
        tiles: of the view.
        sharpening: samples are routed by their footprints over this (for the model's blend of levels).

    Returns:
        Never larger at a child than at its parent.
    """
    scale = torch.zeros(octree.num_nodes, device=octree.level.device)
    scale[0] = torch.inf
    edges = octree.first_of_level.tolist()
    axes = _separating_axes(tiles)
    for level in range(1, octree.depth + 1):
        nodes = torch.arange(edges[level], edges[level + 1], device=scale.device)
        nodes = nodes[scale[octree.parent[nodes]] > 0]
        for part in nodes.split(max(1, _PAIRS // len(tiles.near))):
            least = _least_footprint(octree, part, level, tiles, axes)
            own = octree.gsd(level - 1) / octree.cube.side * sharpening * (1 + _SLACK) / least.clamp(min=1e-20)
            scale[part] = torch.minimum(torch.where(least < torch.inf, own, 0.0), scale[octree.parent[part]])
    return scale


def fitting_scale(touched: Float[Tensor, "N"], capacity: int) -> float:
    """The least footprint scale at which the view touches at most ``capacity`` nodes below the root."""
    below = touched[1:]
    return 0.0 if capacity >= len(below) else float(below.kthvalue(len(below) - capacity).values)


def _separating_axes(tiles: Tiles) -> Float[Tensor, "T A 3"]:
    """Directions along which a tile's hexahedron and a cube may be told apart (separating axis theorem): the normals of
    the hexahedron's faces, and what is at right angles to one of its edges and to one of the cube's."""
    corner = tiles.corners
    across = [corner[:, 2] - corner[:, 0], corner[:, 1] - corner[:, 0]]
    along = [corner[:, 4 + k] - corner[:, k] for k in range(4)]
    up, right = across[1], across[0]
    normals = [torch.linalg.cross(right, up)]
    normals += [torch.linalg.cross(edge, side) for edge, side in zip(along, (up, right, right, up))]
    cube = torch.eye(3, device=corner.device)
    crossed = [torch.linalg.cross(edge, each.expand_as(edge)) for edge in (*across, *along) for each in cube]
    return torch.nn.functional.normalize(torch.stack([*normals, *crossed], dim=1), dim=-1)


def _least_footprint(
    octree: Octree, nodes: Tensor, level: int, tiles: Tiles, axes: Float[Tensor, "T A 3"]
) -> Float[Tensor, "n"]:
    """Least footprint (unit coordinates) of the view's rays in each node's cube; inf where no ray passes it."""
    half = 0.5 / 2**level
    center = (octree.coords[nodes] + 0.5) / 2**level
    reach = half * (1 + _SLACK) + 1e-6
    low, high = tiles.corners.amin(dim=1), tiles.corners.amax(dim=1)
    meets = ((center[:, None] + reach >= low) & (center[:, None] - reach <= high)).all(dim=-1)
    node, tile = torch.nonzero(meets, as_tuple=True)
    along = torch.einsum("tac,tkc->tak", axes, tiles.corners)
    bottom, top = along.amin(dim=-1), along.amax(dim=-1)
    extent = reach * axes.abs().sum(dim=-1)
    middle = torch.einsum("pac,pc->pa", axes[tile], center[node])
    overlaps = ((middle + extent[tile] >= bottom[tile]) & (middle - extent[tile] <= top[tile])).all(dim=-1)
    node, tile = node[overlaps], tile[overlaps]
    gap = ((center[node] - tiles.origin[tile]).abs() - reach).clamp(min=0).norm(dim=-1)
    distance = torch.maximum(gap - tiles.spread[tile], tiles.near[tile])
    footprint = torch.maximum(distance * tiles.radius[tile], tiles.constant[tile])
    least = torch.full((len(nodes),), torch.inf, device=footprint.device)
    return least.scatter_reduce_(0, node, footprint, "amin")
