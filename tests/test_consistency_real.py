"""Mistakes in real captures: which of them the consistency check refuses, which it names, and which it lets pass. The
table is printed at the end of pytest's output; the check's thresholds come from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image, ImageOps
from tiny_capture import shared_capture

from infnerf_ns.data.capture.consistency.check import check_consistency
from infnerf_ns.data.capture.parsers import read_split
from infnerf_ns.errors import InputError

SIDE = 512
"""Longer side of the photos' copies, twice what is compared."""
OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
Edit = Callable[[DataparserOutputs], None]


@cache
def capture(name: str, folder: Path) -> DataparserOutputs:
    """The train split in the coordinates of its files, with small photos."""
    config = NerfstudioDataParserConfig(
        data=shared_capture(name),
        **{"orientation_method": "none", "center_method": "none", "auto_scale_poses": False},
        **{"eval_mode": "interval", "eval_interval": 8, "downscale_factor": 1},
    )
    outputs = read_split(config, "train", points=True)
    names = []
    for index, path in enumerate(outputs.image_filenames):
        with Image.open(path) as photo:
            photo.draft(None, (SIDE, SIDE))
            small = ImageOps.contain(photo.convert("RGB"), (SIDE, SIDE), Image.Resampling.BOX)
        names.append(folder / f"{index:04d}.jpg")
        small.save(names[-1], quality=95)
    outputs.image_filenames = names
    cameras = outputs.cameras
    scale = small.width / float(cameras.width[0])
    cameras.rescale_output_resolution(scale)
    cameras.width, cameras.height = (
        torch.full_like(cameras.width, small.width),
        torch.full_like(cameras.height, small.height),
    )
    return outputs


def of_photos(change: Callable[[Image.Image], Image.Image]) -> Edit:
    def edit(outputs: DataparserOutputs) -> None:
        for index, path in enumerate(outputs.image_filenames):
            outputs.image_filenames[index] = path.with_name(f"changed-{path.name}")
            with Image.open(path) as photo:
                change(photo).save(outputs.image_filenames[index], quality=95)

    return edit


def of_order(order: Callable[[int], np.ndarray]) -> Edit:
    def edit(outputs: DataparserOutputs) -> None:
        names = outputs.image_filenames
        outputs.image_filenames = [names[index] for index in order(len(names))]

    return edit


def of_points(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(outputs: DataparserOutputs) -> None:
        outputs.metadata["points3D_xyz"] = change(outputs.metadata["points3D_xyz"].clone())

    return edit


def of_focal_length(factor: float) -> Edit:
    def edit(outputs: DataparserOutputs) -> None:
        outputs.cameras.fx, outputs.cameras.fy = outputs.cameras.fx * factor, outputs.cameras.fy * factor

    return edit


def as_world_to_camera(outputs: DataparserOutputs) -> None:
    poses = outputs.cameras.camera_to_worlds
    inverse = (poses[:, :, :3] @ OPENCV).transpose(1, 2)  # as COLMAP has it
    outputs.cameras.camera_to_worlds = torch.cat([inverse, -inverse @ poses[:, :, 3:]], dim=-1)


def with_opencv_axes(outputs: DataparserOutputs) -> None:
    poses = outputs.cameras.camera_to_worlds
    outputs.cameras.camera_to_worlds = torch.cat([poses[:, :, :3] @ OPENCV, poses[:, :, 3:]], dim=-1)


def few_photos(outputs: DataparserOutputs) -> None:
    outputs.cameras, outputs.image_filenames = outputs.cameras[:9], outputs.image_filenames[:9]


def scattered(points: torch.Tensor) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    points[:50] += 1000 * points.std() * torch.randn((50, 3), generator=random)
    return points


PASSES, SAID, WARNS, REFUSED = "passes", "passes, said", "warning", "refused, no cause"
MISTAKES: dict[str, tuple[Edit, str, dict[str, str]]] = {
    "none": (lambda outputs: None, PASSES, {}),
    "9 photos": (few_photos, PASSES, {}),
    "mirrored": (of_photos(ImageOps.mirror), "the photos are mirrored", {}),
    "turned by 180": (of_photos(lambda photo: photo.rotate(180)), "the photos are turned by 180 degrees", {}),
    "photos permuted": (of_order(lambda n: np.random.default_rng(0).permutation(n)), REFUSED, {}),
    "shifted by one photo": (of_order(lambda n: np.roll(np.arange(n), 1)), REFUSED, {"fox": WARNS, "caliterra": WARNS}),
    "focal length x 0.5": (of_focal_length(0.5), "the focal length should be about 2 times", {}),
    "focal length x 1.1": (of_focal_length(1.1), PASSES, {"copr": WARNS}),
    "y and z exchanged": (of_points(lambda points: points[:, [0, 2, 1]]), "the axes of the points", {}),
    "world-to-camera": (as_world_to_camera, "world-to-camera matrices, with OpenCV's axes", {}),
    "OpenCV's axes": (with_opencv_axes, "the poses have OpenCV's axes", {}),
    "points in mm": (of_points(lambda points: 1000 * points), "the points are in millimetres", {}),
    "50 of them far away": (of_points(scattered), SAID, {}),
}
"""What is wrong; what becomes of it; captures of which something else becomes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("name", ["fox", "caliterra", "copr", "lego"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_real_capture(
    mistake: str,
    name: str,
    folders: Callable[[str], Path],
    report: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = capture(name, folders(name))
    outputs = copy.copy(whole)
    outputs.cameras, outputs.metadata = copy.deepcopy(whole.cameras), dict(whole.metadata)
    outputs.image_filenames = list(whole.image_filenames)
    edit, expected, exceptions = MISTAKES[mistake]
    edit(outputs)
    try:
        said, ending = str(check_consistency(outputs)), PASSES
        printed = " ".join(capsys.readouterr().out.split())
        ending = WARNS if "fit badly" in printed else SAID if "lie far outside" in printed else PASSES
    except InputError as error:
        said, ending = str(error), REFUSED
        cause = re.search(r"with one change they fit: (.*?):", said)
        ending = REFUSED if cause is None else cause.group(1)
    figures = re.search(r"by (-?[\d.]+) \(by chance (-?[\d.]+)\)", said)
    cell = f"{'/'.join(figures.groups())} " if figures else ""
    report(f"mistakes in {name}", ("mistake", "agreement/chance", "ending"), mistake, cell, ending)
    assert exceptions.get(name, expected) in ending
