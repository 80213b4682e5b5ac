"""Photos of the town: camera rays, sun and sky, and the area average over every pixel.

A pixel is the mean of ``supersampling`` x ``supersampling`` samples on a regular grid, taken in *output* space (after
the tone curve): radiance fields learn and blend pixel values there, and so a photo at half size is the area average of
the photo at full size, as image pyramids assume. A photo with supersampling k is the k x k average of a k times larger
one without, up to the rounding to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from infnerf_ns.data.demo_scene.materials import reflectance
from infnerf_ns.data.demo_scene.raycaster import RayCaster
from infnerf_ns.data.demo_scene.town import Town

_SUN_DIRECTION = np.float32([0.48, -0.56, 0.675])
_SUN_DIRECTION /= np.linalg.norm(_SUN_DIRECTION)
_SUN = np.float32([1.45, 1.34, 1.14])
_SKY_LIGHT = np.float32([0.48, 0.55, 0.66])
_BOUNCE_LIGHT = np.float32([0.3, 0.29, 0.25])
_HORIZON = np.float32([0.66, 0.74, 0.82])
_ZENITH = np.float32([0.14, 0.3, 0.62])
_RAYS_AT_ONCE = 1 << 15
"""So few that the arrays of a batch stay in the processor's caches."""


@dataclass(frozen=True)
class Lens:
    """A pinhole with square pixels, the principal point in the middle. Lengths in pixels."""

    width: int
    height: int
    focal: float

    def directions(self, x: Float32[np.ndarray, "..."], y: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "... 3"]:
        """Directions in camera space (x right, y up, z = -1) of image points; (0, 0) is the upper left corner."""
        return np.stack(
            [(x - self.width / 2) / self.focal, (self.height / 2 - y) / self.focal, np.full_like(x, -1.0)], -1
        ).astype(np.float32)


class Photographer:
    """Renders one town through one lens."""

    def __init__(self, town: Town, rays: RayCaster, lens: Lens, supersampling: int) -> None:
        self.town, self.rays, self.lens, self.supersampling = town, rays, lens, supersampling

    def photo(self, camera_to_world: Float32[np.ndarray, "3 4"]) -> UInt8[np.ndarray, "h w 3"]:
        """The photo of a camera (OpenGL axes, metres)."""
        k, lens = self.supersampling, self.lens
        rows_at_once = max(1, _RAYS_AT_ONCE // (k * k * lens.width))
        x = (np.arange(lens.width * k, dtype=np.float32) + 0.5) / k
        photo = np.empty((lens.height, lens.width, 3), np.uint8)
        for top in range(0, lens.height, rows_at_once):
            bottom = min(top + rows_at_once, lens.height)
            y = (np.arange(top * k, bottom * k, dtype=np.float32) + 0.5) / k
            grid_x, grid_y = np.meshgrid(x, y)
            ray = lens.directions(grid_x, grid_y).reshape(-1, 3) @ camera_to_world[:, :3].T
            values = self._samples(np.broadcast_to(camera_to_world[:, 3], ray.shape), ray.astype(np.float32))
            columns = values.reshape(bottom - top, k, lens.width * k, 3).sum(1)
            total = columns.reshape(bottom - top, lens.width, k, 3).sum(2)
            photo[top:bottom] = np.round(total * np.float32(255 / k**2)).astype(np.uint8)
        return photo

    def depth(self, camera_to_world: Float32[np.ndarray, "3 4"]) -> Float32[np.ndarray, "h w"]:
        """What lies behind the middle of every pixel of a photo: depths along the viewing axis, metres; sky: 0."""
        x, y = (np.arange(side, dtype=np.float32) + 0.5 for side in (self.lens.width, self.lens.height))
        ray = self.lens.directions(*np.meshgrid(x, y)).reshape(-1, 3) @ camera_to_world[:, :3].T
        triangle, depth = self.rays.cast(np.broadcast_to(camera_to_world[:, 3], ray.shape), ray)
        return np.where(triangle >= 0, depth, np.float32(0)).reshape(self.lens.height, self.lens.width)

    def pixels(
        self,
        camera_to_world: Float32[np.ndarray, "n 3 4"],
        row: Int64[np.ndarray, "n"],
        column: Int64[np.ndarray, "n"],
    ) -> UInt8[np.ndarray, "n 3"]:
        """Single pixels of n photos: what :meth:`photo` of each camera shows at that row and column."""
        k = self.supersampling
        step = (np.arange(k, dtype=np.float32) + 0.5) / k
        y, x = (np.asarray(at, np.float32)[:, None, None] for at in (row, column))
        directions = self.lens.directions(*np.broadcast_arrays(x + step, y + step[:, None])).reshape(-1, 3)
        pose = np.repeat(camera_to_world, k * k, axis=0)
        values = self._samples(pose[:, :, 3], np.einsum("nij,nj->ni", pose[:, :, :3], directions))
        return np.round(values.reshape(-1, k * k, 3).sum(1) * np.float32(255 / k**2)).astype(np.uint8)

    def _samples(
        self, origins: Float32[np.ndarray, "n 3"], ray: Float32[np.ndarray, "n 3"]
    ) -> Float32[np.ndarray, "n 3"]:
        """Pixel values in 0..1 of single rays; the directions have depth 1 in the frame of their camera."""
        triangle, depth = self.rays.cast(origins, ray)
        hit = triangle >= 0
        if hit.all():
            values = self._lit(origins, ray, triangle, depth)
        else:
            values = _sky(ray)
            if hit.any():
                values[hit] = self._lit(origins[hit], ray[hit], triangle[hit], depth[hit])
        return np.sqrt(np.clip(values, 0, 1))

    def _lit(self, origins, ray, triangle, depth):
        """Radiance that leaves the surfaces that were hit."""
        surfaces = self.town.mesh.surfaces
        position = origins + ray * depth[:, None]
        surface = self.town.mesh.surface.take(triangle)
        normal = surfaces.normal.take(surface, axis=0)
        leafball = surfaces.extent[surface, 0] == 0
        outward = position[leafball] - surfaces.origin[surface[leafball]]
        normal[leafball] = outward / np.linalg.norm(outward, axis=-1, keepdims=True)
        facing = np.einsum("nd,nd->n", normal, ray)
        back = (facing > 0) & ~leafball
        normal[back] *= -1
        slant = np.abs(facing) / np.linalg.norm(ray, axis=-1)
        footprint = depth / (self.lens.focal * self.supersampling) / np.sqrt(np.maximum(slant, 0.05))
        colour = reflectance(surfaces, surface, position, footprint)
        toward_sun = np.maximum(normal @ _SUN_DIRECTION, 0)
        asked = np.nonzero(toward_sun > 0)[0]
        start = position[asked] + normal[asked] * np.float32(0.02) - ray[asked] * (depth[asked] * 1e-5)[:, None]
        far = np.full(len(asked), 1e6, np.float32)
        shadow = self.rays.blocked(start, np.broadcast_to(_SUN_DIRECTION, start.shape), far)
        toward_sun[asked[shadow]] = 0
        upness = (0.5 + 0.5 * normal[:, 2])[:, None]
        return colour * (toward_sun[:, None] * _SUN + upness * _SKY_LIGHT + (1 - upness) * _BOUNCE_LIGHT)


def _sky(ray: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    height = np.clip(ray[:, 2:] / np.linalg.norm(ray, axis=-1, keepdims=True), 0, 1)
    return _HORIZON + (_ZENITH - _HORIZON) * np.sqrt(height)
