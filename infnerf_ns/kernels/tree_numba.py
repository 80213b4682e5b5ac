"""Hash grids along the samples' paths down the tree, on the CPU with numba: one pass per octree level.

What :func:`~infnerf_ns.kernels.hash_encode` does, with all that stands around it in a tree: local coordinates
(contracted in the root), down-weighting by the footprint, and the place of a level's features among all features. As
separate torch operations these cost more than the grids themselves: each reads and writes every sample again.

The backward pass needs no atomics and is deterministic: a task owns one hash level of the nodes whose row leaves the
same remainder, and nobody else writes there.
"""

from __future__ import annotations

import math

import numba as nb
import numpy as np

from infnerf_ns.kernels.hash_numba import BLOCK_SHIFT, _weight

_CHUNK = 512
_SATURATED = 4.0
"""erf is 1 in float32 from here on"""
_Y, _Z = np.uint32(2654435761), np.uint32(805459861)


@nb.njit(inline="always")
def _inside(x):
    return min(max(x, np.float32(0)), np.float32(1 - 2.0**-24))


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def contract(unit, contracted, shrink):
    """The L-inf contraction of :func:`infnerf_ns.octree.contract`: contracted [M, 3] of unit [M, 3], and by how much a
    footprint there shrinks [M]."""
    one, two = np.float32(1), np.float32(2)
    for p in nb.prange(len(unit)):
        x, y, z = two * unit[p, 0] - one, two * unit[p, 1] - one, two * unit[p, 2] - one
        inverse = one / max(max(abs(x), abs(y)), max(abs(z), one))
        shrink[p] = (two - inverse) * inverse
        factor = shrink[p] * np.float32(0.25)
        contracted[p, 0] = _inside(factor * x + np.float32(0.5))
        contracted[p, 1] = _inside(factor * y + np.float32(0.5))
        contracted[p, 2] = _inside(factor * z + np.float32(0.5))


@nb.njit(inline="always")
def _local(unit, p, node, level, coords):
    """Local coordinates of a sample in a node; at level 0 ``unit`` holds contracted coordinates."""
    x, y, z = unit[p, 0], unit[p, 1], unit[p, 2]
    if level > 0:
        scale = np.float32(1 << level)
        x = _inside(x * scale - np.float32(coords[node, 0]))
        y = _inside(y * scale - np.float32(coords[node, 1]))
        z = _inside(z * scale - np.float32(coords[node, 2]))
    return x, y, z


@nb.njit(inline="always")
def _cell(x, y, z, scale):
    """Cell of local coordinates, and the place in the cell."""
    gx, gy, gz = x * scale + np.float32(0.5), y * scale + np.float32(0.5), z * scale + np.float32(0.5)
    cx, cy, cz = np.int32(gx), np.int32(gy), np.int32(gz)
    place = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
    return np.uint32(cx), np.uint32(cy), np.uint32(cz), place[0], place[1], place[2]


@nb.njit(inline="always")
def _entry(cx, cy, cz, corner, resolution, size, hashed):
    """Entry of a cell's corner, as :func:`infnerf_ns.kernels.hash_numba._corner`, in unsigned numbers: numba checks
    signed indices for being negative at every access, which costs more than the address."""
    x = np.uint32(cx + np.uint32(corner & 1))
    y = np.uint32(cy + np.uint32((corner >> 1) & 1))
    z = np.uint32(cz + np.uint32((corner >> 2) & 1))
    if hashed:
        return np.uintp((x ^ np.uint32(y * _Y) ^ np.uint32(z * _Z)) & np.uint32(size - np.uint32(1)))
    index = np.uint32(x + np.uint32(resolution * np.uint32(y + np.uint32(resolution * z))))
    if index >= size:
        index = np.uint32(index % size)
    return np.uintp(index)


@nb.njit(inline="always")
def _grid(hash_level, features, scales, resolutions, sizes, offsets, hashed):
    """A hash level's scale, resolution, number of entries, first element in a page, and whether it is hashed."""
    resolution, size = np.uint32(resolutions[hash_level]), np.uint32(sizes[hash_level])
    return scales[hash_level], resolution, size, np.uintp(offsets[hash_level] * features), hashed[hash_level]


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def encode(
    unit, path, level, start, first, coords, bank, radii, cells, out, column, weights, weight_column,
    scales, resolutions, sizes, offsets, hashed, feature_axis,
):  # fmt: skip
    """Writes out [start:, column : column + L * F] and weights [start:, weight_column : weight_column + L].

    Args:
        unit: [M, 3] unit coordinates; contracted ones at level 0.
        path: [M, K] nodes; all samples from ``start`` on have one at this level.
        level, first, coords: octree level, its first node, coordinates [N, 3] of all nodes.
        radii: footprints [M], shrunk by the contraction at level 0; or [0]: features are not weighted.
        cells: [L] the footprint's scale per hash level: the weight is erf(cells / footprint).
    """
    features = len(feature_axis)
    weighted = len(radii) > 0
    count = len(unit) - start
    for chunk in nb.prange((count + _CHUNK - 1) // _CHUNK):
        begin = start + chunk * _CHUNK
        number = min(_CHUNK, len(unit) - begin)
        local = np.empty((_CHUNK, 4), np.float32)
        row = np.empty(_CHUNK, np.uintp)
        for i in range(number):
            node = path[begin + i, level]
            row[i] = np.uintp(node - first)
            local[i, 0], local[i, 1], local[i, 2] = _local(unit, begin + i, node, level, coords)
            local[i, 3] = np.float32(1) / max(radii[begin + i], np.float32(1e-12)) if weighted else np.float32(0)
        for hash_level in range(len(scales)):
            scale, resolution, size, base, is_hashed = _grid(
                hash_level, features, scales, resolutions, sizes, offsets, hashed
            )
            first_column = column + hash_level * features
            for i in range(number):
                cx, cy, cz, fx, fy, fz = _cell(local[i, 0], local[i, 1], local[i, 2], scale)
                r = row[i]
                a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for corner in range(8):
                    index = base + _entry(cx, cy, cz, corner, resolution, size, is_hashed) * np.uintp(features)
                    w = _weight(fx, fy, fz, corner)
                    a0 += w * bank[r, index]
                    if features > 1:
                        a1 += w * bank[r, index + np.uintp(1)]
                    if features > 2:
                        a2 += w * bank[r, index + np.uintp(2)]
                        a3 += w * bank[r, index + np.uintp(3)]
                weight = np.float32(1)
                if weighted:
                    ratio = cells[hash_level] * local[i, 3]
                    if ratio < _SATURATED:
                        weight = np.float32(math.erf(ratio))
                    weights[begin + i, weight_column + hash_level] = weight
                out[begin + i, first_column] = weight * a0
                if features > 1:
                    out[begin + i, first_column + 1] = weight * a1
                if features > 2:
                    out[begin + i, first_column + 2] = weight * a2
                    out[begin + i, first_column + 3] = weight * a3


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def encode_backward(
    unit, path, level, start, first, coords, grad_out, column, weights, weight_column, grad_bank, touched, rows,
    scales, resolutions, sizes, offsets, hashed, order, parts, feature_axis,
):  # fmt: skip
    """Adds to grad_bank [N, page] and flags the touched blocks and rows; ``weights`` [0, 0]: features have none.

    A task is a hash level and a remainder of the row modulo ``parts``; ``order`` [L] balances cheap and costly levels.
    """
    features = len(feature_axis)
    weighted = len(weights) > 0
    for task in nb.prange(len(order) * parts):
        hash_level = order[task // parts]
        part = task % parts
        scale, resolution, size, base, is_hashed = _grid(
            hash_level, features, scales, resolutions, sizes, offsets, hashed
        )
        first_column = column + hash_level * features
        for p in range(start, len(unit)):
            node = path[p, level]
            if parts > 1 and (node - first) % parts != part:
                continue
            live = False
            for f in range(features):
                live = live or grad_out[p, first_column + f] != 0
            if not live:
                continue
            r = np.uintp(node - first)
            x, y, z = _local(unit, p, node, level, coords)
            cx, cy, cz, fx, fy, fz = _cell(x, y, z, scale)
            weight = weights[p, weight_column + hash_level] if weighted else np.float32(1)
            rows[r] = 1
            for corner in range(8):
                index = base + _entry(cx, cy, cz, corner, resolution, size, is_hashed) * np.uintp(features)
                w = weight * _weight(fx, fy, fz, corner)
                touched[r, index >> np.uintp(BLOCK_SHIFT)] = 1
                for f in range(features):
                    grad_bank[r, index + np.uintp(f)] += w * grad_out[p, first_column + f]


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def add_sum(unit, path, level, first, coords, bank, out, scales, resolutions, sizes, offsets, hashed):
    """Adds to out [M] the sum over the hash levels of each sample's node at this octree level; one feature each."""
    count = len(unit)
    for chunk in nb.prange((count + _CHUNK - 1) // _CHUNK):
        begin = chunk * _CHUNK
        local = np.empty((_CHUNK, 3), np.float32)
        row = np.empty(_CHUNK, np.uintp)
        sample = np.empty(_CHUNK, np.int64)
        number = 0
        for p in range(begin, min(begin + _CHUNK, count)):
            node = path[p, level]
            if node >= 0:
                sample[number], row[number] = p, np.uintp(node - first)
                local[number, 0], local[number, 1], local[number, 2] = _local(unit, p, node, level, coords)
                number += 1
        for hash_level in range(len(scales)):
            scale, resolution, size, base, is_hashed = _grid(hash_level, 1, scales, resolutions, sizes, offsets, hashed)
            for i in range(number):
                cx, cy, cz, fx, fy, fz = _cell(local[i, 0], local[i, 1], local[i, 2], scale)
                r = row[i]
                total = np.float32(0)
                for corner in range(8):
                    index = base + _entry(cx, cy, cz, corner, resolution, size, is_hashed)
                    total += _weight(fx, fy, fz, corner) * bank[r, index]
                out[sample[i]] += total


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def add_sum_backward(
    unit, path, level, first, coords, grad_out, grad_bank, touched, rows,
    scales, resolutions, sizes, offsets, hashed, order, parts,
):  # fmt: skip
    """Gradient of :func:`add_sum` for the bank; tasks as in :func:`encode_backward`."""
    for task in nb.prange(len(order) * parts):
        hash_level = order[task // parts]
        part = task % parts
        scale, resolution, size, base, is_hashed = _grid(hash_level, 1, scales, resolutions, sizes, offsets, hashed)
        for p in range(len(unit)):
            node = path[p, level]
            if node < 0 or grad_out[p] == 0 or (parts > 1 and (node - first) % parts != part):
                continue
            r = np.uintp(node - first)
            x, y, z = _local(unit, p, node, level, coords)
            cx, cy, cz, fx, fy, fz = _cell(x, y, z, scale)
            rows[r] = 1
            for corner in range(8):
                index = base + _entry(cx, cy, cz, corner, resolution, size, is_hashed)
                touched[r, index >> np.uintp(BLOCK_SHIFT)] = 1
                grad_bank[r, index] += _weight(fx, fy, fz, corner) * grad_out[p]
