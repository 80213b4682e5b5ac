"""Do the photos, the poses and the points of a capture belong together? One check before training, for any dataparser.

Three figures, each left out where there is nothing to take it from:

- *seen*: the share of the points that lie in front of and inside at least one, and three, train photos;
- *reprojection*: the median distance in pixels between a point's projection and the pixel of its track;
- *agreement*: whether photos that see a point show the same colour there. The colours at the projected points, in
  photos of ``SIDE`` pixels without their mean and contrast, are correlated over all pairs of photos that look at a
  point from similar directions; 1 is perfect. ``by chance`` is the same with the photos exchanged with others, so that
  what all photos have in common (sky above ground) counts for nothing. The colours of the points, where they have any,
  are compared with the photos in the same way.

Where they are low, the mistakes that people make are tried one by one (turned and mirrored photos, axes, inverted
poses, units, offsets), and one is named as the cause if with it everything fits clearly better.

Measured on real captures, with up to 40 photos (copr, lego damaged) or ``MAX_PHOTOS``; empty: not run.

====================  ==========  ==========  ==========  ==========  ======================
agreement / chance    fox         caliterra   copr        lego        then
====================  ==========  ==========  ==========  ==========  ======================
as it is, PLY         .93 / .29   .87 / .05   .87 / .14   .80 / .18   passes
as it is, COLMAP      .93 / .25   .89 / .06   .86 / .11   .99 / .18   passes
9 photos              .96 / .52                           .71 / .19   passes
mirrored              .43 / .28   .09 / .06   .20 / .12   .30 / .14   refused, named
turned by 180         .35 / .29   .09 / .00   .15 / .12   .45 / .14   refused, named
photos permuted       .15 / .21   -.03 / .01  .12 / .12   .16 / .15   refused, no cause
shifted by one photo  .45 / .29   .07 / .03   .18 / .13   .08 / .16   warning (fox), refused
focal length x 0.5    .49 / .21   .17 / .04   .16 / .09   .51 / .17   refused, named (not lego)
focal length x 1.1    .87 / .27   .66 / .06   .50 / .12   .76 / .25   passes (copr: warning)
y and z exchanged     .71 / .22                           .57 / .28   refused, by colours
world-to-camera       .22 / .11                           not seen    refused, named
OpenCV's axes         not seen                            not seen    refused, named
points in cm, mm      not seen                            .08 / .13   refused, named
50 of them far away   .93 / .29                           .79 / .21   passes, said
====================  ==========  ==========  ==========  ==========  ======================

``colours`` are .79 / .90 (fox, PLY / COLMAP), .69 / .73, .52 / .55, .54 / .87 as the captures are, -.09 with exchanged
axes on fox, .19 mirrored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from infnerf_ns.data.capture.photos import Depth, Levels, read_thumbnail
from infnerf_ns.data.capture.reading import capture_photos
from infnerf_ns.data.point_files import Tracks
from infnerf_ns.data.projection import project, single_cameras
from infnerf_ns.data.sfm import in_front
from infnerf_ns.data.thread_pool import threads
from infnerf_ns.errors import InputError

SIDE = 256
"""Longer side of the photos that are compared, pixels."""
BLUR = 1.0
"""Standard deviation of the filter before colours are taken, pixels of those."""
MAX_PHOTOS = 24
"""Photos that are compared."""
NEIGHBOURS = 4
"""Photos of a large capture are compared in groups of so many neighbours."""
MAX_POINTS = 500
"""Points that are projected into all photos, and points that colours are compared at."""
SEARCH_POINTS = 250
"""The same while causes are tried."""
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
MAX_DISTANCE = 1000.0
"""Points farther away than this many times the extent of the photos' positions count as not seen: from there the
photos are one, and none of them can have told how far the points are."""

FEW_SEEN = 0.3
"""Share of points inside photos below which there is a warning."""
NONE_SEEN = 0.01
"""Share of points inside photos below which they are points of something else."""
FEW_PHOTOS = 0.5
"""Share of photos that see points below which there is a warning."""
FEW_MATCHES = 0.5
"""Share of the tracks' matches that must lie inside of their photos."""
LARGE_ERROR, WRONG_ERROR = 0.005, 0.05
"""Reprojection error over the photo's longer side: a warning, a refusal."""
LITTLE_AGREEMENT, NO_AGREEMENT = 0.5, 0.08
"""Agreement beyond chance, of what is possible beyond chance: a warning, a refusal."""
OTHER_COLOURS = 0.25
"""Correlation of points' and photos' colours below which a cause is looked for."""
MIN_PHOTOS = 6
"""Photos without which chance is not known well enough for a verdict on the agreement alone."""
BETTER = 0.25
"""A cause is named if the agreement, or the correlation with the points' colours, rises by so much with it, at least to
``GOOD``."""
GOOD = 0.45
_LUMA_CHROMA = np.array([[0.299, 0.5, 0.25], [0.587, -0.5, 0.25], [0.114, 0.0, -0.5]], dtype=np.float32)
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


@dataclass(frozen=True)
class ConsistencyReport:
    """The figures; None where there is nothing to take one from."""

    num_points: int
    seen: float | None
    """share of the points inside at least one train photo"""
    seen_often: float | None
    """share inside at least three"""
    photos: float | None
    """share of the photos that see points"""
    matches: float | None
    """share of the tracks' matches that lie inside of their photos"""
    reprojection: float | None
    """median, pixels of the dataparser's cameras"""
    agreement: float | None
    """of the photos at the points, up to 1"""
    by_chance: float | None
    """the same with exchanged photos"""
    colours: float | None
    """correlation of the points' own colours with the photos'"""
    far_points: int
    """points that lie far outside of all others"""

    def __str__(self) -> str:
        if self.seen is None:
            return "photos, poses and points: there are no points to compare"
        parts = [
            f"{self.num_points} points, {self.seen:.0%} inside a photo, {self.seen_often:.0%} inside three or more; "
            f"{self.photos:.0%} of the photos see some"
        ]
        if self.matches is not None:
            parts.append(f"{self.matches:.0%} of the matches are inside their photo")
        if self.reprojection is not None:
            parts.append(f"reprojection error {self.reprojection:.2f} pixels")
        if self.agreement is not None:
            parts.append(f"photos agree at the points by {self.agreement:.2f} (by chance {self.by_chance:.2f})")
        if self.colours is not None:
            parts.append(f"with the points' colours by {self.colours:.2f}")
        if self.far_points:
            parts.append(f"{self.far_points} points lie far outside")
        return "photos, poses and points: " + "; ".join(parts)

    @property
    def beyond_chance(self) -> float | None:
        """Agreement beyond chance, of what is possible."""
        if self.agreement is None or self.by_chance is None:
            return None
        return (self.agreement - self.by_chance) / max(1 - self.by_chance, 1e-6)


def check_consistency(outputs: DataparserOutputs, cameras: Cameras | None = None) -> ConsistencyReport:
    """Prints the figures of a train split, and a warning where they are low.

    Args:
        outputs: of the train split, with ``points3D_xyz``, and ``points3D_rgb`` and ``tracks`` if there are any; the
            photos are read as its ``capture_photos`` says.
        cameras: instead of its own.

    Raises:
        InputError: photos, poses and points cannot belong together.
    """
    capture = _Capture.of(outputs, cameras)
    if capture is None:
        report = ConsistencyReport(0, None, None, None, None, None, None, None, None, 0)
        CONSOLE.log(str(report))
        return report
    views = _compared_views(outputs, capture)
    report = _report(outputs, capture, views)
    CONSOLE.log(str(report))
    _judge(report, capture, views)
    return report


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
    capture = _Capture.of(outputs, None)
    if capture is None:
        return None
    chosen = _choose_photos(capture.cameras, MAX_PHOTOS, np.asarray(prefer))
    views = _Views(chosen, _pictures(outputs, chosen, upright, levels))
    return _agreement(_samples(capture, views), views.pictures)


class _Capture(NamedTuple):
    """Points and cameras in the frame of the capture's files, moved to the middle of the cameras."""

    cameras: Cameras
    poses: Float[np.ndarray, "c 3 4"]
    points: Float[np.ndarray, "n 3"]
    colours: UInt8[np.ndarray, "n 3"] | None
    tracks: Tracks | None
    origin: Float[np.ndarray, "3"]
    """the origin of the files, which a change of units or axes leaves where it is"""

    @staticmethod
    def of(outputs: DataparserOutputs, cameras: Cameras | None) -> _Capture | None:
        """None without points or photos."""
        points = outputs.metadata.get("points3D_xyz")
        cameras = (outputs.cameras if cameras is None else cameras).flatten().to("cpu")
        if points is None or len(points) == 0 or len(cameras) == 0:
            return None
        points = torch.as_tensor(points).detach().cpu().double().numpy()
        finite = np.isfinite(points).all(axis=-1)
        points = np.where(finite[:, None], points, np.inf)
        poses = cameras.camera_to_worlds.double().numpy()
        transform = outputs.dataparser_transform.double().numpy()
        to_files = transform[:, :3].T
        positions = (poses[:, :, 3] / outputs.dataparser_scale - transform[:, 3]) @ to_files.T
        points = (points / outputs.dataparser_scale - transform[:, 3]) @ to_files.T
        middle = positions.mean(axis=0)
        poses = np.concatenate([to_files @ poses[:, :, :3], (positions - middle)[:, :, None]], axis=-1)
        rgb = outputs.metadata.get("points3D_rgb")
        colours = None if rgb is None or len(rgb) != len(points) else torch.as_tensor(rgb).cpu().numpy()
        return _Capture(cameras, poses, points - middle, colours, outputs.metadata.get("tracks"), -middle)

    def moved(self, poses: np.ndarray | None = None, points: np.ndarray | None = None) -> _Capture:
        """The same with other poses or points, for which the tracks say nothing."""
        poses, points = self.poses if poses is None else poses, self.points if points is None else points
        middle = poses[:, :, 3].mean(axis=0)
        poses = poses.copy()
        poses[:, :, 3] -= middle
        return self._replace(poses=poses, points=points - middle, tracks=None, origin=self.origin - middle)

    def scene(self, chosen: Int[np.ndarray, "k"]) -> tuple[Cameras, Float[Tensor, "n 3"]]:
        """Some of the cameras and all points, scaled to numbers of ordinary size."""
        scale = 1 / max(np.abs(self.poses[:, :, 3]).max(), 1e-12)
        cameras = copy.copy(self.cameras[torch.from_numpy(chosen)])
        poses = self.poses[chosen].copy()
        poses[:, :, 3] *= scale
        cameras.camera_to_worlds = torch.from_numpy(poses).float()
        return cameras, torch.from_numpy(self.points * scale).float()


_Picture = Float[np.ndarray, "h w 3"]
"""A small photo, smooth: brightness and two chroma differences."""


@dataclass(frozen=True)
class _Views:
    """The photos that are compared."""

    chosen: Int[np.ndarray, "k"]
    pictures: list[_Picture]


@dataclass(frozen=True)
class _Samples:
    """Where P points lie in K photos."""

    points: Int[np.ndarray, "p"]
    seen: Bool[np.ndarray, "p k"]
    places: Float[np.ndarray, "p k 2"]
    """x and y over width and height of the photo"""
    pairs: Bool[np.ndarray, "p k k"]
    """photos, each pair once, that see the point from similar directions"""


class _Cause(NamedTuple):
    """A mistake that was tried."""

    what: str
    """is wrong, the end of "probably ..." """
    remedy: str
    capture: _Capture
    """without the mistake"""
    places: Callable[[np.ndarray], np.ndarray] | None = None
    """without the mistake, if it is one of the photos"""


def _evenly(count: int, limit: int) -> Int[np.ndarray, "m"]:
    """At most ``limit`` indices, evenly spaced."""
    if count == 0:
        return np.zeros(0, np.int64)
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def _choose_photos(cameras: Cameras, limit: int, prefer: Bool[np.ndarray, "c"] | None = None) -> Int[np.ndarray, "k"]:
    """Photos to compare: all of a small capture; of a large one groups of neighbours that look the same way."""
    count = len(cameras)
    if count <= limit:
        return np.arange(count)
    poses = cameras.camera_to_worlds.double().numpy()
    places, axes = poses[:, :, 3], poses[:, :, 2]
    candidates = np.arange(count) if prefer is None or not prefer.any() else np.nonzero(prefer)[0]
    chosen: list[int] = []
    for seed in candidates[_evenly(len(candidates), limit // NEIGHBOURS)]:
        apart = np.linalg.norm(places - places[seed], axis=-1) / np.maximum((axes @ axes[seed] + 1) / 2, 0.05)
        apart[chosen] = np.inf
        chosen += [int(index) for index in np.argsort(apart, kind="stable")[:NEIGHBOURS] if index not in chosen]
    return np.array(sorted(set(chosen)))


def _compared_views(outputs: DataparserOutputs, capture: _Capture) -> _Views:
    """The photos of a capture that are compared; fewer of a small one where every photo must be decoded in full."""
    names, photos = outputs.image_filenames, capture_photos(outputs)
    if len(names) != len(capture.cameras):
        return _Views(np.arange(0), [])
    quick = Path(names[0]).suffix.lower() in (".jpg", ".jpeg")
    limit = MAX_PHOTOS if quick else min(MAX_PHOTOS, max(12, len(names) // 10))
    chosen = _choose_photos(capture.cameras, limit)

    def upright(index: int) -> bool:
        camera = outputs.cameras[index]
        return photos.turn(names[index], (int(camera.width), int(camera.height))).followed

    return _Views(chosen, _pictures(outputs, chosen, upright, photos.levels))


def _pictures(
    outputs: DataparserOutputs,
    chosen: Int[np.ndarray, "k"],
    upright: Callable[[int], bool],
    levels: Mapping[Depth, Levels],
) -> list[_Picture]:
    """Small copies of photos."""

    def load(index: int) -> _Picture:
        small = read_thumbnail(outputs.image_filenames[index], SIDE, upright=upright(index), levels=levels)
        return cv2.GaussianBlur(small.astype(np.float32) @ _LUMA_CHROMA, (0, 0), BLUR)

    with threads(most=8) as pool:
        return list(pool.map(load, chosen.tolist()))


def _samples(capture: _Capture, views: _Views, limit: int = MAX_POINTS) -> _Samples:
    """At most ``limit`` points that at least two of the photos see, and where."""
    cameras, points = capture.scene(views.chosen)
    count = len(views.chosen)
    if capture.tracks is not None:
        slot = np.full(len(capture.cameras), -1)
        slot[views.chosen] = np.arange(count)
        photo = slot[capture.tracks.photo.numpy()]
        point, photo = capture.tracks.point.numpy()[photo >= 0], photo[photo >= 0]
        several = np.nonzero(np.bincount(point, minlength=len(points)) >= 2)[0]
        chosen = several[_evenly(len(several), limit)]
        row = np.full(len(points), -1)
        row[chosen] = np.arange(len(chosen))
        seen = np.zeros((len(chosen), count), bool)
        seen[row[point[row[point] >= 0]], photo[row[point] >= 0]] = True
    else:
        finite = np.nonzero(np.isfinite(capture.points).all(axis=-1))[0]
        chosen = finite[_evenly(len(finite), OCCLUDERS * limit)]
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
    kept = several[_evenly(len(several), limit)]
    seen, directions = seen[kept], directions[kept]
    near = np.einsum("pid,pjd->pij", directions, directions, optimize=True) > np.cos(np.radians(MAX_ANGLE))
    pairs = np.triu(seen[:, :, None] & seen[:, None, :] & near, 1)
    return _Samples(chosen[kept], seen, places[kept], pairs)


def _colours(
    samples: _Samples, pictures: Sequence[_Picture], places: np.ndarray | None = None
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


def _agreement(
    samples: _Samples,
    pictures: Sequence[_Picture],
    places: Callable[[np.ndarray], np.ndarray] | None = None,
) -> float | None:
    """The agreement of the photos; None where too few see the same points."""
    if samples.pairs.sum() < MIN_PAIRS:
        return None
    return _correlation(_colours(samples, pictures, places(samples.places) if places else None), samples.pairs)


def _by_chance(samples: _Samples, pictures: Sequence[_Picture]) -> float | None:
    """The mean agreement of photos that are exchanged with others, not their neighbours."""
    count, found = len(pictures), []
    for shift in np.unique(np.linspace(0.2 * count, 0.8 * count, 4).round().astype(int).clip(1)):
        found.append(_correlation(_colours(samples, [*pictures[shift:], *pictures[:shift]]), samples.pairs))
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def _point_colours(
    capture: _Capture,
    samples: _Samples,
    pictures: Sequence[_Picture],
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


def _seen(capture: _Capture) -> tuple[float, float, float]:
    """Shares: of the points inside a photo, inside three, and of the photos that see points."""
    finite = np.nonzero(np.isfinite(capture.points).all(axis=-1))[0]
    if len(finite) == 0:
        return 0.0, 0.0, 0.0
    cameras, points = capture.scene(np.arange(len(capture.cameras)))
    points = points[torch.from_numpy(finite[_evenly(len(finite), MAX_POINTS)])]
    positions = cameras.camera_to_worlds[:, :, 3]
    spread = float((positions - positions.mean(dim=0)).norm(dim=-1).max())
    reach = MAX_DISTANCE * spread if spread > 0 else np.inf
    counts, photos = torch.zeros(len(points), dtype=torch.int64), 0
    for camera in single_cameras(cameras):
        projection = project(camera, points)
        inside = projection.inside & (projection.distance < reach)
        counts += inside
        photos += bool(inside.any())
    several = min(3, len(capture.cameras))
    return (
        float((counts > 0).double().mean()),
        float((counts >= several).double().mean()),
        photos / len(capture.cameras),
    )


def _matches(capture: _Capture, chosen: Int[np.ndarray, "k"]) -> tuple[float | None, float | None]:
    """The share of the tracks' matches that lie inside of their photos, and the median distance of their pixels."""
    if capture.tracks is None:
        return None, None
    cameras, points = capture.scene(chosen)
    inside, errors = [], []
    for index, camera in zip(chosen.tolist(), single_cameras(cameras)):
        rows = capture.tracks.photo == index
        projection = project(camera, points[capture.tracks.point[rows]])
        inside.append(projection.inside)
        if capture.tracks.pixel is not None:
            apart = (projection.pixels - capture.tracks.pixel[rows]).norm(dim=-1)
            errors.append(torch.where(projection.inside, apart, float(max(camera.width, camera.height))))
    if not inside or len(torch.cat(inside)) == 0:
        return None, None
    return float(torch.cat(inside).double().mean()), float(torch.cat(errors).median()) if errors else None


def _far_points(points: Float[np.ndarray, "n 3"]) -> int:
    """Points that are not finite, or 100 times as far from the middle as nine of ten."""
    finite = np.isfinite(points).all(axis=-1)
    if not finite.any():
        return len(points)
    apart = np.linalg.norm(points[finite] - np.median(points[finite], axis=0), axis=-1)
    return int((~finite).sum() + (apart > 100 * np.quantile(apart, 0.9)).sum())


def _report(outputs: DataparserOutputs, capture: _Capture, views: _Views) -> ConsistencyReport:
    """All figures."""
    seen, seen_often, photos = _seen(capture)
    samples = _samples(capture, views)
    agreement = _agreement(samples, views.pictures)
    matches, reprojection = _matches(capture, views.chosen)
    return ConsistencyReport(
        num_points=len(capture.points),
        seen=seen,
        seen_often=seen_often,
        photos=photos,
        matches=matches,
        reprojection=reprojection,
        agreement=agreement,
        by_chance=None if agreement is None else _by_chance(samples, views.pictures),
        colours=_point_colours(capture, samples, views.pictures),
        far_points=_far_points(capture.points),
    )


def _judge(report: ConsistencyReport, capture: _Capture, views: _Views) -> None:
    """A warning, or the end, where the figures are low."""
    beyond, colours = report.beyond_chance, report.colours
    many = len(views.chosen) >= MIN_PHOTOS
    agree = beyond is not None and (beyond >= LITTLE_AGREEMENT or not many)
    unseen = report.seen < NONE_SEEN or (report.matches is not None and report.matches < FEW_MATCHES)
    few = report.seen < FEW_SEEN or (report.photos or 0.0) < FEW_PHOTOS
    other_colours = colours is not None and colours < OTHER_COLOURS
    doubtful = other_colours or (few if beyond is None else not agree)
    cause = _find_cause(report, capture, views, everything=unseen or doubtful)
    if cause is not None or (unseen and not agree):
        raise _refusal(report, capture, cause)
    side = float(torch.maximum(capture.cameras.width, capture.cameras.height).double().median())
    if report.reprojection is not None and report.reprojection > WRONG_ERROR * side:
        raise InputError(
            f"{report}: the tracks are not of these poses: use the points and poses of one model, or leave the points "
            f"out ({_WITHOUT_POINTS})"
        )
    if many and beyond is not None and beyond < NO_AGREEMENT and _has_detail(views):
        raise InputError(
            f"{report}: what the photos show at the points has nothing to do with each other: the poses are not of "
            "these photos (another order, other names?) or wrong: check file_path and transform_matrix of some frames"
        )
    low = []
    if report.seen < FEW_SEEN:
        low.append(f"only {report.seen:.0%} of the points are inside any photo")
    if (report.photos or 0.0) < FEW_PHOTOS:
        low.append(f"only {report.photos:.0%} of the photos see any point")
    if report.reprojection is not None and report.reprojection > LARGE_ERROR * side:
        low.append(f"the points are {report.reprojection:.1f} pixels from their tracks")
    if beyond is not None and not agree and _has_detail(views):
        low.append(f"the photos agree little at the points ({report.agreement:.2f}, {report.by_chance:.2f} by chance)")
    if low:
        CONSOLE.log(
            f"[yellow]infnerf: photos, poses and points fit badly: {' and '.join(low)}: check the poses, and that the "
            "points are of the same model"
        )


_WITHOUT_POINTS = "without 'ply_file_path' or the model's points3D the tree is built from the camera frusta"


def _refusal(report: ConsistencyReport, capture: _Capture, cause: _Cause | None) -> InputError:
    if cause is not None:
        return InputError(f"{report}: with one change they fit: {cause.what}: {cause.remedy}")
    finite = capture.points[np.isfinite(capture.points).all(axis=-1)]
    if len(finite) == 0:
        return InputError(f"{report}: no point has finite coordinates: write the points again")
    middle = np.median(finite, axis=0)
    spread = float(np.quantile(np.linalg.norm(finite - middle, axis=-1), 0.9))
    cameras = float(np.linalg.norm(capture.poses[:, :, 3], axis=-1).max())
    apart = float(np.linalg.norm(middle))
    figures = (
        f"the middle of the points is {apart:.6g} units from that of the photos; the points reach {spread:.3g} around "
        f"theirs, the photos {cameras:.3g}"
    )
    if apart > 10 * (spread + cameras):
        return InputError(
            f"{report}: {figures}: they are in different frames, one probably georeferenced (UTM) and the other local: "
            f"subtract the offset from the points, or leave the points out ({_WITHOUT_POINTS})"
        )
    return InputError(
        f"{report}: {figures}: they are in different frames or units: export points and poses together, or leave the "
        f"points out ({_WITHOUT_POINTS})"
    )


def _find_cause(report: ConsistencyReport, capture: _Capture, views: _Views, *, everything: bool) -> _Cause | None:
    """The mistake without which the capture fits clearly better, and well; None if it is none of those tried.

    Args:
        report: of the capture as it is given.
        capture: as it is given.
        views: its photos.
        everything: try mistakes of poses and points, too; else those of the photos alone, which takes no time.
    """
    groups = [_photo_causes(capture, views)] if report.agreement is not None else []
    groups += [_pose_causes(capture), _point_causes(capture)] if everything else []
    given = _samples(capture, views, SEARCH_POINTS)
    best, best_score = None, GOOD
    for cause in (each for group in groups for each in group):
        samples = given if cause.places else _samples(cause.capture, views, SEARCH_POINTS)
        agreement = _agreement(samples, views.pictures, cause.places)
        if agreement is None:
            continue
        gain = agreement - (report.agreement if report.agreement is not None else 0.0)
        if report.colours is not None:
            colours = _point_colours(cause.capture, samples, views.pictures, cause.places)
            if colours is None or gain < -0.05:
                continue
            gain, score = (
                max(gain, colours - report.colours),
                min(agreement, colours + 0.1),
            )  # of points they are always lower
        else:
            score = agreement
        if gain >= BETTER and score > best_score:
            best, best_score = cause, score
    return best


def _photo_causes(capture: _Capture, views: _Views) -> Iterator[_Cause]:
    """The photos are turned or mirrored."""
    turn = "turn them, or use the photos that the poses were computed for"
    yield _Cause("the photos are turned by 180 degrees against their poses", turn, capture, lambda at: 1 - at)
    mirror = "use the photos that the poses were computed for"
    yield _Cause("the photos are mirrored", mirror, capture, lambda at: at * [-1, 1] + [1, 0])
    yield _Cause("the photos are upside down (mirrored)", mirror, capture, lambda at: at * [1, -1] + [0, 1])
    if all(picture.shape[0] == picture.shape[1] for picture in views.pictures):
        for degrees, sign in ((90, -1), (270, 1)):
            yield _Cause(
                f"the photos are turned by {degrees} degrees against their poses",
                turn,
                capture,
                lambda at, sign=sign: (at[..., ::-1] - 0.5) * [sign, -sign] + 0.5,
            )


def _pose_causes(capture: _Capture) -> Iterator[_Cause]:
    """The poses are of another convention, or the focal length of other photos."""
    rotation, position = capture.poses[:, :, :3], capture.poses[:, :, 3] - capture.origin

    def posed(rotation: np.ndarray, position: np.ndarray) -> _Capture:
        poses = np.concatenate([rotation, position[:, :, None]], axis=-1)
        return capture.moved(poses, capture.points - capture.origin)

    inverse, inverse_position = rotation.transpose(0, 2, 1), -np.einsum("nji,nj->ni", rotation, position)
    yield _Cause(
        "the poses have OpenCV's axes (y down, z forward)",
        "negate the second and the third column of every pose, nerfstudio's cameras look along -z",
        posed(rotation @ _OPENCV, position),
    )
    for flip, axes in ((_OPENCV, ", with OpenCV's axes"), (np.eye(3), "")):
        yield _Cause(
            f"the poses are world-to-camera matrices{axes}",
            "write their inverse, camera-to-world" + (" with the second and third column negated" if axes else ""),
            posed(inverse @ flip, inverse_position),
        )
    for factor in (0.5, 2 / 3, 1.5, 2.0):
        cameras = copy.deepcopy(capture.cameras)
        cameras.fx, cameras.fy = cameras.fx * factor, cameras.fy * factor
        yield _Cause(
            f"the focal length should be about {factor:.2g} times as long",
            "use the intrinsics of these photos (fl_x, fl_y, cx and cy shrink with the photos)",
            capture._replace(cameras=cameras, tracks=None),
        )


def _point_causes(capture: _Capture) -> Iterator[_Cause]:
    """The points are in other units, or their axes are exchanged."""
    local = capture.points - capture.origin
    for unit, factor in _UNITS.items():
        yield _Cause(
            f"the points are in {unit}",
            f"multiply the points by {factor:.4g}, or leave them out ({_WITHOUT_POINTS})",
            capture.moved(points=local * factor + capture.origin),
        )
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        if order == (0, 1, 2) and signs == (1, 1, 1):
            continue
        yield _Cause(
            "the axes of the points are others than those of the poses (y up for z up, left-handed, or the like)",
            f"export points and poses with the same axes, or leave the points out ({_WITHOUT_POINTS})",
            capture.moved(points=local[:, order] * signs + capture.origin),
        )


def _has_detail(views: _Views) -> bool:
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
