"""The LoD sampler: proposal rounds that route by the interval they represent, then the samples that the field
evaluates.

The sampler does not own the field: the caller passes ``density_fn(positions [M, 3], footprints [M]) -> [M]``. Early
rounds have long intervals, so they touch only coarse nodes; what a round costs does not depend on how deep the tree is
below. Source: mip-NeRF 360 (proposals, annealing), NerfAcc's comparison of samplers; design section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor, nn

from infnerf_ns.footprint import cone_radius
from infnerf_ns.kernels import rays as ray_kernels
from infnerf_ns.kernels.frames import affine
from infnerf_ns.octree import RootCube
from infnerf_ns.validation import Range

ORTHOGRAPHIC_FOOTPRINT = "orthographic_footprint"
"""Key of the ray metadata that holds the footprint [R, 1] of parallel rays, scene units."""

ROUTING_SCALE = "routing_scale"
"""Key of the ray metadata [R, 1]: samples are routed as if their footprints were this much larger, one number for all
rays. What a node shows of them fades by their own footprints."""

DensityFn = Callable[[Float[Tensor, "M 3"], Float[Tensor, "M"] | None], Float[Tensor, "M"]]


@dataclass
class SamplerConfig:
    """How rays are sampled."""

    proposal_samples: Annotated[tuple[int, ...], Range(4, 1024)] = field(default_factory=lambda: (48, 24))
    """Samples per ray of each proposal round."""
    samples: Annotated[int, Range(4, 1024)] = 16
    """Samples per ray that the field evaluates."""
    anneal_steps: Annotated[int, Range(0, 1_000_000)] = 500
    """Steps over which the proposal weights gain their full contrast."""
    anneal_slope: Annotated[float, Range(0.1, 100.0)] = 10.0
    """Slope of that schedule."""
    proposal_warmup: Annotated[int, Range(0, 1_000_000)] = 1000
    """Steps until the proposals are updated only every `proposal_update_every` steps."""
    proposal_update_every: Annotated[int, Range(1, 100)] = 4
    """Steps between two updates of the proposals after their warm-up."""
    near_plane: Annotated[float, Range(1e-9, 1e9)] | None = None
    """Near plane of all cameras in scene units; by default each camera has its own, half of the distance to the nearest
    SfM points in its view."""
    interval_footprint: Annotated[float, Range(0.0, 1.0)] = 0.25
    """The footprint of a sample that the field evaluates is at least this share of half its interval's length: coarse
    nodes answer for what stands for a long way through the air, and fine hash levels are faded there (0: the pixel's
    cone alone, as in the paper)."""
    far_factor: Annotated[float, Range(1.0, 1e6)] = 100.0
    """Far plane, in edge lengths of the root cube."""
    footprint_jitter: bool = True
    """Training perturbs the footprint by 2**(u - 1/2), u uniform in 0..1, so that adjacent levels learn each other's
    samples."""


class Intervals(NamedTuple):
    """Intervals along R rays; nerfstudio's losses and renderers read them like its RaySamples."""

    bins: Float[Tensor, "R S1"]
    """edges, 0 at the near and 1 at the far plane, linear in the spacing"""
    edges: Float[Tensor, "R S1"]
    """edges as distances, scene units"""

    @property
    def frustums(self) -> Intervals:
        """Where nerfstudio looks for ``starts`` and ``ends``."""
        return self

    @property
    def starts(self) -> Float[Tensor, "R S 1"]:
        """Distances at which the intervals start."""
        return self.edges[:, :-1, None]

    @property
    def ends(self) -> Float[Tensor, "R S 1"]:
        """Distances at which the intervals end."""
        return self.edges[:, 1:, None]

    @property
    def spacing_starts(self) -> Float[Tensor, "R S 1"]:
        """Normalised starts."""
        return self.bins[:, :-1, None]

    @property
    def spacing_ends(self) -> Float[Tensor, "R S 1"]:
        """Normalised ends."""
        return self.bins[:, 1:, None]


class LoDSampler(nn.Module):
    """Samples along rays by per-node proposals.

    Args:
        config: numbers of samples and schedules.
        near: near plane, scene units.
        bend: distance up to which the first round is spaced by the logarithm, and beyond by disparity; scene units.
    """

    def __init__(self, config: SamplerConfig, near: float, bend: float) -> None:
        super().__init__()
        self.config = config
        # A buffer: a loaded checkpoint must be rendered with the range that it was trained with.
        self.register_buffer("range", torch.tensor([near, max(bend, 2 * near)], dtype=torch.float64))

    @property
    def near(self) -> float:
        """Near plane, scene units."""
        return float(self.range[0])

    @property
    def bend(self) -> float:
        """Distance at which the spacing changes from logarithm to disparity, scene units."""
        return float(self.range[1])

    def spacing(self, t: Float[Tensor, "*bs"]) -> Float[Tensor, "*bs"]:
        """Spacing of distances (scene units), the inverse of :func:`infnerf_ns.kernels.rays.distances`.

        Equal steps of log t are equal steps of footprint, what a level-of-detail tree wants; beyond the scene
        disparity, so that the background does not take half of the samples. Value and slope agree at the bend.
        """
        ratio = t / self.bend
        return torch.where(ratio < 1, torch.log(ratio.clamp(min=1e-9)), 1 - 1 / ratio.clamp(min=1))

    def anneal(self, step: int) -> float:
        """Exponent of the proposal weights (mip-NeRF 360, section C)."""
        if self.config.anneal_steps == 0:
            return 1.0
        progress, slope = float(np.clip(step / self.config.anneal_steps, 0, 1)), self.config.anneal_slope
        return slope * progress / ((slope - 1) * progress + 1)

    def updates_proposals(self, step: int) -> bool:
        """Whether this training step trains the proposals."""
        return step < self.config.proposal_warmup or step % self.config.proposal_update_every == 0

    def forward(
        self, rays: RayBundle, density_fn: DensityFn, step: int
    ) -> tuple[Intervals, list[Float[Tensor, "R S 1"]], list[Intervals]]:
        """Samples for the field, and weights and samples of every proposal round.

        Args:
            rays: R rays; where they have no ``nears`` or ``fars`` (scene units), they are given them.
            density_fn: density of the proposals per scene unit.
            step: of the training, for the schedules; of no effect in evaluation.
        """
        self._set_planes(rays)
        s_near, s_far = self.spacing(rays.nears)[:, 0], self.spacing(rays.fars)[:, 0]
        trains = self.training and self.updates_proposals(step)
        anneal = self.anneal(step) if self.training else 1.0
        weights_list, samples_list = [], []
        for count in self.config.proposal_samples:
            if not samples_list:
                bins = self._spread(rays, count)
                samples = Intervals(bins, ray_kernels.distances(bins, s_near, s_far, self.bend))
            else:
                samples = self._resample(samples_list[-1], weights_list[-1], anneal, count, s_near, s_far)
            with torch.set_grad_enabled(trains):
                positions, footprints = sample_geometry(rays, samples, of_interval=True)
                density = density_fn(positions.reshape(-1, 3), None if footprints is None else footprints.reshape(-1))
                weights = ray_kernels.render_weights(density.reshape(positions.shape[:2]), samples.edges)[..., None]
            weights_list.append(weights)
            samples_list.append(samples)
        samples = self._resample(samples_list[-1], weights_list[-1], anneal, self.config.samples, s_near, s_far)
        return samples, weights_list, samples_list

    def resample(
        self, rays: RayBundle, samples: Intervals, weights: Float[Tensor, "R S 1"], count: int, step: int
    ) -> Intervals:
        """Other samples for rays that have been sampled: ``count`` intervals of equal weight.

        Args:
            rays: R rays with their planes.
            samples: of their last proposal round.
            weights: of these.
            count: intervals wanted.
            step: of the training.
        """
        s_near, s_far = self.spacing(rays.nears)[:, 0], self.spacing(rays.fars)[:, 0]
        anneal = self.anneal(step) if self.training else 1.0
        return self._resample(samples, weights, anneal, count, s_near, s_far)

    def _set_planes(self, rays: RayBundle) -> None:
        if rays.nears is None:
            rays.nears = torch.full_like(rays.origins[:, :1], self.near)
        if rays.fars is None:
            rays.fars = torch.full_like(rays.origins[:, :1], self.config.far_factor * self.bend)
        elif bool((rays.pixel_area == 1).all()):  # the short rays through a mesh's surface that texture export renders
            rays.nears = torch.maximum(rays.nears, (0.01 * rays.fars).clamp(max=self.near))
        else:  # a crop box of the viewer or of a camera path has set them
            rays.nears = rays.nears.clamp(min=self.near)
            rays.fars = torch.maximum(rays.fars, rays.nears)

    def _spread(self, rays: RayBundle, count: int) -> Float[Tensor, "R S1"]:
        """Equal intervals; in training each ray moves all of its edges by a random share of an interval."""
        device = rays.origins.device
        bins = torch.linspace(0, 1, count + 1, device=device).expand(len(rays), -1)
        if not self.training:
            return bins
        middles = (bins[:, 1:] + bins[:, :-1]) / 2
        low, high = torch.cat([bins[:, :1], middles], 1), torch.cat([middles, bins[:, -1:]], 1)
        return torch.lerp(low, high, torch.rand(len(rays), 1, device=device))

    def _resample(
        self, samples: Intervals, weights: Tensor, anneal: float, count: int, s_near: Tensor, s_far: Tensor
    ) -> Intervals:
        """Intervals of equal weight; in training each ray moves its edges by a random share of one."""
        offset = torch.rand_like(s_near) if self.training else torch.full_like(s_near, 0.5)
        return Intervals(
            *ray_kernels.resample(samples.bins, weights[..., 0], anneal, count, offset, s_near, s_far, self.bend)
        )


def sample_geometry(
    rays: RayBundle,
    samples: Intervals,
    *,
    of_interval: bool = False,
    interval_share: float = 0.0,
    cube: RootCube | None = None,
    jitter: bool = False,
) -> tuple[Float[Tensor, "R S 3"], Float[Tensor, "R S"] | None]:
    """Positions and footprints of ray samples.

    Args:
        rays: R rays.
        samples: intervals along them.
        of_interval: the footprint is at least half the interval's length (proposal rounds).
        interval_share: the footprint is at least this share of half the interval's length, which counts less outside
            the root cube (:class:`infnerf_ns.kernels.rays.IntervalFloor`).
        cube: the root cube, for ``interval_share``.
        jitter: perturb the footprint by 2**(u - 1/2), one u per ray sample.

    Returns:
        World positions, and radii in scene units. If the rays carry nerfstudio's placeholder ``pixel_area == 1``
        (texture export, nearest-camera render) no pixel is known: the radii are half the intervals'
        lengths for ``of_interval``, else None, and the finest level answers.
        Parallel rays (orthographic cameras, ``pixel_area == 0``) have the radius ``ORTHOGRAPHIC_FOOTPRINT`` of their
        metadata everywhere.
    """
    area = rays.pixel_area[:, 0]
    constant = (rays.metadata or {}).get(ORTHOGRAPHIC_FOOTPRINT)
    floor = None
    if interval_share and cube is not None:
        with torch.no_grad():
            matrix = cube.rotation.to(rays.directions).T * (2 / cube.side)
            start = affine(rays.origins, cube.center.to(rays.origins), matrix, 0.0)
            way = affine(rays.directions, torch.zeros_like(rays.directions[0]), matrix, 0.0)
            floor = ray_kernels.IntervalFloor(interval_share, start, way)
    positions, radii = ray_kernels.cone_samples(
        rays.origins,
        rays.directions,
        samples.edges,
        cone_radius(torch.ones_like(area), area),
        None if constant is None else constant[:, 0],
        of_interval,
        floor,
    )
    if bool((area[:1] == 1).all()) and bool((area == 1).all()):
        return positions, samples.edges.diff(dim=1) / 2 if of_interval else None
    if jitter:
        radii = radii * 2 ** (torch.rand_like(radii) - 0.5)
    return positions, radii


def weight_quantiles(weights: Float[Tensor, "R S"], count: int) -> Int[Tensor, "R count"]:
    """Flat indices of the samples at the middle of ``count`` equal shares of each ray's weight: their plain mean stands
    for the weighted mean over all samples."""
    cumulative = weights.cumsum(dim=1)
    middles = (torch.arange(count, device=weights.device) + 0.5) / count
    index = torch.searchsorted(cumulative, cumulative[:, -1:] * middles).clamp(max=weights.shape[1] - 1)
    return index + weights.shape[1] * torch.arange(len(weights), device=weights.device)[:, None]
