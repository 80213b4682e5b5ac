"""Losses between two adjacent cuts of the octree: the same rays, rendered with the tree cut at one level and at the
next, should end at the same depth and meet the same surface.

Gradients reach both cuts; detach the finer one to let the coarser follow it alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_SHORTEST = 1e-3
"""Shorter vectors have no direction: they count with their length, which bounds the derivatives by 1 / 1e-3."""

_TETRAHEDRON = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])


def depth_consistency(
    coarse: Float[Tensor, "R"], fine: Float[Tensor, "R"], scale: Float[Tensor, "R"]
) -> Float[Tensor, ""]:
    """Smooth L1 (Girshick 2015) of the difference in units of ``scale``, mean over rays: ``d**2 / 2`` below one unit,
    ``|d| - 1/2`` above.

    Args:
        coarse: depths with the tree cut at a level, scene units.
        fine: depths with the tree cut one level deeper.
        scale: length that is small for the ray, such as its footprint or the coarse level's GSD, scene units.
    """
    return torch.nn.functional.smooth_l1_loss(coarse / scale, fine / scale)


def normal_consistency(
    coarse: Float[Tensor, "R 3"], fine: Float[Tensor, "R 3"], weight: Float[Tensor, "R"]
) -> Float[Tensor, ""]:
    """Weighted mean of ``1 - cosine`` of the angle between two normals; 0 where all weights are 0, at most 2.

    Args:
        coarse: normals with the tree cut at a level, of any length.
        fine: normals with the tree cut one level deeper.
        weight: of each pair, at least 0, such as the ray's opacity; it gets no gradient, or the loss would make
            surfaces transparent.
    """
    coarse, fine = (torch.nn.functional.normalize(each, dim=-1, eps=_SHORTEST) for each in (coarse, fine))
    weight = weight.detach()
    return (weight * (1 - (coarse * fine).sum(dim=-1))).sum() / weight.sum().clamp(min=1e-10)


def numerical_normals(
    points: Float[Tensor, "M 3"],
    density_fn: Callable[[Float[Tensor, "M4 3"]], Float[Tensor, "M4"]],
    step: Float[Tensor, "M"] | float,
) -> Float[Tensor, "M 3"]:
    """Unit normals, the direction in which log density falls fastest, from differences between the corners of a small
    tetrahedron around each point (Quilez, "normals for an SDF"; Neuralangelo's numerical gradients, Li et al. 2023).

    Differentiable once with respect to the field: analytic normals would need second derivatives, which the kernels do
    not have. Where log density changes by less than 0.001 over a step, the normal is shorter than 1, and 0 in a
    constant field.

    Args:
        points: world positions.
        density_fn: density at world positions; called once, with four positions per point.
        step: half the edge of the cube whose corners are used, scene units; about the GSD of the level.
    """
    step = torch.as_tensor(step, dtype=points.dtype, device=points.device).expand(len(points))
    corners = points[None] + _TETRAHEDRON.to(points)[:, None] * step[None, :, None]  # [4, M, 3]
    log_density = density_fn(corners.reshape(-1, 3)).clamp(min=1e-10).log().reshape(4, -1)
    # The corners' outer products sum to 4 times the identity, so this is step times the gradient.
    rise = (_TETRAHEDRON.to(log_density)[:, None] * log_density[..., None]).sum(dim=0) / 4
    return -torch.nn.functional.normalize(rise, dim=-1, eps=_SHORTEST)
