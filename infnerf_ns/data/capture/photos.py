"""Photos, masks and depth images from files: the one place where their pixels are read.

Training, evaluation, masks and depth images come through here, so that a file means the same everywhere. What Pillow
opens is converted by its mode: one bit, grey, palette, alpha, CMYK (with its ICC profile), YCbCr, LAB, HSV. Numbers
with more than 8 bits become 8 bits by the range of their type (65535; 1.0 for floats), or, where a capture uses little
of it (14-bit values in 16-bit files, temperatures), by the range of the capture, :func:`capture_levels`. What cannot
be read ends in one line that names the file and the remedy.

Pillow turns TIFF files upright when it loads them and leaves all others as they are stored; here *stored* always means
the order of the pixels in the file, and the EXIF tag is followed only on demand.
"""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file

Kind = Literal["photo", "mask", "depth image"]
Depth = Literal["8 bit", "16 bit", "16 bit colour", "integer", "float"]

FULL_RANGE: Mapping[Depth, float] = {"16 bit": 65535.0, "16 bit colour": 65535.0, "float": 1.0}
"""White by the range of the type. 32-bit integers: 65535 where nothing is larger (older Pillow opens 16-bit PNG so)."""
USED_RANGE = 0.25
"""A capture whose values span less of the type's range has levels of its own; 14 bits in 16 are just below."""
OUTSIDE = 2e-5
"""Share of a capture's pixels below black and above white: hot pixels do not set the levels."""
LEVEL_PHOTOS = 40
"""Photos, evenly spaced in their order, that the levels of a capture are found from."""
_LEVEL_PIXELS = 1 << 16  # of each
_ORIENTATION = ExifTags.Base.Orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes stored pixels upright, by EXIF orientation."""
_INVERSE = {6: 8, 8: 6}
"""The orientation that takes a turn back; the others are their own inverse."""
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


@dataclass(frozen=True)
class Levels:
    """The numbers that become 0 and 255."""

    black: float
    white: float

    def to_8_bit(self, numbers: np.ndarray) -> UInt8[np.ndarray, "*shape"]:
        """Linear between black and white, rounded; what is outside is clipped."""
        scale = 255.0 / (self.white - self.black)
        return np.rint(np.clip((numbers - np.float64(self.black)) * scale, 0.0, 255.0)).astype(np.uint8)


@dataclass(frozen=True)
class Turn:
    """How a photo is read: as it is stored, or turned."""

    tag: int = 1
    """its EXIF orientation, 1 to 8"""
    followed: bool = False
    """whether it is turned as the tag asks"""


AS_STORED = Turn()


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


def read_header(path: Path, kind: Kind) -> Header:
    """Size, mode and orientation of a file, without decoding it.

    Raises:
        InputError: it is no regular file, or no image.
    """
    with _opened(path, kind) as image:
        return _header(path, image)


def read_photo(
    path: Path, *, upright: bool = False, levels: Mapping[Depth, Levels] | None = None, scale: float = 1.0
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a photo.

    Args:
        path: of the file.
        upright: turn it as its EXIF tag asks.
        levels: black and white of files with more than 8 bits, from :func:`capture_levels`; those of the type if
            missing.
        scale: of the size; smaller or larger photos are filtered as nerfstudio does.

    Returns:
        C = 3, or 4 with alpha. 8-bit RGB and RGBA photos come bit for bit as Pillow decodes them.

    Raises:
        InputError: it cannot be read, or its numbers are not finite.
    """
    with _opened(path, "photo") as image:
        header = _header(path, image)
        image = _to_8_bit(image, header, levels or {})
        if upright and header.orientation != 1:
            image = image.transpose(_TURNS[header.orientation])
        if scale != 1.0:
            size = int(image.width * scale), int(image.height * scale)
            image = image.resize(size, resample=Image.Resampling.BILINEAR)
        pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None].repeat(3, axis=2)


def read_thumbnail(
    path: Path, side: int, *, upright: bool = False, levels: Mapping[Depth, Levels] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """A small copy of a photo without alpha, its longer side at most ``side`` pixels (and not much less).

    JPEG files are decoded at the reduced size, which is several times faster.
    """
    with _opened(path, "photo") as image:
        header = _header(path, image)
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            image.draft(None, (side * image.width // max(image.size), side * image.height // max(image.size)))
        small = _to_8_bit(image, header, levels or {}).convert("RGB").copy()
    small.thumbnail((side, side), Image.Resampling.BOX)
    pixels = np.asarray(small)
    return turn_numbers(pixels, header.orientation) if upright else pixels


def read_mask(path: Path, size: tuple[int, int], turn: Turn, scale: float = 1.0) -> Bool[np.ndarray, "h w"]:
    """A mask, true = the pixel counts: what is neither black (0) nor transparent.

    Args:
        path: of the file, of any mode; the channels of a mask in colour must agree.
        size: width and height of its photo, as the photo is read.
        turn: of its photo.
        scale: of the size, nearest pixels.

    Raises:
        InputError: it cannot be read, is in colour, or has another size than its photo.
    """
    with _opened(path, "mask") as image:
        header = _header(path, image)
        orientation = companion_turn(header.stored_size, header.orientation, turn, size.__eq__)
        if orientation is None:
            raise wrong_mask_size(header, size)
        keep = np.ascontiguousarray(turn_numbers(_mask_values(image, header), orientation))
    if scale != 1.0:
        small = int(keep.shape[1] * scale), int(keep.shape[0] * scale)
        keep = np.array(Image.fromarray(keep).resize(small, resample=Image.Resampling.NEAREST))
    return keep > 0


def wrong_mask_size(header: Header, size: tuple[int, int]) -> InputError:
    """The line for a mask of another size than its photo."""
    return InputError(
        f"mask {header.path} has {header.width} x {header.height} pixels but its photo {size[0]} x {size[1]}: "
        "make them equal"
    )


def read_numbers(path: Path) -> tuple[np.ndarray, int]:
    """The numbers of a depth image, as stored.

    Returns:
        ``[H, W]``, or ``[H, W, C]`` where the file has channels; its EXIF orientation.

    Raises:
        InputError: it cannot be read, or is a palette image.
    """
    with _opened(path, "depth image") as image:
        if image.mode in ("P", "PA"):
            raise ValueError("it is a palette image")
        header = _header(path, image)
        return np.asarray(_decoded(image, header)), header.orientation


def companion_turn(
    stored: tuple[int, int], own: int, turn: Turn, fits: Callable[[tuple[int, int]], bool]
) -> int | None:
    """How a mask or a depth image must be turned to lie on its photo.

    Its own EXIF tag counts if the photo's does. Without one (programs that write masks often drop it) it lies as it is
    stored if its shape fits; else it is turned as the photo is, or back if the photo is not.

    Args:
        stored: width and height of the companion.
        own: its EXIF orientation.
        turn: of the photo.
        fits: whether a width and height are those of the photo as it is read.

    Returns:
        An EXIF orientation, 1: as it is stored; None if the shape fits in no way.
    """
    as_photo = turn.tag if turn.followed else _INVERSE.get(turn.tag, turn.tag)
    for orientation in (own if turn.followed else 1, 1, own, as_photo):
        if fits(stored if orientation < 5 else stored[::-1]):
            return orientation
    return None


def turn_numbers(numbers: np.ndarray, orientation: int) -> np.ndarray:
    """An array ``[H, W, ...]`` of stored pixels as the EXIF orientation asks."""
    if orientation >= 5:
        numbers = numbers.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return numbers[::rows, ::columns]


def capture_levels(headers: Sequence[Header]) -> dict[Depth, Levels]:
    """Black and white of the photos with more than 8 bits: one pair for the whole capture and each kind of number.

    The range of the type, unless the photos are outside of it or use less than ``USED_RANGE`` of it; then the range
    that all but ``OUTSIDE`` of their pixels at each end are in.

    Args:
        headers: of the train photos, which decide for the held-out ones, too.

    Raises:
        InputError: a photo cannot be read, or its numbers are not finite.
    """
    levels: dict[Depth, Levels] = {}
    for depth in dict.fromkeys(header.depth for header in headers if header.depth != "8 bit"):
        chosen = [header for header in headers if header.depth == depth]
        places = np.unique(np.linspace(0, len(chosen) - 1, min(LEVEL_PHOTOS, len(chosen))).round().astype(int))
        values = np.concatenate([_some_numbers(chosen[place]) for place in places])
        low, high = (float(value) for value in np.quantile(values, [OUTSIDE, 1 - OUTSIDE]))
        full = FULL_RANGE.get(depth) or (65535.0 if high <= 65535 else 2.0**31 - 1)
        fits = low >= 0 and high <= full and high - low >= USED_RANGE * full
        levels[depth] = Levels(0.0, full) if fits or high <= low else Levels(low, high)
    return levels


def _some_numbers(header: Header) -> np.ndarray:
    """A regular subset of the numbers of a photo."""
    with _opened(header.path, "photo") as image:
        numbers = _numbers(image, header).reshape(-1)
    return numbers[:: max(1, len(numbers) // _LEVEL_PIXELS)].astype(np.float64)


@contextmanager
def _opened(path: Path, kind: Kind) -> Iterator[Image.Image]:
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


def _header(path: Path, image: Image.Image) -> Header:
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


def _to_8_bit(image: Image.Image, header: Header, levels: Mapping[Depth, Levels]) -> Image.Image:
    """A photo as L, RGB or RGBA, pixels as stored."""
    if header.depth != "8 bit":
        level = levels.get(header.depth)
        if header.depth != "16 bit colour":
            numbers = _numbers(image, header)
            if level is None:
                level = Levels(0.0, FULL_RANGE.get(header.depth, 65535.0))
            return Image.fromarray(level.to_8_bit(numbers))
        if level is not None and (level.black, level.white) != (0.0, 65535.0):
            return Image.fromarray(level.to_8_bit(_numbers(image, header)))
        # else Pillow's own way to 8 bits, the upper byte
    return _converted(_decoded(image, header))


def _converted(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel as L, RGB or RGBA."""
    mode = image.mode
    if "transparency" in image.info and mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA")
    if mode in ("L", "RGB", "RGBA"):
        return image
    if mode in ("LA", "PA", "RGBa"):
        return image.convert("RGBA")
    if mode == "La":
        return image.convert("LA").convert("RGBA")
    if mode == "1":
        return image.convert("L")
    if mode == "P":
        return image.convert("RGBA" if image.palette is not None and image.palette.mode.endswith("A") else "RGB")
    if mode in ("RGBX", "YCbCr", "HSV"):
        return image.convert("RGB")
    if mode == "CMYK":
        profile = image.info.get("icc_profile")
        return _managed(image, io.BytesIO(profile)) if profile else image.convert("RGB")
    if mode == "LAB":
        return _managed(image, ImageCms.createProfile("LAB"))
    raise ValueError(f"its colours are of the kind {mode}, which has no way to RGB")


def _managed(image: Image.Image, profile: ImageCms.core.CmsProfile | io.BytesIO) -> Image.Image:
    """Colours that only a profile explains, as sRGB."""
    try:
        managed = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        if image.mode != "CMYK":
            raise ValueError("its colours cannot be converted to RGB") from None
        return image.convert("RGB")  # the profile is damaged, or of other colours
    assert managed is not None  # only in place
    return managed


def _numbers(image: Image.Image, header: Header) -> np.ndarray:
    """The numbers of a photo with more than 8 bits, as stored: [H, W], or [H, W, 3 or 4] in colour.

    Raises:
        InputError: some are NaN or infinite.
    """
    if header.depth == "16 bit colour":
        # Pillow keeps the upper byte only
        numbers = cv2.imdecode(np.fromfile(header.path, np.uint8), cv2.IMREAD_UNCHANGED)
        if numbers is None or numbers.ndim != 3 or numbers.dtype != np.uint16:
            raise ValueError("its 16-bit colours cannot be decoded")
        numbers = cv2.cvtColor(numbers, cv2.COLOR_BGRA2RGBA if numbers.shape[2] == 4 else cv2.COLOR_BGR2RGB)
        turned = header.orientation if image.format == "TIFF" else 1  # OpenCV turns them, too, and no others here
        return turn_numbers(numbers, _INVERSE.get(turned, turned))
    numbers = np.asarray(_decoded(image, header))
    unknown = 0 if header.depth != "float" else int(np.count_nonzero(~np.isfinite(numbers)))
    if unknown:
        raise InputError(
            f"photo {header.path} holds NaN or infinity in {unknown} of {numbers.size} pixels: replace them by "
            "numbers, and mask them out where they mean nothing"
        )
    return numbers


def _mask_values(image: Image.Image, header: Header) -> UInt8[np.ndarray, "h w"]:
    """255 where the mask is neither black nor transparent, as stored."""
    image = _decoded(image, header)
    if header.depth in ("16 bit", "integer", "float"):
        numbers = np.asarray(image)
        return np.where(np.isfinite(numbers) & (numbers != 0), np.uint8(255), np.uint8(0))
    values = np.asarray(_converted(image))
    if values.ndim == 2:
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    colours = values[..., :3]
    if header.mode not in ("P", "PA") and (colours != colours[..., :1]).any():  # palettes of labels are coloured
        raise InputError(
            f"mask {header.path} has {len(image.getbands())} channels: save it with one, "
            "0 = ignore the pixel (they differ, and a mask has no colours)"
        )
    keep = colours.any(axis=-1)
    if values.shape[2] == 4:
        keep &= values[..., 3] > 0
    return np.where(keep, np.uint8(255), np.uint8(0))


def _decoded(image: Image.Image, header: Header) -> Image.Image:
    """The pixels in their stored order; Pillow turns TIFF files."""
    image.load()
    if header.orientation != 1 and image.format == "TIFF" and _ORIENTATION not in image.tag_v2:
        return image.transpose(_TURNS[_INVERSE.get(header.orientation, header.orientation)])
    return image
