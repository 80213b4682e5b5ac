"""Houses: four walls with gables or a parapet, a roof, a chimney; many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt32

from infnerf_ns.data.demo_scene.mesh import DOOR, WINDOWS, Material, MeshBuilder

STOREY = 2.8
"""Height of one storey, metres."""
UP = np.array([0.0, 0.0, 1.0], np.float32)
EAVES_OVERHANG = 0.45
PARAPET = 0.6


@dataclass
class Houses:
    """n houses to build. ``front`` is the horizontal unit vector out of the front door."""

    centre: Float32[np.ndarray, "n 3"]
    front: Float32[np.ndarray, "n 3"]
    size: Float32[np.ndarray, "n 2"]
    """Width of the front, depth."""
    wall_height: Float32[np.ndarray, "n"]
    gabled: Bool[np.ndarray, "n"]
    """False: a flat roof."""
    ridge_along_front: Bool[np.ndarray, "n"]
    slope: Float32[np.ndarray, "n"]
    """Rise of the roof per metre."""
    brick: Bool[np.ndarray, "n"]
    """False: plaster."""
    wall_colour: Float32[np.ndarray, "n 3"]
    roof_colour: Float32[np.ndarray, "n 3"]
    accent: Float32[np.ndarray, "n 3"]
    seed: UInt32[np.ndarray, "n"]

    def take(self, which: Bool[np.ndarray, "n"]) -> "Houses":
        """The chosen houses."""
        return Houses(**{name: column[which] for name, column in vars(self).items()})


def window_columns(width: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """How many windows stand side by side in a facade of that width."""
    return np.maximum(np.floor((width - 1.0) / 2.4), 1)


def door_position(width: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """Where along the facade the middle of the front door is, metres from its left end."""
    columns = window_columns(width)
    return (np.floor(columns / 2) + 0.5) * width / columns


def build_houses(builder: MeshBuilder, houses: Houses) -> None:
    """Add walls, roofs and chimneys."""
    for brick in (True, False):
        material = Material.BRICK if brick else Material.PLASTER
        for gabled in (True, False):
            _add_walls(builder, houses.take((houses.brick == brick) & (houses.gabled == gabled)), material, gabled)
    _add_gabled_roofs(builder, houses.take(houses.gabled))
    _add_flat_roofs(builder, houses.take(~houses.gabled))


def _sides(houses: Houses):
    """Of each wall: outward normal, half extent along it, width, is it the front, does a ridge end in it."""
    right = np.cross(UP, houses.front)
    half_width, half_depth = houses.size[:, :1] / 2, houses.size[:, 1:] / 2
    along = houses.ridge_along_front
    yield houses.front, half_depth, 2 * half_width, True, ~along
    yield -houses.front, half_depth, 2 * half_width, False, ~along
    yield right, half_width, 2 * half_depth, False, along
    yield -right, half_width, 2 * half_depth, False, along


def _add_walls(builder: MeshBuilder, houses: Houses, material: Material, gabled: bool) -> None:
    height = houses.wall_height[:, None]
    top = height if gabled else height + PARAPET
    for outward, half, width, is_front, ridge_ends in _sides(houses):
        u = np.cross(UP, outward)
        origin = houses.centre + outward * half - u * width / 2
        extent = np.concatenate([width, height], -1)
        look = (houses.wall_colour, houses.accent, houses.seed)
        flags = WINDOWS | (DOOR if is_front else 0)
        builder.add_rectangles(material, origin, u * width, UP * top, *look, flags, extent)
        if gabled:
            c, d = origin + u * width + UP * top, origin + UP * top
            peak = (c + d) / 2 + UP * (width / 2 * houses.slope[:, None])
            gable = np.stack([d, c, peak], 1)[:, None]
            builder.add(gable[ridge_ends], material, *(x[ridge_ends] for x in (origin, u)), UP,
                        *(x[ridge_ends] for x in (extent, *look)))  # fmt: skip


def _add_gabled_roofs(builder: MeshBuilder, houses: Houses) -> None:
    right = np.cross(UP, houses.front)
    along = houses.ridge_along_front[:, None]
    ridge = np.where(along, right, houses.front)
    across = np.where(along, houses.front, right)
    half_length = np.where(along, houses.size[:, :1], houses.size[:, 1:]) / 2 + EAVES_OVERHANG
    half_span = np.where(along, houses.size[:, 1:], houses.size[:, :1]) / 2
    slope = houses.slope[:, None]
    base = houses.centre + UP * houses.wall_height[:, None]
    reach = half_span + EAVES_OVERHANG
    for side in (1.0, -1.0):
        eaves = base + side * across * reach - UP * (EAVES_OVERHANG * slope)
        v_edge = -side * across * reach + UP * (slope * reach)
        outward = side * across * slope + UP
        u = np.cross(v_edge, outward)
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        builder.add_rectangles(
            Material.ROOF_TILES, eaves - u * half_length, u * (2 * half_length), v_edge,
            houses.roof_colour, houses.accent, houses.seed + np.uint32(side > 0),
        )  # fmt: skip
    rise = houses.slope * half_span[:, 0]
    foot = base + ridge * half_length * 0.5 + across * 0.5
    size = np.stack([np.full_like(rise, 0.7), np.full_like(rise, 0.7), rise + 0.7], -1)
    builder.add_boxes(Material.BRICK, foot, ridge, size, np.float32([0.3, 0.13, 0.09]), houses.accent, houses.seed)


def _add_flat_roofs(builder: MeshBuilder, houses: Houses) -> None:
    right = np.cross(UP, houses.front)
    width, depth = houses.size[:, :1], houses.size[:, 1:]
    base = houses.centre + UP * houses.wall_height[:, None]
    corner = base - right * width / 2 + houses.front * depth / 2
    builder.add_rectangles(
        Material.GRAVEL, corner, right * width, -houses.front * depth,
        np.float32([0.32, 0.31, 0.29]), houses.accent, houses.seed,
    )  # fmt: skip
    size = np.broadcast_to(np.float32([2.2, 1.6, 1.5]), (len(width), 3))
    lift = base + right * width * 0.2
    builder.add_boxes(Material.PLASTER, lift, right, size, np.float32([0.5, 0.5, 0.5]), houses.accent, houses.seed)
