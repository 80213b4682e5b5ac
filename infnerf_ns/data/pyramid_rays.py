"""Rays through the pixels of a pyramid, exactly nerfstudio's, from a table instead of an iterative undistortion per
batch.

A photo's level ``l`` has a camera of its own (``fx / 2**l`` and so on) but keeps the photo's camera index: appearance
and pose belong to the photo. Photos with equal intrinsics share a table of camera-frame directions and pixel areas,
made once by nerfstudio's own ray generation, so that a batch costs one gather and one rotation. Cameras whose rays
depend on more than a rotation (stereo, orthographic), and tables beyond the memory budget, go through nerfstudio's ray
generation for every batch.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from infnerf_ns.data.pyramid import PixelDraw, PixelPyramid

_TABLE_TYPES = (
    CameraType.PERSPECTIVE.value,
    CameraType.FISHEYE.value,
    CameraType.EQUIRECTANGULAR.value,
    CameraType.FISHEYE624.value,
)
_BYTES_PER_PIXEL = 16
_CHUNK = 1 << 18


def level_cameras(cameras: Cameras, pyramid: PixelPyramid) -> Cameras:
    """One camera per segment (photo and level) of the pyramid, at the resolution of its level."""
    photo = pyramid.photo.to(cameras.device)
    scale = torch.exp2(-pyramid.level.to(cameras.device, torch.float32))[:, None]
    return Cameras(
        camera_to_worlds=cameras.camera_to_worlds[photo],
        fx=cameras.fx[photo] * scale,
        fy=cameras.fy[photo] * scale,
        cx=cameras.cx[photo] * scale,
        cy=cameras.cy[photo] * scale,
        width=pyramid.width.to(cameras.device)[:, None],
        height=pyramid.height.to(cameras.device)[:, None],
        distortion_params=None if cameras.distortion_params is None else cameras.distortion_params[photo],
        camera_type=cameras.camera_type[photo],
        times=None if cameras.times is None else cameras.times[photo],
        metadata=_at(cameras.metadata, photo),
    )


def level_camera(camera: Cameras, level: int, height: int, width: int) -> Cameras:
    """A copy of one camera, shape (1,), at a pyramid level, whose photo has this size."""
    camera = copy.deepcopy(camera)
    camera.rescale_output_resolution(0.5**level)
    camera.height = torch.full_like(camera.height, height)
    camera.width = torch.full_like(camera.width, width)
    return camera


class PyramidRays:
    """Rays of drawn pixels.

    Args:
        cameras: C cameras, one per photo, on the device of the rays.
        pyramid: the photos' pyramid; only the sizes of its segments are used.
        table_bytes: largest table; 0 for none.
    """

    def __init__(self, cameras: Cameras, pyramid: PixelPyramid, table_bytes: int = 1 << 29) -> None:
        self.cameras = cameras
        self.level_cameras = level_cameras(cameras, pyramid)
        self.table: Float[Tensor, "t 4"] | None = None
        """x, y, z of the camera-frame direction as nerfstudio makes it before it is normalised, and the pixel area"""
        device = cameras.device
        key = self._intrinsics()
        _, group = torch.unique(key, dim=0, return_inverse=True)
        members = group.new_full((int(group.max()) + 1,), len(group))
        first = members.scatter_reduce_(0, group, torch.arange(len(group), device=device), "amin")
        sizes = (self.level_cameras.height * self.level_cameras.width)[first, 0]
        types = torch.unique(self.level_cameras.camera_type).tolist()
        if int(sizes.sum()) * _BYTES_PER_PIXEL <= table_bytes and all(kind in _TABLE_TYPES for kind in types):
            self.table = torch.cat([self._make_table(int(segment)) for segment in first])
            self.table_start = (torch.cumsum(sizes, 0) - sizes)[group]

    def __call__(self, draw: PixelDraw) -> RayBundle:
        """Rays [R] through the centres of the drawn pixels; ``camera_indices`` is the photo, ``nears`` and ``fars``
        are None."""
        device = self.cameras.device
        photo, segment = draw.photo.to(device), draw.segment.to(device)
        if self.table is None:
            coords = torch.stack([draw.row, draw.column], dim=-1).to(device) + 0.5
            rays = self.level_cameras.generate_rays(segment[:, None], coords=coords)
            rays.camera_indices = photo[:, None]
            return rays
        entry = self.table[self.table_start[segment] + draw.local.to(device)]
        pose = self.cameras.camera_to_worlds[photo]
        directions = (pose[:, :, :3] * entry[:, None, :3]).sum(-1)
        norm = directions.norm(dim=-1, keepdim=True)
        return RayBundle(
            origins=pose[:, :, 3],
            directions=directions / norm,
            pixel_area=entry[:, 3:],
            camera_indices=photo[:, None],
            times=None if self.cameras.times is None else self.cameras.times[photo],
            metadata={**(_at(self.cameras.metadata, photo) or {}), "directions_norm": norm},
        )

    def _intrinsics(self) -> Float[Tensor, "s k"]:
        """What the directions of a segment depend on."""
        cameras = self.level_cameras
        parts = [cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.width, cameras.height, cameras.camera_type]
        if cameras.distortion_params is not None:
            parts.append(cameras.distortion_params)
        return torch.cat([part.double() for part in parts], dim=-1)

    def _make_table(self, segment: int) -> Float[Tensor, "p 4"]:
        """Directions and areas of all pixels of one segment, for a camera that is not rotated."""
        camera = self.level_cameras[segment : segment + 1]
        camera.camera_to_worlds = torch.eye(4, device=camera.device)[None, :3]
        coords = camera.get_image_coords().to(camera.device).reshape(-1, 2)
        parts = []
        for chunk in coords.split(_CHUNK):
            rays = camera.generate_rays(torch.zeros_like(chunk[:, :1], dtype=torch.int64), coords=chunk)
            parts.append(torch.cat([rays.directions * rays.metadata["directions_norm"], rays.pixel_area], dim=-1))
        return torch.cat(parts)


def _at(metadata: dict | None, photo: Tensor) -> dict | None:
    """A camera's metadata for each ray; what is no tensor is the same for all."""
    if metadata is None:
        return None
    return {key: value[photo] if isinstance(value, Tensor) else value for key, value in metadata.items()}
