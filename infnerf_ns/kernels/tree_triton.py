"""Hash grids along the samples' paths down the tree, on CUDA with Triton: one launch over all octree levels.

What :mod:`infnerf_ns.kernels.hash_triton` does, with all that stands around it in a tree: local coordinates (contracted
in the root), down-weighting by the footprint, and the place of a level's features among all features. Coordinates and
weights are computed again wherever they are needed: that is cheaper than reading them from memory.

``grids``, ``scales`` and ``banks`` are the tables of :mod:`infnerf_ns.kernels.triton_launch`; a hash level knows its
octree level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from infnerf_ns.kernels.hash_triton import grid_of, interpolate, lanes_of, scatter, xyz_of
from infnerf_ns.kernels.triton_launch import BANK_FIELDS, GRID_FIELDS

LARGEST_BELOW_ONE: tl.constexpr = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _inside(x):
    """Hands on what is not a number, so that it reaches the loss."""
    low = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, LARGEST_BELOW_ONE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _contract(x, y, z):
    """The L-inf contraction of :func:`infnerf_ns.octree.contract`, and one over the norm there (1 inside the cube)."""
    x, y, z = 2 * x - 1, 2 * y - 1, 2 * z - 1
    inverse = 1 / tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.maximum(tl.abs(z), 1.0))
    factor = (2 - inverse) * inverse * 0.25
    return _inside(factor * x + 0.5), _inside(factor * y + 0.5), _inside(factor * z + 0.5), inverse


@triton.jit
def _local(x, y, z, level, node, live, coords):
    """Local coordinates of samples in their nodes of an octree level, and one over the norm that contracts the root."""
    rx, ry, rz, inverse = _contract(x, y, z)
    cells = (1 << level.to(tl.int32)).to(tl.float32)
    lx = _inside(x * cells - tl.load(coords + node * 3, mask=live, other=0).to(tl.float32))
    ly = _inside(y * cells - tl.load(coords + node * 3 + 1, mask=live, other=0).to(tl.float32))
    lz = _inside(z * cells - tl.load(coords + node * 3 + 2, mask=live, other=0).to(tl.float32))
    root = level == 0
    return tl.where(root, rx, lx), tl.where(root, ry, ly), tl.where(root, rz, lz), tl.where(root, inverse, 1.0)


@triton.jit
def _level_weight(cells, entry, footprints, sample, live, inverse, ALONG: tl.constexpr):
    """erf(cells / footprint) of a hash level (Zip-NeRF, eq. 9); footprints are lengths ALONG the ray, or across it."""
    shrink = inverse * inverse if ALONG else (2 - inverse) * inverse
    radius = tl.load(footprints + sample, mask=live, other=1.0) * shrink
    return tl.erf(tl.load(cells + entry) / tl.maximum(radius, 1e-12))


@triton.jit
def encode(
    unit, path, coords, footprints, cells, banks, grids, scales, out, count, depth, width,
    FEATURES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the features of all nodes on each sample's path into out [M, width]; columns of missing nodes are left
    alone. Grid: (blocks of lanes, E).

    Args:
        unit: [M, 3] unit coordinates.
        path: [M, depth] nodes, -1 = none.
        coords: [N, 3] coordinates of all nodes.
        footprints: [M] radii and ``cells`` [E]: the weight of a hash level is erf(cells / footprint); not read unless
            WEIGHTED.
        count: M.
    """
    entry = tl.program_id(1)
    level, column = tl.load(grids + entry * GRID_FIELDS + 4), tl.load(grids + entry * GRID_FIELDS + 5)
    sample, feature, exists = lanes_of(count, FEATURES, BLOCK)
    node = tl.load(path + sample * depth + level, mask=exists, other=-1)
    live = node >= 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    scale, resolution, size, base, hashed = grid_of(grids, scales, entry)
    x, y, z = xyz_of(unit, sample, live)
    x, y, z, inverse = _local(x, y, z, level, node, live, coords)
    bank = banks + level * BANK_FIELDS
    row = node - tl.load(bank + 2)
    pages = tl.load(bank).to(tl.pointer_type(tl.float32)) + row * tl.load(bank + 1) + base + feature
    features = interpolate(pages, live, x, y, z, scale, resolution, size, hashed, FEATURES, BLOCK)
    if WEIGHTED:
        features *= _level_weight(cells, entry, footprints, sample, live, inverse, False)
    tl.store(out + sample * width + column + feature, features, mask=live)


@triton.jit
def encode_backward(
    unit, path, coords, footprints, cells, banks, grids, scales, grad_out, count, depth, width,
    FEATURES: tl.constexpr, WEIGHTED: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the banks that have one, and flags what it touches. Grid: (blocks of lanes, E).

    ``grad_out`` is [M, width], or [M] if SUMMED: the gradient of :func:`add_sum`. The rest is as for :func:`encode`.
    """
    entry = tl.program_id(1)
    level, column = tl.load(grids + entry * GRID_FIELDS + 4), tl.load(grids + entry * GRID_FIELDS + 5)
    bank = banks + level * BANK_FIELDS
    if tl.load(bank + 3) == 0:
        return
    sample, feature, exists = lanes_of(count, FEATURES, BLOCK)
    node = tl.load(path + sample * depth + level, mask=exists, other=-1)
    live = node >= 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    place = sample if SUMMED else sample * width + column + feature
    gradient = tl.load(grad_out + place, mask=live, other=0.0)
    scale, resolution, size, base, hashed = grid_of(grids, scales, entry)
    x, y, z = xyz_of(unit, sample, live)
    x, y, z, inverse = _local(x, y, z, level, node, live, coords)
    if WEIGHTED:
        gradient *= _level_weight(cells, entry, footprints, sample, live, inverse, SUMMED)
    row = node - tl.load(bank + 2)
    scatter(gradient, bank, row, feature, live, x, y, z, scale, resolution, size, base, hashed, FEATURES)


@triton.jit
def add_sum(
    unit, path, coords, footprints, cells, banks, grids, scales, out, count, depth, entries,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [M] = weighted sum of the features, one per entry, of all nodes on each sample's path; arguments as for
    :func:`encode`. Grid: (blocks of lanes,)."""
    sample, feature, exists = lanes_of(count, 1, BLOCK)
    x, y, z = xyz_of(unit, sample, exists)
    total = tl.zeros([BLOCK], tl.float32)
    for entry in range(entries):
        level = tl.load(grids + entry * GRID_FIELDS + 4)
        node = tl.load(path + sample * depth + level, mask=exists, other=-1)
        live = node >= 0
        scale, resolution, size, base, hashed = grid_of(grids, scales, entry)
        lx, ly, lz, inverse = _local(x, y, z, level, node, live, coords)
        bank = banks + level * BANK_FIELDS
        pages = tl.load(bank).to(tl.pointer_type(tl.float32)) + (node - tl.load(bank + 2)) * tl.load(bank + 1) + base
        feature_here = interpolate(pages, live, lx, ly, lz, scale, resolution, size, hashed, 1, BLOCK)
        if WEIGHTED:
            feature_here *= _level_weight(cells, entry, footprints, sample, live, inverse, True)
        total += feature_here
    tl.store(out + sample, total, mask=exists)
