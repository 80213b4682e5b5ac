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

from infnerf_ns.kernels.corners_numba import AHEAD, CHUNK, corner_entries, grid_of, request, scratch
from infnerf_ns.kernels.hash_numba import interpolate, scatter, write
from infnerf_ns.kernels.numba_lock import KEEPS_NAN

_SATURATED = 4.0
"""erf is 1 in float32 from here on"""
_ERF_STEPS = 4096
_ERF = np.array([math.erf(_SATURATED * i / _ERF_STEPS) for i in range(_ERF_STEPS + 1)], np.float32)
"""erf at equal steps; between them a straight line is 1.1e-7 off at most"""


@nb.njit(inline="always")
def _erf(x):
    """erf of x >= 0; the library's own took a fifth of the forward pass."""
    if not x < np.float32(_SATURATED):
        return np.float32(1)
    place = x * np.float32(_ERF_STEPS / _SATURATED)
    step = np.int32(place)
    return _ERF[step] + (place - np.float32(step)) * (_ERF[step + 1] - _ERF[step])


@nb.njit(inline="always")
def _inside(x):
    return min(max(x, np.float32(0)), np.float32(1 - 2.0**-24))


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def contract(unit, along, contracted, shrink):
    """The L-inf contraction of :func:`infnerf_ns.octree.contract`: contracted [M, 3] of unit [M, 3], and by how much a
    footprint there shrinks [M]: the radius of a cone across the ray, or a length ``along`` it, which shrinks more."""
    one, two = np.float32(1), np.float32(2)
    for p in nb.prange(len(unit)):
        x, y, z = two * unit[p, 0] - one, two * unit[p, 1] - one, two * unit[p, 2] - one
        inverse = one / max(max(abs(x), abs(y)), max(abs(z), one))
        across = (two - inverse) * inverse
        shrink[p] = inverse * inverse if along else across
        factor = across * np.float32(0.25)
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


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def encode(
    unit, path, level, start, first, coords, bank, radii, cells, out, column, weights, weight_column,
    scales, resolutions, sizes, offsets, hashed, feature_axis,
):  # fmt: skip
    """Writes out [start:, column : column + L * F] and, if it is not [0, 0], weights [start:, weight_column :
    weight_column + L].

    Args:
        unit: [M, 3] unit coordinates; contracted ones at level 0.
        path: [M, K] nodes; all samples from ``start`` on have one at this level.
        level, first, coords: octree level, its first node, coordinates [N, 3] of all nodes.
        radii: footprints [M], shrunk by the contraction at level 0; or [0]: features are not weighted.
        cells: [L] the footprint's scale per hash level: the weight is erf(cells / footprint).
    """
    features = len(feature_axis)
    weighted, kept = len(radii) > 0, len(weights) > 0
    for chunk in nb.prange((len(unit) - start + CHUNK - 1) // CHUNK):
        begin = start + chunk * CHUNK
        count = min(CHUNK, len(unit) - begin)
        local, row, place, entry = scratch()
        inverse = np.empty(CHUNK, np.float32)
        for i in range(count):
            node = path[begin + i, level]
            row[i] = np.uintp(node - first)
            local[0, i], local[1, i], local[2, i] = _local(unit, begin + i, node, level, coords)
            if weighted:
                inverse[i] = np.float32(1) / max(radii[begin + i], np.float32(1e-12))
        for hash_level in range(len(scales)):
            scale, resolution, size, base, is_hashed = grid_of(
                hash_level, features, scales, resolutions, sizes, offsets, hashed
            )
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(bank, row, base, features, entry, i + AHEAD)
                values = interpolate(bank, row, base, features, place, entry, i)
                weight = np.float32(1)
                if weighted:
                    weight = _erf(cells[hash_level] * inverse[i])
                    if kept:
                        weights[begin + i, weight_column + hash_level] = weight
                write(out, begin + i, column + hash_level * features, features, values, weight)


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
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
        scale, resolution, size, base, is_hashed = grid_of(
            hash_level, features, scales, resolutions, sizes, offsets, hashed
        )
        first_column = column + hash_level * features
        local, row, place, entry = scratch()
        sample = np.empty(CHUNK, np.int64)
        for begin in range(start, len(unit), CHUNK):
            count = 0
            for p in range(begin, min(begin + CHUNK, len(unit))):
                node = path[p, level]
                live = parts == 1 or (node - first) % parts == part
                if live:
                    live = False
                    for f in range(features):
                        live = live or grad_out[p, first_column + f] != 0
                if live:
                    sample[count], row[count] = p, np.uintp(node - first)
                    local[0, count], local[1, count], local[2, count] = _local(unit, p, node, level, coords)
                    rows[node - first] = 1
                    count += 1
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(grad_bank, row, base, features, entry, i + AHEAD)
                p = sample[i]
                weight = weights[p, weight_column + hash_level] if weighted else np.float32(1)
                scatter(grad_bank, touched, row, base, features, place, entry, i, grad_out, p, first_column, weight)


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def add_sum(
    unit, path, level, first, coords, bank, radii, cells, out, weights, weight_column,
    scales, resolutions, sizes, offsets, hashed,
):  # fmt: skip
    """Adds to out [M] the weighted sum over the hash levels of each sample's node at this octree level, one feature
    each, and writes weights [:, weight_column : weight_column + L]; arguments as in :func:`encode`."""
    weighted, kept = len(radii) > 0, len(weights) > 0
    for chunk in nb.prange((len(unit) + CHUNK - 1) // CHUNK):
        begin = chunk * CHUNK
        local, row, place, entry = scratch()
        sample = np.empty(CHUNK, np.int64)
        inverse, total = np.empty(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
        count = 0
        for p in range(begin, min(begin + CHUNK, len(unit))):
            node = path[p, level]
            if node >= 0:
                sample[count], row[count] = p, np.uintp(node - first)
                local[0, count], local[1, count], local[2, count] = _local(unit, p, node, level, coords)
                if weighted:
                    inverse[count] = np.float32(1) / max(radii[p], np.float32(1e-12))
                count += 1
        for hash_level in range(len(scales)):
            scale, resolution, size, base, is_hashed = grid_of(
                hash_level, 1, scales, resolutions, sizes, offsets, hashed
            )
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(bank, row, base, 1, entry, i + AHEAD)
                weight = np.float32(1)
                if weighted:
                    weight = _erf(cells[hash_level] * inverse[i])
                    if kept:
                        weights[sample[i], weight_column + hash_level] = weight
                total[i] += weight * interpolate(bank, row, base, 1, place, entry, i)[0]
        for i in range(count):
            out[sample[i]] += total[i]


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def add_sum_backward(
    unit, path, level, first, coords, grad_out, weights, weight_column, grad_bank, touched, rows,
    scales, resolutions, sizes, offsets, hashed, order, parts,
):  # fmt: skip
    """Gradient of :func:`add_sum` for the bank, from grad_out [M, 1]; tasks as in :func:`encode_backward`."""
    weighted = len(weights) > 0
    for task in nb.prange(len(order) * parts):
        hash_level = order[task // parts]
        part = task % parts
        scale, resolution, size, base, is_hashed = grid_of(hash_level, 1, scales, resolutions, sizes, offsets, hashed)
        local, row, place, entry = scratch()
        sample = np.empty(CHUNK, np.int64)
        for begin in range(0, len(unit), CHUNK):
            count = 0
            for p in range(begin, min(begin + CHUNK, len(unit))):
                node = path[p, level]
                if node >= 0 and grad_out[p, 0] != 0 and (parts == 1 or (node - first) % parts == part):
                    sample[count], row[count] = p, np.uintp(node - first)
                    local[0, count], local[1, count], local[2, count] = _local(unit, p, node, level, coords)
                    rows[node - first] = 1
                    count += 1
            corner_entries(local, count, scale, resolution, size, is_hashed, place, entry)
            for i in range(count):
                if i + AHEAD < count:
                    request(grad_bank, row, base, 1, entry, i + AHEAD)
                p = sample[i]
                weight = weights[p, weight_column + hash_level] if weighted else np.float32(1)
                scatter(grad_bank, touched, row, base, 1, place, entry, i, grad_out, p, 0, weight)
