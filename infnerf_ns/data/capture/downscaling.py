"""Smaller copies of a capture's photos, masks and depth maps, for `ColmapDataParser`.

In place of nerfstudio's own way, which puts the names of the files into the command line of a shell: a photo that is
called ``$(command).jpg`` runs that command. It also takes a folder for complete that an interruption has left half
full, as it only looks whether the folder is there. Here nothing runs in a shell, and a folder gets its name when all
files in it are whole.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from infnerf_ns.errors import InputError

Rounding = Literal["floor", "round", "ceil"]
_JPEG_QUALITY = 95
_ROUND: dict[str, Callable[[float], int]] = {"floor": math.floor, "round": round, "ceil": math.ceil}
_DRAFT = re.compile(r"-(\d+)\.draft")


def downscale_images(
    paths: Iterable[Path],
    get_fname: Callable[[Path], Path],
    factor: int,
    rounding_mode: Rounding = "floor",
    nearest: bool = False,
) -> None:
    """Writes smaller copies of images, in the format, mode and depth of bits of each and as its pixels are stored: EXIF
    orientation is neither applied nor kept (nerfstudio's ``-noautorotate``).

    Args:
        paths: images that Pillow reads, or arrays ``[H, W, ...]`` in .npy files.
        get_fname: the name of the copy; what differs from the original is the name of one folder above both.
        factor: at least 2.
        rounding_mode: of width / factor and height / factor.
        nearest: takes the pixel in the middle, for masks and depth maps; else the mean of the area.

    Raises:
        InputError: an image cannot be read, or a copy not be written; what was there before stays as it is.
    """
    if factor < 2:
        raise InputError(f"photos cannot be downscaled by {factor}: allowed is a whole number of at least 2")
    paths = list(paths)
    targets = [_below(path, get_fname(path)) for path in paths]
    drafts: dict[Path, Path] = {}
    try:
        for path, (folder, inner) in zip(track(paths, "Downscaling images", console=CONSOLE, transient=True), targets):
            if folder not in drafts:
                drafts[folder] = _new_draft(folder)
            file = drafts[folder] / inner
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                _downscale(path, file, lambda length: max(1, _ROUND[rounding_mode](length / factor)), nearest)
            except (OSError, ValueError, SyntaxError, KeyError, cv2.error, Image.DecompressionBombError) as error:
                raise InputError(f"{path} cannot be downscaled to {folder / inner}: {error}") from error
        for folder, draft in drafts.items():
            _publish(draft, folder)
    finally:
        for draft in drafts.values():
            shutil.rmtree(draft, ignore_errors=True)
    CONSOLE.log(f"Downscaled {len(paths)} images by {factor} into {', '.join(map(str, drafts))}.")


def _below(path: Path, copy: Path) -> tuple[Path, Path]:
    """The outermost folder of the copies, and where a copy stands in it: what both names end in alike."""
    alike = 1
    while alike < min(len(path.parts), len(copy.parts)) and path.parts[-alike - 1] == copy.parts[-alike - 1]:
        alike += 1
    return Path(*copy.parts[:-alike]), Path(*copy.parts[-alike:])


def _new_draft(folder: Path) -> Path:
    """An empty hidden folder beside ``folder``; those of processes that were killed on this machine are removed."""
    start = f".{folder.name}-{socket.gethostname()}"
    for other in folder.parent.glob(f"{_escape(start)}-*.draft"):
        match = _DRAFT.fullmatch(other.name.removeprefix(start))
        if match is not None and not _runs(int(match[1])):
            shutil.rmtree(other, ignore_errors=True)
    draft = folder.with_name(f"{start}-{os.getpid()}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"no smaller photos can be written to {folder}: {error.strerror or error}") from error
    return draft


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _publish(draft: Path, folder: Path) -> None:
    """A folder that is not there appears with all that is in it; in one that is, each file is replaced whole."""
    if not folder.exists():
        os.rename(draft, folder)
        return
    for entry in draft.iterdir():
        if entry.is_dir():
            _publish(entry, folder / entry.name)
        else:
            os.replace(entry, folder / entry.name)


def _downscale(path: Path, file: Path, smaller: Callable[[int], int], nearest: bool) -> None:
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False)
        np.save(file, _resized(values, smaller(values.shape[1]), smaller(values.shape[0]), nearest))
        return
    with Image.open(path) as image:
        size = smaller(image.width), smaller(image.height)
        kind, profile = "JPEG" if image.format == "MPO" else image.format, image.info.get("icc_profile")
        if kind not in Image.SAVE:
            raise ValueError(f"images of the kind {kind} cannot be written; convert the photos to PNG or JPEG")
        if _has_deep_colors(image):
            _write_deep(file, path, *size, nearest)
            return
        picture = _pillow_resized(image, *size, nearest)
    options: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        options = {"quality": _JPEG_QUALITY}
    picture.save(file, format=kind, icc_profile=profile, **options)


def _has_deep_colors(image: Image.Image) -> bool:
    """Colours of 16 bits, of which Pillow keeps 8 and opens the file as an ordinary mode."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def _write_deep(file: Path, path: Path, width: int, height: int, nearest: bool) -> None:
    values = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise ValueError("colours of 16 bits of this kind cannot be read; convert the photos to 16-bit PNG")
    alpha = values.ndim == 3 and values.shape[2] == 4
    encoded = cv2.imencode(path.suffix, _resized(values, width, height, nearest, alpha))[1]
    file.write_bytes(encoded.tobytes())


def _pillow_resized(image: Image.Image, width: int, height: int, nearest: bool) -> Image.Image:
    if nearest:
        picture = image.resize((width, height), Image.Resampling.NEAREST)
        picture.info.clear()
        return picture
    if image.mode in ("P", "PA") or "transparency" in image.info:
        transparent = "transparency" in image.info or image.mode == "PA"
        image = image.convert("RGBA" if transparent else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    values = np.asarray(image)
    small = _resized(values, width, height, nearest=False, alpha=image.mode in ("RGBA", "LA"))
    if image.mode in ("YCbCr", "LAB", "HSV", "CMYK", "La", "RGBa"):
        return Image.frombytes(image.mode, (width, height), np.ascontiguousarray(small).tobytes())
    return Image.fromarray(small)


def _resized(values: NDArray, width: int, height: int, nearest: bool, alpha: bool = False) -> NDArray:
    """[H, W, ...] to [height, width, ...] of the same type.

    Args:
        alpha: the last channel is alpha: colours count as far as it says that they are seen.
    """
    if nearest:
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), values.shape[:2])
        )
        return values[rows[:, None], columns]
    if alpha:
        exact = values.astype(np.float32)
        colors, opacity = exact[..., :-1], exact[..., -1:]
        mean_opacity = _area(opacity, width, height)
        seen = _area(colors * opacity, width, height) / np.where(mean_opacity > 0, mean_opacity, 1)
        hidden = _area(colors, width, height)
        mean = np.concatenate([np.where(mean_opacity > 0, seen, hidden), mean_opacity], axis=-1)
        return np.rint(mean).astype(values.dtype)
    if values.dtype == np.int32:
        return np.rint(_area(values.astype(np.float64), width, height)).astype(np.int32)
    return _area(values, width, height)


def _area(values: NDArray, width: int, height: int) -> NDArray:
    """Means of areas; of whole numbers rounded to the nearest."""
    small = cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA)
    return small.reshape(height, width, *values.shape[2:])
