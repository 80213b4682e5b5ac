"""Captures far from the origin of their coordinates, such as those in UTM metres.

nerfstudio takes poses and points to single precision before it centres them: 4,500,000 m are then known to a quarter of
a metre, and points move by pixels. So poses and points are moved near the origin in double precision before nerfstudio
sees them, and what moved them becomes part of the run's ``dataparser_transform``, in double precision, too.

With ``o`` the offset, ``A`` the capture's ``applied_transform``, ``a`` its ``applied_scale`` and ``T`` nerfstudio's
orientation and centring, a place x of the capture is ``T (a A x - o)`` times nerfstudio's scale in the scene. Poses and
points of the capture's files are ``a A x`` both. (nerfstudio multiplies the points by ``a`` once more, and not the
poses.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float, Float64
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from infnerf_ns.data.checks import usual_extent

FAR = 100.0
"""Offsets of captures are left alone below so many times the extent of nine of ten cameras: single precision then
places cameras to 6e-6 of their extent, far below a pixel, and nothing about such captures changes."""


@dataclass
class CaptureOutputs(DataparserOutputs):
    """nerfstudio's outputs, whose transform may be in double precision."""

    from_files: Optional[Float64[Tensor, "3 4"]] = None
    """from the coordinates in which the capture's files have poses and points to the scene, without
    ``from_files_scale``; None: they are those of ``dataparser_transform``"""
    from_files_scale: float = 1.0

    def transform_poses_to_original_space(self, poses: Tensor, camera_convention: str = "opencv") -> Tensor:
        """Poses in the capture's coordinates, in the precision of the transform. See nerfstudio."""
        precise = poses.to(self.dataparser_transform.dtype)
        return super().transform_poses_to_original_space(precise, camera_convention)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Georeference:
    """What a capture's coordinates go through before nerfstudio sees them."""

    applied: Float64[np.ndarray, "3 4"] = field(default_factory=lambda: np.eye(4)[:3])
    """the capture's own ``applied_transform``, A"""
    offset: Float64[np.ndarray, "3"] = field(default_factory=lambda: np.zeros(3))
    """o, subtracted from what A and a make; 0 for a capture that is near its origin"""
    applied_scale: float = 1.0
    """a"""

    @staticmethod
    def of(
        positions: Float64[np.ndarray, "c 3"], applied: Float64[np.ndarray, "3 4"], applied_scale: float = 1.0
    ) -> Georeference:
        """That of a capture whose cameras are at these positions (after A and a)."""
        centre = np.median(positions, axis=0)  # one camera elsewhere does not decide
        apart = np.linalg.norm(positions - centre, axis=1)
        extent = usual_extent(apart) or float(apart.max())
        if np.abs(centre).max() <= FAR * extent or extent == 0:
            return Georeference(applied, applied_scale=applied_scale)
        offset = np.round(centre, int(np.clip(np.ceil(-np.log10(extent)) + 1, 0, 300)))
        where = ", ".join(f"{value:.12g}" for value in offset)
        CONSOLE.log(
            f"The cameras are around ({where}) of the capture's coordinates, {extent:.3g} wide: moved to the origin"
            " in double precision; maps and exports are in the capture's coordinates"
        )
        return Georeference(applied, offset, applied_scale)

    def in_scene(
        self, points: Float64[np.ndarray, "n 3"], transform: Float[Tensor, "3 4"], scale: float
    ) -> Float[Tensor, "n 3"]:
        """Scene coordinates of points.

        Args:
            points: after A and a.
            transform: T.
            scale: nerfstudio's.
        """
        turned = torch.from_numpy(points - self.offset) @ transform[:, :3].double().T + transform[:, 3].double()
        return (turned * scale).float()

    def restored(self, outputs: DataparserOutputs) -> CaptureOutputs:
        """Outputs whose ``dataparser_transform`` and scale lead from the capture's coordinates to the scene.

        Args:
            outputs: with T as transform and nerfstudio's scale.
        """
        transform, scale = outputs.dataparser_transform.double(), self.applied_scale
        applied, offset = torch.from_numpy(self.applied), torch.from_numpy(self.offset)
        moved = transform[:, :3] @ (applied[:, 3] - offset / scale) + transform[:, 3] / scale
        whole = torch.cat([transform[:, :3] @ applied[:, :3], moved[:, None]], dim=1)
        values = {entry.name: getattr(outputs, entry.name) for entry in fields(DataparserOutputs)}
        values["dataparser_scale"] = outputs.dataparser_scale * scale
        values["dataparser_transform"] = whole if self.offset.any() else whole.float()
        return CaptureOutputs(**values)

    def after_applied(self, transform: Float[Tensor, "3 4"]) -> Float64[Tensor, "3 4"]:
        """The transform of what A and a have made to the scene, without nerfstudio's scale.

        Args:
            transform: T.
        """
        moved = transform.double().clone()
        moved[:, 3] -= moved[:, :3] @ torch.from_numpy(self.offset)
        return moved


def placed(
    poses: Float64[np.ndarray, "c 4 4"], transform: Float[Tensor, "3 4"], scale: float
) -> Float[Tensor, "c 3 4"]:
    """Poses where a transform takes them, as nerfstudio's parsers say that they do. With the orientation "pca" they do
    not: there `auto_orient_and_center_poses` (nerfstudio 1.1.5) may turn the transform, and so the points, over, and
    negates the second and third pose instead of the second and third row of all.

    Args:
        poses: as nerfstudio was given them.
        transform: T.
        scale: nerfstudio's.
    """
    placed = transform.double() @ torch.from_numpy(poses)
    placed[:, :, 3] *= scale
    return placed.float()
