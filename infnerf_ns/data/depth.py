"""Depth images of a capture: read, checked, reduced to pyramid levels, and kept in memory beside the photos.

A depth image shows the same picture as its photo, at any resolution; 0, negative numbers, NaN and infinity mean that
the depth is not known, in memory all of them are 0. Its numbers, times ``depth_unit_scale_factor`` and the dataparser's
scale, are depths along the viewing axis, as everywhere in nerfstudio; the data manager makes them distances.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from tokenize import TokenError

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from infnerf_ns.data.capture.photo_files import unreadable
from infnerf_ns.data.capture.photos import AS_STORED, Turn, companion_turn, read_numbers, turn_numbers
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file

SAME_SURFACE = 0.05
"""Two depths that differ by this share of the nearer one can be of one surface."""
SHAPE_TOLERANCE = 0.02
"""Relative difference in the aspect ratios of photos and depth images (ScanNet's differ by 0.4 %)."""
STEPS_PER_OCTAVE = 4096
"""Depths are kept as int16 logarithms: off by 0.0085 % at most. float16, of the same size, is off by up to 0.049 %,
half a pixel at a focal length of 1000; float32 would need more memory than the colours."""
BYTES_PER_PIXEL = 2
_UNKNOWN = -(1 << 15)
_ARRAY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Of ``.npy`` files, by version; the third one is for arrays with fields, which no depth image is."""


def depth_files(outputs: DataparserOutputs) -> list[Path]:
    """The depth image of every photo; empty where the dataparser gives none."""
    return [Path(file) for file in outputs.metadata.get("depth_filenames") or []]


def depth_unit(outputs: DataparserOutputs) -> float:
    """Scene units per number in a depth image, as nerfstudio's ``DepthDataset`` has it."""
    return float(outputs.metadata.get("depth_unit_scale_factor", 1.0) * outputs.dataparser_scale)


def check_depth(outputs: DataparserOutputs, split: str) -> None:
    """Checks, without reading them, that all photos of a split have depth images.

    Raises:
        InputError: there are none, fewer than photos, or a file is missing.
    """
    files, photos = depth_files(outputs), outputs.image_filenames
    if not photos:
        return
    if not files:
        raise InputError(
            f"the {split} split has no depth images, which --pipeline.datamanager.use-depth asks for: give every photo "
            "one ('depth_file_path' in transforms.json; --depth True for infnerf-demo) or train without depth losses"
        )
    if len(files) != len(photos):
        raise InputError(
            f"the {split} split has {len(photos)} photos but {len(files)} depth images: give every photo one, "
            "or train without depth losses"
        )
    missing = [file for file in files if not file.exists()]
    if missing:
        raise InputError(
            f"depth image {missing[0]} does not exist ({len(missing)} of {len(files)} missing in the {split} split): "
            "put it there, at any resolution, or train without depth losses"
        )


def read_depth(path: Path, height: int, width: int, turn: Turn = AS_STORED) -> Float32[np.ndarray, "h w"]:
    """One depth image, at the size of its photo: the nearest pixel counts, as a mean of two surfaces is on neither.

    Args:
        path: ``.npy`` ``[H', W']`` or ``[H', W', 1]``, or an image of one channel.
        height: H, of the photo.
        width: W, of the photo.
        turn: of the photo.

    Returns:
        The numbers of the file, 0 where they are no depth.

    Raises:
        InputError: the file cannot be read, or does not have the shape of its photo.
    """
    depth, orientation = _read_array(path) if path.suffix.lower() == ".npy" else read_numbers(path)
    try:
        depth = depth.astype(np.float32)
    except (ValueError, TypeError) as error:
        raise unreadable(path, "depth image", error) from error
    if depth.ndim == 3 and depth.shape[2] == 1:
        depth = depth[..., 0]
    if depth.ndim != 2:
        shape = " x ".join(map(str, depth.shape))
        raise InputError(f"depth image {path} holds {shape} numbers: save it with one channel, 16 bit or float")
    rows, columns = depth.shape

    def fits(size: tuple[int, int]) -> bool:
        tolerance = max(SHAPE_TOLERANCE * height, width / max(size[0], 1), 1.0)
        return min(size) > 0 and abs(size[1] * width / size[0] - height) <= tolerance

    orientation = companion_turn((columns, rows), orientation, turn, fits)
    if orientation is None:
        raise InputError(
            f"depth image {path} has {columns} x {rows} pixels but its photo {width} x {height}: "
            "it must show the same picture, at any resolution"
        )
    depth = np.ascontiguousarray(turn_numbers(depth, orientation))
    if depth.shape != (height, width):
        depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _read_array(path: Path) -> tuple[np.ndarray, int]:
    """The numbers of a ``.npy`` file, which has no EXIF orientation (1)."""
    try:
        require_regular_file(path, "depth image")
        with open(path, "rb") as file:  # the size that it claims, before there is memory for it
            shape, _, kind = _ARRAY_HEADERS[np.lib.format.read_magic(file)](file)
            claimed = math.prod(shape) * kind.itemsize
            if claimed > os.fstat(file.fileno()).st_size:
                raise ValueError(f"its header claims {claimed} bytes")
        return np.load(path, allow_pickle=False), 1
    except (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, TokenError) as error:
        raise unreadable(path, "depth image", error) from error


def downsample_depth(depth: Float32[np.ndarray, "h w"], level: int) -> Float32[np.ndarray, "h2 w2"]:
    """Medians of the known depths over ``2**level`` x ``2**level`` blocks.

    A mean over an edge lies between the surfaces, where nothing is; the median is on the one that covers more. The two
    middle ones of an even number are averaged only where they are of one surface, else the nearer counts. A block that
    is not known for the greater part (sky) is not known.

    Args:
        depth: 0 = not known.
        level: pyramid level, 0 = the image itself.

    Returns:
        ``[H >> level, W >> level]``, 0 = not known.
    """
    if level == 0:
        return depth
    side, height, width = 1 << level, depth.shape[0] >> level, depth.shape[1] >> level
    blocks = depth[: height << level, : width << level].reshape(height, side, width, side)
    blocks = np.where(blocks > 0, blocks, np.float32(np.inf)).transpose(0, 2, 1, 3).reshape(height * width, side * side)
    blocks.sort(axis=-1)
    nearer, farther = blocks[:, side * side // 2 - 1].copy(), blocks[:, side * side // 2].copy()
    holes = np.nonzero(np.isinf(blocks[:, -1]))[0]
    count = np.isfinite(blocks[holes]).sum(axis=-1)
    known = 2 * count >= side * side
    for middle, at in ((nearer, (count - 1) // 2), (farther, count // 2)):
        middle[holes] = np.where(known, blocks[holes, at], 0)
    median = np.where(farther <= nearer * (1 + SAME_SURFACE), (nearer + farther) / 2, nearer)
    return median.reshape(height, width).astype(np.float32)


class DepthPixels:
    """The depths of all pixels of a pyramid, in its order.

    ``codes`` [P] int16 are the binary logarithms of depth over ``reference`` [photos], the median depth of the photo,
    in steps of ``1 / STEPS_PER_OCTAVE``; ``_UNKNOWN`` where the depth is not known, or differs from the median by a
    factor of 256 and more.

    Args:
        num_pixels: P, of all photos and levels.
        num_photos: photos.
    """

    def __init__(self, num_pixels: int, num_photos: int) -> None:
        self.codes = torch.full((num_pixels,), _UNKNOWN, dtype=torch.int16)
        self.reference = torch.zeros(num_photos)

    def set_photo(self, photo: int, depth: Float32[np.ndarray, "h w"], starts: list[int]) -> None:
        """Fills all levels of one photo.

        Args:
            photo: index of the photo.
            depth: of its pixels, 0 = not known.
            starts: first pixel of each of its levels.
        """
        known = depth[depth > 0]
        if len(known) == 0:
            return
        reference = np.float32(np.median(known))
        self.reference[photo] = float(reference)
        for level, start in enumerate(starts):
            reduced = downsample_depth(depth, level).reshape(-1)
            code = np.rint(np.log2(np.where(reduced > 0, reduced / reference, 1)) * STEPS_PER_OCTAVE)
            code = np.where((reduced > 0) & (np.abs(code) < -_UNKNOWN), code, _UNKNOWN).astype(np.int16)
            self.codes[start : start + len(code)] = torch.from_numpy(code)

    def at(self, pixel: Int[Tensor, "r"], photo: Int[Tensor, "r"]) -> Float[Tensor, "r"]:
        """Depths of pixels of those photos, 0 = not known."""
        code = self.codes[pixel]
        depth = torch.exp2(code.float() / STEPS_PER_OCTAVE) * self.reference[photo]
        return torch.where(code == _UNKNOWN, 0.0, depth)

    def any_known(self) -> bool:
        """Whether any photo has a depth."""
        return bool((self.reference > 0).any())

    def to(self, device: torch.device | str) -> DepthPixels:
        """Moves the buffers."""
        self.codes, self.reference = self.codes.to(device), self.reference.to(device)
        return self
