"""Surface points as a structure-from-motion run would find them, and which photos see each: exact, by ray casting.

The points carry no noise: real ones err by a fraction of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from infnerf_ns.data.demo_scene.photographer import Lens
from infnerf_ns.data.demo_scene.raycaster import RayCaster

POINTS_PER_PHOTO = 400
MAX_POINTS = 2_600_000
"""Of all photos; towns of more than 8 x 8 blocks get fewer per photo. A sixth of that left a town of 8 x 8 blocks a
tree of half its nodes, as too few points fell into each cell."""


@dataclass
class SurfacePoints:
    """Points and all (point, photo) pairs where the photo sees the point."""

    xyz: Float32[np.ndarray, "n 3"]
    """Metres."""
    rgb: UInt8[np.ndarray, "n 3"]
    source: Int32[np.ndarray, "n"]
    """The photo that each point was picked in."""
    seen_point: Int32[np.ndarray, "pairs"]
    seen_photo: Int32[np.ndarray, "pairs"]


class PickedPoints(NamedTuple):
    """Surface points behind pixels of one photo."""

    xyz: Float32[np.ndarray, "n 3"]
    """Metres."""
    row: Int64[np.ndarray, "n"]
    column: Int64[np.ndarray, "n"]
    pixel_size: Float32[np.ndarray, "n"]
    """Of a pixel at the point's depth, metres."""


def pick_points(
    rays: RayCaster,
    lens: Lens,
    pose: Float32[np.ndarray, "3 4"],
    count: int,
    rng: np.random.Generator,
) -> PickedPoints:
    """The surface behind up to ``count`` pixels of a photo."""
    chosen = rng.choice(lens.width * lens.height, min(count, lens.width * lens.height), replace=False)
    row, column = np.divmod(np.sort(chosen), lens.width)
    directions = lens.directions(column.astype(np.float32) + 0.5, row.astype(np.float32) + 0.5) @ pose[:, :3].T
    origins = np.broadcast_to(pose[:, 3], directions.shape)
    triangle, depth = rays.cast(origins, directions)
    hit = triangle >= 0
    xyz = (origins + directions * depth[:, None])[hit].astype(np.float32)
    return PickedPoints(xyz, row[hit], column[hit], depth[hit] / np.float32(lens.focal))


def distinct(xyz: Float32[np.ndarray, "n 3"], pixel_size: Float32[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """True for the first of the points that share a cube of about their own pixel size."""
    scale = np.floor(np.log2(pixel_size)).astype(np.int64)
    cube = np.floor(xyz / np.exp2(scale)[:, None].astype(np.float32)).astype(np.int64)
    _, first = np.unique(np.concatenate([cube, scale[:, None]], -1), axis=0, return_index=True)
    keep = np.zeros(len(xyz), bool)
    keep[first] = True
    return keep


def camera_coordinates(xyz: Float32[np.ndarray, "n 3"], pose: Float32[np.ndarray, "3 4"]) -> Float32[np.ndarray, "n 3"]:
    """Points in the frame of a camera with OpenGL axes."""
    return (xyz - pose[:, 3]) @ pose[:, :3]


def visible(
    rays: RayCaster,
    lens: Lens,
    pose: Float32[np.ndarray, "3 4"],
    xyz: Float32[np.ndarray, "n 3"],
) -> Bool[np.ndarray, "n"]:
    """Which points lie inside the photo with nothing in front of them."""
    local = camera_coordinates(xyz, pose)
    depth = -local[:, 2]
    inside = depth > 1e-3
    inside &= np.abs(local[:, 0]) < depth * (lens.width / 2 / lens.focal)
    inside &= np.abs(local[:, 1]) < depth * (lens.height / 2 / lens.focal)
    asked = np.nonzero(inside)[0]
    way = xyz[asked] - pose[:, 3]
    distance = np.linalg.norm(way, axis=-1)
    until = 1 - 1e-4 - 5e-3 / distance
    blocked = rays.blocked(np.broadcast_to(pose[:, 3], way.shape), way, until)
    inside[asked[blocked]] = False
    return inside


class CulledPoints:
    """Points sorted into columns of the ground plan, so that a photo only looks at those columns that may be inside
    it."""

    def __init__(self, xyz: Float32[np.ndarray, "n 3"], side: float) -> None:
        cube = np.floor(xyz[:, :2] / side).astype(np.int64)
        _, which = np.unique(cube, axis=0, return_inverse=True)
        which = which.reshape(-1)
        self._xyz = xyz
        groups = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        self._groups = groups
        self._centre = np.stack([(xyz[g].min(0) + xyz[g].max(0)) / 2 for g in groups])
        self._radius = np.array([np.linalg.norm(xyz[g] - c, axis=-1).max() for g, c in zip(groups, self._centre)])

    def seen_from(
        self, rays: RayCaster, lens: Lens, pose: Float32[np.ndarray, "3 4"], reach: float = np.inf
    ) -> Int32[np.ndarray, "k"]:
        """Indices of the points that the photo sees, ascending.

        Args:
            rays: into the town.
            lens: of the photo.
            pose: of the photo.
            reach: columns farther away than that are left out, metres.
        """
        local = camera_coordinates(self._centre, pose)
        near = -local[:, 2] > -self._radius
        near &= np.linalg.norm(local, axis=-1) - self._radius < reach
        for axis, half in ((0, lens.width / 2 / lens.focal), (1, lens.height / 2 / lens.focal)):
            outside = (np.abs(local[:, axis]) + local[:, 2] * half) / np.sqrt(1 + half * half)
            near &= outside < self._radius
        groups = [self._groups[g] for g in np.nonzero(near)[0]]
        if not groups:
            return np.zeros(0, np.int32)
        candidates = np.sort(np.concatenate(groups))
        return candidates[visible(rays, lens, pose, self._xyz[candidates])].astype(np.int32)
