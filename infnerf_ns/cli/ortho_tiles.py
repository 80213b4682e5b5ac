"""The finished tiles of a map under way: a folder beside the output, from which an interrupted run goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from infnerf_ns.cli.raster_grid import Window
from infnerf_ns.errors import InputError

_SETTINGS = "settings.json"
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Tile = dict[str, np.ndarray]
"""By content: ``rgb`` uint8 [h, w, 4], ``height`` float32 [h, w]."""


class TileFolder:
    """One compressed file with checksums per tile. A file appears under its name only when it is complete.

    Args:
        output: the map; the folder is ``.NAME.tiles`` beside it.
        settings: what the pixels depend on, as JSON knows it.
    """

    def __init__(self, output: Path, settings: dict) -> None:
        self.path = output.with_name(f".{output.name}.tiles")
        self._settings = json.loads(json.dumps(settings))

    def begin(self, *, anew: bool) -> None:
        """Makes the folder, or goes on with the one that is there.

        Args:
            anew: tiles of other settings are thrown away.

        Raises:
            InputError: there are tiles of other settings.
            OSError: it cannot be written.
        """
        if self.path.exists():
            different = self._different()
            if different and not anew:
                raise InputError(
                    f"{self.path} holds tiles that were made with another {', '.join(different)}: give the same options"
                    " to go on with them, or --overwrite to start anew"
                )
            if different:
                shutil.rmtree(self.path)
        if not self.path.exists():
            draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            draft.mkdir(parents=True)
            (draft / _SETTINGS).write_text(json.dumps(self._settings, indent=1), encoding="utf-8")
            draft.rename(self.path)

    def _different(self) -> list[str]:
        """Names of the settings that the tiles there were not made with."""
        try:
            there = dict(json.loads((self.path / _SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return ["or unknown settings"]
        return sorted(name for name in there | self._settings if there.get(name) != self._settings.get(name))

    def _file(self, window: Window) -> Path:
        return self.path / f"{window.row}_{window.column}.npz"

    def load(self, window: Window) -> Tile | None:
        """A tile; None: it is not there, or damaged."""
        try:
            with np.load(self._file(window), allow_pickle=False) as arrays:
                tile = {name: arrays[name] for name in arrays.files}
        except _DAMAGED:
            return None
        return tile if all(array.shape[:2] == (window.height, window.width) for array in tile.values()) else None

    def save(self, window: Window, tile: Tile) -> None:
        """Keeps a tile."""
        file = self._file(window)
        draft = file.with_suffix(f".{os.getpid()}.unfinished")
        packed = io.BytesIO()
        np.savez_compressed(packed, **tile)
        try:
            draft.write_bytes(packed.getbuffer())
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)

    def kept_bytes(self) -> int:
        """Of all tiles there."""
        return sum(file.stat().st_size for file in self.path.glob("*.npz")) if self.path.exists() else 0

    def remove(self) -> None:
        """Throws all tiles away."""
        shutil.rmtree(self.path, ignore_errors=True)
