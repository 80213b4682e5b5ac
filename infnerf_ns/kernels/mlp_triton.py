"""``grouped_mlp`` on CUDA with Triton: all groups of all octree levels in one launch, all layers of a tile fused.

A program evaluates one tile of samples of one group and keeps the tile's activations in registers, as in tiny-cuda-nn's
fully fused networks (Mueller et al. 2021, "Real-time neural radiance caching"); it finds its weights through a table of
bank addresses, as in Triton's tutorial on grouped matrix products. Nothing but the inputs is kept for the backward
pass, which computes the activations again and adds the gradients of the weights with fp32 atomics.

Widths are padded to powers of two of at least 16, as ``tl.dot`` wants them. ``W0 .. W5`` are the widths, input first,
and ``P1 .. P5`` the padded ones, both 0 beyond the last layer; ``WN`` and ``PN`` are the output's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infnerf_ns.kernels.triton_launch import BANK_FIELDS, BLOCK_SHIFT


@triton.jit
def _tile_of(starts, groups, TILE: tl.constexpr):
    """This program's group, its first sample and the group's end; a program with no samples gets first >= end.

    Group g owns the tile numbers from ``starts[g] // TILE + g`` on up to the next group's: never fewer than it needs.
    So the tiles need no table, and their number is known without asking the device: P // TILE + G.
    """
    tile = tl.program_id(0)
    low, high = tile * 0, tile * 0 + groups
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(starts + middle) // TILE + middle <= tile
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    begin = tl.load(starts + low)
    return low, begin + (tile - (begin // TILE + low)) * TILE, tl.load(starts + low + 1)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b with fp32 sums; PRECISION of the factors: ieee (fp32), tf32, bf16 or fp16."""
    if PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "fp16":
        total = tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _weights(weights, FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    """A layer's weights [FAN_IN, FAN_OUT], padded with zeros to [IN, OUT]."""
    i, o = tl.arange(0, IN)[:, None], tl.arange(0, OUT)[None, :]
    return tl.load(weights + i * FAN_OUT + o, mask=(i < FAN_IN) & (o < FAN_OUT), other=0.0)


@triton.jit
def _inputs(inputs, sample, live, column, used, W0: tl.constexpr):
    """Columns of the inputs [TILE, CHUNK]; zeros where there is none."""
    place = inputs + sample[:, None] * W0 + column[None, :]
    return tl.load(place, mask=live[:, None] & (column < used)[None, :], other=0.0)


@triton.jit
def _input_weights(weights, column, used, W1: tl.constexpr, P1: tl.constexpr):
    """Rows of the first layer's weights [CHUNK, P1]; zeros where there is none."""
    o = tl.arange(0, P1)
    mask = (column < used)[:, None] & (o < W1)[None, :]
    return tl.load(weights + column[:, None] * W1 + o[None, :], mask=mask, other=0.0)


@triton.jit
def _first_layer(
    inputs, sample, live, used, weights, W0: tl.constexpr, W1: tl.constexpr, P1: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first layer before its activation [TILE, P1], from the inputs that can differ from zero."""
    total = tl.zeros([TILE, P1], tl.float32)
    for first in range(0, used, CHUNK):
        column = first + tl.arange(0, CHUNK)
        x = _inputs(inputs, sample, live, column, used, W0)
        total = _product(x, _input_weights(weights, column, used, W1, P1), total, PRECISION)
    return total


@triton.jit
def _next_layer(
    hidden, weights, FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A later layer before its activation [TILE, OUT], from the activations [TILE, IN] before it."""
    weight = _weights(weights, FAN_IN, FAN_OUT, IN, OUT)
    return _product(hidden, weight, tl.zeros([TILE, OUT], tl.float32), PRECISION)


@triton.jit
def _relu(hidden):
    """Hands on what is not a number, as torch's does."""
    return tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _back(
    hidden, delta, weights, grad, wanted, FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient [TILE, IN] before the activation of a later layer's inputs; where wanted, that of its weights is added
    to ``grad``."""
    if wanted:
        product = _product(tl.trans(hidden), delta, tl.zeros([IN, OUT], tl.float32), PRECISION)
        i, o = tl.arange(0, IN)[:, None], tl.arange(0, OUT)[None, :]
        tl.atomic_add(grad + i * FAN_OUT + o, product, mask=(i < FAN_IN) & (o < FAN_OUT), sem="relaxed")
    weight = tl.trans(_weights(weights, FAN_IN, FAN_OUT, IN, OUT))
    back = _product(delta, weight, tl.zeros([TILE, IN], tl.float32), PRECISION)
    return tl.where(hidden <= 0, 0.0, back)


@triton.jit(do_not_specialize=["groups"])
def forward(
    inputs, starts, level, row, used_inputs, groups, banks, offset, out,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr, P5: tl.constexpr,
    WN: tl.constexpr, PN: tl.constexpr, LAYERS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [P, WN] of inputs [P, W0]; ``starts .. used_inputs`` are those of :class:`Groups`. Grid: (P // TILE + G,)."""
    group, first, end = _tile_of(starts, groups, TILE)
    if first >= end:
        return
    sample = first + tl.arange(0, TILE)
    live = sample < end
    used = tl.load(used_inputs + group).to(tl.int32)
    bank = banks + tl.load(level + group) * BANK_FIELDS
    weights = tl.load(bank).to(tl.pointer_type(tl.float32)) + tl.load(row + group) * tl.load(bank + 1) + offset
    hidden = _first_layer(inputs, sample, live, used, weights, W0, W1, P1, TILE, CHUNK, PRECISION)
    weights += W0 * W1
    if LAYERS > 1:
        hidden = _next_layer(_relu(hidden), weights, W1, W2, P1, P2, TILE, PRECISION)
        weights += W1 * W2
    if LAYERS > 2:
        hidden = _next_layer(_relu(hidden), weights, W2, W3, P2, P3, TILE, PRECISION)
        weights += W2 * W3
    if LAYERS > 3:
        hidden = _next_layer(_relu(hidden), weights, W3, W4, P3, P4, TILE, PRECISION)
        weights += W3 * W4
    if LAYERS > 4:
        hidden = _next_layer(_relu(hidden), weights, W4, W5, P4, P5, TILE, PRECISION)
    o = tl.arange(0, PN)
    tl.store(out + sample[:, None] * WN + o[None, :], hidden, mask=live[:, None] & (o < WN)[None, :])


@triton.jit(do_not_specialize=["groups"])
def backward(
    inputs, starts, level, row, used_inputs, groups, banks, offset, grad_out, grad_inputs,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr, P5: tl.constexpr,
    WN: tl.constexpr, PN: tl.constexpr, LAYERS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WANT_INPUTS: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the banks that have one, flags their blocks and rows, and writes grad_inputs [P, W0] if
    WANT_INPUTS. Grid: (P // TILE + G,)."""
    group, first, end = _tile_of(starts, groups, TILE)
    if first >= end:
        return
    sample = first + tl.arange(0, TILE)
    live = sample < end
    used = tl.load(used_inputs + group).to(tl.int32)
    bank, node = banks + tl.load(level + group) * BANK_FIELDS, tl.load(row + group)
    page = tl.load(bank + 1)
    weights = tl.load(bank).to(tl.pointer_type(tl.float32)) + node * page + offset
    grad = tl.load(bank + 3)
    wanted = grad != 0
    grad = grad.to(tl.pointer_type(tl.float32)) + node * page + offset

    AT1: tl.constexpr = W0 * W1  # where the weights of the second layer start, and so on
    AT2: tl.constexpr = AT1 + W1 * W2
    AT3: tl.constexpr = AT2 + W2 * W3
    AT4: tl.constexpr = AT3 + W3 * W4
    SIZE: tl.constexpr = AT4 + W4 * W5
    if wanted:
        tl.store(tl.load(bank + 6).to(tl.pointer_type(tl.uint8)) + node, 1)
        flags = tl.load(bank + 4).to(tl.pointer_type(tl.uint8)) + node * tl.load(bank + 5)
        last = (offset + SIZE - 1) >> BLOCK_SHIFT
        for block in range(offset >> BLOCK_SHIFT, last + 1, 128):
            number = block + tl.arange(0, 128)
            tl.store(flags + number, 1, mask=number <= last)

    if LAYERS > 1:
        hidden1 = _relu(_first_layer(inputs, sample, live, used, weights, W0, W1, P1, TILE, CHUNK, PRECISION))
    if LAYERS > 2:
        hidden2 = _relu(_next_layer(hidden1, weights + AT1, W1, W2, P1, P2, TILE, PRECISION))
    if LAYERS > 3:
        hidden3 = _relu(_next_layer(hidden2, weights + AT2, W2, W3, P2, P3, TILE, PRECISION))
    if LAYERS > 4:
        hidden4 = _relu(_next_layer(hidden3, weights + AT3, W3, W4, P3, P4, TILE, PRECISION))

    o = tl.arange(0, PN)
    delta = tl.load(grad_out + sample[:, None] * WN + o[None, :], mask=live[:, None] & (o < WN)[None, :], other=0.0)
    if LAYERS > 4:
        delta = _back(hidden4, delta, weights + AT4, grad + AT4, wanted, W4, W5, P4, P5, TILE, PRECISION)
    if LAYERS > 3:
        delta = _back(hidden3, delta, weights + AT3, grad + AT3, wanted, W3, W4, P3, P4, TILE, PRECISION)
    if LAYERS > 2:
        delta = _back(hidden2, delta, weights + AT2, grad + AT2, wanted, W2, W3, P2, P3, TILE, PRECISION)
    if LAYERS > 1:
        delta = _back(hidden1, delta, weights + AT1, grad + AT1, wanted, W1, W2, P1, P2, TILE, PRECISION)

    o = tl.arange(0, P1)
    for chunk in range(0, used, CHUNK):
        column = chunk + tl.arange(0, CHUNK)
        if wanted:
            x = _inputs(inputs, sample, live, column, used, W0)
            product = _product(tl.trans(x), delta, tl.zeros([CHUNK, P1], tl.float32), PRECISION)
            place = grad + column[:, None] * W1 + o[None, :]
            tl.atomic_add(place, product, mask=(column < used)[:, None] & (o < W1)[None, :], sem="relaxed")
        if WANT_INPUTS:
            weight = tl.trans(_input_weights(weights, column, used, W1, P1))
            back = _product(delta, weight, tl.zeros([TILE, CHUNK], tl.float32), PRECISION)
            place = grad_inputs + sample[:, None] * W0 + column[None, :]
            tl.store(place, back, mask=live[:, None] & (column < W0)[None, :])
    if WANT_INPUTS:
        for chunk in range((used + CHUNK - 1) // CHUNK * CHUNK, W0, CHUNK):
            column = chunk + tl.arange(0, CHUNK)
            place = grad_inputs + sample[:, None] * W0 + column[None, :]
            tl.store(place, tl.zeros([TILE, CHUNK], tl.float32), mask=live[:, None] & (column < W0)[None, :])
