"""A photo's lens: what a capture says of it, as nerfstudio's cameras have it.

nerfstudio takes intrinsics for all photos from the top of a ``transforms.json`` where they stand there, even if a photo
has its own, and knows one lens model per capture. Here a photo's own values go before those at the top, every photo has
its own model, and a model that nerfstudio does not know is taken where its parameters say that it is one that it does
know, else refused.

Lens models and the order of their parameters: COLMAP, ``src/colmap/sensor/models``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType

from infnerf_ns.errors import InputError

COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")
"""nerfstudio's distortion: four radial coefficients, two tangential ones, in the order of its tensors."""
UNDISTORT = "undistort the photos (colmap image_undistorter) and use the model that this writes"
_ZERO = ("k5", "k6", "omega", "k", "sx1", "sy1", "s0", "s1", "s2", "s3")
"""Parameters without a counterpart in nerfstudio: a lens can be taken only where they are 0."""
_SHORT = ("k", "omega")
"""Those whose names say too little to mean a lens wherever they stand."""
_PINHOLE = ("fl_x", "fl_y", "cx", "cy")
COLMAP_MODELS: dict[int, tuple[str, tuple[str, ...]]] = {
    0: ("SIMPLE_PINHOLE", ("f", "cx", "cy")),
    1: ("PINHOLE", _PINHOLE),
    2: ("SIMPLE_RADIAL", ("f", "cx", "cy", "k1")),
    3: ("RADIAL", ("f", "cx", "cy", "k1", "k2")),
    4: ("OPENCV", (*_PINHOLE, "k1", "k2", "p1", "p2")),
    5: ("OPENCV_FISHEYE", (*_PINHOLE, "k1", "k2", "k3", "k4")),
    6: ("FULL_OPENCV", (*_PINHOLE, "k1", "k2", "p1", "p2", "k3", "!k4", "k5", "k6")),
    7: ("FOV", (*_PINHOLE, "omega")),
    8: ("SIMPLE_RADIAL_FISHEYE", ("f", "cx", "cy", "k1")),
    9: ("RADIAL_FISHEYE", ("f", "cx", "cy", "k1", "k2")),
    10: ("THIN_PRISM_FISHEYE", (*_PINHOLE, "k1", "k2", "p1", "p2", "k3", "k4", "sx1", "sy1")),
    11: (
        "RAD_TAN_THIN_PRISM_FISHEYE",
        (*_PINHOLE, "k1", "k2", "k3", "k4", "k5", "k6", "!p1", "!p2", "s0", "s1", "s2", "s3"),
    ),
    12: ("SIMPLE_DIVISION", ("f", "cx", "cy", "k")),
    13: ("DIVISION", (*_PINHOLE, "k")),
    14: ("SIMPLE_FISHEYE", ("f", "cx", "cy")),
    15: ("FISHEYE", _PINHOLE),
    16: ("EUCM", (*_PINHOLE, "!alpha", "beta")),
    17: ("EQUIRECTANGULAR", ("width", "height")),
}
"""COLMAP's models: name, and the names of the parameters. ``!``: of another meaning than nerfstudio's of that name."""
_NUMBERS = {name: number for number, (name, _) in COLMAP_MODELS.items()}
_TYPES: dict[str, CameraType] = {
    **CAMERA_MODEL_TO_TYPE,
    **dict.fromkeys(
        ("FULL_OPENCV", "FOV", "SIMPLE_DIVISION", "DIVISION", "EUCM", "PERSPECTIVE"), CameraType.PERSPECTIVE
    ),
    **dict.fromkeys(
        (
            *("SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE"),
            *("SIMPLE_FISHEYE", "FISHEYE"),
        ),
        CameraType.FISHEYE,
    ),
}
"""Lens models by name. Of those that nerfstudio does not know, the parameters that it does not have must be 0."""
_NAME_OF_TYPE = {
    **{kind: name for name, kind in CAMERA_MODEL_TO_TYPE.items()},
    CameraType.PERSPECTIVE: "OPENCV",
}
LENGTH_RANGE = (0.05, 1e4)
"""Focal lengths that a lens can have, relative to the longer edge of the photo: 170 degrees of view at the lower end,
a telescope at the upper one."""
_LENSES = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624)
"""Cameras whose focal lengths are those of a lens; those of maps and panoramas are scales."""
_FARTHEST_CENTRE = 10.0
"""Distance of the principal point from the middle of the photo, in photo sizes: cropped photos have it outside."""
_LARGEST_COEFFICIENT = 1e4


@dataclass(frozen=True)
class Intrinsics:
    """The lens of one photo at its full size."""

    kind: CameraType
    width: int
    """pixels"""
    height: int
    """pixels"""
    fl_x: float
    """pixels"""
    fl_y: float
    """pixels"""
    cx: float
    """pixels, from the photo's left edge"""
    cy: float
    """pixels, from its upper edge"""
    distortion: tuple[float, ...]
    """nerfstudio's: the 6 of :data:`COEFFICIENTS`, or the 12 of its FISHEYE624"""

    def entries(self) -> dict[str, Any]:
        """As the entries of a frame that nerfstudio's dataparsers read."""
        lens: dict[str, Any] = {
            **{"camera_model": _NAME_OF_TYPE[self.kind], "w": self.width, "h": self.height},
            **{"fl_x": self.fl_x, "fl_y": self.fl_y, "cx": self.cx, "cy": self.cy},
        }
        if len(self.distortion) == len(COEFFICIENTS):
            return lens | dict(zip(COEFFICIENTS, self.distortion))
        return lens | {"distortion_params": list(self.distortion)}


def from_transforms(
    frame: Mapping[str, Any], top: Mapping[str, Any], size: Callable[[], tuple[int, int]], where: str
) -> Intrinsics:
    """The lens of a frame of a ``transforms.json``.

    Args:
        frame: its entries go first.
        top: entries of the whole file.
        size: width and height of the photo at its full size, asked where the file does not give them.
        where: file and photo, for messages.

    Raises:
        InputError: a value is missing, is no number, or cannot be true.
    """
    given = {**top, **frame}
    own_focal = any(name in frame for name in ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y"))
    if own_focal:  # an angle at the top says nothing about this photo
        for name in ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y"):
            if name not in frame:
                given.pop(name, None)
    name = _model_name(given, where)
    if given.get("w") is None or given.get("h") is None:
        given["w"], given["h"] = size()
    width, height = (_pixels(given[side], side, where) for side in ("w", "h"))
    if name == "EQUIRECTANGULAR":
        defaults = {"fl_x": width / 2, "fl_y": float(height)}  # nerfstudio's: 2 and 1 times pi in them
    else:
        defaults = _focal_from_angles(given, width, height, where)
    numbers = {"cx": width / 2, "cy": height / 2, **defaults}
    known = COLMAP_MODELS[_NUMBERS[name]][1] if name in _NUMBERS else ()
    missing = (entry for entry in _ZERO if entry in known or entry not in _SHORT)
    for entry in (*_PINHOLE, *COEFFICIENTS, *missing):
        if given.get(entry) is not None:
            numbers[entry] = _number(given[entry], entry, where)
    if "fl_x" not in numbers and "fl_y" not in numbers:
        raise InputError(
            f"{where} has no focal length: give fl_x (pixels) or camera_angle_x (radians), at the top of the file or"
            " for the photo"
        )
    numbers.setdefault("fl_x", numbers.get("fl_y", 0.0))  # square pixels
    numbers.setdefault("fl_y", numbers["fl_x"])
    parameters = given.get("distortion_params")
    if parameters is not None or _TYPES[name] == CameraType.FISHEYE624:
        return _checked(name, width, height, numbers, where, _parameters(parameters, name, where))
    if name == "FULL_OPENCV":
        numbers["!k4"] = numbers.pop("k4", 0.0)
    return _checked(name, width, height, numbers, where)


def from_colmap(model: str, width: int, height: int, params: Sequence[float], where: str) -> Intrinsics:
    """The lens of a camera of a COLMAP model.

    Args:
        model: COLMAP's name of the lens model.
        width, height: of its photos, pixels.
        params: its parameters in COLMAP's order.
        where: file and camera, for messages.

    Raises:
        InputError: nerfstudio has no such lens, or a value cannot be true.
    """
    if model not in _NUMBERS:
        raise InputError(f"{where} has the lens model {model}, which is not known here: {UNDISTORT}")
    names = COLMAP_MODELS[_NUMBERS[model]][1]
    if len(params) != len(names):
        raise InputError(f"{where} ({model}) has {len(params)} parameters instead of {len(names)}: restore the file")
    numbers = {name: _number(value, name.lstrip("!"), where) for name, value in zip(names, params)}
    if "f" in numbers:
        numbers["fl_x"] = numbers["fl_y"] = numbers.pop("f")
    if model == "EQUIRECTANGULAR":
        numbers = {"fl_x": width / 2, "fl_y": float(height), "cx": width / 2, "cy": height / 2}
    width, height = _pixels(width, "width", where), _pixels(height, "height", where)
    return _checked(model, width, height, numbers, where)


def set_kinds(cameras: Cameras, lenses: Sequence[Intrinsics]) -> None:
    """Gives every camera its own kind, where nerfstudio's dataparsers know one for all.

    Args:
        cameras: changed in place.
        lenses: of the same photos.
    """
    kinds = torch.tensor([lens.kind.value for lens in lenses], dtype=cameras.camera_type.dtype)
    cameras.camera_type = kinds[:, None]


def _model_name(given: Mapping[str, Any], where: str) -> str:
    """Name of the lens model; ``is_fisheye`` is how Instant-NGP says it."""
    fisheye = given.get("is_fisheye")
    if given.get("camera_model") is None:
        return "OPENCV_FISHEYE" if fisheye else "OPENCV"
    name = str(given["camera_model"]).upper()
    if name not in _TYPES:
        raise InputError(
            f"{where} has the camera_model '{given['camera_model']}', which is not known: give one of"
            f" {', '.join(sorted(set(_TYPES) - {'PERSPECTIVE'}))}, or {UNDISTORT}"
        )
    if fisheye and _TYPES.get(name) == CameraType.PERSPECTIVE:
        raise InputError(f"{where} is both is_fisheye and camera_model {name}: take one of them out")
    return name


def _focal_from_angles(given: Mapping[str, Any], width: int, height: int, where: str) -> dict[str, float]:
    """Focal lengths from the full angles of view in radians, as NeRF's first captures give them."""
    lengths = {}
    for axis, pixels in (("x", width), ("y", height)):
        angle = given.get(f"camera_angle_{axis}")
        if angle is not None and given.get(f"fl_{axis}") is None:
            angle = _number(angle, f"camera_angle_{axis}", where)
            if not 0 < angle < math.pi:
                raise InputError(f"{where} has camera_angle_{axis} {angle:g}: give radians between 0 and pi")
            lengths[f"fl_{axis}"] = 0.5 * pixels / math.tan(0.5 * angle)
    if given.get("fl_x") is not None or given.get("fl_y") is not None:
        return {}  # pixels go before angles
    return lengths


def _checked(
    model: str,
    width: int,
    height: int,
    numbers: Mapping[str, float],
    where: str,
    parameters: tuple[float, ...] | None = None,
) -> Intrinsics:
    """The lens, if its numbers can be those of one."""
    for name in numbers:
        if (name in _ZERO or name.startswith("!")) and numbers[name] != 0:
            raise InputError(
                f"{where} has the lens model {model} with {name.lstrip('!')} = {numbers[name]:g}, which nerfstudio's"
                f" cameras do not have: {UNDISTORT}"
            )
    kind = _TYPES[model]
    for axis, pixels in (("x", width), ("y", height)):
        length, centre = numbers[f"fl_{axis}"], numbers[f"c{axis}"]
        low, high = (bound * max(width, height) for bound in LENGTH_RANGE)
        if not length > 0:
            raise InputError(f"the focal length of {where} is fl_{axis} = {length:g}: correct fl_x / fl_y")
        if kind in _LENSES and not low <= length <= high:
            shares = ": intrinsics as shares of the photo must be multiplied by its size" if length < low else ""
            raise InputError(
                f"{where} has fl_{axis} = {length:g} for a photo of {width} x {height} pixels, and allowed is"
                f" {low:g} to {high:g} pixels{shares}; correct fl_x / fl_y"
            )
        if not abs(centre - pixels / 2) <= _FARTHEST_CENTRE * pixels:
            raise InputError(
                f"{where} has c{axis} = {centre:g} for a photo of {width} x {height} pixels: give the principal point"
                " in pixels, or leave it out for the middle"
            )
    if max(numbers["cx"], numbers["cy"]) <= 1.5 < min(width, height) / 2:
        raise InputError(
            f"{where} has cx = {numbers['cx']:g}, cy = {numbers['cy']:g} for a photo of {width} x {height} pixels: "
            "intrinsics as shares of the photo must be multiplied by its size"
        )
    distortion = parameters or tuple(numbers.get(name, 0.0) for name in COEFFICIENTS)
    for value in distortion:
        if not abs(value) <= _LARGEST_COEFFICIENT:
            raise InputError(f"{where} has a distortion coefficient of {value:g}: correct it, or set it to 0")
    return Intrinsics(kind, width, height, *(numbers[name] for name in _PINHOLE), distortion)


def _parameters(value: Any, model: str, where: str) -> tuple[float, ...]:
    """nerfstudio's ``distortion_params``."""
    wanted = 12 if _TYPES[model] == CameraType.FISHEYE624 else len(COEFFICIENTS)
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != wanted:
        raise InputError(f"{where}: distortion_params of a {model} camera must be a list of {wanted} numbers")
    return tuple(_number(number, "distortion_params", where) for number in value)


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{where} has {name} = {_shown(value)}: give a number")
    return number


def _pixels(value: Any, name: str, where: str) -> int:
    number = _number(value, name, where)
    if number != int(number) or not 1 <= number <= 1 << 20:
        raise InputError(f"{where} has {name} = {_shown(value)}: give the photo's size in pixels")
    return int(number)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
