"""Cameras that come from outside: the files of nerfstudio's camera paths, and what can be drawn at all.

Format: what nerfstudio's viewer and its Blender add-on write and `nerfstudio.cameras.camera_paths.get_path_from_json`
reads, https://docs.nerf.studio/quickstart/viewer_quickstart.html.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file
from infnerf_ns.validation import shortened

_LARGEST_SIDE = 65535
"""Pixels; of a JPEG."""
_LENSES = ("perspective", "fisheye")
_KINDS = (*_LENSES, "equirectangular", "omnidirectional", "vr180")
"""That nerfstudio draws; it takes any other for perspective, in silence."""


def read_camera_path(path: Path, flag: str) -> dict[str, Any]:
    """The content of a camera path's file, which nerfstudio can draw.

    Args:
        path: of the file.
        flag: by which the user has named it.

    Raises:
        InputError: it cannot be read, or something in it is missing, of another kind or no number.
    """
    require_regular_file(path, flag)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(content)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path}: is not JSON ({shortened(str(error))}); export it from the viewer") from None
    if problem is not None:
        raise InputError(f"{flag} {path}: {problem}")
    return content


def drawable(camera: Cameras) -> Cameras:
    """A camera as it can be drawn: with poses that are no whole numbers, as they are where a camera path has none.

    Args:
        camera: one or several; stays as it is.

    Raises:
        InputError: it has no pixels, or its pose or lens is not finite.
    """
    if not camera.camera_to_worlds.is_floating_point():
        camera = copy.copy(camera)
        camera.camera_to_worlds = camera.camera_to_worlds.float()
    width, height = int(camera.width.min()), int(camera.height.min())
    if min(width, height) < 1:
        raise InputError(f"a camera of {width} x {height} pixels cannot be drawn: give it at least one each way")
    lens = [value for value in (camera.fx, camera.fy, camera.cx, camera.cy) if value is not None]
    if not all(bool(torch.isfinite(value).all()) for value in (camera.camera_to_worlds, *lens)):
        raise InputError("a camera whose pose or focal length is no finite number cannot be drawn: correct its file")
    return camera


def _problem(content: Any) -> str | None:
    """What is wrong with a camera path, None if nothing is."""
    if not isinstance(content, dict) or not isinstance(content.get("camera_path"), list):
        return "cannot be read as a camera path; export it from the viewer"
    for key in ("render_width", "render_height"):
        if not _is_number(content.get(key)) or not 1 <= content[key] <= _LARGEST_SIDE:
            return f"{key} is {content.get(key)!r}: allowed is 1 to {_LARGEST_SIDE}"
    kind = content.get("camera_type", _LENSES[0])
    if not isinstance(kind, str) or kind.lower() not in _KINDS:
        maps = "; infnerf-ortho draws maps" if str(kind).lower().startswith("ortho") else ""
        return f"camera_type is {kind!r}, which nerfstudio would draw as perspective: use {', '.join(_KINDS)}{maps}"
    if kind.lower() in ("fisheye", "equirectangular") and kind != kind.lower():  # nerfstudio would not know it
        return f"camera_type is {kind!r}: write {kind.lower()!r}"
    if not content["camera_path"]:
        return "has no cameras: add keyframes in the viewer and export it again"
    if "seconds" in content and not (_is_number(content["seconds"]) and content["seconds"] > 0):
        return f"seconds is {content['seconds']!r}: allowed is a number above 0"
    for number, camera in enumerate(content["camera_path"]):
        problem = _camera_problem(camera, kind.lower())
        if problem is not None:
            return f"camera {number}: {problem}"
    crop = content.get("crop")
    return None if crop is None else _crop_problem(crop)


def _camera_problem(camera: Any, kind: str) -> str | None:
    pose = _flat(camera.get("camera_to_world")) if isinstance(camera, dict) else None
    if pose is None or len(pose) != 16 or not all(map(_is_number, pose)):
        return "camera_to_world must be 16 finite numbers, row by row"
    if kind in _LENSES and not (_is_number(camera.get("fov")) and 0 < camera["fov"] < 180):
        return f"fov is {camera.get('fov')!r}: allowed is a number of degrees between 0 and 180"
    return None


def _crop_problem(crop: Any) -> str | None:
    if not isinstance(crop, dict):
        return "crop must be a section with crop_center, crop_scale, crop_rot and crop_bg_color"
    for key in ("crop_center", "crop_scale", "crop_rot"):
        values = crop.get(key, [0.0, 0.0, 0.0] if key == "crop_rot" else None)
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            return f"{key} must be three finite numbers"
        # Whole numbers become tensors of whole numbers, which nerfstudio's rotations and boxes cannot compute with.
        if key == "crop_rot" and any(isinstance(value, int) for value in values):
            return f"{key} {values}: nerfstudio cannot read whole numbers here, write {list(map(float, values))}"
        if all(isinstance(value, int) for value in values):
            return f"{key} {values}: nerfstudio cannot read whole numbers alone here, write {list(map(float, values))}"
    color = crop.get("crop_bg_color")
    if not isinstance(color, dict) or not all(_is_number(color.get(channel)) for channel in "rgb"):
        return "crop_bg_color must have the numbers r, g and b, 0 to 255"
    return None


def _flat(values: Any) -> list[Any] | None:
    """The numbers of a list, or of one of rows of equal length."""
    if not isinstance(values, list):
        return None
    rows = [row for row in values if isinstance(row, list)]
    if not rows:
        return values
    if len(rows) < len(values) or len({len(row) for row in rows}) > 1:
        return None
    return [each for row in rows for each in row]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
