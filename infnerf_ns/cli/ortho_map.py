"""Making a map: its tiles are rendered one by one and kept, then its files are written from them, strip by strip."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infnerf_ns.cli.ortho_tiles import Tile, TileFolder
from infnerf_ns.cli.raster_files import Content, raster_writer, world_file, world_file_path
from infnerf_ns.cli.raster_grid import RasterGrid, Window
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import write_whole_file
from infnerf_ns.training.stopping import kept

_BYTES = {"rgb": 4, "height": 4}
"""Per pixel."""
_WITH_OVERVIEWS = 4 / 3
_SPARE_BYTES = 64 << 20


class TileSource(Protocol):
    """Where the pixels come from."""

    def __call__(self, window: Window) -> Tile:
        """The pixels of a window."""
        ...

    def expect(self, window: Window) -> None:
        """Told which window will be asked for next."""
        ...


@dataclass(frozen=True)
class Map:
    """A map to make."""

    grid: RasterGrid
    """its pixels"""
    targets: dict[Content, Path]
    """files to write by their contents, at least one"""
    crs: Optional[str] = None
    """coordinate reference system; None: a local frame"""
    tile: int = 512
    """side of a tile in pixels"""

    def make(self, source: TileSource, tiles: TileFolder, *, anew: bool) -> None:
        """Renders the tiles that are not there yet, writes the files, and drops the tiles. The files appear under their
        names when all of them are complete.

        Args:
            source: of the pixels.
            tiles: where finished tiles are kept.
            anew: kept tiles of other settings are thrown away.

        Raises:
            InputError: something cannot be written; finished tiles are kept.
        """
        try:
            self._require_space(tiles)
            tiles.begin(anew=anew)
            with kept("finished tiles are kept, the same command goes on with them"), _progress() as progress:
                self._render(source, tiles, progress)
                self._write_all(tiles, progress)
        except OSError as error:
            raise InputError(
                f"{error.filename or tiles.path.parent} cannot be written ({error.strerror or error}): make room, or"
                " choose another folder; finished tiles are kept, the same command goes on with them"
            ) from error
        tiles.remove()

    def _require_space(self, tiles: TileFolder) -> None:
        """For the tiles and the files, as large as they can become, on each disk that some of them go to."""
        pixels = self.grid.width * self.grid.height
        parts = [(tiles.path.parent, -tiles.kept_bytes())]
        for content, path in self.targets.items():
            parts += [(tiles.path.parent, _BYTES[content] * pixels)]
            parts += [(path.parent, int(_BYTES[content] * pixels * _WITH_OVERVIEWS))]
        needed: Counter[int] = Counter()
        for folder, size in parts:
            folder.mkdir(parents=True, exist_ok=True)
            needed[_disk(folder)] += size
        for folder in dict(parts):
            here, free = needed[_disk(folder)] + _SPARE_BYTES, shutil.disk_usage(folder).free
            if here > free:
                raise InputError(
                    f"{self.grid.width} x {self.grid.height} pixels need up to {here / 2**30:.1f} GiB, but {folder}"
                    f" has {free / 2**30:.1f} GiB free: make room, choose another folder or a larger --gsd"
                )

    def _render(self, source: TileSource, tiles: TileFolder, progress: Progress) -> None:
        windows = self.grid.windows(self.tile)
        missing = [window for window in windows if tiles.load(window) is None]
        kept = len(windows) - len(missing)
        if kept:
            print(f"infnerf: going on with {kept} of {len(windows)} tiles from {tiles.path}")
        task = progress.add_task("Rendering tiles", total=len(windows), completed=kept)
        for number, window in enumerate(missing):
            tile = source(window)
            for following in missing[number + 1 : number + 2]:
                source.expect(following)
            tiles.save(window, tile)
            progress.advance(task)

    def _write_all(self, tiles: TileFolder, progress: Progress) -> None:
        drafts = {path: path.with_name(f".{path.name}.unfinished") for path in self.targets.values()}
        try:
            for content, path in self.targets.items():
                self._write(content, path, drafts[path], tiles, progress)
            for path, draft in drafts.items():
                if path.suffix.lower() == ".png":
                    write_whole_file(world_file_path(path), world_file(self.grid).encode())
                draft.replace(path)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)

    def _write(self, content: Content, path: Path, draft: Path, tiles: TileFolder, progress: Progress) -> None:
        strips: dict[int, list[Window]] = {}
        for window in self.grid.windows(self.tile):
            strips.setdefault(window.row, []).append(window)
        with raster_writer(draft, path, content, self.grid, self.crs) as writer:
            for row, windows in progress.track(strips.items(), description=f"Writing {path.name}"):
                parts = [_finished(tiles, window)[content] for window in sorted(windows)]
                writer.write(row, np.concatenate(parts, axis=1))


def _disk(folder: Path) -> int:
    return folder.stat().st_dev


def _finished(tiles: TileFolder, window: Window) -> Tile:
    tile = tiles.load(window)
    if tile is None:
        raise InputError(f"{tiles.path}: a tile has gone or was damaged; the same command renders it again")
    return tile


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
