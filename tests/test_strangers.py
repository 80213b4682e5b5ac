"""Strangers' captures: each is read as what its files mean, which is the same data as those of an ordinary capture of
the same town, or it ends in one line. The recipes are in stranger_captures.py; a table of the results is printed at the
end of pytest's output."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from stranger_captures import CASES, FISHEYES, LONGER, MODEL, PHOTOS, PINHOLE, UTM, Case, town

from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.presets import load_preset
from infnerf_ns.tree_building import OctreeConfig, build_tree

ROUNDING = 2e-5
"""Scene units; a twentieth of a pixel of the town's nearest surface."""
RAYS = 2048
STEPS = 150
SAME_PSNR = 0.3
"""dB"""
COLUMNS = ("capture", "result")
TITLE = "strangers' captures"


@dataclass
class Read:
    """What a training would see of a capture."""

    names: list[str]
    """of the photos, train and held-out"""
    photos: list[np.ndarray]
    """[H, W, 3] of each, 0..255"""
    masks: list[np.ndarray | None]
    cameras: Cameras
    """of each"""
    numbers: dict[str, torch.Tensor]
    """places and directions: scene and first batch"""
    batch: torch.Tensor
    """colours [R, 3] of the first batch, 0..255"""
    scene: SfMScene


def data_config(case: Case, folder: Path) -> PyramidDataManagerConfig:
    settings = {"data": folder, "eval_mode": "interval", "downscale_factor": 1, **case.options}
    parser = (
        NerfstudioDataParserConfig(**settings)
        if case.parser == "transforms"
        else ColmapDataParserConfig(colmap_path=MODEL, **settings)
    )
    return PyramidDataManagerConfig(
        data=folder, dataparser=parser, train_num_rays_per_batch=RAYS, eval_num_rays_per_batch=RAYS
    )


def read(case: Case, folder: Path) -> Read:
    """Sets up the data manager of a training on a new copy of the capture.

    Raises:
        InputError: what a user sees.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case.write(folder)
    manager = data_config(case, folder).setup()
    assert isinstance(manager, PyramidDataManager)
    scene = manager.train_dataset.metadata["sfm_scene"]
    torch.manual_seed(0)
    rays, batch = manager.next_train(0)
    data = [dataset.get_data(row) for dataset in _datasets(manager) for row in range(len(dataset))]
    cameras = [dataset.cameras[row : row + 1] for dataset in _datasets(manager) for row in range(len(dataset))]
    return Read(
        [name.name for dataset in _datasets(manager) for name in dataset.image_filenames],
        [255 * each["image"][..., :3].numpy() for each in data],
        [each["mask"].numpy() if "mask" in each else None for each in data],
        functools.reduce(_joined, cameras),
        {
            "points": scene.points,
            "footprints": scene.footprints,
            "near plane": torch.tensor([scene.near]),
            "origins": rays.origins,
            "directions": rays.directions,
            "pixel areas": rays.pixel_area,
        },
        255 * batch["image"][:, :3],
        scene,
    )


def _datasets(manager: PyramidDataManager) -> tuple:
    return manager.train_dataset, manager.eval_dataset


def _joined(one: Cameras, other: Cameras) -> Cameras:
    parts = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in _CAMERA}
    return Cameras(**parts)


_CAMERA = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")


def differences(one: Read, other: Read, pixels: float) -> list[str]:
    """In what two captures differ beyond rounding; empty if in nothing."""
    found = []
    if one.scene.source != other.scene.source:
        found.append(f"points by {one.scene.source} and {other.scene.source}")
    if len(one.photos) != len(other.photos):
        return [f"{len(one.photos)} and {len(other.photos)} photos"]
    for row, (a, b) in enumerate(zip(one.photos, other.photos)):
        if a.shape != b.shape or np.abs(a - b).mean() > pixels:
            found.append(f"photo {one.names[row]} ({np.abs(a - b).mean() if a.shape == b.shape else a.shape})")
            break
    if any((a is None) != (b is None) or (a is not None and (a != b).any()) for a, b in zip(one.masks, other.masks)):
        found.append("masks")
    if float((one.batch - other.batch).abs().mean()) > pixels:
        found.append("colours of the first batch")
    for name in _CAMERA:
        a, b = getattr(one.cameras, name).double(), getattr(other.cameras, name).double()
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-5, atol=ROUNDING):
            found.append(name)
    for name, a in one.numbers.items():
        b = other.numbers[name]
        if a.shape != b.shape:
            found.append(f"{name} {tuple(a.shape)} and {tuple(b.shape)}")
        elif not torch.allclose(a, b, rtol=1e-3 if "foot" in name or "area" in name else 0, atol=ROUNDING):
            found.append(f"{name} by {float((a - b).abs().max()):.2g}")
    return found


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Read]:
    """The captures that others must be like, each read once."""

    @functools.cache
    def one(name: str) -> Read:
        return read(CASES[name], tmp_path_factory.mktemp("ordinary") / "capture")

    return one


def the_line(case: Case, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(case, folder)
    message = str(caught.value)
    assert message.startswith("infnerf: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.like])
def test_is_read_like_the_ordinary_capture(name: str, tmp_path: Path, ordinary, report) -> None:  # noqa: ANN001
    case = CASES[name]
    report(TITLE, COLUMNS, name, "FAILED")
    found = differences(read(case, tmp_path / "capture"), ordinary(case.like), case.pixels)
    report(TITLE, COLUMNS, name, f"DIFFERS from '{case.like}': {', '.join(found)}")
    assert not found
    report(TITLE, COLUMNS, name, f"the same data as '{case.like}'")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.line])
def test_ends_in_one_line(name: str, tmp_path: Path, report) -> None:  # noqa: ANN001
    report(TITLE, COLUMNS, name, "FAILED")
    message = the_line(CASES[name], tmp_path / "capture")
    report(TITLE, COLUMNS, name, message.replace(f"{tmp_path}/", ""))
    assert re.search(CASES[name].line, message), message


_OTHERS = [name for name, case in CASES.items() if not case.like and not case.line]


@pytest.mark.parametrize("name", _OTHERS)
def test_can_be_trained(name: str, tmp_path: Path, report) -> None:  # noqa: ANN001
    """The captures that are the measure for others, and those that have data of their own."""
    report(TITLE, COLUMNS, name, "FAILED")
    found = read(CASES[name], tmp_path / "capture")
    assert all(np.ptp(photo) > 50 for photo in found.photos)
    for numbers in found.numbers.values():
        assert torch.isfinite(numbers).all() and len(numbers)
    side = build_tree(found.scene, OctreeConfig()).cube.side
    points = f"{len(found.scene.points)} points ({found.scene.source})"
    report(TITLE, COLUMNS, name, f"{len(found.photos)} photos, {points}, a tree of {side:.3g} scene units")
    assert 0.1 < side < 100


# The right values of what the others are compared with


def _similarity(found: Read, names: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """Rotation R, shift t and scale s of the scene: place = s (R x + t), from the cameras' poses."""
    scene = found.cameras.camera_to_worlds.double().numpy()
    files = town().poses[[int(Path(name).stem) for name in names]]
    rotation = (scene[:, :, :3] @ files[:, :3, :3].transpose(0, 2, 1)).mean(axis=0)
    places, own = scene[:, :, 3], files[:, :3, 3] @ rotation.T
    scale = float(np.linalg.norm(places - places.mean(0)) / np.linalg.norm(own - own.mean(0)))
    return rotation, places.mean(0) / scale - own.mean(0), scale


@pytest.mark.parametrize("name", ["ordinary", "COLMAP: ordinary", "photos: JPEG"])
def test_the_ordinary_captures_are_the_town(name: str, tmp_path: Path) -> None:
    """Poses and points are the town's, but for one similarity, and every photo is that of its pose."""
    found = read(CASES[name], tmp_path / "capture")
    rotation, shift, scale = _similarity(found, found.names)
    rows = [int(Path(each).stem) for each in found.names]
    assert sorted(rows) == list(range(PHOTOS))
    scene = found.cameras.camera_to_worlds.double().numpy()
    np.testing.assert_allclose(scene[:, :, :3], rotation @ town().poses[rows][:, :3, :3], atol=1e-5)
    places = scale * (town().poses[rows][:, :3, 3] @ rotation.T + shift)
    np.testing.assert_allclose(scene[:, :, 3], places, atol=1e-5)
    expected = scale * (town().xyz @ rotation.T + shift)
    from scipy.spatial import cKDTree

    assert cKDTree(expected).query(found.numbers["points"].numpy())[0].max() < ROUNDING
    assert len(found.numbers["points"]) > 0.9 * len(expected)
    for row, photo in zip(rows, found.photos):
        assert np.abs(photo - town().photos[row]).mean() <= CASES[name].pixels
    assert found.cameras.fx[:, 0].tolist() == [PINHOLE.focal] * PHOTOS


@pytest.mark.parametrize(
    ("name", "lenses"),
    [
        ("lenses: two", (PINHOLE, LONGER)),
        ("fisheye: at the top", FISHEYES),
        ("fisheye: every other photo", (PINHOLE, FISHEYES[0])),
        ("COLMAP: fisheye", FISHEYES),
        ("COLMAP: pinholes and fisheyes", (PINHOLE, FISHEYES[0])),
    ],
)
def test_every_photo_has_the_lens_that_took_it(name: str, lenses: tuple, tmp_path: Path) -> None:
    """The rays of its pixels are those of the lens."""
    found = read(CASES[name], tmp_path / "capture")
    for row, file in enumerate(found.names):
        lens = lenses[int(Path(file).stem) % 2]
        camera = found.cameras[row : row + 1]
        kind = CameraType.FISHEYE if lens in FISHEYES else CameraType.PERSPECTIVE
        assert int(camera.camera_type) == kind.value
        assert (int(camera.width), int(camera.height)) == (lens.width, lens.height)
        at = torch.tensor([[10.5, 20.5], [40.5, 80.5], [60.5, 5.5]])  # row, column
        rays = camera.generate_rays(torch.zeros(3, 1, dtype=torch.long), coords=at)
        expected = lens.directions(*np.float32(at.numpy().T[::-1]))
        expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
        directions = rays.directions.numpy() @ camera.camera_to_worlds[0, :, :3].numpy()
        np.testing.assert_allclose(directions, expected, atol=1e-4)


def test_the_offset_of_large_coordinates_is_kept(tmp_path: Path) -> None:
    """Scene coordinates lead back to UTM."""
    case = CASES["UTM: poses and points"]
    (tmp_path / "capture").mkdir()
    case.write(tmp_path / "capture")
    manager = data_config(case, tmp_path / "capture").setup()
    outputs = manager.train_dataparser_outputs
    poses = outputs.transform_poses_to_original_space(outputs.cameras.camera_to_worlds, camera_convention="opengl")
    rows = [int(name.stem) for name in outputs.image_filenames]
    np.testing.assert_allclose(poses[:, :, 3].numpy(), town().poses[rows][:, :3, 3] + UTM, atol=1e-3)


# Trainings


def psnr(case: Case, folder: Path) -> float:
    """Of the held-out photos after a short training."""
    (folder / "capture").mkdir(parents=True)
    case.write(folder / "capture")
    config = load_preset("infnerf-small", "cpu")
    config.pipeline.datamanager = data_config(case, folder / "capture")
    config.pipeline.datamanager.train_num_rays_per_batch = 512
    config.pipeline.model.octree.max_level = 1
    config.pipeline.model.octree.level_start_steps = 40
    config.output_dir, config.experiment_name, config.timestamp = folder / "outputs", "strangers", "run"
    config.vis, config.max_num_iterations, config.steps_per_save = "tensorboard", STEPS, 0
    config.steps_per_eval_batch = config.steps_per_eval_image = 0
    torch.manual_seed(0)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    return trainer.pipeline.get_average_eval_image_metrics()["psnr_1"]


@pytest.fixture(scope="module")
def ordinary_psnr(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """Of the captures that others are compared with, each trained once."""
    return functools.cache(lambda name: psnr(CASES[name], tmp_path_factory.mktemp("ordinary")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trains_like])
def test_trains_as_well(name: str, tmp_path: Path, ordinary_psnr, quiet_writers, report) -> None:  # noqa: ANN001
    case = CASES[name]
    report(TITLE, COLUMNS, name, "FAILED in training")
    found, expected = psnr(case, tmp_path), ordinary_psnr(case.trains_like)
    report(TITLE, COLUMNS, name, f"PSNR {found:.2f}, '{case.trains_like}' {expected:.2f}")
    report(TITLE, COLUMNS, case.trains_like, f"PSNR {expected:.2f}")
    assert expected > 14
    assert abs(found - expected) < SAME_PSNR
