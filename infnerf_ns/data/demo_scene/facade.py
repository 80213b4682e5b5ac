"""The texture of walls: bricks or plaster, a stone base, windows with frames, sills and shutters, a front door."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from infnerf_ns.data.demo_scene.houses import STOREY, window_columns
from infnerf_ns.data.demo_scene.mesh import DOOR, WINDOWS
from infnerf_ns.data.demo_scene.noise import cells, hash01, sharpness, value_noise

BRICK_LENGTH, BRICK_HEIGHT, MORTAR = 0.24, 0.075, 0.012
_MORTAR_COLOUR = np.float32([0.42, 0.39, 0.34])
_STONE = np.float32([0.36, 0.34, 0.31])
_FRAME = np.float32([0.72, 0.71, 0.68])
GLASS = np.float32([0.035, 0.055, 0.085])
_CURTAIN = np.float32([0.42, 0.38, 0.32])


def blend(
    colour: Float32[np.ndarray, "n 3"], over: Float32[np.ndarray, "..."], share: Float32[np.ndarray, "n"]
) -> Float32[np.ndarray, "n 3"]:
    """``colour`` where ``share`` is 0, ``over`` where it is 1."""
    return colour + (over - colour) * share[:, None]


def brick_wall(u, v, colour, seed, footprint) -> Float32[np.ndarray, "n 3"]:
    """Running bond: every brick has its own shade, mortar between them."""
    row, fv = cells(v * np.float32(1 / BRICK_HEIGHT))
    column, fu = cells(u * np.float32(1 / BRICK_LENGTH) + 0.5 * (row & 1))
    shown = sharpness(footprint, BRICK_HEIGHT)
    shade = 0.72 + 0.56 * (0.5 + (hash01(column, row, seed) - 0.5) * shown)
    mortar = (fv < MORTAR / BRICK_HEIGHT) | (fu < MORTAR / BRICK_LENGTH)
    mean = 1 - (1 - MORTAR / BRICK_HEIGHT) * (1 - MORTAR / BRICK_LENGTH)
    weather = 0.88 + 0.24 * value_noise(u * 0.6, v * 0.6, seed)
    return blend(colour * (shade * weather)[:, None], _MORTAR_COLOUR, mean + (mortar - np.float32(mean)) * shown)


def plaster_wall(u, v, colour, seed, footprint) -> Float32[np.ndarray, "n 3"]:
    """Rough plaster: stains, trowel marks and grains."""
    shade = 0.84 + 0.16 * value_noise(u * 0.7, v * 0.35, seed)
    shade += 0.22 * (value_noise(u * 5, v * 5, seed) - 0.5) * sharpness(footprint, 0.2)
    shade += 0.26 * (value_noise(u * 25, v * 25, seed) - 0.5) * sharpness(footprint, 0.04)
    return colour * shade[:, None]


def facade(s, uv, footprint, wall) -> Float32[np.ndarray, "n 3"]:
    """Reflectance at points of walls.

    Args:
        s: the rows of the surface table, one per point.
        uv: texture coordinates [n, 2], metres.
        footprint: width of the sample [n], metres.
        wall: :func:`brick_wall` or :func:`plaster_wall`.
    """
    u, v = uv[:, 0], uv[:, 1]
    width, height = s.extent[:, 0], s.extent[:, 1]
    colour = wall(u, v, s.colour, s.seed, footprint)
    detailed = (s.flags & WINDOWS) > 0
    if not detailed.any():
        return colour
    colour = _storey_bands(colour, v, height, detailed, footprint)
    columns = window_columns(width)
    pitch = width / columns
    column = np.clip(np.floor(u / pitch), 0, columns - 1)
    storey = np.floor(np.maximum(v - 0.3, 0) / STOREY)
    x = u - (column + 0.5) * pitch
    y = v - 0.3 - storey * STOREY
    door = ((s.flags & DOOR) > 0) & (storey == 0) & (column == np.floor(columns / 2))
    openings = detailed & (v < height) & (np.abs(x) < 1.15)
    window = np.nonzero(openings & ~door & (y > 0.75) & (y < 2.45))[0]
    if len(window):
        cell = hash01(column[window].astype(np.int32), storey[window].astype(np.int32), s.seed[window])
        colour[window] = _window(
            colour[window], x[window], y[window], cell, s.seed[window], s.accent[window], footprint[window]
        )
    doorway = np.nonzero(openings & door & (y < 2.3))[0]
    if len(doorway):
        colour[doorway] = _door(colour[doorway], x[doorway], y[doorway], s.accent[doorway], footprint[doorway])
    return colour


def _storey_bands(colour, v, height, detailed, footprint):
    base = detailed & (v < 0.42)
    colour[base] = _STONE
    line = np.abs(v - 0.3 - np.round((v - 0.3) / STOREY) * STOREY) < 0.07
    colour[detailed & line & (v > 1) & (v < height - 0.5)] = _STONE * 1.2
    cornice = detailed & (np.abs(v - height + 0.1) < 0.1)
    colour[cornice] = _FRAME * 0.85
    return colour


def _window(colour, x, y, cell, seed, accent, footprint):
    """One window: x from its middle, y above the floor; ``cell`` in [0, 1) tells windows apart."""
    ax = np.abs(x)
    opening = (ax < 0.56) & (y > 0.95) & (y < 2.3)
    glass_shade = 0.6 + 1.6 * np.clip((y - 0.95) / 1.35, 0, 1)
    pane = GLASS * (glass_shade * (0.6 + 0.8 * cell))[:, None]
    folds = np.abs(np.mod(x * 11 + 7 * cell, 1) - 0.5) * 2
    folds = 0.5 + (folds - 0.5) * sharpness(footprint, 0.09)
    curtain = (cell > 0.4) & (ax > 0.18 + 0.3 * cell)
    pane[curtain] = (_CURTAIN * (0.6 + 0.5 * folds)[:, None])[curtain]
    frame = (ax > 0.49) | (y < 1.02) | (y > 2.23) | (ax < 0.025) | (np.abs(y - 1.82) < 0.022)
    pane[frame] = _FRAME
    shutters = (ax > 0.58) & (ax < 1.0) & (y > 0.93) & (y < 2.32) & ((seed & np.uint32(1)) == 1)
    slat = 0.75 + 0.5 * (0.5 + (np.mod(y * 14, 1) - 0.5) * sharpness(footprint, 0.07))
    edge = (ax < 0.63) | (ax > 0.95) | (y < 0.99) | (y > 2.26)
    slat[edge] = 1.1
    result = colour.copy()
    result[opening] = pane[opening]
    result[shutters] = (accent * slat[:, None])[shutters]
    sill = (ax < 0.66) & (y > 0.84) & (y <= 0.95)
    result[sill] = _STONE * 1.35
    lintel = (ax < 0.7) & (y >= 2.3) & (y < 2.42)
    result[lintel] = _STONE * 1.1
    return result


def _door(colour, x, y, accent, footprint):
    """The front door: planks, two panels, a small window, a stone frame."""
    ax = np.abs(x)
    result = colour.copy()
    result[(ax < 0.72) & (y < 2.28)] = _STONE * 1.15
    leaf = (ax < 0.52) & (y < 2.08)
    grain = 0.85 + 0.3 * (0.5 + (value_noise(x * 60, y * 3, 5) - 0.5) * sharpness(footprint, 0.02))
    panel = (np.abs(ax - 0.26) < 0.17) & (np.abs(np.mod(y, 0.95) - 0.5) < 0.33)
    grain[panel] *= 0.65
    wood = accent * (1.3 * grain)[:, None]
    wood[(ax < 0.3) & (y > 1.55) & (y < 1.9)] = GLASS * 1.5
    wood[(np.abs(x - 0.42) < 0.03) & (np.abs(y - 1.02) < 0.06)] = np.float32([0.6, 0.5, 0.2])
    result[leaf] = wood[leaf]
    return result
