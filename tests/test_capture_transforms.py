"""transforms.json means what it says: a photo's own lens, poses of either shape, paths of other systems, splits, places
far from the origin; and what it cannot mean ends in one line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from tiny_capture import FOCAL, HEIGHT, WIDTH, points, write_capture, write_json, write_ply

from infnerf_ns.data.capture import splits
from infnerf_ns.data.capture.files import find_file
from infnerf_ns.data.capture.georeference import Georeference
from infnerf_ns.data.capture.parsers import make_parser
from infnerf_ns.data.checks import check_outliers
from infnerf_ns.data.projection import project
from infnerf_ns.errors import InputError

UTM = np.array([452300.0, 4512345.0, 312.0])

Meta = dict[str, Any]


def parse(folder: Path, split: str = "train", **options: Any) -> DataparserOutputs:
    settings = {"orientation_method": "none", "eval_mode": "all", "downscale_factor": 1, **options}
    return make_parser(NerfstudioDataParserConfig(data=folder, **settings), points=True).get_dataparser_outputs(split)


def changed(folder: Path, change: Callable[[Meta], Any]) -> DataparserOutputs:
    """The outputs of a capture whose transforms.json is changed."""
    meta = write_capture(folder)
    change(meta)
    write_json(folder, meta)
    return parse(folder)


def refusal(folder: Path, change: Callable[[Meta], Any]) -> str:
    with pytest.raises(InputError) as caught:
        changed(folder, change)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_photos_own_lens_goes_before_that_at_the_top(tmp_path: Path) -> None:
    def change(meta: Meta) -> None:
        meta["frames"][1].update(fl_x=40.0, fl_y=41.0, cx=15.0, k1=0.5)
        meta["frames"][2].update(fl_x=50.0)
        meta["frames"][3].update(camera_angle_x=1.0)

    cameras = changed(tmp_path, change).cameras
    assert cameras.fx[:3, 0].tolist() == [FOCAL, 40.0, 50.0]
    assert float(cameras.fx[3]) == pytest.approx(0.5 * WIDTH / math.tan(0.5))
    assert cameras.fy[:, 0].tolist() == [FOCAL, 41.0, 50.0, float(cameras.fx[3])] + [FOCAL] * 4
    assert cameras.cx[:2, 0].tolist() == [WIDTH / 2, 15.0] and cameras.cy[1, 0] == HEIGHT / 2
    torch.testing.assert_close(cameras.distortion_params[:2, 0], torch.tensor([0.02, 0.5]))
    torch.testing.assert_close(cameras.distortion_params[1, 4], torch.tensor(0.001))


@pytest.mark.parametrize("how", ["frames", "flag", "name", "mixed"])
def test_the_kind_of_lens_is_each_photos(tmp_path: Path, how: str) -> None:
    def change(meta: Meta) -> None:
        del meta["camera_model"]
        if how == "flag":
            meta["is_fisheye"] = True
        for frame in meta["frames"][:: 2 if how == "mixed" else 1]:
            if how != "flag":
                frame["camera_model"] = "opencv_fisheye" if how == "name" else "OPENCV_FISHEYE"

    kinds = changed(tmp_path, change).cameras.camera_type[:, 0].tolist()
    fisheye, perspective = CameraType.FISHEYE.value, CameraType.PERSPECTIVE.value
    assert kinds == ([fisheye, perspective] * 4 if how == "mixed" else [fisheye] * 8)


def test_full_opencv_without_a_denominator_is_opencv(tmp_path: Path) -> None:
    zero = {"k3": 0.25, "k4": 0.0, "k5": 0.0, "k6": 0.0}
    cameras = changed(tmp_path / "a", lambda meta: meta.update(camera_model="FULL_OPENCV", **zero)).cameras
    assert cameras.camera_type[0] == CameraType.PERSPECTIVE.value and cameras.distortion_params[0, 2] == 0.25
    message = refusal(tmp_path / "b", lambda meta: meta.update(camera_model="FULL_OPENCV", **zero | {"k4": 0.1}))
    assert "FULL_OPENCV with k4 = 0.1" in message and "image_undistorter" in message


def test_angles_of_view_and_missing_values(tmp_path: Path) -> None:
    def change(meta: Meta) -> None:
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
            del meta[key]
        meta["camera_angle_x"] = 2 * math.atan(WIDTH / 2 / FOCAL)

    cameras = changed(tmp_path, change).cameras
    torch.testing.assert_close(cameras.fx, torch.full((8, 1), FOCAL))
    torch.testing.assert_close(cameras.fy, torch.full((8, 1), FOCAL))
    assert (cameras.width[0], cameras.height[0], cameras.cx[0], cameras.cy[0]) == (WIDTH, HEIGHT, WIDTH / 2, HEIGHT / 2)


@pytest.mark.parametrize("how", ["3x4", "integers"])
def test_poses_of_either_shape(tmp_path: Path, how: str) -> None:
    turned = [[0, 0, 1, 5], [1, 0, 0, 6], [0, 1, 0, 7], [0, 0, 0, 1]]

    def change(meta: Meta) -> None:
        for frame in meta["frames"]:
            frame["transform_matrix"] = frame["transform_matrix"][:3] if how == "3x4" else turned
        meta["frames"][0]["transform_matrix"] = np.eye(4, dtype=int).tolist()[: 3 if how == "3x4" else 4]

    outputs = changed(tmp_path, change)
    assert outputs.cameras.camera_to_worlds.shape == (8, 3, 4)
    torch.testing.assert_close(outputs.cameras.camera_to_worlds[0, :, :3], torch.eye(3))


def test_files_of_other_systems_are_found(tmp_path: Path) -> None:
    """Backslashes, a byte order mark, other capitals, no ending, COLMAP's names of masks."""
    meta = write_capture(tmp_path, masks=True)
    for index, frame in enumerate(meta["frames"]):
        frame["file_path"] = f".\\images\\{index:03d}.PNG" if index else "images/000"
        mask = tmp_path / frame["mask_path"]
        mask.rename(mask.with_name(f"{mask.name}.png"))
    (tmp_path / "transforms.json").write_text(json.dumps(meta), encoding="utf-8-sig")
    outputs = parse(tmp_path)
    assert outputs.image_filenames == [tmp_path / f"images/{index:03d}.png" for index in range(8)]
    assert outputs.mask_filenames == [tmp_path / f"masks/{index:03d}.png.png" for index in range(8)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cx": math.nan}, "has cx = nan: give a number"),
        ({"cx": 1e300}, "cx = 1e+300 .* give the principal point in pixels"),
        ({"k1": 1e300}, "distortion coefficient of 1e+300"),
        ({"k1": "a"}, "has k1 = 'a': give a number"),
        ({"fl_y": 1e300}, "fl_y = 1e+300 .*allowed is"),
        ({"fl_x": -3}, "fl_x = -3: correct fl_x"),
        ({"fl_x": 0.9, "fl_y": 1.2, "cx": 0.5, "cy": 0.5}, "as shares of the photo must be multiplied"),
        ({"cx": 0.5, "cy": 0.5}, "as shares of the photo must be multiplied"),
        ({"w": 0}, "has w = 0: give the photo's size"),
        ({"w": 31.5}, "has w = 31.5: give the photo's size"),
        ({"camera_model": "MAGIC"}, "camera_model 'MAGIC', which is not known"),
        ({"camera_model": "FOV", "omega": 0.9}, "FOV with omega = 0.9"),
        ({"is_fisheye": True}, "both is_fisheye and camera_model OPENCV"),
        ({"distortion_params": [1, 2]}, "distortion_params .* list of 6 numbers"),
        ({"frames": 5}, "lists no photos"),
        ({"train_filenames": "images/000.png"}, "train_filenames must be a list"),
        ({"val_filenames": ["images/900.png"]}, "val_filenames lists images/900.png .* does not have"),
        ({"ply_file_path": 3}, "ply_file_path must be the name"),
        ({"applied_transform": [[1, 2], [3, 4]]}, "applied_transform is no 3x4 matrix"),
        ({"applied_scale": "big"}, "applied_scale is 'big'"),
        ({"orientation_override": "down"}, "orientation_override is 'down': allowed are pca"),
    ],
)
def test_what_cannot_be_true_is_named(tmp_path: Path, change: Meta, expected: str) -> None:
    message = refusal(tmp_path, lambda meta: meta.update(change))
    assert str(tmp_path / "transforms.json") in message
    assert re.search(expected.replace("+", r"\+"), message), message


def test_a_transposed_pose_and_two_poses_of_one_photo_are_refused(tmp_path: Path) -> None:
    def transpose(meta: Meta) -> None:
        meta["frames"][2]["transform_matrix"] = np.transpose(meta["frames"][2]["transform_matrix"]).tolist()

    assert "last row of the pose of photo images/002.png" in refusal(tmp_path / "a", transpose)
    twice = refusal(tmp_path / "b", lambda meta: meta["frames"][3].update(file_path="images/002.png"))
    assert "images/002.png twice, with different poses" in twice


@pytest.mark.parametrize("count", [5, 8, 10, 11, 30])
def test_one_camera_far_from_all_others(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: with it, nerfstudio's unit and middle are such that single precision cannot tell the others apart."""
    random = np.random.default_rng(count)
    positions, names = random.standard_normal((count, 3)) + UTM, [f"{row}.png" for row in range(count)]
    check_outliers(positions, names, "x")
    offset = Georeference.of(positions, np.eye(4)[:3]).offset
    np.testing.assert_allclose(offset, UTM, atol=3)
    assert not capsys.readouterr().err
    positions[3] = 0
    with pytest.raises(InputError, match=r"x: photo 3.png is .* units from the others.* correct its pose or remove"):
        check_outliers(positions, names, "x")
    np.testing.assert_allclose(Georeference.of(positions, np.eye(4)[:3]).offset, UTM, atol=3)
    positions[3] = UTM + 300
    check_outliers(positions, names, "x")
    assert "photo 3.png is" in capsys.readouterr().err


def test_a_tripod_and_a_few_photos_around_it_are_a_capture(capsys: pytest.CaptureFixture[str]) -> None:
    positions = np.concatenate([1e-7 * np.random.default_rng(0).standard_normal((40, 3)), np.eye(3)])
    check_outliers(positions, [str(row) for row in range(43)], "x")
    assert "units from the others" in capsys.readouterr().err
    far = np.concatenate([np.tile(UTM, (40, 1)), UTM + np.eye(3)])
    np.testing.assert_allclose(Georeference.of(far, np.eye(4)[:3]).offset, UTM, atol=1)


def test_a_missing_file_below_a_folder_with_a_backslash(tmp_path: Path) -> None:
    """Regression: it was looked for again and again."""
    folder = tmp_path / "a\\b"
    folder.mkdir()
    assert find_file(folder, "missing.png") == folder / "missing.png"
    assert find_file(folder, "x\\y/missing.png") == folder / "x\\y/missing.png"
    (folder / "x").mkdir()
    (folder / "x" / "there.png").touch()
    assert find_file(folder, "./x\\there.png") == folder / "x" / "there.png"


def test_no_points_where_none_are_named(tmp_path: Path) -> None:
    outputs = changed(tmp_path, lambda meta: meta.update(ply_file_path=None))
    assert "points3D_xyz" not in outputs.metadata


@pytest.mark.parametrize("listed", [("train", "val"), ("train",), ("val",), ("test",), ("train", "val", "test")])
def test_missing_lists_are_what_the_others_leave(tmp_path: Path, listed: tuple[str, ...]) -> None:
    names = {"train": [0, 1, 2, 3, 4], "val": [5, 6, 7], "test": [5, 6, 7]}

    def change(meta: Meta) -> None:
        for split in listed:
            meta[f"{split}_filenames"] = [f"./images/{index:03d}.png" for index in names[split]]

    changed(tmp_path, change)
    for split in splits.SPLITS:
        outputs = parse(tmp_path, split)
        assert [int(name.stem) for name in outputs.image_filenames] == names[split]
        assert outputs.metadata[splits.RULE].startswith(f"{listed[0]}_filenames")


def test_the_log_names_the_held_out_photos() -> None:
    trained, held_out = [Path("a/1.png")], [Path("a/2.png"), Path("b/2.png")]
    assert splits.summary(trained, held_out, "a rule") == (
        "1 photos to train on, 2 held out (a rule): a/2.png, b/2.png"
    )
    assert "1 are in both" in splits.summary(trained, trained, "a rule")


def test_photos_of_one_name_in_two_folders_have_two_downscaled_copies(tmp_path: Path) -> None:
    meta = write_capture(tmp_path, 4)
    for index, frame in enumerate(meta["frames"]):
        name = f"images/{'east' if index % 2 else 'west'}/{index // 2}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / frame["file_path"]).rename(tmp_path / name)
        frame["file_path"] = name
    write_json(tmp_path, meta)
    (tmp_path / "images_2").mkdir()
    with pytest.raises(InputError, match="have one downscaled copy.*--downscale-factor 1"):
        parse(tmp_path, downscale_factor=2)
    for frame in meta["frames"]:
        small = tmp_path / frame["file_path"].replace("images/", "images_2/")
        small.parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH // 2, HEIGHT // 2)).save(small)
    found = parse(tmp_path, downscale_factor=2).image_filenames
    assert len(set(found)) == 4 and all(name.exists() for name in found)


@pytest.mark.parametrize("applied", [False, True])
def test_places_far_from_the_origin_keep_their_precision(tmp_path: Path, applied: bool) -> None:
    """A capture in UTM metres projects to the pixels of the capture at the origin, and its transform leads back."""
    offset = np.array([452300.25, 4512345.5, 312.0])
    near = changed(tmp_path / "near", lambda meta: None)
    swap = np.array([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])

    def move(meta: Meta) -> None:
        for frame in meta["frames"]:
            pose = np.array(frame["transform_matrix"])
            pose[:3, 3] += offset
            frame["transform_matrix"] = pose.tolist()
        if applied:
            meta["applied_transform"] = swap.tolist()
        write_ply(tmp_path / "far/sparse_pc.ply", points() + offset, kind="double")

    far = changed(tmp_path / "far", move)
    for index in range(8):
        pixels = [project(outputs.cameras[index], outputs.metadata["points3D_xyz"]).pixels for outputs in (near, far)]
        assert (pixels[0] - pixels[1]).abs().max() < 1e-3
    original = np.concatenate([swap, [[0, 0, 0, 1]]]) if applied else np.eye(4)
    world = np.linalg.inv(original)[:3, :3] @ (points()[0] + offset)
    transform = far.dataparser_transform
    assert transform.dtype == torch.float64
    scene = (transform[:, :3].numpy() @ world + transform[:, 3].numpy()) * far.dataparser_scale
    np.testing.assert_allclose(scene, far.metadata["points3D_xyz"][0], atol=1e-6)
    back = far.transform_poses_to_original_space(far.cameras.camera_to_worlds, camera_convention="opengl")
    place = original[:3, :3] @ back[0, :, 3].numpy()
    expected = json.loads((tmp_path / "far/transforms.json").read_text())["frames"][0]["transform_matrix"]
    np.testing.assert_allclose(place, np.array(expected)[:3, 3], atol=1e-5)


def test_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_capture(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(InputError, match="No space left on device.*TMPDIR"):
        parse(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("name", ["transforms.json", "sparse_pc.ply"])
@pytest.mark.parametrize("what", ["a named pipe (FIFO)", "a device", "a folder"])
def test_a_file_that_is_none(tmp_path: Path, name: str, what: str) -> None:
    """Opening a FIFO waits for ever, and /dev/zero never ends."""
    write_capture(tmp_path)
    path = tmp_path / name
    path.unlink()
    if what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(InputError, match=re.escape(f"{path}: it is {what}, not a file")):
        parse(tmp_path)
