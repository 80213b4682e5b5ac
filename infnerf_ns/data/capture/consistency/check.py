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

Measured on real captures (``pytest tests/test_consistency_real.py`` prints it):

====================  ==========  ==========  ==========  ==========  ============================
agreement / chance    fox         caliterra   copr        lego        then
====================  ==========  ==========  ==========  ==========  ============================
as it is              .93 / .29   .87 / .05   .88 / .14   .78 / .18   passes
9 photos              .96 / .52   .94 / .14   .93 / .21   .75 / .15   passes
mirrored              .43 / .28   .09 / .06   .19 / .13   .39 / .23   refused, named
turned by 180         .35 / .29   .09 / .00   .21 / .14   .51 / .16   refused, named
photos permuted       .18 / .20   .03 / .01   .10 / .11   .14 / .12   refused, no cause
shifted by one photo  .48 / .25   .13 / .05   .21 / .14   .20 / .14   warning; copr, lego: refused
focal length x 0.5    .49 / .20   .17 / .04   .16 / .12   .44 / .14   refused, named
focal length x 1.1    .87 / .27   .66 / .05   .55 / .15   .76 / .22   passes; copr: warning
y and z exchanged     .74 / .26   .28 / .02   .05 / .04   .65 / .20   refused, named, by colours
world-to-camera       not seen    not seen    not seen    not seen    refused, named
OpenCV's axes         not seen    not seen    not seen    not seen    refused, named
points in mm          not seen    not seen    not seen    .09 / .09   refused, named
50 of them far away   .93 / .29   .90 / .06   .87 / .13   .78 / .17   passes, said
====================  ==========  ==========  ==========  ==========  ============================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.rich_utils import CONSOLE

from infnerf_ns.data.capture.consistency.agreement import (
    MAX_PHOTOS,
    Views,
    agreement_at_points,
    agreement_by_chance,
    choose_photos,
    colour_agreement,
    has_detail,
    sample_points,
    small_photos,
)
from infnerf_ns.data.capture.consistency.causes import WITHOUT_POINTS, Cause, find_cause
from infnerf_ns.data.capture.consistency.scene import CaptureScene, match_errors, seen_shares
from infnerf_ns.data.capture.reading import capture_photos
from infnerf_ns.data.sfm import far_outside
from infnerf_ns.errors import InputError

FEW_SEEN = 0.3
"""Share of points inside photos below which there is a warning."""
NONE_SEEN = 0.01
"""Share of points inside photos below which they are points of something else."""
FEW_PHOTOS = 0.8
"""Share of photos that see points below which there is a warning."""
FEW_MATCHES = 0.5
"""Share of the tracks' matches that must lie inside of their photos."""
LARGE_ERROR, WRONG_ERROR = 0.005, 0.05
"""Reprojection error over the photo's longer side: a warning, a refusal."""
LITTLE_AGREEMENT, NO_AGREEMENT = 0.5, 0.08
"""Agreement beyond chance, of what is possible beyond chance: a warning, a refusal."""
OTHER_COLOURS = 0.25
"""Correlation of points' and photos' colours below which a cause is looked for."""
FEW_POINTS = 50
"""Points of a capture of several photos below which there is a warning: they hardly say where its scene is."""
MIN_PHOTOS = 6
"""Photos without which chance is not known well enough for a verdict on the agreement alone."""


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
    capture = CaptureScene.of(outputs, cameras)
    if capture is None:
        report = ConsistencyReport(0, None, None, None, None, None, None, None, None, 0)
        CONSOLE.log(str(report))
        return report
    views = _compared_views(outputs, capture)
    report = _report(outputs, capture, views)
    CONSOLE.log(str(report))
    _judge(report, capture, views)
    return report


def _compared_views(outputs: DataparserOutputs, capture: CaptureScene) -> Views:
    """The photos of a capture that are compared; fewer of a small one where every photo must be decoded in full."""
    names, photos = outputs.image_filenames, capture_photos(outputs)
    if len(names) != len(capture.cameras):
        return Views(np.arange(0), [])
    quick = Path(names[0]).suffix.lower() in (".jpg", ".jpeg")
    limit = MAX_PHOTOS if quick else min(MAX_PHOTOS, max(12, len(names) // 10))
    chosen = choose_photos(capture.cameras, limit)

    def upright(index: int) -> bool:
        camera = outputs.cameras[index]
        return photos.turn(names[index], (int(camera.width), int(camera.height))).followed

    return Views(chosen, small_photos(outputs, chosen, upright, photos.levels))


def _report(outputs: DataparserOutputs, capture: CaptureScene, views: Views) -> ConsistencyReport:
    """All figures."""
    seen, seen_often, photos = seen_shares(capture)
    samples = sample_points(capture, views)
    agreement = agreement_at_points(samples, views.pictures)
    matches, reprojection = match_errors(capture, views.chosen)
    return ConsistencyReport(
        num_points=len(capture.points),
        seen=seen,
        seen_often=seen_often,
        photos=photos,
        matches=matches,
        reprojection=reprojection,
        agreement=agreement,
        by_chance=None if agreement is None else agreement_by_chance(samples, views.pictures),
        colours=colour_agreement(capture, samples, views.pictures),
        far_points=int(far_outside(torch.from_numpy(capture.points)).sum()),
    )


def _judge(report: ConsistencyReport, capture: CaptureScene, views: Views) -> None:
    """A warning, or the end, where the figures are low."""
    beyond, colours = report.beyond_chance, report.colours
    many = len(views.chosen) >= MIN_PHOTOS
    agree = beyond is not None and (beyond >= LITTLE_AGREEMENT or not many)
    unseen = report.seen < NONE_SEEN or (report.matches is not None and report.matches < FEW_MATCHES)
    few = report.seen < FEW_SEEN or (report.photos or 0.0) < FEW_PHOTOS
    other_colours = colours is not None and colours < OTHER_COLOURS
    doubtful = other_colours or (few if beyond is None else not agree)
    cause = find_cause(capture, views, report.agreement, colours, everything=unseen or doubtful)
    if cause is not None or (unseen and not agree):
        raise _refusal(report, capture, cause)
    side = float(torch.maximum(capture.cameras.width, capture.cameras.height).double().median())
    if report.reprojection is not None and report.reprojection > WRONG_ERROR * side and not (many and agree):
        raise InputError(
            f"{report}: the tracks are not of these poses: use the points and poses of one model, or leave the points "
            f"out ({WITHOUT_POINTS})"
        )
    if many and beyond is not None and beyond < NO_AGREEMENT and has_detail(views):
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
        low.append(f"the points are {report.reprojection:.1f} pixels from their tracks (of photos of another size?)")
    if beyond is not None and not agree and has_detail(views):
        low.append(f"the photos agree little at the points ({report.agreement:.2f}, {report.by_chance:.2f} by chance)")
    if other_colours and has_detail(views):
        low.append(f"the points' own colours are not those of the photos there ({colours:.2f})")
    if report.num_points < FEW_POINTS and many:
        low.append(f"there are only {report.num_points} points, which hardly say where the scene is")
    if low:
        CONSOLE.log(
            f"[yellow]infnerf: photos, poses and points fit badly: {' and '.join(low)}: check the poses, and that the "
            "points are of the same model"
        )


def _refusal(report: ConsistencyReport, capture: CaptureScene, cause: Cause | None) -> InputError:
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
        around = [" ".join(f"{value:.10g}" for value in place - capture.origin) for place in (middle, np.zeros(3))]
        return InputError(
            f"{report}: {figures}: they are in different frames, one probably georeferenced (UTM) and the other local: "
            f"the points lie around {around[0]}, the photos around {around[1]}: subtract from the larger coordinates "
            f"the offset that the smaller are without, or leave the points out ({WITHOUT_POINTS})"
        )
    return InputError(
        f"{report}: {figures}: they are in different frames or units: export points and poses together, or leave the "
        f"points out ({WITHOUT_POINTS})"
    )
