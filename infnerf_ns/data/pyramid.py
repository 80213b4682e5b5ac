"""Area-filtered pyramids of photos, and uniform draws of their pixels.

Level ``l`` of a photo of H x W pixels has ``H >> l`` x ``W >> l`` pixels; each is the mean of ``2**l x 2**l`` pixels
of the photo itself (never of a rounded level), and what does not fill a block at the right and bottom is left out, so
that level ``l`` is exactly the photo of a camera with ``fx / 2**l`` and ``cx / 2**l``. Pyramid supervision: InfNeRF,
section 3.4.

All photos and levels stand in one uint8 buffer, a *segment* per photo and level, in the order of photos (as given, or
one in which neighbours follow each other), levels, rows, columns. P pixels in all, R drawn pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from infnerf_ns.data.depth import DepthPixels

MIN_SIDE = 8
"""A level has at least this many pixels along the shorter side."""
_MAX_ROUNDS = 100
_LARGEST_ROUND = 1 << 20  # pixels
_FEW_VALID = 0.02


class _Window(NamedTuple):
    """Photos that follow each other in the buffer, whose end is followed by its beginning."""

    pixel: int
    """first one"""
    pixels: int
    chance: float
    """up to its first segment, of ``level_cdf``"""
    chances: float


_Draw = Callable[[int, torch.Generator | None, _Window], Tensor]


def num_levels(height: int, width: int, limit: int) -> int:
    """Levels that a photo gets: at most ``limit``, the smaller side never below ``MIN_SIDE``, at least the photo
    itself."""
    levels = 1
    while levels < limit and (min(height, width) >> levels) >= MIN_SIDE:
        levels += 1
    return levels


def level_name(level: int) -> str:
    """``1``, ``1/2``, ``1/4`` ...: the size of a level, as metrics are named."""
    return "1" if level == 0 else f"1/{2**level}"


def downsample(image: NDArray[np.uint8], level: int) -> NDArray[np.uint8]:
    """Means over ``2**level`` x ``2**level`` blocks, rounded to uint8.

    Args:
        image: ``[H, W, C]`` uint8, C = 3 or 4. With 4 channels the colours are weighted by their alpha (the fourth
            channel), so that compositing the level gives the mean of the composited photo.
        level: pyramid level, 0 = the photo itself.

    Returns:
        ``[H >> level, W >> level, C]`` uint8.
    """
    if level == 0:
        return image
    height, width = image.shape[0] >> level, image.shape[1] >> level
    image = image[: height << level, : width << level]
    if image.shape[2] != 4:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    weighted = image.astype(np.float32)
    weighted[..., :3] *= weighted[..., 3:] / 255.0
    mean = cv2.resize(weighted, (width, height), interpolation=cv2.INTER_AREA)
    mean[..., :3] *= 255.0 / np.maximum(mean[..., 3:], 1e-6)
    return np.clip(np.rint(mean), 0, 255).astype(np.uint8)


def downsample_mask(mask: NDArray[np.bool_], level: int) -> NDArray[np.bool_]:
    """A pixel of a level is valid only if all its pixels of the photo are valid.

    Args:
        mask: ``[H, W]``, true = valid.
    """
    height, width = mask.shape[0] >> level, mask.shape[1] >> level
    blocks = mask[: height << level, : width << level].reshape(height, 1 << level, width, 1 << level)
    return blocks.all(axis=(1, 3))


@dataclass
class PixelDraw:
    """R pixels drawn from a pyramid."""

    photo: Int[Tensor, "r"]
    level: Int[Tensor, "r"]
    row: Int[Tensor, "r"]
    """row within the level"""
    column: Int[Tensor, "r"]
    """column within the level"""
    segment: Int[Tensor, "r"]
    """index of (photo, level)"""
    local: Int[Tensor, "r"]
    """row * width + column"""
    image: UInt8[Tensor, "r c"]
    depth: Float[Tensor, "r"] | None
    """as it was put in, 0 = not known; None without depth images"""
    patch_rays: int
    """the first so many pixels are patches, one after the other and each row by row"""


class PixelPyramid:
    """All levels of all photos in memory.

    Photos are put in with :meth:`set_photo`, in any order and from any thread.

    Args:
        sizes: (height, width) per photo.
        channels: 3, or 4 with alpha.
        max_levels: levels per photo, fewer for small photos.
        masked: whether photos come with masks.
        level_share: share of the draws in which every level has the same chance, instead of every pixel of all levels.
        order: the photos in the order in which they stand in the buffer; as given if None.
        with_depth: whether photos come with depth images.
    """

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        channels: int,
        max_levels: int,
        masked: bool = False,
        level_share: float = 0.0,
        order: list[int] | None = None,
        with_depth: bool = False,
    ) -> None:
        self.level_share = level_share
        order = list(range(len(sizes))) if order is None else order
        levels = [num_levels(*sizes[photo], max_levels) for photo in order]
        segments = [
            (photo, level, sizes[photo][0] >> level, sizes[photo][1] >> level)
            for photo, count in zip(order, levels)
            for level in range(count)
        ]
        photo, level, height, width = torch.tensor(segments, dtype=torch.int64).T.contiguous()
        self.photo, self.level, self.height, self.width = photo, level, height, width
        ends = torch.cumsum(height * width, dim=0)
        self.start = torch.cat([ends.new_zeros(1), ends[:-1]])
        """first pixel of each segment"""
        self.num_pixels = int(ends[-1])
        self.pixels = torch.empty((self.num_pixels, channels), dtype=torch.uint8)
        self.valid: Bool[Tensor, "p"] | None = torch.ones(self.num_pixels, dtype=torch.bool) if masked else None
        self.depth = DepthPixels(self.num_pixels, len(sizes)) if with_depth else None
        first = torch.tensor([0, *levels]).cumsum(0)
        self._first = first
        """first segment of each photo, in the order of the buffer, and one past the last"""
        self._segments_of = {photo: range(*first[i : i + 2].tolist()) for i, photo in enumerate(order)}

    def set_photo(
        self,
        photo: int,
        image: NDArray[np.uint8],
        mask: NDArray[np.bool_] | None = None,
        depth: NDArray[np.float32] | None = None,
    ) -> None:
        """Fills all levels of one photo.

        Args:
            photo: index of the photo.
            image: ``[H, W, C]`` uint8 with the announced size.
            mask: ``[H, W]``, true = valid; only where the pyramid was made with ``masked``.
            depth: ``[H, W]``, 0 = not known; only where the pyramid was made ``with_depth``.
        """
        for segment in self._segments_of[photo]:
            level, start = int(self.level[segment]), int(self.start[segment])
            end = start + int(self.height[segment] * self.width[segment])
            self.pixels[start:end] = torch.from_numpy(downsample(image, level)).reshape(end - start, -1)
            if mask is not None:
                assert self.valid is not None, "the pyramid was made without masks"
                self.valid[start:end] = torch.from_numpy(downsample_mask(mask, level)).reshape(-1)
        if depth is not None:
            assert self.depth is not None, "the pyramid was made without depth"
            self.depth.set_photo(photo, depth, [int(self.start[segment]) for segment in self._segments_of[photo]])

    @cached_property
    def level_cdf(self) -> Float[Tensor, "s"]:
        """Chance up to each segment of a draw that gives every level the same. Masked pixels are rejected after the
        draw (unless they are listed), so a segment's chance is its pixels over the *valid* pixels of its level."""
        size = (self.height * self.width).double()
        valid = size
        if self.valid is not None:
            bounds = zip(self.start.tolist(), (self.start + size.long()).tolist())
            valid = torch.stack([self.valid[start:end].sum() for start, end in bounds]).double()
        of_level = valid.new_zeros(int(self.level.max()) + 1).index_add(0, self.level, valid)[self.level]
        drawn = size if self._few_valid is None else valid
        chance = torch.where(of_level > 0, drawn / of_level.clamp(min=1), 0.0)
        return torch.cumsum(chance, dim=0) / chance.sum()

    @cached_property
    def _few_valid(self) -> Int[Tensor, "v"] | None:
        """The valid pixels, where they are too few to be found by rejection."""
        if self.valid is None or int(self.valid.sum()) > _FEW_VALID * len(self.valid):
            return None
        return self.valid.nonzero()[:, 0]

    def any_valid(self) -> bool:
        """Whether there is a pixel to draw."""
        return self.valid is None or bool(self.valid.any())

    def to(self, device: torch.device | str) -> PixelPyramid:
        """Moves the buffers; pixels are then drawn on that device."""
        for name in ("photo", "level", "height", "width", "start", "pixels", "valid", "depth"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        for name in ("level_cdf", "_few_valid"):
            vars(self).pop(name, None)
        return self

    def draw(
        self,
        num_rays: int,
        patch_size: int = 1,
        generator: torch.Generator | None = None,
        photos: int = 0,
        patch_share: float = 1.0,
    ) -> PixelDraw:
        """Draws uniformly over the valid pixels of all levels (or partly over the levels: ``level_share``); the same
        seed draws the same pixels.

        Args:
            num_rays: R; where all are in patches, rounded down to whole patches, but one at least.
            patch_size: side of the square patches, 1 for none. A patch lies within one level and holds no masked pixel,
                and its pixels follow each other row by row.
            generator: source of randomness, on the device of the pyramid; the global one if None.
            photos: all pixels of a draw come from so many photos that follow each other in the buffer; 0: from all.
                Photos of the same size have the same chance.
            patch_share: share of the pixels that are drawn in patches, which come first; to the nearest whole number of
                patches, one at least unless the share is 0. The others are drawn singly.

        Raises:
            ValueError: no valid pixel (or patch) was found.
        """
        patches = _num_patches(num_rays, patch_size, patch_share)
        patch_rays = patches * patch_size**2
        singles = 0 if patches and patch_share == 1 else max(0, num_rays - patch_rays)
        window = _Window(0, self.num_pixels, 0.0, 1.0)
        if 0 < photos < len(self._first) - 1:
            middle = self._accepted(self._uniform, 1, patch_size if patches else 1, generator, window)
            window = self._window(middle, photos)
        parts = []
        if patches:
            parts.append(self._patch_pixels(self._draw_corners(patches, patch_size, generator, window), patch_size))
        if singles:
            parts.append(self._draw_corners(singles, 1, generator, window))
        flat = torch.cat(parts)
        segment = self._segment(flat)
        local = flat - self.start[segment]
        width = self.width[segment]
        row = torch.div(local, width, rounding_mode="floor")
        photo = self.photo[segment]
        return PixelDraw(
            photo=photo,
            level=self.level[segment],
            row=row,
            column=local - row * width,
            segment=segment,
            local=local,
            image=self.pixels[flat],
            depth=None if self.depth is None else self.depth.at(flat, photo),
            patch_rays=patch_rays,
        )

    def _patch_pixels(self, corners: Int[Tensor, "n"], patch_size: int) -> Int[Tensor, "r"]:
        """The pixels of patches, row by row, from their upper left ones."""
        steps = torch.arange(patch_size, device=corners.device)
        width = self.width[self._segment(corners)]
        return (corners[:, None, None] + steps[:, None] * width[:, None, None] + steps).reshape(-1)

    def _segment(self, flat: Int[Tensor, "r"]) -> Int[Tensor, "r"]:
        return torch.searchsorted(self.start, flat, right=True) - 1

    def _window(self, pixel: Int[Tensor, "1"], photos: int) -> _Window:
        """So many photos around the one of a pixel."""
        count = len(self._first) - 1
        middle = int(torch.searchsorted(self._first, self._segment(pixel).cpu(), right=True)) - 1
        begin = (middle - photos // 2) % count
        bounds = [int(self._first[begin]), int(self._first[(begin + photos) % count])]
        pixel, end = (int(self.start[segment]) for segment in bounds)
        chance, end_chance = (float(self.level_cdf[segment - 1]) if segment else 0.0 for segment in bounds)
        return _Window(pixel, (end - pixel) % self.num_pixels, chance, (end_chance - chance) % 1)

    def _draw_corners(
        self, count: int, patch_size: int, generator: torch.Generator | None, window: _Window
    ) -> Int[Tensor, "n"]:
        """Flat indices of pixels (upper left pixels of patches) that are valid."""
        share = self.level_share * count
        by_level = round(share)
        if patch_size > 1 and share % 1:  # patches are few: rounded, the share could be none or all of them every time
            by_level = int(share + float(torch.rand((), generator=generator, device=self.start.device)))
        parts = [(self._uniform, count - by_level), (self._uniform_over_levels, by_level)]
        return torch.cat(
            [self._accepted(draw, number, patch_size, generator, window) for draw, number in parts if number]
        )

    def _accepted(
        self, draw: _Draw, count: int, patch_size: int, generator: torch.Generator | None, window: _Window
    ) -> Int[Tensor, "n"]:
        """The first ``count`` draws that fit."""
        kept: list[Tensor] = []
        missing, tried, found = count, 0, 0
        for _ in range(_MAX_ROUNDS):
            # After a round with few hits the next one is as much larger.
            number = min(missing * max(1, tried // max(found, 1)), max(missing, _LARGEST_ROUND // patch_size**2))
            flat = draw(number, generator, window)
            flat = flat[self._fits(flat, patch_size)][:missing]
            kept.append(flat)
            missing, tried, found = missing - len(flat), tried + number, found + len(flat)
            if missing == 0:
                return kept[0] if len(kept) == 1 else torch.cat(kept)
        raise ValueError(f"no {patch_size} x {patch_size} patch of valid pixels found in {tried} draws")

    def _uniform(self, count: int, generator: torch.Generator | None, window: _Window) -> Int[Tensor, "n"]:
        """Any pixel, also masked ones unless most are masked."""
        device, few = self.start.device, self._few_valid
        if few is None:
            pick = torch.randint(window.pixels, (count,), generator=generator, device=device)
            return (window.pixel + pick) % self.num_pixels
        bounds = torch.tensor([window.pixel, window.pixel + window.pixels], device=device)
        wraps = bounds >= self.num_pixels
        first, end = (torch.searchsorted(few, bounds % self.num_pixels) + len(few) * wraps).tolist()
        pick = torch.randint(end - first, (count,), generator=generator, device=device)
        return few[(first + pick) % len(few)]

    def _uniform_over_levels(self, count: int, generator: torch.Generator | None, window: _Window) -> Int[Tensor, "n"]:
        """Any pixel, also masked ones, so that the valid ones among them are alike within a level and every level has
        the same number of them."""
        chance, place = torch.rand(2, count, dtype=torch.float64, generator=generator, device=self.start.device)
        chance = (window.chance + chance * window.chances) % 1
        segment = torch.searchsorted(self.level_cdf, chance, right=True).clamp(max=len(self.start) - 1)
        first, size = self.start[segment], (self.height * self.width)[segment]
        if self._few_valid is not None:
            first, end = torch.searchsorted(self._few_valid, torch.stack([first, first + size]))
            size = end - first
            return self._few_valid[first + (place * size).long().clamp(max=size - 1)]
        return first + (place * size).long().clamp(max=size - 1)

    def _fits(self, flat: Int[Tensor, "n"], patch_size: int) -> Bool[Tensor, "n"]:
        """Whether the pixel (the patch right and below it) is inside its level and valid."""
        if patch_size == 1:
            return torch.ones_like(flat, dtype=torch.bool) if self.valid is None else self.valid[flat]
        segment = self._segment(flat)
        local, width = flat - self.start[segment], self.width[segment]
        row = torch.div(local, width, rounding_mode="floor")
        fits = (row + patch_size <= self.height[segment]) & (local - row * width + patch_size <= width)
        if self.valid is not None:
            steps = torch.arange(patch_size, device=flat.device)
            inside = flat[:, None, None] + steps[:, None] * width[:, None, None] + steps
            fits &= self.valid[inside.clamp(max=self.num_pixels - 1)].all(dim=-1).all(dim=-1)
        return fits


def _num_patches(num_rays: int, patch_size: int, patch_share: float) -> int:
    """Whole patches among the rays; 0 where there are single pixels only."""
    if patch_size == 1 or patch_share == 0:
        return 0
    most = max(1, num_rays // patch_size**2)
    return min(most, max(1, round(patch_share * num_rays / patch_size**2)))


def level_mean(image: Float[Tensor, "h w c"], level: int) -> Float[Tensor, "h2 w2 c"]:
    """Block means of a float image, for the evaluation of one level; alpha-weighted with 4 channels, as
    :func:`downsample`."""
    if level == 0:
        return image
    height, width = image.shape[0] >> level, image.shape[1] >> level
    blocks = image[: height << level, : width << level].reshape(height, 1 << level, width, 1 << level, -1)
    if image.shape[2] != 4:
        return blocks.mean(dim=(1, 3))
    alpha = blocks[..., 3:]
    colour = (blocks[..., :3] * alpha).mean(dim=(1, 3)) / alpha.mean(dim=(1, 3)).clamp(min=1e-6)
    return torch.cat([colour, alpha.mean(dim=(1, 3))], dim=-1)
