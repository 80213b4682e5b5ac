"""``grouped_mlp`` on the CPU with numba: every layer of a tile of samples stays in the first-level cache.

Activations are sample-major and weights are stored [fan_in, fan_out], so that the three products of a layer (forward,
gradient to the input, gradient to the weights) all are "row += coefficient * row" over a contiguous row, which the
compiler turns into vector instructions. Nothing but the input is kept for the backward pass: it computes the tile's
activations again. Why own code: a library matmul per node and layer costs one call per node, and writes every hidden
activation to memory.
"""

from __future__ import annotations

import numba as nb
import numpy as np

TILE = 32
"""samples per tile"""
VECTOR = 16
"""widths that are a multiple of this need no remainder loop"""
NARROW = 8
"""layers with fewer outputs are summed along their inputs instead, as their rows do not fill a vector"""


@nb.njit(fastmath=True, error_model="numpy", boundscheck=False)
def _product(x, weight, n, fan_in, fan_out, y):
    """y[:n, :fan_out] = x[:n, :fan_in] @ weight[:fan_in, :fan_out]"""
    for s in range(n):
        for o in range(fan_out):
            y[s, o] = np.float32(0)
    whole = fan_in // 8 * 8
    for i in range(0, whole, 8):
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        w4, w5, w6, w7 = weight[i + 4], weight[i + 5], weight[i + 6], weight[i + 7]
        for s in range(n):
            row = y[s]
            a0, a1, a2, a3 = x[s, i], x[s, i + 1], x[s, i + 2], x[s, i + 3]
            a4, a5, a6, a7 = x[s, i + 4], x[s, i + 5], x[s, i + 6], x[s, i + 7]
            for o in range(fan_out):
                row[o] += (
                    (a0 * w0[o] + a1 * w1[o])
                    + (a2 * w2[o] + a3 * w3[o])
                    + (a4 * w4[o] + a5 * w5[o])
                    + (a6 * w6[o] + a7 * w7[o])
                )
    if fan_in - whole >= 4:
        w0, w1, w2, w3 = weight[whole], weight[whole + 1], weight[whole + 2], weight[whole + 3]
        for s in range(n):
            row = y[s]
            a0, a1, a2, a3 = x[s, whole], x[s, whole + 1], x[s, whole + 2], x[s, whole + 3]
            for o in range(fan_out):
                row[o] += (a0 * w0[o] + a1 * w1[o]) + (a2 * w2[o] + a3 * w3[o])
        whole += 4
    if fan_in - whole >= 2:
        w0, w1 = weight[whole], weight[whole + 1]
        for s in range(n):
            row = y[s]
            a0, a1 = x[s, whole], x[s, whole + 1]
            for o in range(fan_out):
                row[o] += a0 * w0[o] + a1 * w1[o]
        whole += 2
    for i in range(whole, fan_in):
        w0 = weight[i]
        for s in range(n):
            row = y[s]
            a0 = x[s, i]
            for o in range(fan_out):
                row[o] += a0 * w0[o]


@nb.njit(fastmath=True, error_model="numpy", boundscheck=False)
def _narrow_product(x, transposed, n, fan_in, fan_out, y):
    """The same for fewer outputs than a vector holds: dot products along the inputs; transposed [fan_out, fan_in]."""
    for s in range(n):
        row = x[s]
        for o in range(fan_out):
            w = transposed[o]
            total = np.float32(0)
            for i in range(fan_in):
                total += row[i] * w[i]
            y[s, o] = total


@nb.njit(fastmath=True, error_model="numpy", boundscheck=False)
def _narrow_outer(x, dy, n, fan_in, fan_out, grad, scratch):
    """:func:`_outer` for fewer outputs than a vector holds; ``scratch`` [fan_out, fan_in]."""
    for o in range(fan_out):
        total = scratch[o]
        for i in range(fan_in):
            total[i] = np.float32(0)
        for s in range(n):
            row, d = x[s], dy[s, o]
            for i in range(fan_in):
                total[i] += d * row[i]
        for i in range(fan_in):
            grad[i, o] += total[i]


@nb.njit(fastmath=True, error_model="numpy", boundscheck=False)
def _outer(x, dy, n, fan_in, fan_out, grad):
    """grad[:fan_in, :fan_out] += x[:n].T @ dy[:n]"""
    whole = n // 8 * 8
    for s in range(0, whole, 8):
        d0, d1, d2, d3, d4, d5, d6, d7 = (
            dy[s],
            dy[s + 1],
            dy[s + 2],
            dy[s + 3],
            dy[s + 4],
            dy[s + 5],
            dy[s + 6],
            dy[s + 7],
        )
        for i in range(fan_in):
            row = grad[i]
            a0, a1, a2, a3 = x[s, i], x[s + 1, i], x[s + 2, i], x[s + 3, i]
            a4, a5, a6, a7 = x[s + 4, i], x[s + 5, i], x[s + 6, i], x[s + 7, i]
            for o in range(fan_out):
                row[o] += (
                    (a0 * d0[o] + a1 * d1[o])
                    + (a2 * d2[o] + a3 * d3[o])
                    + (a4 * d4[o] + a5 * d5[o])
                    + (a6 * d6[o] + a7 * d7[o])
                )
    for s in range(whole, n):
        d0 = dy[s]
        for i in range(fan_in):
            row = grad[i]
            a0 = x[s, i]
            for o in range(fan_out):
                row[o] += a0 * d0[o]


@nb.njit(inline="always")
def _weights(bank, row, offset, fan_in, fan_out):
    return bank[row, offset : offset + fan_in * fan_out].reshape(fan_in, fan_out)


@nb.njit(inline="always")
def _relu(y, n, width):
    for s in range(n):
        for o in range(width):
            if y[s, o] < 0:
                y[s, o] = np.float32(0)


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def forward(inputs, tile_group, tile_start, tile_stop, rows, bank, offset, widths, used_inputs, out, threads):
    """out [P, widths[-1]]; tiles are runs of at most TILE samples of one group; used_inputs [G]: leading inputs that
    are not zero."""
    layers = len(widths) - 1
    tiles = len(tile_group)
    widest = widths.max()
    for thread in nb.prange(threads):
        ping = np.empty((TILE, widest), np.float32)
        pong = np.empty((TILE, widest), np.float32)
        narrow = np.empty((NARROW, widest), np.float32)
        for t in range(tiles * thread // threads, tiles * (thread + 1) // threads):
            group = tile_group[t]
            a, b = tile_start[t], tile_stop[t]
            n = b - a
            position = offset
            for layer in range(layers):
                fan_in, fan_out = widths[layer], widths[layer + 1]
                weight = _weights(bank, rows[group], position, fan_in, fan_out)
                position += fan_in * fan_out
                source = inputs[a:b] if layer == 0 else ping
                target = out[a:b] if layer == layers - 1 else pong
                used = used_inputs[group] if layer == 0 else fan_in
                if fan_out < NARROW:
                    for i in range(used):
                        for o in range(fan_out):
                            narrow[o, i] = weight[i, o]
                    _narrow_product(source, narrow, n, used, fan_out, target)
                else:
                    _product(source, weight, n, used, fan_out, target)
                if layer < layers - 1:
                    _relu(target, n, fan_out)
                    ping, pong = pong, ping


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def backward(
    inputs,
    tile_group,
    tile_start,
    tile_stop,
    rows,
    bank,
    offset,
    widths,
    used_inputs,
    grad_out,
    grad_inputs,
    grad_bank,
    edge_groups,
    edges,
    threads,
    want_inputs,
    want_weights,
):
    """Adds weight gradients and writes grad_inputs [P, in], where they are wanted.

    The gradient of a group whose tiles all belong to one thread is added to ``grad_bank [N, page]`` as it comes; a
    thread's first and last group may be shared with a neighbour and go to ``edges [threads, 2, size]`` with their
    numbers in ``edge_groups [threads, 2]``.
    """
    layers = len(widths) - 1
    tiles = len(tile_group)
    widest = widths.max()
    size = edges.shape[2]
    for thread in nb.prange(threads):
        acts = np.empty((layers, TILE, widest), np.float32)
        delta = np.empty((TILE, widest), np.float32)
        delta_next = np.empty((TILE, widest), np.float32)
        transposed = np.zeros((layers, widest, widest), np.float32)
        narrow = np.empty((NARROW, widest), np.float32)
        first_tile, last_tile = tiles * thread // threads, tiles * (thread + 1) // threads
        for t in range(first_tile, last_tile):
            group = tile_group[t]
            a, b = tile_start[t], tile_stop[t]
            n = b - a
            if t == first_tile or tile_group[t - 1] != group:
                last = t
                while last + 1 < tiles and tile_group[last + 1] == group:
                    last += 1
                shared_before = t == first_tile and t > 0 and tile_group[t - 1] == group
                total = grad_bank[rows[group], offset : offset + size] if want_weights else edges[thread, 0]
                if want_weights and (shared_before or last >= last_tile):
                    side = 0 if t == first_tile else 1
                    edge_groups[thread, side] = group
                    total = edges[thread, side]
                position = offset
                for layer in range(layers):
                    weight = _weights(bank, rows[group], position, widths[layer], widths[layer + 1])
                    position += widths[layer] * widths[layer + 1]
                    for i in range(widths[layer]):
                        for o in range(widths[layer + 1]):
                            transposed[layer, o, i] = weight[i, o]
            position = offset
            for layer in range(layers - 1):
                fan_in, fan_out = widths[layer], widths[layer + 1]
                weight = _weights(bank, rows[group], position, fan_in, fan_out)
                position += fan_in * fan_out
                source = inputs[a:b] if layer == 0 else acts[layer - 1]
                _product(source, weight, n, used_inputs[group] if layer == 0 else fan_in, fan_out, acts[layer])
                _relu(acts[layer], n, fan_out)
            end = size
            for s in range(n):
                for o in range(widths[layers]):
                    delta[s, o] = grad_out[a + s, o]
            for layer in range(layers - 1, -1, -1):
                fan_in, fan_out = widths[layer], widths[layer + 1]
                used = used_inputs[group] if layer == 0 else fan_in
                end -= fan_in * fan_out
                gradient = total[end : end + fan_in * fan_out].reshape(fan_in, fan_out)
                if layer == 0:
                    if want_weights:
                        _outer(inputs[a:b], delta, n, used, fan_out, gradient)
                    if want_inputs:
                        # Whole vectors: the columns beyond the inputs are zero in the transposed weights.
                        padded = min((used + VECTOR - 1) // VECTOR * VECTOR, widest)
                        _product(delta, transposed[layer], n, fan_out, padded, delta_next)
                        for s in range(n):
                            for i in range(used):
                                grad_inputs[a + s, i] = delta_next[s, i]
                            for i in range(used, fan_in):
                                grad_inputs[a + s, i] = np.float32(0)
                else:
                    if want_weights and fan_out < NARROW:
                        _narrow_outer(acts[layer - 1], delta, n, used, fan_out, gradient, narrow)
                    elif want_weights:
                        _outer(acts[layer - 1], delta, n, used, fan_out, gradient)
                    _product(delta, transposed[layer], n, fan_out, used, delta_next)
                    for s in range(n):
                        for i in range(used):
                            if acts[layer - 1, s, i] <= 0:
                                delta_next[s, i] = np.float32(0)
                    delta, delta_next = delta_next, delta


@nb.njit(cache=True)
def tiles_of(starts):
    """Cuts groups ``starts [G + 1]`` into tiles: (group, start, stop) arrays."""
    count = 0
    for g in range(len(starts) - 1):
        count += (starts[g + 1] - starts[g] + TILE - 1) // TILE
    group = np.empty(count, np.int64)
    begin = np.empty(count, np.int64)
    end = np.empty(count, np.int64)
    t = 0
    for g in range(len(starts) - 1):
        for a in range(starts[g], starts[g + 1], TILE):
            group[t] = g
            begin[t] = a
            end[t] = min(a + TILE, starts[g + 1])
            t += 1
    return group, begin, end
