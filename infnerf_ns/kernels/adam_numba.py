"""Adam on the entries of a bank that a step touched, on the CPU (:class:`infnerf_ns.training.optimizer.NodeAdam`).

What was touched lies scattered over the pages, so an update waits for memory and, if it looks at one flag at a time,
for mispredicted branches. The touched blocks of a share of a page are therefore listed first, and the four arrays of a
block requested some blocks ahead of its update, which is one vector instruction per operation. Measured with 155,000
of 1,200,000 blocks touched, one core: 25 ms one flag and one entry at a time, 8 ms so.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from infnerf_ns.kernels.corners_numba import prefetch
from infnerf_ns.kernels.hash_numba import BLOCK_SHIFT

_BLOCK = 1 << BLOCK_SHIFT
_AHEAD = 8
"""blocks between the request of a block and its update"""
_TOO_LARGE = np.int32((127 + 60) << 23)
"""bits of 2**60: the square of what is below it is finite"""
_SHARES = 8
"""shares of a row, so that one row alone still keeps all threads busy"""


@intrinsic
def _magnitude(typing_context, number):  # noqa: ANN001, ANN202
    """The bits of a float32 but for its sign, as a whole number: ordered as the magnitudes, NaN above all. Arithmetic
    with fastmath promises the compiler that no number is NaN, so comparisons of the numbers themselves find none."""
    del typing_context, number

    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        bits = ir.IntType(32)
        return builder.and_(builder.bitcast(arguments[0], bits), ir.Constant(bits, 0x7FFFFFFF))

    return types.int32(types.float32), generate


@nb.njit(inline="always")
def _listed_blocks(touched, r, first_word, last_word, blocks, clear):
    """Fills blocks with the numbers of the flagged blocks in a range of eights and may clear their flags; returns how
    many."""
    flags = touched[r]
    words = flags.view(np.uint64)
    count = 0
    for word in range(first_word, last_word):
        if words[word] != 0:
            for block in range(8 * word, 8 * word + 8):
                blocks[count] = block
                count += flags[block]
            if clear:
                words[word] = 0
    return count


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def touched_step(bank, grad, touched, rows, row_steps, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, warmup, factor):
    """Updates bank [N, page] and its moments where grad is not zero, and clears grad and flags there. Entries whose
    gradient is NaN, infinite or too large to be squared keep their values; returns how many.

    Args:
        bank, grad, exp_avg, exp_avg_sq: [N, page].
        touched: [N, B] flags (0 or 1) of blocks of 16 entries, B a multiple of 8.
        rows: those that were touched.
        row_steps: [N] steps of each row's own, this one counted.
        lr, beta1, beta2, eps, warmup: as in NodeAdam.
        factor: of the gradients.
    """
    scale, left_out = np.float32(factor), 0
    page, words = bank.shape[1], touched.shape[1] // 8
    b1, b2, small = np.float32(beta1), np.float32(beta2), np.float32(eps)
    one, zero = np.float32(1), np.float32(0)
    c1, c2 = one - b1, one - b2
    for task in nb.prange(len(rows) * _SHARES):
        r, share = np.uintp(rows[task // _SHARES]), task % _SHARES
        rate = np.float32(lr * min(1.0, row_steps[r] / max(warmup, 1)) / (1 - beta1 ** row_steps[r]))
        correction = np.float32(1 / np.sqrt(1 - beta2 ** row_steps[r]))
        first_word, last_word = words * share // _SHARES, words * (share + 1) // _SHARES
        blocks = np.empty(8 * (last_word - first_word) + 1, np.int32)
        count = _listed_blocks(touched, r, first_word, last_word, blocks, True)
        # A sum per place in a block: one sum would have to be added across a vector for every block.
        wrong = np.zeros(_BLOCK, np.float32)
        for i in range(count):
            if i + _AHEAD < count:
                ahead = np.uintp(blocks[i + _AHEAD]) << np.uintp(BLOCK_SHIFT)
                prefetch(grad, r, ahead)
                prefetch(exp_avg, r, ahead)
                prefetch(exp_avg_sq, r, ahead)
                prefetch(bank, r, ahead)
            start = np.intp(blocks[i]) << BLOCK_SHIFT
            stop = min(start + _BLOCK, page)
            g_block, p_block = grad[r, start:stop], bank[r, start:stop]
            m_block, v_block = exp_avg[r, start:stop], exp_avg_sq[r, start:stop]
            if scale != one:
                for k in range(stop - start):
                    g_block[k] *= scale if _magnitude(g_block[k]) < _TOO_LARGE else one
            if stop - start == _BLOCK:  # a length known to the compiler, and no branch: entries with no gradient keep
                for k in range(_BLOCK):
                    g, m0, v0 = g_block[k], m_block[k], v_block[k]
                    m, v, size = b1 * m0 + c1 * g, b2 * v0 + c2 * g * g, _magnitude(g)
                    live = (size != 0) & (size < _TOO_LARGE)
                    wrong[k] += zero if size < _TOO_LARGE else one
                    m_block[k] = m if live else m0
                    v_block[k] = v if live else v0
                    change = rate * m / (np.sqrt(v) * correction + small)
                    p_block[k] = p_block[k] - (change if live else zero)
                    g_block[k] = zero
            else:
                for k in range(stop - start):
                    g, size = g_block[k], _magnitude(g_block[k])
                    wrong[k] += zero if size < _TOO_LARGE else one
                    if (size != 0) & (size < _TOO_LARGE):
                        m_block[k] = b1 * m_block[k] + c1 * g
                        v_block[k] = b2 * v_block[k] + c2 * g * g
                        p_block[k] -= rate * m_block[k] / (np.sqrt(v_block[k]) * correction + small)
                    g_block[k] = zero
        left_out += np.int64(wrong.sum())
    return left_out


@nb.njit(parallel=True, cache=True, fastmath=True, error_model="numpy", boundscheck=False)
def touched_square(grad, touched, rows):
    """Sum of the squares of the gradients that `touched_step` takes; the same on any number of threads."""
    page, words = grad.shape[1], touched.shape[1] // 8
    sums = np.zeros(len(rows) * _SHARES)
    for task in nb.prange(len(rows) * _SHARES):
        r, share = np.uintp(rows[task // _SHARES]), task % _SHARES
        first_word, last_word = words * share // _SHARES, words * (share + 1) // _SHARES
        blocks = np.empty(8 * (last_word - first_word) + 1, np.int32)
        count = _listed_blocks(touched, r, first_word, last_word, blocks, False)
        squares = np.zeros(_BLOCK)  # of each place in a block, as above
        for i in range(count):
            start = np.uintp(blocks[i]) << np.uintp(BLOCK_SHIFT)
            g_block = grad[r, start : min(start + _BLOCK, page)]
            for k in range(len(g_block)):
                g = np.float64(g_block[k])
                squares[k] += g * g if _magnitude(g_block[k]) < _TOO_LARGE else 0.0
        sums[task] = squares.sum()
    return sums.sum()


@nb.njit(cache=True)
def clear(grad, touched, rows):
    """Clears gradients and flags of the touched blocks of some rows."""
    page = grad.shape[1]
    for r in rows:
        for block in range(touched.shape[1]):
            if touched[r, block]:
                touched[r, block] = 0
                grad[r, block << BLOCK_SHIFT : min((block + 1) << BLOCK_SHIFT, page)] = 0
