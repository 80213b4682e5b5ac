"""The pyramid data manager on tiny captures: batches, splits, and what nerfstudio's pipeline and scripts ask of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics.image.lpip
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.models.vanilla_nerf import VanillaModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.scripts.render import _disable_datamanager_setup
from PIL import Image
from tiny_capture import HEIGHT, WIDTH, photo, shared_capture, write_capture, write_colmap, write_json

from infnerf_ns.data.photo_order import neighbour_order
from infnerf_ns.data.pyramid import downsample, downsample_mask
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError
from infnerf_ns.near_plane import NearPlanes


def make_config(folder: Path, dataparser: Any = None, **kwargs: Any) -> PyramidDataManagerConfig:
    dataparser = dataparser or NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval")
    settings = {"train_num_rays_per_batch": 256, "eval_num_rays_per_batch": 64, **kwargs}
    return PyramidDataManagerConfig(data=folder, dataparser=dataparser, **settings)


def test_train_batch(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path).setup()
    assert isinstance(manager, VanillaDataManager)
    rays, batch = manager.next_train(0)
    assert isinstance(rays, RayBundle)
    assert batch["image"].shape == (256, 3) and batch["image"].dtype == torch.float32
    assert batch["indices"].shape == (256, 3) and batch["pyramid_level"].dtype == torch.int64
    assert torch.equal(rays.camera_indices, batch["indices"][:, :1])
    assert set(batch["pyramid_level"].tolist()) == {0, 1}
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(256))
    assert rays.pixel_area.shape == rays.metadata["directions_norm"].shape == (256, 1)
    for image, (camera, row, column), level in zip(batch["image"], batch["indices"].tolist(), batch["pyramid_level"]):
        name = manager.train_dataset.image_filenames[camera].stem
        expected = downsample(photo(int(name)), int(level))[row, column] / 255.0
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_scene_is_in_the_metadata_of_the_train_split_only(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path).setup()
    scene = manager.train_dataset.metadata["sfm_scene"]
    assert scene.source == "visibility" and len(scene.points) > 50
    assert "sfm_scene" not in manager.eval_dataset.metadata
    assert manager.config.dataparser.load_3D_points is False  # the user's configuration is left as it was


def test_colmap_tracks_reach_the_scene(tmp_path: Path) -> None:
    write_colmap(tmp_path, ids=[4, 8, 1, 2, 3, 7, 6, 5])
    dataparser = ColmapDataParserConfig(colmap_path=Path("sparse/0"))
    manager = make_config(tmp_path, dataparser).setup()
    metadata = manager.train_dataset.metadata
    assert metadata["sfm_scene"].source == "tracks" and int(metadata["sfm_scene"].num_photos.max()) == 5
    assert "tracks" not in metadata  # large, and not needed any more


def test_a_photo_taken_out_of_the_capture_leaves_the_tracks_of_the_others(tmp_path: Path) -> None:
    """What the message for a missing photo advises: its matches in points3D.txt are then of no photo."""
    write_colmap(tmp_path)
    (tmp_path / "images/005.png").unlink()
    images = tmp_path / "sparse/0/images.txt"
    lines = images.read_text().splitlines()
    gone = next(number for number, line in enumerate(lines) if line.endswith("005.png"))
    images.write_text("\n".join(lines[:gone] + lines[gone + 2 :]) + "\n")
    manager = make_config(tmp_path, ColmapDataParserConfig(colmap_path=Path("sparse/0"))).setup()
    assert manager.train_dataset.metadata["sfm_scene"].source == "tracks"


def test_only_a_training_looks_for_points(tmp_path: Path) -> None:
    """All other commands load a checkpoint, whose tree and near planes are those of the training."""
    write_capture(tmp_path)
    scene = make_config(tmp_path).setup(test_mode="test").train_dataset.metadata["sfm_scene"]
    assert scene.source == "checkpoint" and torch.isinf(scene.footprints).all()


def test_rays_have_the_near_plane_of_their_photo(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path).setup()
    assert manager.near_planes is None
    scene = manager.train_dataset.metadata["sfm_scene"]
    manager.near_planes = NearPlanes(scene.points, scene.near).forward
    for draw, dataset in ((manager.next_train, manager.train_dataset), (manager.next_eval, manager.eval_dataset)):
        rays, _ = draw(0)
        assert torch.equal(rays.nears, manager.near_planes(dataset.cameras)[rays.camera_indices])
        assert rays.nears.min() >= scene.near


def test_rays_for_point_clouds_are_of_the_full_size(tmp_path: Path) -> None:
    write_capture(tmp_path)
    _, batch = make_config(tmp_path).setup(test_mode="test").next_train(0)
    assert batch["pyramid_level"].max() == 0


def test_same_seed_same_batches(tmp_path: Path) -> None:
    write_capture(tmp_path)
    batches = []
    for _ in range(2):
        manager = make_config(tmp_path).setup()
        torch.manual_seed(5)
        batches.append([manager.next_train(step)[1]["indices"] for step in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*batches))


def test_the_rays_of_a_step_come_from_neighbouring_photos(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path, photos_per_step=3).setup()
    order = neighbour_order(manager.train_dataset.cameras)
    seen = set()
    for step in range(40):
        rays, batch = manager.next_train(step)
        places = {order.index(photo) for photo in batch["indices"][:, 0].tolist()}
        assert any(places == {(first + i) % len(order) for i in range(3)} for first in range(len(order)))
        seen |= places
        row, column, level = batch["indices"][0, 1].item(), batch["indices"][0, 2].item(), batch["pyramid_level"][0]
        name = manager.train_dataset.image_filenames[int(rays.camera_indices[0, 0])].stem
        expected = downsample(photo(int(name)), int(level))[row, column] / 255.0
        np.testing.assert_allclose(batch["image"][0], expected, atol=1e-6)
    assert len(seen) == len(order) > 3
    assert len(set(manager.next_eval(0)[1]["indices"][:, 0].tolist())) == len(manager.eval_dataset)


def test_masked_pixels_are_never_drawn(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    manager = make_config(tmp_path, train_num_rays_per_batch=4096).setup()
    _, batch = manager.next_train(0)
    names = [int(name.stem) for name in manager.train_dataset.image_filenames]
    for (camera, row, column), level in zip(batch["indices"].tolist(), batch["pyramid_level"].tolist()):
        assert not (row << level < HEIGHT // 2 and column << level <= names[camera])
    ignoring = make_config(tmp_path, train_num_rays_per_batch=4096)
    ignoring.pixel_sampler.ignore_mask = True
    _, batch = ignoring.setup().next_train(0)
    assert (batch["indices"][:, 1:] == 0).all(dim=-1).any()


def test_patches(tmp_path: Path) -> None:
    write_capture(tmp_path)
    rays, batch = make_config(tmp_path, patch_size=8).setup().next_train(0)
    assert len(rays) == 256
    assert (batch["pyramid_level"].reshape(4, 64).diff(dim=1) == 0).all()
    assert batch["patch_rays"] == 256


def test_patches_and_single_pixels(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path, patch_size=8, patch_share=0.5).setup()
    for rays, batch in (manager.next_train(0), manager.next_eval(0)):
        assert isinstance(batch["patch_rays"], int) and batch["patch_size"] == 8
        assert batch["patch_rays"] == {256: 128, 64: 64}[len(rays)]  # half of 64 rays is less than a patch
        patches = batch["indices"][: batch["patch_rays"]].reshape(-1, 8, 8, 3)
        level = batch["pyramid_level"][: batch["patch_rays"]].reshape(-1, 64)
        row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        expected = torch.stack([torch.zeros_like(row), row, column], dim=-1)
        assert torch.equal(patches - patches[:, :1, :1], expected.expand_as(patches))
        assert (level == level[:, :1]).all()
    assert make_config(tmp_path).setup().next_train(0)[1]["patch_rays"] == 0


def test_scaled_photos(tmp_path: Path) -> None:
    write_capture(tmp_path)
    full = make_config(tmp_path).setup()
    half = make_config(tmp_path, camera_res_scale_factor=0.5).setup()
    _, batch = half.next_train(0)
    assert batch["pyramid_level"].max() == 0  # 16 x 12: half of it would be below 8 pixels
    assert batch["indices"][:, 1].max() == HEIGHT // 2 - 1 and batch["indices"][:, 2].max() == WIDTH // 2 - 1
    ratio = half.train_dataset.metadata["sfm_scene"].footprints / full.train_dataset.metadata["sfm_scene"].footprints
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))


def test_photos_of_different_sizes(tmp_path: Path) -> None:
    meta = write_capture(tmp_path)
    for key in ("w", "h", "cx", "cy"):
        for frame in meta["frames"]:
            frame[key] = meta[key]
        del meta[key]
    Image.fromarray(photo(3)).resize((48, 40)).save(tmp_path / "images/003.png")
    meta["frames"][3].update(w=48, h=40, cx=24.0, cy=20.0)
    write_json(tmp_path, meta)
    manager = make_config(tmp_path, train_num_rays_per_batch=4096, level_share=0.0).setup()
    _, batch = manager.next_train(0)
    counts = batch["indices"][:, 0].bincount() / 4096
    large = [name.stem for name in manager.train_dataset.image_filenames].index("003")
    assert counts.argmax() == large
    share = 48 * 40 * 1.25 / (48 * 40 * 1.25 + 6 * WIDTH * HEIGHT * 1.25)
    assert abs(float(counts[large]) - share) < 0.04


@pytest.mark.parametrize("alpha_color", [None, torch.tensor([1.0, 0.5, 0.0])])
def test_photos_with_alpha(tmp_path: Path, alpha_color: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_capture(tmp_path)
    alpha = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    for index in range(8):
        if index != 2:  # one photo without alpha among them
            Image.fromarray(np.concatenate([photo(index), alpha], axis=-1)).save(tmp_path / f"images/{index:03d}.png")
    parser = NerfstudioDataParserConfig().setup().__class__
    parse = parser.get_dataparser_outputs

    def with_colour(self: Any, split: str = "train", **kwargs: Any) -> Any:
        outputs = parse(self, split, **kwargs)
        outputs.alpha_color = alpha_color
        return outputs

    monkeypatch.setattr(parser, "get_dataparser_outputs", with_colour)
    manager = make_config(tmp_path).setup()
    _, batch = manager.next_train(0)
    assert batch["image"].shape == (256, 3 if alpha_color is not None else 4)
    for image, (camera, row, column), level in zip(batch["image"], batch["indices"].tolist(), batch["pyramid_level"]):
        name = int(manager.train_dataset.image_filenames[camera].stem)
        if level > 0:
            continue
        opacity = 1.0 if name == 2 else alpha[row, column, 0] / 255.0
        colour = photo(name)[row, column] / 255.0
        if alpha_color is None:
            expected = np.append(colour, opacity)
        else:
            expected = colour * opacity + alpha_color.numpy() * (1 - opacity)
        np.testing.assert_allclose(image, expected, atol=0.5 / 255 + 1e-5)


def test_eval_side(tmp_path: Path) -> None:
    write_capture(tmp_path, masks=True)
    manager = make_config(tmp_path).setup(test_mode="test")
    rays, batch = manager.next_eval(0)
    assert len(rays) == 64 == len(batch["image"])
    camera, batch = manager.next_eval_image(0)
    assert camera.shape == (1,) and batch["image"].shape == (HEIGHT, WIDTH, 3)
    assert len(manager.fixed_indices_eval_dataloader) == len(list(manager.fixed_indices_eval_dataloader)) == 1
    levels = list(manager.eval_pyramid(camera, batch))
    assert [level for level, *_ in levels] == [0, 1]
    valid = np.ones((HEIGHT, WIDTH), dtype=bool)
    valid[: HEIGHT // 2, : 1 + int(manager.eval_dataset.image_filenames[0].stem)] = False
    for level, level_camera, image, mask in levels:
        assert (
            image.shape
            == (HEIGHT >> level, WIDTH >> level, 3)
            == (*level_camera.image_height[0], *level_camera.image_width[0], 3)
        )
        assert level_camera.fx.item() == pytest.approx(camera.fx.item() / 2**level)
        assert mask.shape == (*image.shape[:2], 1) and mask.dtype == torch.bool
        np.testing.assert_array_equal(mask[..., 0], downsample_mask(valid, level))
    torch.testing.assert_close(levels[1][2][3, 4], batch["image"][6:8, 8:10].mean(dim=(0, 1)))
    assert camera.fx.item() == pytest.approx(30.0)


@pytest.mark.parametrize("dataparser", ["nerfstudio", "colmap"])
def test_inference_looks_at_no_photo(tmp_path: Path, dataparser: str) -> None:
    if dataparser == "nerfstudio":
        write_capture(tmp_path)
        config = make_config(tmp_path)
    else:
        write_colmap(tmp_path)
        config = make_config(tmp_path, ColmapDataParserConfig(colmap_path=Path("sparse/0")))
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    manager = config.setup(test_mode="inference")
    assert len(manager.train_dataset) == 7 and manager.get_train_rays_per_batch() == 256
    assert manager.get_datapath() == tmp_path


def test_scripts_that_do_not_train_load_photos_on_demand(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manager = make_config(tmp_path).setup(test_mode="test")
    assert "_train_source" not in vars(manager) and "_eval_source" not in vars(manager)
    assert manager.train_pixel_sampler is not None
    manager.train_pixel_sampler.num_rays_per_batch = 777  # as ns-export pointcloud does
    assert len(manager.next_train(0)[0]) == 777 == manager.get_train_rays_per_batch()
    assert isinstance(manager.train_dataset, InputDataset) and manager.train_dataset._dataparser_outputs is not None


def test_dataset_render_disables_the_setup(tmp_path: Path) -> None:
    write_capture(tmp_path)
    config = make_config(tmp_path)
    with _disable_datamanager_setup(config._target):
        manager = config.setup(test_mode="test", device="cpu")
    assert manager.train_pixel_sampler is None
    assert len(manager.eval_dataset) == 1


def test_no_held_out_photos(tmp_path: Path) -> None:
    """Training without evaluation works; asking for an evaluation says what is missing."""
    write_capture(tmp_path)
    dataparser = NerfstudioDataParserConfig(orientation_method="none", train_split_fraction=1.0)
    manager = make_config(tmp_path, dataparser).setup()
    assert len(manager.next_train(0)[0]) == 256
    assert not manager.eval_dataset
    with pytest.raises(SystemExit, match="no held-out photos"):
        hasattr(manager, "fixed_indices_eval_dataloader")
    with pytest.raises(SystemExit, match="no held-out photos"):
        manager.next_eval(0)


def test_a_missing_val_split_is_replaced_by_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_capture(tmp_path)
    parser = NerfstudioDataParserConfig().setup().__class__
    parse = parser.get_dataparser_outputs

    def without_val(self: Any, split: str = "train", **kwargs: Any) -> Any:
        if split == "val":
            raise FileNotFoundError(2, "No such file", "transforms_val.json")
        return parse(self, split, **kwargs)

    monkeypatch.setattr(parser, "get_dataparser_outputs", without_val)
    manager = make_config(tmp_path).setup(test_mode="val")
    assert manager.test_split == "test" and len(manager.eval_dataset) == 1


@pytest.mark.parametrize("dataparser", ["nerfstudio", "colmap"])
def test_split_lists_without_val(tmp_path: Path, dataparser: str) -> None:
    """nerfstudio's own lists: left alone it raises RuntimeError for a split that they do not have."""
    names = {"train": [f"{i:03d}.png" for i in range(6)], "test": ["006.png", "007.png"]}
    if dataparser == "nerfstudio":
        meta = write_capture(tmp_path)
        meta.update({f"{split}_filenames": [f"images/{name}" for name in names[split]] for split in names})
        write_json(tmp_path, meta)
        config = make_config(tmp_path)
    else:
        write_colmap(tmp_path)
        for split in names:
            (tmp_path / f"{split}_list.txt").write_text("\n".join(names[split]) + "\n")
        config = make_config(tmp_path, ColmapDataParserConfig(colmap_path=Path("sparse/0")))
    for mode in ("val", "test", "inference"):
        manager = config.setup(test_mode=mode)
        assert len(manager.train_dataset) == 6
        assert [name.name for name in manager.eval_dataset.image_filenames] == names["test"]


@pytest.mark.parametrize("factor", [1, 2])
def test_the_crop_of_fisheye_photos_follows_the_resolution(tmp_path: Path, factor: int) -> None:
    """The radius is of the full-size photos; what lies outside is neither trained nor measured."""
    meta = write_capture(tmp_path)
    meta.update(camera_model="OPENCV_FISHEYE", fisheye_crop_radius=10)
    write_json(tmp_path, meta)
    (tmp_path / "images_2").mkdir()
    for index in range(8):
        Image.fromarray(downsample(photo(index), 1)).save(tmp_path / f"images_2/{index:03d}.png")
    dataparser = NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval", downscale_factor=factor)
    manager = make_config(tmp_path, dataparser).setup()
    _, batch = manager.next_train(0)
    scale = factor * 2 ** batch["pyramid_level"][:, None]
    away = (batch["indices"][:, 1:] + 0.5) * scale - torch.tensor([HEIGHT / 2, WIDTH / 2])
    assert away.norm(dim=-1).max() < 10 + factor
    camera, held_out = manager.next_eval_image(0)
    for level, _, image, mask in manager.eval_pyramid(camera, held_out):
        share = float(mask.float().mean())
        assert mask.shape == (*image.shape[:2], 1) and 0.1 < share < 0.5, level


def test_photos_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_capture(tmp_path)
    needed = 7 * WIDTH * HEIGHT * 5 // 4 * 3
    memory = "infnerf_ns.data.pyramid_loading.psutil.virtual_memory"
    monkeypatch.setattr(memory, lambda: SimpleNamespace(available=needed))
    make_config(tmp_path).setup()
    monkeypatch.setattr(memory, lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(InputError, match="7 train photos need .* GiB.* --pipeline.datamanager.camera-res-scale-factor"):
        make_config(tmp_path).setup()


@pytest.mark.parametrize("patch_size", [1, 8])
def test_nerfstudio_pipeline_trains_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch_size: int) -> None:
    write_capture(tmp_path)
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", lambda **_: None)  # downloads
    config = VanillaPipelineConfig(
        datamanager=make_config(tmp_path, patch_size=patch_size, patch_share=0.5),
        model=VanillaModelConfig(num_coarse_samples=4, num_importance_samples=4),
    )
    pipeline = config.setup(device="cpu", test_mode="val")
    _, losses, _ = pipeline.get_train_loss_dict(0)
    assert all(torch.isfinite(value) for value in losses.values())
    _, losses, _ = pipeline.get_eval_loss_dict(0)
    assert all(torch.isfinite(value) for value in losses.values())


def test_real_capture_with_both_dataparsers() -> None:
    folder = shared_capture("fox")
    scenes = []
    for dataparser in (
        NerfstudioDataParserConfig(orientation_method="none", eval_mode="interval", downscale_factor=1),
        ColmapDataParserConfig(orientation_method="none", colmap_path=Path("sparse/0"), downscale_factor=1),
    ):
        manager = make_config(folder, dataparser, camera_res_scale_factor=0.125).setup()
        rays, batch = manager.next_train(0)
        assert len(rays) == len(batch["image"]) == 256
        scenes.append(manager.train_dataset.metadata["sfm_scene"])
        assert isinstance(manager, PyramidDataManager)
    assert [scene.source for scene in scenes] == ["visibility", "tracks"]
    assert len(scenes[0].points) > len(scenes[1].points) > 12_000
    torch.testing.assert_close(scenes[0].points.median(0).values, scenes[1].points.median(0).values, atol=0.05, rtol=0)
