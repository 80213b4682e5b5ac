"""COLMAP models mean what they say, in binary and in text: names, lenses, tracks, which model, masks, splits; and
damaged files end in one line."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from tiny_capture import FOCAL, HEIGHT, WIDTH, write_colmap

from infnerf_ns.data.capture.colmap_files import read_cameras, read_images, read_points
from infnerf_ns.data.capture.intrinsics import COLMAP_MODELS, from_colmap
from infnerf_ns.data.capture.parsers import make_parser
from infnerf_ns.data.projection import project
from infnerf_ns.errors import InputError


def parse(folder: Path, split: str = "train", **options: Any) -> DataparserOutputs:
    settings = {"colmap_path": Path("sparse/0"), "eval_mode": "all", "downscale_factor": 1, **options}
    return make_parser(ColmapDataParserConfig(data=folder, **settings), points=True).get_dataparser_outputs(split)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def to_binary(model: Path, out: Path | None = None) -> None:
    """Writes a text model's binary form, as COLMAP's documentation describes it."""
    out = out or model
    out.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, (name, _) in COLMAP_MODELS.items()}
    cameras = read_cameras(model, "txt")
    data = struct.pack("<Q", len(cameras))
    for identity, camera in cameras.items():
        data += struct.pack("<iiQQ", identity, numbers[camera.model], camera.width, camera.height)
        data += struct.pack(f"<{len(camera.params)}d", *camera.params)
    (out / "cameras.bin").write_bytes(data)
    rows = [line.split() for line in (model / "images.txt").read_text().split("\n")]
    heads = [row for row in rows[::2] if row]
    data = struct.pack("<Q", len(heads))
    for head, matches in zip(heads, rows[1::2]):
        data += struct.pack("<i7di", int(head[0]), *map(float, head[1:8]), int(head[8]))
        data += " ".join(head[9:]).encode() + b"\0" + struct.pack("<Q", len(matches) // 3)
        for x, y, point in zip(matches[::3], matches[1::3], matches[2::3]):
            data += struct.pack("<ddq", float(x), float(y), int(point))
    (out / "images.bin").write_bytes(data)
    rows = [line.split() for line in (model / "points3D.txt").read_text().strip().split("\n")]
    data = struct.pack("<Q", len(rows))
    for row in rows:
        data += struct.pack("<Q3d3Bd", int(row[0]), *map(float, row[1:4]), *map(int, row[4:7]), float(row[7]))
        data += struct.pack("<Q", (len(row) - 8) // 2) + struct.pack(f"<{len(row) - 8}i", *map(int, row[8:]))
    (out / "points3D.bin").write_bytes(data)


def test_binary_and_text_are_read_alike(tmp_path: Path) -> None:
    write_colmap(tmp_path, 8, ids=[40, 3, 22, 17, 9, 31, 5, 12])
    model = tmp_path / "sparse/0"
    to_binary(model)
    assert read_cameras(model, "bin") == read_cameras(model, "txt")
    for binary, text in zip(read_images(model, "bin", matches=True), read_images(model, "txt", matches=True)):
        assert (binary.number, binary.name, binary.camera) == (text.number, text.name, text.camera)
        np.testing.assert_array_equal(binary.camera_to_world, text.camera_to_world)
        np.testing.assert_array_equal(binary.matches, text.matches)
    for binary, text in zip(read_points(model, "bin"), read_points(model, "txt")):
        np.testing.assert_array_equal(binary, text)


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_tracks_are_where_points_project(tmp_path: Path, kind: str) -> None:
    """Ids are not in the order of the names; the photos that are held out have no tracks."""
    tracks = write_colmap(tmp_path, 8, ids=[40, 3, 22, 17, 9, 31, 5, 12])
    if kind == "bin":
        to_binary(tmp_path / "sparse/0")
        for name in ("cameras", "images", "points3D"):
            (tmp_path / f"sparse/0/{name}.txt").unlink()
    outputs = parse(tmp_path, eval_mode="interval")
    found = outputs.metadata["tracks"]
    photos = [int(name.stem) for name in outputs.image_filenames]
    assert len(photos) == 7
    pairs = {(point, photos[photo]) for point, photo in zip(found.point.tolist(), found.photo.tolist())}
    expected = {(point, photo) for point, track in enumerate(tracks) for photo in track if photo in photos}
    assert pairs == expected and len(found.point) == len(pairs)
    for index in range(7):
        mine = found.photo == index
        pixels = project(outputs.cameras[index], outputs.metadata["points3D_xyz"][found.point[mine]]).pixels
        torch.testing.assert_close(pixels, found.pixel[mine], atol=1e-2, rtol=0)


def test_tracks_of_downscaled_photos_are_in_their_pixels(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    full = parse(tmp_path).metadata["tracks"]
    shutil.copytree(tmp_path / "images", tmp_path / "images_2")
    torch.testing.assert_close(parse(tmp_path, downscale_factor=2).metadata["tracks"].pixel, full.pixel / 2)


def test_names_with_spaces_folders_and_other_capitals(tmp_path: Path) -> None:
    write_colmap(tmp_path, 4)
    images = tmp_path / "sparse/0/images.txt"
    text = images.read_text()
    for index, name in enumerate(("a b (1).png", "east/0.PNG", "west\\0.png")):
        target = tmp_path / "images" / name.replace("\\", "/").replace("PNG", "png")
        target.parent.mkdir(exist_ok=True)
        (tmp_path / f"images/{index:03d}.png").rename(target)
        text = text.replace(f" {index:03d}.png", f" {name}")
    images.write_text("\ufeff" + text, encoding="utf-8")
    found = parse(tmp_path).image_filenames
    names = ["a b (1).png", "east/0.png", "west/0.png", "003.png"]
    assert found == [tmp_path / "images" / name for name in names] and all(name.is_file() for name in found)


PINHOLE = (FOCAL, FOCAL, 16.0, 12.0)


@pytest.mark.parametrize(
    ("model", "params", "kind", "distortion"),
    [
        ("SIMPLE_PINHOLE", (FOCAL, 16, 12), CameraType.PERSPECTIVE, (0, 0, 0, 0, 0, 0)),
        ("PINHOLE", PINHOLE, CameraType.PERSPECTIVE, (0, 0, 0, 0, 0, 0)),
        ("SIMPLE_RADIAL", (FOCAL, 16, 12, 0.1), CameraType.PERSPECTIVE, (0.1, 0, 0, 0, 0, 0)),
        ("RADIAL", (FOCAL, 16, 12, 0.1, 0.2), CameraType.PERSPECTIVE, (0.1, 0.2, 0, 0, 0, 0)),
        ("OPENCV", (*PINHOLE, 0.1, 0.2, 0.3, 0.4), CameraType.PERSPECTIVE, (0.1, 0.2, 0, 0, 0.3, 0.4)),
        ("OPENCV_FISHEYE", (*PINHOLE, 0.1, 0.2, 0.3, 0.4), CameraType.FISHEYE, (0.1, 0.2, 0.3, 0.4, 0, 0)),
        ("FULL_OPENCV", (*PINHOLE, 1, 2, 3, 4, 5, 0, 0, 0), CameraType.PERSPECTIVE, (1, 2, 5, 0, 3, 4)),
        ("SIMPLE_RADIAL_FISHEYE", (FOCAL, 16, 12, 0.1), CameraType.FISHEYE, (0.1, 0, 0, 0, 0, 0)),
        ("RADIAL_FISHEYE", (FOCAL, 16, 12, 0.1, 0.2), CameraType.FISHEYE, (0.1, 0.2, 0, 0, 0, 0)),
        ("THIN_PRISM_FISHEYE", (*PINHOLE, 1, 2, 3, 4, 5, 6, 0, 0), CameraType.FISHEYE, (1, 2, 5, 6, 3, 4)),
        ("RAD_TAN_THIN_PRISM_FISHEYE", (*PINHOLE, 1, 2, *([0] * 10)), CameraType.FISHEYE, (1, 2, 0, 0, 0, 0)),
        ("FISHEYE", PINHOLE, CameraType.FISHEYE, (0, 0, 0, 0, 0, 0)),
        ("DIVISION", (*PINHOLE, 0), CameraType.PERSPECTIVE, (0, 0, 0, 0, 0, 0)),
        ("EUCM", (*PINHOLE, 0, 1), CameraType.PERSPECTIVE, (0, 0, 0, 0, 0, 0)),
    ],
)
def test_lens_models_that_nerfstudio_has(
    model: str, params: tuple[float, ...], kind: CameraType, distortion: tuple[float, ...]
) -> None:
    lens = from_colmap(model, WIDTH, HEIGHT, params, "here")
    assert (lens.kind, lens.fl_x, lens.fl_y, lens.cx, lens.cy) == (kind, *PINHOLE)
    assert lens.distortion == pytest.approx(distortion)


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("FULL_OPENCV", (*PINHOLE, 1, 2, 3, 4, 5, 0.5, 0, 0), "FULL_OPENCV with k4 = 0.5"),
        ("FOV", (*PINHOLE, 0.9), "FOV with omega = 0.9"),
        ("THIN_PRISM_FISHEYE", (*PINHOLE, 1, 2, 3, 4, 5, 6, 0.1, 0), "sx1 = 0.1"),
        ("RAD_TAN_THIN_PRISM_FISHEYE", (*PINHOLE, 1, 2, 0, 0, 0, 0, 0.5, *([0] * 5)), "p1 = 0.5"),
        ("EUCM", (*PINHOLE, 0.5, 1), "EUCM with alpha = 0.5"),
        ("NEWEST", PINHOLE, "lens model NEWEST, which is not known"),
        ("OPENCV", PINHOLE, "4 parameters instead of 8"),
    ],
)
def test_lens_models_that_it_does_not_have(model: str, params: tuple[float, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        from_colmap(model, WIDTH, HEIGHT, params, "here")


def test_a_panorama_projects_to_the_whole_photo() -> None:
    """The middle of the photo is ahead, its right edge behind: COLMAP's equirectangular photos are nerfstudio's."""
    lens = from_colmap("EQUIRECTANGULAR", 400, 200, (400, 200), "here")
    assert (lens.fl_x, lens.fl_y, lens.cx, lens.cy) == (200, 200, 200, 100)


def test_every_photo_has_its_own_lens(tmp_path: Path) -> None:
    write_colmap(tmp_path, 4)
    cameras = tmp_path / "sparse/0/cameras.txt"
    fisheye = f"2 OPENCV_FISHEYE {WIDTH} {HEIGHT} 20 21 16 12 0.1 0 0 0\n"
    cameras.write_text(cameras.read_text() + fisheye)
    images = tmp_path / "sparse/0/images.txt"
    images.write_text(images.read_text().replace(" 1 002.png", " 2 002.png"))
    found = parse(tmp_path).cameras
    kinds = [CameraType.PERSPECTIVE.value, CameraType.FISHEYE.value]
    assert found.camera_type[:, 0].tolist() == [kinds[0], kinds[0], kinds[1], kinds[0]]
    assert found.fx[:, 0].tolist() == [FOCAL, FOCAL, 20.0, FOCAL] and found.distortion_params[2, 0] == pytest.approx(
        0.1
    )


def test_poses_that_nerfstudio_flips(tmp_path: Path) -> None:
    """Regression: its orientation "pca" turned the points over and two of the poses."""
    write_colmap(tmp_path, 8)
    as_colmap = {"assume_colmap_world_coordinate_convention": False}  # of these poses one that it turns over
    plain, turned = (parse(tmp_path, orientation_method=method, **as_colmap) for method in ("none", "pca"))
    poses = [outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds) for outputs in (plain, turned)]
    torch.testing.assert_close(*poses, atol=1e-5, rtol=0)
    photo, point = turned.metadata["tracks"].photo, turned.metadata["tracks"].point
    for index in range(8):
        seen = point[photo == index]
        pixels = [project(each.cameras[index], each.metadata["points3D_xyz"][seen]).pixels for each in (plain, turned)]
        torch.testing.assert_close(*pixels, atol=1e-2, rtol=0)


def models(folder: Path, **photos: int) -> None:
    """A capture with models of so many photos each."""
    write_colmap(folder, 8)
    whole = folder / "sparse/whole"
    (folder / "sparse/0").rename(whole)
    for name, count in photos.items():
        shutil.copytree(whole, folder / "sparse" / name)
        path = folder / "sparse" / name / "images.txt"
        path.write_text("\n".join(path.read_text().split("\n")[: 2 * count]) + "\n")
    shutil.rmtree(whole)


def test_of_several_models_the_largest_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models(tmp_path, **{"0": 3, "1": 6, "2": 4})
    assert len(parse(tmp_path).image_filenames) == 6
    printed = capsys.readouterr().err
    assert "sparse/1 is used instead of" in printed and "fewer photos (3, not 6)" in printed
    for place, count in (("sparse/2", 4), ("sparse", 6), ("nowhere", 6), ("colmap/sparse/0", 6)):
        assert len(parse(tmp_path, colmap_path=Path(place)).image_filenames) == count, place


def older(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("newer", ["bin", "txt"])
def test_of_binary_and_text_files_that_differ_the_newer_are_taken(
    tmp_path: Path, newer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models(tmp_path, **{"0": 8, "1": 5})
    model = tmp_path / "sparse/0"
    to_binary(tmp_path / "sparse/1", model)
    older(model, "*.txt" if newer == "bin" else "*.bin")
    shutil.rmtree(tmp_path / "sparse/1")
    assert len(parse(tmp_path).image_filenames) == (5 if newer == "bin" else 8)
    assert f"the .{newer} files are used" in capsys.readouterr().err
    (model / f"points3D.{newer}").unlink()  # the other ones are complete
    assert len(parse(tmp_path).image_filenames) == (8 if newer == "bin" else 5)


def test_files_that_agree_are_no_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_colmap(tmp_path)
    to_binary(tmp_path / "sparse/0")
    assert len(parse(tmp_path).image_filenames) == 8
    assert "different models" not in capsys.readouterr().err


def test_points_without_tracks_are_points(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    path = tmp_path / "sparse/0/points3D.txt"
    path.write_text("\n".join(" ".join(line.split()[:8]) for line in path.read_text().strip().split("\n")))
    metadata = parse(tmp_path).metadata
    assert len(metadata["points3D_xyz"]) == 60 and "tracks" not in metadata


@pytest.mark.parametrize("name", ["{}.png", "{}.png.png", "{}.PNG"])
def test_masks_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    write_colmap(tmp_path, 4)
    (tmp_path / "masks").mkdir()
    expected = [tmp_path / "masks" / name.format(f"{index:03d}") for index in range(4)]
    for path in expected:
        path.write_bytes(b"")
    assert parse(tmp_path, masks_path=Path("masks")).mask_filenames == expected


def test_split_lists(tmp_path: Path) -> None:
    """nerfstudio looks for validation_list.txt, but never reads it."""
    write_colmap(tmp_path)
    (tmp_path / "validation_list.txt").write_text("\ufeff006.png\r\n\r\n007.png\r\n", encoding="utf-8")
    for split, photos in (("train", range(6)), ("val", (6, 7)), ("test", (6, 7))):
        assert [int(name.stem) for name in parse(tmp_path, split).image_filenames] == list(photos)
    (tmp_path / "validation_list.txt").write_text("009.png\n")
    assert "validation_list.txt lists 009.png" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["cameras", "images", "points3D"])
def test_a_binary_file_that_was_cut_or_grew_is_refused(tmp_path: Path, file: str) -> None:
    """At every length: no missing part is taken for a smaller model."""
    write_colmap(tmp_path, 3)
    model = tmp_path / "sparse/0"
    to_binary(model)
    for path in model.glob("*.txt"):
        path.unlink()
    path = model / f"{file}.bin"
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:length])
        assert f"{file}.bin is cut" in refusal(tmp_path)
    path.write_bytes(whole + b"\0")
    assert f"{file}.bin is damaged: it has 1 bytes behind" in refusal(tmp_path)
    path.write_bytes(struct.pack("<Q", 10**12) + whole[8:])
    assert f"{file}.bin is cut" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("cameras.txt", "PINHOLE", "PINHOLE x", "cameras.txt, line 1 is not as COLMAP writes it"),
        ("images.txt", "1 001.png", "1", "images.txt, line 3 is not as COLMAP writes it"),
        ("images.txt", " 1 001.png", " 7 001.png", "photo 001.png has camera 7, which cameras.txt lacks"),
        ("images.txt", " 1 001.png", " 1 000.png", "images.txt has two photos named 000.png"),
        ("points3D.txt", "1 ", "one ", "points3D.txt, line 1 is not as COLMAP writes it"),
    ],
)
def test_a_text_file_with_an_error_is_refused(tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
    write_colmap(tmp_path, 3)
    path = tmp_path / "sparse/0" / file
    path.write_text(path.read_text().replace(old, new, 1))
    assert expected in refusal(tmp_path)


def test_tracks_of_another_model_are_refused(tmp_path: Path) -> None:
    write_colmap(tmp_path, 3)
    path = tmp_path / "sparse/0/points3D.txt"
    lines = path.read_text().split("\n")
    lines[4] = " ".join([*lines[4].split()[:8], "1", "999"])
    path.write_text("\n".join(lines))
    assert "points3D and images are not of one model" in refusal(tmp_path)


def test_a_text_file_with_less_than_it_says_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_colmap(tmp_path, 3)
    path = tmp_path / "sparse/0/points3D.txt"
    path.write_text("# Number of points: 90, mean track length: 3\n" + path.read_text())
    assert len(parse(tmp_path).metadata["points3D_xyz"]) == 60
    assert "says that it has 90 entries and has 60" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("kind", ["bin", "txt"])
@pytest.mark.parametrize("what", ["a named pipe (FIFO)", "a device"])
def test_points_that_are_no_file(tmp_path: Path, kind: str, what: str) -> None:
    """Opening a FIFO waits for ever, and /dev/zero never ends."""
    write_colmap(tmp_path)
    model = tmp_path / "sparse/0"
    if kind == "bin":
        to_binary(model)
        for text in model.glob("*.txt"):
            text.unlink()
    path = model / f"points3D.{kind}"
    path.unlink()
    if what == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    assert f"{path}: it is {what}, not a file" in refusal(tmp_path)


def test_a_line_of_garbage_is_not_repeated_in_full(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    points = tmp_path / "sparse/0/points3D.txt"
    points.write_text("1 0.5 " + "x" * 100_000 + " 0 1 1 1 0.5 1 0\n")
    message = refusal(tmp_path)
    assert "points3D.txt, line 1 is not as COLMAP writes it" in message and len(message) < 400
