"""Checks of a capture before training starts. What is wrong ends in one line that names the file and the remedy.

:func:`explain` turns the exception of a dataparser into that one line, :func:`check_outputs` looks at what the
dataparser made of the capture. Decoding the photos, the last check, is what loading does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from PIL import UnidentifiedImageError

from infnerf_ns.data.capture.photo_files import unreadable
from infnerf_ns.data.capture.reading import check_sizes
from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn

MIN_TRAIN_PHOTOS = 2
ROTATION_TOLERANCE = 1e-3
"""Largest entry of ``R^T R - I`` that still counts as a rotation."""
MIN_FOR_OUTLIERS = 5
"""Cameras of which one can be called far from the others."""
MOST_OUTLIERS = 0.02
"""Share of the cameras that can be called so."""
FAR, TOO_FAR = 100.0, 1e4
"""Distance of a camera over that of nine of ten: a warning, and where single precision no longer tells the others
apart."""
ONE_PLACE = 1e-12
"""Spread of cameras over their distance from the origin that is rounding alone."""


def check_pose(pose: Float[np.ndarray, "3 4"], name: str, source: str) -> None:
    """A camera-to-world matrix must be finite and its rotation one.

    Args:
        pose: the matrix.
        name: of the photo, for the message.
        source: where it was read, for the message.

    Raises:
        InputError: it is not.
    """
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


def check_spread(positions: Float[np.ndarray, "c 3"], source: str) -> None:
    """The cameras must be at more than one place, where their spread becomes the unit of the scene.

    Args:
        positions: of all cameras.
        source: where they were read, for the message.

    Raises:
        InputError: they are at one place, but for rounding.
    """
    spread = np.linalg.norm(positions - positions.mean(axis=0), axis=1).max()
    if spread <= ONE_PLACE * np.abs(positions).max():
        raise InputError(
            f"{source}: all photos are taken from one place, which leaves the scene without a scale: check the poses,"
            " or keep the capture's units (--auto-scale-poses False after the dataparser's name)"
        )


def usual_extent(apart: Float[np.ndarray, "c"]) -> float:
    """How far nine of ten cameras are from their middle; of a few, all but the farthest.

    Args:
        apart: distances of all from the middle.
    """
    return float(np.sort(apart)[max(0, min(int(0.9 * (len(apart) - 1)), len(apart) - 2))])


def check_outliers(positions: Float[np.ndarray, "c 3"], names: Sequence[str], source: str) -> None:
    """No camera may be so far from the others that nobody can have meant it: a photo without GPS at 0, 0, 0 among those
    in UTM. nerfstudio makes the distance of the farthest the unit of the scene, and centres all at their mean.

    Args:
        positions: of all cameras, in double precision.
        names: of their photos.
        source: where they were read, for the message.

    Raises:
        InputError: one is, or one in fifty. Of more it is a warning: a tripod and a walk around it are such a capture.
    """
    apart = np.linalg.norm(positions - np.median(positions, axis=0), axis=1)
    usual, far = usual_extent(apart), int(np.argmax(apart))
    if len(positions) < MIN_FOR_OUTLIERS or usual <= 0 or apart[far] <= FAR * usual:
        return
    what = (
        f"{source}: photo {names[far]} is {apart[far]:.4g} units from the others, which are within {usual:.4g} of each"
        " other"
    )
    if apart[far] > TOO_FAR * usual and (apart > FAR * usual).sum() <= max(1, MOST_OUTLIERS * len(apart)):
        raise InputError(f"{what}: correct its pose or remove the photo")
    warn(f"{what}: is its pose right?")


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
        check_pose(pose, str(name), f"{split} split")
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
