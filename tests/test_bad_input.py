"""A capture that cannot be used ends in one line that names the file and the remedy, before training starts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from tiny_capture import write_capture, write_colmap, write_json

from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError


def start(folder: Path, **dataparser: Any) -> PyramidDataManager:
    """Starts what a training starts."""
    settings = {"orientation_method": "none", "eval_mode": "interval", **dataparser}
    return PyramidDataManagerConfig(data=folder, dataparser=NerfstudioDataParserConfig(**settings)).setup()


def start_colmap(folder: Path) -> PyramidDataManager:
    dataparser = ColmapDataParserConfig(colmap_path=Path("sparse/0"))
    return PyramidDataManagerConfig(data=folder, dataparser=dataparser).setup()


def refusal(start_training: Callable[[], Any]) -> str:
    """The message that the user sees; fails if there is none, or if it is more than a line."""
    with pytest.raises(InputError) as caught:
        start_training()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("infnerf: ")
    return message


def test_missing_folder(tmp_path: Path) -> None:
    assert re.search("nowhere does not exist: check --data", refusal(lambda: start(tmp_path / "nowhere")))
    assert re.search("nowhere does not exist: check --data", refusal(lambda: start_colmap(tmp_path / "nowhere")))


def test_no_transforms_json(tmp_path: Path) -> None:
    message = refusal(lambda: start(tmp_path))
    assert "transforms.json does not exist" in message and "ns-process-data" in message


@pytest.mark.parametrize("text", ["{ not json", "", '{"frames": [}'])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "transforms.json").write_text(text)
    assert "transforms.json is not valid JSON" in refusal(lambda: start(tmp_path))


@pytest.mark.parametrize("text", ["{}", '{"frames": []}', "[1, 2]"])
def test_no_photos(tmp_path: Path, text: str) -> None:
    (tmp_path / "transforms.json").write_text(text)
    assert "lists no photos" in refusal(lambda: start(tmp_path))


def test_no_focal_length(tmp_path: Path) -> None:
    meta = write_capture(tmp_path)
    del meta["fl_x"], meta["fl_y"]
    write_json(tmp_path, meta)
    message = refusal(lambda: start(tmp_path))
    assert "photo images/000.png has no focal length: give fl_x" in message and str(tmp_path) in message


@pytest.mark.parametrize("index", [0, 3, 5])
def test_photo_not_on_disk(tmp_path: Path, index: int) -> None:
    write_capture(tmp_path)
    (tmp_path / f"images/{index:03d}.png").unlink()
    message = refusal(lambda: start(tmp_path))
    assert f"{index:03d}.png does not exist" in message and "take it out" in message


@pytest.mark.parametrize("index", [0, 4])
@pytest.mark.parametrize("how", ["truncated", "no image"])
def test_unreadable_photo(tmp_path: Path, index: int, how: str) -> None:
    """Of the train split or (photo 0) held out."""
    meta = write_capture(tmp_path, 8)
    name = f"images/{index:03d}.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (meta["h"], meta["w"], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, quality=95)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2] if how == "truncated" else b"this is no photo")
    meta["frames"][index]["file_path"] = name
    write_json(tmp_path, meta)
    message = refusal(lambda: start(tmp_path, downscale_factor=1))
    assert f"{index:03d}.jpg cannot be read" in message and "replace the file" in message


def test_photo_of_another_size(tmp_path: Path) -> None:
    write_capture(tmp_path)
    Image.new("RGB", (16, 12)).save(tmp_path / "images/002.png")
    assert re.search(r"002\.png has 16 x 12 pixels but its camera 32 x 24", refusal(lambda: start(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pose_not_finite(tmp_path: Path, value: float) -> None:
    """Centring the poses would spread the NaN over all of them: the message must name the one photo."""
    meta = write_capture(tmp_path)
    meta["frames"][5]["transform_matrix"][1][3] = value
    write_json(tmp_path, meta)
    message = refusal(lambda: start(tmp_path))
    assert "pose of photo images/005.png holds NaN or infinite" in message and "remove" in message


@pytest.mark.parametrize(
    ("matrix", "reason"), [(np.diag([2.0, 2, 2, 1]), "R\\^T R"), (np.diag([1.0, 1, -1, 1]), "it mirrors")]
)
def test_pose_is_no_rotation(tmp_path: Path, matrix: np.ndarray, reason: str) -> None:
    meta = write_capture(tmp_path)
    meta["frames"][2]["transform_matrix"] = matrix.tolist()
    write_json(tmp_path, meta)
    assert re.search(f"photo images/002.png is no rotation \\({reason}", refusal(lambda: start(tmp_path)))


@pytest.mark.parametrize("matrix", [None, "text", [[1, 2], [3, 4]], [[1, 2], [3]]])
def test_pose_is_no_matrix(tmp_path: Path, matrix: Any) -> None:
    meta = write_capture(tmp_path)
    meta["frames"][2]["transform_matrix"] = matrix
    write_json(tmp_path, meta)
    message = refusal(lambda: start(tmp_path))
    assert "images/002.png" in message and "remove the frame" in message


def test_frame_without_a_name(tmp_path: Path) -> None:
    meta = write_capture(tmp_path)
    del meta["frames"][3]["file_path"]
    write_json(tmp_path, meta)
    assert "frame 3 has no 'file_path'" in refusal(lambda: start(tmp_path))


def test_focal_length_of_zero(tmp_path: Path) -> None:
    meta = write_capture(tmp_path)
    meta["fl_y"] = 0.0
    write_json(tmp_path, meta)
    assert "correct fl_x / fl_y" in refusal(lambda: start(tmp_path))


def test_one_photo(tmp_path: Path) -> None:
    write_capture(tmp_path, 1)
    message = refusal(lambda: start(tmp_path, eval_mode="all"))
    assert "lists 1 photo and training needs at least 2" in message


def test_all_photos_from_one_place(tmp_path: Path) -> None:
    meta = write_capture(tmp_path)
    for frame in meta["frames"]:
        frame["transform_matrix"] = meta["frames"][0]["transform_matrix"]
    write_json(tmp_path, meta)
    assert "taken from one place" in refusal(lambda: start(tmp_path))


def test_empty_train_split(tmp_path: Path) -> None:
    write_capture(tmp_path)
    message = refusal(lambda: start(tmp_path, eval_interval=1))
    assert "train split has 0 photo(s)" in message and "--eval-interval" in message


def test_mask_of_another_size(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    Image.new("L", (16, 24), 255).save(tmp_path / "masks/004.png")
    assert re.search(r"004\.png has 16 x 24 pixels but its photo 32 x 24", refusal(lambda: start(tmp_path)))


def test_mask_in_colour(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    Image.new("RGB", (32, 24), (255, 0, 0)).save(tmp_path / "masks/004.png")
    assert re.search(r"004\.png has 3 channels: save it with one", refusal(lambda: start(tmp_path)))


def test_mask_missing_on_disk_and_in_the_list(tmp_path: Path) -> None:
    meta = write_capture(tmp_path, masks=True)
    (tmp_path / "masks/006.png").unlink()
    assert re.search(r"mask .*006\.png does not exist", refusal(lambda: start(tmp_path)))
    del meta["frames"][6]["mask_path"]
    write_json(tmp_path, meta)
    assert "1 of 8 photos have no 'mask_path', the first is images/006.png" in refusal(lambda: start(tmp_path))


def test_unreadable_mask_is_not_called_a_photo(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    path = tmp_path / "masks/004.png"
    path.write_bytes(path.read_bytes()[:-30])
    message = refusal(lambda: start(tmp_path))
    assert f"mask {path} cannot be read" in message


def test_masks_that_hide_everything(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    for file in (tmp_path / "masks").iterdir():
        Image.new("L", (32, 24), 0).save(file)
    assert "masks hide every pixel of the train photos" in refusal(lambda: start(tmp_path))


def test_missing_ply_file_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_capture(tmp_path)
    (tmp_path / "sparse_pc.ply").unlink()
    manager = start(tmp_path)
    assert manager.train_dataset.metadata["sfm_scene"].source == "frusta"
    printed = capsys.readouterr()
    assert "sparse_pc.ply, which" in printed.err and "camerafrusta" in "".join(printed.out.split())


def test_colmap_without_a_model(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    (tmp_path / "sparse/0/cameras.txt").unlink()
    assert re.search(r"sparse/0 has no COLMAP model .*give --colmap-path", refusal(lambda: start_colmap(tmp_path)))
    (tmp_path / "sparse").rename(tmp_path / "moved")
    assert re.search(r"sparse/0 has no COLMAP model .*give --colmap-path", refusal(lambda: start_colmap(tmp_path)))


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_colmap_without_points_is_no_error(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_colmap(tmp_path)
    points = tmp_path / "sparse/0/points3D.txt"
    points.write_text("# nothing\n") if how == "empty" else points.unlink()
    manager = start_colmap(tmp_path)
    assert manager.train_dataset.metadata["sfm_scene"].source == "frusta"
    printed = capsys.readouterr()
    assert f"points3D.txt{' is empty' * (how == 'empty')}: the SfM points" in printed.err
    assert "camerafrusta" in "".join(printed.out.split())


def test_colmap_photo_not_on_disk(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    (tmp_path / "images/005.png").unlink()
    assert "005.png does not exist" in refusal(lambda: start_colmap(tmp_path))


def test_question_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COLMAP captures with photos above 1600 pixels make nerfstudio ask whether to downscale them."""
    write_colmap(tmp_path)
    Image.new("RGB", (1700, 24)).save(tmp_path / "images/000.png")
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    assert "give --downscale-factor 1" in refusal(lambda: start_colmap(tmp_path))


def test_message_is_what_the_process_ends_with(tmp_path: Path) -> None:
    """An InputError is a SystemExit: exit code 1 and the line on stderr, no traceback; the cause stays chained."""
    write_capture(tmp_path)
    (tmp_path / "images/000.png").unlink()
    with pytest.raises(SystemExit) as caught:
        start(tmp_path)
    assert isinstance(caught.value.code, str)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
