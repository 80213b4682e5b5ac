"""The walk down the tree on CUDA with Triton: one launch, all levels of a sample in one program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route(
    unit, footprints, children, gsd, path, count, depth, HAS_FOOTPRINTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Fills path [M, depth] with each sample's node per level, -1 below the node that keeps it. Grid: (blocks of M,).

    Args:
        unit: [M, 3] unit coordinates.
        footprints: [M] radii, not read without HAS_FOOTPRINTS.
        children: [N, 8] node numbers, -1 = none.
        gsd: [depth] ground sampling distance per level.
        path: [M, depth] int64, written.
        count: M.
        depth: levels, at least 1.
    """
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = sample < count
    x = tl.load(unit + sample * 3, mask=live, other=-1.0)
    y = tl.load(unit + sample * 3 + 1, mask=live, other=-1.0)
    z = tl.load(unit + sample * 3 + 2, mask=live, other=-1.0)
    walks = (x >= 0) & (x < 1) & (y >= 0) & (y < 1) & (z >= 0) & (z < 1)
    if HAS_FOOTPRINTS:
        radius = tl.load(footprints + sample, mask=live, other=0.0)
    node = tl.zeros([BLOCK], tl.int64)
    tl.store(path + sample * depth, node, mask=live)
    for level in range(1, depth):
        if HAS_FOOTPRINTS:
            walks = walks & (radius < tl.load(gsd + level - 1))
        x, y, z = 2 * x, 2 * y, 2 * z  # cells of this level
        octant = (x.to(tl.int32) & 1) + 2 * (y.to(tl.int32) & 1) + 4 * (z.to(tl.int32) & 1)
        node = tl.load(children + node * 8 + octant, mask=walks, other=-1)
        walks = walks & (node >= 0)
        tl.store(path + sample * depth + level, node, mask=live)
