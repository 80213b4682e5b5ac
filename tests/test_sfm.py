"""SfM scene: footprints, track ids, visibility, frusta, near plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from tiny_capture import FOCAL, HEIGHT, WIDTH, points, ring, shared_capture, write_capture, write_colmap

from infnerf_ns.data import sfm
from infnerf_ns.data.capture.parsers import make_parser, read_split
from infnerf_ns.data.projection import project
from infnerf_ns.data.sfm import build_sfm_scene
from infnerf_ns.errors import InputError


def make_cameras(count: int = 8, camera_type: CameraType = CameraType.PERSPECTIVE, scale: float = 1.0) -> Cameras:
    """Ring cameras with distortion (except equirectangular ones)."""
    poses = torch.tensor(np.stack(ring(count))[:, :3], dtype=torch.float32)
    wide = camera_type == CameraType.EQUIRECTANGULAR
    return Cameras(
        camera_to_worlds=poses,
        fx=WIDTH / 2 if wide else FOCAL * scale,
        fy=WIDTH / 2 if wide else FOCAL * scale,
        cx=WIDTH / 2 * scale,
        cy=WIDTH / 4 if wide else HEIGHT / 2 * scale,
        width=int(WIDTH * scale),
        height=WIDTH // 2 if wide else int(HEIGHT * scale),
        distortion_params=None if wide else torch.tensor([0.05, -0.02, 0.0, 0.0, 0.002, -0.001]),
        camera_type=camera_type,
    )


def outputs_of(cameras: Cameras, **metadata: torch.Tensor | float) -> DataparserOutputs:
    return DataparserOutputs([Path(f"{i}.png") for i in range(len(cameras))], cameras, metadata=metadata)


@pytest.mark.parametrize("camera_type", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
def test_project_inverts_ray_generation(camera_type: CameraType) -> None:
    cameras = make_cameras(camera_type=camera_type)
    size = torch.cat([cameras.height[0], cameras.width[0]])
    coords = 0.5 + torch.rand(200, 2) * (size - 1)
    for index in (0, 3):
        rays = cameras.generate_rays(torch.full((200, 1), index), coords=coords)
        distance = 0.5 + 3 * torch.rand(200, 1)
        projection = project(cameras[index], rays.origins + distance * rays.directions)
        torch.testing.assert_close(projection.pixels, coords.flip(-1), atol=2e-3, rtol=0)
        torch.testing.assert_close(projection.distance, distance[:, 0], atol=1e-4, rtol=1e-4)
        assert projection.inside.all()


def test_project_rejects_points_behind_and_far_outside() -> None:
    camera = make_cameras()[0]
    position, back, right = camera.camera_to_worlds[:, 3], camera.camera_to_worlds[:, 2], camera.camera_to_worlds[:, 0]
    behind = torch.stack([position + back, position - back + 100 * right, position - back])
    assert project(camera, behind).inside.tolist() == [False, False, True]


def test_track_footprints_and_ids_of_held_out_photos(tmp_path: Path) -> None:
    """Ids are not in the order of the names; photo 0 (by id order) is held out and must not count."""
    ids = [40, 3, 22, 17, 9, 31, 5, 12]
    tracks = write_colmap(tmp_path, 8, ids)
    config = ColmapDataParserConfig(data=tmp_path, colmap_path=Path("sparse/0"), orientation_method="none")
    config.center_method, config.auto_scale_poses = "none", False
    config.assume_colmap_world_coordinate_convention = False
    outputs = make_parser(config, points=True).get_dataparser_outputs("train")
    photos = [int(name.stem) for name in outputs.image_filenames]
    assert len(photos) == 7
    scene = build_sfm_scene(outputs, outputs.cameras)

    world, poses = points(), ring(8)
    expected = {}
    for point, track in zip(world, tracks):
        seen = [photo for photo in track if photo in photos]
        sizes = []
        for photo in seen:
            offset = point - poses[photo][:3, 3]
            sizes.append((offset @ -poses[photo][:3, 2]) ** 2 / (FOCAL * np.linalg.norm(offset)))
        if len(seen) >= 3:
            expected[tuple(np.round(point, 5))] = (min(sizes), len(seen))
    assert scene.source == "tracks"
    assert len(scene.points) == len(expected) > 10
    for point, size, count in zip(scene.points.numpy(), scene.footprints.tolist(), scene.num_photos.tolist()):
        match = min(expected, key=lambda key: np.abs(np.array(key) - point).max())
        np.testing.assert_allclose(match, point, atol=2e-5)
        assert expected[match] == (pytest.approx(size, rel=1e-4), count)


def test_points_without_a_track_are_projected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: of a cloud appended to COLMAP's points nothing was left as soon as one point had a track."""
    write_colmap(tmp_path)
    path = tmp_path / "sparse" / "0" / "points3D.txt"
    rows = path.read_text().splitlines()
    bare = [" ".join(row.split()[:8]) for row in rows[::2]]
    path.write_text("\n".join([*bare, *rows[1::2]]) + "\n")
    config = ColmapDataParserConfig(data=tmp_path, colmap_path=Path("sparse/0"), eval_mode="all", downscale_factor=1)
    outputs = read_split(config, "train", points=True)
    scene = build_sfm_scene(outputs, outputs.cameras)
    assert f"{len(bare)} of the {len(rows)} SfM points have no track" in capsys.readouterr().err
    visible = sfm._observe_visible(outputs.metadata["points3D_xyz"], outputs.cameras)
    without = outputs.metadata["points3D_num_points2D"] == 0
    seen = outputs.metadata["points3D_xyz"][without & (visible.num_photos >= sfm.MIN_PHOTOS)]
    assert len(seen) > 5 and all((scene.points == point).all(dim=-1).any() for point in seen)
    tracks = sfm._observe_tracks(outputs.metadata["points3D_xyz"], outputs.metadata["tracks"], outputs.cameras)
    merged = sfm._merged(tracks, visible, without)
    assert torch.equal(merged.num_photos[~without], tracks.num_photos[~without])
    assert torch.equal(merged.footprints[without], visible.footprints[without])
    assert len(merged.distances) == len(merged.distance_points)


def test_point_hidden_behind_a_wall_is_not_observed() -> None:
    """A dense wall right in front of camera 0: the point behind it is not counted for that camera."""
    cameras = make_cameras(1)
    pose = cameras.camera_to_worlds[0]
    side = torch.linspace(-0.5, 0.5, 40)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).reshape(-1, 2)
    wall = pose[:, 3] + grid @ pose[:, :2].T - pose[:, 2]
    hidden = (pose[:, 3] - 3 * pose[:, 2])[None]
    visible = sfm._observe_visible(torch.cat([wall, hidden]), cameras)
    assert visible.num_photos[-1] == 0
    assert visible.num_photos[:-1].sum() > 0.8 * project(cameras[0], wall).inside.sum()
    assert sfm._observe_visible(hidden, cameras).num_photos[0] == 1


def test_visible_points_get_the_second_finest_footprint() -> None:
    cameras = make_cameras()
    world = torch.tensor(points(), dtype=torch.float32)[:1]  # alone, nothing hides it
    scene = build_sfm_scene(outputs_of(cameras, points3D_xyz=world), cameras)
    assert scene.source == "visibility"
    sizes = []
    for index in range(len(cameras)):
        seen = project(cameras[index], world)
        sizes.append(torch.where(seen.inside, seen.depth**2 / (FOCAL * seen.distance), torch.inf))
    torch.testing.assert_close(scene.footprints, torch.stack(sizes).sort(dim=0).values[1])


def test_footprints_scale_with_the_resolution_that_is_trained() -> None:
    full, quarter = make_cameras(), make_cameras()
    quarter.rescale_output_resolution(0.25)
    given = outputs_of(
        full,
        points3D_xyz=torch.rand(5, 3),
        points3D_track_footprint=torch.full((5,), 0.01),
        points3D_num_points2D=torch.tensor([2, 3, 4, 5, 6]),
        points3D_depth_percentile=1.5,
    )
    scene = build_sfm_scene(given, quarter)
    assert (scene.source, scene.near) == ("tracks", 0.75)
    torch.testing.assert_close(scene.footprints, torch.full((4,), 0.04))


def test_few_photos_keep_all_points() -> None:
    cameras = make_cameras(2)
    scene = build_sfm_scene(outputs_of(cameras, points3D_xyz=torch.zeros(1, 3)), cameras)
    assert len(scene.points) == 1


def test_near_plane_is_half_of_the_lowest_percentile() -> None:
    distances = torch.arange(1, 10_001).float()[torch.randperm(10_000)]
    assert sfm._near_plane(distances) == 5.0
    assert sfm._near_plane(torch.tensor([4.0, 2.0])) == 1.0


@pytest.mark.parametrize("metadata", [{}, {"points3D_xyz": torch.full((9, 3), 1e6)}])
def test_without_usable_points_frusta_are_used(metadata: dict, capsys: pytest.CaptureFixture[str]) -> None:
    cameras = make_cameras(12)
    scene = build_sfm_scene(outputs_of(cameras, **metadata), cameras)
    assert "frusta" in capsys.readouterr().out
    assert scene.source == "frusta"
    assert (scene.num_photos >= 3).all()
    reach = cameras.camera_to_worlds[:, :, 3].norm(dim=-1).median()  # all look at the origin
    torch.testing.assert_close(sfm._shared_depth(cameras), float(reach), rtol=0.02, atol=0)
    assert 0 < scene.near < 0.1 * reach
    assert scene.footprints.min() >= 0.49 * reach / FOCAL
    low, high = scene.points.min(dim=0).values, scene.points.max(dim=0).values
    assert (low < 0).all() and (high > 0).all()


def test_frusta_of_a_mapping_flight_reach_the_ground() -> None:
    """Parallel cameras 10 above the ground, 80 % overlap: the points reach the ground and not ten times as deep."""
    x, y = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    poses = torch.eye(4)[:3].repeat(48, 1, 1)
    poses[:, 0, 3], poses[:, 1, 3], poses[:, 2, 3] = 2.2 * x.reshape(-1), 1.6 * y.reshape(-1), 10.0
    cameras = Cameras(poses, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    scene = build_sfm_scene(outputs_of(cameras), cameras)
    assert -30 < float(scene.points[:, 2].min()) < 0


@pytest.mark.parametrize("distance", [3.0, 300.0, 3e4])
def test_photos_from_nearly_one_place(distance: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Cameras 1 apart look at points that far away: fine, said, refused, as the scene would be 30,000 units large."""
    poses = torch.eye(4)[:3].repeat(8, 1, 1)
    poses[:, 0, 3] = torch.linspace(-1, 1, 8)
    cameras = Cameras(poses, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    world = distance * torch.nn.functional.normalize(torch.rand(50, 3) * 0.2 + torch.tensor([0.0, 0.0, -1.0]), dim=-1)
    given = outputs_of(cameras, points3D_xyz=world)
    if distance < 1e4:
        assert build_sfm_scene(given, cameras).source == "visibility"
        assert ("depth is hardly known" in capsys.readouterr().err) == (distance > 100)
        return
    with pytest.raises(InputError, match="nearly one place: they are 1 scene units apart.*--auto-scale-poses False"):
        build_sfm_scene(given, cameras)


def test_cameras_that_look_out_do_not_meet_at_their_middle() -> None:
    """A panorama: the point that all axes look at is where the cameras are, and nothing is there."""
    angles = 2 * torch.pi * torch.arange(12) / 12
    poses = torch.zeros(12, 3, 4)
    poses[:, :, 2] = -torch.stack([angles.cos(), angles.sin(), torch.zeros(12)], dim=-1)
    poses[:, 2, 1] = 1.0
    poses[:, :, 0] = torch.linalg.cross(poses[:, :, 1], poses[:, :, 2])
    poses[:, :, 3] = 0.1 * poses[:, :, 0] + 0.01 * poses[:, :, 2]
    cameras = Cameras(poses, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    spread = float((poses[:, :, 3] - poses[:, :, 3].mean(0)).norm(dim=-1).max())
    assert sfm._shared_depth(cameras) >= 0.25 * spread


def test_ply_points_land_in_the_frame_of_the_cameras(tmp_path: Path) -> None:
    """The parser moves and scales the poses; the points must still project to the same pixels."""
    meta = write_capture(tmp_path)
    config = NerfstudioDataParserConfig(data=tmp_path, scale_factor=3.0, orientation_method="up")
    outputs = make_parser(config, points=True).get_dataparser_outputs("train")
    loaded = outputs.metadata
    assert loaded["points3D_rgb"].dtype == torch.uint8 and int(loaded["points3D_rgb"][0, 0]) == 128
    original = Cameras(
        torch.tensor(np.array(meta["frames"][0]["transform_matrix"])[:3], dtype=torch.float32),
        *(float(meta[key]) for key in ("fl_x", "fl_y", "cx", "cy")),
        WIDTH,
        HEIGHT,
        distortion_params=outputs.cameras.distortion_params[0],
    )
    expected = project(original, torch.tensor(points(), dtype=torch.float32))
    found = project(outputs.cameras[0], loaded["points3D_xyz"])
    torch.testing.assert_close(found.pixels, expected.pixels, atol=1e-3, rtol=0)


def test_parser_gives_the_outputs_of_nerfstudios_own(tmp_path: Path) -> None:
    """Also with the transform that nerfstudio implies beside a COLMAP model, in the transform back to the capture."""
    pytest.importorskip("open3d", reason="nerfstudio reads ply files with open3d, which cannot be imported here")
    write_capture(tmp_path)
    (tmp_path / "colmap/sparse/0").mkdir(parents=True)
    config = NerfstudioDataParserConfig(data=tmp_path, load_3D_points=True)
    expected = config.setup().get_dataparser_outputs("train")
    found = make_parser(config, points=True).get_dataparser_outputs("train")
    require_same(found, expected)


def test_colmap_parser_gives_the_outputs_of_nerfstudios_own(tmp_path: Path) -> None:
    write_colmap(tmp_path, ids=[4, 8, 1, 2, 3, 7, 6, 5])
    config = ColmapDataParserConfig(data=tmp_path, colmap_path=Path("sparse/0"))
    for split in ("train", "test"):
        expected = config.setup().get_dataparser_outputs(split)
        require_same(make_parser(config, points=True).get_dataparser_outputs(split), expected)


def require_same(found: DataparserOutputs, expected: DataparserOutputs) -> None:
    """To rounding."""
    assert found.image_filenames == expected.image_filenames and found.dataparser_scale == expected.dataparser_scale
    for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type"):
        torch.testing.assert_close(getattr(found.cameras, name), getattr(expected.cameras, name), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.dataparser_transform, expected.dataparser_transform)
    points = expected.metadata["points3D_xyz"].float()
    torch.testing.assert_close(found.metadata["points3D_xyz"], points, atol=1e-5, rtol=0)
    assert torch.equal(found.metadata["points3D_rgb"], expected.metadata["points3D_rgb"])


def colmap_outputs(folder: Path) -> DataparserOutputs:
    """Train split (every 8th photo held out) with tracks."""
    config = ColmapDataParserConfig(data=folder, colmap_path=Path("sparse/0"), downscale_factor=1)
    return make_parser(config, points=True).get_dataparser_outputs("train")


@pytest.mark.parametrize("name", ["fox", "caliterra"])
def test_real_tracks_project_onto_their_matches(name: str) -> None:
    outputs = colmap_outputs(shared_capture(name))
    tracks = outputs.metadata["tracks"]
    errors = []
    for index in range(len(outputs.cameras)):
        mine = tracks.photo == index
        pixels = project(outputs.cameras[index], outputs.metadata["points3D_xyz"][tracks.point[mine]]).pixels
        errors.append((pixels - tracks.pixel[mine]).norm(dim=-1))
    errors = torch.cat(errors)
    assert float(errors.mean()) < 1.2
    assert float(errors.max()) < 4.0


@pytest.mark.parametrize(("name", "share"), [("fox", 0.7), ("caliterra", 0.95)])
def test_real_footprints_agree_between_tracks_and_visibility(name: str, share: float) -> None:
    outputs = colmap_outputs(shared_capture(name))
    cameras, world = outputs.cameras, outputs.metadata["points3D_xyz"]
    tracks = sfm._observe_tracks(world, outputs.metadata["tracks"], cameras)
    visible = sfm._observe_visible(world, cameras)
    both = (tracks.num_photos >= 3) & (visible.num_photos >= 3)
    assert int(both.sum()) > 0.99 * int((tracks.num_photos >= 3).sum())
    ratio = visible.footprints[both] / tracks.footprints[both]
    assert float(((ratio < 1.3) & (ratio > 1 / 1.3)).float().mean()) > share
    assert 0.9 < float(ratio.median()) < 1.1
    assert sfm._near_plane(visible.distances) == pytest.approx(sfm._near_plane(tracks.distances), rel=0.2)
