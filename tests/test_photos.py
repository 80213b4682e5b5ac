"""Photos, masks and depth images from files: the right values for every mode that Pillow has, or one line."""

from __future__ import annotations

import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import ExifTags, Image, ImageCms, ImageMode, ImageOps, TiffImagePlugin
from tiny_capture import HEIGHT, WIDTH, write_capture, write_json

from infnerf_ns.data.capture.photo_files import Header, check_first_photo, read_header
from infnerf_ns.data.capture.photos import (
    AS_STORED,
    Levels,
    Turn,
    capture_levels,
    companion_turn,
    read_mask,
    read_numbers,
    read_photo,
    read_thumbnail,
    turn_numbers,
)
from infnerf_ns.data.depth import read_depth
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError

SIZE = (WIDTH, HEIGHT)


def smooth(seed: int = 0) -> np.ndarray:
    """A photo [HEIGHT, WIDTH, 3] that JPEG hardly changes and in which no turn looks like another; black and white
    occur."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.float32)
    pixels = cv2.resize(small, SIZE, interpolation=cv2.INTER_LINEAR).clip(0, 255).astype(np.uint8)
    pixels[:2, :2], pixels[2:4, :2] = 0, 255
    return pixels


def grey(seed: int = 0) -> np.ndarray:
    return np.array(Image.fromarray(smooth(seed)).convert("L"))


def refusal(what: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        what()
    message = str(caught.value)
    assert "\n" not in message and message.startswith("infnerf: ")
    return message.removeprefix("infnerf: ")


def as_colour(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


def _with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(ALPHA))
    return image


def _palette_alpha() -> Image.Image:
    image = Image.fromarray(smooth()).quantize(200)
    image.putalpha(Image.fromarray(ALPHA))
    assert image.mode == "PA"
    return image


def _lab() -> Image.Image:
    return ImageCms.profileToProfile(
        Image.fromarray(smooth()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def _rgb() -> Image.Image:
    return Image.fromarray(smooth())


def _save_im(image: Image.Image, path: Path) -> None:
    image.save(path, format="IM")  # Pillow's own format takes (nearly) every mode


MODES: dict[str, tuple[Callable[[], Image.Image], str, Callable[[], np.ndarray], int]] = {
    # mode: image, suffix, expected pixels, tolerance
    "1": (lambda: Image.fromarray(grey() > 99), ".png", lambda: as_colour(np.uint8(255) * (grey() > 99)), 0),
    "L": (lambda: Image.fromarray(grey()), ".png", lambda: as_colour(grey()), 0),
    "LA": (
        lambda: _with_alpha(Image.fromarray(grey())),
        ".png",
        lambda: np.dstack([as_colour(grey()), ALPHA]),
        0,
    ),
    "P": (
        lambda: _rgb().quantize(200),
        ".png",
        lambda: np.array(_rgb().quantize(200).convert("RGB")),
        0,
    ),
    "PA": (
        _palette_alpha,
        ".im",
        lambda: np.dstack([np.array(_rgb().quantize(200).convert("RGB")), ALPHA]),
        0,
    ),
    "RGB": (_rgb, ".png", smooth, 0),
    "RGBA": (lambda: _with_alpha(_rgb()), ".png", lambda: np.dstack([smooth(), ALPHA]), 0),
    "CMYK": (lambda: _rgb().convert("CMYK"), ".tif", smooth, 0),
    "YCbCr": (lambda: _rgb().convert("YCbCr"), ".im", smooth, 3),
    "LAB": (_lab, ".tif", smooth, 20),  # 8 bits of Lab are coarse at the corners of sRGB
    "I": (lambda: Image.fromarray(grey().astype(np.int32) * 257), ".tif", lambda: as_colour(grey()), 0),
    "I;16": (lambda: Image.fromarray(grey().astype(np.uint16) * 257), ".png", lambda: as_colour(grey()), 0),
    "I;16B": (
        lambda: Image.fromarray((grey().astype(np.uint16) * 257).astype(">u2")),
        ".tif",
        lambda: as_colour(grey()),
        0,
    ),
    "I;16L": (
        lambda: Image.frombytes("I;16L", SIZE, (grey().astype("<u2") * 257).tobytes()),
        ".im",
        lambda: as_colour(grey()),
        0,
    ),
    "F": (lambda: Image.fromarray(grey().astype(np.float32) / 255), ".tif", lambda: as_colour(grey()), 0),
}
NO_FILES = {"La", "RGBa", "RGBX", "HSV"}
"""Modes that no file format of Pillow opens as; their pixels are tried through a stand-in for one."""


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_the_right_values(tmp_path: Path, mode: str) -> None:
    make, suffix, expected, tolerance = MODES[mode]
    path = tmp_path / f"photo{suffix}"
    make().save(path) if suffix != ".im" else _save_im(make(), path)
    with Image.open(path) as image:
        assert image.mode == mode
    pixels = read_photo(path)
    assert pixels.dtype == np.uint8 and pixels.shape == expected().shape
    assert pixels.shape[2] == read_header(path, "photo").channels
    apart = np.abs(pixels.astype(int) - expected().astype(int))
    assert apart.max() <= tolerance and apart.mean() < 2


@pytest.mark.parametrize("mode", sorted(NO_FILES))
def test_modes_that_only_plugins_open(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"La": _with_alpha(Image.fromarray(grey())), "RGBa": _with_alpha(_rgb())}.get(mode, _rgb())
    path = tmp_path / "photo.png"
    _rgb().save(path)
    monkeypatch.setattr(Image, "open", lambda _: source.convert(mode))
    expected = np.array(source.convert(mode).convert("LA" if mode == "La" else "RGBA" if mode == "RGBa" else "RGB"))
    if mode == "La":
        expected = np.dstack([as_colour(expected[..., 0]), expected[..., 1]])
    np.testing.assert_array_equal(read_photo(path), expected)


def test_no_mode_of_pillow_is_forgotten() -> None:
    """A newer Pillow with more modes shows here."""
    core = {"1", "L", "I", "F", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "RGBa", "LA", "La", "PA"}
    assert core <= MODES.keys() | NO_FILES
    opened = {mode for mode, *_ in TiffImagePlugin.OPEN_INFO.values()}
    assert opened <= MODES.keys() | NO_FILES | {"I;16N"}, opened - MODES.keys()
    assert ImageMode.getmode("I;16").typestr == "<u2"


def test_a_mode_without_a_way_to_rgb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.png"
    _rgb().save(path)

    class Odd:
        mode, size, info, format, tile = "BGR;15", SIZE, {}, "ODD", ()
        getexif = dict
        load = __enter__ = lambda self: self
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(Image, "open", lambda _: Odd())
    assert "its colours are of the kind BGR;15, which has no way to RGB" in refusal(lambda: read_photo(path))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_ordinary_photos_are_what_pillow_decodes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(smooth()).save(path)
    np.testing.assert_array_equal(read_photo(path), np.array(Image.open(path)))
    half = Image.open(path).resize((WIDTH // 2, HEIGHT // 2), resample=Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read_photo(path, scale=0.5), np.array(half))


def test_cmyk_jpeg_of_adobe(tmp_path: Path) -> None:
    """Photoshop stores CMYK inverted; Pillow reads and writes it so."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(smooth()).convert("CMYK").save(path, quality=100, subsampling=0)
    assert b"Adobe" in path.read_bytes()[:400]
    assert np.abs(read_photo(path).astype(int) - smooth()).mean() < 3


def test_colour_keys_are_transparent(tmp_path: Path) -> None:
    pixels = smooth()
    for mode, key in (("RGB", (0, 0, 0)), ("L", 0)):
        Image.fromarray(pixels).convert(mode).save(tmp_path / "photo.png", transparency=key)
        found = read_photo(tmp_path / "photo.png")
        assert read_header(tmp_path / "photo.png", "photo").channels == found.shape[2] == 4
        assert found[0, 0, 3] == 0 and found[3, 0].tolist() == [255] * 4


def _png(path: Path, numbers: np.ndarray, kind: int) -> None:
    """A PNG with 16 bits per channel, which Pillow does not write."""
    height, width = numbers.shape[:2]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in numbers)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def _tiff(path: Path, numbers: np.ndarray, orientation: int) -> None:
    """A TIFF with 16 bits per channel, which Pillow does not write."""
    height, width, _ = numbers.shape
    data = numbers.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 8), (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data) + 6)
    path.write_bytes(header + data + struct.pack("<HHH", 16, 16, 16) + directory)


def test_16_bit_colour_by_the_range_of_the_type(tmp_path: Path) -> None:
    colours = smooth().astype(np.uint16) * 257
    _png(tmp_path / "rgb.png", colours, 2)
    _png(tmp_path / "rgba.png", np.dstack([colours, ALPHA.astype(np.uint16) * 257]), 6)
    _png(tmp_path / "la.png", np.dstack([grey(), ALPHA]).astype(np.uint16) * 257, 4)
    headers = [read_header(tmp_path / name, "photo") for name in ("rgb.png", "rgba.png", "la.png")]
    assert {header.depth for header in headers} == {"16 bit colour"}
    for levels in ({}, capture_levels(headers[:1])):
        np.testing.assert_array_equal(read_photo(headers[0].path, levels=levels), smooth())
        np.testing.assert_array_equal(read_photo(headers[1].path, levels=levels), np.dstack([smooth(), ALPHA]))
        np.testing.assert_array_equal(read_photo(headers[2].path, levels=levels), np.dstack([as_colour(grey()), ALPHA]))


@pytest.mark.parametrize("how", ["png", "tif"])
def test_14_bit_colour_uses_the_range_of_the_capture(tmp_path: Path, how: str) -> None:
    path = tmp_path / f"photo.{how}"
    numbers = smooth().astype(np.uint16) * 64 + 63
    _png(path, numbers, 2) if how == "png" else cv2.imwrite(str(path), numbers[..., ::-1])
    levels = capture_levels([read_header(path, "photo")])
    assert levels["16 bit colour"] == Levels(63.0, 255 * 64 + 63)
    np.testing.assert_array_equal(read_photo(path, levels=levels), smooth())


@pytest.mark.parametrize(
    ("kind", "scale", "offset", "suffix"),
    [
        ("16 bit", 8.13, 7000, ".png"),  # thermal
        ("16 bit", 64.2, 0, ".tif"),  # 14 bits
        ("16 bit", 5.0, 40000, ".png"),  # in the upper half, of little contrast
        ("float", 0.04, 293.0, ".tif"),  # kelvin
        ("float", 1.0, 0, ".tif"),  # 0..255
        ("float", 0.02, -3.0, ".tif"),
        ("integer", 1000.0, 0, ".tif"),
    ],
)
def test_levels_of_a_capture(tmp_path: Path, kind: str, scale: float, offset: float, suffix: str) -> None:
    """One black and one white for all photos, although the photos have ranges of their own."""
    dtype = {"16 bit": np.uint16, "float": np.float32, "integer": np.int32}[kind]
    photos = [grey(seed) for seed in range(3)]
    photos[1] = photos[1] // 2 + 20
    headers = []
    for index, photo in enumerate(photos):
        path = tmp_path / f"{index}{suffix}"
        Image.fromarray((offset + photo * scale).astype(dtype)).save(path)
        headers.append(read_header(path, "photo"))
    assert {header.depth for header in headers} == {kind}
    levels = capture_levels(headers)
    for header, photo in zip(headers, photos):
        assert np.abs(read_photo(header.path, levels=levels)[..., 0].astype(int) - photo).max() <= 1


def test_levels_of_the_type_and_hot_pixels(tmp_path: Path) -> None:
    full = grey().astype(np.uint16) * 200  # underexposed, still a photo of 16 bits
    Image.fromarray(full).save(tmp_path / "full.png")
    assert capture_levels([read_header(tmp_path / "full.png", "photo")]) == {"16 bit": Levels(0.0, 65535.0)}
    hot = np.random.default_rng(0).integers(1000, 3000, (400, 500)).astype(np.uint16)
    hot[10, 10] = 65535
    Image.fromarray(hot).save(tmp_path / "hot.png")
    level = capture_levels([read_header(tmp_path / "hot.png", "photo")])["16 bit"]
    assert 1000 <= level.black < 1010 and 2990 < level.white < 3010
    Image.fromarray(np.full((4, 4), 7, np.uint16)).save(tmp_path / "flat.png")
    assert capture_levels([read_header(tmp_path / "flat.png", "photo")]) == {"16 bit": Levels(0.0, 65535.0)}
    dark = np.float32(grey()) / 255 * 0.6  # floats in 0..1
    Image.fromarray(dark).save(tmp_path / "unit.tif")
    assert capture_levels([read_header(tmp_path / "unit.tif", "photo")]) == {"float": Levels(0.0, 1.0)}


def test_nan_is_refused(tmp_path: Path) -> None:
    numbers = np.float32(grey())
    numbers[3, 4] = numbers[5, 6] = np.nan
    Image.fromarray(numbers).save(tmp_path / "photo.tif")
    message = refusal(lambda: read_photo(tmp_path / "photo.tif"))
    assert "photo.tif holds NaN or infinity in 2 of 768 pixels: replace them" in message


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_the_first_of_several_pictures_counts(tmp_path: Path, suffix: str) -> None:
    first, second = Image.fromarray(smooth()), Image.fromarray(smooth(1))
    path = tmp_path / f"photo{suffix}"
    options = {".webp": {"lossless": True}, ".png": {"default_image": False}}.get(suffix, {})
    first.save(path, save_all=True, append_images=[second], **options)
    assert read_header(path, "photo").frames == 2
    expected = np.array(Image.open(path).convert("RGB"))
    assert np.abs(read_photo(path)[..., :3].astype(int) - expected).max() == 0
    assert np.abs(expected.astype(int) - smooth()).mean() < 4 < np.abs(expected.astype(int) - smooth(1)).mean()


def test_thumbnails(tmp_path: Path) -> None:
    large = cv2.resize(smooth(), (320, 240), interpolation=cv2.INTER_LINEAR)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("photo.jpg", "photo.png"):
        Image.fromarray(large).save(tmp_path / name, exif=exif)
        small = read_thumbnail(tmp_path / name, 32)
        assert small.shape == (HEIGHT, WIDTH, 3) and np.abs(small.astype(int) - smooth()).mean() < 6
        np.testing.assert_array_equal(read_thumbnail(tmp_path / name, 32, upright=True), np.rot90(small, -1))


# what is no photo


def test_files_that_are_none(tmp_path: Path) -> None:
    """A pipe would be waited for, for ever."""
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    lines = {
        "folder.jpg": ": it is a folder, not a file",
        "pipe.jpg": ": it is a named pipe (FIFO), not a file",
        "device.jpg": ": it is a device, not a file",
        "empty.jpg": " cannot be read (it is empty, 0 bytes)",
        "none.jpg": " does not exist",
    }
    for read in (read_photo, read_numbers, lambda path: read_mask(path, SIZE, AS_STORED)):
        for name, line in lines.items():
            assert f"{name}{line}" in refusal(partial(read, tmp_path / name))
    os.rename(tmp_path / "pipe.jpg", tmp_path / "pipe.npy")
    assert "pipe.npy: it is a named pipe" in refusal(lambda: read_depth(tmp_path / "pipe.npy", 2, 2))
    assert "pipe.npy: it is a named pipe" in refusal(lambda: check_first_photo(tmp_path / "pipe.npy"))


def test_a_pipe_in_a_capture_does_not_hang(tmp_path: Path) -> None:
    write_capture(tmp_path)
    for index in (0, 3):
        path = tmp_path / f"images/{index:03d}.png"
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert f"{index:03d}.png: it is a named pipe" in refusal(lambda: start(tmp_path))
        path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("start", "name", "package"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC", "pillow-heif"),
        (b"\0\0\0\x24ftypmsf1\0\0\0\0hevcheic" + bytes(40), "HEIC", "pillow-heif"),
        (b"\xff\x0a" + bytes(40), "JPEG XL", "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL", "pillow-jxl-plugin"),
    ],
)
def test_formats_that_need_a_package(tmp_path: Path, start: bytes, name: str, package: str) -> None:
    path = tmp_path / "photo.jpg"  # phones that share HEIC under another name
    path.write_bytes(start)
    assert f"photo.jpg is {name}, which Pillow reads with the package {package}: pip install {package}" in refusal(
        lambda: read_photo(path)
    )


def test_heic_is_read_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow-heif, which registers a format as it does."""
    write_capture(tmp_path)
    plugin = ModuleType("pillow_heif")
    real = Image.open

    def register_heif_opener() -> None:
        monkeypatch.setattr(
            Image,
            "open",
            lambda path: real(str(path).replace(".heic", ".png") if str(path).endswith(".heic") else path),
        )

    plugin.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    meta = write_capture(tmp_path / "capture")
    for frame in meta["frames"]:
        frame["file_path"] = frame["file_path"].replace(".png", ".heic")
        (tmp_path / "capture" / frame["file_path"]).write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(40))
    write_json(tmp_path / "capture", meta)
    assert len(start(tmp_path / "capture").train_dataset) == 7


@pytest.mark.parametrize("suffix", ["dng", "CR2", "nef", "ARW"])
def test_raw_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(smooth()).save(path, format="TIFF")  # the preview, which Pillow would take
    assert f"photo.{suffix} is a raw file of a camera, which must be developed first" in refusal(
        lambda: read_photo(path)
    )


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(smooth()).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = refusal(lambda: read_header(tmp_path / "photo.png", "photo"))
    assert re.search("photo.png has more than 0 million pixels, the most that Pillow opens: scale", message)


def test_floats_in_colour(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "photo.tif"), smooth().astype(np.float32))
    assert "numbers that Pillow has no mode for: save 8 or 16 bits" in refusal(
        lambda: read_photo(tmp_path / "photo.tif")
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".gif"])
def test_damaged_files_end_in_one_line(tmp_path: Path, suffix: str) -> None:
    """60 mutations per format: pixels or the line, nothing else."""
    path, random = tmp_path / f"photo{suffix}", np.random.default_rng(3)
    Image.fromarray(smooth()).save(path)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(60):
        damaged = content.copy()
        damaged[random.integers(0, len(damaged), 8)] = random.integers(0, 256, 8)
        path.write_bytes(damaged[: random.integers(20, len(damaged) + 1)].tobytes())
        try:
            assert read_photo(path).dtype == np.uint8
        except InputError as error:
            assert "photo" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 10


# masks


def _keep() -> np.ndarray:
    """Where the masks below are set."""
    keep = np.zeros((HEIGHT, WIDTH), bool)
    keep[5:, 3:20] = True
    return keep


def _mask_images() -> dict[str, Image.Image]:
    keep = _keep()
    white = Image.fromarray(np.where(keep, np.uint8(255), np.uint8(0)))
    palette = Image.fromarray(np.where(keep, np.uint8(0), np.uint8(1)), mode="P")  # index 0 is white
    palette.putpalette([255, 255, 255, 0, 0, 0])
    labels = Image.fromarray(np.where(keep, np.uint8(3), np.uint8(0)), mode="P")
    labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    cut_out = Image.fromarray(as_colour(np.full_like(ALPHA, 255)))
    cut_out.putalpha(white)
    return {
        "1": white.convert("1"),
        "L": white,
        "LA": white.convert("LA"),
        "small numbers": Image.fromarray(np.where(keep, np.uint8(1), np.uint8(0))),
        "palette": palette,
        "labels": labels,
        "RGB": white.convert("RGB"),
        "RGBA": white.convert("RGBA"),
        "alpha": cut_out,
        "CMYK": white.convert("CMYK"),
        "16 bit": Image.fromarray(np.where(keep, np.uint16(300), np.uint16(0))),
        "integer": Image.fromarray(np.where(keep, np.int32(70000), np.int32(0))),
        "float": Image.fromarray(np.where(keep, np.float32(0.1), np.float32(np.nan))),
    }


@pytest.mark.parametrize("kind", _mask_images())
def test_masks_of_every_mode(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("mask.tif" if kind in ("CMYK", "integer", "float") else "mask.png")
    _mask_images()[kind].save(path)
    np.testing.assert_array_equal(read_mask(path, SIZE, AS_STORED), _keep())
    np.testing.assert_array_equal(read_mask(path, SIZE, AS_STORED, 0.5), _keep()[1::2, 1::2])


@pytest.mark.parametrize("white", [255, 1])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_mask_in_a_jpeg_is_split_at_half(white: int, mode: str, tmp_path: Path) -> None:
    """Regression: next to white, its black is not quite black, and the pixels there counted."""
    mask = np.zeros((72, 96), np.uint8)
    mask[:35, :50] = white
    Image.fromarray(mask).convert(mode).save(tmp_path / "mask.jpg", quality=75 if white > 1 else 100)
    with Image.open(tmp_path / "mask.jpg") as stored:
        assert white == 1 or ((np.asarray(stored.convert("L")) > 0) != (mask > 0)).sum() > 20
    keep = read_mask(tmp_path / "mask.jpg", (96, 72), AS_STORED)
    assert (keep != (mask > 0)).mean() < (0.002 if white > 1 else 0.05)


def test_masks_in_colour_are_refused(tmp_path: Path) -> None:
    Image.fromarray(smooth()).save(tmp_path / "mask.png")
    message = refusal(lambda: read_mask(tmp_path / "mask.png", SIZE, AS_STORED))
    assert "mask.png has 3 channels: save it with one, 0 = ignore the pixel" in message


# EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_stored_and_upright_pixels(tmp_path: Path, orientation: int, suffix: str) -> None:
    """As Pillow turns them itself; stored is the order in the file, also of TIFF, which Pillow turns unasked."""
    path, exif = tmp_path / f"photo{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(smooth()).save(path, exif=exif, **options)
    header = read_header(path, "photo")
    assert header.orientation == orientation and header.stored_size == SIZE
    stored, upright = read_photo(path), read_photo(path, upright=True)
    assert np.abs(stored.astype(int) - smooth()).max() <= (6 if suffix == ".jpg" else 0)
    assert upright.shape[1::-1] == header.upright_size == (SIZE if orientation < 5 else SIZE[::-1])
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(upright, expected)
    np.testing.assert_array_equal(turn_numbers(stored, orientation), expected)


def test_16_bit_colour_is_turned_once(tmp_path: Path) -> None:
    """OpenCV, which reads it, turns TIFF files by itself, too."""
    numbers = smooth().astype(np.uint16) * 64 + 63
    path = tmp_path / "photo.tif"
    levels = {"16 bit colour": Levels(63.0, 255 * 64 + 63)}
    for orientation in range(1, 9):
        _tiff(path, numbers, orientation)
        assert read_header(path, "photo").depth == "16 bit colour"
        np.testing.assert_array_equal(read_photo(path, levels=levels), smooth())
        np.testing.assert_array_equal(
            read_photo(path, levels=levels, upright=True), turn_numbers(smooth(), orientation)
        )


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_and_depths_lie_on_their_photo(tmp_path: Path, orientation: int) -> None:
    """The photo is turned by its tag, or is not; a mask is stored as the photo was, with or without the tag, or is
    upright already."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.where(_keep(), np.uint8(255), np.uint8(0))
    upright = np.ascontiguousarray(turn_numbers(stored, orientation))
    Image.fromarray(stored).save(tmp_path / "tagged.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "stored.png")
    Image.fromarray(upright).save(tmp_path / "upright.png")
    followed, ignored = Turn(orientation, True), Turn(orientation, False)
    turned_size = upright.shape[1::-1]
    for name, turn, size, expected in (
        ("tagged.png", followed, turned_size, upright),
        ("upright.png", followed, turned_size, upright),
        ("tagged.png", ignored, SIZE, stored),
        ("stored.png", ignored, SIZE, stored),
    ):
        np.testing.assert_array_equal(read_mask(tmp_path / name, size, turn), expected > 0)
        np.testing.assert_array_equal(read_depth(tmp_path / name, *size[::-1], turn), np.float32(expected))
    if orientation != 3:  # sizes say more than a missing tag
        np.testing.assert_array_equal(read_mask(tmp_path / "stored.png", turned_size, followed), upright > 0)
        np.testing.assert_array_equal(read_mask(tmp_path / "upright.png", SIZE, ignored), stored > 0)
        np.save(tmp_path / "depth.npy", stored)
        np.testing.assert_array_equal(
            read_depth(tmp_path / "depth.npy", *turned_size[::-1], followed), np.float32(upright)
        )
    assert companion_turn((7, 5), 1, followed, SIZE.__eq__) is None
    message = refusal(lambda: read_mask(tmp_path / "stored.png", (7, 5), AS_STORED))
    assert "stored.png has 32 x 24 pixels but its photo 7 x 5" in message


# whole captures


def start(folder: Path, **settings: Any) -> PyramidDataManager:
    parser = NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval")
    return PyramidDataManagerConfig(data=folder, dataparser=parser, train_num_rays_per_batch=64, **settings).setup()


def capture(folder: Path, save: Callable[[np.ndarray, Path], None], suffix: str) -> PyramidDataManager:
    """A tiny capture whose photos are saved in some way."""
    meta = write_capture(folder)
    for index, frame in enumerate(meta["frames"]):
        frame["file_path"] = f"images/photo{index:03d}{suffix}"
        save(smooth(index), folder / frame["file_path"])
    write_json(folder, meta)
    return start(folder)


def pixels(manager: PyramidDataManager) -> np.ndarray:
    """What is trained and what is evaluated, [8, H, W, 3 or 4]."""
    datasets = (manager.train_dataset, manager.eval_dataset)
    images = [dataset.get_data(i)["image"].numpy() * 255 for dataset in datasets for i in range(len(dataset))]
    _, batch = manager.next_train(0)
    for colour, (photo, row, column), level in zip(batch["image"], batch["indices"].tolist(), batch["pyramid_level"]):
        if level == 0:
            np.testing.assert_allclose(colour * 255, images[photo][row, column], atol=1e-3)
    return np.stack(images)


def _grey16(image: np.ndarray, path: Path) -> None:
    Image.fromarray((7000 + np.array(Image.fromarray(image).convert("L")) * 8.13).astype(np.uint16)).save(path)


def _grey(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).convert("L").save(path)


def _turned(orientation: int, turn: Image.Transpose) -> Callable[[np.ndarray, Path], None]:
    def save(image: np.ndarray, path: Path) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(image).transpose(turn).save(path, exif=exif)

    return save


@pytest.mark.parametrize(
    ("save", "suffix", "ordinary", "tolerance"),
    [
        (lambda image, path: Image.fromarray(image).convert("CMYK").save(path), ".tif", None, 0),
        (lambda image, path: _png(path, image.astype(np.uint16) * 257, 2), ".png", None, 0),
        (_turned(6, Image.Transpose.ROTATE_90), ".png", None, 0),
        (_turned(8, Image.Transpose.ROTATE_270), ".tif", None, 0),
        (_grey16, ".png", _grey, 1),
        (
            lambda image, path: Image.fromarray(np.float32(Image.fromarray(image).convert("L")) / 255).save(path),
            ".tif",
            _grey,
            0,
        ),
        (lambda image, path: Image.fromarray(image).convert("LA").save(path), ".png", _grey, 0),
    ],
    ids=["cmyk", "rgb16", "exif6", "exif8 tiff", "grey16", "float", "grey alpha"],
)
def test_a_capture_in_another_format_is_the_same(
    tmp_path: Path,
    save: Callable[[np.ndarray, Path], None],
    suffix: str,
    ordinary: Callable[[np.ndarray, Path], None] | None,
    tolerance: int,
) -> None:
    plain = ordinary or (lambda image, path: Image.fromarray(image).save(path))
    expected = pixels(capture(tmp_path / "plain", plain, ".png"))
    found = pixels(capture(tmp_path / "other", save, suffix))
    assert found.shape[:3] == expected.shape[:3] == (8, HEIGHT, WIDTH)
    assert np.abs(found[..., :3] - expected).max() <= tolerance + 1e-3
    if found.shape[3] == 4:
        assert (found[..., 3] == 255).all()


def test_held_out_photos_get_the_levels_of_the_train_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photo 0 is held out and darker than all others."""

    def save(image: np.ndarray, path: Path) -> None:
        numbers = 5000 + 10.0 * np.array(Image.fromarray(image).convert("L"))
        Image.fromarray((numbers / (2 if path.stem.endswith("000") else 1)).astype(np.uint16)).save(path)

    manager = capture(tmp_path, save, ".png")
    said = " ".join(capsys.readouterr().out.split())
    assert "photos of 16 bit numbers: 5000 becomes black and 7550 white, in all photos" in said
    assert pixels(manager)[-1].max() == 0


def test_masks_in_a_capture(tmp_path: Path) -> None:
    """A palette whose first colour is white, which nerfstudio takes for 0: the same draws as with a grey mask."""
    meta = write_capture(tmp_path, masks=True)
    grey_masks = start(tmp_path)
    expected = [grey_masks.train_dataset.get_data(i)["mask"].numpy() for i in range(7)]
    for frame in meta["frames"]:
        mask = np.array(Image.open(tmp_path / frame["mask_path"]))
        image = Image.fromarray(np.where(mask > 0, np.uint8(0), np.uint8(1)), mode="P")
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(tmp_path / frame["mask_path"])
    manager = start(tmp_path)
    for index in range(7):
        found = manager.train_dataset.get_data(index)["mask"].numpy()
        assert found.dtype == bool and found.shape == (HEIGHT, WIDTH, 1)
        np.testing.assert_array_equal(found, expected[index])


def test_mask_colour_and_alpha(tmp_path: Path) -> None:
    """nerfstudio cannot put a colour of three channels into photos of four."""
    meta = write_capture(tmp_path, masks=True)
    for index, frame in enumerate(meta["frames"]):
        Image.fromarray(np.dstack([smooth(index), ALPHA])).save(tmp_path / frame["file_path"])
    parser = NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval", mask_color=(1.0, 0.5, 0.0))
    manager = PyramidDataManagerConfig(data=tmp_path, dataparser=parser, train_num_rays_per_batch=64).setup()
    data = manager.train_dataset.get_data(0)
    np.testing.assert_allclose(data["image"][0, 0], [1.0, 0.5, 0.0, 1.0])
    np.testing.assert_allclose(data["image"][-1, -1, 3], ALPHA[-1, -1] / 255)


def test_headers_hold_what_is_said() -> None:
    header = Header(Path("a.jpg"), 4, 3, "RGB", "8 bit", 3, 6, 1)
    assert header.stored_size == (4, 3) and header.upright_size == (3, 4)
