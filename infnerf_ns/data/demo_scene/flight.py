"""Where the drone goes: from a ring around the whole town down to close-ups of single facades.

Every stage halves or quarters the distance of the one before, and each looks at every block (close-ups: at every second
one) from several sides. Where fewer photos are asked for, every stage keeps its share and serves the middle of the
town first; where more are asked for, the stages are flown again from new sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from infnerf_ns.data.demo_scene.raycaster import RayCaster
from infnerf_ns.data.demo_scene.town import BLOCK, Town, block_centres

Shot = tuple[np.ndarray, np.ndarray]
"""Where the camera is and what it looks at, metres."""

PASSES = 4
"""Flights that a town needs. One shows most places to two or three photos of an altitude, too few to tell where a
surface is: a minute of training ends 5 dB lower on held-out photos than with four flights."""
CLEARANCE = 0.9
"""No surface is closer to a camera, metres."""
_RING_PHOTOS = 8
_CLOSEUP_PHOTOS = 10


def natural_count(size: int) -> int:
    """How many photos cover a town of that size: ``PASSES`` flights over it."""
    return PASSES * _per_flight(size)


def _per_flight(size: int) -> int:
    blocks = size * size
    aerial = sum(4 * n * n for n in _grids(size))
    return _RING_PHOTOS + aerial + (6 + 4) * blocks + 4 * size * (size + 1) + _CLOSEUP_PHOTOS * _clusters(size)


def plan_flight(
    town: Town, rays: RayCaster, count: int, seed: int
) -> tuple[Float32[np.ndarray, "p 3 4"], Float32[np.ndarray, "p"]]:
    """Poses of ``count`` photos (camera to world, OpenGL axes, metres) and how far each is from what it looks at.

    A camera that would be inside or right in front of something is moved until it is free.
    """
    passes = -(-count // _per_flight(town.size))
    stages = [[shot for k in range(passes) for shot in stage(town, k)] for stage in _STAGES]
    quotas = _shares([len(s) for s in stages], count)
    rng = np.random.default_rng([seed, town.size, 1])
    shots = []
    for stage, quota in zip(stages, quotas):
        for place, target in stage[:quota]:
            place = place + rng.uniform(-0.03, 0.03, 3) * np.linalg.norm(place - target)
            shots.append(_free(town, rays, place, target))
    poses = np.stack([look_at(place, target) for place, target in shots])
    _, distance = rays.cast(poses[:, :, 3], -poses[:, :, 2])
    return poses, distance


def look_at(place: Float32[np.ndarray, "3"], target: Float32[np.ndarray, "3"]) -> Float32[np.ndarray, "3 4"]:
    """Camera to world (x right, y up, z backwards) with a level horizon; looking straight down, north is up."""
    backward = (place - target) / np.linalg.norm(place - target)
    up = np.array([0.0, 0.0, 1.0]) if abs(backward[2]) < 0.999 else np.array([0.0, 1.0, 0.0])
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward, place], -1).astype(np.float32)


def _shares(lengths: list[int], count: int) -> list[int]:
    """``count`` split in proportion to ``lengths``, at least one each, by the largest remainders."""
    exact = np.array(lengths) * (count / sum(lengths))
    quotas = np.maximum(np.floor(exact).astype(int), 1)
    order = np.argsort(np.floor(exact) - exact, kind="stable")
    for k in range(len(lengths) * 2):
        missing = count - quotas.sum()
        stage = order[k % len(lengths)]
        if missing > 0 and quotas[stage] < lengths[stage]:
            quotas[stage] += 1
        elif missing < 0 and quotas[order[-1 - k % len(lengths)]] > 1:
            quotas[order[-1 - k % len(lengths)]] -= 1
    return quotas.tolist()


def _around(target: np.ndarray, distance: float, azimuth: float, elevation: float) -> Shot:
    """A camera at that distance from the target; angles in degrees."""
    a, e = np.radians(azimuth), np.radians(elevation)
    offset = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    return target + distance * offset, target


def _centre_first(places: np.ndarray) -> np.ndarray:
    return places[np.argsort(np.round(np.linalg.norm(places[:, :2], axis=-1), 3), kind="stable")]


def _grids(size: int) -> list[int]:
    """Cells per side of the aerial grids, coarse to fine: the last has one cell per block."""
    grids = [size]
    while grids[0] >= 4:
        grids.insert(0, -(-grids[0] // 2))
    return grids


def _clusters(size: int) -> int:
    return max(1, size * size // 2)


def _ring(town: Town, k: int) -> Iterator[Shot]:
    """Around the whole town, at two heights."""
    for i in range(_RING_PHOTOS):
        # Steps of 3/8 of a circle: any first few of them already look from all sides.
        azimuth = 360 / _RING_PHOTOS * (3 * i % _RING_PHOTOS) + 11 * k
        yield _around(np.zeros(3), 2.7 * town.half_side + 15, azimuth, (32, 56)[i % 2])


def _aerial(town: Town, k: int) -> Iterator[Shot]:
    """Over every cell of every grid: straight down and from three sides."""
    for n in _grids(town.size):
        cell = 2 * town.half_side / n
        at = (np.arange(n) - (n - 1) / 2) * cell
        x, y = np.meshgrid(at, at, indexing="ij")
        for centre in _centre_first(np.stack([x.reshape(-1), y.reshape(-1), np.full(n * n, 2.0)], -1)):
            yield _around(centre, 1.15 * cell, 17 * k - 90, 89.99)
            for azimuth in (45, 165, 285):
                yield _around(centre, 1.25 * cell, azimuth + 23 * k, 50)


def _roofs(town: Town, k: int) -> Iterator[Shot]:
    """Over the roofs of every block, looking across them."""
    for block in _block_targets(town, 4.0):
        for azimuth in (20, 80, 140, 200, 260, 320):
            side = np.radians(azimuth + 180 + 30 * k)
            yield _around(block + 7 * np.array([np.cos(side), np.sin(side), 0]), 28, azimuth + 30 * k, 42)


def _gardens(town: Town, k: int) -> Iterator[Shot]:
    """Low over each corner of every block, looking at the houses."""
    for block in _block_targets(town, 2.5):
        for azimuth in (55, 125, 235, 305):
            inner = block + np.array(
                [np.sign(np.cos(np.radians(azimuth))) * 9, np.sign(np.sin(np.radians(azimuth))) * 10, 0]
            )
            yield _around(inner, 19, azimuth + 15 * k, 36)


def _streets(town: Town, k: int) -> Iterator[Shot]:
    """Along the streets at the height of the first floor, both ways, looking aslant at the houses of either side."""
    streets = (np.arange(town.size + 1) - town.size / 2) * BLOCK
    blocks = (np.arange(town.size) - (town.size - 1) / 2) * BLOCK
    pairs = np.stack([x.reshape(-1) for x in np.meshgrid(streets, blocks, indexing="ij")], -1)
    for across, along in _centre_first(pairs):
        for axis in (0, 1):
            for way in (1, -1):
                # Beyond the outermost streets there is nothing to look at.
                side = -np.sign(across) if abs(across) > town.half_side - 1 else way
                place = np.array([along - way * (14 - 3 * (k % 3)), across - 0.6 * side, 3.2 + 0.8 * (k % 2)])
                target = np.array([along - way * 2, across + 8.0 * side, 2.4])
                yield (place, target) if axis == 0 else (place[[1, 0, 2]], target[[1, 0, 2]])


def _closeups(town: Town, k: int) -> Iterator[Shot]:
    """Facades from 2.2 to 3.4 metres: two rows of five photos that overlap, in front of each chosen house."""
    facades = town.facades
    order = np.argsort(np.linalg.norm(facades.foot, axis=-1), kind="stable")
    chosen = order[:: max(1, len(order) // (2 * _clusters(town.size)))][: _clusters(town.size)]
    for house in chosen:
        outward = facades.outward[house].astype(float)
        right = np.cross([0, 0, 1], outward)
        for i in range(_CLOSEUP_PHOTOS):
            column, row = i // 2 - 2, i % 2
            target = facades.foot[house] + right * (0.45 * column + 0.2 * k) + np.array([0, 0, 1.4 + 0.6 * row])
            distance = 2.2 + 0.3 * ((i + k) % 5)
            sideways = 0.7 * np.sin(2.4 * i + k)
            yield target + outward * distance + right * sideways + np.array([0, 0, 0.3 - 0.3 * row]), target


_STAGES = (_ring, _aerial, _roofs, _gardens, _streets, _closeups)


def _block_targets(town: Town, height: float) -> np.ndarray:
    centres = _centre_first(block_centres(town.size).astype(float))
    return np.concatenate([centres, np.full((len(centres), 1), height)], -1)


def _sphere_directions() -> Float32[np.ndarray, "96 3"]:
    """Directions spread evenly over the sphere (Fibonacci lattice)."""
    i = np.arange(96) + 0.5
    z = 1 - 2 * i / 96
    a = np.pi * (1 + 5**0.5) * i
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(a), r * np.sin(a), z], -1).astype(np.float32)


_SPHERE = _sphere_directions()


def is_free(town: Town, rays: RayCaster, place: Float32[np.ndarray, "3"]) -> bool:
    """Is the place outside of everything, with nothing within ``CLEARANCE``?"""
    triangle, distance = rays.cast(np.broadcast_to(place.astype(np.float32), _SPHERE.shape), _SPHERE)
    hit = triangle >= 0
    if (distance[hit] < CLEARANCE).any():
        return False
    surface = town.mesh.surface[triangle[hit]]
    behind = np.einsum("nd,nd->n", town.mesh.surfaces.normal[surface], _SPHERE[hit]) > 0
    leaves = town.mesh.surfaces.extent[surface, 0] == 0
    return (behind & ~leaves).mean() < 0.25


def _sees(rays: RayCaster, place: np.ndarray, target: np.ndarray) -> bool:
    """Is at least half of the way to the target free?"""
    _, share = rays.cast(place[None].astype(np.float32), (target - place)[None].astype(np.float32))
    return bool(share[0] > 0.5)


def _free(town: Town, rays: RayCaster, place: np.ndarray, target: np.ndarray) -> Shot:
    """The nearest of a few places beside and above the wished one from which the target can be seen."""
    side = np.cross(place - target, [0, 0, 1.0])
    side /= max(np.linalg.norm(side), 1e-9)
    distance = np.linalg.norm(place - target)
    for step in np.arange(0, 24) * max(0.3, 0.04 * distance):
        for offset in (np.array([0, 0, step]), side * step, -side * step):
            candidate = place + offset
            if is_free(town, rays, candidate) and _sees(rays, candidate, target):
                return candidate, target
    return place + np.array([0, 0, 25.0]), target
