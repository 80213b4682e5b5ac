"""The texture of the ground: asphalt with markings, kerbs, sidewalks, lawns, and fields around the town."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from infnerf_ns.data.demo_scene.noise import cells, hash01, sharpness, value_noise
from infnerf_ns.data.demo_scene.town import BLOCK, ROAD_HALF, SIDEWALK_HALF

_PAINT = np.float32([0.62, 0.61, 0.57])
_KERB = np.float32([0.4, 0.39, 0.37])
_GROWTH = np.float32([[0.1, 0.15, 0.04], [0.2, 0.17, 0.06], [0.07, 0.13, 0.035], [0.15, 0.18, 0.05]])
_FIELD = 38.0
_SLAB = 0.5


def ground(s, uv, footprint) -> Float32[np.ndarray, "n 3"]:
    """Reflectance of the ground. Coordinates start in the middle of a crossing; ``s.extent`` is the town's size."""
    u, v = uv[:, 0], uv[:, 1]
    seed = s.seed
    du = u - np.round(u / BLOCK) * np.float32(BLOCK)
    dv = v - np.round(v / BLOCK) * np.float32(BLOCK)
    edge = SIDEWALK_HALF
    in_town = (np.minimum(u, v) > -edge) & (np.maximum(u - s.extent[:, 0], v - s.extent[:, 1]) < edge)
    across = np.minimum(np.abs(du), np.abs(dv))
    colour = np.empty((len(u), 3), np.float32)
    for where, texture in (
        (~in_town, _fields),
        (in_town & (across >= SIDEWALK_HALF), _lawn),
        (in_town & (across >= ROAD_HALF) & (across < SIDEWALK_HALF), _sidewalk),
        (in_town & (across < ROAD_HALF), _road),
    ):
        index = np.nonzero(where)[0]
        if len(index):
            colour[index] = texture(*(x[index] for x in (u, v, du, dv, seed, footprint)))
    return colour


def _blades(u, v, seed, footprint):
    """Brightness of grass from tufts down to blades, its mean 1."""
    shade = 1 + 0.5 * (value_noise(u * 0.45, v * 0.45, seed) - 0.5)
    shade += 0.5 * (value_noise(u * 2.7, v * 2.7, seed) - 0.5) * sharpness(footprint, 0.4)
    return shade + 0.8 * (value_noise(u * 18, v * 18, seed) - 0.5) * sharpness(footprint, 0.06)


def _lawn(u, v, du, dv, seed, footprint):
    dry = value_noise(u * 0.15 + 3, v * 0.15, seed)[:, None]
    green = np.float32([0.075, 0.15, 0.035]) * (1 - dry) + np.float32([0.16, 0.17, 0.055]) * dry
    return green * _blades(u, v, seed, footprint)[:, None]


def _fields(u, v, du, dv, seed, footprint):
    bend = 9 * (value_noise(u / 60, v / 60, seed) - 0.5)
    ix, fu = cells((u + bend) / _FIELD)
    iy, fv = cells((v - bend) / _FIELD)
    which = hash01(ix, iy, seed)
    colour = _GROWTH[(which * 4).astype(np.int32)]
    rows = np.mod(np.where(which < 0.5, u, v) * 0.8, 1) - 0.5
    shade = 1 + 0.3 * rows * sharpness(footprint, 1.2)
    shade *= 0.75 + 0.5 * value_noise(u / 12, v / 12, seed)
    border = np.minimum(np.minimum(fu, 1 - fu), np.minimum(fv, 1 - fv)) * _FIELD
    shade[border < 0.6] *= 0.55
    return colour * (shade * _blades(u, v, seed, footprint))[:, None]


def _sidewalk(u, v, du, dv, seed, footprint):
    ix, fu = cells(u / _SLAB)
    iy, fv = cells(v / _SLAB)
    shown = sharpness(footprint, _SLAB)
    shade = 1 + 0.3 * (hash01(ix, iy, seed) - 0.5) * shown
    joint = ((fu < 0.04) | (fv < 0.04)).astype(np.float32)
    shade *= 1 - 0.4 * (0.08 + (joint - 0.08) * sharpness(footprint, 0.1))
    shade *= 1 + 0.25 * (value_noise(u * 30, v * 30, seed) - 0.5) * sharpness(footprint, 0.035)
    colour = np.float32([0.33, 0.31, 0.285]) * shade[:, None]
    kerb = np.minimum(np.abs(du), np.abs(dv)) < ROAD_HALF + 0.14
    colour[kerb] = _KERB
    return colour


def _road(u, v, du, dv, seed, footprint):
    shade = 0.75 + 0.5 * value_noise(u * 0.35, v * 0.35, seed)
    shade += 0.3 * (value_noise(u * 2, v * 2, seed) - 0.5) * sharpness(footprint, 0.5)
    shade += 0.7 * (value_noise(u * 28, v * 28, seed) - 0.5) * sharpness(footprint, 0.035)
    repaired = hash01(np.floor(u / 3.1).astype(np.int32), np.floor(v / 2.3).astype(np.int32), seed) > 0.9
    shade[repaired] *= 0.7
    colour = np.float32([0.125, 0.125, 0.13]) * shade[:, None]
    along_v = np.abs(du) < np.abs(dv)
    across, along = np.where(along_v, du, dv), np.where(along_v, dv, du)
    from_crossing = np.abs(along) - ROAD_HALF
    dashes = (np.abs(across) < 0.07) & (from_crossing > 4) & (np.mod(along, 3) < 1.5)
    lines = (np.abs(np.abs(across) - 2.55) < 0.05) & (from_crossing > 4)
    zebra = (from_crossing > 0.9) & (from_crossing < 2.9) & (np.mod(across + 0.25, 1) < 0.5)
    worn = 0.55 + 0.45 * value_noise(u * 6, v * 6, seed)
    paint = dashes | lines | zebra
    colour[paint] += (_PAINT - colour[paint]) * worn[paint, None]
    return colour
