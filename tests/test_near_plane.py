"""Near planes: half of the distance to what an image shows, against a search over all points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from tiny_capture import look_at_origin
from torch import Tensor

from infnerf_ns.near_plane import MAX_POINTS, NearPlanes, near_planes

FLOOR = 0.01


def _wall(distance: float, count: int = 4000) -> Tensor:
    """Points of a wide wall that faces a camera at the origin that looks along -z."""
    generator = torch.Generator().manual_seed(0)
    across = 4 * distance * (torch.rand(count, 2, generator=generator) - 0.5)
    return torch.cat([across, torch.full((count, 1), -distance)], dim=-1)


def _cameras(kind: CameraType = CameraType.PERSPECTIVE, width: int = 64, height: int = 48, scale: float = 1) -> Cameras:
    pose = torch.eye(4)[None, :3]
    width, height = int(width * scale), int(height * scale)
    return Cameras(pose, 40.0 * scale, 40.0 * scale, width / 2, height / 2, width, height, camera_type=kind)


@pytest.mark.parametrize("kind", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
@pytest.mark.parametrize("distance", [0.5, 80.0])
def test_half_of_the_distance_to_a_wall(kind: CameraType, distance: float) -> None:
    near = float(near_planes(_wall(distance), _cameras(kind), FLOOR)[0])
    assert distance / 2 <= near < 1.05 * distance / 2


def test_the_resolution_does_not_matter() -> None:
    nears = [near_planes(_wall(3.0), _cameras(scale=scale), FLOOR) for scale in (0.5, 1, 4)]
    torch.testing.assert_close(nears[0], nears[1])
    torch.testing.assert_close(nears[2], nears[1])


def test_what_is_behind_or_beside_the_image_does_not_count_and_a_stray_point_neither() -> None:
    wall = _wall(10.0)
    expected = near_planes(wall, _cameras(), FLOOR)
    behind, beside, stray = (
        _wall(1.0) * torch.tensor([1, 1, -1]),
        torch.tensor([[5.0, 0, -1]]),
        torch.tensor([[0, 0, -1.0]]),
    )
    assert torch.equal(near_planes(torch.cat([wall, behind, beside]), _cameras(), FLOOR), expected)
    near = near_planes(torch.cat([wall, stray]), _cameras(), FLOOR)
    torch.testing.assert_close(near, expected, atol=0, rtol=0.02)


def test_a_small_thing_close_by_counts_before_a_crowd_of_far_points() -> None:
    """A share of all points would cut a lamp post off: it is 20 of 4,000 points, but four cells of the image."""
    post = torch.stack([torch.zeros(20), torch.linspace(-0.5, 0.5, 20), torch.full((20,), -1.5)], dim=-1)
    near = float(near_planes(torch.cat([_wall(50.0), post]), _cameras(), FLOOR)[0])
    assert near == pytest.approx(0.75, rel=0.02)


def test_ground_without_points_is_not_cut_away() -> None:
    """Regression: a camera low above a district in which structure from motion has failed took the points behind it for
    the nearest thing; in a town without the points of one block a third of the photos lost what they show."""
    ground = _wall(20.0, 60_000)
    camera = _cameras()
    camera.camera_to_worlds[0, 2, 3] = -15.0  # 5 above the ground, of which it sees 8 x 6
    assert float(near_planes(ground, camera, FLOOR)[0]) == pytest.approx(2.5, rel=0.1)
    hole = ground[(ground[:, 0].abs() > 3.5) | (ground[:, 1].abs() > 3.5)]
    assert float(near_planes(hole, camera, FLOOR)[0]) == pytest.approx(2.5, rel=0.1)
    for width, height in ((64, 48), (160, 90)):
        wide = _cameras(width=width, height=height)
        wide.fx, wide.fy = wide.fx * width / 64, wide.fy * width / 64
        wide.camera_to_worlds = camera.camera_to_worlds
        rays = wide.generate_rays(camera_indices=0, keep_shape=True)
        assert NearPlanes(hole, FLOOR).of_image(rays.origins, rays.directions) == pytest.approx(2.5, rel=0.1)
        assert NearPlanes(hole, FLOOR).of_image(rays.origins[:1], rays.directions[:1]) >= FLOOR, "an image of one row"
        around = ground[(ground[:, :2].abs() > torch.tensor([5.0, 5.0])).any(dim=1)]
        assert NearPlanes(around, FLOOR).of_image(rays.origins, rays.directions) == pytest.approx(FLOOR), "none in it"
    tower = hole + torch.tensor([0.0, 0.0, 10.0]) * (hole[:, :1] > 3.5)
    assert float(near_planes(tower, camera, FLOOR)[0]) == pytest.approx(FLOOR), (
        "the camera stands in the box of the points"
    )


def test_cameras_that_see_nothing_and_parallel_rays_get_the_floor() -> None:
    ahead, behind = _wall(10.0), _wall(10.0) * torch.tensor([1, 1, -1])
    assert near_planes(behind, _cameras(), FLOOR).tolist() == pytest.approx([FLOOR])
    assert near_planes(ahead, _cameras(CameraType.ORTHOPHOTO), FLOOR).tolist() == pytest.approx([FLOOR])
    assert near_planes(ahead, _cameras(), 7.0).tolist() == [7.0]


def test_a_camera_far_away_keeps_its_near_plane() -> None:
    """All points in one or two cells: flying away, the plane moves smoothly instead of falling back to the floor."""
    ball = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    nears = []
    for distance in (3.0, 30.0, 300.0):
        camera = _cameras()
        camera.camera_to_worlds[0, 2, 3] = distance
        nears.append(float(near_planes(ball, camera, FLOOR)[0]) / distance)
    assert all(0.4 < near <= 0.5 for near in nears)


def test_rays_without_a_camera_have_nearly_its_near_plane() -> None:
    """What ns-export tsdf renders."""
    planes, camera = NearPlanes(_wall(10.0), FLOOR), _cameras()
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    assert planes.of_image(rays.origins, rays.directions) == pytest.approx(float(planes(camera)[0]), rel=0.02)
    parallel = rays.origins + torch.rand(rays.origins.shape)
    assert planes.of_image(parallel, rays.directions) == pytest.approx(FLOOR)
    assert planes.of_image(rays.origins, -rays.directions) == pytest.approx(FLOOR)


def test_no_points_no_plane() -> None:
    planes = NearPlanes(torch.empty(0, 3), FLOOR)
    rays = _cameras().generate_rays(camera_indices=0, keep_shape=True)
    assert planes(_cameras()).tolist() == pytest.approx([FLOOR])
    assert planes.of_image(rays.origins, rays.directions) == pytest.approx(FLOOR)


def test_large_captures_are_thinned_and_cameras_come_in_any_shape() -> None:
    points = torch.rand(3 * MAX_POINTS, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    poses = [look_at_origin(np.array(at)) for at in ([0.3, -1.5, 0.8], [4.0, 1.0, 2.0])]
    cameras = Cameras(torch.from_numpy(np.stack(poses)[:, :3]).float(), 40.0, 40.0, 32.0, 24.0, 64, 48)
    planes = NearPlanes(points, FLOOR)
    assert len(planes.points) == MAX_POINTS and set(planes.state_dict()) == {"points", "floor"}
    nears = planes(cameras)
    for number in range(2):
        assert (
            planes(cameras[number]).tolist() == planes(cameras[number : number + 1]).tolist() == [float(nears[number])]
        )
        reach = (points - cameras.camera_to_worlds[number, :, 3]).norm(dim=-1).min()
        assert 0.49 * reach <= nears[number] < 0.6 * reach
