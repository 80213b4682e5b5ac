"""``infnerf-ortho``: a true orthophoto of a trained run, and its digital surface model.

Every pixel looks straight down on its own, with the footprint of a ground pixel: walls do not lean, whatever their
height, and where nothing is hit the map is transparent. The map is rendered in tiles, each of which is kept as soon as
it is finished; neither the map nor, for a packed run, the octree has to fit into memory.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import numpy as np
import tyro
from jaxtyping import Float

from infnerf_ns.cli.command import Command, run_command
from infnerf_ns.cli.ortho_map import Map
from infnerf_ns.cli.ortho_render import TileRenderer, content_box
from infnerf_ns.cli.ortho_tiles import TileFolder
from infnerf_ns.cli.raster_files import Content, require_writable_kind, world_file_path
from infnerf_ns.cli.raster_grid import ParallelRays, RasterGrid
from infnerf_ns.cli.runs import open_run
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import TRANSFORMS, MapFrame, map_frame
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.regular_files import require_writable
from infnerf_ns.validation import Range, enforce, validate_config, warn

_LONGER_SIDE = 2048
_SMALLEST_PIXEL = 1e-8
"""Side of a pixel over the width of the scene, whose positions are single-precision numbers."""
_WIDEST = 1_000_000
"""A map's extent over the scene's: beyond it, float32 knows no pixels any more."""
_MOST_PIXELS = 2**40
"""Of a map: millions of tiles."""
_LARGE_PNG = 100_000_000
"""Pixels; many viewers refuse a larger PNG, and it has no overviews."""


@dataclass
class Ortho(Command):
    """A true orthophoto of a trained run, packed or not, as GeoTIFF or PNG, and its heights.

    Coordinates are those of the capture, in its unit (metres where it is georeferenced), with x east, y north and z up.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or its config.yml."""
    output: Optional[Path] = None
    """Orthophoto to write: .tif (GeoTIFF; needs the extra `geo`) or .png (with a world file, .pgw)."""
    heights: Optional[Path] = None
    """Digital surface model to write, .tif with heights as float32; comes at no cost beside --output."""
    gsd: Optional[float] = None
    """Side of a pixel on the ground, in the capture's unit. By default the longer side has 2048 pixels."""
    width: Optional[Annotated[int, Range(1, 10_000_000)]] = None
    """Columns of the map, instead of --gsd."""
    bounds: Optional[tuple[float, float, float, float]] = None
    """Extent of the map, xmin ymin xmax ymax; by default that of the middle 98 % of the SfM points in x and in y."""
    top: Optional[float] = None
    """Height at which the rays begin; lower it to look below what floats above the scene. By default a little above the
    highest SfM points."""
    bottom: Optional[float] = None
    """Height at which the rays end; by default well below the lowest SfM points."""
    crs: Optional[str] = None
    """Coordinate reference system of a georeferenced capture, for instance EPSG:32614."""
    origin: Annotated[tuple[float, float], Range(-1e10, 1e10)] = (0.0, 0.0)
    """Added to x and y; OpenDroneMap writes it into the second line of odm_georeferencing/coords.txt."""
    up: Literal["auto", "capture", "tree"] = "auto"
    """What is up: the capture's z axis or the octree's (the short axis of the scene); auto: the capture's, if it is
    within 15 degrees of the octree's."""
    tile: Annotated[int, Range(16, 2048)] = 512
    """Side of a tile in pixels."""
    overwrite: bool = False
    """Replace older outputs, and drop tiles that were made with other options."""

    def main(self) -> None:
        """Renders what is missing and writes the files."""
        self._check_options()
        targets = self._targets()
        pipeline, folder, checkpoint = open_run(self.run, test_mode="inference")
        model = pipeline.model
        frame = map_frame(folder, model.field.octree.cube.rotation[2].cpu().numpy(), self.up).shifted(self.origin)
        self._check_frame(frame, folder)
        low, high = content_box(model, frame)
        grid = self._grid(low, high)
        rays = self._rays(model, frame, grid, low, high)
        stat = checkpoint.stat()
        tiles = TileFolder(
            next(iter(targets.values())),
            {
                "checkpoint": [str(checkpoint.resolve()), stat.st_size, stat.st_mtime_ns],
                "configuration": zlib.crc32((folder / "config.yml").read_bytes()),
                "interval_footprint": model.config.sampler.interval_footprint,  # that of an older run is this version's
                "contents": sorted(targets),
                "frame": [frame.axes.tolist(), frame.zero.tolist(), frame.unit, *frame.shift],
                "bounds": grid.bounds,
                "gsd": grid.gsd,
                "top": rays.top,
                "bottom": rays.bottom,
                "tile": self.tile,
            },
        )
        _say_frame(frame, grid, model)
        if self.output is not None and self.output.suffix.lower() == ".png" and grid.width * grid.height > _LARGE_PNG:
            warn(f"{self.output}: many programs cannot show so large a PNG; a .tif is tiled and has overviews")
        plan = Map(grid, targets, self.crs, self.tile)
        plan.make(TileRenderer(model, rays, set(targets)), tiles, anew=self.overwrite)
        for path in targets.values():
            print(f"infnerf: wrote {path} ({grid.width} x {grid.height} pixels)")

    def _check_options(self) -> None:
        enforce(validate_config(self))
        for name in ("gsd", "bounds", "top", "bottom", "origin"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise InputError(f"--{name} {value}: give finite numbers")
        if self.gsd is not None and self.gsd <= 0:
            raise InputError(f"--gsd {self.gsd:g}: the side of a pixel must be above 0")
        if self.gsd is not None and self.width is not None:
            raise InputError("--gsd and --width both say how large a pixel is: give one of them")
        if self.bounds is not None and not (self.bounds[0] < self.bounds[2] and self.bounds[1] < self.bounds[3]):
            raise InputError(f"--bounds {' '.join(map(str, self.bounds))}: they are xmin ymin xmax ymax, min below max")

    def _targets(self) -> dict[Content, Path]:
        """The files to write by their contents, checked as far as can be without the model."""
        wanted: dict[Content, Optional[Path]] = {"rgb": self.output, "height": self.heights}
        flags = {"rgb": "--output", "height": "--heights"}
        targets = {content: path for content, path in wanted.items() if path is not None}
        if not targets:
            raise InputError("nothing to write: give --output ortho.tif (or .png), --heights dsm.tif, or both")
        if len(targets) == 2 and len({path.absolute() for path in targets.values()}) == 1:
            raise InputError(f"--output and --heights are both {self.output}: give two names")
        for content, path in targets.items():
            require_writable_kind(path, content, self.crs, flags[content])
            if path.is_dir():
                raise InputError(f"{flags[content]} {path} is a folder: give the name of a file")
            require_writable(flags[content], path)
            for written in (path, *([world_file_path(path)] if path.suffix.lower() == ".png" else [])):
                if os.path.lexists(written) and not self.overwrite:
                    raise InputError(
                        f"{flags[content]} {path}: {written} is there already: choose another name, or give --overwrite"
                    )
        return targets

    def _check_frame(self, frame: MapFrame, folder: Path) -> None:
        if self.crs is None and self.origin == (0.0, 0.0):
            return
        flag = "--crs" if self.crs is not None else "--origin"
        if not (folder / TRANSFORMS).exists():
            raise InputError(
                f"{flag}: {folder} has no {TRANSFORMS}, which leads back to the capture's coordinates: copy it from the"
                " run that ns-train wrote"
            )
        if not frame.is_capture:
            raise InputError(
                f"{flag}: the capture's z axis does not point up, so its"
                " coordinates are not those of a map; leave it away, or insist with --up capture"
            )

    def _grid(self, low: Float[np.ndarray, "3"], high: Float[np.ndarray, "3"]) -> RasterGrid:
        content = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
        west, south, east, north = bounds = content if self.bounds is None else self.bounds
        if west >= content[2] or east <= content[0] or south >= content[3] or north <= content[1]:
            raise InputError(
                f"--bounds {' '.join(map(str, bounds))}: the scene lies elsewhere, between"
                f" {' '.join(f'{edge:.6g}' for edge in content)}"
            )
        wide, deep = east - west, north - south
        if max(wide, deep) > _WIDEST * max(content[2] - content[0], content[3] - content[1]):
            raise InputError(
                f"--bounds {' '.join(map(str, bounds))}: that is more than {_WIDEST:,} times as wide as the scene"
            )
        if self.gsd is not None and self.gsd > max(wide, deep):
            raise InputError(f"--gsd {self.gsd:g}: one pixel would be larger than the map, {wide:.6g} x {deep:.6g}")
        side = self.gsd or (wide / self.width if self.width is not None else max(wide, deep) / _LONGER_SIDE)
        if not (wide / side) * (deep / side) <= _MOST_PIXELS:
            flag = f"--gsd {self.gsd:g}" if self.gsd is not None else f"--width {self.width}"
            raise InputError(
                f"{flag}: the map would have {wide / side:.3g} x {deep / side:.3g} pixels, which is too many;"
                " make the pixels larger, or the map smaller with --bounds"
            )
        if side < _SMALLEST_PIXEL * max(content[2] - content[0], content[3] - content[1]):
            flag = f"--gsd {self.gsd:g}" if self.gsd is not None else f"--bounds {' '.join(map(str, bounds))}"
            raise InputError(f"{flag}: a pixel would be {side:.3g} wide, less than the scene's numbers can tell apart")
        if self.gsd is not None:
            return RasterGrid.covering(bounds, self.gsd, snapped=self.bounds is None)
        if self.width is not None:
            return RasterGrid.covering(bounds, (east - west) / self.width, snapped=False)
        return RasterGrid.covering(bounds, max(east - west, north - south) / _LONGER_SIDE, snapped=False)

    def _rays(
        self, model: InfNeRFModel, frame: MapFrame, grid: RasterGrid, low: np.ndarray, high: np.ndarray
    ) -> ParallelRays:
        # Points at one height have no extent; what stands on a plain is lower than the plain is wide.
        extent = max(float(high[2] - low[2]), 1e-3 * float((high - low)[:2].max()))
        # Above the surface no photo looks down from everywhere, so floaters stay there; below, a pit may be deeper than
        # what structure from motion has found in it.
        top = float(high[2]) + 0.2 * extent if self.top is None else self.top
        bottom = float(low[2]) - 2 * extent if self.bottom is None else self.bottom
        for flag, height in (("top", top), ("bottom", bottom)):
            if abs(height - float(low[2])) > _WIDEST * extent:
                raise InputError(
                    f"--{flag} {height:g}: that is far from the scene, whose heights are {low[2]:.6g} to {high[2]:.6g}"
                )
        if not bottom < top:
            raise InputError(
                f"--top {top:g} is not above --bottom {bottom:g}: the scene's heights are {low[2]:.6g} to {high[2]:.6g}"
            )
        return ParallelRays(grid, frame, top, bottom, model.sampler.near)


def _say_frame(frame: MapFrame, grid: RasterGrid, model: InfNeRFModel) -> None:
    octree = model.field.octree
    kind = (
        "the capture's coordinates"
        if frame.is_capture
        else "the capture's unit and zero, turned so that z is up (its own z axis does not point up)"
    )
    edges = " ".join(f"{edge:.10g}" for edge in grid.bounds)
    print(
        f"infnerf: {grid.width} x {grid.height} pixels of {grid.gsd:.4g} (the finest nodes resolve"
        f" {octree.gsd(octree.depth) * frame.unit:.2g}); bounds {edges} in {kind}"
    )


def entrypoint() -> None:
    """The console script."""
    run_command(tyro.cli(Ortho))
