"""Where points lie in photos: the inverse of nerfstudio's ray generation, lens distortion included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor


class Projection(NamedTuple):
    """Points in one photo."""

    pixels: Float[Tensor, "n 2"]
    """x and y in pixels, pixel centres at +0.5; only meaningful where ``inside``"""
    depth: Float[Tensor, "n"]
    """what the footprint formula calls z: along the optical axis for perspective cameras, else the distance; scene
    units"""
    distance: Float[Tensor, "n"]
    """distance to the camera centre, scene units"""
    inside: Bool[Tensor, "n"]
    """in front of the camera and within the photo"""


def project(camera: Cameras, points: Float[Tensor, "n 3"]) -> Projection:
    """Projects points into one photo, the inverse of nerfstudio's ray generation (distortion included).

    Perspective, fisheye and equirectangular cameras; FISHEYE624 is taken as a fisheye without distortion, all others
    as perspective.

    Args:
        camera: one camera, batch shape ``()``.
        points: world positions, scene units.
    """
    pose = camera.camera_to_worlds
    local = (points - pose[:, 3]) @ pose[:, :3]
    distance = local.norm(dim=-1)
    depth = -local[:, 2]
    kind = int(camera.camera_type)
    if kind == CameraType.EQUIRECTANGULAR.value:
        polar = torch.acos((local[:, 1] / distance).clamp(-1, 1))
        plane = torch.stack([torch.atan2(local[:, 0], depth), polar - torch.pi / 2], dim=-1) / torch.pi
        front = distance > 0
        depth = distance
    elif kind in (CameraType.FISHEYE.value, CameraType.FISHEYE624.value):
        radius = local[:, :2].norm(dim=-1)
        scale = torch.where(radius > 0, torch.atan2(radius, depth) / radius.clamp(min=1e-12), 1.0)
        plane = torch.stack([local[:, 0] * scale, -local[:, 1] * scale], dim=-1)
        front = distance > 0
        depth = distance
    else:
        front = depth > 0
        plane = torch.stack([local[:, 0], -local[:, 1]], dim=-1) / torch.where(front, depth, 1.0)[:, None]
    focal = torch.cat([camera.fx, camera.fy])
    center = torch.cat([camera.cx, camera.cy])
    size = torch.cat([camera.width, camera.height])
    if kind != CameraType.EQUIRECTANGULAR.value and camera.distortion_params is not None:
        corner = (torch.maximum(center, size - center) / focal).norm()
        front = front & (
            plane.norm(dim=-1) < 1.5 * corner
        )  # the polynomial folds what is far outside back into the photo
        if kind != CameraType.FISHEYE624.value:
            plane = _distort(plane, camera.distortion_params)
    pixels = plane * focal + center
    return Projection(pixels, depth, distance, front & ((pixels >= 0) & (pixels < size)).all(dim=-1))


def _distort(plane: Float[Tensor, "n 2"], params: Float[Tensor, "6"]) -> Float[Tensor, "n 2"]:
    """OpenCV's radial and tangential distortion with nerfstudio's order of parameters: k1, k2, k3, k4, p1, p2."""
    k1, k2, k3, k4, p1, p2 = params
    x, y = plane.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    return torch.stack(
        [x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)],
        dim=-1,
    )


def single_cameras(cameras: Cameras) -> Iterator[Cameras]:
    """The cameras one by one."""
    for index in range(len(cameras)):
        yield cameras[index]
