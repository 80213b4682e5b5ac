"""Captures with a ``transforms.json``: nerfstudio's dataparser, fed with what the file means.

nerfstudio's parser reads the file itself, so it is given a clean one: every photo with its own lens and a pose of
4 x 4, near the origin (:mod:`~infnerf_ns.data.capture.georeference`), its paths with forward slashes, and a list of
photos for every split. Its options, orientation, order, scaling and choice of downscaled copies stay as they are.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio, NerfstudioDataParserConfig
from torch import Tensor

from infnerf_ns.data.capture import splits
from infnerf_ns.data.capture.files import PHOTO_ENDINGS, find_file
from infnerf_ns.data.capture.georeference import CaptureOutputs, Georeference, placed
from infnerf_ns.data.capture.intrinsics import Intrinsics, from_transforms, set_kinds
from infnerf_ns.data.capture.photo_files import check_first_photo, read_header
from infnerf_ns.data.capture.point_cloud import read_ply
from infnerf_ns.data.checks import MIN_TRAIN_PHOTOS, check_outliers, check_pose, check_spread
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file
from infnerf_ns.validation import warn

_IMPLIED_TRANSFORM = [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]
"""What nerfstudio takes for a missing ``applied_transform`` where the capture has a folder ``colmap/sparse/0``."""
_ORIENTATIONS = ("pca", "up", "vertical", "none")


class CaptureTransforms(Nerfstudio):
    """nerfstudio's parser of ``transforms.json``, which reads what the file means.

    Args:
        config: nerfstudio's.
    """

    def __init__(self, config: NerfstudioDataParserConfig) -> None:
        super().__init__(copy.copy(config))
        self.prompted_user = True  # else nerfstudio may ask whether to rewrite the capture
        self.create_pc = False
        self._path = config.data if config.data.suffix == ".json" else config.data / "transforms.json"
        self._georeference = Georeference()
        self._lenses: dict[Path, Intrinsics] = {}
        self._poses: dict[Path, Float[np.ndarray, "4 4"]] = {}
        self._originals: dict[Path, Path] = {}
        self._split_rule = ""

    def _generate_dataparser_outputs(self, split: str = "train") -> CaptureOutputs:
        meta = self._clean(read_transforms(self._path, self.config.data))
        data = self.config.data
        with _clean_file(meta) as self.config.data:
            try:
                parsed = super()._generate_dataparser_outputs(split)
            finally:
                self.config.data = data
        outputs, files = self._georeference.restored(parsed), [self._originals[file] for file in parsed.image_filenames]
        outputs.from_files = self._georeference.after_applied(parsed.dataparser_transform)
        outputs.from_files_scale = parsed.dataparser_scale
        set_kinds(outputs.cameras, [self._lenses[file] for file in files])
        if meta.get("orientation_override", self.config.orientation_method) == "pca":
            poses = np.stack([self._poses[file] for file in files])
            outputs.cameras.camera_to_worlds = placed(poses, parsed.dataparser_transform, parsed.dataparser_scale)
        outputs.metadata = {**outputs.metadata, splits.RULE: self._split_rule}
        return outputs

    def _clean(self, meta: dict[str, Any]) -> dict[str, Any]:
        """The content of the file in the form that nerfstudio reads rightly."""
        folder, frames = self._path.parent, meta["frames"]
        names = [splits.plain(frame["file_path"]) for frame in frames]
        poses = np.stack([frame_pose(frame, name, self._path) for frame, name in zip(frames, names)])
        if self.config.auto_scale_poses:
            check_spread(poses[:, :3, 3], str(self._path))
        check_outliers(poses[:, :3, 3], names, str(self._path))
        kept = _kept(meta, self._path)
        applied = _applied_transform(meta, self._path, self.config.data)
        self._georeference = Georeference.of(poses[:, :3, 3], applied, kept.pop("applied_scale", 1.0))
        poses[:, :3, 3] -= self._georeference.offset
        files = [find_file(folder, name, PHOTO_ENDINGS) for name in names]
        _require_one_pose_each(files, poses, self._path)
        check_first_photo(files[0])
        lenses = [
            from_transforms(frame, meta, lambda file=file: _photo_size(file), f"{self._path}: photo {name}")
            for frame, name, file in zip(frames, names, files)
        ]
        _require_one_size(frames, meta, lenses, self._path)
        self._lenses, self._poses, self._originals = dict(zip(files, lenses)), dict(zip(files, poses)), {}
        clean: dict[str, Any] = {**kept, "frames": []}
        clean["camera_model"] = lenses[0].entries()["camera_model"]
        kinds = {lens.kind for lens in lenses}
        if "fisheye_crop_radius" in clean and len(kinds) > 1:
            raise InputError(
                f"{self._path}: fisheye_crop_radius goes with one kind of lens, and there are {len(kinds)}: use masks"
            )
        for frame, file, pose, lens in zip(frames, files, poses, lenses):
            entries = {"file_path": file.as_posix(), "transform_matrix": pose.tolist(), **lens.entries()}
            for key in ("mask_path", "depth_file_path"):
                if frame.get(key) is not None:
                    entries[key] = find_file(folder, str(frame[key]), (".png",)).as_posix()
            clean["frames"].append(entries)
        if meta.get("ply_file_path"):
            clean["ply_file_path"] = find_file(folder, str(meta["ply_file_path"])).absolute().as_posix()
        listed = {split: meta[f"{split}_filenames"] for split in splits.SPLITS if f"{split}_filenames" in meta}
        if listed:
            where = {split: f"{self._path}: {split}_filenames" for split in listed}
            self._split_rule = f"{' and '.join(f'{split}_filenames' for split in listed)} of {self._path.name}"
            spelt = {file: name for file, name in zip(files, names)}
            for split, given in listed.items():
                found = ((name, find_file(folder, splits.plain(name), PHOTO_ENDINGS)) for name in given)
                listed[split] = [spelt.get(file, name) for name, file in found]
            for split, rows in splits.complete(listed, names, where).items():
                clean[f"{split}_filenames"] = [files[row].as_posix() for row in rows]
        else:
            self._split_rule = splits.rule(self.config)
        return clean

    def _get_fname(self, filepath: Path, data_dir: Path, downsample_folder_prefix: str = "images_") -> Path:
        """The file of a photo, mask or depth image at the size that is used; called by nerfstudio's parser.

        Its own downscaled copies lie in one folder whatever the folders of the photos are.
        """
        folder = self._path.parent
        original = filepath.relative_to(folder) if filepath.is_relative_to(folder) else filepath
        used = super()._get_fname(original, folder, downsample_folder_prefix)
        if self.downscale_factor != 1 and not original.is_absolute() and len(original.parts) > 2:
            nested = folder / f"{downsample_folder_prefix}{self.downscale_factor}" / Path(*original.parts[1:])
            used = nested if nested.exists() else used
        before = self._originals.setdefault(used, filepath)
        if before != filepath:
            raise InputError(
                f"{before} and {filepath} have one downscaled copy, {used}: give the photos different names, or"
                " --downscale-factor 1 after nerfstudio-data"
            )
        return used

    def _load_3D_points(
        self, ply_file_path: Path, transform_matrix: Tensor, scale_factor: float
    ) -> dict[str, Tensor] | None:
        """Points in the scene; called by nerfstudio's parser."""
        if not ply_file_path.exists():
            warn(f"no points from {ply_file_path}, which {self._path} names: it does not exist")
            return None
        cloud = read_ply(ply_file_path)
        if len(cloud.xyz) == 0:
            warn(f"no points from {ply_file_path}, which {self._path} names: it has none")
            return None
        points = {"points3D_xyz": self._georeference.in_scene(cloud.xyz, transform_matrix, scale_factor)}
        rgb = np.zeros_like(cloud.xyz, dtype=np.uint8) if cloud.rgb is None else cloud.rgb
        return points | {"points3D_rgb": torch.from_numpy(rgb)}


@contextmanager
def _clean_file(meta: dict[str, Any]) -> Iterator[Path]:
    """A ``transforms.json`` for nerfstudio's parser, which reads files only.

    Raises:
        InputError: it cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="infnerf-"))
            path = Path(folder) / "transforms.json"
            path.write_text(json.dumps(meta), encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"no temporary file can be written ({error.strerror or error}): make room, or set the environment"
                " variable TMPDIR to a folder that can be written"
            ) from error
        yield path


def read_transforms(path: Path, data: Path, least: int = MIN_TRAIN_PHOTOS) -> dict[str, Any]:
    """The content of a ``transforms.json`` with at least ``least`` frames that have names.

    Raises:
        InputError: it is not there, is not JSON, or lists no photos.
    """
    if not data.exists():
        raise InputError(f"the data folder {data} does not exist: check --data")
    if not path.exists():
        raise InputError(
            f"{path} does not exist: run ns-process-data on the photos, "
            "or choose the dataparser that fits the folder (e.g. 'colmap')"
        )
    require_regular_file(path, "the capture's file")
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): write it again with ns-process-data") from error
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not frames or not isinstance(frames, list):
        raise InputError(f"{path} lists no photos: its 'frames' are empty, missing or no list")
    if len(frames) < least:
        raise InputError(f"{path} lists {len(frames)} photo and training needs at least {least}: add photos")
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or not frame["file_path"]:
            raise InputError(f"{path}: frame {index} has no 'file_path': name its photo or remove the frame")
    for entry, what in (("mask_path", "mask"), ("depth_file_path", "depth image")):
        without = [frame["file_path"] for frame in frames if frame.get(entry) is None]
        if 0 < len(without) < len(frames):
            raise InputError(
                f"{path}: {len(without)} of {len(frames)} photos have no '{entry}', the first is {without[0]}: "
                f"give every photo a {what}, or none"
            )
    for split in splits.SPLITS:
        listed = meta.get(f"{split}_filenames", [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise InputError(f"{path}: {split}_filenames must be a list of photos' names")
    if meta.get("ply_file_path") is not None and not isinstance(meta["ply_file_path"], str):
        raise InputError(f"{path}: ply_file_path must be the name of a PLY file: correct it or take it out")
    return meta


def frame_pose(frame: dict[str, Any], name: str, path: Path) -> Float[np.ndarray, "4 4"]:
    """Camera-to-world matrix of a frame, checked."""
    try:
        pose = np.array(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: photo {name} has no readable 'transform_matrix': remove the frame") from error
    if pose.shape not in ((4, 4), (3, 4)):
        raise InputError(f"{path}: the pose of photo {name} is not a 4x4 matrix: remove the frame")
    check_pose(pose[:3], name, str(path))
    if pose.shape == (4, 4) and not np.allclose(pose[3], [0, 0, 0, 1]):
        raise InputError(
            f"{path}: the last row of the pose of photo {name} is {pose[3].tolist()}, not 0 0 0 1: poses must be"
            " camera-to-world matrices with the position in the last column"
        )
    return np.concatenate([pose[:3], [[0.0, 0.0, 0.0, 1.0]]])


def _require_one_pose_each(files: list[Path], poses: Float[np.ndarray, "n 4 4"], path: Path) -> None:
    first: dict[Path, int] = {}
    for row, file in enumerate(files):
        other = first.setdefault(Path(os.path.normpath(file)), row)  # however it is spelt
        if other != row and not np.allclose(poses[other], poses[row]):
            raise InputError(f"{path} has photo {files[other]} twice, with different poses: remove one of its frames")


def _require_one_size(frames: list[dict[str, Any]], meta: dict[str, Any], lenses: list[Intrinsics], path: Path) -> None:
    """One lens in pixels, for photos whose sizes the file does not give, is that of photos of one size; upright and
    lying ones can share their focal length."""
    pixels = [name for name in ("fl_x", "fl_y", "cx", "cy") if meta.get(name) is not None]
    turned = "cx" not in pixels and "cy" not in pixels
    shared: dict[tuple[int, ...], tuple[str, Intrinsics]] = {}
    for frame, lens in zip(frames, lenses):
        sized = all(frame.get(side, meta.get(side)) is not None for side in ("w", "h"))
        if not sized and any(frame.get(name) is None for name in pixels):
            size = lens.width, lens.height
            shared.setdefault(tuple(sorted(size)) if turned else size, (frame["file_path"], lens))
    if pixels and len(shared) > 1:
        sizes = [f"{name} of {lens.width} x {lens.height}" for name, lens in list(shared.values())[:2]]
        raise InputError(
            f"{path}: {pixels[0]} holds for photos of different sizes, {' and '.join(sizes)} pixels: give each frame"
            " its own fl_x, fl_y, cx and cy, or scale the photos to one size"
        )


def _applied_transform(meta: dict[str, Any], path: Path, data: Path) -> Float[np.ndarray, "3 4"]:
    """The ``applied_transform`` of a capture, or the one that nerfstudio implies."""
    given = meta.get("applied_transform")
    if given is None:
        return np.array(_IMPLIED_TRANSFORM) if (data / "colmap/sparse/0").exists() else np.eye(4)[:3]
    try:
        applied = np.array(given, dtype=np.float64)[:3]
        valid = applied.shape == (3, 4) and np.isfinite(applied).all() and abs(np.linalg.det(applied[:, :3])) > 1e-12
    except (TypeError, ValueError, IndexError):
        valid = False
    if not valid:
        raise InputError(f"{path}: applied_transform is no 3x4 matrix that can be undone: correct it or take it out")
    return applied


def _kept(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """Entries of the whole file that are taken as they are, checked."""
    kept = {}
    for entry in ("applied_scale", "fisheye_crop_radius"):
        if meta.get(entry) is not None:
            try:
                kept[entry] = float(meta[entry])
            except (TypeError, ValueError):
                kept[entry] = math.nan
            if not (math.isfinite(kept[entry]) and kept[entry] > 0):
                raise InputError(f"{path}: {entry} is {meta[entry]!r}: give a number above 0 or take it out")
    if meta.get("orientation_override") is not None:
        if meta["orientation_override"] not in _ORIENTATIONS:
            raise InputError(
                f"{path}: orientation_override is {meta['orientation_override']!r}: allowed are"
                f" {', '.join(_ORIENTATIONS)}"
            )
        kept["orientation_override"] = meta["orientation_override"]
    return kept


def _photo_size(file: Path) -> tuple[int, int]:
    """Width and height of a photo as it is stored, for files that do not give them."""
    return read_header(file, "photo").stored_size
