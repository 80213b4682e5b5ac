"""``hash_encode`` on the CPU with numba: forward parallel over samples, backward parallel over hash levels.

The backward pass needs no atomics and is deterministic: two hash levels never share an entry, so each thread owns the
levels it works on. Gradients are added in place to a persistent buffer, and one flag per 16 floats records what was
touched (:mod:`infnerf_ns.kernels.gradients`), so that neither clearing nor the optimizer visits a whole page.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from infnerf_ns.kernels.corners_numba import AHEAD, CHUNK, corner_entries, corner_weight, grid_of, request, scratch
from infnerf_ns.kernels.numba_lock import KEEPS_NAN

BLOCK_SHIFT = 4
"""log2 of the floats that share one touched flag"""


@nb.njit(inline="always")
def interpolate(bank, row, base, features, place, entry, i):
    """The features (up to four) of one sample of a chunk."""
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    r, fx, fy, fz = row[i], place[0, i], place[1, i], place[2, i]
    for corner in range(8):
        index = base + np.uintp(entry[corner, i]) * np.uintp(features)
        w = corner_weight(fx, fy, fz, corner)
        a0 += w * bank[r, index]
        if features > 1:
            a1 += w * bank[r, index + np.uintp(1)]
        if features > 2:
            a2 += w * bank[r, index + np.uintp(2)]
            a3 += w * bank[r, index + np.uintp(3)]
    return a0, a1, a2, a3


@nb.njit(inline="always")
def write(out, p, column, features, values, weight):
    """Writes one sample's features, times a weight."""
    out[p, column] = weight * values[0]
    if features > 1:
        out[p, column + 1] = weight * values[1]
    if features > 2:
        out[p, column + 2] = weight * values[2]
        out[p, column + 3] = weight * values[3]


@nb.njit(inline="always")
def scatter(grad_bank, touched, row, base, features, place, entry, i, grad_out, p, column, weight):
    """Adds one sample's gradient to the entries of its cell and flags their blocks."""
    r, fx, fy, fz = row[i], place[0, i], place[1, i], place[2, i]
    for corner in range(8):
        index = base + np.uintp(entry[corner, i]) * np.uintp(features)
        w = weight * corner_weight(fx, fy, fz, corner)
        touched[r, index >> np.uintp(BLOCK_SHIFT)] = 1
        for f in range(features):
            grad_bank[r, index + np.uintp(f)] += w * grad_out[p, column + f]


@nb.njit(inline="always")
def _take(positions, row, start, count, local, rows):
    """Copies a chunk of samples."""
    for i in range(count):
        for axis in range(3):
            local[axis, i] = positions[start + i, axis]
        rows[i] = np.uintp(row[start + i])


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def forward(positions, row, bank, out, scales, resolutions, sizes, offsets, hashed, feature_axis):
    """out [P, L * F] = features of positions [P, 3] in pages bank[row [P]]; feature_axis is a tuple of length F."""
    features = len(feature_axis)
    for chunk in nb.prange((len(positions) + CHUNK - 1) // CHUNK):
        start = chunk * CHUNK
        count = min(CHUNK, len(positions) - start)
        local, rows, place, entry = scratch()
        _take(positions, row, start, count, local, rows)
        for level in range(len(scales)):
            scale, resolution, size, base, is_hashed = grid_of(
                level, features, scales, resolutions, sizes, offsets, hashed
            )
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(bank, rows, base, features, entry, i + AHEAD)
                values = interpolate(bank, rows, base, features, place, entry, i)
                write(out, start + i, level * features, features, values, np.float32(1))


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def backward_bank(
    positions, row, grad_out, grad_bank, touched, scales, resolutions, sizes, offsets, hashed, order, feature_axis
):
    """Adds the gradient to grad_bank [N, page] and flags the touched blocks; order [L] balances cheap and costly
    levels."""
    features = len(feature_axis)
    for task in nb.prange(len(order)):
        level = order[task]
        column = level * features
        scale, resolution, size, base, is_hashed = grid_of(level, features, scales, resolutions, sizes, offsets, hashed)
        local, rows, place, entry = scratch()
        for start in range(0, len(positions), CHUNK):
            count = min(CHUNK, len(positions) - start)
            _take(positions, row, start, count, local, rows)
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(grad_bank, rows, base, features, entry, i + AHEAD)
                live = False
                for f in range(features):
                    live = live or grad_out[start + i, column + f] != 0
                if live:
                    scatter(
                        grad_bank, touched, rows, base, features, place, entry, i, grad_out, start + i, column,
                        np.float32(1),
                    )  # fmt: skip


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def backward_positions(
    positions, row, bank, grad_out, grad_positions, scales, resolutions, sizes, offsets, hashed, feature_axis
):
    """grad_positions [P, 3] = gradient of the trilinear interpolation with respect to the local positions."""
    features, one = len(feature_axis), np.float32(1)
    for chunk in nb.prange((len(positions) + CHUNK - 1) // CHUNK):
        start = chunk * CHUNK
        count = min(CHUNK, len(positions) - start)
        local, rows, place, entry = scratch()
        total = np.zeros((3, CHUNK), np.float32)
        _take(positions, row, start, count, local, rows)
        for level in range(len(scales)):
            scale, resolution, size, base, is_hashed = grid_of(
                level, features, scales, resolutions, sizes, offsets, hashed
            )
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(bank, rows, base, features, entry, i + AHEAD)
                r, fx, fy, fz = rows[i], place[0, i], place[1, i], place[2, i]
                dx, dy, dz = np.float32(0), np.float32(0), np.float32(0)
                for corner in range(8):
                    index = base + np.uintp(entry[corner, i]) * np.uintp(features)
                    dot = np.float32(0)
                    for f in range(features):
                        dot += bank[r, index + np.uintp(f)] * grad_out[start + i, level * features + f]
                    wx = fx if corner & 1 else one - fx
                    wy = fy if corner & 2 else one - fy
                    wz = fz if corner & 4 else one - fz
                    dx += (dot if corner & 1 else -dot) * wy * wz
                    dy += (dot if corner & 2 else -dot) * wx * wz
                    dz += (dot if corner & 4 else -dot) * wx * wy
                total[0, i] += dx * scale
                total[1, i] += dy * scale
                total[2, i] += dz * scale
        for i in range(count):
            for axis in range(3):
                grad_positions[start + i, axis] = total[axis, i]
