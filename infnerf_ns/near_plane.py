"""The near plane of each camera, from the SfM points in front of it.

One near plane for a whole capture must let the closest photo see what is right in front of it. Photos from far above
then have a long way through air that few other photos cross, and training fills it with fog. So every camera gets a
plane of its own: half of the distance to the nearest thing that its image shows. (Own code: nerfstudio's colliders
know one near plane, or a box.) It measures 0.8 dB on the demo town, whose photos are 2 m to 77 m from what they show.

Where structure from motion has failed, the nearest point in view may be far behind what the photo shows, and a near
plane there would cut it away. So for a camera whose image is not covered with points something may also be anywhere in
the box around all points.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor, nn

from infnerf_ns.data.projection import Projection, project, single_cameras

MAX_POINTS = 65_536
"""Points that are looked at, evenly picked from all of them."""
CELLS = 32
"""Cells along the longer edge of an image; each holds the distance of its nearest point."""
MIN_POINTS = 16
"""Points in view that an image needs for a near plane of its own."""
COVERAGE_CELLS = 8
"""Cells along the longer edge of an image, of which enough must hold a point."""
MIN_COVERAGE = 0.6
"""Share of these cells. In a town without the points of one district, the photos whose near planes would be more than
twice too far have at most half of their cells covered, the others two thirds and more; in the captures caliterra, copr
and fox every photo has 0.69 and more."""
_BOX = (0.01, 0.99)
"""Quantiles of the points per axis that bound the box around them."""
_KINDS = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624, CameraType.EQUIRECTANGULAR)
NEARNESS = 0.5
"""Near plane over the second smallest of those distances: one stray point does not move it."""


def near_planes(points: Float[Tensor, "n 3"], cameras: Cameras, floor: float) -> Float[Tensor, "c"]:
    """Near plane of each camera.

    Args:
        points: SfM points, scene units.
        cameras: C cameras on the points' device, of any resolution.
        floor: no near plane is below it, and cameras that see hardly any point get it, as do orthographic and stereo
            cameras; scene units.
    """
    points = _picked(points)
    box = _box_around(points)
    nears = torch.full((len(cameras),), floor, device=points.device)
    for number, camera in enumerate(single_cameras(cameras)):
        if int(camera.camera_type) not in [kind.value for kind in _KINDS]:
            continue
        projection = project(camera, points)
        scale = CELLS / float(max(camera.width, camera.height))
        cells = (projection.pixels[projection.inside] * scale).long().clamp(max=CELLS - 1)
        front = torch.full((CELLS * CELLS,), torch.inf, device=points.device)
        front.scatter_reduce_(0, cells[:, 1] * CELLS + cells[:, 0], projection.distance[projection.inside], "amin")
        front = front[torch.isfinite(front)]
        if int(projection.inside.sum()) >= MIN_POINTS:
            nearest = float(front.kthvalue(min(2, len(front))).values)
            place = camera.camera_to_worlds.reshape(-1, 4)[:3, 3]
            nears[number] = max(floor, NEARNESS * _reach(nearest, _coverage(camera, projection), place, box))
    return nears


def _box_around(points: Float[Tensor, "n 3"]) -> Float[Tensor, "2 3"]:
    """Two corners of the box around the points."""
    return points.quantile(torch.tensor(_BOX, device=points.device), dim=0) if len(points) else points.new_zeros(2, 3)


def _reach(nearest: float, coverage: float, place: Float[Tensor, "3"], box: Float[Tensor, "2 3"]) -> float:
    """How far a camera may look before it meets something: to the nearest point, and no farther than to the box around
    all points where points cover too little of the image."""
    if coverage >= MIN_COVERAGE:
        return nearest
    return min(nearest, float((place - place.clamp(*box)).norm()))


def _coverage(camera: Cameras, projection: Projection) -> float:
    """Share of the image's cells that hold a point."""
    size = torch.tensor([float(camera.width), float(camera.height)])
    scale = COVERAGE_CELLS / float(size.max())
    columns, rows = (size * scale).ceil().long().tolist()
    cells = (projection.pixels[projection.inside] * scale).long()
    return len(torch.unique(cells[:, 1] * columns + cells[:, 0])) / (columns * rows)


def _picked(points: Float[Tensor, "n 3"]) -> Float[Tensor, "m 3"]:
    if len(points) <= MAX_POINTS:
        return points
    return points[torch.linspace(0, len(points) - 1, MAX_POINTS, dtype=torch.float64).round().long()]


class NearPlanes(nn.Module):
    """Near planes of any cameras; the points are part of the checkpoint, so a loaded model needs no SfM model.

    Args:
        points: SfM points [N, 3], scene units.
        floor: near plane of cameras that see hardly any point, scene units.
    """

    def __init__(self, points: Float[Tensor, "n 3"], floor: float) -> None:
        super().__init__()
        self.register_buffer("floor", torch.tensor(floor, dtype=torch.float64))
        self.register_buffer("points", _picked(points).clone())

    def forward(self, cameras: Cameras) -> Float[Tensor, "c"]:
        """Near planes of the cameras, batch shape ``(C,)`` or ``()``; scene units."""
        return near_planes(self.points, cameras.flatten().to(self.points.device), float(self.floor))

    def of_image(self, origins: Float[Tensor, "H W 3"], directions: Float[Tensor, "H W 3"]) -> float:
        """Near plane of an image of rays whose camera is not known: as :func:`near_planes`, but for points a
        fifth of a cell outside the image, which count too; the floor for rays that do not come from one place."""
        origin = origins[0, 0]
        if len(self.points) < MIN_POINTS or bool((origins != origin).any()):
            return float(self.floor)
        # A point is in the cell whose middle ray is nearest to it, and in the image if it is as near as a corner.
        height, width = directions.shape[:2]
        step = max(1, round(max(height, width) / COVERAGE_CELLS))
        rows, columns = (torch.arange(min(step, size) // 2, size, step) for size in (height, width))
        middles = directions[rows][:, columns].reshape(-1, 3)
        row, column = rows[len(rows) // 2], columns[len(columns) // 2]
        corner = directions[(row - step // 2).clamp(min=0), (column - step // 2).clamp(min=0)]
        way = self.points - origin
        distance = way.norm(dim=-1)
        nearness, cell = (way @ middles.T).max(dim=1)
        inside = nearness >= (corner @ directions[row, column]) * distance
        if int(inside.sum()) < MIN_POINTS:
            return float(self.floor)
        nearest = float(distance[inside].kthvalue(2).values)
        coverage = len(torch.unique(cell[inside])) / len(middles)
        reach = _reach(nearest, coverage, origin, _box_around(self.points))
        return max(float(self.floor), NEARNESS * reach)

    def fit(self, count: int) -> None:
        """Makes room for the points of a checkpoint."""
        if len(self.points) != count:
            self.points = self.points.new_zeros(count, 3)
