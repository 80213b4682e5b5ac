"""The LoD sampler, with densities given by hand: order, spacing, schedules, and the footprints that it asks with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from infnerf_ns.kernels.rays import distances
from infnerf_ns.octree import RootCube, contract
from infnerf_ns.sampler import (
    ORTHOGRAPHIC_FOOTPRINT,
    Intervals,
    LoDSampler,
    SamplerConfig,
    sample_geometry,
    weight_quantiles,
)

NEAR, BEND, FAR = 0.1, 10.0, 1000.0
PIXEL = 1e-6  # steradians


def _sampler(**config) -> LoDSampler:
    return LoDSampler(SamplerConfig(**config), NEAR, BEND)


def _rays(count: int = 5, pixel_area: float = PIXEL) -> RayBundle:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    return RayBundle(torch.rand(count, 3, generator=generator), directions, torch.full((count, 1), pixel_area))


def _fog(positions: Tensor, footprints: Tensor | None) -> Tensor:
    return 0.3 * torch.ones_like(positions[:, 0])


def _middles(samples: Intervals) -> Tensor:
    return ((samples.starts + samples.ends) / 2)[..., 0]


@pytest.mark.parametrize("training", [True, False])
def test_samples_are_ordered_and_between_the_planes(training: bool) -> None:
    sampler = _sampler(proposal_samples=(40, 20), samples=12).train(training)
    samples, weights_list, samples_list = sampler(_rays(), _fog, step=250)
    assert [len(rays.starts[0]) for rays in (*samples_list, samples)] == [40, 20, 12]
    assert [tuple(weights.shape) for weights in weights_list] == [(5, 40, 1), (5, 20, 1)]
    for rays in (*samples_list, samples):
        starts, ends = rays.starts[..., 0], rays.ends[..., 0]
        assert bool((starts < ends).all()) and torch.equal(starts[:, 1:], ends[:, :-1])
        # Disparity leaves float32 five digits at a far plane of 100 cubes.
        assert starts.min() >= NEAR * (1 - 1e-5) and ends.max() <= FAR * (1 + 1e-4)
    if not training:
        first = samples_list[0]
        assert first.starts[:, 0].sub(NEAR).abs().max() < 1e-5 and first.ends[:, -1].sub(FAR).abs().max() < 0.1


def test_a_crop_box_narrows_the_planes() -> None:
    """A crop box of the viewer or of a camera path comes as planes of the rays, 1e10 where a ray misses it."""
    rays = _rays(3)
    rays.nears, rays.fars = torch.tensor([[1.0], [0.0], [1e10]]), torch.tensor([[4.0], [2.0], [1e10]])
    samples, weights_list, samples_list = _sampler().eval()(rays, _fog, step=0)
    for planes in (*samples_list, samples):
        starts, ends = planes.starts[..., 0], planes.ends[..., 0]
        assert starts[0].min() >= 1 - 1e-5 and ends[0].max() <= 4 + 1e-4
        assert starts[1].min() >= NEAR - 1e-5 and ends[1].max() <= 2 + 1e-4
        assert bool(torch.isfinite(starts).all()) and bool((starts <= ends).all())
    for weights in weights_list:
        assert bool(torch.isfinite(weights).all()) and weights[2].max() == 0 and weights[:2].max() > 0


def test_the_planes_are_in_the_state() -> None:
    """A loaded model samples the range that it was trained with, whatever scene it was built from."""
    sampler, other = _sampler().eval(), LoDSampler(SamplerConfig(), 3 * NEAR, 2 * BEND).eval()
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(_middles(other(_rays(), _fog, 0)[0]), _middles(sampler(_rays(), _fog, 0)[0]))


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    for training in (True, False):
        sampler = _sampler().train(training)
        runs = []
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            runs.append(_middles(sampler(_rays(), _fog, step=100)[0]))
        assert torch.equal(runs[0], runs[2])
        assert torch.equal(runs[0], runs[1]) is not training


@given(st.floats(math.log(NEAR), math.log(FAR)), st.floats(0.01, 1000.0))
@settings(max_examples=60)
def test_spacing_and_inverse(log_distance: float, bend: float) -> None:
    t = torch.tensor([math.exp(log_distance)], dtype=torch.float64)
    sampler = LoDSampler(SamplerConfig(), NEAR, bend)
    s = sampler.spacing(t)
    for bins, s_near, s_far in ((0.0, s, s + 1), (1.0, s - 1, s), (0.5, s - 0.25, s + 0.25)):
        there = distances(torch.tensor([[bins]], dtype=torch.float64), s_near, s_far, sampler.bend)
        assert there.item() == pytest.approx(t.item(), rel=1e-9)


def test_spacing_is_monotone_and_smooth_at_the_bend() -> None:
    sampler = _sampler()
    t = torch.logspace(math.log10(NEAR), math.log10(FAR), 5000, dtype=torch.float64)
    assert bool((sampler.spacing(t).diff() > 0).all())
    sides = torch.tensor([BEND * (1 - 1e-7), BEND * (1 + 1e-7)], dtype=torch.float64, requires_grad=True)
    spaced = sampler.spacing(sides)
    (slope,) = torch.autograd.grad(spaced.sum(), sides)
    assert spaced.abs().max() < 1.1e-7, "zero at the bend"
    assert torch.allclose(slope, torch.full_like(slope, 1 / BEND), rtol=1e-6)
    ratio = sampler.spacing(torch.tensor([0.2, 0.4, 0.8, 1.6])).diff()
    assert torch.allclose(ratio, torch.full((3,), math.log(2))), "octaves of distance are equally long before the bend"


def test_proposals_gather_samples_at_a_wall() -> None:
    sampler = _sampler().eval()
    rays = _rays()
    rays.origins[:] = 0
    wall = 3.0

    def density(positions, footprints):
        return 20.0 * (positions.norm(dim=-1) > wall)

    samples, _, samples_list = sampler(rays, density, step=10_000)
    near_wall = [((_middles(s) - wall).abs() < 0.3).float().mean().item() for s in (*samples_list, samples)]
    # Each interval also gets a weight of 0.01 (mip-NeRF 360): 64 of them leave 1 / 1.64 to the wall, 32 leave 1 / 1.32.
    assert near_wall[0] < 0.1 and near_wall[1] > 0.55 and near_wall[2] > 0.8


def test_annealing_starts_uniform_and_ends_at_full_contrast() -> None:
    sampler = _sampler(anneal_steps=100)
    exponents = [sampler.anneal(step) for step in range(0, 200, 10)]
    assert exponents[0] == 0 and exponents[10:] == [1.0] * 10
    assert all(a < b for a, b in zip(exponents[:10], exponents[1:11]))
    assert sampler.anneal(50) == pytest.approx(10 * 0.5 / (9 * 0.5 + 1))
    assert _sampler(anneal_steps=0).anneal(0) == 1.0

    def peak(positions, footprints):
        return 50.0 * ((positions - rays.origins[0]).norm(dim=-1).sub(1).abs() < 0.1)

    rays, spread = _rays(1), {}
    for step, training in ((0, True), (100, True), (0, False)):
        torch.manual_seed(0)
        samples = sampler.train(training)(rays, peak, step)[0]
        spread[step, training] = (_middles(samples) - 1).abs().median().item()
    assert spread[0, True] > 5 * spread[100, True] and spread[0, False] < 0.2, "evaluation never anneals"


def test_proposals_are_trained_on_schedule() -> None:
    sampler = _sampler(proposal_warmup=10, proposal_update_every=4)
    assert [step for step in range(24) if sampler.updates_proposals(step)] == [*range(10), 12, 16, 20]
    strength = torch.tensor(0.5, requires_grad=True)

    def density(positions, footprints):
        return strength * torch.ones_like(positions[:, 0])

    for training, step, trains in ((True, 3, True), (True, 12, True), (True, 13, False), (False, 3, False)):
        samples, weights_list, _ = sampler.train(training)(_rays(), density, step)
        assert [weights.requires_grad for weights in weights_list] == [trains, trains]
        assert not samples.starts.requires_grad, "positions never carry a gradient to the proposals"


def test_weights_of_a_round_are_the_volume_rendering_weights() -> None:
    sampler = _sampler(proposal_samples=(16,)).eval()
    _, (weights,), (samples,) = sampler(_rays(), _fog, step=0)
    alpha = 1 - torch.exp(-0.3 * (samples.ends - samples.starts))
    assert torch.allclose(weights, alpha * torch.exp(-0.3 * (samples.starts - NEAR)), atol=1e-5)


# -- footprints --------------------------------------------------------------------------------------------------------


def _asked_footprints(rays: RayBundle) -> tuple[list[Tensor | None], list[Intervals], Intervals]:
    asked = []

    def density(positions, footprints):
        asked.append(footprints)
        return _fog(positions, footprints)

    samples, _, samples_list = _sampler(proposal_samples=(32, 16), samples=8).eval()(rays, density, step=0)
    return asked, samples_list, samples


def test_a_round_asks_for_the_interval_that_it_represents() -> None:
    rays = _rays()
    asked, samples_list, samples = _asked_footprints(rays)
    for footprints, intervals in zip(asked, samples_list):
        cone = _middles(intervals) * math.sqrt(PIXEL / math.pi)
        half = (intervals.ends - intervals.starts)[..., 0] / 2
        assert torch.allclose(footprints.reshape(cone.shape), torch.maximum(cone, half))
    positions, footprints = sample_geometry(rays, samples)
    assert torch.allclose(footprints, _middles(samples) * math.sqrt(PIXEL / math.pi)), "for the field: the cone alone"
    expected = rays.origins[:, None] + rays.directions[:, None] * _middles(samples)[..., None]
    assert torch.allclose(positions, expected, rtol=1e-6)
    assert sample_geometry(rays, samples, of_interval=True)[1].min() >= footprints.min()


def test_a_sample_of_the_field_is_at_least_a_share_of_its_interval() -> None:
    """Outside the root cube a length along the ray counts less than a length across it."""
    rays = _rays()
    rays.origins[:] = torch.tensor([0.1, 0.2, 0.3])
    _, _, samples = _asked_footprints(rays)
    cube = RootCube(rays.origins[0], 4.0, torch.eye(3))  # so all rays lead straight outwards
    positions, cone = sample_geometry(rays, samples)
    radii = sample_geometry(rays, samples, interval_share=0.25, cube=cube)[1]
    half = (samples.ends - samples.starts)[..., 0] / 2
    place, way = (positions.double() - cube.center) / cube.side + 0.5, rays.directions[:, None].double()
    norm = 2 * (place - 0.5).abs().amax(dim=-1)
    inside = norm < 1
    assert torch.allclose(radii[inside], torch.maximum(cone, half / 4)[inside]) and bool((radii > cone)[inside].any())
    # How long a short step along a ray is after the contraction, and one across it.
    along = (contract(place + 1e-5 * way) - contract(place - 1e-5 * way)).norm(dim=-1) / 2e-5
    across = (2 - 1 / norm) / norm / 2
    expected = torch.maximum(cone, half / 4 * along / across)
    assert torch.allclose(radii[~inside].double(), expected[~inside].double(), rtol=1e-3)
    assert bool((radii > cone)[~inside].any())


def test_placeholder_pixels_have_no_footprint() -> None:
    """Their intervals have a length."""
    rays = _rays(pixel_area=1.0)
    asked, samples_list, samples = _asked_footprints(rays)
    for footprints, intervals in zip(asked, samples_list):
        assert torch.equal(footprints, (intervals.ends - intervals.starts).reshape(-1) / 2)
    assert sample_geometry(rays, samples)[1] is None
    mixed = _rays()
    mixed.pixel_area[0] = 1.0
    assert _asked_footprints(mixed)[0][0] is not None, "one real pixel of one steradian is no placeholder"


def test_parallel_rays_have_one_footprint() -> None:
    rays = _rays(pixel_area=0.0)
    rays.metadata = {ORTHOGRAPHIC_FOOTPRINT: torch.full((5, 1), 0.02)}
    asked, samples_list, samples = _asked_footprints(rays)
    half = (samples_list[0].ends - samples_list[0].starts)[..., 0] / 2
    assert torch.allclose(asked[0].reshape(half.shape), half.clamp(min=0.02))
    footprints = sample_geometry(rays, samples)[1]
    assert footprints.shape == (5, 8) and bool((footprints == 0.02).all())


def test_jitter_stays_within_half_a_level() -> None:
    rays = _rays(200)
    samples = _asked_footprints(rays)[2]
    plain, jittered = (sample_geometry(rays, samples, jitter=jitter)[1] for jitter in (False, True))
    shift = torch.log2(jittered / plain)
    assert -0.5 - 1e-5 < shift.min() < -0.45 and 0.45 < shift.max() < 0.5 + 1e-5
    assert abs(shift.mean().item()) < 0.03
    assert len(shift.unique()) > 1000, "each sample has its own"


def test_weight_quantiles_stand_for_the_weighted_mean() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
    index = weight_quantiles(weights, 4)
    assert index[0].tolist() == [1, 1, 3, 4] and index[1].tolist() == [9] * 4
    assert bool((index[2] >= 10).all() and (index[2] < 15).all())
    weights = torch.rand(50, 24, generator=torch.Generator().manual_seed(0)) ** 4
    values = torch.linspace(0, 1, 24).expand(50, 24)
    mean = (weights * values).sum(1) / weights.sum(1)
    assert (values.reshape(-1)[weight_quantiles(weights, 64) % 24].mean(1) - mean).abs().max() < 0.03
