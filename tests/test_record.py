"""What a run keeps of its capture: exact, complete, and enough for all that needs no photo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from nerfstudio.scripts.render import _disable_datamanager_setup
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny_capture import HEIGHT, WIDTH, photo, write_capture, write_json

from infnerf_ns.data.camera_rays import CameraRays
from infnerf_ns.data.capture.photos import Levels
from infnerf_ns.data.capture.reading import METADATA_KEY
from infnerf_ns.data.capture.record import RECORD, CaptureRecord, same_photos
from infnerf_ns.data.capture.recorded_photos import RecordedOutputs
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.near_plane import NearPlanes
from infnerf_ns.presets import load_preset

CAMERA_FIELDS = ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")

UNDECIDED = {"upright": None, "levels": {}}
"""How photos were read of a capture without turned photos and without more than 8 bits."""


def config_of(capture: Path, run: Path | None = None, **dataparser: Any) -> PyramidDataManagerConfig:
    settings = {"orientation_method": "up", "eval_mode": "interval", "eval_interval": 4, **dataparser}
    parser = NerfstudioDataParserConfig(**settings)
    config = PyramidDataManagerConfig(data=capture, dataparser=parser, eval_num_rays_per_batch=16)
    config.record = None if run is None else run / RECORD
    return config


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, PyramidDataManager]:
    """Folder of a capture, folder of a run, and the data manager of the training."""
    capture, run = tmp_path / "cap", tmp_path / "run"
    write_capture(capture, masks=True)
    manager = config_of(capture).setup()
    manager.write_record(run / RECORD)
    return capture, run, manager


def same_cameras(one: Cameras, other: Cameras) -> None:
    for name in (*CAMERA_FIELDS, "times"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert set(one.metadata or {}) == set(other.metadata or {})
    for key, value in (one.metadata or {}).items():
        assert (
            torch.equal(value, other.metadata[key]) if isinstance(value, torch.Tensor) else value == other.metadata[key]
        )


def strange_split(folder: Path) -> DataparserOutputs:
    """Every field of a split has a value of its own, the cameras are of three kinds and sizes."""
    count = 3
    generator = torch.Generator().manual_seed(5)
    cameras = Cameras(
        camera_to_worlds=torch.randn(count, 3, 4, generator=generator) / 3,
        fx=torch.tensor([1 / 3, 500.1, 0.1 + 0.2]),
        fy=torch.tensor([1 / 7, 500.2, 3e-5]),
        cx=torch.tensor([1.5, 2.5, 1e7]),
        cy=torch.tensor([2 / 3, 2.5, 4.0]),
        width=torch.tensor([10, 20, 3]),
        height=torch.tensor([5, 6, 7]),
        distortion_params=torch.randn(count, 6, generator=generator),
        camera_type=[CameraType.FISHEYE, CameraType.PERSPECTIVE, CameraType.EQUIRECTANGULAR],
        times=torch.tensor([0.0, 0.5, 1 / 3]),
        metadata={"fisheye_crop_radius": 7.25, "exposure": torch.rand(count, 2, generator=generator)},
    )
    return DataparserOutputs(
        image_filenames=[folder / "images" / "a b.png", folder / "ü.png", Path("/elsewhere/c.png")],
        cameras=cameras,
        alpha_color=torch.tensor([0.1, 0.2, 0.3]),
        scene_box=SceneBox(aabb=torch.tensor([[-1 / 3, -2, -3], [1, 2, 3.1]])),
        mask_filenames=[folder / f"{name}.png" for name in "xyz"],
        metadata={"mask_color": (0.5, 0.25, 1.0), "points3D_xyz": torch.rand(10, 3)},
        dataparser_transform=torch.rand(3, 4, generator=generator, dtype=torch.float64),
        dataparser_scale=1 / 7,
    )


def test_nothing_of_a_split_is_rounded_or_lost(tmp_path: Path) -> None:
    capture = tmp_path / "cap"
    split = strange_split(capture)
    parser = NerfstudioDataParserConfig(data=capture, downscale_factor=2)
    scene = SfMScene(torch.rand(4, 3), torch.rand(4), torch.ones(4, dtype=torch.long), 1 / 3, "tracks")
    other = strange_split(capture)
    other.cameras.camera_to_worlds = other.cameras.camera_to_worlds + 1
    splits = {"train": split, "val": other, "test": other}
    reading = {"upright": True, "levels": {"16 bit": [700.5, 9000.0]}}
    CaptureRecord.of_capture(parser, splits, "val", scene, reading, 2).write(tmp_path / RECORD)
    record = CaptureRecord.read(tmp_path / RECORD)
    assert (record.data, record.held_out, record.downscale_factor) == (capture, "val", 2)
    assert record.scene == {"points": 4, "source": "tracks", "near": 1 / 3}
    assert record.dataparser["class"] == "NerfstudioDataParserConfig"
    assert record.dataparser["options"]["eval_mode"] == "fraction", "by what the photos were held out"
    read = record.outputs("train", capture)
    photos = read.metadata[METADATA_KEY]
    assert photos.upright is True and photos.levels == {"16 bit": Levels(700.5, 9000.0)}
    same_cameras(split.cameras, read.cameras)
    assert read.image_filenames == split.image_filenames and read.mask_filenames == split.mask_filenames
    for name in ("alpha_color", "dataparser_transform"):
        assert torch.equal(getattr(read, name), getattr(split, name)), name
    assert read.dataparser_transform.dtype == torch.float64 and read.dataparser_scale == 1 / 7
    assert torch.equal(read.scene_box.aabb, split.scene_box.aabb)
    rest = {name: value for name, value in read.metadata.items() if name != METADATA_KEY}
    assert rest == {"mask_color": (0.5, 0.25, 1.0)}, "points and tracks are in the checkpoint, as far as needed"
    same_cameras(other.cameras, record.outputs("test", capture).cameras)
    with safe_open(tmp_path / RECORD, framework="pt") as file:
        assert sum(name.endswith("camera_to_worlds") for name in file.keys()) == 2, "equal splits are stored once"


def test_a_split_without_photos_and_cameras_without_distortion(tmp_path: Path) -> None:
    cameras = Cameras(torch.eye(4)[None, :3], 30.0, 30.0, 32.0, 16.0, 64, 32)
    train = DataparserOutputs(image_filenames=[tmp_path / "a.png"], cameras=cameras)
    none = DataparserOutputs(image_filenames=[], cameras=cameras[:0])
    scene = SfMScene.placeholder()
    parser = NerfstudioDataParserConfig(data=tmp_path)
    CaptureRecord.of_capture(parser, {"train": train, "val": none, "test": none}, "val", scene, UNDECIDED, None).write(
        tmp_path / RECORD
    )
    record = CaptureRecord.read(tmp_path / RECORD)
    same_cameras(cameras, record.outputs("train", tmp_path).cameras)
    assert len(record.outputs("val", tmp_path).cameras) == len(record.outputs("val", tmp_path).image_filenames) == 0
    assert record.outputs("train", tmp_path).mask_filenames is None


@pytest.mark.parametrize("test_mode", ["test", "inference"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_loaded_run_has_the_cameras_of_its_training(trained: tuple, test_mode: str, gone: bool) -> None:
    capture, run, training = trained
    if gone:
        shutil.rmtree(capture)
    loaded = config_of(capture, run).setup(test_mode=test_mode)
    same_cameras(training.train_dataset.cameras, loaded.train_dataset.cameras)
    same_cameras(training.eval_dataset.cameras, loaded.eval_dataset.cameras)
    assert (len(loaded.train_dataset), len(loaded.eval_dataset)) == (6, 2)
    assert loaded.train_dataset.metadata["sfm_scene"].source == "checkpoint"
    then, now = training.train_dataparser_outputs, loaded.train_dataparser_outputs
    assert torch.equal(then.dataparser_transform, now.dataparser_transform)
    assert then.dataparser_scale == now.dataparser_scale
    assert torch.equal(training.train_dataset.scene_box.aabb, loaded.train_dataset.scene_box.aabb)


def test_photos_that_came_or_went_do_not_matter(trained: tuple) -> None:
    """Regression: "field.appearance.weight is (43, 8), but the configuration asks for (40, 8)"."""
    capture, run, training = trained
    names = [path.name for path in training.eval_dataset.image_filenames]
    shutil.rmtree(capture)
    write_capture(capture, count=12, masks=True)
    loaded = config_of(capture, run).setup(test_mode="test")
    assert len(loaded.train_dataset) == 6
    assert [path.name for path in loaded.eval_dataset.image_filenames] == names
    meta = json.loads((capture / "transforms.json").read_text())
    write_json(capture, {**meta, "frames": meta["frames"][5:]})
    assert len(config_of(capture, run).setup(test_mode="test").train_dataset) == 6
    (capture / "transforms.json").write_text("{ not json")
    assert len(config_of(capture, run).setup(test_mode="inference").train_dataset) == 6


def test_held_out_photos_are_those_of_the_training(trained: tuple) -> None:
    capture, run, training = trained
    loaded = config_of(capture, run).setup(test_mode="test")
    batches = list(loaded.fixed_indices_eval_dataloader)
    assert len(batches) == 2
    for number, (camera, batch) in enumerate(batches):
        name = training.eval_dataset.image_filenames[number].stem
        np.testing.assert_array_equal((batch["image"] * 255).round().numpy(), photo(int(name)))
        assert torch.equal(camera.camera_to_worlds, training.eval_dataset.cameras[number : number + 1].camera_to_worlds)
        assert batch["mask"].shape == (HEIGHT, WIDTH, 1) and not batch["mask"].all()


def test_a_moved_capture_is_found_where_the_configuration_says(trained: tuple, tmp_path: Path) -> None:
    capture, run, _ = trained
    capture.rename(tmp_path / "moved")
    loaded = config_of(tmp_path / "moved", run).setup(test_mode="test")
    assert {path.parent.parent for path in loaded.eval_dataset.image_filenames} == {tmp_path / "moved"}
    assert len(list(loaded.fixed_indices_eval_dataloader)) == 2
    assert len(list(config_of(tmp_path / "moved" / "transforms.json", run).setup(test_mode="test").eval_dataset)) == 2


def test_a_configuration_that_names_another_place_falls_back_to_the_first(trained: tuple, tmp_path: Path) -> None:
    capture, run, _ = trained
    loaded = config_of(tmp_path / "nowhere", run).setup(test_mode="test")
    assert {path.parent.parent for path in loaded.eval_dataset.image_filenames} == {capture}


def test_missing_photos_are_named_when_they_are_needed(trained: tuple, tmp_path: Path) -> None:
    capture, run, training = trained
    first, second = training.eval_dataset.image_filenames
    second.unlink()
    loaded = config_of(tmp_path / "new", run).setup(test_mode="test")
    line = "1 of the 2 held-out photos .* cannot be found, the first is (.*); looked for in (.*): put them back, or say"
    with pytest.raises(InputError, match=line) as caught:
        _ = loaded.fixed_indices_eval_dataloader
    assert f"{tmp_path / 'new'} and {capture}: " in str(caught.value)
    assert f"{tmp_path / 'new' / 'images' / second.name};" in str(caught.value)
    with pytest.raises(InputError, match="1 of the 2 held-out photos"):
        loaded.eval_dataset[1]
    np.testing.assert_array_equal((loaded.eval_dataset[0]["image"] * 255).round().numpy(), photo(int(first.stem)))
    camera, batch = loaded.eval_dataloader.get_camera(image_idx=1)  # as ns-render spiral does
    assert torch.equal(camera.camera_to_worlds[0], training.eval_dataset.cameras.camera_to_worlds[1])
    with pytest.raises(InputError, match="1 of the 2 held-out photos"):
        _ = batch["image"]


def test_a_missing_mask_is_missing_too(trained: tuple) -> None:
    capture, run, training = trained
    shutil.rmtree(capture / "masks")
    training.eval_dataset.image_filenames[1].unlink()
    loaded = config_of(capture, run).setup(test_mode="test")
    with pytest.raises(InputError, match=r"2 of the 2 held-out photos \(or masks\) of the run .*/masks/"):
        _ = loaded.fixed_indices_eval_dataloader


@pytest.mark.parametrize("split, mode", [("train", "test"), ("val", "val"), ("test", "test")])
def test_ns_render_dataset_takes_the_recorded_split(trained: tuple, split: str, mode: str) -> None:
    capture, run, training = trained
    config = config_of(capture, run)
    with _disable_datamanager_setup(config._target):
        manager = config.setup(test_mode=mode)
    dataset = manager.train_dataset if split == "train" else manager.eval_dataset
    then = training.train_dataset if split == "train" else training.eval_dataset
    assert dataset.image_filenames == then.image_filenames
    assert len(list(FixedIndicesEvalDataloader(dataset))) == len(then)
    shutil.rmtree(capture / "images")
    with pytest.raises(InputError, match="photos .* of the run cannot be found"):
        list(FixedIndicesEvalDataloader(dataset))


def test_another_downscale_factor_reads_the_capture(trained: tuple) -> None:
    """What ns-render dataset --downscale-factor asks for, which was not recorded."""
    capture, run, _ = trained
    (capture / "images_2").mkdir()
    (capture / "masks_2").mkdir()
    for folder in ("images", "masks"):
        for file in (capture / folder).iterdir():
            Image.open(file).resize((WIDTH // 2, HEIGHT // 2)).save(capture / f"{folder}_2" / file.name)
    manager = config_of(capture, run, downscale_factor=2).setup(test_mode="test")
    assert manager.record is None and int(manager.eval_dataset.cameras.width[0]) == WIDTH // 2
    pipeline = config_of(capture, run, downscale_factor=2).setup(test_mode="inference")
    assert pipeline.record is not None, "the model that renders is the run's"


def test_photos_that_were_changed_are_said(trained: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    capture, run, training = trained
    loaded = config_of(capture, run).setup(test_mode="test")
    _ = loaded.fixed_indices_eval_dataloader
    assert "other files" not in capsys.readouterr().err
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(training.eval_dataset.image_filenames[1])
    _ = config_of(capture, run).setup(test_mode="test").fixed_indices_eval_dataloader
    assert "warning: 1 of the 2 held-out photos are other files than those of the training" in capsys.readouterr().err


def test_the_viewer_gets_grey_pictures_of_missing_photos(trained: tuple) -> None:
    capture, run, training = trained
    training.train_dataset.image_filenames[0].unlink()
    loaded = config_of(capture, run).setup(test_mode="test")
    loaded.show_missing_photos()
    image = loaded.train_dataset[0]["image"]
    assert image.shape == (100, round(100 * WIDTH / HEIGHT), 3) and bool((image == 0.5).all())
    assert loaded.train_dataset[1]["image"].shape == (HEIGHT, WIDTH, 3)
    assert loaded.get_datapath() == capture
    shutil.rmtree(capture)
    assert loaded.get_datapath() == run, "nerfstudio's viewer writes camera paths there"


def test_point_clouds_need_no_photos(trained: tuple) -> None:
    capture, run, training = trained
    nears = NearPlanes(torch.tensor([[0.0, 0.0, 0.0]]).repeat(20, 1), 0.125).forward
    with_photos = config_of(capture, run).setup(test_mode="test")
    with_photos.train_pixel_sampler.num_rays_per_batch = 64
    assert "image" in with_photos.next_train(0)[1]
    shutil.rmtree(capture)
    loaded = config_of(capture, run).setup(test_mode="test")
    loaded.near_planes = nears
    loaded.train_pixel_sampler.num_rays_per_batch = 4000
    rays, batch = loaded.next_train(0)
    photo_of, row, column = batch["indices"].T
    assert set(photo_of.tolist()) == set(range(6)) and rays.shape == (4000,) and rays.nears.shape == (4000, 1)
    assert set(row.tolist()) == set(range(HEIGHT)) and set(column.tolist()) == set(range(WIDTH))
    expected = training.train_dataset.cameras.generate_rays(
        photo_of[:, None], coords=torch.stack([row, column], -1) + 0.5
    )
    torch.testing.assert_close(rays.directions, expected.directions)
    assert torch.equal(rays.camera_indices[:, 0], photo_of)


def test_rays_of_a_fisheye_without_its_photo_stay_in_its_circle() -> None:
    cameras = Cameras(torch.eye(4)[None, :3], 30.0, 30.0, 32.0, 16.0, 64, 32, camera_type=CameraType.FISHEYE)
    _, batch = CameraRays(cameras, crop_radius=20.0).batch(5000, 1, 1.0)
    row, column = batch["indices"][:, 1] - 16, batch["indices"][:, 2] - 32
    distance = (row**2 + column**2).double().sqrt()
    assert len(distance) == 5000 and distance.max() <= 20 and column.abs().max() >= 19
    assert batch["indices"][:, 1].min() == 0, "the circle is cut by the image"


# -- where the run is, runs of earlier versions


def test_a_run_without_a_record_reads_the_capture(trained: tuple) -> None:
    capture, run, training = trained
    (run / RECORD).unlink()
    loaded = config_of(capture, run).setup(test_mode="test")
    assert loaded.record is None
    same_cameras(training.eval_dataset.cameras, loaded.eval_dataset.cameras)
    shutil.rmtree(capture)
    with pytest.raises(InputError, match="the capture .*cap does not exist, and the run was trained with an earlier"):
        config_of(capture, run).setup(test_mode="inference")


def test_a_run_that_was_moved_is_said_to_be(trained: tuple) -> None:
    capture, run, _ = trained
    run.rename(run.with_name("elsewhere"))
    with pytest.raises(InputError, match="the run is not in .*/run, where its config.yml says .* infnerf-config RUN"):
        config_of(capture, run).setup(test_mode="test")


def test_a_training_into_the_same_folder_reads_the_capture(tmp_path: Path) -> None:
    """Not what an earlier training there has left."""
    write_capture(tmp_path / "cap")
    config = load_preset("infnerf-small", "cpu")
    config.output_dir, config.timestamp, config.vis = tmp_path, "run", "tensorboard"
    config.pipeline.datamanager = config_of(tmp_path / "cap")
    config.data = tmp_path / "cap"
    record = config.get_base_dir() / RECORD
    record.parent.mkdir(parents=True)
    record.write_bytes(b"of an earlier training")
    trainer = config.setup()
    assert trainer.config.pipeline.datamanager.record is None


# -- damage


def harmed(file: Path, harm: str) -> None:
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["infnerf_capture"])
    tensors = load_file(file)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        return
    if harm == "empty":
        file.write_bytes(b"")
        return
    if harm == "not ours":
        file.write_bytes(save(tensors))
        return
    if harm == "poses of another shape":
        tensors["0.camera_to_worlds"] = torch.zeros(2, 3, 4)
    elif harm == "NaN":
        tensors["0.fx"][0] = torch.nan
    elif harm == "no width":
        tensors["0.width"][0] = 0
    elif harm == "a kind that there is not":
        tensors["0.camera_type"][0] = 99
    elif harm == "a wall of pixels":
        tensors["0.height"][0] = 1 << 40
    elif harm == "without focal lengths":
        del tensors["0.fx"]
    elif harm == "fewer masks":
        header["stored"][0]["masks"].pop()
    elif harm == "names of another type":
        header["stored"][0]["photos"][0] = 7
    elif harm == "no such split":
        header["splits"]["test"] = 9
    elif harm == "scale":
        header["stored"][0]["scale"] = 0
    file.write_bytes(save(tensors, {"infnerf_capture": json.dumps(header)}))


@pytest.mark.parametrize(
    "harm",
    [
        *("truncated", "empty", "not ours", "poses of another shape", "NaN", "no width", "without focal lengths"),
        *("fewer masks", "names of another type", "no such split", "scale"),
        *("a kind that there is not", "a wall of pixels"),
    ],
)
def test_a_damaged_record_is_one_line(trained: tuple, harm: str) -> None:
    capture, run, _ = trained
    harmed(run / RECORD, harm)
    with pytest.raises(
        InputError, match=f"{RECORD} is damaged .* or delete it to have the capture read instead"
    ) as line:
        config_of(capture, run).setup(test_mode="test")
    assert "\n" not in str(line.value)


def test_a_later_version_is_one_line(trained: tuple) -> None:
    capture, run, _ = trained
    with safe_open(run / RECORD, framework="pt") as opened:
        header = json.loads(opened.metadata()["infnerf_capture"])
    (run / RECORD).write_bytes(save(load_file(run / RECORD), {"infnerf_capture": json.dumps({**header, "version": 2})}))
    with pytest.raises(InputError, match="was written by a later version of infnerf"):
        config_of(capture, run).setup(test_mode="test")


def test_a_record_that_cannot_be_written_is_one_line_and_leaves_none(trained: tuple, tmp_path: Path) -> None:
    _, _, training = trained
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="capture.safetensors cannot be written"):
        training.write_record(tmp_path / "file" / RECORD)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [RECORD]


# -- training on


def names_of(*names: str) -> DataparserOutputs:
    count = len(names)
    cameras = Cameras(torch.eye(4)[None, :3].repeat(count, 1, 1), 30.0, 30.0, 32.0, 16.0, 64, 32)
    return DataparserOutputs(image_filenames=[Path("/cap") / name for name in names], cameras=cameras)


def record_of(*names: str) -> CaptureRecord:
    splits = {split: names_of(*names) for split in ("train", "val", "test")}
    return CaptureRecord(Path("/cap"), {"class": "", "options": {}}, None, "val", {}, UNDECIDED, splits)


def test_training_on_with_other_photos_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: it was told by the shape of a tensor."""
    record, run = record_of("images/a.png", "images/b.png", "images/c.png"), Path("/runs/1")
    same_photos(record, names_of("images_2/a.png", "images_2/b.png", "images_2/c.png"), run)
    assert capsys.readouterr().err == ""
    line = "--load-dir /runs/1: it was trained on 3 photos, and now there are 4: 2 added .d.png ....? and 1 gone .b.png"
    with pytest.raises(InputError, match=line):
        same_photos(record, names_of("a.png", "c.png", "d.png", "e.png"), run)
    same_photos(record, names_of("a.png", "b.png", "d.png"), run)
    assert "now there are 3: 1 added (d.png ...) and 1 gone (c.png ...)" in capsys.readouterr().err
    same_photos(record, names_of("c.png", "b.png", "a.png"), run)
    assert "in another order" in capsys.readouterr().err


def test_the_demo_makes_its_town_anew(tmp_path: Path) -> None:
    """A dataparser that finds the same photos elsewhere is followed; one that finds others is not."""
    names = ("a.png", "b.png")
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()

    def now(poses: float) -> DataparserOutputs:
        outputs = names_of(*names)
        outputs.image_filenames = [tmp_path / name for name in names]
        outputs.cameras.camera_to_worlds = outputs.cameras.camera_to_worlds + poses
        return outputs

    found = record_of(*names).outputs("test", Path("/cap"), lambda: now(0.0))
    found.require()
    assert found.image_filenames == [tmp_path / name for name in names]
    for again in (lambda: now(0.5), lambda: 1 / 0, None):
        with pytest.raises(InputError, match="2 of the 2 held-out photos"):
            record_of(*names).outputs("test", Path("/cap"), again).require()
    assert isinstance(found, RecordedOutputs)
