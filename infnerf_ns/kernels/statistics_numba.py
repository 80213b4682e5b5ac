"""Sums over the samples of each octant on the CPU (:mod:`infnerf_ns.kernels.statistics`)."""

from __future__ import annotations

import numba as nb
import numpy as np


@nb.njit(cache=True, error_model="numpy", boundscheck=False)
def add_samples(unit, node, footprints, share, weights, error, gradient, order, per_ray, level, coords, gsd, table):
    """Adds M samples, sorted by node, to table [N, 8, 7]; the other arguments as in ``add_samples`` of the room."""
    for m in range(len(node)):
        n = node[m]
        scale = np.float32(2.0 ** (level[n] + 1))
        octant, inside = 0, True
        for axis in range(3):
            inside = inside and np.float32(0) <= unit[m, axis] < np.float32(1)
            upper = unit[m, axis] * scale - np.float32(2 * coords[n, axis]) >= np.float32(1)
            octant += np.int64(upper) << axis
        place = order[m]
        weight, slope = np.float64(share[m]) * weights[place], np.float64(gradient[m])
        explained = weight * error[place // per_ray]
        row = table[n, octant]
        row[0] += 1.0
        row[1] += weight
        row[2] += explained
        row[3] += slope
        if inside and footprints[m] < gsd[level[n]]:
            row[4] += weight
            row[5] += explained
            row[6] += slope
