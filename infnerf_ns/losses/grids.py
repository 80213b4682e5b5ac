"""Losses on the entries of the hash grids, at random vertices.

A loss over whole banks would touch all of their entries in every step, and so would the optimizer; random vertices of
the nodes at hand have the same mean. They are read with ``hash_encode``, whose backward pass adds to a bank's gradient
in place as the field's does. Where the grid coordinate ``scale * local + 1/2`` (:mod:`infnerf_ns.kernels.layout`) is a
whole number, the trilinear interpolation returns one vertex alone, but for the coordinate's rounding, 1e-7 of it. Local
positions in [0, 1) have the vertices 1 .. ceil(scale - 1/2); the layers outside of these, of which samples less than
half a cell from a face of the node see a part, are not drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels import Backend, HashLayout, hash_encode


def vertex_positions(vertices: Int[Tensor, "V 3"], scale: Float[Tensor, "V"]) -> Float[Tensor, "V 3"]:
    """Local positions at which ``hash_encode`` returns the values of vertices, in ``scale``'s type.

    Args:
        vertices: numbers of the vertices per axis, 1 .. :func:`last_vertices`.
        scale: of the hash level of each vertex (:attr:`HashLayout.scales`).
    """
    return ((vertices - 0.5) / scale[:, None]).clamp(max=1.0 - 2.0**-24)


def last_vertices(layout: HashLayout) -> np.ndarray:
    """[L] int64, the last vertex per axis of each hash level that has a position in [0, 1)."""
    return np.ceil(layout.scales.astype(np.float64) - 0.5).astype(np.int64)


def grid_decay(
    bank: Float[Tensor, "N page"],
    layout: HashLayout,
    rows: Int[Tensor, "K"],
    num_vertices: int,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Normalised decay of Zip-NeRF (Barron et al. 2023): the sum over hash levels of the mean square of
    their entries, estimated at random vertices. A mean per level, as a sum would leave the coarse levels, which have
    few entries, nearly free.

    Args:
        bank: one page per node; the hash grid stands first in the page.
        layout: of the grids.
        rows: of the bank, from which the vertices' nodes are drawn; at least one.
        num_vertices: number of vertices drawn per hash level.
        backend: see :func:`infnerf_ns.kernels.choose`.
    """
    last = torch.from_numpy(last_vertices(layout)).to(bank.device)
    levels = torch.arange(layout.num_levels, device=bank.device).repeat_interleave(num_vertices)
    vertices = _random_vertices(last[levels, None].expand(-1, 3))
    values = _values(vertices, levels, _random_rows(rows, len(levels)), bank, layout, backend)
    return values.square().sum() / (num_vertices * layout.features)


def grid_total_variation(
    bank: Float[Tensor, "N page"],
    layout: HashLayout,
    rows: Int[Tensor, "K"],
    num_vertices: int,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Mean squared difference between the features of adjacent vertices (Plenoxels, Fridovich-Keil et al. 2022,
    without its square root), at random vertices along random axes; mean over hash levels and features.

    Args: as for :func:`grid_decay`.
    """
    last = torch.from_numpy(last_vertices(layout)).to(bank.device)
    levels = torch.nonzero(last > 1)[:, 0].repeat_interleave(num_vertices)  # a base resolution of 2 has no pair
    axis = torch.randint(3, (len(levels),), device=bank.device)
    onwards = torch.nn.functional.one_hot(axis, 3)
    vertices = _random_vertices(last[levels, None] - onwards)
    chosen = _random_rows(rows, len(levels)).repeat(2)
    pairs = torch.cat([vertices, vertices + onwards])
    near, far = _values(pairs, levels.repeat(2), chosen, bank, layout, backend).chunk(2)
    return (near - far).square().sum() / max(1, near.numel())


def _random_vertices(last: Int[Tensor, "V 3"]) -> Int[Tensor, "V 3"]:
    return 1 + torch.randint(1 << 31, last.shape, device=last.device) % last


def _random_rows(rows: Int[Tensor, "K"], count: int) -> Int[Tensor, "V"]:
    return rows[torch.randint(len(rows), (count,), device=rows.device)]


def _values(
    vertices: Tensor, levels: Tensor, rows: Tensor, bank: Tensor, layout: HashLayout, backend: Backend
) -> Float[Tensor, "V F"]:
    """Entries of vertices, each of its own hash level and node."""
    scale = torch.from_numpy(layout.scales).to(bank)[levels]
    encoded = hash_encode(vertex_positions(vertices, scale), rows, bank, layout, backend)
    encoded = encoded.reshape(-1, layout.num_levels, layout.features)
    return encoded[torch.arange(len(levels), device=bank.device), levels]
