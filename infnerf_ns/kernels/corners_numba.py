"""Which entries of a hash level a chunk of samples reads, for the CPU kernels; and how they are fetched ahead of time.

A grid does not fit in the caches near a core, so a lookup waits for memory. All entries of a chunk are therefore worked
out first, in loops that the compiler turns into vector instructions, and requested some samples before they are used.
Measured on the default root page (8 levels of 2**17 entries), one core: 10.4 ms for 16,384 samples without, 8.8 ms with
the numbers worked out first, 2.2 to 3.3 ms with the requests, which numba offers no function for.

What is here is inlined into the kernels of other files, and numba's cache of those does not notice a change here: after
one, delete the ``*.nbi`` files in ``__pycache__``.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CHUNK = 512
"""samples whose entries are worked out at once"""
AHEAD = 16
"""samples between the request of an entry and its use: 16 and 32 measured alike, 8 and 64 slower"""
_Y, _Z = np.uint32(2654435761), np.uint32(805459861)


@intrinsic
def prefetch(typing_context, array, row, column):  # noqa: ANN001, ANN201
    """``prefetch(array [N, M], row, column)``: request the cache line of an element, without waiting for it."""
    del typing_context

    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        element = cgutils.get_item_pointer(
            context, builder, signature.args[0], made, list(arguments[1:]), wraparound=False
        )
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        request = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0"
        )
        # Read or write is the same request on most processors; 3 = keep in all caches; 1 = data, not instructions.
        builder.call(request, [builder.bitcast(element, pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.uintp, types.uintp), generate


@nb.njit(inline="always")
def grid_of(hash_level, features, scales, resolutions, sizes, offsets, hashed):
    """A hash level's scale, resolution, number of entries, first element in a page, and whether it is hashed."""
    resolution, size = np.uint32(resolutions[hash_level]), np.uint32(sizes[hash_level])
    return scales[hash_level], resolution, size, np.uintp(offsets[hash_level] * features), hashed[hash_level]


@nb.njit(inline="always")
def scratch():
    """Room for a chunk: local coordinates [3, CHUNK], row of the page [CHUNK], place in the cell [3, CHUNK] and entries
    of the cell's corners [8, CHUNK]."""
    local, place = np.empty((3, CHUNK), np.float32), np.empty((3, CHUNK), np.float32)
    return local, np.empty(CHUNK, np.uintp), place, np.empty((8, CHUNK), np.uint32)


@nb.njit(inline="always")
def _cell(x):
    """The integer below x >= 0; 0 for what is not a number, whose conversion is undefined and differs by processor. Its
    place in the cell stays no number, and tells."""
    return np.int32(x if x > np.float32(0) else np.float32(0))


@nb.njit(inline="always")
def corner_entries(local, count, scale, resolution, size, hashed, place, entry):
    """Fills place [3, CHUNK], the place in the cell, and entry [8, CHUNK], the entries of the cell's corners, for the
    first ``count`` samples at local coordinates [3, CHUNK]."""
    half, one = np.float32(0.5), np.uint32(1)
    if hashed:
        mask = np.uint32(size - one)
        for i in range(count):
            gx, gy, gz = local[0, i] * scale + half, local[1, i] * scale + half, local[2, i] * scale + half
            cx, cy, cz = _cell(gx), _cell(gy), _cell(gz)
            place[0, i], place[1, i], place[2, i] = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
            x0, y0, z0 = np.uint32(cx), np.uint32(np.uint32(cy) * _Y), np.uint32(np.uint32(cz) * _Z)
            x1, y1, z1 = np.uint32(x0 + one), np.uint32(y0 + _Y), np.uint32(z0 + _Z)
            entry[0, i], entry[1, i] = (x0 ^ y0 ^ z0) & mask, (x1 ^ y0 ^ z0) & mask
            entry[2, i], entry[3, i] = (x0 ^ y1 ^ z0) & mask, (x1 ^ y1 ^ z0) & mask
            entry[4, i], entry[5, i] = (x0 ^ y0 ^ z1) & mask, (x1 ^ y0 ^ z1) & mask
            entry[6, i], entry[7, i] = (x0 ^ y1 ^ z1) & mask, (x1 ^ y1 ^ z1) & mask
    else:
        layer = np.uint32(resolution * resolution)
        for i in range(count):
            gx, gy, gz = local[0, i] * scale + half, local[1, i] * scale + half, local[2, i] * scale + half
            cx, cy, cz = _cell(gx), _cell(gy), _cell(gz)
            place[0, i], place[1, i], place[2, i] = gx - np.float32(cx), gy - np.float32(cy), gz - np.float32(cz)
            first = np.uint32(np.uint32(cx) + resolution * np.uint32(cy) + layer * np.uint32(cz))
            for corner in range(8):
                index = np.uint32(first + np.uint32(corner & 1))
                if corner & 2:
                    index = np.uint32(index + resolution)
                if corner & 4:
                    index = np.uint32(index + layer)
                # Vertices past the last one wrap around; a dense level has so many entries that once is enough, but
                # not for a caller's position beyond 1.
                index = np.uint32(index - size) if index >= size else index
                entry[corner, i] = min(index, np.uint32(size - one))


@nb.njit(inline="always")
def corner_weight(fx, fy, fz, corner):
    """Trilinear weight of a cell's corner."""
    wx = fx if corner & 1 else np.float32(1) - fx
    wy = fy if corner & 2 else np.float32(1) - fy
    wz = fz if corner & 4 else np.float32(1) - fz
    return wx * wy * wz


@nb.njit(inline="always")
def request(bank, row, base, features, entry, i):
    """Requests the entries of one sample's cell; row [CHUNK] of the samples' pages."""
    for corner in range(8):
        prefetch(bank, row[i], base + np.uintp(entry[corner, i]) * np.uintp(features))
