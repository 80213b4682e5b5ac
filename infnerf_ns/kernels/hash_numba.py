"""``hash_encode`` on the CPU with numba: forward parallel over samples, backward parallel over hash levels.

The backward pass needs no atomics and is deterministic: two hash levels never share an entry, so each thread owns the
levels it works on. Gradients are added in place to a persistent buffer, and one flag per 16 floats records what was
touched (:mod:`infnerf_ns.kernels.gradients`), so that neither clearing nor the optimizer visits a whole page.
"""

from __future__ import annotations

import numba as nb
import numpy as np

BLOCK_SHIFT = 4
"""log2 of the floats that share one touched flag"""
_CHUNK = 512


@nb.njit(inline="always")
def _corner(cx, cy, cz, corner, resolution, size, hashed):
    x = cx + (corner & 1)
    y = cy + ((corner >> 1) & 1)
    z = cz + ((corner >> 2) & 1)
    if hashed:
        h = np.uint32(x) ^ (np.uint32(y) * np.uint32(2654435761)) ^ (np.uint32(z) * np.uint32(805459861))
        return np.int64(h & np.uint32(size - 1))
    index = x + resolution * (y + resolution * z)
    if index >= size:
        index %= size
    return index


@nb.njit(inline="always")
def _weight(fx, fy, fz, corner):
    wx = fx if corner & 1 else np.float32(1) - fx
    wy = fy if corner & 2 else np.float32(1) - fy
    wz = fz if corner & 4 else np.float32(1) - fz
    return wx * wy * wz


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def forward(positions, row, bank, out, scales, resolutions, sizes, offsets, hashed, feature_axis):
    """out [P, L * F] = features of positions [P, 3] in pages bank[row [P]]; feature_axis is a tuple of length F."""
    features = len(feature_axis)
    levels = len(scales)
    count = len(positions)
    for chunk in nb.prange((count + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        stop = min(start + _CHUNK, count)
        for level in range(levels):
            scale = scales[level]
            resolution = resolutions[level]
            size = sizes[level]
            is_hashed = hashed[level]
            base = offsets[level] * features
            column = level * features
            for p in range(start, stop):
                gx = positions[p, 0] * scale + np.float32(0.5)
                gy = positions[p, 1] * scale + np.float32(0.5)
                gz = positions[p, 2] * scale + np.float32(0.5)
                cx, cy, cz = np.int64(gx), np.int64(gy), np.int64(gz)
                fx, fy, fz = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
                r = row[p]
                for f in range(features):
                    out[p, column + f] = np.float32(0)
                for corner in range(8):
                    index = base + _corner(cx, cy, cz, corner, resolution, size, is_hashed) * features
                    w = _weight(fx, fy, fz, corner)
                    for f in range(features):
                        out[p, column + f] += w * bank[r, index + f]


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def backward_bank(
    positions, row, grad_out, grad_bank, touched, scales, resolutions, sizes, offsets, hashed, order, feature_axis
):
    """Adds the gradient to grad_bank [N, page] and flags the touched blocks; order [L] balances cheap and costly
    levels."""
    features = len(feature_axis)
    count = len(positions)
    for i in nb.prange(len(order)):
        level = order[i]
        scale = scales[level]
        resolution = resolutions[level]
        size = sizes[level]
        is_hashed = hashed[level]
        base = offsets[level] * features
        column = level * features
        for p in range(count):
            live = False
            for f in range(features):
                live = live or grad_out[p, column + f] != 0
            if not live:
                continue
            gx = positions[p, 0] * scale + np.float32(0.5)
            gy = positions[p, 1] * scale + np.float32(0.5)
            gz = positions[p, 2] * scale + np.float32(0.5)
            cx, cy, cz = np.int64(gx), np.int64(gy), np.int64(gz)
            fx, fy, fz = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
            r = row[p]
            for corner in range(8):
                index = base + _corner(cx, cy, cz, corner, resolution, size, is_hashed) * features
                w = _weight(fx, fy, fz, corner)
                touched[r, index >> BLOCK_SHIFT] = 1
                for f in range(features):
                    grad_bank[r, index + f] += w * grad_out[p, column + f]


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def backward_positions(
    positions, row, bank, grad_out, grad_positions, scales, resolutions, sizes, offsets, hashed, feature_axis
):
    """grad_positions [P, 3] = gradient of the trilinear interpolation with respect to the local positions."""
    features = len(feature_axis)
    one = np.float32(1)
    for p in nb.prange(len(positions)):
        dx, dy, dz = np.float32(0), np.float32(0), np.float32(0)
        r = row[p]
        for level in range(len(scales)):
            scale = scales[level]
            gx = positions[p, 0] * scale + np.float32(0.5)
            gy = positions[p, 1] * scale + np.float32(0.5)
            gz = positions[p, 2] * scale + np.float32(0.5)
            cx, cy, cz = np.int64(gx), np.int64(gy), np.int64(gz)
            fx, fy, fz = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
            base = offsets[level] * features
            for corner in range(8):
                index = base + _corner(cx, cy, cz, corner, resolutions[level], sizes[level], hashed[level]) * features
                dot = np.float32(0)
                for f in range(features):
                    dot += bank[r, index + f] * grad_out[p, level * features + f]
                wx = fx if corner & 1 else one - fx
                wy = fy if corner & 2 else one - fy
                wz = fz if corner & 4 else one - fz
                dx += (one if corner & 1 else -one) * wy * wz * dot * scale
                dy += (one if corner & 2 else -one) * wx * wz * dot * scale
                dz += (one if corner & 4 else -one) * wx * wy * dot * scale
        grad_positions[p, 0] = dx
        grad_positions[p, 1] = dy
        grad_positions[p, 2] = dz
