"""The octree as flat tensors: which nodes exist, and which of them evaluates a sample.

N nodes: ``level [N]``, ``coords [N, 3]`` (integer cell at the node's level), ``parent [N]``, ``children [N, 8]`` (-1 =
none). Nodes are sorted by level, so the nodes of one level are one block of rows; the root is node 0. No node objects,
no recursion, no ``torch.nn``, no nerfstudio. Positions are in three frames:

- *world*: the frame of the cameras, scene units;
- *unit*: ``[0, 1]^3`` over the root cube (outside of it for the background);
- *local*: ``[0, 1)^3`` over one node. The root alone also holds the background: its local frame is the L-inf
  contraction (mip-NeRF 360, eq. 10, with the maximum norm) of the whole space, in which the root cube is the middle
  half per axis.

Source: InfNeRF (SIGGRAPH Asia 2024), sections 3.1 to 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns import kernels
from infnerf_ns.footprint import continuous_level, level_gsd
from infnerf_ns.kernels.frames import affine

_OCTANTS = torch.tensor([[(o >> 0) & 1, (o >> 1) & 1, (o >> 2) & 1] for o in range(8)])


@dataclass
class RootCube:
    """The cube that the tree divides: ``unit = (rotation @ (world - center)) / side + 1/2``."""

    center: Float[Tensor, "3"]
    side: float
    rotation: Float[Tensor, "3 3"]

    def to_unit(self, world: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """World to unit coordinates."""
        return affine(world, self.center.to(world), self.rotation.to(world).T / self.side, 0.5)

    def to_world(self, unit: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
        """Unit to world coordinates."""
        return (unit - 0.5) * self.side @ self.rotation.to(unit) + self.center.to(unit)


class Changed(NamedTuple):
    """A tree that was made from another one."""

    octree: Octree
    """the new tree; nodes that stay keep their order within their level, before the new ones"""
    origin: Int[Tensor, "N"]
    """number that each of its nodes had in the old tree; -1: new"""


class Located(NamedTuple):
    """Answer of :meth:`Octree.locate` for M samples."""

    node: Int[Tensor, "M"]
    """the node that keeps the sample"""
    local: Float[Tensor, "M 3"]
    """position in the node's local frame, in [0, 1)"""
    fraction: Float[Tensor, "M"]
    """weight of the node against its parent, in (0, 1]: how far the continuous level is past the parent's; 1 at the
    root and where the tree ends before the sample's level"""


def root_cube(
    points: Float[Tensor, "N 3"], *, align: str = "auto", trim: float = 0.01, margin: float = 1.05
) -> RootCube:
    """Root cube around the points, without the ``trim`` share of outliers at both ends of each axis.

    Args:
        points: world positions, at least 2 distinct.
        align: ``none`` keeps the world's axes; ``pca`` turns the shortest principal axis up; ``auto`` does so only
        where the
            scene is flat (shortest principal extent below half of the middle one) and tilted by more than 5 degrees,
            which nerfstudio's ``orientation_method up`` does to nadir flights.
        trim: share of points ignored at both ends of each axis.
        margin: the trimmed box is enlarged by this factor.

    Raises:
        ValueError: the points have no extent.
    """
    points = points.double()
    rotation = torch.eye(3, dtype=torch.float64)
    if align != "none" and len(points) >= 4:
        centered = points - points.median(dim=0).values
        keep = centered.norm(dim=-1)
        centered = centered[keep <= torch.quantile(keep[:: max(1, len(keep) // 100_000)], 1 - trim)]
        extent, axes = torch.linalg.eigh(centered.T @ centered / max(len(centered), 1))
        up = axes[:, 0]
        leading = up[[2, 0, 1]][up[[2, 0, 1]].abs() > 1e-6][0]  # z, or x or y where the scene stands on its edge
        up = up * torch.sign(leading)
        flat = extent[0].clamp(min=0).sqrt() < 0.5 * extent[1].clamp(min=0).sqrt()
        tilted = up[2] < torch.cos(torch.deg2rad(torch.tensor(5.0, dtype=torch.float64)))
        if align == "pca" or bool(flat and tilted):
            first = axes[:, 2] - up * (axes[:, 2] @ up)
            first = first / first.norm()
            rotation = torch.stack([first, torch.linalg.cross(up, first), up])
    turned = points @ rotation.T
    ordered = turned.sort(dim=0).values
    cut = int(trim * (len(points) - 1))
    low, high = ordered[cut], ordered[len(points) - 1 - cut]
    side = float((high - low).max()) * margin
    if not side > 0:
        raise ValueError("the points have no extent")
    return RootCube(((low + high) / 2 @ rotation).float(), side, rotation.float())


def contract(unit: Float[Tensor, "*bs 3"]) -> Float[Tensor, "*bs 3"]:
    """L-inf contraction of unit coordinates: the root cube becomes the middle half ``[1/4, 3/4]^3``, infinity the unit
    cube."""
    centered = 2 * unit - 1
    norm = centered.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    return (2 - 1 / norm) * (centered / norm) / 4 + 0.5


class Octree:
    """A sparse octree over a root cube, as flat tensors (see the module's docstring)."""

    def __init__(
        self,
        cube: RootCube,
        level: Int[Tensor, "N"],
        coords: Int[Tensor, "N 3"],
        parent: Int[Tensor, "N"],
        *,
        node_resolution: int,
        gsd_sharpness: float = 2.0,
    ) -> None:
        self.cube = cube
        self.level, self.coords, self.parent = level.long(), coords.long(), parent.long()
        self.node_resolution, self.gsd_sharpness = node_resolution, gsd_sharpness
        self.children = torch.full((len(level), 8), -1, dtype=torch.long, device=level.device)
        inner = torch.nonzero(self.parent >= 0)[:, 0]
        self.children[self.parent[inner], self.octant[inner]] = inner
        self.nodes_per_level = torch.bincount(self.level).tolist()
        first = [0]
        for count in self.nodes_per_level:
            first.append(first[-1] + count)
        self.first_of_level = torch.tensor(first, device=level.device)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.level)

    @property
    def depth(self) -> int:
        """Deepest level that has a node."""
        return len(self.nodes_per_level) - 1

    @property
    def octant(self) -> Int[Tensor, "N"]:
        """Which child of its parent each node is: bit 0, 1, 2 = upper half in x, y, z."""
        return ((self.coords & 1) * torch.tensor([1, 2, 4], device=self.coords.device)).sum(-1)

    @property
    def row(self) -> Int[Tensor, "N"]:
        """Row of each node in the bank of its level."""
        return torch.arange(self.num_nodes, device=self.level.device) - self.first_of_level[self.level]

    def gsd(self, level: int) -> float:
        """Ground sampling distance of a level, scene units."""
        return level_gsd(self.cube.side, level, self.node_resolution, self.gsd_sharpness)

    def to(self, device: torch.device | str) -> Octree:
        """The same tree on another device."""
        return Octree(
            self.cube,
            self.level.to(device),
            self.coords.to(device),
            self.parent.to(device),
            node_resolution=self.node_resolution,
            gsd_sharpness=self.gsd_sharpness,
        )

    def local(self, unit: Float[Tensor, "M 3"], node: Int[Tensor, "M"], level: int) -> Float[Tensor, "M 3"]:
        """Unit coordinates to the local frames of the given nodes, all of one level (contracted in the root)."""
        inside = contract(unit) if level == 0 else unit * 2.0**level - self.coords[node]
        return inside.clamp(0.0, 1.0 - 2.0**-24)

    def route(
        self,
        unit: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"] | None,
        max_level: int | None = None,
        backend: kernels.Backend = "auto",
    ) -> Int[Tensor, "M K"]:
        """Path of every sample from the root to the node that keeps it: column l is its node at level l, or -1 below
        that node.

        The rule (paper, section 3.2): a node keeps the sample if ``footprint >= gsd(level)``, else the child octant
        takes it; where the child is missing the node keeps it; samples outside the root cube stay in the root. All
        samples walk down together.

        Args:
            unit: positions in unit coordinates.
            footprints: radii in scene units; None asks for the finest node there is.
            max_level: a cut of the tree: no sample goes deeper.
            backend: of the kernels.
        """
        deepest = self.depth if max_level is None else min(self.depth, max_level)
        path = torch.full((len(unit), deepest + 1), -1, dtype=torch.long, device=unit.device)
        path[:, 0] = 0
        if kernels.follows_paths(backend, unit):
            gsd = [self.gsd(level) for level in range(deepest + 1)]
            return kernels.route(unit, footprints, self.children, gsd, path, backend)
        active = torch.nonzero(((unit >= 0) & (unit < 1)).all(dim=-1))[:, 0] if deepest > 0 else None
        bit = torch.tensor([1, 2, 4], device=unit.device)
        for level in range(deepest):
            if footprints is not None:
                active = active[footprints[active] < self.gsd(level)]
            cell = (unit[active] * 2 ** (level + 1)).long()
            child = self.children[path[active, level], ((cell & 1) * bit).sum(-1)]
            path[active, level + 1] = child
            active = active[child >= 0]
            if len(active) == 0:
                break
        return path

    def locate(
        self, positions: Float[Tensor, "M 3"], footprints: Float[Tensor, "M"] | None, max_level: int | None = None
    ) -> Located:
        """The node that evaluates each sample (rule: :meth:`route`), its local coordinates and its weight against the
        parent.

        Args:
            positions: world positions.
            footprints: radii in scene units; None asks for the finest node there is.
            max_level: a cut of the tree: no sample goes deeper.
        """
        unit = self.cube.to_unit(positions)
        path = self.route(unit, footprints, max_level)
        node = path.max(dim=1).values  # nodes are sorted by level, so the deepest of a path has the highest number
        level = self.level[node]
        local = torch.empty_like(unit)
        for each in range(path.shape[1]):
            at = level == each
            local[at] = self.local(unit[at], node[at], each)
        return Located(node, local, self.fraction(level, footprints))

    def fraction(self, level: Int[Tensor, "M"], footprints: Float[Tensor, "M"] | None) -> Float[Tensor, "M"]:
        """Weight of a node of the given level against its parent for a sample of the given footprint (see
        :class:`Located`)."""
        if footprints is None:
            return torch.ones_like(level, dtype=torch.float32)
        past_parent = continuous_level(footprints, self.gsd(0)) - (level - 1)
        return torch.where(level == 0, 1.0, past_parent.clamp(0.0, 1.0))

    def subdivide(self, parents: Int[Tensor, "B"], octants: Int[Tensor, "B"]) -> Changed:
        """The tree with further nodes.

        Args:
            parents: nodes, each perhaps several times.
            octants: which child of each; bit 0, 1, 2 = upper half in x, y, z.

        Raises:
            ValueError: a child exists already, or is named twice.
        """
        key = parents * 8 + octants
        if bool((self.children[parents, octants] >= 0).any()) or len(key.unique()) < len(key):
            raise ValueError("an octant holds at most one child")
        old = torch.arange(self.num_nodes, device=self.level.device)
        return self._rebuilt(
            torch.cat([self.level, self.level[parents] + 1]),
            torch.cat([self.coords, 2 * self.coords[parents] + _OCTANTS.to(octants)[octants]]),
            torch.cat([self.parent, parents]),
            torch.cat([old, torch.full_like(parents, -1)]),
        )

    def prune(self, nodes: Int[Tensor, "D"]) -> Changed:
        """The tree without some nodes.

        Args:
            nodes: each without children, or with all of its children among them; not the root.

        Raises:
            ValueError: the root, or the parent of a node that stays.
        """
        stays = torch.ones(self.num_nodes, dtype=torch.bool, device=self.level.device)
        stays[nodes] = False
        if not bool(stays[0]) or not bool(stays[self.parent[stays][1:]].all()):
            raise ValueError("only subtrees below the root can be pruned")
        kept = torch.nonzero(stays)[:, 0]
        number = torch.cumsum(stays, 0) - 1
        parent = self.parent[kept]
        return self._rebuilt(self.level[kept], self.coords[kept], torch.where(parent < 0, -1, number[parent]), kept)

    def _rebuilt(self, level: Tensor, coords: Tensor, parent: Tensor, origin: Tensor) -> Changed:
        """Nodes sorted by level; ``parent`` numbers them as they are given."""
        order = torch.argsort(level, stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=order.device)
        parent = parent[order]
        parent = torch.where(parent < 0, -1, number[parent])
        tree = Octree(
            self.cube,
            level[order],
            coords[order],
            parent,
            node_resolution=self.node_resolution,
            gsd_sharpness=self.gsd_sharpness,
        )
        return Changed(tree, origin[order])

    def summary(self, bytes_per_level: list[int] | None = None) -> list[dict]:
        """Per level: nodes, GSD (scene units), share of a full octree that is pruned, and bytes if given."""
        rows = []
        for level, count in enumerate(self.nodes_per_level):
            row = {"level": level, "nodes": count, "gsd": self.gsd(level), "pruned": 1 - count / 8**level}
            if bytes_per_level is not None:
                row["bytes"] = bytes_per_level[level]
            rows.append(row)
        return rows


def build_octree(
    points: Float[Tensor, "N 3"],
    footprints: Float[Tensor, "N"],
    cube: RootCube,
    *,
    max_level: int,
    min_points: int,
    node_resolution: int,
    gsd_sharpness: float = 2.0,
) -> Octree:
    """Tree of the cells in which photos show more than the parent resolves.

    A child exists where at least ``min_points`` points of its octant have a footprint finer than the parent's GSD, and
    its parent exists (paper, section 3.4). Levels are found together per level with one sort, without recursion.

    Args:
        points: world positions of SfM points.
        footprints: finest footprint over the photos that observe the point, scene units.
        cube: the root cube; points outside of it are ignored.
        max_level: deepest level allowed.
        min_points: points needed for a node.
        node_resolution: finest grid resolution of a node.
        gsd_sharpness: see :func:`infnerf_ns.footprint.level_gsd`.
    """
    unit = cube.to_unit(points)
    inside = ((unit >= 0) & (unit < 1)).all(dim=-1)
    unit, footprints = unit[inside], footprints[inside]
    levels, coords, parents = (
        [torch.zeros(1, dtype=torch.long)],
        [torch.zeros(1, 3, dtype=torch.long)],
        [torch.tensor([-1])],
    )
    node_of_point = torch.zeros(len(unit), dtype=torch.long)
    total = 1
    for level in range(1, max_level + 1):
        finer = footprints < level_gsd(cube.side, level - 1, node_resolution, gsd_sharpness)
        unit, footprints, node_of_point = unit[finer], footprints[finer], node_of_point[finer]
        cell = (unit * 2**level).long()
        octant = ((cell & 1) * torch.tensor([1, 2, 4])).sum(-1)
        key, inverse, count = torch.unique(node_of_point * 8 + octant, return_inverse=True, return_counts=True)
        kept = count >= min_points
        if not bool(kept.any()):
            break
        number = torch.cumsum(kept, 0) - 1 + total
        parent = key[kept] // 8
        previous = torch.cat(coords)
        levels.append(torch.full((int(kept.sum()),), level))
        coords.append(previous[parent] * 2 + _OCTANTS[key[kept] % 8])
        parents.append(parent)
        total += int(kept.sum())
        stays = kept[inverse]
        unit, footprints, node_of_point = unit[stays], footprints[stays], number[inverse[stays]]
    return Octree(
        cube,
        torch.cat(levels),
        torch.cat(coords),
        torch.cat(parents),
        node_resolution=node_resolution,
        gsd_sharpness=gsd_sharpness,
    )


def full_octree(cube: RootCube, level: int, *, node_resolution: int, gsd_sharpness: float = 2.0) -> Octree:
    """Tree of all cells down to a level (0: the root alone).

    Args:
        cube, node_resolution, gsd_sharpness: as in :func:`build_octree`.
        level: deepest level.
    """
    root = torch.zeros(1, dtype=torch.long)
    tree = Octree(cube, root, root.expand(1, 3), root - 1, node_resolution=node_resolution, gsd_sharpness=gsd_sharpness)
    for _ in range(level):
        leaves = torch.nonzero(tree.level == tree.depth)[:, 0]
        tree, _ = tree.subdivide(leaves.repeat_interleave(8), torch.arange(8).repeat(len(leaves)))
    return tree
