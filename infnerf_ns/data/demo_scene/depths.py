"""Depth images of the demo scene, made on demand: the folder ``depth`` beside the photos, complete or not there at all.

They need the geometry only, so a scene whose photos exist gets them in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from infnerf_ns.data.demo_scene.cache import DemoScene, fingerprint, load_or_make
from infnerf_ns.data.demo_scene.photographer import Photographer
from infnerf_ns.data.demo_scene.raycaster import make_raycaster
from infnerf_ns.data.demo_scene.town import build_town
from infnerf_ns.data.thread_pool import threads

FORMAT = 1
"""Raised whenever the same scene gives other depth images."""
_RECORD = "depth.json"


def load_or_generate_depths(scene: DemoScene) -> list[Path]:
    """The depth images of all photos, made first if they are missing or damaged.

    Returns:
        ``.npy`` files [H, W] float16: depths along the viewing axis in metres, 0 = sky.

    Raises:
        InputError: the scene's folder cannot be written.
    """
    folder = scene.photos[0].parent / "depth"
    return load_or_make(folder, lambda: _load(folder), lambda draft: _generate(scene, draft))


def _generate(scene: DemoScene, folder: Path) -> None:
    options = scene.options
    town = build_town(options.size, options.seed)
    photographer = Photographer(town, make_raycaster(town.mesh.corners), options.lens, options.supersampling)

    def measure(photo: int) -> dict:
        path = folder / f"{scene.photos[photo].stem}.npy"
        np.save(path, photographer.depth(scene.poses[photo]).astype(np.float16))
        return {"name": path.name, **fingerprint(path)}

    everything = range(len(scene.photos))
    with threads() as pool:
        title = "Measuring the depth of the demo town"
        depths = list(track(pool.map(measure, everything), title, total=len(everything), console=CONSOLE))
    (folder / _RECORD).write_text(json.dumps({"format": FORMAT, "depths": depths}, indent=1))


def _load(folder: Path) -> list[Path] | None:
    """The files if they are there, complete and undamaged."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        if record["format"] != FORMAT:
            return None
        for expected in record["depths"]:
            if fingerprint(folder / expected["name"]) != {name: expected[name] for name in ("bytes", "crc32")}:
                return None
        return [folder / expected["name"] for expected in record["depths"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
