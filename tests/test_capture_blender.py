"""Captures of NeRF-Synthetic's kind: what nerfstudio's parser of them would leave out in silence is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from tiny_capture import FOCAL, HEIGHT, WIDTH, ring, write_photos

from infnerf_ns.data.capture.parsers import read_split
from infnerf_ns.errors import InputError

ANGLE = 2 * math.atan(0.5 * WIDTH / FOCAL)


def read(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda meta: None) -> DataparserOutputs:
    names = write_photos(folder, 6)
    frames = [
        {"file_path": "./" + name.removesuffix(".png"), "transform_matrix": pose.tolist(), "rotation": 0.1}
        for name, pose in zip(names, ring(6))
    ]
    meta: dict[str, Any] = {"camera_angle_x": ANGLE, "frames": frames}
    change(meta)
    (folder / "transforms_train.json").write_text(json.dumps(meta))
    return read_split(BlenderDataParserConfig(data=folder), "train")


USUAL = {
    "w": WIDTH,
    "h": HEIGHT,
    "cx": WIDTH / 2,
    "cy": HEIGHT / 2,
    "fl_x": FOCAL,
    "fl_y": FOCAL,
    "k1": 0.0,
    "p2": 0,
    "camera_model": "OPENCV",
    "is_fisheye": False,
    "camera_angle_y": 2 * math.atan(0.5 * HEIGHT / FOCAL),
}


def test_what_the_parser_assumes_may_be_said(tmp_path: Path) -> None:
    plain, full = read(tmp_path / "a"), read(tmp_path / "b", lambda meta: meta.update(USUAL))
    assert torch.equal(full.cameras.camera_to_worlds, plain.cameras.camera_to_worlds)
    assert float(full.cameras.fx[0]) == pytest.approx(FOCAL)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("cx", WIDTH / 2 + 3), ("cy", 1.0), ("fl_y", 2 * FOCAL), ("fl_x", 1.5 * FOCAL), ("w", 2 * WIDTH)),
        *(("k1", 0.3), ("p1", -0.01), ("k5", 0.1), ("camera_model", "OPENCV_FISHEYE"), ("is_fisheye", True)),
        ("camera_angle_y", 3.0),
    ],
)
def test_what_would_be_ignored_is_refused(entry: str, value: Any, tmp_path: Path) -> None:
    """Regression: the photos were trained with another lens, in silence."""
    with pytest.raises(InputError, match=f"transforms_train.json has {entry} = .*which blender-data ignores"):
        read(tmp_path / "top", lambda meta: meta.update({entry: value}))
    with pytest.raises(InputError, match=f"has {entry} = .*read the capture with 'nerfstudio-data"):
        read(tmp_path / "frame", lambda meta: meta["frames"][2].update({entry: value}))


@pytest.mark.parametrize(("entry", "value"), [("camera_angle_x", ANGLE / 2), ("mask_path", "masks/1.png")])
def test_what_frames_say_alone_is_refused(entry: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"has {entry} = .*which blender-data ignores"):
        read(tmp_path, lambda meta: [frame.update({entry: value}) for frame in meta["frames"]])


def test_other_spellings_of_the_same_lens_are_read(tmp_path: Path) -> None:
    """Sizes of the full photos beside scaled ones, centres of pixels counted from 0, two photos side by side."""
    plain = read(tmp_path / "plain").cameras
    double = {"w": 2 * WIDTH, "h": 2 * HEIGHT, "cx": WIDTH, "cy": HEIGHT, "fl_x": 2 * FOCAL}
    half = {"cx": (WIDTH - 1) / 2, "cy": (HEIGHT - 1) / 2}
    for number, same in enumerate((double, half)):
        found = read(tmp_path / str(number), lambda meta, same=same: meta.update(same)).cameras
        assert torch.equal(found.fx, plain.fx)

    def beside(meta: dict[str, Any]) -> None:
        meta["frames"] = meta["frames"][:2]
        meta["frames"][1]["transform_matrix"] = np.array(meta["frames"][0]["transform_matrix"]).tolist()
        meta["frames"][1]["transform_matrix"][1][3] += 0.02

    assert len(read(tmp_path / "beside", beside).cameras) == 2


def test_poses_are_checked(tmp_path: Path) -> None:
    def transpose(meta: dict[str, Any]) -> None:
        for frame in meta["frames"]:
            frame["transform_matrix"] = np.transpose(frame["transform_matrix"]).tolist()

    with pytest.raises(InputError, match="last row of the pose"):
        read(tmp_path / "transposed", transpose)

    def move(meta: dict[str, Any]) -> None:
        for frame in meta["frames"]:
            frame["transform_matrix"][1][3] += 4.5e6

    with pytest.raises(InputError, match="large coordinates, which blender-data keeps in single precision"):
        read(tmp_path / "UTM", move)
