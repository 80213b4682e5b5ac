"""What there is before any photo is taken: the town, the cameras, and the surface points that they see.

Photos take nearly all of the time that a scene takes; what only needs the geometry is had from here in seconds for a
block, and in a minute or two for a town of 8 x 8 blocks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float64, UInt8

from infnerf_ns.data.demo_scene.flight import plan_flight
from infnerf_ns.data.demo_scene.photographer import Lens
from infnerf_ns.data.demo_scene.points import (
    MAX_POINTS,
    POINTS_PER_PHOTO,
    CulledPoints,
    PickedPoints,
    SurfacePoints,
    distinct,
    pick_points,
)
from infnerf_ns.data.demo_scene.raycaster import make_raycaster
from infnerf_ns.data.demo_scene.town import BLOCK, build_town
from infnerf_ns.data.thread_pool import threads

_WHOLE_SIZE = 4
"""Blocks per side of a town up to which every photo is asked for every point."""
_REACH, _REACH_FACTOR = 150.0, 3.0
"""Metres, and times the distance to what a photo looks at."""


class Survey:
    """The town, ray casting in it, and the poses of the photos.

    Args:
        size: blocks per side.
        seed: of the town, the flight and the points.
        num_photos: how many the drone takes.
        lens: of all photos.
    """

    def __init__(self, size: int, seed: int, num_photos: int, lens: Lens) -> None:
        self.seed, self.lens = seed, lens
        self.town = build_town(size, seed)
        self.rays = make_raycaster(self.town.mesh.corners)
        self.poses, self.look_distance = plan_flight(self.town, self.rays, num_photos, seed)
        self._points_per_photo = min(POINTS_PER_PHOTO, max(MAX_POINTS // num_photos, 40))

    def pick(self, photo: int) -> PickedPoints:
        """The points that structure from motion would find in a photo."""
        rng = np.random.default_rng([self.seed, photo, 2])
        return pick_points(self.rays, self.lens, self.poses[photo], self._points_per_photo, rng)

    def points(
        self, picked: list[PickedPoints], rgb: list[UInt8[np.ndarray, "n 3"]], pool: ThreadPoolExecutor
    ) -> SurfacePoints:
        """The points of all photos, each once, and which photos see them.

        Args:
            picked: of every photo.
            rgb: colours of the same points.
            pool: threads to find out who sees them.
        """
        xyz = np.concatenate([points.xyz for points in picked])
        source = np.repeat(np.arange(len(picked), dtype=np.int32), [len(points.xyz) for points in picked])
        keep = distinct(xyz, np.concatenate([points.pixel_size for points in picked]))
        xyz = xyz[keep]
        culled = CulledPoints(xyz, BLOCK)
        seen = list(
            pool.map(
                lambda pose, reach: culled.seen_from(self.rays, self.lens, pose, reach),
                self.poses,
                self._reach().tolist(),
            )
        )
        photo = np.repeat(np.arange(len(seen), dtype=np.int32), [len(s) for s in seen])
        return SurfacePoints(xyz, np.concatenate(rgb)[keep], source[keep], np.concatenate(seen), photo)

    def _reach(self) -> Float64[np.ndarray, "p"]:
        """How far from each photo points are looked for, metres: in a large town not much farther than what it looks
        at. Nothing there is matched with a photo from close by, and every street photo would ask for rays to a hundred
        thousand such points."""
        if self.town.size <= _WHOLE_SIZE:
            return np.full(len(self.poses), np.inf)
        look = np.where(np.isfinite(self.look_distance), self.look_distance, 0.0)  # a photo's middle may be sky
        return np.maximum(_REACH, _REACH_FACTOR * look.astype(np.float64))

    def black_points(self) -> SurfacePoints:
        """The points without photos, which alone know their colours: all are black."""
        with threads() as pool:
            picked = list(pool.map(self.pick, range(len(self.poses))))
            return self.points(picked, [np.zeros((len(points.xyz), 3), np.uint8) for points in picked], pool)
