"""Losses on patches: SSIM against another implementation, LPIPS with a network of random weights, total variation by
hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from infnerf_ns import image_metrics
from infnerf_ns.losses.patches import lpips_loss, ssim_loss, total_variation


def _patches(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _scipy_ssim(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, (sigma, sigma, 0), mode="mirror", truncate=3.5)

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return ssim.mean()


def test_ssim_of_plain_patches_by_hand() -> None:
    """Without contrast only the luminance term is left."""
    a, b = torch.full((2, 8, 12, 3), 0.5), torch.full((2, 8, 12, 3), 0.3)
    assert ssim_loss(a, b).item() == pytest.approx(1 - (0.3 + 1e-4) / (0.25 + 0.09 + 1e-4), abs=2e-4)


@pytest.mark.parametrize(("side", "sigma"), [(3, 0.3), (8, 0.9), (10, 1.2), (11, 1.5), (32, 1.5)])
def test_ssim_is_that_of_scipy(side: int, sigma: float) -> None:
    """The window is 3, 7, 9 and 11 pixels wide."""
    a, b = (_patches(2, side, side + 3, 3, seed=seed, dtype=torch.float64) for seed in (1, 2))
    b = (a + b) / 2
    expected = np.mean([_scipy_ssim(x.numpy(), y.numpy(), sigma) for x, y in zip(a, b)])
    assert 0.1 < expected < 0.95
    assert ssim_loss(a, b).item() == pytest.approx(1 - expected, abs=1e-9)
    assert ssim_loss(a.float(), b.float()).item() == pytest.approx(1 - expected, abs=1e-4)


@given(st.integers(0, 2**31), st.integers(3, 32), st.integers(3, 32))
@settings(max_examples=25)
def test_ssim_vanishes_for_equal_patches_only(seed: int, height: int, width: int) -> None:
    a, b = _patches(2, height, width, 3, seed=seed), _patches(2, height, width, 3, seed=seed + 1)
    assert ssim_loss(a, a).item() == pytest.approx(0, abs=1e-5)
    assert 0.05 < ssim_loss(a, b).item() <= 2
    assert ssim_loss(a, b).item() == pytest.approx(ssim_loss(b, a).item(), abs=1e-5)


def test_ssim_gradient() -> None:
    a, b = (_patches(1, 8, 8, 3, seed=seed, dtype=torch.float64) for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda x: ssim_loss(x, b), a.requires_grad_())
    (gradient,) = torch.autograd.grad(ssim_loss(a, b), a)
    assert bool((gradient != 0).all()), "every pixel counts, those at the edges too"


def test_ssim_and_autocast() -> None:
    """In half precision the variance of a bright, nearly plain patch would be noise."""
    a = 0.9 + 0.01 * _patches(2, 16, 16, 3)
    b = 0.9 + 0.01 * _patches(2, 16, 16, 3, seed=1)
    expected = ssim_loss(a, b).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ssim_loss(a, b).item() == expected


def test_ssim_names_a_patch_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="at least 3 pixels per side, not 2"):
        ssim_loss(torch.rand(1, 2, 9, 3), torch.rand(1, 2, 9, 3))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in which torch looks for weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    image_metrics.lpips_network.cache_clear()
    yield tmp_path
    torch.hub.set_dir(before)
    image_metrics.lpips_network.cache_clear()


@pytest.fixture
def weights(hub: Path) -> None:
    """Random weights of AlexNet where torchvision keeps the trained ones."""
    network = torchvision.models.alexnet(weights=None)
    # LPIPS drops the classifier, 58 million weights; one number stands for each of its tensors in the file.
    state = {
        name: torch.zeros(1).expand(value.shape) if name.startswith("classifier") else value
        for name, value in network.state_dict().items()
    }
    (hub / "checkpoints").mkdir()
    torch.save(state, hub / "checkpoints" / Path(torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url).name)


def test_lpips_without_weights(hub: Path, capsys: pytest.CaptureFixture) -> None:
    assert [lpips_loss(*torch.rand(2, 1, 16, 16, 3)) for _ in range(3)] == [None] * 3
    assert capsys.readouterr().out.count("LPIPS is left out") == 1
    assert list(hub.iterdir()) == [], "nothing is downloaded"


def test_lpips_with_weights(weights: None) -> None:
    a, b = _patches(2, 16, 24, 3).requires_grad_(), _patches(2, 16, 24, 3, seed=1)
    assert lpips_loss(b, b).item() == 0
    loss = lpips_loss(a, b)
    assert loss.item() > 1e-4
    each = [lpips_loss(a[i : i + 1], b[i : i + 1]).item() for i in range(2)]
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)
    loss.backward()
    assert bool((a.grad != 0).any(dim=-1).all()), "every pixel counts"
    network = image_metrics.lpips_network()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network._update_count == 0, "a loss keeps nothing"

    slope = (a.grad * a.grad.sign()).sum().item()
    with torch.no_grad():
        up, down = (lpips_loss(a + sign * 1e-3 * a.grad.sign(), b).item() for sign in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(slope, rel=0.05)
    assert lpips_loss(1.5 * a, b).isfinite(), "a rendered colour may be above 1"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips_loss(a, b).item() == loss.item()


def test_lpips_of_large_patches_is_the_metric(weights: None) -> None:
    a, b = _patches(1, 64, 80, 3), _patches(1, 64, 80, 3, seed=1)
    expected = image_metrics.image_metrics(a[0], b[0])["lpips"]
    assert lpips_loss(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_total_variation_by_hand() -> None:
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    ramp = (0.25 * x - 0.5 * y)[None, :, :, None]
    assert total_variation(ramp).item() == pytest.approx(0.75)
    assert total_variation(torch.cat([ramp, ramp + 3.0])).item() == pytest.approx(0.75), "not between patches"
    assert total_variation(torch.full((2, 4, 4, 3), 0.3)).item() == 0
    edge = (x > 1).float()[None, :, :, None]
    assert total_variation(edge).item() == pytest.approx(1 / 4), "one of four pairs per row"


@given(st.integers(0, 2**31), st.floats(-10, 10))
@settings(max_examples=25)
def test_total_variation_scales_and_ignores_an_offset(seed: int, offset: float) -> None:
    image = _patches(2, 5, 4, 3, seed=seed, dtype=torch.float64)
    assert total_variation(3 * image + offset).item() == pytest.approx(3 * total_variation(image).item(), rel=1e-9)


def test_total_variation_gradcheck() -> None:
    assert torch.autograd.gradcheck(total_variation, _patches(2, 4, 3, 2, dtype=torch.float64).requires_grad_())
