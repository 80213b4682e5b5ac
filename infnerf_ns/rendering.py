"""From samples along rays to colours and weights: which nodes evaluate a sample, and what they say.

R rays, S samples per ray, M routed samples (one that two levels are blended for is there twice).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.utils.math import components_from_spherical_harmonics
from torch import Tensor

from infnerf_ns.field import OctreeField, Routed
from infnerf_ns.kernels import shading
from infnerf_ns.kernels.rays import render_weights
from infnerf_ns.sampler import Intervals

BLEND_HALF_WIDTH = 0.25
"""Octree levels on both sides of a switch over which a node takes over from its parent in evaluation. Training jitters
footprints by half a level, so half a level would be its mean; a quarter renders as well (28.39 against 28.41 dB at full
size and 32.07 against 32.01 at 1/16 on the demo scene), evaluates half as many samples twice, and a view needs fewer of
the fine nodes, which are the most."""
BLEND_SHARPENING = 2**BLEND_HALF_WIDTH
"""Samples are routed by their footprints over this, so that a node is there before it counts."""


class Shaded(NamedTuple):
    """What the field says of the samples of R rays."""

    rgb: Float[Tensor, "R S 3"]
    weights: Float[Tensor, "R S 1"]
    """rendering weights"""
    density: Float[Tensor, "M"]
    """per scene unit, of the routed samples"""
    routed: Routed
    share: Float[Tensor, "M"]
    """of the sample that a routed one's answer is"""


def route(
    field: OctreeField,
    positions: Float[Tensor, "RS 3"],
    footprints: Float[Tensor, "RS"] | None,
    *,
    max_level: int | None = None,
    routing_scale: float = 1.0,
    blended: bool = False,
) -> tuple[Routed, Float[Tensor, "M"]]:
    """The nodes that evaluate the samples, and their shares of them: all of it, or what is left to the parent while a
    node is young, and where two levels are blended.

    Args:
        field: of the nodes.
        positions: world positions.
        footprints: radii, scene units; None: the finest nodes.
        max_level: a cut of the tree.
        routing_scale: the nodes are those of footprints this much larger.
        blended: a sample between two levels is evaluated by both.
    """
    octree, blended = field.octree, blended and footprints is not None
    if blended:
        routing_scale = routing_scale / BLEND_SHARPENING
    routed = field.route(positions, footprints, max_level, routing_scale)
    share = torch.ones_like(positions[:, 0])
    if blended:
        past_parent = octree.fraction(octree.level[routed.node], routing_scale * routed.footprints)
        share = (past_parent / (2 * BLEND_HALF_WIDTH)).clamp(max=1)
    if field.young:
        share = share * field.maturity[routed.node]
    return field.with_parents(routed, share) if blended or field.young else (routed, share)


def shade(
    field: OctreeField,
    rays: RayBundle,
    samples: Intervals,
    routed: tuple[Routed, Float[Tensor, "M"]],
    appearance: Float[Tensor, "R A"] | None,
    color_weight_threshold: float,
) -> Shaded:
    """Evaluates the samples of rays.

    Args:
        field: of the nodes.
        rays: R rays.
        samples: S intervals along each.
        routed: their nodes and the nodes' shares (:func:`route`).
        appearance: code of each ray.
        color_weight_threshold: samples of a smaller rendering weight are not given a colour.
    """
    (nodes, share), (count, per_ray) = routed, samples.starts.shape[:2]
    density, geo = field.density(nodes)
    of_sample = density.new_zeros(count * per_ray).index_add(0, nodes.order, share * density)
    weights = render_weights(of_sample.reshape(count, per_ray), samples.edges)[..., None]
    kept = shading.visible(weights[..., 0], nodes.order, color_weight_threshold)
    direction_code = components_from_spherical_harmonics(levels=4, directions=rays.directions)
    place = nodes.order.index_select(0, kept)
    ray = torch.div(place, per_ray, rounding_mode="floor")
    inputs = shading.color_inputs(geo, direction_code, appearance, kept, ray)
    color = field.color(nodes.node.index_select(0, kept), inputs)
    rgb = rays.origins.new_zeros(count * per_ray, 3).index_add(0, place, share[kept, None] * color)
    return Shaded(rgb.reshape(count, per_ray, 3), weights, density, nodes, share)


def field_at(
    field: OctreeField, points: Float[Tensor, "M 3"], level: int
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M 3"]]:
    """Density and colour at world positions with the tree cut at a level, seen in one random direction and with the
    mean appearance code; in the caller's order."""
    routed = field.route(points, None, level)
    density, geo = field.density(routed)
    direction = torch.nn.functional.normalize(torch.randn(1, 3, device=points.device), dim=-1)
    code = components_from_spherical_harmonics(levels=4, directions=direction)
    every = torch.arange(len(points), device=points.device)
    mean = None if field.appearance is None else field.appearance.weight.detach().mean(dim=0, keepdim=True)
    color = field.color(routed.node, shading.color_inputs(geo, code, mean, every, torch.zeros_like(every)))
    place = (routed.order,)
    return torch.empty_like(density).index_put(place, density), torch.empty_like(color).index_put(place, color)
