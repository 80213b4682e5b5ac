"""The demo scene on disk: made once, complete or not there at all, checked on every use.

A folder per set of options holds ``scene.json`` (options, photo names, sizes and checksums), ``scene.npz`` (cameras and
points) and the photos. It is made under another name beside it and renamed when complete. Of two processes
that make the same scene at once, the second to finish drops its own.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float32
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import track

from infnerf_ns.data.demo_scene.flight import natural_count
from infnerf_ns.data.demo_scene.photographer import Lens, Photographer
from infnerf_ns.data.demo_scene.points import SurfacePoints
from infnerf_ns.data.demo_scene.survey import Survey
from infnerf_ns.data.thread_pool import threads
from infnerf_ns.errors import InputError

_ABANDONED = 3600.0
"""Seconds without a change after which a draft is of a process that was killed."""
FORMAT = 2
"""Raised whenever the same options give another scene."""
_FOCAL_PER_WIDTH = 0.5 / np.tan(np.radians(30))
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class DemoSceneOptions:
    """What a scene depends on."""

    size: int
    seed: int = 0
    num_photos: int = 0
    width: int = 320
    height: int = 240
    supersampling: int = 4

    def __post_init__(self) -> None:
        if not self.num_photos:
            object.__setattr__(self, "num_photos", natural_count(self.size))

    @property
    def lens(self) -> Lens:
        """60 degrees across the width."""
        return Lens(self.width, self.height, float(self.width * _FOCAL_PER_WIDTH))

    @property
    def folder_name(self) -> str:
        """Tells scenes apart in the cache."""
        return (
            f"town{self.size}-seed{self.seed}-{self.num_photos}photos-{self.width}x{self.height}"
            f"-ss{self.supersampling}-v{FORMAT}"
        )


@dataclass
class DemoScene:
    """A scene on disk. Metres, z up."""

    options: DemoSceneOptions
    photos: list[Path]
    poses: Float32[np.ndarray, "p 3 4"]
    """Camera to world, OpenGL axes."""
    look_distance: Float32[np.ndarray, "p"]
    """From each camera to the surface in the middle of its photo."""
    points: SurfacePoints


def load_or_generate(options: DemoSceneOptions, cache_dir: Path) -> DemoScene:
    """The scene from the cache, made there first if it is missing or damaged.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_dir / options.folder_name
    return load_or_make(folder, lambda: _load(options, folder), lambda draft: _generate(options, draft))


def load_or_make(folder: Path, load: Callable[[], _Content | None], make: Callable[[Path], None]) -> _Content:
    """What a folder holds, made there first if it is missing or damaged.

    Args:
        folder: the folder.
        load: what it holds; None if it is not there, incomplete or damaged.
        make: writes it into another folder, which is empty.

    Raises:
        InputError: the folder cannot be written.
    """
    content = load()
    if content is not None:
        return content
    if folder.exists():
        CONSOLE.log(f"[yellow]infnerf-demo: {folder} is incomplete or damaged and is made again")
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    _remove_abandoned(folder)
    try:
        draft.mkdir(parents=True)
        make(draft)
        content = _publish(load, draft, folder)
    except OSError as error:
        raise InputError(
            f"cannot write the demo scene into {folder.parent} ({error.strerror or error}): "
            "free some space there or choose another folder with --cache-dir"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return content


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes have left of this folder: drafts in which nothing has changed for an hour. One of a
    process that is still at work is younger: it writes a photo every few seconds."""
    for draft in folder.parent.glob(f".{folder.name}.*"):
        try:
            latest = max((each.lstat().st_mtime for each in (draft, *draft.iterdir())), default=0.0)
        except OSError:  # gone meanwhile, or not ours to look at
            continue
        if re.fullmatch(r"[0-9a-f]{32}", draft.name.rpartition(".")[2]) and time.time() - latest > _ABANDONED:
            shutil.rmtree(draft, ignore_errors=True)


def _publish(load: Callable[[], _Content | None], draft: Path, folder: Path) -> _Content:
    """Rename the finished draft to its place; where a good one has come there meanwhile, take that one."""
    for _ in range(3):
        content = load()
        if content is not None:
            return content
        if folder.exists():
            damaged = draft.with_name(f".{uuid.uuid4().hex}.damaged")
            try:
                folder.rename(damaged)
            except FileNotFoundError:
                pass
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    content = load()
    if content is None:
        raise OSError(f"{folder} keeps changing")
    return content


def _generate(options: DemoSceneOptions, folder: Path) -> None:
    survey = Survey(options.size, options.seed, options.num_photos, options.lens)
    photographer = Photographer(survey.town, survey.rays, options.lens, options.supersampling)

    def take(i: int):
        photo = photographer.photo(survey.poses[i])
        path = folder / f"{i:05d}.png"
        Image.fromarray(photo).save(path)
        picked = survey.pick(i)
        return {"name": path.name, **fingerprint(path)}, picked, photo[picked.row, picked.column]

    everything = range(options.num_photos)
    title = f"Photographing the demo town ({len(survey.town.mesh.corners)} triangles)"
    with threads() as pool:
        taken = list(track(pool.map(take, everything), title, total=len(everything), console=CONSOLE))
        photos, picked, rgb = (list(column) for column in zip(*taken))
        points = survey.points(picked, rgb, pool)
    np.savez(folder / "scene.npz", poses=survey.poses, look_distance=survey.look_distance, **vars(points))
    arrays = fingerprint(folder / "scene.npz")
    (folder / "scene.json").write_text(
        json.dumps({"format": FORMAT, "options": asdict(options), "arrays": arrays, "photos": photos}, indent=1)
    )


def fingerprint(path: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def _load(options: DemoSceneOptions, folder: Path) -> DemoScene | None:
    """The scene if it is there, complete and undamaged."""
    try:
        record = json.loads((folder / "scene.json").read_text())
        if record["format"] != FORMAT or record["options"] != asdict(options):
            return None
        files = [("scene.npz", record["arrays"]), *((p["name"], p) for p in record["photos"])]
        for name, expected in files:
            if fingerprint(folder / name) != {"bytes": expected["bytes"], "crc32": expected["crc32"]}:
                return None
        with np.load(folder / "scene.npz") as arrays:
            points = SurfacePoints(*(arrays[name] for name in ("xyz", "rgb", "source", "seen_point", "seen_photo")))
            poses, look_distance = arrays["poses"], arrays["look_distance"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return DemoScene(options, [folder / p["name"] for p in record["photos"]], poses, look_distance, points)
