"""Photos, poses and points that do not belong together are found, with the cause; those that do are left alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from painted_capture import HEIGHT, WIDTH, paint, read_points, write_painted, write_points
from PIL import Image, ImageOps
from tiny_capture import shared_capture, write_capture, write_json

from infnerf_ns.data.capture.consistency.check import ConsistencyReport, check_consistency
from infnerf_ns.data.capture.parsers import read_split
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.point_files import Tracks
from infnerf_ns.data.projection import project
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def parse(folder: Path, **settings: Any) -> DataparserOutputs:
    """The train split, all photos, with points."""
    settings = {"orientation_method": "none", "eval_mode": "all", "downscale_factor": 1, **settings}
    config = NerfstudioDataParserConfig(data=folder, **settings)
    return read_split(config, "train", points=True)


def refusal(what: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        what()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("infnerf: ")
    return message


def with_tracks(outputs: DataparserOutputs, shift: float = 0.0, pixels: bool = True) -> DataparserOutputs:
    """Tracks of all points in all photos that see them, hidden or not, their pixels moved."""
    points, photos, places = [], [], []
    for index in range(len(outputs.cameras)):
        projection = project(outputs.cameras[index], outputs.metadata["points3D_xyz"])
        at = projection.inside.nonzero()[:, 0]
        points.append(at)
        photos.append(torch.full_like(at, index))
        places.append(projection.pixels[at] + shift)
    tracks = Tracks(torch.cat(points), torch.cat(photos), torch.cat(places) if pixels else None)
    outputs.metadata = {**outputs.metadata, "tracks": tracks}
    return outputs


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """What nerfstudio's console has printed, without its names of files and its line ends."""
    return " ".join(re.sub(r"\S+\.py:\d+", "", capsys.readouterr().out).split())


def edit_photos(folder: Path, edit: Callable[[Image.Image], Image.Image]) -> None:
    for path in (folder / "images").iterdir():
        edit(Image.open(path)).save(path)


def edit_poses(folder: Path, meta: dict[str, Any], edit: Callable[[np.ndarray], np.ndarray]) -> None:
    for frame in meta["frames"]:
        frame["transform_matrix"] = edit(np.array(frame["transform_matrix"])).tolist()
    write_json(folder, meta)


def edit_points(folder: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Moves the points; their colours stay."""
    path = folder / "points.ply"
    head, body = path.read_text().split("end_header\n")
    colours = [line.split()[3:] for line in body.splitlines()]
    positions = edit(read_points(path))
    rows = [" ".join([*(f"{v:.9g}" for v in p), *c]) for p, c in zip(positions.tolist(), colours)]
    head = head.replace(f"vertex {len(colours)}", f"vertex {len(rows)}")
    path.write_text(head + "end_header\n" + "\n".join(rows) + "\n")


def test_what_belongs_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path)
    report = check_consistency(parse(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "photos, poses and points: 640 points, 100% inside a photo" in said and "fit badly" not in said
    assert report.num_points == 640 and report.seen == 1.0 and report.photos == 1.0 and report.far_points == 0
    assert report.agreement > 0.85 > 0.5 > report.by_chance and report.colours > 0.8
    assert report.reprojection is None and report.matches is None


@pytest.mark.parametrize("orientation", ["none", "up", "vertical"])
def test_the_frame_of_the_dataparser_does_not_matter(tmp_path: Path, orientation: str) -> None:
    meta = write_painted(tmp_path)
    assert check_consistency(parse(tmp_path, orientation_method=orientation)).agreement > 0.85
    edit_points(tmp_path, lambda points: points * 1000)
    assert "the points are in millimetres where the poses are in metres" in refusal(
        lambda: check_consistency(parse(tmp_path, orientation_method=orientation))
    )
    edit_points(tmp_path, lambda points: points / 1000)
    edit_poses(tmp_path, meta, np.linalg.inv)
    assert "the poses are world-to-camera matrices: " in refusal(
        lambda: check_consistency(parse(tmp_path, orientation_method=orientation))
    )


@pytest.mark.parametrize("colours", [True, False])
@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (ImageOps.mirror, "the photos are mirrored: "),
        (ImageOps.flip, "the photos are upside down"),
        (lambda image: image.transpose(Image.Transpose.ROTATE_180), "the photos are turned by 180 degrees"),
    ],
)
def test_damaged_photos(tmp_path: Path, edit: Callable[[Image.Image], Image.Image], cause: str, colours: bool) -> None:
    write_painted(tmp_path, colours=colours)
    edit_photos(tmp_path, edit)
    assert f"with one change they fit: {cause}" in refusal(lambda: check_consistency(parse(tmp_path)))


@pytest.mark.parametrize("degrees", [90, 270])
def test_square_photos_turned_by_90_degrees(tmp_path: Path, degrees: int) -> None:
    meta = write_painted(tmp_path)
    left = (WIDTH - HEIGHT) // 2
    edit_photos(tmp_path, lambda image: image.crop((left, 0, left + HEIGHT, HEIGHT)))
    meta.update(w=HEIGHT, cx=HEIGHT / 2)
    write_json(tmp_path, meta)
    assert check_consistency(parse(tmp_path)).agreement > 0.85
    edit_photos(tmp_path, lambda image: image.rotate(-degrees))  # clockwise
    assert f"the photos are turned by {degrees} degrees" in refusal(lambda: check_consistency(parse(tmp_path)))


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda pose: pose @ FLIP, "the poses have OpenCV's axes (y down, z forward): negate the second and the third"),
        (lambda pose: np.linalg.inv(pose @ FLIP), "the poses are world-to-camera matrices, with OpenCV's axes: "),
        (np.linalg.inv, "the poses are world-to-camera matrices: write their inverse"),
    ],
)
def test_poses_of_another_convention(tmp_path: Path, edit: Callable[[np.ndarray], np.ndarray], cause: str) -> None:
    meta = write_painted(tmp_path)
    edit_poses(tmp_path, meta, edit)
    assert cause in refusal(lambda: check_consistency(parse(tmp_path)))


def test_photos_in_another_order(tmp_path: Path) -> None:
    """Nothing that can be tried mends it."""
    meta = write_painted(tmp_path)
    poses = [frame["transform_matrix"] for frame in meta["frames"]]
    for frame, place in zip(meta["frames"], np.random.default_rng(1).permutation(len(poses))):
        frame["transform_matrix"] = poses[place]
    write_json(tmp_path, meta)
    message = refusal(lambda: check_consistency(parse(tmp_path)))
    assert "the poses are not of these photos (another order, other names?)" in message


def test_focal_length_of_other_photos(tmp_path: Path) -> None:
    meta = write_painted(tmp_path)
    meta.update(fl_x=2 * meta["fl_x"], fl_y=2 * meta["fl_y"])
    write_json(tmp_path, meta)
    assert "the focal length should be about 0.5 times as long" in refusal(lambda: check_consistency(parse(tmp_path)))


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda points: points * 1000, "millimetres where the poses are in metres: multiply the points by 0.001"),
        (lambda points: points / 0.3048, "feet where the poses are in metres: multiply the points by 0.3048"),
        (lambda points: points[:, [0, 2, 1]] * [1, 1, -1], "the axes of the points are others than those of the poses"),
        (
            lambda points: points + [452300.0, 4512345.0, 312.0],
            "in different frames, one probably georeferenced (UTM) and the other local: the points lie around 4523",
        ),
        (
            lambda points: np.random.default_rng(0).standard_normal((50, 3)) * 1e6,
            "they are in different frames or units",
        ),
        (lambda points: points * np.nan, "no point has finite coordinates"),
    ],
)
def test_points_of_another_frame(tmp_path: Path, edit: Callable[[np.ndarray], np.ndarray], cause: str) -> None:
    write_painted(tmp_path)
    edit_points(tmp_path, edit)
    message = refusal(lambda: check_consistency(parse(tmp_path)))
    assert cause in message and "% inside a photo" in message


@pytest.mark.parametrize(("factor", "named"), [(4, "0.25"), (3, "0.33"), (0.25, "4")])
def test_a_focal_length_of_photos_of_another_size(tmp_path: Path, factor: float, named: str) -> None:
    meta = write_painted(tmp_path)
    meta.update(fl_x=factor * meta["fl_x"], fl_y=factor * meta["fl_y"])
    write_json(tmp_path, meta)
    message = refusal(lambda: check_consistency(parse(tmp_path)))
    assert f"the focal length should be about {named} times as long" in message


def test_few_points_and_other_colours_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path / "few")
    edit_points(tmp_path / "few", lambda points: points[:10])
    check_consistency(parse(tmp_path / "few"))
    assert "only 10 points, which hardly say where the scene is" in logged(capsys)
    write_painted(tmp_path / "classes", colours=False)
    path = tmp_path / "classes" / "points.ply"
    head, _, rows = path.read_text().partition("end_header\n")
    random = np.random.default_rng(0)
    lines = [" ".join([*line.split()[:3], *map(str, random.integers(0, 255, 3))]) for line in rows.splitlines()]
    path.write_text(head + "end_header\n" + "\n".join(lines) + "\n")
    check_consistency(parse(tmp_path / "classes"))
    assert "the points' own colours are not those of the photos there" in logged(capsys)


def test_a_few_far_points_among_good_ones(tmp_path: Path) -> None:
    write_painted(tmp_path)

    def scatter(points: np.ndarray) -> np.ndarray:
        points[::20] = np.random.default_rng(0).standard_normal((len(points[::20]), 3)) * 1e6
        return points

    edit_points(tmp_path, scatter)
    report = check_consistency(parse(tmp_path))
    assert report.far_points == 32 and report.agreement > 0.8 and "32 points lie far outside" in str(report)


def test_the_pixels_of_tracks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path)
    report = check_consistency(with_tracks(parse(tmp_path)))
    assert report.reprojection == pytest.approx(0.0, abs=1e-3) and report.matches == 1.0
    assert check_consistency(with_tracks(parse(tmp_path), pixels=False)).reprojection is None
    capsys.readouterr()
    report = check_consistency(with_tracks(parse(tmp_path), 2.0))
    assert report.reprojection == pytest.approx(2 * 2**0.5, abs=1e-2)
    assert "the points are 2.8 pixels from their tracks" in " ".join(capsys.readouterr().out.split())
    assert "the tracks are not of these poses" in refusal(lambda: check_consistency(with_tracks(parse(tmp_path), 20.0)))


def test_tracks_that_are_not_inside_their_photos(tmp_path: Path) -> None:
    write_painted(tmp_path)
    outputs = with_tracks(parse(tmp_path), pixels=False)
    outputs.cameras = copy.deepcopy(outputs.cameras)
    outputs.cameras.camera_to_worlds[:, :, 1:3] *= -1
    message = refusal(lambda: check_consistency(outputs))
    assert "OpenCV's axes" in message and "0% of the matches are inside their photo" in message


@pytest.mark.parametrize("count", [2, 3, 9])
def test_few_photos(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path, 16)
    outputs = parse(tmp_path)
    outputs.image_filenames, outputs.cameras = outputs.image_filenames[:count], outputs.cameras[torch.arange(count)]
    check_consistency(outputs)
    assert "fit badly" not in capsys.readouterr().out


@pytest.mark.parametrize("how", ["noise", "one colour", "no points"])
def test_where_there_is_nothing_to_see_there_is_no_verdict(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_painted(tmp_path, colours=False)
    random = np.random.default_rng(0)
    if how == "noise":
        shape = (HEIGHT, WIDTH, 3)
        edit_photos(tmp_path, lambda _: Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)))
    elif how == "one colour":
        edit_photos(tmp_path, lambda _: Image.new("RGB", (WIDTH, HEIGHT), (90, 80, 70)))
    else:
        (tmp_path / "points.ply").unlink()
        outputs = parse_without_points(tmp_path)
        assert str(check_consistency(outputs)) == "photos, poses and points: there are no points to compare"
        return
    report = check_consistency(parse(tmp_path))
    assert report.seen == 1.0 and (report.agreement is None or abs(report.agreement) < 0.2)
    assert "fit badly" not in capsys.readouterr().out


def parse_without_points(folder: Path) -> DataparserOutputs:
    return read_split(NerfstudioDataParserConfig(data=folder, orientation_method="none", downscale_factor=1), "train")


def test_brightness_and_contrast_of_the_photos_do_not_matter(tmp_path: Path) -> None:
    """Exposures that differ."""
    write_painted(tmp_path)
    gains = iter(np.random.default_rng(0).uniform(0.3, 1.0, 16))

    def darken(image: Image.Image) -> Image.Image:
        return Image.fromarray((np.asarray(image) * next(gains)).astype(np.uint8))

    edit_photos(tmp_path, darken)
    assert check_consistency(parse(tmp_path)).agreement > 0.85


def start(folder: Path, **settings: Any) -> PyramidDataManager:
    parser = NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval", **settings)
    return PyramidDataManagerConfig(data=folder, dataparser=parser, train_num_rays_per_batch=64).setup()


def test_a_training_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path)
    assert start(tmp_path).train_dataset.metadata["sfm_scene"].source == "visibility"
    assert "photos agree at the points by 0." in " ".join(capsys.readouterr().out.split())
    edit_points(tmp_path, lambda points: points * 1000)
    assert "millimetres" in refusal(lambda: start(tmp_path))
    (tmp_path / "points.ply").unlink()  # the remedy that the line names
    assert start(tmp_path).train_dataset.metadata["sfm_scene"].source == "frusta"


def test_points_without_colours_are_compared_without(tmp_path: Path) -> None:
    write_painted(tmp_path)
    assert check_consistency(parse(tmp_path)).colours > 0.8
    positions = read_points(tmp_path / "points.ply")
    write_points(tmp_path / "points.ply", positions, colours=False)
    assert check_consistency(parse(tmp_path)).colours is None
    assert paint(positions).std() > 20


def original_poses(outputs: DataparserOutputs) -> np.ndarray:
    return outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, "opengl").double().numpy()


def test_poses_that_nerfstudio_flips(tmp_path: Path) -> None:
    """Regression: where nerfstudio's orientation "pca" turns a scene over, it turns the points, but two poses only."""
    meta = write_painted(tmp_path)
    report = check_consistency(parse(tmp_path))
    config = NerfstudioDataParserConfig(
        data=tmp_path, orientation_method="pca", eval_mode="all", downscale_factor=1, load_3D_points=False
    )
    theirs = config.setup().get_dataparser_outputs("train").cameras.camera_to_worlds[:, :, :3]
    assert (torch.linalg.det(theirs) < 0).sum() == 2  # this capture is one of those
    turned = parse(tmp_path, orientation_method="pca")
    assert torch.linalg.det(turned.cameras.camera_to_worlds[:, :, :3]).min() > 0.99
    assert check_consistency(turned).agreement == pytest.approx(report.agreement, abs=0.02)
    given = np.array([frame["transform_matrix"] for frame in meta["frames"]])[:, :3]
    np.testing.assert_allclose(original_poses(turned), given, atol=1e-5)


def test_a_scale_that_the_capture_was_given(tmp_path: Path) -> None:
    """Regression: nerfstudio multiplies the points by it, which are where the poses are, and not the poses."""
    meta = write_painted(tmp_path)
    report = check_consistency(parse(tmp_path))
    applied = np.array([[0.0, 1.0, 0.0, 0.3], [-1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, -0.5]])
    meta.update(applied_scale=0.25, applied_transform=applied.tolist())
    write_json(tmp_path, meta)
    outputs = parse(tmp_path)
    assert check_consistency(outputs).agreement == pytest.approx(report.agreement, abs=0.02)
    given = np.array([frame["transform_matrix"] for frame in meta["frames"]])[:, :3]
    original = np.linalg.inv(applied[:, :3]) @ given  # x of the file is 0.25 A x
    original[:, :, 3] = (given[:, :, 3] / 0.25 - applied[:, 3]) @ applied[:, :3]
    np.testing.assert_allclose(original_poses(outputs), original, atol=1e-5)


def test_the_demo_scene_fits(tmp_path: Path) -> None:
    config = InfNeRFDemoDataParserConfig(
        num_photos=24, image_width=96, image_height=72, supersampling=2, cache_dir=tmp_path
    )
    report = check_consistency(config.setup().get_dataparser_outputs("train"))
    assert report.seen > 0.9 and report.beyond_chance > 0.3


def test_random_photos_of_the_other_tests_pass(tmp_path: Path) -> None:
    write_capture(tmp_path)
    assert isinstance(check_consistency(parse(tmp_path)), ConsistencyReport)


@pytest.mark.parametrize("name", ["fox", "caliterra", "copr", "lego"])
def test_real_captures_fit(name: str) -> None:
    report = check_consistency(parse(shared_capture(name), eval_mode="interval"))
    assert report.seen > 0.99 and report.agreement > 0.75 and report.by_chance < 0.35 and report.colours > 0.5
