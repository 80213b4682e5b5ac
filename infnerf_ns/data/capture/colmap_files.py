"""COLMAP's model files, binary and text, as arrays.

Own code, as nerfstudio's readers split the photos' names at spaces, know 11 of COLMAP's 18 lens models, read text in
the machine's encoding, take what is left of a file that was cut, and make a Python object of every match, which takes
minutes and gigabytes for a large model. Format: COLMAP's documentation, "Output Format"; numbers are little-endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from infnerf_ns.data.capture.intrinsics import COLMAP_MODELS, UNDISTORT
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file
from infnerf_ns.validation import warn

Format = Literal["bin", "txt"]
_MATCH = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
_LONGEST_REASON = 120
"""Characters of an exception, which may repeat a whole damaged line."""
_TRACK = np.dtype([("image", "<i4"), ("match", "<i4")])


class Camera(NamedTuple):
    """A lens of the model."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass(frozen=True)
class Image:
    """A registered photo."""

    number: int
    """COLMAP's id"""
    name: str
    """path below the folder of photos, with forward slashes"""
    camera: int
    rotation: Float64[np.ndarray, "3 3"]
    """world to camera, OpenCV's axes"""
    translation: Float64[np.ndarray, "3"]
    """world to camera"""
    matches: Float64[np.ndarray, "m 2"]
    """pixels of its features; empty where they were not asked for"""

    @property
    def camera_to_world(self) -> Float64[np.ndarray, "4 4"]:
        """Pose with OpenCV's axes."""
        pose = np.eye(4)
        pose[:3, :3] = self.rotation.T
        pose[:3, 3] = -self.rotation.T @ self.translation
        return pose


class Points(NamedTuple):
    """The 3D points of a model and their tracks: N points, K matches."""

    xyz: Float64[np.ndarray, "n 3"]
    rgb: UInt8[np.ndarray, "n 3"]
    track_point: Int64[np.ndarray, "k"]
    """row in ``xyz``"""
    track_image: Int64[np.ndarray, "k"]
    """COLMAP's id of the photo"""
    track_match: Int64[np.ndarray, "k"]
    """row in the photo's ``matches``"""


def read_cameras(folder: Path, kind: Format) -> dict[int, Camera]:
    """The cameras of a model, by COLMAP's id.

    Raises:
        InputError: the file cannot be read, or has a lens model that is not known.
    """
    path = folder / f"cameras.{kind}"
    if kind == "txt":
        cameras = {}
        for number, line in _text_lines(path):
            with _line(path, number):
                fields = line.split()
                cameras[int(fields[0])] = Camera(
                    fields[1], int(fields[2]), int(fields[3]), tuple(map(float, fields[4:]))
                )
        _compare_count(path, len(cameras))
        return cameras
    cursor = _Cursor(path, "cameras")
    cameras = {}
    for _ in cursor.items():
        identity, model, width, height = cursor.take("<iiQQ")
        if model not in COLMAP_MODELS:
            raise InputError(
                f"{path}: camera {identity} has lens model number {model}, which is not known here: {UNDISTORT}"
            )
        name, params = COLMAP_MODELS[model]
        cameras[identity] = Camera(name, width, height, cursor.take(f"<{len(params)}d"))
    cursor.require_end()
    return cameras


def read_images(folder: Path, kind: Format, matches: bool = False) -> list[Image]:
    """The registered photos of a model, in the order of their ids.

    Args:
        folder: of the model.
        kind: of its files.
        matches: read the pixels of the features, too.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / f"images.{kind}"
    images = sorted((_images_text if kind == "txt" else _images_binary)(path, matches), key=lambda image: image.number)
    names: dict[str, int] = {}
    for image in images:
        if names.setdefault(image.name, image.number) != image.number:
            raise InputError(f"{path} has two photos named {image.name}: give every photo one pose")
    return images


def read_points(folder: Path, kind: Format) -> Points:
    """The 3D points of a model.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / f"points3D.{kind}"
    return (_points_text if kind == "txt" else _points_binary)(path)


def count_images(folder: Path, kind: Format) -> int:
    """Registered photos of a model, without reading more than that takes.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / f"images.{kind}"
    return len(_images_text(path, False)) if kind == "txt" else _Cursor(path, "photos").count


def _image(
    path: Path, number: int, pose: tuple[float, ...], camera: int, name: str, matches: Float64[np.ndarray, "m 2"]
) -> Image:
    values = np.array(pose)
    length = np.linalg.norm(values[:4])
    if not (np.isfinite(values).all() and length > 1e-6):
        raise InputError(f"{path}: the pose of photo {name} is not finite: remove the photo from the model")
    w, x, y, z = values[:4] / length  # COLMAP normalises, too
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return Image(number, name.replace("\\", "/"), camera, rotation, values[4:], matches)


def _images_binary(path: Path, matches: bool) -> list[Image]:
    cursor = _Cursor(path, "photos")
    images = []
    for _ in cursor.items():
        number, *pose, camera = cursor.take("<i7di")
        name = cursor.take_name()
        (count,) = cursor.take("<Q")
        table = cursor.take_array(_MATCH, count)
        xy = table["xy"].copy() if matches else np.empty((0, 2))
        images.append(_image(path, number, tuple(pose), camera, name, xy))
    cursor.require_end()
    return images


def _images_text(path: Path, matches: bool) -> list[Image]:
    lines = iter(_text_lines(path, blank=True))
    images = []
    for number, line in lines:
        if not line:
            continue
        with _line(path, number):
            fields = line.split(maxsplit=9)  # the name may have spaces
            identity, camera, name = int(fields[0]), int(fields[8]), fields[9]
            pose = tuple(map(float, fields[1:8]))
        number, line = next(lines, (number + 1, ""))
        with _line(path, number):
            features = line.split()
            if len(features) % 3:
                raise ValueError("a photo's matches must be triples")
            xy = np.array(features, dtype=np.float64).reshape(-1, 3)[:, :2] if matches else np.empty((0, 2))
        images.append(_image(path, identity, pose, camera, name, xy))
    _compare_count(path, len(images))
    return images


def _points_binary(path: Path) -> Points:
    cursor = _Cursor(path, "points")
    cursor.require_size(51)
    xyz, rgb = np.empty((cursor.count, 3)), np.empty((cursor.count, 3), np.uint8)
    tracks = []
    for row in cursor.items():
        values = cursor.take("<Q3d3BdQ")
        xyz[row], rgb[row] = values[1:4], values[4:7]
        tracks.append(cursor.take_array(_TRACK, values[8]))
    cursor.require_end()
    track = np.concatenate([np.empty(0, _TRACK), *tracks])
    point = np.repeat(np.arange(cursor.count), [len(entries) for entries in tracks])
    return Points(xyz, rgb, point, track["image"].astype(np.int64), track["match"].astype(np.int64))


def _points_text(path: Path) -> Points:
    xyz, rgb, tracks = [], [], []
    for number, line in _text_lines(path):
        with _line(path, number):
            fields = line.split()
            if len(fields) % 2:
                raise ValueError("a point's track must be pairs")
            int(fields[0])
            xyz.append([float(value) for value in fields[1:4]])
            rgb.append([min(max(int(float(value)), 0), 255) for value in fields[4:7]])
            float(fields[7])
            tracks.append(np.array(fields[8:], dtype=np.int64).reshape(-1, 2))
    _compare_count(path, len(xyz))
    track = np.concatenate([np.empty((0, 2), np.int64), *tracks])
    point = np.repeat(np.arange(len(xyz)), [len(entries) for entries in tracks])
    return Points(
        np.array(xyz, dtype=np.float64).reshape(-1, 3),
        np.array(rgb, dtype=np.uint8).reshape(-1, 3),
        point,
        track[:, 0],
        track[:, 1],
    )


def _compare_count(path: Path, found: int) -> None:
    """Says where a text file holds less than its first comments say: it may be cut, or edited by hand."""
    with open(path, encoding="utf-8-sig") as file:
        head = [line for _, line in zip(range(8), file) if line.startswith("#")]
    promised = re.search(r"# Number of \w+: (\d+)", "".join(head))
    if promised and int(promised[1]) != found:
        warn(f"{path} says that it has {promised[1]} entries and has {found}: was it cut? If not, correct its comment")


def _text_lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines without comments, and without empty ones unless they are asked for."""
    require_regular_file(path, "the COLMAP file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): write it again with COLMAP") from error
    for number, line in enumerate(content.splitlines(), start=1):
        line = line.strip()
        if not line.startswith("#") and (line or blank):
            yield number, line


class _line:
    """Whatever is wrong with the values of a line ends in one line that names it."""

    def __init__(self, path: Path, number: int) -> None:
        self._where = f"{path}, line {number}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, IndexError, OverflowError)):
            reason = str(error) if len(str(error)) <= _LONGEST_REASON else f"{str(error)[:_LONGEST_REASON]}..."
            raise InputError(f"{self._where} is not as COLMAP writes it ({reason}): write the model again") from error


class _Cursor:
    """Reads a binary file from its beginning to its end; ends in one line where there is less, or more, than it says.

    Args:
        path: of the file.
        what: its items, in words.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what, self._at = path, what, 8
        require_regular_file(path, "the COLMAP file")
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}): write the model again with COLMAP") from error
        if len(self._data) < 8:
            raise self._cut(0)
        self.count: int = struct.unpack_from("<Q", self._data)[0]
        self._item = 0
        self.require_size(24)

    def require_size(self, item: int) -> None:
        """So many items of at least so many bytes must fit into the file, before there is memory for them."""
        if self.count * item > len(self._data) - 8:
            raise self._cut(self._item)

    def items(self) -> Iterator[int]:
        """The numbers of the items."""
        for item in range(self.count):
            self._item = item
            yield item

    def take(self, form: str) -> tuple:
        """Numbers of a ``struct`` format."""
        start = self._advance(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)

    def take_array(self, kind: np.dtype, count: int) -> np.ndarray:
        """A table of so many rows; a view of the file's bytes."""
        start = self._advance(kind.itemsize * count)
        return np.frombuffer(self._data, kind, count, start)

    def take_name(self) -> str:
        """Text that ends in a zero."""
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise self._cut(self._item)
        name = self._data[self._at : end]
        self._at = end + 1
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: the name {name[:80]!r} is not UTF-8: write the model again") from error

    def require_end(self) -> None:
        """There must be nothing behind the last item."""
        rest = len(self._data) - self._at
        if rest:
            raise InputError(
                f"{self._path} is damaged: it has {rest} bytes behind the {self.count} {self._what} that it promises: "
                "copy it again, or write the model again with COLMAP"
            )

    def _advance(self, size: int) -> int:
        start = self._at
        if size > len(self._data) - start:
            raise self._cut(self._item)
        self._at += size
        return start

    def _cut(self, items: int) -> InputError:
        promised = f" after {items} of {self.count} {self._what}" if len(self._data) >= 8 else ""
        return InputError(
            f"{self._path} is cut: it ends{promised}: copy it again, or write the model again with COLMAP"
        )
