"""Mistakes that people make with captures, tried one by one: which of them, taken back, makes everything fit?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from infnerf_ns.data.capture.consistency.agreement import (
    Samples,
    Views,
    agreement_at_points,
    agreement_by_chance,
    colour_agreement,
    sample_points,
)
from infnerf_ns.data.capture.consistency.scene import CaptureScene

SEARCH_POINTS = 250
"""The same while causes are tried."""
BETTER = 0.25
"""A cause is named if the agreement, or the correlation with the points' colours, rises by so much with it, at least to
``GOOD``."""
GOOD = 0.45
"""See ``BETTER``."""
BY_CHANCE = 0.2
"""Agreement beyond chance, of what is possible beyond it, without which nothing fits better."""
_UNITS = {
    "millimetres where the poses are in metres": 1e-3,
    "centimetres where the poses are in metres": 1e-2,
    "metres where the poses are in millimetres": 1e3,
    "metres where the poses are in centimetres": 1e2,
    "feet where the poses are in metres": 0.3048,
    "metres where the poses are in feet": 1 / 0.3048,
    "a scale ten times as large as the poses'": 0.1,
    "a scale ten times as small as the poses'": 10.0,
}
_OPENCV = np.diag([1.0, -1.0, -1.0])
WITHOUT_POINTS = "without 'ply_file_path' or the model's points3D the tree is built from the camera frusta"


class Cause(NamedTuple):
    """A mistake that was tried."""

    what: str
    """the mistake, a sentence"""
    remedy: str
    capture: CaptureScene
    """without the mistake"""
    places: Callable[[np.ndarray], np.ndarray] | None = None
    """without the mistake, if it is one of the photos"""


def find_cause(
    capture: CaptureScene, views: Views, agreement: float | None, colours: float | None, *, everything: bool
) -> Cause | None:
    """The mistake without which the capture fits clearly better, and well; None if it is none of those tried.

    Args:
        capture: as it is given.
        views: its photos.
        agreement: of its photos at the points, None where too few see the same.
        colours: their correlation with the points' colours, None where these have none.
        everything: try mistakes of poses and points, too; else those of the photos alone, which takes no time.
    """
    if not everything and (agreement is None or agreement > 1 - BETTER):
        return None  # nothing can be clearly better
    groups = [_photo_causes(capture, views)] if agreement is not None else []
    groups += [_pose_causes(capture), _point_causes(capture)] if everything else []
    given = sample_points(capture, views, SEARCH_POINTS)
    best, best_score = None, GOOD
    for cause in (each for group in groups for each in group):
        samples = given if cause.places else sample_points(cause.capture, views, SEARCH_POINTS)
        score = agreement_at_points(samples, views.pictures, cause.places)
        if score is None:
            continue
        gain = score - (agreement or 0.0)
        if colours is not None:
            then = colour_agreement(cause.capture, samples, views.pictures, cause.places)
            if then is None or gain < -0.05:
                continue
            gain, score = max(gain, then - colours), min(score, then + 0.1)  # of points they are always lower
        if gain >= BETTER and score > best_score and (cause.places or not _by_chance(samples, views)):
            best, best_score = cause, score
    return best


def _by_chance(samples: Samples, views: Views) -> bool:
    """Whether exchanged photos agree nearly as well: all would, at points that all lie in the middle of a photo."""
    agreement, chance = agreement_at_points(samples, views.pictures), agreement_by_chance(samples, views.pictures)
    return agreement is not None and chance is not None and agreement < chance + BY_CHANCE * (1 - chance)


def _photo_causes(capture: CaptureScene, views: Views) -> Iterator[Cause]:
    """The photos are turned or mirrored."""
    turn = "turn them, or use the photos that the poses were computed for"
    yield Cause("the photos are turned by 180 degrees against their poses", turn, capture, lambda at: 1 - at)
    mirror = "use the photos that the poses were computed for"
    yield Cause("the photos are mirrored", mirror, capture, lambda at: at * [-1, 1] + [1, 0])
    yield Cause("the photos are upside down (mirrored)", mirror, capture, lambda at: at * [1, -1] + [0, 1])
    if all(picture.shape[0] == picture.shape[1] for picture in views.pictures):
        for degrees, sign in ((90, -1), (270, 1)):
            yield Cause(
                f"the photos are turned by {degrees} degrees against their poses",
                turn,
                capture,
                lambda at, sign=sign: (at[..., ::-1] - 0.5) * [sign, -sign] + 0.5,
            )


def _pose_causes(capture: CaptureScene) -> Iterator[Cause]:
    """The poses are of another convention, or the focal length of other photos."""
    rotation, position = capture.poses[:, :, :3], capture.poses[:, :, 3] - capture.origin

    def posed(rotation: np.ndarray, position: np.ndarray) -> CaptureScene:
        poses = np.concatenate([rotation, position[:, :, None]], axis=-1)
        return capture.moved(poses, capture.points - capture.origin)

    inverse, inverse_position = rotation.transpose(0, 2, 1), -np.einsum("nji,nj->ni", rotation, position)
    yield Cause(
        "the poses have OpenCV's axes (y down, z forward)",
        "negate the second and the third column of every pose, nerfstudio's cameras look along -z",
        posed(rotation @ _OPENCV, position),
    )
    for flip, axes in ((_OPENCV, ", with OpenCV's axes"), (np.eye(3), "")):
        yield Cause(
            f"the poses are world-to-camera matrices{axes}",
            "write their inverse, camera-to-world" + (" with the second and third column negated" if axes else ""),
            posed(inverse @ flip, inverse_position),
        )
    for factor in (0.125, 0.25, 1 / 3, 0.5, 2 / 3, 1.5, 2.0, 3.0, 4.0, 8.0):
        cameras = copy.deepcopy(capture.cameras)
        cameras.fx, cameras.fy = cameras.fx * factor, cameras.fy * factor
        yield Cause(
            f"the focal length should be about {factor:.2g} times as long",
            "use the intrinsics of these photos (fl_x, fl_y, cx and cy shrink with the photos)",
            capture._replace(cameras=cameras, tracks=None),
        )


def _point_causes(capture: CaptureScene) -> Iterator[Cause]:
    """The points are in other units, or their axes are exchanged."""
    local = capture.points - capture.origin
    for unit, factor in _UNITS.items():
        yield Cause(
            f"the points are in {unit}",
            f"multiply the points by {factor:.4g}, or leave them out ({WITHOUT_POINTS})",
            capture.moved(points=local * factor + capture.origin),
        )
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        if order == (0, 1, 2) and signs == (1, 1, 1):
            continue
        yield Cause(
            "the axes of the points are others than those of the poses (y up for z up, left-handed, or the like)",
            f"export points and poses with the same axes, or leave the points out ({WITHOUT_POINTS})",
            capture.moved(points=local[:, order] * signs + capture.origin),
        )
