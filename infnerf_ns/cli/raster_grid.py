"""The pixels of a map: where they lie, the tiles they are made in, and the parallel rays that look down on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle

from infnerf_ns.map_frame import MapFrame
from infnerf_ns.sampler import ORTHOGRAPHIC_FOOTPRINT

_STAND_OFF = 8.0
"""Rays begin that many times their length above what they look at: the sampler spaces the first round by the logarithm
of the distance, which over such a range is nearly even."""


class Window(NamedTuple):
    """A rectangle of pixels."""

    column: int
    row: int
    width: int
    """pixels"""
    height: int
    """pixels"""

    def halves(self) -> tuple[Window, Window]:
        """Its parts left and right, or above and below, of the middle of its longer side."""
        column, row, width, height = self
        if width >= height:
            half = width // 2
            return Window(column, row, half, height), Window(column + half, row, width - half, height)
        half = height // 2
        return Window(column, row, width, half), Window(column, row + half, width, height - half)


@dataclass(frozen=True)
class RasterGrid:
    """Square pixels, the first row in the north; all lengths in map units."""

    west: float
    """left edge"""
    north: float
    """upper edge"""
    gsd: float
    """side of a pixel on the ground"""
    width: int
    """columns"""
    height: int
    """rows"""

    @staticmethod
    def covering(bounds: tuple[float, float, float, float], gsd: float, *, snapped: bool) -> RasterGrid:
        """The grid over bounds (xmin, ymin, xmax, ymax).

        Args:
            bounds: the west and the north edge are kept, the others move out to whole pixels.
            gsd: side of a pixel.
            snapped: all edges move out to multiples of it instead, so that maps of the same gsd lie on the same grid.
        """
        west, south, east, north = bounds
        if snapped:
            west, north = math.floor(west / gsd) * gsd, math.ceil(north / gsd) * gsd
        # A thousandth of a pixel is rounding, not content.
        columns, rows = (math.ceil(length / gsd - 1e-3) for length in (east - west, north - south))
        return RasterGrid(west, north, gsd, max(columns, 1), max(rows, 1))

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """xmin, ymin, xmax, ymax."""
        return self.west, self.north - self.height * self.gsd, self.west + self.width * self.gsd, self.north

    def centers(self, window: Window) -> Float[np.ndarray, "h w 2"]:
        """Map coordinates of the middles of a window's pixels."""
        x = self.west + self.gsd * (window.column + np.arange(window.width) + 0.5)
        y = self.north - self.gsd * (window.row + np.arange(window.height) + 0.5)
        return np.stack(np.meshgrid(x, y), axis=-1)

    def windows(self, side: int) -> list[Window]:
        """The tiles, row by row, every other row from the east: one always touches the one before, whose nodes are in
        memory."""
        tiles = []
        for number, row in enumerate(range(0, self.height, side)):
            columns = range(0, self.width, side)
            for column in columns if number % 2 == 0 else reversed(columns):
                tiles.append(Window(column, row, min(side, self.width - column), min(side, self.height - row)))
        return tiles


@dataclass(frozen=True)
class ParallelRays:
    """Rays straight down through the pixels of a grid."""

    grid: RasterGrid
    """whose pixels they pass"""
    frame: MapFrame
    """between map and world"""
    top: float
    """height at which they begin to see, map units"""
    bottom: float
    """height at which they end, map units"""
    least_near: float
    """no near plane is below it, scene units"""

    @property
    def near(self) -> float:
        """Distance from their origins to the top, scene units."""
        return max(_STAND_OFF * (self.top - self.bottom) / self.frame.unit, self.least_near)

    def bundle(self, window: Window, device: torch.device | str) -> RayBundle:
        """The rays [h, w] of a window."""
        center = self.grid.centers(window)
        start = np.full_like(center[..., :1], self.top + self.near * self.frame.unit)
        origins = self.frame.to_scene(np.concatenate([center, start], axis=-1))
        origins = torch.from_numpy(origins).to(device, torch.float32)
        directions = torch.from_numpy(-self.frame.axes[2]).to(origins).expand_as(origins).contiguous()
        one = torch.ones_like(origins[..., :1])
        return RayBundle(
            origins=origins,
            directions=directions,
            pixel_area=0 * one,
            nears=self.near * one,
            fars=(self.near + (self.top - self.bottom) / self.frame.unit) * one,
            metadata={ORTHOGRAPHIC_FOOTPRINT: self.grid.gsd / self.frame.unit / 2 * one},
        )

    def heights(self, distances: Float[np.ndarray, "*bs"]) -> Float[np.ndarray, "*bs"]:
        """Map heights of places on the rays.

        Args:
            distances: from their origins, scene units.
        """
        return self.top - (distances.astype(np.float64) - self.near) * self.frame.unit
