"""The LoD sampler: proposal rounds that route by the interval they represent, then the samples that the field
evaluates.

The sampler does not own the field: the caller passes ``density_fn(positions [M, 3], footprints [M]) -> [M]``. Early
rounds have long intervals, so they touch only coarse nodes; what a round costs does not depend on how deep the tree is
below. Source: mip-NeRF 360 (proposals, annealing), NerfAcc's comparison of samplers; design section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.model_components.ray_samplers import PDFSampler, SpacedSampler
from torch import Tensor, nn

from infnerf_ns.footprint import cone_radius
from infnerf_ns.validation import Range

ORTHOGRAPHIC_FOOTPRINT = "orthographic_footprint"
"""Key of the ray metadata that holds the footprint [R, 1] of parallel rays, scene units."""

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
    far_factor: Annotated[float, Range(1.0, 1e6)] = 100.0
    """Far plane, in edge lengths of the root cube."""
    coarse_share: Annotated[float, Range(0.0, 1.0)] = 0.3
    """Share of the training rays that are routed to coarser nodes than their footprint asks for, so that coarse nodes
    go on learning from the fine pixels when finer nodes have started."""
    footprint_jitter: bool = True
    """Training perturbs the footprint by 2**(u - 1/2), u uniform in 0..1, so that adjacent levels learn each other's
    samples."""


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
        self.initial = SpacedSampler(self._spacing, self._spacing_inverse, train_stratified=True, single_jitter=True)
        self.pdf = PDFSampler(include_original=False, single_jitter=True)

    @property
    def near(self) -> float:
        """Near plane, scene units."""
        return float(self.range[0])

    @property
    def bend(self) -> float:
        """Distance at which the spacing changes from logarithm to disparity, scene units."""
        return float(self.range[1])

    # Equal steps of log t are equal steps of footprint, what a level-of-detail tree wants; beyond the scene disparity,
    # so that the background does not take half of the samples. Value and slope agree at the bend.
    def _spacing(self, t: Tensor) -> Tensor:
        ratio = t / self.bend
        return torch.where(ratio < 1, torch.log(ratio.clamp(min=1e-9)), 1 - 1 / ratio.clamp(min=1))

    def _spacing_inverse(self, s: Tensor) -> Tensor:
        return self.bend * torch.where(s < 0, torch.exp(s.clamp(max=0)), 1 / (1 - s.clamp(min=0)).clamp(min=1e-9))

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
    ) -> tuple[RaySamples, list[Float[Tensor, "R S 1"]], list[RaySamples]]:
        """Samples for the field, and weights and samples of every proposal round.

        Args:
            rays: R rays; where they have no ``nears`` or ``fars`` (scene units), they are given them.
            density_fn: density of the proposals per scene unit.
            step: of the training, for the schedules; of no effect in evaluation.
        """
        if rays.nears is None:
            rays.nears = torch.full_like(rays.origins[:, :1], self.near)
        if rays.fars is None:
            rays.fars = torch.full_like(rays.origins[:, :1], self.config.far_factor * self.bend)
        elif bool((rays.pixel_area == 1).all()):  # the short rays through a mesh's surface that texture export renders
            rays.nears = torch.maximum(rays.nears, (0.01 * rays.fars).clamp(max=self.near))
        else:  # a crop box of the viewer or of a camera path has set them
            rays.nears = rays.nears.clamp(min=self.near)
            rays.fars = torch.maximum(rays.fars, rays.nears)
        trains = self.training and self.updates_proposals(step)
        anneal = self.anneal(step) if self.training else 1.0
        weights_list, samples_list = [], []
        samples, weights = None, None
        for count in self.config.proposal_samples:
            if samples is None:
                samples = self.initial(rays, num_samples=count)
            else:
                samples = self.pdf(rays, samples, weights.detach() ** anneal, num_samples=count)
            with torch.set_grad_enabled(trains):
                positions, footprints = sample_geometry(samples, of_interval=True)
                density = density_fn(positions.reshape(-1, 3), None if footprints is None else footprints.reshape(-1))
                weights = samples.get_weights(density.reshape(*positions.shape[:-1], 1))
            weights_list.append(weights)
            samples_list.append(samples)
        samples = self.pdf(rays, samples, weights.detach() ** anneal, num_samples=self.config.samples)
        return samples, weights_list, samples_list


def sample_geometry(
    samples: RaySamples, *, of_interval: bool = False, jitter: bool = False
) -> tuple[Float[Tensor, "R S 3"], Float[Tensor, "R S"] | None]:
    """Positions and footprints of ray samples.

    Args:
        samples: samples along rays.
        of_interval: the footprint is at least half the interval's length (proposal rounds).
        jitter: perturb the footprint by 2**(u - 1/2), one u per ray sample.

    Returns:
        World positions, and radii in scene units. The radii are None if the rays carry nerfstudio's placeholder
        ``pixel_area == 1`` (texture export, nearest-camera render): no footprint is known, the finest level answers.
        Parallel rays (orthographic cameras, ``pixel_area == 0``) have the radius ``ORTHOGRAPHIC_FOOTPRINT`` of their
        metadata everywhere.
    """
    frustums = samples.frustums
    middle = (frustums.starts + frustums.ends) / 2
    positions = frustums.origins + frustums.directions * middle
    area = frustums.pixel_area[..., 0]
    if bool((area[:1] == 1).all()) and bool((area == 1).all()):
        return positions, None
    constant = (samples.metadata or {}).get(ORTHOGRAPHIC_FOOTPRINT)
    radii = cone_radius(middle[..., 0], area) if constant is None else constant[..., 0].expand_as(area).clone()
    if of_interval:
        radii = torch.maximum(radii, (frustums.ends - frustums.starts)[..., 0] / 2)
    if jitter:
        radii = radii * 2 ** (torch.rand_like(radii) - 0.5)
    return positions, radii


def random_coarsening(rays: int, per_ray: int, share: float, octaves: int) -> Float[Tensor, "M"] | None:
    """Factors 2**k, one k in 1..octaves for each ray of a random share of the rays, 1 for the others; None if nothing
    changes."""
    if share == 0 or octaves == 0:
        return None
    factor = 2.0 ** torch.randint(1, octaves + 1, (rays,))
    factor = torch.where(torch.rand(rays) < share, factor, torch.ones(()))
    return factor.repeat_interleave(per_ray)


def weight_quantiles(weights: Float[Tensor, "R S"], count: int) -> Int[Tensor, "R count"]:
    """Flat indices of the samples at the middle of ``count`` equal shares of each ray's weight: their plain mean stands
    for the weighted mean over all samples."""
    cumulative = weights.cumsum(dim=1)
    middles = (torch.arange(count, device=weights.device) + 0.5) / count
    index = torch.searchsorted(cumulative, cumulative[:, -1:] * middles).clamp(max=weights.shape[1] - 1)
    return index + weights.shape[1] * torch.arange(len(weights), device=weights.device)[:, None]
