"""Resampling, samples and weights along rays: the numba forms against the torch ones, and both against nerfstudio's
samplers."""

from __future__ import annotations

import math

import numba
import pytest
import torch
from nerfstudio.cameras.rays import RayBundle, RaySamples
from nerfstudio.model_components.ray_samplers import PDFSampler, SpacedSampler
from torch import Tensor

from infnerf_ns.kernels.frames import affine
from infnerf_ns.kernels.rays import IntervalFloor, cone_samples, distances, render_weights, resample
from infnerf_ns.sampler import Intervals, LoDSampler, SamplerConfig

RAYS, SAMPLES, BEND = 300, 24, 4.0

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _histogram() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bins, weights (some rays without any, some with all in one interval), spacing of the planes."""
    bins = torch.cat([torch.zeros(RAYS, 1), _random(RAYS, SAMPLES)], dim=1).cumsum(1)
    weights = _random(RAYS, SAMPLES, seed=1) ** 6
    weights[::7] = 0
    weights[1::7] = torch.nn.functional.one_hot(torch.tensor(5), SAMPLES).float()
    return bins / bins[:, -1:], weights, -3 * _random(RAYS, seed=2) - 0.1, 0.9 * _random(RAYS, seed=3)


def _double(*tensors: Tensor) -> list[Tensor]:
    """float64: what is computed by the torch reference."""
    return [tensor.double() for tensor in tensors]


@every_threads
def test_distances_are_the_reference(threads: int) -> None:
    numba.set_num_threads(threads)
    bins, _, s_near, s_far = _histogram()
    fast, reference = distances(bins, s_near, s_far, BEND), distances(*_double(bins, s_near, s_far), BEND)
    assert fast.dtype == torch.float32 and reference.dtype == torch.float64
    assert torch.allclose(fast, reference.float(), rtol=1e-5)
    s = torch.tensor([[-1.0, -1e-6, 0.0, 0.5]])
    known = distances(s, torch.zeros(1), torch.ones(1), BEND)
    assert torch.allclose(known, BEND * torch.tensor([[math.exp(-1), 1, 1, 2]]), rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
@every_threads
def test_resampling_is_the_reference(threads: int, exponent: float) -> None:
    numba.set_num_threads(threads)
    bins, weights, s_near, s_far = _histogram()
    offset = _random(RAYS, seed=4)
    fast = resample(bins, weights, exponent, 16, offset, s_near, s_far, BEND)
    reference = resample(*_double(bins, weights), exponent, 16, *_double(offset, s_near, s_far), BEND)
    for name, got, expected in zip(("bins", "edges"), fast, reference):
        assert got.shape == (RAYS, 17)
        assert torch.allclose(got, expected.float(), rtol=1e-4, atol=2e-5), name
    assert bool((fast[1].diff(dim=1) >= 0).all())


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_resampling_survives_weights_that_are_none(exponent: float) -> None:
    bins, weights, s_near, s_far = _histogram()
    weights[0, 3], weights[1, 4] = -1e-9, math.nan
    offset = _random(RAYS, seed=4)
    fast = resample(bins, weights, exponent, 16, offset, s_near, s_far, BEND)[0]
    reference = resample(*_double(bins, weights), exponent, 16, *_double(offset, s_near, s_far), BEND)[0]
    assert bool(torch.isfinite(fast).all()) and bool(torch.isfinite(reference).all())
    assert torch.allclose(fast[0], reference[0].float(), atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_samplers_are_nerfstudios(training: bool) -> None:
    """The same random numbers give the same samples as nerfstudio's SpacedSampler and PDFSampler."""

    def spacing(t: Tensor) -> Tensor:
        return torch.where(t < BEND, torch.log(t / BEND), 1 - BEND / t)

    def inverse(s: Tensor) -> Tensor:
        return BEND * torch.where(s < 0, torch.exp(s.clamp(max=0)), 1 / (1 - s.clamp(min=0)))

    planes = 0.2 + _random(RAYS, 1), 30 + 10 * _random(RAYS, 1, seed=1)
    rays = RayBundle(torch.zeros(RAYS, 3), torch.eye(3)[:1].expand(RAYS, 3), torch.ones(RAYS, 1), None, *planes)
    torch.manual_seed(0)
    first = SpacedSampler(spacing, inverse, single_jitter=True).train(training)(rays, num_samples=SAMPLES)
    torch.manual_seed(1)
    weights = _histogram()[1]
    sampler = PDFSampler(include_original=False, single_jitter=True).train(training)
    second = sampler(rays, first, weights[..., None], num_samples=16)
    s_near, s_far = spacing(planes[0])[:, 0], spacing(planes[1])[:, 0]
    ours = LoDSampler(SamplerConfig(), near=0.1, bend=BEND).train(training)
    torch.manual_seed(0)
    spread = ours._spread(rays, SAMPLES)
    assert torch.allclose(spread, _bins(first), atol=1e-6)
    samples = Intervals(spread, distances(spread, s_near, s_far, BEND))
    assert torch.allclose(samples.edges, _edges(first), rtol=1e-4)
    torch.manual_seed(1)
    got = ours._resample(samples, weights[..., None], 1.0, 16, s_near, s_far)
    # Where an edge falls on the end of an interval rounding decides to which side it belongs.
    assert ((got.bins - _bins(second)).abs() < 1e-4).float().mean() > 0.999
    assert ((got.edges / _edges(second) - 1).abs() < 1e-3).float().mean() > 0.999


def _bins(samples: RaySamples) -> Tensor:
    return torch.cat([samples.spacing_starts[..., 0], samples.spacing_ends[:, -1:, 0]], dim=1).expand(RAYS, -1)


def _edges(samples: RaySamples) -> Tensor:
    return torch.cat([samples.frustums.starts[..., 0], samples.frustums.ends[:, -1:, 0]], dim=1)


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("of_interval", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
@every_threads
def test_samples_of_cones_are_the_reference(
    threads: int, parallel: bool, of_interval: bool, share: float | None
) -> None:
    numba.set_num_threads(threads)
    origins, directions = _random(RAYS, 3), torch.nn.functional.normalize(_random(RAYS, 3, seed=1) - 0.5, dim=1)
    edges, slope = _random(RAYS, SAMPLES + 1, seed=2).cumsum(1), _random(RAYS, seed=3)
    constant = _random(RAYS, seed=4) if parallel else None
    floor = None if share is None else IntervalFloor(share, _random(RAYS, 3, seed=5), _random(RAYS, 3, seed=6))
    fast = cone_samples(origins, directions, edges, slope, constant, of_interval, floor)
    assert (
        share is None
        or of_interval
        or bool((fast[1] > cone_samples(origins, directions, edges, slope, constant, False)[1]).any())
    )
    assert not fast[0].requires_grad
    rays = [x.requires_grad_() for x in (origins, directions)]  # gradients ask for the torch form
    reference = cone_samples(*rays, edges, slope, constant, of_interval, floor)
    assert reference[0].requires_grad
    for name, got, expected in zip(("positions", "radii"), fast, reference):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6), name


@every_threads
def test_change_of_frame_is_the_reference(threads: int) -> None:
    numba.set_num_threads(threads)
    points, center, matrix = _random(RAYS, 3), _random(3, seed=1), _random(3, 3, seed=2)
    reference = affine(*_double(points, center, matrix), 0.5)
    assert torch.allclose(reference, (points - center).double() @ matrix.double() + 0.5)
    assert torch.allclose(affine(points, center, matrix, 0.5), reference.float(), atol=1e-6)


@every_threads
def test_weights_and_their_gradients_are_the_reference(threads: int) -> None:
    numba.set_num_threads(threads)
    density = (8 * _random(RAYS, SAMPLES) ** 4).requires_grad_()
    edges = _random(RAYS, SAMPLES + 1, seed=1).cumsum(1)
    upstream = torch.sin(torch.arange(RAYS * SAMPLES).reshape(RAYS, SAMPLES).float())
    fast = render_weights(density, edges)
    (gradient,) = torch.autograd.grad(fast, density, upstream)
    reference_density = density.detach().double().requires_grad_()
    reference = render_weights(reference_density, edges.double())
    (expected,) = torch.autograd.grad(reference, reference_density, upstream.double())
    assert torch.allclose(fast, reference.float(), atol=1e-6)
    assert (gradient - expected.float()).abs().max() < 1e-5 * expected.abs().max()
    samples = RayBundle(torch.zeros(RAYS, 3), torch.eye(3)[:1].expand(RAYS, 3), torch.ones(RAYS, 1)).get_ray_samples(
        bin_starts=edges[:, :-1, None], bin_ends=edges[:, 1:, None]
    )
    assert torch.allclose(fast, samples.get_weights(density[..., None])[..., 0], atol=1e-5)


def test_there_are_no_second_derivatives() -> None:
    """An error, and not a wrong answer."""
    density = _random(4, 6).requires_grad_()
    weights = render_weights(density, _random(4, 7, seed=1).cumsum(1))
    (gradient,) = torch.autograd.grad(weights.square().sum(), density, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_along_rays(shape: tuple[int, int]) -> None:
    density, edges = torch.ones(shape, requires_grad=True), torch.ones(shape[0], shape[1] + 1)
    weights = render_weights(density, edges)
    weights.sum().backward()
    assert weights.shape == density.grad.shape == shape
    ray, rays = torch.ones(shape[0]), torch.ones(shape[0], 3)
    positions, radii = cone_samples(rays, rays, edges, ray, None, False)
    assert positions.shape == (*shape, 3) and radii.shape == shape


def test_strided_inputs() -> None:
    density, edges = _random(SAMPLES, RAYS).T, _random(SAMPLES + 1, RAYS, seed=1).cumsum(0).T
    assert not density.is_contiguous()
    assert torch.equal(render_weights(density, edges), render_weights(density.contiguous(), edges.contiguous()))


def test_weights_of_opaque_and_of_empty_samples() -> None:
    density = torch.tensor([[0.0, math.inf, 1.0], [0.0, 0.0, 0.0], [1e30, 1e30, 1e30]])
    edges = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(3, 4)
    expected = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert torch.equal(render_weights(density, edges), expected)
    assert torch.equal(render_weights(density.double(), edges.double()).float(), expected)
