"""The SfM scene: points, the footprint that the photos give them, and the near plane. The octree is built from it.

N points, C cameras (the photos of the train split), camera axes as nerfstudio's (OpenGL: x right, y up, z backwards).
A point's footprint is the finest over the photos that observe it, ``min z**2 / (f * ||p_cam||)`` (InfNeRF,
supplement). Which photos observe a point comes from the best source there is:

- ``tracks``: COLMAP's 2D-3D matches, or figures that the dataparser computed itself;
- ``visibility``: points without tracks; a photo observes what projects into it and is not hidden by nearer points.
  More photos than those with a match, so the second finest footprint counts: it agrees best with the tracks where both
  are known;
- ``frusta``: no points at all; they are spread over the part of the viewing frusta that several photos share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track
from torch import Tensor

from infnerf_ns.data.point_files import Tracks
from infnerf_ns.data.projection import project, single_cameras
from infnerf_ns.errors import InputError
from infnerf_ns.footprint import point_footprint
from infnerf_ns.validation import warn

MIN_PHOTOS = 3
"""A point seen in fewer photos is dropped: its position is not reliable."""
DEPTH_PERCENTILE = 0.001
"""Share of the (photo, point) distances that may lie in front of twice the near plane."""
POINTS_PER_CELL = 8
"""Mean number of points per cell of the z-buffer that decides which points are hidden."""
HIDDEN_TOLERANCE = 1.3
"""A point is hidden behind its cell's front if it is this many times farther away."""
FRUSTUM_GRID = 16
"""Frustum points per photo, per image axis and in depth."""
FRUSTUM_DEPTHS = (0.1, 2.0)
"""Depth range of frustum points, relative to the depth at which the photos meet."""
FINEST_FRUSTUM_DEPTH = 0.5
"""Frustum points get no finer footprint than at this relative depth: nothing says that anything is there."""
FRUSTUM_PHOTOS = 48
"""Photos, evenly spaced in their order, whose frusta get points."""
LOOK_OUT = 0.25
"""Cameras whose axes meet nearer than so many times their spread look out from among themselves, at nothing shared."""
SHARED_PHOTOS = 8
"""Parallel frusta meet at the depth where a typical point is seen by this many photos."""
HARDLY_ANY_PARALLAX, NO_PARALLAX = 100.0, 1000.0
"""Distance of the points over the spread of the cameras, from which on depth is hardly known, and not at all: with a
focal length of 1000 pixels a point at that distance moves by 10 pixels, and by 1, from photo to photo."""
LARGEST_DISTANCE = 1000.0
"""Scene units up to which a scene may be that far away: a capture in metres can be."""
FAR_OUTSIDE = 100.0
"""Points so many times as far from the middle as nine of ten are errors, or a horizon: no part of the scene's tree."""
_MAX_KEPT_DISTANCES = 16_000_000


@dataclass
class SfMScene:
    """Points in the frame of the dataparser's cameras, with what the train photos say about their size."""

    points: Float[Tensor, "n 3"]
    """positions, scene units"""
    footprints: Float[Tensor, "n"]
    """radius of the ball that covers about one full-size pixel of the photo that sees the point best, scene units"""
    num_photos: Int[Tensor, "n"]
    """train photos that see the point"""
    near: float
    """half of the 0.1 percentile of the distances between cameras and the points that they see, scene units"""
    source: Literal["tracks", "visibility", "frusta", "checkpoint"]
    """where the visibility comes from; ``checkpoint``: nothing is known yet, all of it comes with the checkpoint"""

    @staticmethod
    def placeholder() -> SfMScene:
        """A scene without content for a model that is going to load a checkpoint, which holds its own tree."""
        points, unseen = torch.eye(3), torch.full((3,), torch.inf)
        return SfMScene(points, unseen, torch.zeros(3, dtype=torch.int64), 1.0, "checkpoint")


class _Observations(NamedTuple):
    """What the photos say about all points: finest footprint [N] (inf = unseen), photos that see it [N], distances [K]
    of a regular subset of all (photo, seen point) pairs and the index [K] of their points."""

    footprints: Float[Tensor, "n"]
    num_photos: Int[Tensor, "n"]
    distances: Float[Tensor, "k"]
    distance_points: Int[Tensor, "k"]


def build_sfm_scene(dataparser_outputs: DataparserOutputs, cameras: Cameras) -> SfMScene:
    """Points, footprints and near plane of a capture.

    Args:
        dataparser_outputs: outputs of the *train* split. Its metadata may hold ``points3D_xyz [N, 3]`` and beside it
            either ``points3D_track_footprint [N]`` (with ``points3D_num_points2D [N]`` and
            ``points3D_depth_percentile``), or ``tracks``, the :class:`~infnerf_ns.data.point_files.Tracks` of COLMAP.
        cameras: the C train cameras at the resolution that is trained, in the order of the dataparser's.

    Returns:
        The scene, on the CPU. Points seen in fewer than 3 photos are dropped, unless the capture has fewer than 3
        photos or no point would remain.

    Raises:
        InputError: all photos are taken from one place.
    """
    cameras = cameras.flatten().to("cpu")
    metadata = dataparser_outputs.metadata
    points = metadata.get("points3D_xyz")
    if points is None or len(points) == 0:
        return _frusta_scene(cameras, "the dataparser gives no SfM points")
    points = torch.as_tensor(points).detach().to("cpu", torch.float32)
    if "points3D_track_footprint" in metadata:
        return _given_scene(points, metadata, float((dataparser_outputs.cameras.fx.cpu() / cameras.fx).median()))
    if "tracks" in metadata:
        source, observations = "tracks", _observe_tracks(points, metadata["tracks"], cameras)
        bare = torch.as_tensor(metadata.get("points3D_num_points2D", torch.ones(len(points)))) == 0
        if bare.any():
            warn(
                f"{int(bare.sum())} of the {len(points)} SfM points have no track: which photos see them is found by"
                " projecting them"
            )
            observations = _merged(observations, _observe_visible(points, cameras), bare)
    else:
        source, observations = "visibility", _observe_visible(points, cameras)
    finite = ~far_outside(points) & torch.isfinite(observations.footprints) & (observations.footprints > 0)
    keep = finite & (observations.num_photos >= (MIN_PHOTOS if len(cameras) >= MIN_PHOTOS else 1))
    if not keep.any():
        keep = finite & (observations.num_photos > 0)
    if not keep.any():
        return _frusta_scene(cameras, f"no train photo sees any of the {len(points)} SfM points")
    distances = observations.distances[keep[observations.distance_points]]
    _check_parallax(cameras, distances)
    near = _near_plane(distances)
    return SfMScene(points[keep], observations.footprints[keep], observations.num_photos[keep], near, source)


def far_outside(points: Float[Tensor, "n 3"]) -> Bool[Tensor, "n"]:
    """Points that are not finite, or lie far outside of all others."""
    finite = torch.isfinite(points).all(dim=-1)
    if not finite.any():
        return ~finite
    apart = (points - points[finite].median(dim=0).values).norm(dim=-1)
    usual = apart[finite].sort().values[int(0.9 * (int(finite.sum()) - 1))]
    return ~finite | ((apart > FAR_OUTSIDE * usual) & (usual > 0))


def _check_parallax(cameras: Cameras, distances: Float[Tensor, "k"]) -> None:
    """Photos from one place say little about depth, and nerfstudio makes the cameras' spread the unit of the scene.

    Args:
        cameras: of the photos.
        distances: from them to the points that they see.

    Raises:
        InputError: the scene would be thousands of units large.
    """
    origins = cameras.camera_to_worlds[:, :, 3].double()
    spread, distance = float((origins - origins.mean(0)).norm(dim=-1).max()), float(distances.median())
    if distance <= HARDLY_ANY_PARALLAX * spread:
        return
    what = (
        f"the photos are taken from nearly one place: they are {spread:.3g} scene units apart, and what they see is"
        f" {distance:.3g} away"
    )
    if distance > NO_PARALLAX * spread and distance > LARGEST_DISTANCE:
        raise InputError(
            f"{what}, so depth cannot be known: add photos from other places; to train the colours alone, keep the"
            " capture's units (--auto-scale-poses False after the dataparser's name)"
        )
    warn(f"{what}: depth is hardly known, and views from other places will be wrong")


def _pixels_per_radian(cameras: Cameras) -> Float[Tensor, "c"]:
    """Focal length in pixels; for equirectangular cameras the pixels per radian."""
    focal = torch.sqrt(cameras.fx * cameras.fy)[:, 0]
    return torch.where(cameras.camera_type[:, 0] == CameraType.EQUIRECTANGULAR.value, focal / torch.pi, focal)


def _spread(cameras: Cameras, limit: int) -> Cameras:
    """At most ``limit`` cameras, evenly spaced in their order."""
    return cameras[torch.linspace(0, len(cameras) - 1, min(limit, len(cameras))).round().long()]


def _near_plane(distances: Float[Tensor, "k"]) -> float:
    """Half of the 0.1 percentile."""
    rank = max(1, round(DEPTH_PERCENTILE * len(distances)))
    return 0.5 * float(torch.kthvalue(distances, rank).values)


def _given_scene(points: Float[Tensor, "n 3"], metadata: dict[str, Any], downscale: float) -> SfMScene:
    """The dataparser knows the footprints itself; ``downscale`` is photo resolution over trained resolution."""
    footprints = torch.as_tensor(metadata["points3D_track_footprint"], dtype=torch.float32) * downscale
    counts = torch.as_tensor(metadata["points3D_num_points2D"], dtype=torch.int64)
    keep = counts >= MIN_PHOTOS
    if not keep.any():
        keep = torch.ones_like(keep)
    near = 0.5 * float(metadata["points3D_depth_percentile"])
    return SfMScene(points[keep], footprints[keep], counts[keep], near, "tracks")


def _observe_tracks(points: Float[Tensor, "n 3"], tracks: Tracks, cameras: Cameras) -> _Observations:
    """Observations from COLMAP's tracks."""
    pose = cameras.camera_to_worlds[tracks.photo]
    offset = points[tracks.point] - pose[:, :, 3]
    distance = offset.norm(dim=-1)
    perspective = (cameras.camera_type[:, 0] == CameraType.PERSPECTIVE.value)[tracks.photo]
    depth = torch.where(perspective, -(offset * pose[:, :, 2]).sum(-1), distance)
    size = point_footprint(depth, distance, _pixels_per_radian(cameras)[tracks.photo])
    finest = torch.full((len(points),), torch.inf)
    finest.scatter_reduce_(0, tracks.point, torch.where(depth > 0, size, torch.inf), "amin")
    return _Observations(finest, torch.bincount(tracks.point, minlength=len(points)), distance, tracks.point)


def _merged(some: _Observations, others: _Observations, which: Bool[Tensor, "n"]) -> _Observations:
    """The observations of some points taken from others."""
    kept, taken = ~which[some.distance_points], which[others.distance_points]
    return _Observations(
        torch.where(which, others.footprints, some.footprints),
        torch.where(which, others.num_photos, some.num_photos),
        torch.cat([some.distances[kept], others.distances[taken]]),
        torch.cat([some.distance_points[kept], others.distance_points[taken]]),
    )


def _observe_visible(points: Float[Tensor, "n 3"], cameras: Cameras) -> _Observations:
    """Observations estimated from the cameras: a photo sees what projects into it and is not behind nearer points."""
    finest = torch.full((len(points),), torch.inf)
    footprints = torch.full((len(points),), torch.inf)
    counts = torch.zeros(len(points), dtype=torch.int64)
    stride = max(1, len(points) * len(cameras) // _MAX_KEPT_DISTANCES)
    distances, distance_points = [], []
    photos = track(
        zip(single_cameras(cameras), _pixels_per_radian(cameras)),
        "Finding which photos see which points",
        len(cameras),
        console=CONSOLE,
        transient=True,
    )
    for camera, focal in photos:
        projection = project(camera, points)
        index = projection.inside.nonzero()[:, 0]
        if len(index) == 0:
            continue
        distance = projection.distance[index]
        front = in_front(projection.pixels[index], distance, int(camera.width), int(camera.height))
        index, distance = index[front], distance[front]
        size = point_footprint(projection.depth[index], distance, focal)
        footprints[index] = torch.minimum(footprints[index], torch.maximum(finest[index], size))
        finest[index] = torch.minimum(finest[index], size)
        counts[index] += 1
        distances.append(distance[::stride])
        distance_points.append(index[::stride])
    footprints = torch.where(counts > 1, footprints, finest)
    if not distances:
        return _Observations(footprints, counts, torch.empty(0), torch.empty(0, dtype=torch.int64))
    return _Observations(footprints, counts, torch.cat(distances), torch.cat(distance_points))


def in_front(pixels: Float[Tensor, "n 2"], distance: Float[Tensor, "n"], width: int, height: int) -> Bool[Tensor, "n"]:
    """Which points of one photo are not hidden: a coarse z-buffer, its cells large enough to hold several points."""
    cell = max(1.0, (POINTS_PER_CELL * width * height / len(pixels)) ** 0.5)
    columns = int(width / cell) + 1
    rows = int(height / cell) + 1
    at = (pixels / cell).long()
    at = at[:, 1].clamp(0, rows - 1) * columns + at[:, 0].clamp(0, columns - 1)
    front = torch.full((rows * columns,), torch.inf).scatter_reduce_(0, at, distance, "amin")
    return distance <= HIDDEN_TOLERANCE * front[at]


def _frusta_scene(cameras: Cameras, why: str) -> SfMScene:
    """Points on a regular grid in every frustum, from close by to behind the depth at which the photos meet."""
    reach = _shared_depth(cameras)
    CONSOLE.log(
        f"[yellow]infnerf: {why}: the octree is built from the camera frusta, "
        f"up to {reach * FRUSTUM_DEPTHS[1]:.3g} scene units deep. SfM points (sparse_pc.ply or a COLMAP model) "
        "give a better tree."
    )
    steps = (torch.arange(FRUSTUM_GRID) + 0.5) / FRUSTUM_GRID
    depths = reach * torch.lerp(torch.tensor(FRUSTUM_DEPTHS[0]), torch.tensor(FRUSTUM_DEPTHS[1]), steps)
    chosen = _spread(cameras, FRUSTUM_PHOTOS)
    points = torch.cat([_frustum_points(chosen, depth) for depth in depths])
    own = torch.arange(len(chosen)).repeat_interleave(FRUSTUM_GRID**2).repeat(len(depths))
    own_distance = (points - chosen.camera_to_worlds[own][:, :, 3]).norm(dim=-1)
    footprints = torch.full((len(points),), torch.inf)
    counts = torch.zeros(len(points), dtype=torch.int64)
    for camera, focal in zip(single_cameras(cameras), _pixels_per_radian(cameras)):
        projection = project(camera, points)
        size = point_footprint(projection.depth, projection.distance, focal).clamp(
            min=FINEST_FRUSTUM_DEPTH * reach / focal
        )
        footprints = torch.minimum(footprints, torch.where(projection.inside, size, torch.inf))
        counts += projection.inside
    keep = torch.isfinite(footprints) & (counts >= MIN_PHOTOS)
    if not keep.any():
        keep = torch.isfinite(footprints)
    return SfMScene(points[keep], footprints[keep], counts[keep], _near_plane(own_distance), "frusta")


def _frustum_points(cameras: Cameras, depth: Tensor | float) -> Float[Tensor, "m 3"]:
    """A grid of points per photo, ``depth`` along each ray's forward direction (distance for wide cameras), camera by
    camera."""
    steps = (torch.arange(FRUSTUM_GRID) + 0.5) / FRUSTUM_GRID
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)
    index = torch.arange(len(cameras)).repeat_interleave(len(grid))
    size = torch.cat([cameras.height, cameras.width], dim=-1)[index]
    rays = cameras.generate_rays(index[:, None], coords=grid.repeat(len(cameras), 1) * size)
    forward = -(rays.directions * cameras.camera_to_worlds[index][:, :, 2]).sum(-1, keepdim=True)
    perspective = cameras.camera_type[index] == CameraType.PERSPECTIVE.value
    return rays.origins + rays.directions * torch.where(perspective, depth / forward.clamp(min=1e-3), depth)


def _shared_depth(cameras: Cameras) -> float:
    """The depth at which the photos show the same things: the median distance to the point that all optical axes look
    at, or (axes nearly parallel, as in a mapping flight) the first depth at which a typical frustum point is seen by
    several photos."""
    origins = cameras.camera_to_worlds[:, :, 3].double()
    axes = -cameras.camera_to_worlds[:, :, 2].double()
    spread = float((origins - origins.mean(0)).norm(dim=-1).max())
    if spread <= 0:
        return 1.0
    off_axis = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    normal = off_axis.mean(0)
    if float(torch.linalg.eigvalsh(normal)[0]) > 0.02:  # mean squared sine of the axes' angles: not nearly parallel
        focus = torch.linalg.solve(normal, (off_axis @ origins[:, :, None]).mean(0)[:, 0])
        along = ((focus - origins) * axes).sum(-1)
        if float((along > 0).double().mean()) > 0.5 and float(along.median()) > LOOK_OUT * spread:
            return float(along.median())
    wanted = min(SHARED_PHOTOS, len(cameras))
    depths = spread * torch.logspace(-2, 1, 25)
    chosen = _spread(cameras, 16)
    for depth in depths.tolist():
        points = _frustum_points(chosen, depth)
        seen = sum(project(camera, points).inside.long() for camera in single_cameras(cameras))
        if float(seen.double().median()) >= wanted:
            return depth
    return spread
