"""What happens along rays, on the CPU with numba: one pass over the rays each, where torch needs ten to twenty.

With the grids and decoders fused, half of a training step on two cores was such passes over small tensors, on one of
the cores. See :mod:`infnerf_ns.kernels.rays` for what they compute.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from infnerf_ns.kernels.numba_lock import KEEPS_NAN


@nb.njit(inline="always")
def _distance(bin_edge, s_near, s_far, bend):
    """See :func:`infnerf_ns.kernels.rays.distances`."""
    s = bin_edge * s_far + (np.float32(1) - bin_edge) * s_near
    if s < 0:
        return bend * np.exp(s)
    return bend / max(np.float32(1) - s, np.float32(1e-9))


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def distances(bins, s_near, s_far, bend, edges):
    """edges [R, B] of bins [R, B]."""
    for r in nb.prange(len(bins)):
        for i in range(bins.shape[1]):
            edges[r, i] = _distance(bins[r, i], s_near[r], s_far[r], np.float32(bend))


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def resample(bins, weights, exponent, padding, offset, s_near, s_far, bend, new_bins, edges):
    """Writes new_bins and edges [R, B] of the histogram weights [R, S] over bins [R, S + 1]."""
    count, new = weights.shape[1], new_bins.shape[1]
    for r in nb.prange(len(bins)):
        cumulative = np.empty(count + 1, np.float32)
        total = np.float32(0)
        for i in range(count):
            w = max(weights[r, i], np.float32(0))
            if exponent != 1:
                w = w ** np.float32(exponent)
            total += w + np.float32(padding)
            cumulative[i + 1] = total
        cumulative[0] = 0
        for i in range(1, count + 1):
            cumulative[i] = min(cumulative[i] / total, np.float32(1))
        above = 0  # the first edge whose cumulative weight is larger than u, as u rises
        for k in range(new):
            u = (np.float32(k) + offset[r]) / np.float32(new)
            while above <= count and cumulative[above] <= u:
                above += 1
            low, high = min(max(above - 1, 0), count), min(above, count)
            span = cumulative[high] - cumulative[low]
            share = np.float32(0)
            if span > 0:
                share = min(max((u - cumulative[low]) / span, np.float32(0)), np.float32(1))
            new_bins[r, k] = bins[r, low] + share * (bins[r, high] - bins[r, low])
            edges[r, k] = _distance(new_bins[r, k], s_near[r], s_far[r], np.float32(bend))


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def cone_samples(origins, directions, edges, slope, constant, of_interval, share, start, way, positions, radii):
    """Writes positions [R, S, 3] and radii [R, S]; constant [R], or [0]: the radius is slope [R] times the distance.
    start, way [R, 3], or [0, 3]: of the rays in the frame of share (IntervalFloor)."""
    half, one, two = np.float32(share / 2), np.float32(1), np.float32(2)
    for r in nb.prange(len(edges)):
        for i in range(edges.shape[1] - 1):
            middle = (edges[r, i] + edges[r, i + 1]) / np.float32(2)
            for axis in range(3):
                positions[r, i, axis] = origins[r, axis] + directions[r, axis] * middle
            radius = constant[r] if len(constant) else middle * slope[r]
            if of_interval:
                radius = max(radius, (edges[r, i + 1] - edges[r, i]) / np.float32(2))
            if len(start):
                norm = one
                for axis in range(3):
                    norm = max(norm, abs(start[r, axis] + way[r, axis] * middle))
                radius = max(radius, half * (edges[r, i + 1] - edges[r, i]) / (two * norm - one))
            radii[r, i] = radius


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def render_weights(density, edges, weights):
    """Writes weights [R, S] of density [R, S]."""
    for r in nb.prange(len(density)):
        passed = np.float32(1)
        for i in range(density.shape[1]):
            weight = -np.expm1(-density[r, i] * (edges[r, i + 1] - edges[r, i])) * passed
            weights[r, i] = weight if np.isfinite(weight) else np.float32(0)
            passed -= weight


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def render_weights_backward(density, edges, weights, grad, grad_density):
    """Writes grad_density [R, S]: a sample gains from the light that it takes and loses what it takes from those
    behind."""
    samples = density.shape[1]
    for r in nb.prange(len(density)):
        passed = np.float32(0)
        for i in range(samples):
            length = edges[r, i + 1] - edges[r, i]
            passed += density[r, i] * length
            grad_density[r, i] = grad[r, i] * np.exp(-passed) * length
        behind = np.float32(0)
        for back in range(samples):
            i = samples - 1 - back
            grad_density[r, i] -= behind * (edges[r, i + 1] - edges[r, i])
            behind += grad[r, i] * weights[r, i]
