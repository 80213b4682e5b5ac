"""Do the photos of a capture show the same at its points? Colours at the projected points, correlated over photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from infnerf_ns.data.capture.consistency.scene import MAX_POINTS, CaptureScene, evenly
from infnerf_ns.data.capture.photo_files import Depth
from infnerf_ns.data.capture.photos import Levels, read_thumbnail
from infnerf_ns.data.projection import project, single_cameras
from infnerf_ns.data.sfm import in_front
from infnerf_ns.data.thread_pool import threads

SIDE = 256
"""Longer side of the photos that are compared, pixels."""
BLUR = 1.0
"""Standard deviation of the filter before colours are taken, pixels of those."""
MAX_PHOTOS = 24
"""Photos that are compared."""
NEIGHBOURS = 4
"""Photos of a large capture are compared in groups of so many neighbours."""
OCCLUDERS = 10
"""Points, per compared one, that may hide it where no tracks say which photos see it."""
MIN_PAIRS = 200
"""Pairs of photos and points without which there is no agreement."""
MAX_ANGLE = 30.0
"""Degrees between the directions from which two photos see a point; from others it may be hidden."""
MIN_DETAIL = 64
"""Photos smaller than this have too few pixels for a verdict on their agreement."""
SMOOTH = 0.4
"""Correlation of colours a step of 2 % apart within a photo, below which photos are noise to this check."""
_LUMA_CHROMA = np.array([[0.299, 0.5, 0.25], [0.587, -0.5, 0.25], [0.114, 0.0, -0.5]], dtype=np.float32)

Picture = Float[np.ndarray, "h w 3"]
"""A small photo, smooth: brightness and two chroma differences."""


@dataclass(frozen=True)
class Views:
    """The photos that are compared."""

    chosen: Int[np.ndarray, "k"]
    pictures: list[Picture]


@dataclass(frozen=True)
class Samples:
    """Where P points lie in K photos."""

    points: Int[np.ndarray, "p"]
    seen: Bool[np.ndarray, "p k"]
    places: Float[np.ndarray, "p k 2"]
    """x and y over width and height of the photo"""
    pairs: Bool[np.ndarray, "p k k"]
    """photos, each pair once, that see the point from similar directions"""


def photo_agreement(
    outputs: DataparserOutputs,
    upright: Callable[[int], bool],
    levels: Mapping[Depth, Levels],
    prefer: Sequence[bool],
) -> float | None:
    """The agreement of the photos at the points, if they are read in one way.

    Args:
        outputs: of the train split, with points.
        upright: whether a photo is turned as its EXIF tag says.
        levels: of photos with more than 8 bits.
        prefer: photos that the question is about.

    Returns:
        None where nothing can be said.
    """
    capture = CaptureScene.of(outputs, None)
    if capture is None:
        return None
    chosen = choose_photos(capture.cameras, MAX_PHOTOS, np.asarray(prefer))
    views = Views(chosen, small_photos(outputs, chosen, upright, levels))
    return agreement_at_points(sample_points(capture, views), views.pictures)


def choose_photos(cameras: Cameras, limit: int, prefer: Bool[np.ndarray, "c"] | None = None) -> Int[np.ndarray, "k"]:
    """Photos to compare: all of a small capture; of a large one groups of neighbours that look the same way."""
    count = len(cameras)
    if count <= limit:
        return np.arange(count)
    poses = cameras.camera_to_worlds.double().numpy()
    places, axes = poses[:, :, 3], poses[:, :, 2]
    candidates = np.arange(count) if prefer is None or not prefer.any() else np.nonzero(prefer)[0]
    chosen: list[int] = []
    for seed in candidates[evenly(len(candidates), limit // NEIGHBOURS)]:
        apart = np.linalg.norm(places - places[seed], axis=-1) / np.maximum((axes @ axes[seed] + 1) / 2, 0.05)
        apart[chosen] = np.inf
        chosen += [int(index) for index in np.argsort(apart, kind="stable")[:NEIGHBOURS] if index not in chosen]
    return np.array(sorted(set(chosen)))


def small_photos(
    outputs: DataparserOutputs,
    chosen: Int[np.ndarray, "k"],
    upright: Callable[[int], bool],
    levels: Mapping[Depth, Levels],
) -> list[Picture]:
    """Small copies of photos."""

    def load(index: int) -> Picture:
        small = read_thumbnail(outputs.image_filenames[index], SIDE, upright=upright(index), levels=levels)
        return cv2.GaussianBlur(small.astype(np.float32) @ _LUMA_CHROMA, (0, 0), BLUR)

    with threads(most=8) as pool:
        return list(pool.map(load, chosen.tolist()))


def sample_points(capture: CaptureScene, views: Views, limit: int = MAX_POINTS) -> Samples:
    """At most ``limit`` points that at least two of the photos see, and where."""
    cameras, points = capture.scaled(views.chosen)
    count = len(views.chosen)
    if capture.tracks is not None:
        slot = np.full(len(capture.cameras), -1)
        slot[views.chosen] = np.arange(count)
        photo = slot[capture.tracks.photo.numpy()]
        point, photo = capture.tracks.point.numpy()[photo >= 0], photo[photo >= 0]
        several = np.nonzero(np.bincount(point, minlength=len(points)) >= 2)[0]
        chosen = several[evenly(len(several), limit)]
        row = np.full(len(points), -1)
        row[chosen] = np.arange(len(chosen))
        seen = np.zeros((len(chosen), count), bool)
        seen[row[point[row[point] >= 0]], photo[row[point] >= 0]] = True
    else:
        finite = np.nonzero(np.isfinite(capture.points).all(axis=-1))[0]
        chosen = finite[evenly(len(finite), OCCLUDERS * limit)]
        seen = np.ones((len(chosen), count), bool)
    places = np.zeros((len(chosen), count, 2), np.float32)
    directions = np.zeros((len(chosen), count, 3), np.float32)
    here = points[torch.from_numpy(chosen)]
    for index, camera in enumerate(single_cameras(cameras)):
        projection = project(camera, here)
        inside = projection.inside & torch.from_numpy(seen[:, index])
        at = inside.nonzero()[:, 0]
        if capture.tracks is None and len(at):
            at = at[in_front(projection.pixels[at], projection.distance[at], int(camera.width), int(camera.height))]
        seen[:, index] = False
        seen[at.numpy(), index] = True
        places[:, index] = (projection.pixels / torch.cat([camera.width, camera.height])).numpy()
        offset = here - camera.camera_to_worlds[:, 3]
        directions[:, index] = (offset / offset.norm(dim=-1, keepdim=True).clamp(min=1e-12)).numpy()
    several = np.nonzero(seen.sum(axis=1) >= 2)[0]
    kept = several[evenly(len(several), limit)]
    seen, directions = seen[kept], directions[kept]
    near = np.einsum("pid,pjd->pij", directions, directions, optimize=True) > np.cos(np.radians(MAX_ANGLE))
    pairs = np.triu(seen[:, :, None] & seen[:, None, :] & near, 1)
    return Samples(chosen[kept], seen, places[kept], pairs)


def _colours(
    samples: Samples, pictures: Sequence[Picture], places: np.ndarray | None = None
) -> Float[np.ndarray, "p k 3"]:
    """Brightness and two chroma differences at the points, without the mean and the contrast of the photo; 0 where a
    photo does not see the point."""
    places = samples.places if places is None else places
    colours = np.zeros((*samples.seen.shape, 3), np.float32)
    for index, picture in enumerate(pictures):
        seen = samples.seen[:, index]
        if not seen.any():
            continue
        height, width = picture.shape[:2]
        at = places[seen, index].astype(np.float32) * np.float32([width, height]) - np.float32(0.5)
        values = cv2.remap(picture, at[None, :, 0], at[None, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[
            0
        ]
        spread = values.std(axis=0)
        centred = values - values.mean(axis=0)
        colours[seen, index] = np.where(spread > 0.5, centred / np.maximum(spread, 0.5), 0)
    return colours


def _correlation(colours: Float[np.ndarray, "p k 3"], pairs: Bool[np.ndarray, "p k k"]) -> float | None:
    """Mean over the channels that vary."""
    weight = pairs.astype(np.float32)
    both = (colours * (weight @ colours)).sum(axis=(0, 1))
    power = colours**2
    norm = np.einsum("pi,pic->c", (weight.sum(axis=2) + weight.sum(axis=1)) / 2, power, optimize=True)
    varied = norm > 0.1 * weight.sum()
    return float((both[varied] / norm[varied]).mean()) if varied.any() else None


def agreement_at_points(
    samples: Samples,
    pictures: Sequence[Picture],
    places: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float | None:
    """The agreement of the photos; None where too few see the same points."""
    if samples.pairs.sum() < MIN_PAIRS:
        return None
    return _correlation(_colours(samples, pictures, places(samples.places) if places else None), samples.pairs)


def agreement_by_chance(samples: Samples, pictures: Sequence[Picture]) -> float | None:
    """The mean agreement of photos that are exchanged with others, not their neighbours."""
    count, found = len(pictures), []
    for shift in np.unique(np.linspace(0.2 * count, 0.8 * count, 4).round().astype(int).clip(1)):
        found.append(_correlation(_colours(samples, [*pictures[shift:], *pictures[:shift]]), samples.pairs))
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def colour_agreement(
    capture: CaptureScene,
    samples: Samples,
    pictures: Sequence[Picture],
    places: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float | None:
    """The correlation of the points' own colours with the photos'."""
    if capture.colours is None or samples.seen.sum() < MIN_PAIRS:
        return None
    own = capture.colours[samples.points].astype(np.float32) @ _LUMA_CHROMA
    colours = _colours(samples, pictures, places(samples.places) if places else None)
    found = []
    for channel in range(3):
        sums = np.zeros(2)
        for index in range(len(pictures)):
            seen = samples.seen[:, index]
            values = own[seen, channel]
            if seen.sum() < 3 or values.std() < 0.5 or not colours[seen, index, channel].any():
                continue
            values = (values - values.mean()) / values.std()
            sums += (values * colours[seen, index, channel]).sum(), seen.sum()
        if sums[1]:
            found.append(sums[0] / sums[1])
    return float(np.mean(found)) if found else None


def has_detail(views: Views) -> bool:
    """Whether the photos are such that one place of theirs tells something about the next."""
    found = []
    for picture in views.pictures:
        if min(picture.shape[:2]) < MIN_DETAIL:
            return False
        luma = picture[..., 0]
        step = max(1, round(0.02 * max(luma.shape)))
        if luma.std() > 1:
            found.append(np.corrcoef(luma[:, step:].ravel(), luma[:, :-step].ravel())[0, 1])
    return len(found) >= 6 and float(np.median(found)) >= SMOOTH
