"""Which COLMAP model a capture means, where there are several.

COLMAP's mapper starts a new model where photos do not connect, and numbers them as they come: ``sparse/0`` need not be
the one that shows the scene. Beside the binary files that it writes may lie text files of an earlier state.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from infnerf_ns.data.capture.colmap_files import Format, count_images, read_images
from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn

USUAL_PLACES = ("colmap/sparse/0", "sparse/0", "colmap/sparse", "sparse", "colmap/0", "colmap", ".")
"""Where models lie, below a capture's folder."""
_TOGETHER = 2.0
"""Seconds between the times of files that were written together; archives keep times to two seconds."""
_SAME = 1e-5
"""Difference between the poses of binary and text files, which have 17 digits or a few less."""


class ModelFiles(NamedTuple):
    """A model on disk."""

    folder: Path
    kind: Format


def find_model(data: Path, place: Path) -> ModelFiles:
    """The model that is meant by ``--colmap-path``.

    Where that folder has no model, the usual places are tried. Of numbered neighbours of a model ``0`` the one with
    most photos is taken (a higher number that was asked for is taken as it is). Everything that is not what was asked
    for is said in the log.

    Args:
        data: the capture's folder.
        place: ``colmap_path``, relative to it or absolute.

    Raises:
        InputError: there is no model.
    """
    named = data / place
    tried = dict.fromkeys([named, *(data / usual for usual in USUAL_PLACES)])
    found = next((folder for folder in tried if _kinds(folder) or _numbered(folder)), None)
    if found is None:
        raise InputError(
            f"{named} has no COLMAP model (cameras, images and points3D as .bin or .txt), nor have the usual places"
            f" below {data}: give --colmap-path after colmap"
        )
    folder = found
    if not _kinds(found):
        folder = _largest(_numbered(found))
    elif found.name == "0":
        folder = _largest(_numbered(found.parent))
    if folder != named:
        warn(
            f"the COLMAP model {folder} is used instead of {named}, "
            + (
                f"which has fewer photos ({_photos(named)}, not {_photos(folder)}); to train that one, move the others"
                " away"
                if _kinds(named)
                else "where there is none"
            )
        )
    return ModelFiles(folder, _choose_kind(folder))


def _kinds(folder: Path) -> list[Format]:
    """The formats in which a folder has a model, binary first as COLMAP reads it."""
    return [
        kind
        for kind in ("bin", "txt")
        if (folder / f"cameras.{kind}").is_file() and (folder / f"images.{kind}").is_file()
    ]  # type: ignore[return-value]


def _numbered(folder: Path) -> list[Path]:
    """The models that COLMAP's mapper has numbered in a folder."""
    if not folder.is_dir():
        return []
    return sorted((child for child in folder.iterdir() if child.name.isdigit() and _kinds(child)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name)


def _photos(folder: Path) -> int:
    return count_images(folder, _kinds(folder)[0])


def _largest(folders: list[Path]) -> Path:
    return max(folders, key=lambda folder: (_photos(folder), -_number(folder)))


def _choose_kind(folder: Path) -> Format:
    """Binary or text, where a folder has both: the complete one, else, where they differ, the newer one."""
    kinds = _kinds(folder)
    if len(kinds) == 1:
        return kinds[0]
    complete = [kind for kind in kinds if (folder / f"points3D.{kind}").is_file()]
    if len(complete) == 1:
        chosen, why = complete[0], "are complete"
    else:
        age = {kind: (folder / f"images.{kind}").stat().st_mtime for kind in kinds}
        chosen = "txt" if age["txt"] > age["bin"] + _TOGETHER else "bin"
        why = "are newer" if abs(age["txt"] - age["bin"]) > _TOGETHER else "are what COLMAP reads first"
    if not _same(folder):
        warn(
            f"{folder} has binary and text files of different models; the .{chosen} files are used, as"
            f" they {why}: delete the others"
        )
    return chosen


def _same(folder: Path) -> bool:
    """Whether the binary and text files of a folder have the same photos and poses."""
    try:
        binary, text = ({image.name: image for image in read_images(folder, kind)} for kind in ("bin", "txt"))
    except InputError:  # one of them is damaged; if it is the one that is used, its reader says so
        return False
    if binary.keys() != text.keys():
        return False
    return all(
        np.allclose(binary[name].camera_to_world, text[name].camera_to_world, rtol=_SAME, atol=_SAME) for name in binary
    )
