"""The points and cameras of a capture in the frame of its files, and what share of them belongs together."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from infnerf_ns.data.point_files import Tracks
from infnerf_ns.data.projection import project, single_cameras

MAX_POINTS = 500
"""Points that are projected into all photos, and points that colours are compared at."""
MAX_DISTANCE = 1000.0
"""Points farther away than this many times the extent of the photos' positions count as not seen: from there the
photos are one, and none of them can have told how far the points are."""


class CaptureScene(NamedTuple):
    """Points and cameras in the frame of the capture's files, moved to the middle of the cameras."""

    cameras: Cameras
    poses: Float[np.ndarray, "c 3 4"]
    points: Float[np.ndarray, "n 3"]
    colours: UInt8[np.ndarray, "n 3"] | None
    tracks: Tracks | None
    origin: Float[np.ndarray, "3"]
    """the origin of the files, which a change of units or axes leaves where it is"""

    @staticmethod
    def of(outputs: DataparserOutputs, cameras: Cameras | None) -> CaptureScene | None:
        """None without points or photos."""
        points = outputs.metadata.get("points3D_xyz")
        cameras = (outputs.cameras if cameras is None else cameras).flatten().to("cpu")
        if points is None or len(points) == 0 or len(cameras) == 0:
            return None
        points = torch.as_tensor(points).detach().cpu().double().numpy()
        finite = np.isfinite(points).all(axis=-1)
        points = np.where(finite[:, None], points, np.inf)
        poses = cameras.camera_to_worlds.double().numpy()
        given, scale = getattr(outputs, "from_files", None), outputs.dataparser_scale
        if given is not None:
            scale = outputs.from_files_scale
        transform = (outputs.dataparser_transform if given is None else given).double().numpy()
        to_files = transform[:, :3].T
        positions = (poses[:, :, 3] / scale - transform[:, 3]) @ to_files.T
        points = (points / scale - transform[:, 3]) @ to_files.T
        middle = positions.mean(axis=0)
        poses = np.concatenate([to_files @ poses[:, :, :3], (positions - middle)[:, :, None]], axis=-1)
        rgb = outputs.metadata.get("points3D_rgb")
        colours = None if rgb is None or len(rgb) != len(points) else torch.as_tensor(rgb).cpu().numpy()
        return CaptureScene(cameras, poses, points - middle, colours, outputs.metadata.get("tracks"), -middle)

    def moved(self, poses: np.ndarray | None = None, points: np.ndarray | None = None) -> CaptureScene:
        """The same with other poses or points, for which the tracks say nothing."""
        poses, points = self.poses if poses is None else poses, self.points if points is None else points
        middle = poses[:, :, 3].mean(axis=0)
        poses = poses.copy()
        poses[:, :, 3] -= middle
        return self._replace(poses=poses, points=points - middle, tracks=None, origin=self.origin - middle)

    def scaled(self, chosen: Int[np.ndarray, "k"]) -> tuple[Cameras, Float[Tensor, "n 3"]]:
        """Some of the cameras and all points, scaled to numbers of ordinary size."""
        scale = 1 / max(np.abs(self.poses[:, :, 3]).max(), 1e-12)
        cameras = copy.copy(self.cameras[torch.from_numpy(chosen)])
        poses = self.poses[chosen].copy()
        poses[:, :, 3] *= scale
        cameras.camera_to_worlds = torch.from_numpy(poses).float()
        return cameras, torch.from_numpy(self.points * scale).float()


def evenly(count: int, limit: int) -> Int[np.ndarray, "m"]:
    """At most ``limit`` indices, evenly spaced."""
    if count == 0:
        return np.zeros(0, np.int64)
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def seen_shares(capture: CaptureScene) -> tuple[float, float, float]:
    """Shares: of the points inside a photo, inside three, and of the photos that see points."""
    finite = np.nonzero(np.isfinite(capture.points).all(axis=-1))[0]
    if len(finite) == 0:
        return 0.0, 0.0, 0.0
    cameras, points = capture.scaled(np.arange(len(capture.cameras)))
    points = points[torch.from_numpy(finite[evenly(len(finite), MAX_POINTS)])]
    positions = cameras.camera_to_worlds[:, :, 3]
    spread = float((positions - positions.mean(dim=0)).norm(dim=-1).max())
    reach = MAX_DISTANCE * spread if spread > 0 else np.inf
    counts, photos = torch.zeros(len(points), dtype=torch.int64), 0
    for camera in single_cameras(cameras):
        projection = project(camera, points)
        inside = projection.inside & (projection.distance < reach)
        counts += inside
        photos += bool(inside.any())
    several = min(3, len(capture.cameras))
    return (
        float((counts > 0).double().mean()),
        float((counts >= several).double().mean()),
        photos / len(capture.cameras),
    )


def match_errors(capture: CaptureScene, chosen: Int[np.ndarray, "k"]) -> tuple[float | None, float | None]:
    """The share of the tracks' matches that lie inside of their photos, and the median distance of their pixels."""
    if capture.tracks is None:
        return None, None
    cameras, points = capture.scaled(chosen)
    inside, errors = [], []
    for index, camera in zip(chosen.tolist(), single_cameras(cameras)):
        rows = capture.tracks.photo == index
        projection = project(camera, points[capture.tracks.point[rows]])
        inside.append(projection.inside)
        if capture.tracks.pixel is not None:
            apart = (projection.pixels - capture.tracks.pixel[rows]).norm(dim=-1)
            errors.append(torch.where(projection.inside, apart, float(max(camera.width, camera.height))))
    if not inside or len(torch.cat(inside)) == 0:
        return None, None
    return float(torch.cat(inside).double().mean()), float(torch.cat(errors).median()) if errors else None
