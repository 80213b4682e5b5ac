"""The layout of the town: square blocks between streets, six lots a block, a house or a garden on each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt32

from infnerf_ns.data.demo_scene.greenery import add_hedges, add_trees
from infnerf_ns.data.demo_scene.houses import STOREY, UP, Houses, build_houses, door_position
from infnerf_ns.data.demo_scene.mesh import WINDOWS, Material, Mesh, MeshBuilder

BLOCK = 44.0
"""From the middle of one street to the middle of the next, metres."""
ROAD_HALF = 2.75
SIDEWALK_HALF = 4.0
"""From the middle of the street to the end of the sidewalk: there the lots begin."""
COUNTRYSIDE = 300.0
"""How far the ground goes on around the town, at least."""

_LOT_WIDTH = (BLOCK - 2 * SIDEWALK_HALF) / 3
_HALF_INNER = BLOCK / 2 - SIDEWALK_HALF

_PLASTER = np.float32([[0.62, 0.54, 0.38], [0.66, 0.63, 0.57], [0.55, 0.34, 0.22], [0.42, 0.5, 0.5], [0.63, 0.48, 0.2]])
_BRICKS = np.float32([[0.33, 0.12, 0.075], [0.4, 0.2, 0.11], [0.24, 0.1, 0.08], [0.45, 0.33, 0.2]])
_TILES = np.float32([[0.4, 0.12, 0.06], [0.3, 0.1, 0.065], [0.12, 0.12, 0.135], [0.25, 0.16, 0.11]])
_PAINTS = np.float32([[0.03, 0.12, 0.05], [0.02, 0.06, 0.2], [0.3, 0.03, 0.03], [0.18, 0.09, 0.03], [0.05, 0.2, 0.22]])
_LEAVES = np.float32([[0.07, 0.15, 0.03], [0.1, 0.17, 0.035], [0.05, 0.11, 0.035], [0.16, 0.15, 0.035]])
_CARS = np.float32([[0.6, 0.6, 0.62], [0.4, 0.03, 0.03], [0.03, 0.07, 0.3], [0.04, 0.04, 0.05], [0.1, 0.25, 0.12]])


@dataclass
class Facades:
    """The fronts of the houses, for the drone to look at."""

    foot: Float32[np.ndarray, "n 3"]
    """Middle of the lower edge."""
    outward: Float32[np.ndarray, "n 3"]
    width: Float32[np.ndarray, "n"]
    height: Float32[np.ndarray, "n"]


@dataclass
class Town:
    """The geometry; ``size`` is the number of blocks per side."""

    mesh: Mesh
    facades: Facades
    size: int

    @property
    def half_side(self) -> float:
        """Half the side of the built-up square, metres."""
        return self.size * BLOCK / 2


def block_centres(size: int) -> Float32[np.ndarray, "b 2"]:
    """The middles of the blocks."""
    at = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(BLOCK)
    x, y = np.meshgrid(at, at, indexing="ij")
    return np.stack([x.reshape(-1), y.reshape(-1)], -1).astype(np.float32)


def build_town(size: int, seed: int) -> Town:
    """The whole town; the same for the same size and seed."""
    rng = np.random.default_rng([seed, size])
    builder = MeshBuilder()
    lots = _Lots(size, rng)
    houses = _choose_houses(lots, rng)
    built = ~lots.garden
    built_houses = houses.take(built)
    build_houses(builder, built_houses)
    _add_paths(builder, lots, houses, built)
    _add_greenery(builder, lots, houses, rng)
    _add_cars(builder, size, rng)
    _add_ground(builder, size, seed)
    facades = Facades(
        foot=built_houses.centre + built_houses.front * built_houses.size[:, 1:] / 2,
        outward=built_houses.front,
        width=built_houses.size[:, 0],
        height=built_houses.wall_height,
    )
    return Town(builder.build(), facades, size)


class _Lots:
    """Six lots per block: three face the street in the north, three the one in the south."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        centres = block_centres(size)
        column, row = np.meshgrid([-1, 0, 1], [-1, 1], indexing="ij")
        column, row = column.reshape(-1), row.reshape(-1)
        x = centres[:, None, 0] + column * _LOT_WIDTH
        self.count = x.size
        self.x = x.reshape(-1).astype(np.float32)
        self.middle_y = np.repeat(centres[:, 1], 6)
        self.row = np.tile(row, len(centres)).astype(np.float32)
        self.has_right_neighbour = np.tile(column < 1, len(centres))
        kind = rng.random(self.count)
        self.garden = kind < 0.1
        self.garden[np.argmax(kind)] = False
        self.tower = (kind >= 0.1) & (kind < 0.22)

    def at(self, x: Float32[np.ndarray, "n"], depth: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n 3"]:
        """Points on the ground: x metres right of each lot's middle, ``depth`` metres behind its sidewalk."""
        y = self.middle_y + self.row * (_HALF_INNER - depth)
        return np.stack([self.x + x, y, np.zeros_like(y)], -1).astype(np.float32)

    def seeds(self, rng: np.random.Generator) -> UInt32[np.ndarray, "n"]:
        """A fresh random integer for each lot."""
        return rng.integers(0, 2**32, self.count, dtype=np.uint32)


def _pick(rng: np.random.Generator, palette: Float32[np.ndarray, "p 3"], count: int) -> Float32[np.ndarray, "n 3"]:
    shade = rng.uniform(0.85, 1.15, (count, 1)).astype(np.float32)
    return palette[rng.integers(0, len(palette), count)] * shade


def _uniform(rng: np.random.Generator, low: float, high: float, count: int) -> Float32[np.ndarray, "n"]:
    return rng.uniform(low, high, count).astype(np.float32)


def _choose_houses(lots: _Lots, rng: np.random.Generator) -> Houses:
    """One house per lot; those of the gardens are not built."""
    n = lots.count
    size = np.stack([_uniform(rng, 7.6, 9.6, n), _uniform(rng, 8.0, 10.0, n)], -1)
    setback = _uniform(rng, 2.2, 3.6, n)
    storeys = np.where(lots.tower, rng.integers(3, 5, n), rng.integers(1, 3, n))
    front = np.zeros((n, 3), np.float32)
    front[:, 1] = lots.row
    brick = rng.random(n) < 0.55
    return Houses(
        centre=lots.at(_uniform(rng, -0.8, 0.8, n), setback + size[:, 1] / 2),
        front=front,
        size=size,
        wall_height=(storeys * STOREY + 0.3).astype(np.float32),
        gabled=~lots.tower,
        ridge_along_front=rng.random(n) < 0.55,
        slope=_uniform(rng, 0.7, 1.1, n),
        brick=brick,
        wall_colour=np.where(brick[:, None], _pick(rng, _BRICKS, n), _pick(rng, _PLASTER, n)),
        roof_colour=_pick(rng, _TILES, n),
        accent=_pick(rng, _PAINTS, n),
        seed=lots.seeds(rng),
    )


def _add_paths(builder: MeshBuilder, lots: _Lots, houses: Houses, built: Bool[np.ndarray, "n"]) -> None:
    """A paved path from each front door to the sidewalk, 2 cm above the lawn."""
    right = np.cross(UP, houses.front)
    width = houses.size[:, :1]
    door = houses.centre + houses.front * houses.size[:, 1:] / 2
    setback = np.abs(door[:, 1:2] - lots.at(np.float32(0), np.float32(0))[:, 1:2])
    corner = door + right * (door_position(width[:, 0])[:, None] - width / 2 + 0.7) + UP * 0.02
    builder.add_rectangles(
        Material.PAVING, corner[built], (-right * np.float32(1.4))[built], (houses.front * setback)[built],
        np.float32([0.36, 0.33, 0.29]), houses.accent[built], houses.seed[built],
    )  # fmt: skip


def _add_greenery(builder: MeshBuilder, lots: _Lots, houses: Houses, rng: np.random.Generator) -> None:
    n = lots.count
    house_end = _HALF_INNER - (houses.centre[:, 1] - lots.middle_y) * lots.row + houses.size[:, 1] / 2
    spots = [
        # (where, how likely beside a house, how likely in a garden lot, smallest and largest radius)
        (lots.at(_uniform(rng, -4, 4, n), (house_end + _HALF_INNER) / 2), 0.5, 1.0, 0.9, 1.3),
        (lots.at(np.full(n, -_LOT_WIDTH / 2, np.float32), _uniform(rng, 0.9, 1.3, n)), 0.45, 0.9, 0.9, 1.2),
        (lots.at(_uniform(rng, -4, 4, n), _uniform(rng, 3, 6, n)), 0.0, 1.0, 1.4, 2.2),
        (lots.at(_uniform(rng, -4, 4, n), _uniform(rng, 9, 12, n)), 0.0, 1.0, 1.4, 2.2),
    ]
    for foot, beside_house, in_garden, smallest, largest in spots:
        here = rng.random(n) < np.where(lots.garden, in_garden, beside_house)
        radius = _uniform(rng, smallest, largest, n)
        colour = _pick(rng, _LEAVES, n)
        add_trees(builder, foot[here], radius[here], colour[here], lots.seeds(rng)[here])
    between = lots.has_right_neighbour & (rng.random(n) < 0.5)
    depth = np.float32([4.5, _HALF_INNER - 0.5])
    foot = lots.at(np.full(n, _LOT_WIDTH / 2, np.float32), np.full(n, depth.mean(), np.float32))
    toward = np.tile(np.float32([0, 1, 0]), (n, 1))
    length = np.full(n, depth[1] - depth[0], np.float32)
    add_hedges(builder, foot[between], toward[between], length[between], lots.seeds(rng)[between])
    behind = (lots.row < 0) & (rng.random(n) < 0.6)
    foot = lots.at(np.zeros(n, np.float32), np.full(n, _HALF_INNER, np.float32))
    toward = np.tile(np.float32([1, 0, 0]), (n, 1))
    add_hedges(
        builder, foot[behind], toward[behind], np.full(n, _LOT_WIDTH - 1.5, np.float32)[behind], lots.seeds(rng)[behind]
    )


def _add_cars(builder: MeshBuilder, size: int, rng: np.random.Generator) -> None:
    """Cars parked at the kerbs of the streets in both directions, none near the crossings."""
    streets = (np.arange(size + 1, dtype=np.float32) - size / 2) * np.float32(BLOCK)
    blocks = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * np.float32(BLOCK)
    slots = np.float32([-11.0, -5.0, 2.0, 9.0])
    across, along = (x.reshape(-1) for x in np.meshgrid(streets, (blocks[:, None] + slots).reshape(-1), indexing="ij"))
    for turned in (False, True):
        n = len(across)
        here = rng.random(n) < 0.35
        side = np.where(rng.random(n) < 0.5, np.float32(1.85), np.float32(-1.85))
        paint, seed = _pick(rng, _CARS, n)[here], rng.integers(0, 2**32, n, dtype=np.uint32)[here]
        place = (along + _uniform(rng, -1, 1, n), across + side)
        foot = np.stack([*(place if turned else place[::-1]), np.full(n, 0.12, np.float32)], -1)[here]
        axis = np.tile(np.float32([1, 0, 0] if turned else [0, 1, 0]), (len(foot), 1))
        body = np.tile(np.float32([4.2, 1.65, 0.75]), (len(foot), 1))
        cabin = np.tile(np.float32([2.3, 1.45, 0.6]), (len(foot), 1))
        builder.add_boxes(Material.CAR, foot, axis, body, paint, paint, seed)
        builder.add_boxes(Material.CAR, foot + UP * body[:, 2:] - axis * np.float32(0.2), axis, cabin, paint, paint,
                          seed, WINDOWS)  # fmt: skip


def _add_ground(builder: MeshBuilder, size: int, seed: int) -> None:
    """One square, far larger than the town. Its texture coordinates start in the middle of the south-west crossing."""
    half = size * BLOCK / 2
    reach = np.float32(half + max(COUNTRYSIDE, 2 * half))
    low, high = -reach, reach
    corners = np.float32([[low, low, 0], [high, low, 0], [high, high, 0], [low, high, 0]])
    grass = np.float32([[0.09, 0.15, 0.04]])
    builder.add(
        corners[None, [[0, 1, 2], [0, 2, 3]]], Material.GROUND, np.float32([[-half, -half, 0]]),
        np.float32([1, 0, 0]), np.float32([0, 1, 0]), np.float32([2 * half, 2 * half]), grass, grass,
        np.uint32([seed % 2**32]),
    )  # fmt: skip
