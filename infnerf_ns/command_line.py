"""What nerfstudio's own commands are asked to do with a run, checked before it is loaded.

ns-eval, ns-render, ns-export and ns-viewer hand a plugin the configuration of the run and, in the end, single cameras.
The rest, files and names included, they use by themselves, often after minutes and with a traceback. It stands on the
command line, where it is looked at here, when they ask for the checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infnerf_ns.arguments import flag_values
from infnerf_ns.camera_paths import read_camera_path
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_writable
from infnerf_ns.surroundings import say_disk_errors
from infnerf_ns.viewer_address import port_problem, require_guarded

_OUTPUTS = ("rgb", "accumulation", "expected_depth", "depth", "level", "node", "normals")
_PHOTOS = ("rgb", "mask", "depth_image")
"""Pictures in a batch of nerfstudio's data loaders; ``image`` is called ``rgb``."""
_DEFAULT_PATH = "camera_path.json"
_PLACES = ("output-path", "render-output-path", "output-dir")
_ABOVE_ZERO = ("downscale-factor", "interpolation-steps", "frame-rate", "seconds", "eval-num-rays-per-chunk")


def check_command(config: Any) -> None:
    """Ends with one line if this program is one of nerfstudio's commands and cannot do what it is asked to.

    Args:
        config: of the run.

    Raises:
        InputError: as it says.
    """
    program = Path(sys.argv[0]).stem if sys.argv else ""
    check = _CHECKS.get(program)
    if check is not None:
        say_disk_errors()
        for flag in _PLACES:
            place = _last(flag)
            if place is not None:
                require_writable(f"--{flag}", Path(place))
        check(config)


def _check_eval(config: Any) -> None:
    del config
    place = _last("output-path")
    if place is not None and Path(place).suffix != ".json":
        raise InputError(f"--output-path {place}: the metrics are a JSON file, write {Path(place) / 'eval.json'}")
    if place is not None and Path(place).is_dir():
        raise InputError(f"--output-path {place}: is a folder, write {Path(place) / 'eval.json'}")


def _check_viewer(config: Any) -> None:
    del config
    require_guarded(_last("vis") or "viewer")
    for name in ("websocket-port", "websocket-port-default"):
        port = _last(f"viewer.{name}")
        problem = port_problem(name, int(port)) if port is not None and port.lstrip("-").isdigit() else None
        if problem is not None:
            raise InputError(problem)


def _check_render(config: Any) -> None:
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    for flag in _ABOVE_ZERO:
        value = _last(flag)
        if value is not None and not _above_zero(value):
            raise InputError(f"--{flag} {value}: allowed is a finite number above 0")
    if command == "camera-path":
        path = Path(_last("camera-path-filename") or _DEFAULT_PATH)
        if "seconds" not in read_camera_path(path, "--camera-path-filename"):
            raise InputError(f"--camera-path-filename {path}: lacks the entry seconds, how long the video is")
    names = flag_values("rendered-output-names") or []
    own = [*output_names(config), "rgba"]
    more = [f"raw-{name}" for name in own] + [f"{kind}-{name}" for kind in ("gt", "raw-gt") for name in _PHOTOS]
    for name in names:
        if command != "dataset" or name not in more:
            also = " (also as raw-rgb ..., and gt-rgb for the photo)" if command == "dataset" else ""
            _require_output("rendered-output-names", name, own, also)
    pictures = command == "dataset" or _last("output-format") == "images"
    if "rgba" in names and len(names) > 1 and command != "dataset":
        raise InputError("--rendered-output-names rgba: it has no place beside others in one picture, render it alone")
    if "rgba" in names and not (pictures and _last("image-format") == "png"):
        kind = "--image-format png" if pictures else "--output-format images --image-format png"
        raise InputError(f"--rendered-output-names rgba: only PNG pictures can be transparent; add {kind}")


def _check_export(config: Any) -> None:
    for kind in ("rgb", "depth", "normal"):
        name = _last(f"{kind}-output-name")
        if name is not None:
            _require_output(f"{kind}-output-name", name, output_names(config))


_CHECKS: dict[str, Callable[[Any], None]] = {
    "ns-eval": _check_eval,
    "ns-viewer": _check_viewer,
    "ns-render": _check_render,
    "ns-export": _check_export,
}


def output_names(config: Any) -> list[str]:
    """What the model of a run renders in evaluation, see `InfNeRFModel.get_outputs`."""
    normals = getattr(config.pipeline.model, "render_normals", True)
    return [name for name in _OUTPUTS if normals or name != "normals"]


def _require_output(flag: str, name: str, allowed: Sequence[str], also: str = "") -> None:
    if name not in allowed:
        raise InputError(f"--{flag} {name}: the model has no such output, it has {', '.join(allowed)}{also}")


def _last(flag: str) -> str | None:
    values = flag_values(flag)
    return values[-1] if values else None


def _above_zero(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return True  # tyro's own error has said so
