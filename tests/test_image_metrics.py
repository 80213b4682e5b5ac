"""Metrics of one image: what masks hide does not count, small images have fewer metrics."""

from __future__ import annotations

import pytest
import torch

from infnerf_ns.image_metrics import image_metrics


def photo(height: int = 32, width: int = 48) -> torch.Tensor:
    return 0.2 + 0.6 * torch.rand(height, width, 3)


def test_a_known_error() -> None:
    target = photo()
    metrics = image_metrics(target + 0.1, target)
    assert set(metrics) == {"psnr", "ssim"}
    assert metrics["psnr"] == pytest.approx(20, abs=1e-3)
    assert metrics["ssim"] < 0.999 and image_metrics(target, target)["ssim"] == pytest.approx(1)
    assert image_metrics(torch.full_like(target, 7.0), torch.ones_like(target))["psnr"] > 100, "colours end at 1"


def test_masked_pixels_do_not_count() -> None:
    target = photo()
    rendered = target + 0.1
    mask = torch.ones(32, 48, 1, dtype=torch.bool)
    mask[:, :20] = False
    rendered[:, :20] = 1 - target[:, :20]
    assert image_metrics(rendered, target)["psnr"] < 15
    assert image_metrics(rendered, target, mask)["psnr"] == pytest.approx(20, abs=1e-3)
    rendered[:, 20:] = target[:, 20:]
    assert image_metrics(rendered, target, mask)["ssim"] == pytest.approx(1)
    assert image_metrics(rendered, target)["ssim"] < 0.9


def test_an_image_that_is_all_masked_has_no_metrics() -> None:
    assert image_metrics(photo(), photo(), torch.zeros(32, 48, 1, dtype=torch.bool)) == {}


def test_ssim_needs_its_window() -> None:
    assert set(image_metrics(photo(10, 40), photo(10, 40))) == {"psnr"}
