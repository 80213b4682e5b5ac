"""The walk down the tree on the CPU with numba: one pass over the samples, all levels of a sample at once."""

from __future__ import annotations

import numba as nb
import numpy as np


@nb.njit(parallel=True, cache=True, error_model="numpy", boundscheck=False)
def route(unit, footprints, children, gsd, path):
    """Fills path [M, K] with each sample's node per level, -1 below the node that keeps it.

    Args:
        unit: [M, 3] unit coordinates.
        footprints: [M] radii, or [0] for "the finest node there is".
        children: [N, 8] node numbers, -1 = none.
        gsd: [K] ground sampling distance per level.
        path: [M, K] int64, written.
    """
    depth = path.shape[1]
    for i in nb.prange(len(unit)):
        x, y, z = unit[i, 0], unit[i, 1], unit[i, 2]
        node = 0
        path[i, 0] = 0
        inside = x >= 0 and x < 1 and y >= 0 and y < 1 and z >= 0 and z < 1
        for level in range(1, depth):
            if inside and node >= 0 and (len(footprints) == 0 or footprints[i] < gsd[level - 1]):
                scale = np.float32(1 << level)
                octant = (np.int64(x * scale) & 1) | (np.int64(y * scale) & 1) << 1 | (np.int64(z * scale) & 1) << 2
                node = children[node, octant]
            else:
                node = -1
            path[i, level] = node
