"""Which parser reads a capture: those of this package in place of nerfstudio's where there is one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import Blender
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from torch import Tensor

from infnerf_ns.data.capture.colmap import CaptureColmap
from infnerf_ns.data.capture.intrinsics import COEFFICIENTS
from infnerf_ns.data.capture.photo_files import read_header
from infnerf_ns.data.capture.point_cloud import read_ply
from infnerf_ns.data.capture.transforms import CaptureTransforms, frame_pose, read_transforms
from infnerf_ns.data.checks import explain
from infnerf_ns.errors import InputError

STEPS = 1e4
"""Steps of single precision within the cameras' extent, below which their places are too coarse."""
_SIZES = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_y")
_LENS = (*_SIZES, "camera_model", "is_fisheye", *COEFFICIENTS, "k5", "k6")
_OF_FRAMES = (*_LENS, "camera_angle_x", "mask_path", "depth_file_path")


class CaptureBlender(Blender):
    """nerfstudio's parser of NeRF-Synthetic captures, whose points are read whole or not at all. It knows the angle
    ``camera_angle_x`` and photos around their middle; a file that says more is refused, as it would be ignored."""

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        path = self.config.data / f"transforms_{split}.json"
        if path.exists():
            self._require_blender(path)
        return super()._generate_dataparser_outputs(split)

    def _require_blender(self, path: Path) -> None:
        """Ends with one line if a file means what nerfstudio's parser does not read."""
        meta = read_transforms(path, self.config.data, least=1)
        remedy = f"read the capture with 'nerfstudio-data --data {path}', or take it out"
        for frames, entries in (([meta], _LENS), (meta["frames"], _OF_FRAMES)):
            for frame in frames:
                for entry in entries:
                    value = frame.get(entry)
                    if value is None or (entry == "camera_angle_x" and value == meta.get(entry)):
                        continue
                    if not self._is_usual(entry, value, path, meta):
                        raise InputError(f"{path} has {entry} = {value!r}, which blender-data ignores: {remedy}")
        poses = np.stack([frame_pose(frame, frame["file_path"], path) for frame in meta["frames"]])
        positions = poses[:, :3, 3]
        lost, extent = np.spacing(np.float32(np.abs(positions).max())), np.ptp(positions, axis=0).max()
        if 0 < extent < lost * STEPS:
            raise InputError(
                f"{path} has large coordinates, which blender-data keeps in single precision: move the poses to the"
                f" origin, or read the capture with 'nerfstudio-data --data {path}'"
            )

    def _is_usual(self, entry: str, value: Any, path: Path, meta: dict[str, Any]) -> bool:
        """Whether a value is the one that the parser assumes."""
        if entry in _SIZES:
            name = self.config.data / (meta["frames"][0]["file_path"].replace("./", "") + ".png")
            if not name.is_file() or not isinstance(value, (int, float)):
                return not name.is_file()  # whoever opens the photo says that it is missing
            size = read_header(name, "photo").stored_size
            said = meta.get("w", size[0]), meta.get("h", size[1])  # photos may have been scaled since
            same = all(isinstance(side, (int, float)) for side in said) and said[0] * size[1] == said[1] * size[0]
            width, height = said if same else size
            focal = 0.5 * width / math.tan(0.5 * float(meta.get("camera_angle_x", 1.0)))
            usual = {"w": width, "h": height, "cx": width / 2, "cy": height / 2, "fl_x": focal, "fl_y": focal}
            usual["camera_angle_y"] = 2 * math.atan(0.5 * height / focal)
            return math.isclose(value, usual[entry], rel_tol=1e-3, abs_tol=1.0 if entry in ("cx", "cy") else 0.0)
        if entry == "camera_model":
            return str(value).upper() in ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "PERSPECTIVE")
        return not value

    def _load_3D_points(self, ply_file_path) -> dict[str, Tensor]:  # noqa: ANN001
        cloud = read_ply(ply_file_path)
        rgb = np.zeros_like(cloud.xyz, dtype=np.uint8) if cloud.rgb is None else cloud.rgb
        return {
            "points3D_xyz": torch.from_numpy(cloud.xyz * self.config.scale_factor).float(),
            "points3D_rgb": torch.from_numpy(rgb),
        }


_OWN: dict[type, type[DataParser]] = {
    Nerfstudio: CaptureTransforms,
    ColmapDataParser: CaptureColmap,
    Blender: CaptureBlender,
}


def make_parser(config: DataParserConfig, points: bool) -> DataParser:
    """The parser of a capture, which asks no questions and leaves the capture as it is.

    Args:
        config: of the parser; stays as it is.
        points: read SfM points, where the parser can leave them out.
    """
    config = copy.copy(config)
    want_points(config, points)
    return parser_type(config)(config)


def parser_type(config: DataParserConfig) -> type[DataParser]:
    """The class of the parser for a configuration."""
    return _OWN.get(config._target, config._target)


def read_split(config: DataParserConfig, split: str, points: bool = False) -> DataparserOutputs:
    """What a parser says of a split, without a data manager.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return make_parser(config, points).get_dataparser_outputs(split)
    except Exception as error:
        raise explain(error, config) from error


def want_points(config: DataParserConfig, points: bool) -> None:
    """Has a parser's configuration ask for SfM points, or not."""
    if hasattr(config, "load_3D_points"):
        config.load_3D_points = points
    if hasattr(config, "max_2D_matches_per_3D_point"):
        config.max_2D_matches_per_3D_point = 0  # nerfstudio pads all tracks to the longest
