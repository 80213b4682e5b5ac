"""Checks of a capture before training starts. What is wrong ends in one line that names the file and the remedy.

:func:`check_config` looks at what the dataparser is going to read, :func:`explain` turns the exception of a dataparser
into that one line, :func:`check_outputs` looks at what the dataparser made of it. Decoding the photos, the last check,
is what loading does.
"""

from __future__ import annotations

import json
import re
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import UnidentifiedImageError

from infnerf_ns.data.capture.photos import check_first_photo, unreadable
from infnerf_ns.data.capture.reading import check_sizes
from infnerf_ns.errors import InputError

MIN_TRAIN_PHOTOS = 2
ROTATION_TOLERANCE = 1e-3
"""Largest entry of ``R^T R - I`` that still counts as a rotation."""


def transforms_file(config: DataParserConfig) -> Path | None:
    """The ``transforms.json`` that nerfstudio's dataparser reads; None for other dataparsers."""
    if not isinstance(config, NerfstudioDataParserConfig):
        return None
    return config.data if config.data.suffix == ".json" else config.data / "transforms.json"


def check_config(config: DataParserConfig) -> None:
    """Checks the files that a dataparser is going to read.

    Raises:
        InputError: ``transforms.json`` is missing, is not JSON, lists no photos, holds a pose that is no pose, or has
            depth images for some of the photos only.
    """
    path = transforms_file(config)
    if path is None:
        return
    if not config.data.exists():
        raise InputError(f"the data folder {config.data} does not exist: check --data")
    if not path.exists():
        raise InputError(
            f"{path} does not exist: run ns-process-data on the photos, "
            "or choose the dataparser that fits the folder (e.g. 'colmap')"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): write it again with ns-process-data") from error
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not frames:
        raise InputError(f"{path} lists no photos: its 'frames' are empty or missing")
    if len(frames) < MIN_TRAIN_PHOTOS:
        raise InputError(f"{path} lists {len(frames)} photo and training needs at least {MIN_TRAIN_PHOTOS}: add photos")
    for index, frame in enumerate(frames):
        _check_frame(frame, index, path)
    check_first_photo(path.parent / str(frames[0]["file_path"]))
    without = [frame["file_path"] for frame in frames if "depth_file_path" not in frame]
    if 0 < len(without) < len(frames):
        raise InputError(
            f"{path}: {len(without)} of {len(frames)} photos have no 'depth_file_path', the first is {without[0]}: "
            "give every photo a depth image, or none"
        )


def _check_frame(frame: Any, index: int, path: Path) -> None:
    """One entry of ``frames``: a photo's name and a finite pose."""
    if not isinstance(frame, dict) or "file_path" not in frame:
        raise InputError(f"{path}: frame {index} has no 'file_path': name its photo or remove the frame")
    name = frame["file_path"]
    try:
        pose = np.asarray(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: photo {name} has no readable 'transform_matrix': remove the frame") from error
    if pose.shape not in ((4, 4), (3, 4)):
        raise InputError(f"{path}: the pose of photo {name} is not a 4x4 matrix: remove the frame")
    _check_pose(pose[:3], str(name), str(path))


def _check_pose(pose: np.ndarray, name: str, source: str) -> None:
    """A finite camera-to-world matrix [3, 4] with a proper rotation."""
    if not np.isfinite(pose).all():
        raise InputError(
            f"{source}: the pose of photo {name} holds NaN or infinite numbers: remove the photo from the capture"
        )
    rotation = pose[:, :3]
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
        reason = f"R^T R differs from I by {error:.2g}" if error > ROTATION_TOLERANCE else "it mirrors"
        raise InputError(
            f"{source}: the pose of photo {name} is no rotation ({reason}): poses must be camera-to-world matrices "
            "without scale; correct it or remove the photo from the capture"
        )


def explain(error: Exception, config: DataParserConfig) -> InputError:
    """The one line for an exception of a dataparser; the original message stays in it."""
    data = config.data
    parser = type(config).__name__.removesuffix("Config")
    if not data.exists() and isinstance(error, (AssertionError, OSError, ValueError)):
        return InputError(f"the data folder {data} does not exist: check --data ({parser}: {error})")
    if isinstance(error, EOFError):
        return InputError(
            f"{parser} asks a question about {data} and there is no terminal to answer it: prepare the downscaled "
            "photos (images_2, images_4, ...) or give --downscale-factor 1 after the dataparser's name"
        )
    if isinstance(error, UnidentifiedImageError) and (named := re.search("'(.+)'", str(error))):
        return unreadable(Path(named[1]), "photo", error)
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"{parser}: {error.filename or error} does not exist: restore the file or take it out of the capture"
        )
    if isinstance(error, JSONDecodeError):
        return InputError(f"{parser}: a JSON file in {data} is not valid ({error}): write it again")
    if isinstance(error, KeyError):
        return InputError(
            f"{parser}: the capture in {data} lacks the entry {error}: add it or process the photos again"
        )
    if isinstance(error, ZeroDivisionError):
        return InputError(
            f"{parser}: the photos in {data} are all taken from one place, which leaves the scene without a scale "
            f"({error}): check the poses"
        )
    return InputError(f"{parser} cannot read the capture in {data}: {type(error).__name__}: {error}")


def check_outputs(outputs: DataparserOutputs, split: str, *, photos: bool = True) -> None:
    """Checks the photos, masks and cameras of one split, without decoding a photo.

    Args:
        outputs: of the dataparser.
        split: its name, ``train`` or another; only the train split needs photos.
        photos: whether the files are looked at; camera-path renders and exports do not need them.

    Raises:
        InputError: fewer than two train photos, list lengths that differ, poses or intrinsics that are not usable,
            photos or masks that are missing, unreadable, or of a wrong size.
    """
    names, cameras = outputs.image_filenames, outputs.cameras
    if split == "train" and len(names) < MIN_TRAIN_PHOTOS:
        raise InputError(
            f"the train split has {len(names)} photo(s) and needs at least {MIN_TRAIN_PHOTOS}: "
            "add photos, or change --eval-mode / --train-split-fraction / --eval-interval of the dataparser"
        )
    if len(names) != len(cameras):
        raise InputError(
            f"the {split} split has {len(names)} photos but {len(cameras)} cameras: list every photo with its pose"
        )
    masks = outputs.mask_filenames
    if masks is not None and len(masks) != len(names):
        raise InputError(
            f"the {split} split has {len(names)} photos but {len(masks)} masks: give every photo a mask or none"
        )
    for name, pose, focal in zip(
        names, cameras.camera_to_worlds.cpu().double().numpy(), torch.cat([cameras.fx, cameras.fy], -1)
    ):
        _check_pose(pose, str(name), f"{split} split")
        if not bool((torch.isfinite(focal) & (focal > 0)).all()):
            raise InputError(f"the focal length of photo {name} is {focal.tolist()}: correct fl_x / fl_y")
    if photos:
        _check_files(outputs, split)


def _check_files(outputs: DataparserOutputs, split: str) -> None:
    """Photos and masks exist, and have the sizes of their cameras."""
    for kind, files in (("photo", outputs.image_filenames), ("mask", outputs.mask_filenames or [])):
        missing = [file for file in files if not Path(file).exists()]
        if missing:
            raise InputError(
                f"{kind} {missing[0]} does not exist ({len(missing)} of {len(files)} missing in the {split} split): "
                "restore the file or take it out of the capture"
            )
    check_sizes(outputs)
