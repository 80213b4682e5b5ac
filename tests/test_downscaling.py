"""Smaller copies of photos: without a shell, whole or not at all, in the kind of each photo."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from infnerf_ns.data.capture import downscaling
from infnerf_ns.data.capture.downscaling import downscale_images
from infnerf_ns.errors import InputError


def copies(folder: Path, factor: int = 2, nearest: bool = False, rounding: str = "floor") -> Path:
    """Downscales all of ``folder/images`` as nerfstudio asks for it; returns the folder of the copies."""
    images, small = folder / "images", folder / f"images_{factor}"
    paths = sorted(path for path in images.rglob("*") if path.is_file())
    downscale_images(paths, lambda path: small / path.relative_to(images), factor, rounding, nearest)
    return small


def photo(folder: Path, name: str, values: np.ndarray, **options: object) -> Path:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def blocks(values: list[list[int]], dtype: type = np.uint8) -> np.ndarray:
    """Each value as a block of 2 x 2 pixels that are off by -10, +10, -10 and +10 from it."""
    off = np.tile([[-10, 10], [10, -10]], np.shape(values))
    return (np.kron(np.array(values), np.ones((2, 2))) + off).astype(dtype)


def test_a_name_runs_no_command(tmp_path: Path) -> None:
    names = ["$(touch gotcha).png", "`touch gotcha`.png", 'a";touch gotcha;".png', "-y.png", "a b'.png"]
    for name in names:
        photo(tmp_path, name, blocks([[100]]))
    small = copies(tmp_path)
    assert sorted(path.name for path in small.iterdir()) == sorted(names)
    assert not list(Path.cwd().glob("gotcha")) and not list(tmp_path.rglob("gotcha"))


@pytest.mark.parametrize("rounding, size", [("floor", (3, 2)), ("round", (4, 2)), ("ceil", (4, 3))])
def test_sizes_are_those_that_nerfstudio_computes(tmp_path: Path, rounding: str, size: tuple[int, int]) -> None:
    photo(tmp_path, "a.png", np.zeros((5, 7, 3), dtype=np.uint8))  # 3.5 x 2.5: Python rounds halves to even
    with Image.open(copies(tmp_path, rounding=rounding) / "a.png") as small:
        assert small.size == size


GREY = [[20, 100], [150, 200]]
KINDS = {
    "L": blocks(GREY),
    "RGB": np.stack([blocks(GREY), 255 - blocks(GREY), blocks(GREY)[::-1]], axis=-1),
    "I;16": blocks(GREY, np.uint16) * 200,
    "F": blocks(GREY, np.float32) / 7,
}


@pytest.mark.parametrize("mode", KINDS)
def test_a_pixel_is_the_mean_of_its_area(tmp_path: Path, mode: str) -> None:
    values = KINDS[mode]
    photo(tmp_path, "a.tif", values)
    with Image.open(copies(tmp_path) / "a.tif") as small:
        assert small.mode == mode
        means = values.reshape(2, 2, 2, 2, -1).astype(float).mean(axis=(1, 3)).reshape(2, 2, *values.shape[2:])
        np.testing.assert_allclose(np.asarray(small), means, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_them(tmp_path: Path, channels: int) -> None:
    values = np.full((4, 6, channels), 65535, dtype=np.uint16)
    values[..., 0], values[..., 1] = 30001, 515
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), values)
    small = cv2.imread(str(copies(tmp_path) / "a.png"), cv2.IMREAD_UNCHANGED)
    assert small.dtype == np.uint16 and small.shape == (2, 3, channels)
    np.testing.assert_allclose(small, values[:2, :3], atol=1)


def test_colours_that_are_not_seen_do_not_count(tmp_path: Path) -> None:
    values = np.array([[[200, 10, 10, 255], [0, 255, 0, 0]], [[200, 10, 10, 255], [0, 255, 0, 0]]], dtype=np.uint8)
    photo(tmp_path, "a.png", values)
    with Image.open(copies(tmp_path) / "a.png") as small:
        assert np.asarray(small).tolist() == [[[200, 10, 10, 128]]]


def test_black_of_cmyk_is_no_alpha(tmp_path: Path) -> None:
    path = tmp_path / "images" / "a.tif"
    path.parent.mkdir()
    values = np.array([[[0, 0, 0, 0], [200, 100, 40, 200]]] * 2, dtype=np.uint8)
    Image.frombytes("CMYK", (2, 2), values.tobytes()).save(path)
    with Image.open(copies(tmp_path) / "a.tif") as small:
        assert small.mode == "CMYK" and np.asarray(small).tolist() == [[[100, 50, 20, 100]]]


def test_masks_take_the_pixel_in_the_middle(tmp_path: Path) -> None:
    labels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    photo(tmp_path, "a.png", labels)
    np.save(tmp_path / "images" / "b.npy", labels[..., None].astype(np.float32))
    small = copies(tmp_path, factor=3, nearest=True)
    with Image.open(small / "a.png") as mask:
        assert np.asarray(mask).tolist() == [[7, 10], [25, 28]]
    assert np.load(small / "b.npy")[..., 0].tolist() == [[7, 10], [25, 28]]


def test_orientation_is_neither_applied_nor_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    photo(tmp_path, "a.jpg", np.zeros((4, 8, 3), dtype=np.uint8), exif=exif)
    with Image.open(copies(tmp_path) / "a.jpg") as small:
        assert small.size == (4, 2) and 0x0112 not in small.getexif()


def test_the_folder_appears_when_all_photos_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "cam/b.png", "c.png"):
        photo(tmp_path, name, blocks([[100]]))
    seen = []
    work = downscaling._downscale

    def watched(path: Path, *arguments: object) -> None:
        seen.append((tmp_path / "images_2").exists())
        work(path, *arguments)
        if interrupted and path.name == "c.png":
            raise KeyboardInterrupt

    monkeypatch.setattr(downscaling, "_downscale", watched)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        copies(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    interrupted = False
    small = copies(tmp_path)
    assert len(seen) == 5 and not any(seen)
    assert sorted(str(path.relative_to(small)) for path in small.rglob("*.png")) == ["a.png", "c.png", "cam/b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "images_2"]


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path: Path) -> None:
    photo(tmp_path, "a.png", blocks([[100]]))
    photo(tmp_path, "cam/b.png", blocks([[100]]))
    (tmp_path / "images_2").mkdir()
    (tmp_path / "images_2" / "a.png").write_bytes(b"half")
    (tmp_path / "images_2" / "mine.txt").write_text("kept")
    small = copies(tmp_path)
    with Image.open(small / "a.png") as whole:
        assert np.asarray(whole).tolist() == [[100]]
    assert (small / "mine.txt").read_text() == "kept" and (small / "cam" / "b.png").is_file()


def test_drafts_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path, "a.png", blocks([[100]]))
    monkeypatch.setattr(downscaling.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(downscaling, "_runs", lambda process: process == 12)
    for name in (".images_2-here-11.draft", ".images_2-here-12.draft", ".images_2-there-11.draft"):
        (tmp_path / name).mkdir()
    copies(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".images_2-here-12.draft", ".images_2-there-11.draft", "images", "images_2"]


def test_an_unreadable_photo_is_named(tmp_path: Path) -> None:
    photo(tmp_path, "a.png", blocks([[100]]))
    broken = tmp_path / "images" / "b.png"
    broken.write_bytes((tmp_path / "images" / "a.png").read_bytes()[:-30])
    with pytest.raises(InputError, match="b.png cannot be downscaled"):
        copies(tmp_path)
    assert not (tmp_path / "images_2").exists()


def test_only_whole_factors_from_2(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="downscaled by 1: allowed is"):
        downscale_images([], lambda path: path, 1)
