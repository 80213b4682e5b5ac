"""What stands between the two decoders, on the CPU with numba; see :mod:`infnerf_ns.kernels.shading`."""

from __future__ import annotations

import numba as nb
import numpy as np

from infnerf_ns.kernels.numba_lock import KEEPS_NAN


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def activate(hidden, scale, density, geo):
    """Writes density [M] of hidden [M, 1 + G], and copies the others to geo [M, G]."""
    for m in nb.prange(len(hidden)):
        density[m] = np.exp(hidden[m, 0] - np.float32(1)) * np.float32(scale)
        for g in range(geo.shape[1]):
            geo[m, g] = hidden[m, 1 + g]


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def activate_backward(hidden, scale, grad_density, grad_geo, grad_hidden):
    """Writes grad_hidden [M, 1 + G]."""
    for m in nb.prange(len(hidden)):
        bounded = min(max(hidden[m, 0] - np.float32(1), np.float32(-15)), np.float32(15))
        grad_hidden[m, 0] = grad_density[m] * np.exp(bounded) * np.float32(scale)
        for g in range(grad_geo.shape[1]):
            grad_hidden[m, 1 + g] = grad_geo[m, g]


@nb.njit(cache=True, error_model="numpy", boundscheck=False)
def visible(weights, order, threshold, kept):
    """Writes the numbers of the visible routed samples to kept [M]; returns how many."""
    rays, samples = weights.shape
    shows_last = np.empty(rays, np.bool_)
    for r in range(rays):
        total = np.float32(0)
        for i in range(samples):
            total += weights[r, i]
        shows_last[r] = total < 1 - threshold
    count = 0
    for m in range(len(order)):
        r, i = order[m] // samples, order[m] % samples
        kept[count] = m
        count += weights[r, i] > threshold or (i == samples - 1 and shows_last[r])
    return count


@nb.njit(parallel=True, cache=True, error_model="numpy", boundscheck=False)
def color_inputs(geo, code, appearance, kept, ray, out):
    """Writes out [K, G + C + A] of geo [M, G], code [R, C] and appearance [R, A]."""
    features, codes, photo = geo.shape[1], code.shape[1], appearance.shape[1]
    for k in nb.prange(len(kept)):
        m, r = kept[k], ray[k]
        for i in range(features):
            out[k, i] = geo[m, i]
        for i in range(codes):
            out[k, features + i] = code[r, i]
        for i in range(photo):
            out[k, features + codes + i] = appearance[r, i]


@nb.njit(cache=True, error_model="numpy", boundscheck=False)
def color_inputs_backward(grad, kept, ray, grad_geo, grad_appearance):
    """Adds to grad_geo [M, G] and grad_appearance [R, A] what grad [K, G + C + A] holds."""
    features, photo = grad_geo.shape[1], grad_appearance.shape[1]
    first = grad.shape[1] - photo
    for k in range(len(kept)):
        m, r = kept[k], ray[k]
        for i in range(features):
            grad_geo[m, i] += grad[k, i]
        for i in range(photo):
            grad_appearance[r, i] += grad[k, first + i]
