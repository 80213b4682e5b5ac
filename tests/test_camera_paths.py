"""Camera paths from files: what nerfstudio would draw otherwise than they say, or fail on, is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.scripts.render import get_crop_from_json
from tiny_model import CONE_ALONE, scrambled, tiny_camera, tiny_config, tiny_model

from infnerf_ns.camera_paths import drawable, read_camera_path
from infnerf_ns.errors import InputError

POSE = [1.0, 0, 0, 0, 0, 0, -1, -1.5, 0, 1, 0, 0.8, 0, 0, 0, 1]
CROP = {
    "crop_center": [0.0, 0.0, 0.0],
    "crop_scale": [1, 2.0, 1],
    "crop_rot": [0.0, 0.0, 0.5],
    "crop_bg_color": {"r": 0, "g": 128, "b": 255},
}
PATH = {
    "camera_type": "perspective",
    "render_width": 12,
    "render_height": 8,
    "seconds": 0.5,
    "camera_path": [{"camera_to_world": POSE, "fov": 50}] * 2,
    "crop": CROP,
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "path.json"
    path.write_text(json.dumps({**PATH, **changes}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop": None},
        {"camera_type": "Perspective"},
        {"camera_type": "VR180", "camera_path": [{"camera_to_world": POSE}]},
        {"camera_path": [{"camera_to_world": [POSE[:4], POSE[4:8], POSE[8:12], POSE[12:]], "fov": 50.0}]},
    ],
)
def test_what_nerfstudio_reads_is_accepted(tmp_path: Path, changes: dict) -> None:
    content = read_camera_path(written(tmp_path, **changes), "--camera-path")
    assert len(get_path_from_json(content)) == len(content["camera_path"])
    assert (get_crop_from_json(content) is None) == (content["crop"] is None)


def _camera(**changes: Any) -> dict:
    return {"camera_path": [PATH["camera_path"][0], {**PATH["camera_path"][0], **changes}]}


def _crop(**changes: Any) -> dict:
    return {"crop": {**CROP, **changes}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"camera_type": "orthographic"}, "would draw as perspective: .*infnerf-ortho"),
        ({"camera_type": "Equirectangular"}, "write 'equirectangular'"),
        ({"camera_type": 3}, "camera_type is 3"),
        ({"render_width": 0}, "render_width is 0: allowed is 1 to"),
        ({"render_height": 10**9}, "render_height is 1000000000: allowed is 1 to"),
        ({"render_height": None}, "render_height is None"),
        ({"seconds": 0}, "seconds is 0: allowed is a number above 0"),
        ({"camera_path": []}, "has no cameras"),
        ({"camera_path": 5}, "cannot be read as a camera path"),
        (_camera(camera_to_world=[math.nan] * 16), "camera 1: camera_to_world must be 16 finite numbers"),
        (_camera(camera_to_world=POSE[:12]), "camera 1: camera_to_world must be 16"),
        (_camera(camera_to_world=[*POSE[:15], [1.0]]), "camera 1: camera_to_world must be 16"),
        (_camera(camera_to_world=[POSE[:4], POSE[4:8], POSE[8:13], POSE[13:]]), "camera 1: camera_to_world must be 16"),
        (_camera(fov=180), "camera 1: fov is 180: allowed is"),
        (_camera(fov=None), "camera 1: fov is None"),
        ({"camera_path": ["x"]}, "camera 0: camera_to_world"),
        (_crop(crop_rot=[0, 0.0, 0.0]), r"crop_rot .*whole numbers here, write \[0.0, 0.0, 0.0\]"),
        (_crop(crop_center=[1, 2, 3]), r"crop_center .*write \[1.0, 2.0, 3.0\]"),
        (_crop(crop_scale=[1.0, 2.0]), "crop_scale must be three finite numbers"),
        (_crop(crop_bg_color=None), "crop_bg_color must have the numbers r, g and b"),
        ({"crop": 1}, "crop must be a section"),
    ],
)
def test_what_nerfstudio_cannot_draw_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=f"--camera-path .*path.json: .*{said}"):
        read_camera_path(written(tmp_path, **changes), "--camera-path")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json: there is no such file"):
        read_camera_path(tmp_path / "none.json", "--camera-path")
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "path.json").write_bytes(content)
        with pytest.raises(InputError, match="is not JSON"):
            read_camera_path(tmp_path / "path.json", "--camera-path")


def test_poses_of_whole_numbers_are_drawn() -> None:
    """Regression: "expected m1 and m2 to have the same dtype, but got: float != long int"."""
    model = scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval()
    whole = {"camera_to_world": [1, 0, 0, 0, 0, 0, -1, -2, 0, 1, 0, 0, 0, 0, 0, 1], "fov": 50}
    exact = {**whole, "camera_to_world": [float(value) for value in whole["camera_to_world"]]}
    pictures = []
    for camera in (whole, exact):
        cameras = get_path_from_json({**PATH, "camera_path": [camera]})
        cameras.rescale_output_resolution(0.5)
        pictures.append(model.get_outputs_for_camera(cameras[0:1])["rgb"])
    assert pictures[0].shape == (4, 6, 3) and torch.equal(*pictures)


@pytest.mark.parametrize("change", ["pose", "focal", "width"])
def test_cameras_that_cannot_be_drawn(change: str) -> None:
    camera = tiny_camera(CameraType.PERSPECTIVE, 60.0)
    assert drawable(camera) is camera
    if change == "pose":
        camera.camera_to_worlds[0, 1, 2] = math.nan
    elif change == "focal":
        camera.fx[:] = math.inf
    else:
        camera.width[:] = 0
    with pytest.raises(InputError, match="cannot be drawn"):
        drawable(camera)
    model = tiny_model(tiny_config(sampler=CONE_ALONE)).eval()
    with pytest.raises(InputError, match="cannot be drawn"):
        model.get_outputs_for_camera(camera)
