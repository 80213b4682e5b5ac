"""The demo scene: the same for the same seed, true area averages, exact visibility, a cache never half there."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infnerf_ns.data.demo_dataparser import (
    METRES_PER_UNIT,
    InfNeRFDemoDataParserConfig,
    demo_dataparser_spec,
)
from infnerf_ns.data.demo_scene import DemoSceneOptions, cache, load_or_generate, load_or_generate_depths
from infnerf_ns.data.demo_scene.facade import brick_wall
from infnerf_ns.data.demo_scene.flight import CLEARANCE, is_free, natural_count, plan_flight
from infnerf_ns.data.demo_scene.photographer import Lens, Photographer
from infnerf_ns.data.demo_scene.points import CulledPoints, visible
from infnerf_ns.data.demo_scene.raycaster import EmbreexRays, Open3DRays, make_raycaster
from infnerf_ns.data.demo_scene.town import build_town

SMALL = DemoSceneOptions(size=1, seed=0, num_photos=12, width=40, height=30, supersampling=2)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def scene(cache_dir):
    return load_or_generate(SMALL, cache_dir)


@pytest.fixture(scope="module")
def town():
    return build_town(1, 0)


@pytest.fixture(scope="module")
def rays(town):
    return make_raycaster(town.mesh.corners)


def small_config(cache_dir: Path, **changes) -> InfNeRFDemoDataParserConfig:
    config = InfNeRFDemoDataParserConfig(
        size=1, num_photos=12, image_width=40, image_height=30, supersampling=2, eval_interval=4, cache_dir=cache_dir
    )
    return dataclasses.replace(config, **changes)


def contents(scene) -> list[bytes]:
    return [p.read_bytes() for p in (*scene.photos, scene.photos[0].with_name("scene.npz"))]


def test_same_seed_same_bits_other_seed_another_town(scene, tmp_path):
    again = load_or_generate(SMALL, tmp_path)
    assert contents(again) == contents(scene)
    other = load_or_generate(dataclasses.replace(SMALL, seed=1), tmp_path)
    assert other.photos[0].read_bytes() != scene.photos[0].read_bytes()


def test_the_flight_spans_a_factor_of_16(scene):
    seen = scene.look_distance[np.isfinite(scene.look_distance)]
    assert len(seen) > 0.9 * len(scene.look_distance) and seen.max() / seen.min() >= 16


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("factor", [0.3, 1, 1.7])
def test_the_flight_takes_as_many_photos_as_asked_from_free_places(size, factor):
    town = build_town(size, 3)
    rays = make_raycaster(town.mesh.corners)
    count = max(8, int(natural_count(size) * factor))
    poses, distance = plan_flight(town, rays, count, 3)
    assert poses.shape == (count, 3, 4)
    assert distance[np.isfinite(distance)].min() > CLEARANCE
    assert all(is_free(town, rays, pose[:, 3]) for pose in poses)


def test_a_pixel_is_the_average_of_its_area(town, rays, scene):
    for pose in scene.poses[[0, 5, 11]]:
        photo = Photographer(town, rays, Lens(40, 30, 34.6), 4).photo(pose).astype(float)
        large = Photographer(town, rays, Lens(160, 120, 4 * 34.6), 1).photo(pose).astype(float)
        average = large.reshape(30, 4, 40, 4, 3).mean((1, 3))
        assert np.abs(photo - average).max() <= 1.01  # two roundings to 8 bits


def test_more_samples_converge(town, rays, scene):
    pose = scene.poses[3]
    lens = Lens(40, 30, 34.6)
    best = Photographer(town, rays, lens, 12).photo(pose).astype(float)
    errors = [np.abs(Photographer(town, rays, lens, k).photo(pose) - best).mean() for k in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 4


def test_a_pattern_that_is_too_fine_fades_to_its_mean():
    rng = np.random.default_rng(0)
    u, v = rng.uniform(0, 60, (2, 200_000)).astype(np.float32)
    colour = np.tile(np.float32([0.3, 0.2, 0.1]), (len(u), 1))
    seed = np.full(len(u), 9, np.uint32)
    sharp = brick_wall(u, v, colour, seed, np.zeros_like(u))
    faded = brick_wall(u, v, colour, seed, np.ones_like(u))
    np.testing.assert_allclose(sharp.mean(0), faded.mean(0), rtol=0.01)
    assert faded.std() < sharp.std()


def test_photos_are_neither_dark_nor_washed_out(scene):
    for path in scene.photos:
        photo = np.asarray(Image.open(path))
        assert photo.shape == (30, 40, 3)
        assert 40 < photo.mean() < 215
        assert photo.std() > 8


def test_points_lie_on_surfaces_and_inside_the_photos_that_see_them(scene, rays):
    points, lens = scene.points, SMALL.lens
    assert len(points.xyz) > 500
    for photo in (0, 6, 11):
        pose = scene.poses[photo]
        seen = points.xyz[points.seen_point[points.seen_photo == photo]]
        local = (seen - pose[:, 3]) @ pose[:, :3]
        x = lens.focal * local[:, 0] / -local[:, 2] + lens.width / 2
        y = lens.height / 2 - lens.focal * local[:, 1] / -local[:, 2]
        assert (local[:, 2] < 0).all()
        assert ((x >= 0) & (x <= lens.width) & (y >= 0) & (y <= lens.height)).all()
        way = (seen - pose[:, 3]).astype(np.float32)
        _, share = rays.cast(np.broadcast_to(pose[:, 3], way.shape), way)
        off_surface = np.abs(share - 1) * np.linalg.norm(way, axis=-1)
        assert off_surface.max() < 0.02


def test_most_of_the_surface_is_seen_by_several_photos_of_each_kind(tmp_path):
    scene = load_or_generate(DemoSceneOptions(size=2, width=40, height=30, supersampling=1), tmp_path)
    points, distance = scene.points, scene.look_distance
    for nearest, farthest in ((0, 4), (4, 35), (35, 1000)):
        kind = (distance >= nearest) & (distance < farthest)
        seen = np.bincount(points.seen_point[kind[points.seen_photo]], minlength=len(points.xyz))
        assert np.median(seen[kind[points.source]]) >= 4


def test_nearly_every_point_is_seen_by_the_photo_it_was_picked_in(scene):
    points = scene.points
    own = points.seen_photo == points.source[points.seen_point]
    assert own.sum() > 0.99 * len(points.xyz)


def test_points_of_far_columns_are_left_out(scene, rays):
    culled, pose = CulledPoints(scene.points.xyz, 5.0), scene.poses[0]
    everything, near = (culled.seen_from(rays, SMALL.lens, pose, *reach) for reach in ([], [60.0]))
    distance = np.linalg.norm(scene.points.xyz - pose[:, 3], axis=-1)
    assert set(near) <= set(everything) and distance[everything].max() > 80
    assert set(everything[distance[everything] < 60]) <= set(near) and distance[near].max() < 60 + 20
    assert 0 < len(near) < len(everything)


def test_a_hidden_point_is_not_seen(scene, rays):
    house = np.float32([[0, 0, -1.0]])
    assert not visible(rays, SMALL.lens, scene.poses[0], house).any()


@pytest.mark.parametrize("engine", [EmbreexRays, Open3DRays])
def test_ray_casters_agree_with_a_known_triangle(engine):
    triangle = np.float32([[[0, 0, 5], [4, 0, 5], [0, 4, 5]]])
    try:
        rays = engine(triangle)
    except ImportError as error:
        pytest.skip(str(error))
    origins, directions = np.float32([[1, 1, 0], [3, 3, 0]]), np.float32([[0, 0, 2], [0, 0, 2]])
    hit, distance = rays.cast(origins, directions)
    assert hit.tolist() == [0, -1]
    assert distance[0] == pytest.approx(2.5)
    for until, blocked in ((2.4, False), (2.6, True)):
        assert rays.blocked(origins, directions, np.full(2, until, np.float32)).tolist() == [blocked, False]


def test_dataparser_splits_are_disjoint_and_cameras_sound(cache_dir, scene):
    parser = small_config(cache_dir).setup()
    train, val = (parser.get_dataparser_outputs(split) for split in ("train", "val"))
    names = [{p.name for p in outputs.image_filenames} for outputs in (train, val)]
    assert len(names[0]) == 9 and len(names[1]) == 3 and not names[0] & names[1]
    for outputs in (train, val):
        poses = outputs.cameras.camera_to_worlds
        assert torch.isfinite(poses).all()
        eye = torch.eye(3).expand(len(poses), 3, 3)
        torch.testing.assert_close(poses[:, :, :3] @ poses[:, :, :3].transpose(1, 2), eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(poses[:, :, :3]), torch.ones(len(poses)), atol=1e-5, rtol=0)
        assert all(p.exists() for p in outputs.image_filenames)


def test_dataparser_rays_reproduce_the_geometry(cache_dir, scene, rays):
    """nerfstudio's own rays hit the town where the photo's middle pixel did."""
    outputs = small_config(cache_dir).setup().get_dataparser_outputs("train")
    bundle = outputs.cameras.generate_rays(camera_indices=0, coords=torch.tensor([[15.0, 20.0]]))
    origin = bundle.origins.numpy() * np.float32(METRES_PER_UNIT)
    _, distance = rays.cast(origin, bundle.directions.numpy())
    assert distance[0] == pytest.approx(scene.look_distance[0], rel=1e-3)


def test_point_metadata_counts_training_photos_only(cache_dir, scene):
    outputs = small_config(cache_dir).setup().get_dataparser_outputs("train")
    meta = outputs.metadata
    n = len(meta["points3D_xyz"])
    assert meta["points3D_xyz"].dtype == torch.float32 and meta["points3D_rgb"].dtype == torch.uint8
    assert len(meta["points3D_rgb"]) == len(meta["points3D_num_points2D"]) == len(meta["points3D_track_footprint"]) == n
    assert 1 <= meta["points3D_num_points2D"].min() and meta["points3D_num_points2D"].max() <= 9
    footprint = meta["points3D_track_footprint"]
    assert torch.isfinite(footprint).all() and (footprint > 0).all()
    # By hand, one point: the finest z^2 / (f ||p||) over the training photos that see it.
    k = n // 2
    index = np.argmin(np.linalg.norm(scene.points.xyz - meta["points3D_xyz"][k].numpy() * METRES_PER_UNIT, axis=-1))
    train = {int(p.stem) for p in outputs.image_filenames}
    watchers = [p for p in scene.points.seen_photo[scene.points.seen_point == index] if p in train]
    sizes = []
    for p in watchers:
        local = (scene.points.xyz[index] - scene.poses[p, :, 3]) @ scene.poses[p, :, :3]
        sizes.append(local[2] ** 2 / (SMALL.lens.focal * np.linalg.norm(local)) / METRES_PER_UNIT)
    assert len(watchers) == meta["points3D_num_points2D"][k]
    assert footprint[k].item() == pytest.approx(min(sizes), rel=1e-4)
    assert 0 < meta["points3D_depth_percentile"] * METRES_PER_UNIT < 4
    assert small_config(cache_dir, load_3D_points=False).setup().get_dataparser_outputs("train").metadata == {}


def test_depth_images_are_those_of_the_surface(cache_dir, scene, rays):
    """At the depth of the middle pixels, and nowhere nearer, nerfstudio's rays meet the town."""
    assert not (scene.photos[0].parent / "depth").exists()
    outputs = small_config(cache_dir, depth=True, load_3D_points=False).setup().get_dataparser_outputs("train")
    files = outputs.metadata["depth_filenames"]
    assert [file.stem for file in files] == [photo.stem for photo in outputs.image_filenames]
    unit = outputs.metadata["depth_unit_scale_factor"] * outputs.dataparser_scale
    for photo in (0, 4, 8):
        depth = torch.from_numpy(np.load(files[photo]).astype(np.float32))
        assert depth.shape == (30, 40)
        bundle = outputs.cameras.generate_rays(camera_indices=photo)
        distance = depth * unit * bundle.metadata["directions_norm"][..., 0]
        _, metres = rays.cast(
            bundle.origins.reshape(-1, 3).numpy() * np.float32(METRES_PER_UNIT),
            bundle.directions.reshape(-1, 3).numpy(),
        )
        expected = np.where(np.isfinite(metres), metres / METRES_PER_UNIT, 0).reshape(30, 40)
        # Rays differ in the last bit, which at an edge is another surface.
        assert (np.abs(distance.numpy() - expected) <= 1e-3 * expected).mean() > 0.99
    assert (np.load(files[0]) == 0).mean() < 0.9


def test_smaller_photos_have_smaller_cameras(cache_dir, scene):
    """Regression: ``ns-render dataset --downscale-factor 2`` ended in a bare AssertionError."""
    whole, small = (
        small_config(cache_dir, downscale_factor=factor, depth=True).setup().get_dataparser_outputs("val")
        for factor in (None, 2.0)
    )
    assert small.cameras.width.unique().item() == 20 and small.cameras.height.unique().item() == 15
    torch.testing.assert_close(small.cameras.fx * 2, whole.cameras.fx)
    torch.testing.assert_close(small.cameras.camera_to_worlds, whole.cameras.camera_to_worlds)
    for before, after in zip(whole.image_filenames, small.image_filenames, strict=True):
        means = np.asarray(Image.open(before)).reshape(15, 2, 20, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(np.asarray(Image.open(after)), means, atol=0.51)
    depth = np.load(small.metadata["depth_filenames"][0])
    assert np.array_equal(depth, np.load(whole.metadata["depth_filenames"][0])[1::2, 1::2])


def test_depth_images_are_made_once_and_leave_the_photos_alone(cache_dir, scene, monkeypatch, capsys):
    before, stamps = contents(scene), [photo.stat().st_mtime_ns for photo in scene.photos]
    files = load_or_generate_depths(scene)
    stamp = files[3].stat().st_mtime_ns
    assert load_or_generate_depths(load_or_generate(SMALL, cache_dir))[3].stat().st_mtime_ns == stamp
    good = files[3].read_bytes()
    files[3].write_bytes(good[:-1])
    assert load_or_generate_depths(scene)[3].read_bytes() == good
    assert "damaged" in capsys.readouterr().out
    monkeypatch.setattr(Photographer, "depth", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    files[0].unlink()
    with pytest.raises(KeyboardInterrupt):
        load_or_generate_depths(scene)
    assert contents(scene) == before and [photo.stat().st_mtime_ns for photo in scene.photos] == stamps
    assert sorted(p.name for p in scene.photos[0].parent.iterdir() if p.is_dir()) == ["depth"]


@pytest.mark.parametrize("damage", ["truncate photo", "remove photo", "garbage record", "flip bit"])
def test_a_damaged_cache_is_made_again(tmp_path, scene, damage, capsys):
    first = load_or_generate(SMALL, tmp_path)
    photo, record = first.photos[4], first.photos[0].with_name("scene.json")
    if damage == "truncate photo":
        photo.write_bytes(photo.read_bytes()[:100])
    elif damage == "remove photo":
        photo.unlink()
    elif damage == "flip bit":
        content = bytearray(photo.read_bytes())
        content[-20] ^= 1
        photo.write_bytes(content)
    else:
        record.write_text('{"format": ')
    again = load_or_generate(SMALL, tmp_path)
    assert contents(again) == contents(scene)
    assert "damaged" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [SMALL.folder_name]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        load_or_generate(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_uses_the_winners_scene(tmp_path, scene, monkeypatch):
    generate = cache._generate
    rivals = []

    def generate_while_a_rival_finishes(options, folder):
        generate(options, folder)
        monkeypatch.setattr(cache, "_generate", generate)
        rivals.append(load_or_generate(options, tmp_path))
        rivals.append(rivals[0].photos[0].stat().st_ino)

    monkeypatch.setattr(cache, "_generate", generate_while_a_rival_finishes)
    loser = load_or_generate(SMALL, tmp_path)
    assert loser.photos == rivals[0].photos
    assert loser.photos[0].stat().st_ino == rivals[1]
    assert contents(loser) == contents(scene)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"size": 0}, "--size 0"),
        ({"size": 65}, "--size 65"),
        ({"seed": -1}, "--seed -1"),
        ({"num_photos": 7}, "--num-photos 7"),
        ({"image_width": 2}, "--image-width 2"),
        ({"supersampling": 0}, "--supersampling 0"),
        ({"eval_interval": 1}, "--eval-interval 1"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, changes, flag):
    with pytest.raises(SystemExit) as error:
        small_config(tmp_path, **changes).setup().get_dataparser_outputs("train")
    assert str(error.value).startswith(f"infnerf: {flag}")
    assert "choose" in str(error.value) and "\n" not in str(error.value)


def test_a_cache_folder_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write the demo scene into .*file.*--cache-dir"):
        small_config(tmp_path / "file" / "inside").setup().get_dataparser_outputs("train")


def test_the_entry_point_imports_alone():
    """Regression guard: a dataparser module that imports the trainer's configs kills every ns-* command."""
    code = "import sys, infnerf_ns.data.demo_dataparser; print('nerfstudio.configs.method_configs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "False"
    assert isinstance(demo_dataparser_spec.config, InfNeRFDemoDataParserConfig)


def test_drafts_of_killed_processes_are_removed_and_those_at_work_stay(tmp_path: Path) -> None:
    """Regression: what a killed generation had made stayed for ever, in a hidden folder."""
    folder, name = tmp_path / "town", "0123456789abcdef" * 2
    abandoned, working, other = (
        tmp_path / each for each in (f".town.{name}", f".town.{name[::-1]}", f".village.{name}")
    )
    for draft in (abandoned, working, other):
        draft.mkdir()
        (draft / "00000.png").touch()
        if draft != working:
            for each in (draft / "00000.png", draft):
                os.utime(each, (0, 0))
    cache.load_or_make(folder, lambda: "made" if folder.exists() else None, lambda draft: None)
    assert not abandoned.exists() and working.exists() and other.exists() and folder.exists()
