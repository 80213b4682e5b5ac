"""Which way up photos with an EXIF orientation are read, and that every path reads them so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from painted_capture import write_painted
from PIL import ExifTags, Image

from infnerf_ns.data.capture.orientation import decide, turn_by_size
from infnerf_ns.data.capture.photo_files import Header
from infnerf_ns.data.capture.photos import Turn, turn_numbers
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError


def header(orientation: int = 1, size: tuple[int, int] = (40, 30)) -> Header:
    return Header(Path("a.jpg"), *size, "RGB", "8 bit", 3, orientation, 1)


def never(followed: bool) -> float | None:
    raise AssertionError("sizes decide")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_size_of_the_camera_decides(orientation: int) -> None:
    assert turn_by_size(header(orientation), (40, 30)) == Turn(orientation, False)
    assert turn_by_size(header(orientation), (30, 40)) == Turn(orientation, True)
    assert turn_by_size(header(orientation), (31, 40)) == Turn(orientation, True)  # rounded
    assert turn_by_size(header(orientation, (30, 30)), (30, 30)) is None
    for camera, followed in (((40, 30), False), ((30, 40), True)):
        decided, line = decide([header(), header(orientation)], [(40, 30), camera], never)
        assert decided is followed and "1 of 2 photos have an EXIF tag" in line and "size of their cameras" in line


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_where_sizes_do_not_decide(orientation: int) -> None:
    photos, cameras = [header(orientation)] * 3, [(40, 30)] * 3
    assert turn_by_size(photos[0], cameras[0]) is None
    for stored, upright, expected in ((0.2, 0.8, True), (0.8, 0.2, False)):
        followed, line = decide(photos, cameras, {False: stored, True: upright}.get)
        assert followed is expected and "0.80 against 0.20" in line and "yellow" not in line
    for stored, upright, why in ((None, None, "no points"), (0.5, 0.55, "0.50 as stored, 0.55 upright")):
        followed, line = decide(photos, cameras, {False: stored, True: upright}.get)
        assert followed is False and why in line and "nothing says" in line and "read as stored" in line


def test_photos_that_a_size_decides_speak_for_the_others() -> None:
    photos = [header(6), header(3), header()]
    assert decide(photos, [(30, 40), (40, 30), (40, 30)], never)[0] is True
    assert decide(photos, [(40, 30), (40, 30), (40, 30)], never)[0] is False


def test_a_size_that_fits_in_no_way() -> None:
    with pytest.raises(InputError, match=r"a\.jpg has 40 x 30 pixels but its camera 30 x 40: it is turned by 90"):
        turn_by_size(header(), (30, 40))
    with pytest.raises(InputError, match=r"a\.jpg has 40 x 30 pixels but its camera 20 x 15: use the photos"):
        turn_by_size(header(6), (20, 15))


def start(folder: Path, test_mode: Any = "val") -> PyramidDataManager:
    parser = NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval")
    settings = {"train_num_rays_per_batch": 64, "eval_num_rays_per_batch": 64}
    return PyramidDataManagerConfig(data=folder, dataparser=parser, **settings).setup(test_mode=test_mode)


def turn_files(folder: Path, orientation: int, *, poses: str) -> None:
    """Gives photos a tag; for poses of upright photos the pixels are stored so that the tag makes them what they were,
    else the tag is wrong."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    for path in sorted((folder / "images").iterdir()):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        pixels = np.asarray(Image.open(path))
        if poses == "upright":
            pixels = turn_numbers(pixels, inverse)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)


@pytest.mark.parametrize("poses", ["upright", "stored"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 6, 8])
def test_every_path_reads_a_capture_alike(
    tmp_path: Path, orientation: int, poses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_painted(tmp_path)
    expected = [np.array(Image.open(path)) for path in sorted((tmp_path / "images").iterdir())]
    turn_files(tmp_path, orientation, poses=poses)
    for test_mode in ("val", "test", "inference"):
        capsys.readouterr()
        manager = start(tmp_path, test_mode)
        said = " ".join(re.sub(r"\S+\.py:\d+", "", capsys.readouterr().out).split())
        if test_mode != "inference":
            assert f"read {'upright' if poses == 'upright' else 'as stored'}" in said and "nothing says" not in said
        for dataset in (manager.train_dataset, manager.eval_dataset):
            for index, path in enumerate(dataset.image_filenames):
                found = dataset.get_image_uint8(index).numpy()
                np.testing.assert_array_equal(found, expected[int(path.stem)])
    manager = start(tmp_path, "test")
    held_out = [int(path.stem) for path in manager.eval_dataset.image_filenames]
    _, batch = manager.next_eval(0)
    for colour, (photo, row, column) in zip(batch["image"], batch["indices"].tolist()):
        np.testing.assert_allclose(colour * 255, expected[held_out[photo]][row, column], atol=1e-3)
    loader = FixedIndicesEvalDataloader(input_dataset=start(tmp_path, "test").eval_dataset)  # ns-eval, ns-render
    np.testing.assert_allclose(next(iter(loader))[1]["image"] * 255, expected[0], atol=1e-3)


def test_without_points_the_pixels_are_read_as_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_painted(tmp_path)
    expected = np.array(Image.open(tmp_path / "images/000.png"))
    turn_files(tmp_path, 3, poses="stored")
    (tmp_path / "points.ply").unlink()
    manager = start(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "16 of 16 photos" not in said and "14 of 14 photos have an EXIF tag that turns them (180 degrees)" in said
    assert "there are no points to compare at" in said and "read as stored" in said
    np.testing.assert_array_equal(manager.eval_dataset.get_image_uint8(0), expected)
