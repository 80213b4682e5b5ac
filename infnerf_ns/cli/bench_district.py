"""A part of a scene, and which pixels of photos show it."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from infnerf_ns.data.projection import project
from infnerf_ns.data.pyramid_rays import level_camera
from infnerf_ns.data.sfm import in_front
from infnerf_ns.octree import root_cube

_REACH = 0.05
"""Pixels farther from every visible point, in widths of the photo, count nowhere: sky, for example."""


class District:
    """A rectangle of a scene, seen from above.

    Args:
        points: [N, 3], all of the scene, scene units.
        bounds: least x, least y, largest x, largest y in their root cube, 0 to 1.
    """

    def __init__(self, points: Float[Tensor, "N 3"], bounds: tuple[float, float, float, float]) -> None:
        self.cube = root_cube(points)
        """the root cube of all points"""
        self._low, self._high = torch.tensor(bounds[:2]), torch.tensor(bounds[2:])

    def holds(self, positions: Float[Tensor, "*bs 3"]) -> Bool[Tensor, "*bs"]:
        """Which positions lie in it."""
        flat = self.cube.to_unit(positions)[..., :2]
        return ((flat >= self._low) & (flat <= self._high)).all(dim=-1)


class DistrictPixels:
    """Which pixels of photos show a district. Distances are those of the nearest visible SfM points in the image.

    Args:
        cameras: of the photos, on the CPU.
        points: [N, 3], all of the scene, scene units.
        district: that is asked for.
    """

    def __init__(self, cameras: Cameras, points: Float[Tensor, "N 3"], district: District) -> None:
        self._cameras, self._points, self._district = cameras, points, district
        self._masks: dict[tuple[int, int, tuple[int, int]], tuple[np.ndarray, np.ndarray]] = {}
        self._nearest: dict[int, float] = {}
        self._sizes = [(int(camera.height), int(camera.width)) for camera in cameras]

    def inside(self, number: int, level: int, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """Pixels of a photo's (its number) pyramid level whose surfaces lie in the district."""
        return self._both(number, level, shape)[0]

    def elsewhere(self, number: int, level: int, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """Pixels of surfaces elsewhere."""
        return self._both(number, level, shape)[1]

    def any_inside(self) -> bool:
        """Whether a photo shows the district."""
        return any(self.inside(number, 0, size).any() for number, size in enumerate(self._sizes))

    def any_elsewhere(self) -> bool:
        """Whether a photo shows anything else."""
        return any(self.elsewhere(number, 0, size).any() for number, size in enumerate(self._sizes))

    def shown(self) -> list[int]:
        """Two photos to look at: of those that show much of the district the nearest and the middle one."""
        shares = [float(self.inside(number, 0, size).mean()) for number, size in enumerate(self._sizes)]
        showing = [number for number, share in enumerate(shares) if share >= max(shares) / 2]
        showing.sort(key=lambda number: self._nearest[number])
        return [showing[0], showing[len(showing) // 2]]

    def _both(self, number: int, level: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        key = (number, level, shape)
        if key not in self._masks:
            camera = level_camera(self._cameras[number : number + 1], level, *shape)
            distance, known = self._distances(camera[0], shape)
            if level == 0:
                self._nearest[number] = float(np.median(distance[known])) if known.any() else np.inf
            rays = camera.generate_rays(camera_indices=0, keep_shape=True)
            within = self._district.holds(rays.origins + rays.directions * torch.from_numpy(distance)[..., None])
            self._masks[key] = within.numpy() & known, ~within.numpy() & known
        return self._masks[key]

    def _distances(self, camera: Cameras, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Distance [h, w] of every pixel's nearest visible point, and where one is near enough."""
        height, width = shape
        projection = project(camera, self._points)
        index = projection.inside.nonzero()[:, 0]
        pixels, distance = projection.pixels[index], projection.distance[index]
        if len(index) == 0:
            return np.ones(shape, np.float32), np.zeros(shape, bool)
        visible = in_front(pixels, distance, width, height)
        # Of several points in one pixel the nearest counts: it is written last.
        visible = visible.nonzero()[:, 0]
        visible = visible[distance[visible].argsort(descending=True)]
        column, row = pixels[visible].long().unbind(dim=1)
        empty = np.ones(shape, np.uint8)
        empty[row, column] = 0
        way, label = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        of_label = np.zeros(label.max() + 1, np.float32)
        of_label[label[row, column]] = distance[visible].numpy()
        return of_label[label], way <= _REACH * width
