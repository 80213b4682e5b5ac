"""PSNR, SSIM and, where its weights are at hand, LPIPS of a rendered image."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(predicted: Float[Tensor, "*bs 3"], target: Float[Tensor, "*bs 3"]) -> float:
    """Peak signal to noise ratio in dB, for colours in 0..1."""
    return float(-10 * torch.log10((predicted.clamp(0, 1) - target).square().mean()))


@lru_cache(maxsize=1)
def lpips_network() -> Any | None:
    """torchmetrics' LPIPS, or None where its AlexNet weights are not on this machine (they are never downloaded
    silently)."""
    from torch.hub import get_dir
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    name = os.path.basename(AlexNet_Weights.IMAGENET1K_V1.url)
    if not os.path.isfile(os.path.join(get_dir(), "checkpoints", name)):
        CONSOLE.print("LPIPS is left out: the AlexNet weights of torchvision are not in torch's hub folder")
        return None
    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


@torch.no_grad()
def image_metrics(
    predicted: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Bool[Tensor, "H W 1"] | None = None
) -> dict[str, float]:
    """Metrics of one image; masked pixels do not count, and an image without others has no metrics.

    SSIM (and LPIPS) need images of at least 11 (64) pixels per side and are left out below that. With a mask, SSIM and
    LPIPS are taken over the whole image with the masked pixels set to the target's.
    """
    predicted = predicted.clamp(0, 1)
    metrics = {}
    if mask is not None:
        valid = mask[..., 0].bool().to(predicted.device)
        if not valid.any():
            return {}
        metrics["psnr"] = psnr(predicted[valid], target[valid])
        predicted = torch.where(valid[..., None], predicted, target)
    else:
        metrics["psnr"] = psnr(predicted, target)
    pair = [image.permute(2, 0, 1)[None] for image in (predicted, target)]
    if min(predicted.shape[:2]) >= 11:
        metrics["ssim"] = float(structural_similarity_index_measure(*pair, data_range=1.0))
    if min(predicted.shape[:2]) >= 64 and (network := lpips_network()) is not None:
        metrics["lpips"] = float(network.to(predicted.device)(*pair))
    return metrics
