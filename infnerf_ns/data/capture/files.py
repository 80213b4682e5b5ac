"""Where the files are that a capture names: forgiving about how paths are written, never about which file is meant."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path

PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
"""Endings that are tried where a capture names a photo without one, as NeRF-Synthetic and Instant-NGP do."""


def slashes(name: str) -> str:
    """A path with forward slashes: captures made on Windows have backslashes, which name no folder elsewhere."""
    return name if "/" in name else name.replace("\\", "/")


def find_file(folder: Path, name: str, endings: tuple[str, ...] = ()) -> Path:
    """The file that a capture means by a name.

    Tried in this order: the name itself; the name with other capitals (cameras write .JPG, tools .jpg) or other code
    points of the same letters (archives from macOS), if one file has it; the name with one of ``endings`` added; all of
    it with backslashes for slashes.

    Args:
        folder: that the name is relative to.
        name: of a file, relative or absolute, with either slash.
        endings: to add.

    Returns:
        The file's path, or ``folder / name`` where there is none: whoever opens it says that it is missing.
    """
    wanted = folder / slashes(name)
    if wanted.is_file():
        return wanted
    for candidate in (wanted, *(wanted.with_name(wanted.name + ending) for ending in endings)):
        if candidate.is_file():
            return candidate
        alike = _by_lower_name(candidate.parent).get(_lower(candidate.name), ())
        if len(alike) == 1:
            return candidate.parent / alike[0]
    if "\\" in slashes(name):  # beside slashes: some programs on Windows write both
        found = find_file(folder, name.replace("\\", "/"), endings)
        return found if found.is_file() else wanted
    return wanted


def _lower(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()


@lru_cache(maxsize=64)
def _by_lower_name(folder: Path) -> dict[str, tuple[str, ...]]:
    """The names in a folder, by their lower-case form."""
    names: dict[str, tuple[str, ...]] = {}
    try:
        for entry in folder.iterdir():
            key = _lower(entry.name)
            names[key] = (*names.get(key, ()), entry.name)
    except OSError:
        pass
    return names
