"""What the samples of a training step say about the octants of the nodes that evaluated them.

As torch operations the sums over 16,000 samples were 3 % of a step on one core; the numba form is one pass. The torch
form is the reference, and what runs on CUDA.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels import statistics_numba
from infnerf_ns.kernels.numba_lock import flat, numba_lock, on_cpu

COLUMNS = ("samples", "weight", "error", "gradient", "asking_weight", "asking_error", "asking_gradient")
"""Of the table, per node and octant: number of samples, their rendering weight (in rays), the squared photometric error
and the gradient's magnitude that fall to them; and the latter three once more for the samples alone that lie in the
root cube and whose footprint is finer than what the node resolves: those that a child would take over."""


@torch.no_grad()
def add_samples(
    unit: Float[Tensor, "M 3"],
    node: Int[Tensor, "M"],
    footprints: Float[Tensor, "M"],
    share: Float[Tensor, "M"],
    weights: Float[Tensor, "RS"],
    error: Float[Tensor, "R"],
    gradient: Float[Tensor, "M"],
    order: Int[Tensor, "M"],
    level: Int[Tensor, "N"],
    coords: Int[Tensor, "N 3"],
    gsd: list[float],
    table: Float[Tensor, "N 8 7"],
) -> None:
    """Adds the samples of R rays to a table of sums (:data:`COLUMNS`), in place.

    Args:
        unit: positions in unit coordinates, sorted by node.
        node: that has evaluated each.
        footprints: radii, scene units.
        share: of its place along the ray that each sorted sample's answer is.
        weights: rendering weights of all samples along the rays, ray by ray.
        error: of each ray; every sample is given its weight's part of it.
        gradient: magnitude, of each sorted sample.
        order: place of each sorted sample in ``weights``.
        level, coords: of the tree's nodes.
        gsd: of each level, scene units.
        table: float64.
    """
    per_ray = len(weights) // len(error)
    if on_cpu(unit, footprints, share, weights, error, gradient):
        arrays = map(flat, (unit, node, footprints, share, weights, error, gradient, order))
        with numba_lock:
            statistics_numba.add_samples(
                *arrays, per_ray, flat(level), flat(coords), np.array(gsd, np.float32), table.numpy()
            )
        return
    of_node = level[node]
    local = unit * torch.exp2(of_node + 1.0)[:, None] - 2 * coords[node]
    octant = ((local >= 1) * torch.tensor([1, 2, 4], device=node.device)).sum(-1)
    weight = share.double() * weights[order]
    sums = torch.stack([torch.ones_like(weight), weight, weight * error[order // per_ray], gradient.double()], dim=1)
    inside = ((unit >= 0) & (unit < 1)).all(dim=-1)
    asks = inside & (footprints < torch.tensor(gsd, device=node.device)[of_node])
    sums = torch.cat([sums, sums[:, 1:] * asks[:, None]], dim=1)
    table.view(-1, len(COLUMNS)).index_add_(0, node * 8 + octant, sums)
