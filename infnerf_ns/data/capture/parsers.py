"""Which parser reads a capture: those of this package in place of nerfstudio's where there is one."""

from __future__ import annotations

import copy

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import Blender
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from torch import Tensor

from infnerf_ns.data.capture.colmap import CaptureColmap
from infnerf_ns.data.capture.point_cloud import read_ply
from infnerf_ns.data.capture.transforms import CaptureTransforms
from infnerf_ns.data.checks import explain


class CaptureBlender(Blender):
    """nerfstudio's parser of NeRF-Synthetic captures, whose points are read whole or not at all."""

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
