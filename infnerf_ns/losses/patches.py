"""Losses on rendered patches: P of them, h x w pixels, channels last, colours in 0..1.

SSIM and LPIPS look at neighbourhoods, so they need patches and not single rays. LPIPS is there only where the weights
of its network are on this machine; they are never downloaded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from infnerf_ns.image_metrics import lpips_network

_LPIPS_SIDE = 64  # below about 31 pixels nothing is left for AlexNet's last layers


def _channels_first(patches: Float[Tensor, "P h w C"]) -> Float[Tensor, "P C h w"]:
    return patches.permute(0, 3, 1, 2)


def ssim_loss(predicted: Float[Tensor, "P h w 3"], target: Float[Tensor, "P h w 3"]) -> Float[Tensor, ""]:
    """``1 - SSIM`` (Wang et al. 2004), mean over pixels and patches; 0 for equal patches, at most 2.

    The Gaussian window has the usual 11 pixels and standard deviation 1.5, and is narrower, in the same shape, in
    patches of less than 11 pixels. Patches are mirrored at their edges, so that every pixel counts.

    Raises:
        ValueError: a patch has less than 3 pixels per side.
    """
    shortest = min(predicted.shape[1:3])
    if shortest < 3:
        raise ValueError(f"SSIM needs patches of at least 3 pixels per side, not {shortest}")
    sigma = 0.3 * min(5, (shortest - 1) // 2)  # torchmetrics' window reaches int(3.5 sigma + 0.5) pixels to each side
    # In half precision a variance, the difference of two means of squares, has no digits left.
    with torch.autocast(predicted.device.type, enabled=False):
        pair = (_channels_first(predicted.to(target.dtype)), _channels_first(target))
        _, similarity = structural_similarity_index_measure(
            *pair, sigma=sigma, data_range=1.0, reduction="none", return_full_image=True
        )
        return 1 - similarity.mean()


def lpips_loss(predicted: Float[Tensor, "P h w 3"], target: Float[Tensor, "P h w 3"]) -> Float[Tensor, ""] | None:
    """LPIPS with AlexNet (Zhang et al. 2018), mean over patches; None, and said once, where its weights are missing.

    Patches of less than 64 pixels per side are enlarged to 64. Gradients reach the patches, never the network.
    """
    metric = lpips_network()
    if metric is None:
        return None
    with torch.autocast(predicted.device.type, enabled=False):  # the network's normalisation adds 1e-8
        pair = [_channels_first(patches.to(target.dtype)) for patches in (predicted, target)]
        size = [max(side, _LPIPS_SIDE) for side in predicted.shape[1:3]]
        if size != list(predicted.shape[1:3]):
            pair = [torch.nn.functional.interpolate(p, size, mode="bilinear", align_corners=False) for p in pair]
        # The metric itself would keep every value that it gives, and refuses colours a little outside of 0..1.
        return metric.net.to(predicted.device)(*pair, normalize=True).mean()


def total_variation(image: Float[Tensor, "P h w C"]) -> Float[Tensor, ""]:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones (anisotropic total variation; Rudin
    et al. 1992), in the unit of the image.

    Args:
        image: rendered patches, at least 2 x 2 pixels: colours, or depths with C = 1.
    """
    return image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean()
