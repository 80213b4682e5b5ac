"""What colour a point of a surface has: linear reflectance from the surface and the place on it, nothing stored."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32

from infnerf_ns.data.demo_scene.facade import GLASS, brick_wall, facade, plaster_wall
from infnerf_ns.data.demo_scene.ground import ground
from infnerf_ns.data.demo_scene.mesh import WINDOWS, Material, Surfaces
from infnerf_ns.data.demo_scene.noise import cells, hash01, sharpness, value_noise

TILE_WIDTH, TILE_LENGTH = 0.22, 0.32


def reflectance(
    surfaces: Surfaces,
    index: Int32[np.ndarray, "n"],
    position: Float32[np.ndarray, "n 3"],
    footprint: Float32[np.ndarray, "n"],
) -> Float32[np.ndarray, "n 3"]:
    """Linear reflectance in 0..1.

    Args:
        surfaces: the town's surface table.
        index: the surface that each point lies on.
        position: the points, metres.
        footprint: width of the sample there, metres. Patterns finer than that are replaced by their mean.
    """
    colour = np.zeros((len(index), 3), np.float32)
    material = surfaces.material[index]
    for kind, texture in _TEXTURES.items():
        chosen = np.nonzero(material == kind)[0]
        if len(chosen):
            rows = index[chosen]
            s = Surfaces(**{name: column.take(rows, axis=0) for name, column in vars(surfaces).items()})
            offset = position.take(chosen, axis=0) - s.origin
            uv = np.stack([np.einsum("nd,nd->n", offset, s.u_axis), np.einsum("nd,nd->n", offset, s.v_axis)], -1)
            colour[chosen] = texture(s, uv, footprint[chosen], offset)
    return np.clip(colour, 0, 1, out=colour)


def _roof_tiles(s, uv, footprint, offset):
    u, v = uv[:, 0], uv[:, 1]
    row, fv = cells(v * np.float32(1 / TILE_LENGTH))
    column, fu = cells(u * np.float32(1 / TILE_WIDTH) + 0.5 * (row & 1))
    shown = sharpness(footprint, TILE_WIDTH)
    shade = 0.8 + 0.6 * (0.5 + (hash01(column, row, s.seed) - 0.5) * shown)
    shade *= 0.7 + (0.2 + (0.4 * fv - 0.2) * shown)
    shade *= 1 - 0.35 * (0.35 + (4 * (fu - 0.5) ** 2 - 0.35) * shown)
    shade *= 0.85 + 0.3 * value_noise(u * 0.5, v * 0.5, s.seed)
    colour = s.colour * (1.15 * shade)[:, None]
    moss = value_noise(u * 0.9 + 5, v * 1.3, s.seed)
    colour += (np.float32([0.12, 0.13, 0.05]) - colour) * (0.5 * np.clip(moss * 4 - 2.9, 0, 1))[:, None]
    ridge = s.extent[:, 1] - v < 0.16
    colour[ridge] = (s.colour * 0.8)[ridge]
    return _skylight(s, u, v, colour)


def _skylight(s, u, v, colour):
    has = (s.seed & np.uint32(6)) == 2
    x = np.abs(u - s.extent[:, 0] * 0.35)
    y = np.abs(v - s.extent[:, 1] * 0.55)
    frame = has & (x < 0.5) & (y < 0.7)
    colour[frame] = np.float32([0.2, 0.2, 0.21])
    colour[frame & (x < 0.42) & (y < 0.62)] = GLASS * 2
    return colour


def _gravel(s, uv, footprint, offset):
    u, v = uv[:, 0], uv[:, 1]
    shade = 0.8 + 0.4 * value_noise(u * 0.6, v * 0.6, s.seed)
    ix, _ = cells(u * 18)
    iy, _ = cells(v * 18)
    shade += 0.5 * (hash01(ix, iy, s.seed) - 0.5) * sharpness(footprint, 0.06)
    colour = s.colour * shade[:, None]
    seam = (np.mod(u, 2.4) < 0.06) | (np.minimum(np.minimum(u, v), np.minimum(*(s.extent.T - uv.T))) < 0.25)
    colour[seam] *= 0.55
    return colour


def _paving(s, uv, footprint, offset):
    row, fv = cells(uv[:, 1] / 0.2)
    column, fu = cells(uv[:, 0] / 0.2 + 0.5 * (row & 1))
    shade = 1 + 0.5 * (hash01(column, row, s.seed) - 0.5) * sharpness(footprint, 0.2)
    joint = ((fu < 0.08) | (fv < 0.08)).astype(np.float32)
    shade *= 1 - 0.5 * (0.15 + (joint - 0.15) * sharpness(footprint, 0.15))
    return s.colour * shade[:, None]


def _leaves(s, uv, footprint, offset):
    """Leaves in three dimensions: the texture of a crown has no seam. A hedge uses its own two axes."""
    crown = s.extent[:, 0] == 0
    x = np.where(crown, offset[:, 0] + 0.37 * offset[:, 2], uv[:, 0])
    y = np.where(crown, offset[:, 1] + 0.93 * offset[:, 2], uv[:, 1])
    shade = 1 + 0.9 * (value_noise(x * 3.5, y * 3.5, s.seed) - 0.5) * sharpness(footprint, 0.3)
    shade += 1.1 * (value_noise(x * 13, y * 13, s.seed) - 0.5) * sharpness(footprint, 0.08)
    return s.colour * shade[:, None]


def _bark(s, uv, footprint, offset):
    shade = 1 + 0.9 * (value_noise(uv[:, 0] * 40, uv[:, 1] * 6, s.seed) - 0.5) * sharpness(footprint, 0.03)
    return s.colour * shade[:, None]


def _car(s, uv, footprint, offset):
    u, v = uv[:, 0], uv[:, 1]
    length, height = s.extent[:, 0], s.extent[:, 1]
    colour = s.colour.copy()
    cabin = ((s.flags & WINDOWS) > 0) & (np.abs(v / height - 0.55) < 0.33)
    glass = cabin & (np.minimum(u, length - u) > 0.09) & (np.abs(u - length / 2) > 0.05)
    colour[glass] = GLASS
    body_side = ((s.flags & WINDOWS) == 0) & (length > 4) & (height < 1)
    for wheel in (0.85, 3.35):
        r2 = (u - wheel) ** 2 + (v - 0.2) ** 2
        colour[body_side & (r2 < 0.1)] = 0.02
        colour[body_side & (r2 < 0.035)] = 0.35
    colour[body_side & (np.abs(np.abs(u - 2.1) - 0.75) < 0.012) & (v > 0.15)] *= 0.4
    body_end = ((s.flags & WINDOWS) == 0) & (length < 4) & (height < 1)
    colour[body_end & (np.minimum(u, length - u) < 0.35) & (np.abs(v - 0.5) < 0.09)] = np.float32([0.8, 0.75, 0.6])
    colour[body_end & (np.abs(u - length / 2) < 0.26) & (np.abs(v - 0.3) < 0.06)] = 0.7
    return colour


_TEXTURES = {
    Material.GROUND: lambda s, uv, footprint, offset: ground(s, uv, footprint),
    Material.BRICK: lambda s, uv, footprint, offset: facade(s, uv, footprint, brick_wall),
    Material.PLASTER: lambda s, uv, footprint, offset: facade(s, uv, footprint, plaster_wall),
    Material.ROOF_TILES: _roof_tiles,
    Material.GRAVEL: _gravel,
    Material.PAVING: _paving,
    Material.LEAVES: _leaves,
    Material.BARK: _bark,
    Material.CAR: _car,
}
