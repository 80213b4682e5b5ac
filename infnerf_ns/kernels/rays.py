"""What happens along rays: resampling, positions and footprints of samples, rendering weights.

Why not nerfstudio's ``SpacedSampler``, ``PDFSampler`` and ``RaySamples.get_weights``, which compute the same (the tests
compare them): on two cores they, and what stands around them, were a third of a training step after the grids and
decoders had been fused, each of their many operations on one core. The torch forms below are the reference, and what
runs on CUDA and where rays carry gradients (pose refinement).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from infnerf_ns.kernels import ray_numba
from infnerf_ns.kernels.numba_lock import flat, numba_lock, on_cpu

PADDING = 0.01
"""Added to every weight of a histogram before it is sampled (mip-NeRF 360), so that no interval is never looked at."""


def distances(
    bins: Float[Tensor, "R B"], s_near: Float[Tensor, "R"], s_far: Float[Tensor, "R"], bend: float
) -> Float[Tensor, "R B"]:
    """Distances along the rays of normalised bin edges.

    Args:
        bins: 0 at the near plane, 1 at the far plane, linear in the spacing s between.
        s_near, s_far: spacing of the planes; ``s = log(t / bend)`` up to the bend and ``1 - bend / t`` beyond.
        bend: scene units.
    """
    if on_cpu(bins, s_near, s_far):
        edges = torch.empty_like(bins)
        with numba_lock:
            ray_numba.distances(flat(bins), flat(s_near), flat(s_far), bend, edges.numpy())
        return edges
    s = bins * s_far[:, None] + (1 - bins) * s_near[:, None]
    return bend * torch.where(s < 0, torch.exp(s.clamp(max=0)), 1 / (1 - s.clamp(min=0)).clamp(min=1e-9))


@torch.no_grad()
def resample(
    bins: Float[Tensor, "R S1"],
    weights: Float[Tensor, "R S"],
    exponent: float,
    count: int,
    offset: Float[Tensor, "R"],
    s_near: Float[Tensor, "R"],
    s_far: Float[Tensor, "R"],
    bend: float,
) -> tuple[Float[Tensor, "R B"], Float[Tensor, "R B"]]:
    """``count + 1`` edges at equal steps of the cumulative histogram (mip-NeRF 360, section 3; no gradients).

    Args:
        bins: edges of the histogram, normalised (:func:`distances`).
        weights: of the histogram.
        exponent: of the weights (annealing).
        count: intervals wanted.
        offset: where in its step each ray takes its edges, 0 to 1.
        s_near, s_far, bend: as in :func:`distances`.

    Returns:
        The new edges, normalised and as distances, each [R, count + 1].
    """
    if on_cpu(bins, weights, offset, s_near, s_far):
        new_bins, edges = (torch.empty(len(bins), count + 1) for _ in range(2))
        with numba_lock:
            ray_numba.resample(
                flat(bins), flat(weights), exponent, PADDING, flat(offset), flat(s_near), flat(s_far), bend,
                new_bins.numpy(), edges.numpy(),
            )  # fmt: skip
        return new_bins, edges
    padded = weights.clamp(min=0) ** exponent + PADDING
    cumulative = torch.cumsum(padded, dim=1)
    cumulative = torch.nn.functional.pad((cumulative / cumulative[:, -1:]).clamp(max=1), (1, 0))
    u = (torch.arange(count + 1, device=bins.device) + offset[:, None]) / (count + 1)
    above = torch.searchsorted(cumulative, u.contiguous(), side="right")
    low, high = (above - 1).clamp(min=0), above.clamp(max=weights.shape[1])
    low_value, high_value = cumulative.gather(1, low), cumulative.gather(1, high)
    share = torch.nan_to_num((u - low_value) / (high_value - low_value)).clamp(0, 1)
    new_bins = bins.gather(1, low) + share * (bins.gather(1, high) - bins.gather(1, low))
    return new_bins, distances(new_bins, s_near, s_far, bend)


class IntervalFloor(NamedTuple):
    """Least footprints of samples: a share of half their interval's length. Footprints are taken for lengths across the
    ray. Outside the root cube a length along it is contracted more, at norm n by 1 / n^2 against (2 - 1/n) / n (the
    L-inf contraction), so there it counts 2n - 1 times less."""

    share: float
    origins: Float[Tensor, "R 3"]
    """of the rays, in the frame in which the root cube is [-1, 1]^3"""
    directions: Float[Tensor, "R 3"]
    """in that frame, per scene unit"""


def cone_samples(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    edges: Float[Tensor, "R S1"],
    slope: Float[Tensor, "R"],
    constant: Float[Tensor, "R"] | None,
    of_interval: bool,
    floor: IntervalFloor | None = None,
) -> tuple[Float[Tensor, "R S 3"], Float[Tensor, "R S"]]:
    """Middles of the intervals and footprints there.

    Args:
        origins, directions: of the rays; unit directions.
        edges: distances of the intervals' edges.
        slope: radius of the pixels' cones per distance.
        constant: radius of parallel rays instead.
        of_interval: the footprint is at least half the interval's length.
        floor: the footprint is at least that.
    """
    needs_gradient = torch.is_grad_enabled() and (origins.requires_grad or directions.requires_grad)
    if not needs_gradient and on_cpu(origins, directions, edges, slope, constant):
        rays, samples = len(edges), edges.shape[1] - 1
        positions, radii = torch.empty(rays, samples, 3), torch.empty(rays, samples)
        fixed = np.empty(0, np.float32) if constant is None else flat(constant)
        share, *frame = floor or (0.0, torch.empty(0, 3), torch.empty(0, 3))
        with numba_lock:
            ray_numba.cone_samples(
                flat(origins), flat(directions), flat(edges), flat(slope), fixed, of_interval, share, *map(flat, frame),
                positions.numpy(), radii.numpy(),
            )  # fmt: skip
        return positions, radii
    middle = (edges[:, :-1] + edges[:, 1:]) / 2
    positions = origins[:, None] + directions[:, None] * middle[..., None]
    radii = middle * slope[:, None] if constant is None else constant[:, None].expand_as(middle)
    if of_interval:
        radii = torch.maximum(radii, edges.diff(dim=1) / 2)
    if floor is not None:
        place = floor.origins[:, None] + floor.directions[:, None] * middle[..., None]
        norm = place.abs().amax(dim=-1).clamp(min=1.0)
        radii = torch.maximum(radii, floor.share / 2 * edges.diff(dim=1) / (2 * norm - 1))
    return positions, radii


def render_weights(density: Float[Tensor, "R S"], edges: Float[Tensor, "R S1"]) -> Float[Tensor, "R S"]:
    """Volume rendering weights ``(1 - exp(-d_i)) exp(-sum of d before)``, ``d`` density times length (NeRF, eq. 3).

    Args:
        density: per scene unit.
        edges: distances of the intervals' edges; they get no gradient.
    """
    if on_cpu(density, edges):
        return _RenderWeights.apply(density, edges)
    depth = density * edges.diff(dim=1)
    before = torch.nn.functional.pad(torch.cumsum(depth[:, :-1], dim=1), (1, 0))
    return torch.nan_to_num(-torch.expm1(-depth) * torch.exp(-before))


class _RenderWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density: Tensor, edges: Tensor) -> Tensor:
        weights = torch.empty(density.shape)
        with numba_lock:
            ray_numba.render_weights(flat(density), flat(edges), weights.numpy())
        ctx.save_for_backward(density, edges, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_density = torch.empty(grad.shape)
        with numba_lock:
            ray_numba.render_weights_backward(*map(flat, ctx.saved_tensors), flat(grad), grad_density.numpy())
        return grad_density, None
