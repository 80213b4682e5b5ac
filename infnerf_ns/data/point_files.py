"""SfM points and tracks from files that nerfstudio's dataparsers leave unread, or read in a form that is too large.

With all of its matches COLMAP's dataparser pads every track to the longest one and adds pixel positions that nobody
needs: 13 GB for a million points. Here a track is a list of photos, as it stands in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.utils.colmap_parsing_utils import (
    read_images_binary,
    read_images_text,
    read_points3D_binary,
    read_points3D_text,
)
from torch import Tensor

IMPLIED_TRANSFORM = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]]
"""What nerfstudio takes for a missing ``applied_transform`` where the capture has a folder ``colmap/sparse/0``."""


class Tracks(NamedTuple):
    """Which photo sees which point: K distinct pairs."""

    point: Int[Tensor, "k"]
    """row in the dataparser's points"""
    photo: Int[Tensor, "k"]
    """train photo"""
    pixel: Float[Tensor, "k 2"] | None = None
    """where it sees it, x and y in pixels of the dataparser's cameras, pixel centres at +0.5; None: not known"""


def colmap_tracks(model: Path, image_filenames: list[Path]) -> Tracks:
    """The tracks of a COLMAP model, points in the order of nerfstudio's dataparser.

    Args:
        model: folder with ``points3D`` and ``images``, ``.bin`` or ``.txt``.
        image_filenames: the photos that count; their paths end in the names that COLMAP knows. Matches in other photos
            (the held-out ones) are left out.
    """
    binary = model / "points3D.bin"
    points = read_points3D_binary(binary) if binary.exists() else read_points3D_text(model / "points3D.txt")
    point = np.repeat(np.arange(len(points)), [len(entry.image_ids) for entry in points.values()])
    image = np.concatenate([np.zeros(0, dtype=np.int64), *(entry.image_ids for entry in points.values())])
    ids = _image_ids(model, image_filenames)
    order = np.argsort(ids, kind="stable")
    slot = np.minimum(np.searchsorted(ids, image, sorter=order), len(ids) - 1)
    known = ids[order[slot]] == image
    pairs = np.unique(point[known] * len(ids) + order[slot[known]])  # a track may hold a photo twice
    return Tracks(torch.from_numpy(pairs // len(ids)), torch.from_numpy(pairs % len(ids)))


def _image_ids(model: Path, image_filenames: list[Path]) -> Int[np.ndarray, "c"]:
    """COLMAP's image id of each photo, by file name; -1 for a photo that is not in the model."""
    text = model / "images.txt"  # nerfstudio prefers it
    images = read_images_text(text) if text.exists() else read_images_binary(model / "images.bin")
    ids = {Path(image.name).parts: number for number, image in images.items()}
    lengths = sorted({len(parts) for parts in ids}, reverse=True)  # a/1.jpg is not 1.jpg
    return np.array(
        [next((ids[name.parts[-n:]] for n in lengths if name.parts[-n:] in ids), -1) for name in image_filenames]
    )


def ply_points(
    path: Path, outputs: DataparserOutputs, applied_transform: list[list[float]] | None
) -> dict[str, Tensor]:
    """Points of a ply file in the frame of the dataparser's cameras, as metadata: ``points3D_xyz``, ``points3D_rgb``.

    What nerfstudio's own dataparser reads with open3d, for where open3d cannot be imported (it needs system libraries).

    Args:
        path: the ``ply_file_path`` of a ``transforms.json``.
        outputs: parsed from that file.
        applied_transform: the ``applied_transform [3, 4]`` of that file, or the one that nerfstudio implies.
    """
    import trimesh  # takes a second

    cloud = trimesh.load(path)
    points = torch.from_numpy(np.asarray(cloud.vertices, dtype=np.float64))
    to_cameras = outputs.dataparser_transform.double()
    if applied_transform is not None:
        applied = torch.cat([torch.tensor(applied_transform).double(), torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double()])
        to_cameras = to_cameras @ torch.linalg.inv(applied)
    points = (points @ to_cameras[:, :3].T + to_cameras[:, 3]) * outputs.dataparser_scale
    colours = getattr(cloud, "colors", None)
    if colours is None or len(colours) != len(points):
        colours = np.zeros((len(points), 3), dtype=np.uint8)
    return {"points3D_xyz": points.float(), "points3D_rgb": torch.from_numpy(np.array(colours[:, :3], dtype=np.uint8))}
