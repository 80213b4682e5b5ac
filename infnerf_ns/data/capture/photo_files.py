"""The files of photos, masks and depth images: what opens them, what they say of themselves, and why they do not open.

Pillow turns TIFF files upright when it loads them and leaves all others as they are stored; here *stored* always means
the order of the pixels in the file, and the EXIF tag is followed only on demand.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
from PIL import ExifTags, Image, UnidentifiedImageError

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file

Kind = Literal["photo", "mask", "depth image"]
Depth = Literal["8 bit", "16 bit", "16 bit colour", "integer", "float"]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes stored pixels upright, by EXIF orientation."""
INVERSE_TURNS = {6: 8, 8: 6}
"""The orientation that takes a turn back; the others are their own inverse."""
_ORIENTATION = ExifTags.Base.Orientation
_RAW = "3fr arw cr2 cr3 crw dng erf iiq mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f".split()
_PLUGINS = {
    "HEIC": ((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "pillow-heif", "pillow_heif"),
    "AVIF": ((b"avif", b"avis"), "pillow-avif-plugin", "pillow_avif"),
    "JPEG XL": ((), "pillow-jxl-plugin", "pillow_jxl"),
}
"""Formats that Pillow reads with a plugin: brands in the file's first box, package, module."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its pixels are decoded."""

    path: Path
    width: int
    """as stored"""
    height: int
    """as stored"""
    mode: str
    """Pillow's"""
    depth: Depth
    channels: int
    """of the photo as it is read: 3, or 4 with alpha"""
    orientation: int
    """EXIF, 1 to 8; 1: upright as it is stored"""
    frames: int
    """pages of a TIFF file, pictures of an animation"""

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height as stored."""
        return self.width, self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the turn that the EXIF tag asks for."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def check_first_photo(path: Path) -> None:
    """Looks at the photo that a dataparser is going to open by itself: a pipe would make it wait for ever, and a format
    that needs a plugin gets it. What does not exist is left to the dataparser, as are photos that it may not open.

    Raises:
        InputError: it is a folder, a pipe or a device, or of a format that no installed package reads.
    """
    if path.exists():
        require_regular_file(path, "photo")
        if _plugin_format(path) is not None:
            read_header(path, "photo")


def read_header(path: Path, kind: Kind) -> Header:
    """Size, mode and orientation of a file, without decoding it.

    Raises:
        InputError: it is no regular file, or no image.
    """
    with open_image(path, kind) as image:
        return header_of(path, image)


@contextmanager
def open_image(path: Path, kind: Kind) -> Iterator[Image.Image]:
    """Opens an image file; whatever its decoder raises within the block becomes one line."""
    path = Path(path)
    if kind == "photo" and path.suffix.lower().lstrip(".") in _RAW:
        raise _raw_file(path, kind)  # Pillow would read the preview in it
    try:
        if path.exists():  # else opening it says so
            require_regular_file(path, kind)
        with _open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(f"{kind} {path} does not exist: restore the file or take it out of the capture") from error
    except (  # what Pillow's decoders were seen to raise on damaged files
        *(OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, AttributeError),
        *(RuntimeError, struct.error, zlib.error, MemoryError, Image.DecompressionBombError, cv2.error),
    ) as error:
        raise unreadable(path, kind, error) from error


def stored_pixels(image: Image.Image, header: Header) -> Image.Image:
    """The pixels in their stored order; Pillow turns TIFF files."""
    image.load()
    if header.orientation != 1 and image.format == "TIFF" and _ORIENTATION not in image.tag_v2:
        return image.transpose(TURNS[INVERSE_TURNS.get(header.orientation, header.orientation)])
    return image


def unreadable(path: Path, kind: Kind, error: Exception) -> InputError:
    """The line for a photo, mask or depth image that cannot be decoded, with the package that would read it."""
    if isinstance(error, UnidentifiedImageError):
        if path.suffix.lower().lstrip(".") in _RAW:
            return _raw_file(path, kind)
        found = _plugin_format(path)
        if found is not None:
            package = _PLUGINS[found][1]
            return InputError(
                f"{kind} {path} is {found}, which Pillow reads with the package {package}: pip install {package}, or "
                "convert the file to JPEG or PNG"
            )
        if path.stat().st_size == 0:
            error = ValueError("it is empty, 0 bytes")
        with path.open("rb") as file:
            is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        if is_tiff:
            error = ValueError(
                "a TIFF file of numbers that Pillow has no mode for: save 8 or 16 bits, or grey floats of 32 bits"
            )
    if isinstance(error, Image.DecompressionBombError):
        return InputError(
            f"{kind} {path} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels, the most that "
            "Pillow opens: scale the photos down"
        )
    reason = str(error) or type(error).__name__
    return InputError(f"{kind} {path} cannot be read ({reason}): replace the file or take it out of the capture")


def _open(path: Path) -> Image.Image:
    """As Pillow does; a format that an installed package reads is registered on its first use."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        found = _plugin_format(path)
        if found is None:
            raise
        try:
            plugin = importlib.import_module(_PLUGINS[found][2])
        except ImportError:
            pass
        else:
            if found == "HEIC":
                plugin.register_heif_opener()
            return Image.open(path)
        raise


def _raw_file(path: Path, kind: Kind) -> InputError:
    return InputError(
        f"{kind} {path} is a raw file of a camera, which must be developed first: export it as JPEG, PNG or TIFF "
        "(darktable, RawTherapee, or the package rawpy)"
    )


def _plugin_format(path: Path) -> str | None:
    """The format of a file that Pillow reads with a plugin only, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(32)
    if start[:2] == b"\xff\x0a" or start[4:8] == b"JXL ":
        return "JPEG XL"
    if start[4:8] != b"ftyp":
        return None
    brands = start[8:12], *(start[at : at + 4] for at in range(16, 32, 4))
    for brand in brands:
        for name, (known, _, _) in _PLUGINS.items():
            if brand in known:
                return name
    return None


def header_of(path: Path, image: Image.Image) -> Header:
    """Of a file that is open and not yet decoded."""
    width, height = image.size
    if image.format == "TIFF":
        width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)  # MPO: previews, other views
    channels = 4 if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info else 3
    return Header(path, width, height, image.mode, _depth(image), channels, _orientation(image), frames)


def _depth(image: Image.Image) -> Depth:
    """How the file stores its numbers."""
    if image.mode.startswith("I;16"):
        return "16 bit"
    if image.mode in ("I", "F"):
        return "integer" if image.mode == "I" else "float"
    tile = image.tile[0] if getattr(image, "tile", None) else ()
    return "16 bit colour" if ";16" in str(tile[3:]) else "8 bit"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none or no valid one."""
    if image.format == "TIFF":
        tag = image.tag_v2.get(_ORIENTATION, 1)
    elif image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # Pillow would decode the whole file to look behind the pixels
    else:
        try:
            tag = image.getexif().get(_ORIENTATION, 1)
        except (SyntaxError, ValueError, struct.error, OSError, LookupError, TypeError):  # a damaged block of metadata
            return 1
    return tag if tag in range(1, 9) else 1
