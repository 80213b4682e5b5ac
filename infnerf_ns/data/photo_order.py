"""An order of photos in which neighbours in the air follow each other."""

from __future__ import annotations

import numpy as np
from nerfstudio.cameras.cameras import Cameras


def neighbour_order(cameras: Cameras) -> list[int]:
    """All photos, so that those of any interval were taken near each other: halves along the longest side of the
    positions' box, and so on within each half (the leaves of a k-d tree from left to right)."""
    positions = cameras.camera_to_worlds[:, :3, 3].cpu().numpy()

    def ordered(photos: np.ndarray) -> list[int]:
        if len(photos) <= 2:
            return photos.tolist()
        sides = np.ptp(positions[photos], axis=0)
        along = photos[np.argsort(positions[photos, sides.argmax()], kind="stable")]
        return ordered(along[: len(along) // 2]) + ordered(along[len(along) // 2 :])

    return ordered(np.arange(len(positions)))
