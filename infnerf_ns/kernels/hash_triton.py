"""``hash_encode`` on CUDA with Triton: one program per block of samples and hash level, gradients with atomics.

A lane works on one feature of one sample. The lanes of an entry stand side by side, so that its floats are read, added
and written together without any exchange between lanes; that each computes the same address costs less than memory.
Programs of one hash level run side by side, so that its entries stay in the second-level cache while it is worked on
(Instant-NGP, Mueller et al. 2022, section 4). Addresses have 64 bits, as a bank can exceed 2^31 floats. The gradient
of an entry is a sum of fp32 atomics, whose order, and with it the last bits, differ from run to run.

``grids``, ``scales`` and ``banks`` are the tables of :mod:`infnerf_ns.kernels.triton_launch`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infnerf_ns.kernels.triton_launch import BLOCK_SHIFT, GRID_FIELDS


@triton.jit
def grid_of(grids, scales, entry):
    """A hash level's scale, resolution, number of entries, first float in a page, and whether it is hashed."""
    fields = grids + entry * GRID_FIELDS
    resolution, size = tl.load(fields).to(tl.uint32), tl.load(fields + 1).to(tl.uint32)
    return tl.load(scales + entry), resolution, size, tl.load(fields + 2), tl.load(fields + 3) != 0


@triton.jit
def cell_of(x, y, z, scale):
    """Cell of local coordinates, and the place in the cell."""
    gx, gy, gz = x * scale + 0.5, y * scale + 0.5, z * scale + 0.5
    cx, cy, cz = gx.to(tl.int32), gy.to(tl.int32), gz.to(tl.int32)
    fx, fy, fz = gx - cx.to(tl.float32), gy - cy.to(tl.float32), gz - cz.to(tl.float32)
    return cx.to(tl.uint32), cy.to(tl.uint32), cz.to(tl.uint32), fx, fy, fz


@triton.jit
def element_of(cx, cy, cz, CORNER: tl.constexpr, resolution, size, hashed, FEATURES: tl.constexpr):
    """First float of a cell corner's entry, counted from the hash level's first."""
    x, y, z = cx + (CORNER & 1), cy + ((CORNER >> 1) & 1), cz + ((CORNER >> 2) & 1)
    mixed = (x ^ (y * 2654435761) ^ (z * 805459861)) & (size - 1)
    index = x + resolution * (y + resolution * z)
    # Less than one lap past the end, so a difference is the remainder; the minimum guards against positions that are
    # not in [0, 1).
    index = tl.minimum(tl.where(index >= size, index - size, index), size - 1)
    return tl.where(hashed, mixed, index).to(tl.int64) * FEATURES


@triton.jit
def weight_of(fx, fy, fz, CORNER: tl.constexpr):
    """Trilinear weight of a cell's corner."""
    wx = fx if CORNER & 1 else 1 - fx
    wy = fy if CORNER & 2 else 1 - fy
    wz = fz if CORNER & 4 else 1 - fz
    return wx * wy * wz


@triton.jit
def lanes_of(count, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Sample and feature of this program's lanes, and whether the sample exists. Grid: (blocks of lanes, ...)."""
    lane = tl.arange(0, BLOCK)
    sample = tl.program_id(0).to(tl.int64) * (BLOCK // FEATURES) + lane // FEATURES
    return sample, lane % FEATURES, sample < count


@triton.jit
def xyz_of(positions, sample, live):
    """Coordinates of samples in positions [M, 3]; 0 where the sample does not count."""
    x = tl.load(positions + sample * 3, mask=live, other=0.0)
    y = tl.load(positions + sample * 3 + 1, mask=live, other=0.0)
    z = tl.load(positions + sample * 3 + 2, mask=live, other=0.0)
    return x, y, z


@triton.jit
def interpolate(pages, live, x, y, z, scale, resolution, size, hashed, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """One feature per lane [BLOCK] at local coordinates; ``pages`` point to that feature of the hash level's first
    entry in the page of the lane's node."""
    cx, cy, cz, fx, fy, fz = cell_of(x, y, z, scale)
    total = tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(8):
        element = element_of(cx, cy, cz, corner, resolution, size, hashed, FEATURES)
        total += weight_of(fx, fy, fz, corner) * tl.load(pages + element, mask=live, other=0.0)
    return total


@triton.jit
def scatter(gradient, bank, row, feature, live, x, y, z, scale, resolution, size, base, hashed, FEATURES: tl.constexpr):
    """Adds the gradient of each lane's feature [BLOCK] to the entries around local coordinates, and flags them.

    ``bank`` points to the fields of a bank that has a gradient; ``base`` is the hash level's first float in a page.
    """
    page, grad = tl.load(bank + 1), tl.load(bank + 3).to(tl.pointer_type(tl.float32))
    touched, blocks, rows = tl.load(bank + 4), tl.load(bank + 5), tl.load(bank + 6)
    live = live & (gradient != 0)  # holds for NaN, which must not get lost
    tl.store(rows.to(tl.pointer_type(tl.uint8)) + row, 1, mask=live)
    flags = touched.to(tl.pointer_type(tl.uint8)) + row * blocks
    entries = grad + row * page + feature
    cx, cy, cz, fx, fy, fz = cell_of(x, y, z, scale)
    for corner in tl.static_range(8):
        element = base + element_of(cx, cy, cz, corner, resolution, size, hashed, FEATURES)
        tl.store(flags + (element >> BLOCK_SHIFT), 1, mask=live)
        tl.atomic_add(entries + element, weight_of(fx, fy, fz, corner) * gradient, mask=live, sem="relaxed")


@triton.jit
def forward(
    positions, row, banks, grids, scales, out, count, width, FEATURES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [P, width] = features of positions [P, 3] in pages row [P] of the first bank. Grid: (blocks of lanes, L)."""
    level = tl.program_id(1)
    scale, resolution, size, base, hashed = grid_of(grids, scales, level)
    sample, feature, live = lanes_of(count, FEATURES, BLOCK)
    x, y, z = xyz_of(positions, sample, live)
    row = tl.load(row + sample, mask=live, other=0)
    pages = tl.load(banks).to(tl.pointer_type(tl.float32)) + row * tl.load(banks + 1) + base + feature
    features = interpolate(pages, live, x, y, z, scale, resolution, size, hashed, FEATURES, BLOCK)
    tl.store(out + sample * width + level * FEATURES + feature, features, mask=live)


@triton.jit
def backward_bank(
    positions, row, banks, grids, scales, grad_out, count, width, FEATURES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds the gradient to that of the first bank and flags what it touches. Grid: (blocks of lanes, L)."""
    level = tl.program_id(1)
    scale, resolution, size, base, hashed = grid_of(grids, scales, level)
    sample, feature, live = lanes_of(count, FEATURES, BLOCK)
    x, y, z = xyz_of(positions, sample, live)
    row = tl.load(row + sample, mask=live, other=0)
    gradient = tl.load(grad_out + sample * width + level * FEATURES + feature, mask=live, other=0.0)
    scatter(gradient, banks, row, feature, live, x, y, z, scale, resolution, size, base, hashed, FEATURES)


@triton.jit
def backward_positions(
    positions, row, banks, grids, scales, grad_out, grad_positions, count, width, levels,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_positions [P, 3] = gradient of the trilinear interpolation. Grid: (blocks of lanes,)."""
    sample, feature, live = lanes_of(count, FEATURES, BLOCK)
    x, y, z = xyz_of(positions, sample, live)
    row = tl.load(row + sample, mask=live, other=0)
    pages = tl.load(banks).to(tl.pointer_type(tl.float32)) + row * tl.load(banks + 1) + feature
    dx, dy, dz = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for level in range(levels):
        scale, resolution, size, base, hashed = grid_of(grids, scales, level)
        cx, cy, cz, fx, fy, fz = cell_of(x, y, z, scale)
        gradient = tl.load(grad_out + sample * width + level * FEATURES + feature, mask=live, other=0.0) * scale
        for corner in tl.static_range(8):
            element = base + element_of(cx, cy, cz, corner, resolution, size, hashed, FEATURES)
            slope = tl.load(pages + element, mask=live, other=0.0) * gradient
            wx = fx if corner & 1 else 1 - fx
            wy = fy if corner & 2 else 1 - fy
            wz = fz if corner & 4 else 1 - fz
            dx += slope * wy * wz if corner & 1 else -slope * wy * wz
            dy += slope * wx * wz if corner & 2 else -slope * wx * wz
            dz += slope * wx * wy if corner & 4 else -slope * wx * wy
    SAMPLES: tl.constexpr = BLOCK // FEATURES
    place = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    live = place < count
    tl.store(grad_positions + place * 3, tl.sum(tl.reshape(dx, [SAMPLES, FEATURES]), axis=1), mask=live)
    tl.store(grad_positions + place * 3 + 1, tl.sum(tl.reshape(dy, [SAMPLES, FEATURES]), axis=1), mask=live)
    tl.store(grad_positions + place * 3 + 2, tl.sum(tl.reshape(dz, [SAMPLES, FEATURES]), axis=1), mask=live)
