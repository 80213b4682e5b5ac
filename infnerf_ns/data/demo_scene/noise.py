"""Integer hashes and value noise: the same numbers for the same inputs on every machine, no state, no tables."""

from __future__ import annotations

from typing import Union

import numpy as np
from jaxtyping import Float32, Int32, UInt32

Seed = Union[int, UInt32[np.ndarray, "n"]]


def hash_cells(ix: Int32[np.ndarray, "n"], iy: Int32[np.ndarray, "n"], seed: Seed) -> UInt32[np.ndarray, "n"]:
    """One well mixed 32-bit integer per lattice cell; ``seed`` tells surfaces and uses of the same cell apart."""
    h = ix.view(np.uint32) * np.uint32(0x8DA6B343)
    h ^= iy.view(np.uint32) * np.uint32(0xD8163841)
    h ^= np.asarray(seed, dtype=np.uint32).reshape(-1) * np.uint32(0xCB1AB31F)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x2C1B3C6D)
    h ^= h >> np.uint32(12)
    h *= np.uint32(0x297A2D39)
    h ^= h >> np.uint32(15)
    return h


def hash01(ix: Int32[np.ndarray, "n"], iy: Int32[np.ndarray, "n"], seed: Seed) -> Float32[np.ndarray, "n"]:
    """:func:`hash_cells` as a number in [0, 1)."""
    return (hash_cells(ix, iy, seed) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def cells(x: Float32[np.ndarray, "n"]) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Integer part (floor) and the rest in [0, 1)."""
    whole = np.floor(x)
    return whole.astype(np.int32), x - whole


def value_noise(x: Float32[np.ndarray, "n"], y: Float32[np.ndarray, "n"], seed: Seed) -> Float32[np.ndarray, "n"]:
    """Smooth noise in [0, 1) with one random value per unit cell of (x, y), its mean 0.5."""
    ix, fx = cells(x)
    iy, fy = cells(y)
    fx = fx * fx * (3 - 2 * fx)
    fy = fy * fy * (3 - 2 * fy)
    low = hash01(ix, iy, seed)
    low += (hash01(ix + 1, iy, seed) - low) * fx
    high = hash01(ix, iy + 1, seed)
    high += (hash01(ix + 1, iy + 1, seed) - high) * fx
    return low + (high - low) * fy


def sharpness(footprint: Float32[np.ndarray, "n"], detail: float) -> Float32[np.ndarray, "n"]:
    """How much of a pattern of size ``detail`` (metres) a sample of width ``footprint`` still shows.

    1 below half the size, 0 from the size on, where the pattern is replaced by its mean: a point sample of a finer
    pattern would alias.
    """
    return np.clip(2 - footprint * np.float32(2 / detail), 0, 1)
