"""Photos, masks and depth images from files: the one place where their pixels are read.

Training, evaluation, masks and depth images come through here, so that a file means the same everywhere. What Pillow
opens is converted by its mode: one bit, grey, palette, alpha, CMYK (with its ICC profile), YCbCr, LAB, HSV. Numbers
with more than 8 bits become 8 bits by the range of their type (65535; 1.0 for floats), or, where a capture uses little
of it (14-bit values in 16-bit files, temperatures), by the range of the capture, :func:`capture_levels`. What cannot
be read ends in one line that names the file and the remedy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageCms

from infnerf_ns.data.capture.photo_files import (
    INVERSE_TURNS,
    TURNS,
    Depth,
    Header,
    header_of,
    open_image,
    stored_pixels,
)
from infnerf_ns.errors import InputError

FULL_RANGE: Mapping[Depth, float] = {"16 bit": 65535.0, "16 bit colour": 65535.0, "float": 1.0}
"""White by the range of the type. 32-bit integers: 65535 where nothing is larger (older Pillow opens 16-bit PNG so)."""
USED_RANGE = 0.25
"""A capture whose values span less of the type's range has levels of its own; 14 bits in 16 are just below."""
OUTSIDE = 2e-5
"""Share of a capture's pixels below black and above white: hot pixels do not set the levels."""
LEVEL_PHOTOS = 40
"""Photos, evenly spaced in their order, that the levels of a capture are found from."""
_LEVEL_PIXELS = 1 << 16  # of each


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
    with open_image(path, "photo") as image:
        header = header_of(path, image)
        image = _to_8_bit(image, header, levels or {})
        if upright and header.orientation != 1:
            image = image.transpose(TURNS[header.orientation])
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
    with open_image(path, "photo") as image:
        header = header_of(path, image)
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
    with open_image(path, "mask") as image:
        header = header_of(path, image)
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
    with open_image(path, "depth image") as image:
        if image.mode in ("P", "PA"):
            raise ValueError("it is a palette image")
        header = header_of(path, image)
        return np.asarray(stored_pixels(image, header)), header.orientation


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
    as_photo = turn.tag if turn.followed else INVERSE_TURNS.get(turn.tag, turn.tag)
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
    with open_image(header.path, "photo") as image:
        numbers = _numbers(image, header).reshape(-1)
    return numbers[:: max(1, len(numbers) // _LEVEL_PIXELS)].astype(np.float64)


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
    return _converted(stored_pixels(image, header))


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
        return turn_numbers(numbers, INVERSE_TURNS.get(turned, turned))
    numbers = np.asarray(stored_pixels(image, header))
    unknown = 0 if header.depth != "float" else int(np.count_nonzero(~np.isfinite(numbers)))
    if unknown:
        raise InputError(
            f"photo {header.path} holds NaN or infinity in {unknown} of {numbers.size} pixels: replace them by "
            "numbers, and mask them out where they mean nothing"
        )
    return numbers


def _mask_values(image: Image.Image, header: Header) -> UInt8[np.ndarray, "h w"]:
    """255 where the mask is neither black nor transparent, as stored; in JPEG files, whose black is not quite black
    near white, where it is lighter than half of its lightest pixel."""
    is_jpeg = image.format in ("JPEG", "MPO")
    image = stored_pixels(image, header)
    if header.depth in ("16 bit", "integer", "float"):
        numbers = np.asarray(image)
        return np.where(np.isfinite(numbers) & (numbers != 0), np.uint8(255), np.uint8(0))
    values = np.asarray(_converted(image))
    dark = values.max() // 2 if is_jpeg else 0
    if values.ndim == 2:
        return np.where(values > dark, np.uint8(255), np.uint8(0))
    colours = values[..., :3]
    if header.mode not in ("P", "PA") and (colours != colours[..., :1]).any():  # palettes of labels are coloured
        raise InputError(
            f"mask {header.path} has {len(image.getbands())} channels: save it with one, "
            "0 = ignore the pixel (they differ, and a mask has no colours)"
        )
    keep = (colours > dark).any(axis=-1)
    if values.shape[2] == 4:
        keep &= values[..., 3] > 0
    return np.where(keep, np.uint8(255), np.uint8(0))
