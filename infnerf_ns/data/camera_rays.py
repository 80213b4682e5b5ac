"""Rays through random pixels of cameras whose photos are not at hand, by nerfstudio's own ray generation."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor


class CameraRays:
    """Draws uniformly from all pixels of all cameras.

    Args:
        cameras: C cameras, on the device of the rays.
        crop_radius: pixels farther from the middle of an image are not drawn, as of a fisheye photo.
    """

    def __init__(self, cameras: Cameras, crop_radius: float | None = None) -> None:
        self._cameras, self._crop_radius = cameras, crop_radius
        self._pixels = (cameras.width * cameras.height)[:, 0].double()

    def batch(self, num_rays: int, patch_size: int, patch_share: float) -> tuple[RayBundle, dict[str, Any]]:
        """R random rays and ``{"indices": [R, 3]}`` (photo, row, column); there are no patches without photos."""
        del patch_size, patch_share
        drawn = self._draw(num_rays)
        while len(drawn) < num_rays:
            drawn = torch.cat([drawn, self._draw(num_rays)])
        indices = drawn[:num_rays]
        rays = self._cameras.generate_rays(indices[:, :1], coords=indices[:, 1:].float() + 0.5)
        return rays, {"indices": indices}

    def _draw(self, count: int) -> Int[Tensor, "r 3"]:
        """Photo, row and column of ``count`` random pixels, less those outside of the crop circle."""
        photo = torch.multinomial(self._pixels, count, replacement=True)
        height, width = (size[photo, 0] for size in (self._cameras.height, self._cameras.width))
        share = torch.rand(count, 2, dtype=torch.float64, device=photo.device)
        row, column = (share[:, 0] * height).long(), (share[:, 1] * width).long()
        pixels = torch.stack([photo, row, column], dim=-1)
        if self._crop_radius is None:
            return pixels
        return pixels[(row - height // 2) ** 2 + (column - width // 2) ** 2 <= self._crop_radius**2]
