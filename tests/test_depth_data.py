"""Depth images: their pyramid, their way into a batch as distances along the rays, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.utils.data_utils import get_depth_image_from_path
from PIL import Image
from tiny_capture import FOCAL, HEIGHT, WIDTH, photo, ring, write_capture, write_json

from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.depth import SAME_SURFACE, DepthPixels, downsample_depth, read_depth
from infnerf_ns.data.pyramid import PixelPyramid, downsample
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError

SHAPE = (HEIGHT, WIDTH)


def millimetres(index: int) -> np.ndarray:
    """A random depth image [HEIGHT, WIDTH] of two surfaces with holes, as a 16 bit sensor gives it."""
    rng = np.random.default_rng(100 + index)
    near, far = rng.integers(900, 1100, SHAPE), rng.integers(8000, 9000, SHAPE)
    depth = np.where(rng.random(SHAPE) < 0.5, near, far)
    return np.where(rng.random(SHAPE) < 0.1, 0, depth).astype(np.uint16)


def save(path: Path, depth: np.ndarray) -> None:
    np.save(path, depth) if path.suffix == ".npy" else Image.fromarray(depth).save(path)


def write_depth_capture(
    folder: Path, depths: list[np.ndarray], suffix: str = ".png", masks: bool = False
) -> dict[str, Any]:
    """A capture without distortion, its photos with these depth images."""
    meta = write_capture(folder, len(depths), masks=masks)
    (folder / "depth").mkdir()
    for index, (frame, depth) in enumerate(zip(meta["frames"], depths)):
        frame["depth_file_path"] = f"depth/{index:03d}{suffix}"
        save(folder / frame["depth_file_path"], depth)
    meta.update(k1=0.0, p1=0.0)
    write_json(folder, meta)
    return meta


def start(folder: Path, unit: float = 1e-3, test_mode: Any = "val", **settings: Any) -> PyramidDataManager:
    dataparser = NerfstudioDataParserConfig(
        orientation_method="none", eval_mode="interval", depth_unit_scale_factor=unit
    )
    settings = {"use_depth": True, "train_num_rays_per_batch": 512, "eval_num_rays_per_batch": 64, **settings}
    return PyramidDataManagerConfig(data=folder, dataparser=dataparser, **settings).setup(test_mode=test_mode)


def refusal(folder: Path, **settings: Any) -> str:
    """The line that a training with this capture ends in."""
    with pytest.raises(InputError) as caught:
        start(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pyramid_by_hand() -> None:
    depth = np.float32([[2, 2, 10, 10], [2, 8, 10, 0], [0, 0, 1, 9], [0, 5, 1.02, 9]])
    # 2 2 2 8 | 10 10 10 | one of four is known | 1 1.02 9 9: two surfaces, the nearer one counts
    np.testing.assert_array_equal(downsample_depth(depth, 1), np.float32([[2, 10], [0, 1.02]]))
    # 1 1.02 2 2 2 [5 8] 9 9 10 10 10
    np.testing.assert_array_equal(downsample_depth(depth, 2), np.float32([[5]]))
    np.testing.assert_array_equal(downsample_depth(depth, 0), depth)
    one_surface = np.float32([[1, 1.02, 7], [1.04, 9, 7], [7, 7, 7]])
    np.testing.assert_allclose(downsample_depth(one_surface, 1), [[1.03]], rtol=1e-6)
    np.testing.assert_array_equal(downsample_depth(np.float32([[0, 3], [4, 0]]), 1), [[3]])
    np.testing.assert_array_equal(downsample_depth(np.zeros((2, 2), np.float32), 1), [[0]])


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("known", [0.3, 0.6, 1.0])
def test_pyramid_never_invents_a_surface(level: int, known: float) -> None:
    """Two surfaces with noise: every reduced depth is of one of them, by brute force the one that covers more."""
    rng = np.random.default_rng(level)
    near = rng.random((27, 35)) < 0.5
    depth = np.where(near, rng.uniform(1, 1.04, near.shape), rng.uniform(5, 5.2, near.shape))
    depth = np.where(rng.random(near.shape) < known, depth, 0).astype(np.float32)
    reduced, side = downsample_depth(depth, level), 1 << level
    assert reduced.shape == (27 >> level, 35 >> level)
    for row, column in np.ndindex(*reduced.shape):
        block = depth[row * side : (row + 1) * side, column * side : (column + 1) * side]
        values = block[block > 0]
        if 2 * len(values) < side * side:
            assert reduced[row, column] == 0
            continue
        covers_more = values[values < 3] if 2 * (values < 3).sum() >= len(values) else values[values > 3]
        assert covers_more.min() <= reduced[row, column] <= covers_more.max()


def test_a_slanted_plane_stays_where_it_is() -> None:
    """The median of a plane is its depth at the middle of the block, without a bias towards the camera."""
    plane = (10 + 0.05 * np.arange(64)[:, None] + np.zeros(64)).astype(np.float32)
    for level in range(1, 5):
        middle = 10 + 0.05 * ((np.arange(64 >> level) + 0.5) * 2**level - 0.5)
        np.testing.assert_allclose(downsample_depth(plane, level)[:, 0], middle, rtol=1e-6)


def test_depths_keep_four_digits_in_memory() -> None:
    depth = np.exp(np.linspace(np.log(0.02), np.log(900), 4096)).reshape(64, 64).astype(np.float32)
    depth[0, 0], depth[63, 63], depth[10, 10] = 1e-5, 1e6, 0  # a speck, a stand-in for the sky, a hole
    pixels = DepthPixels(2 * depth.size, 2)
    pixels.set_photo(1, depth, [depth.size])
    assert pixels.any_known() and pixels.codes.dtype == torch.int16
    at = torch.arange(depth.size)
    found = pixels.at(at + depth.size, torch.ones_like(at)).reshape(64, 64).numpy()
    assert found[0, 0] == found[63, 63] == found[10, 10] == 0
    kept = found > 0
    assert kept.sum() == depth.size - 3
    assert np.abs(found[kept] / depth[kept] - 1).max() < 1e-4
    assert not pixels.at(at, torch.zeros_like(at)).any()


def test_draws_have_the_depth_of_their_pixel() -> None:
    """Photos in another order than in the buffer, patches and single pixels, all levels."""
    pyramid = PixelPyramid([SHAPE] * 3, 3, 3, masked=True, level_share=0.5, order=[2, 0, 1], with_depth=True)
    mask = np.ones(SHAPE, bool)
    mask[:, :8] = False
    for index in range(3):
        pyramid.set_photo(index, photo(index), mask, millimetres(index).astype(np.float32))
    draw = pyramid.draw(600, patch_size=4, patch_share=0.5)
    assert set(draw.level.tolist()) == {0, 1} and (draw.depth == 0).any()
    for at in range(600):
        index, level, row, column = (int(each[at]) for each in (draw.photo, draw.level, draw.row, draw.column))
        assert draw.image[at].tolist() == downsample(photo(index), level)[row, column].tolist()
        expected = downsample_depth(millimetres(index).astype(np.float32), level)[row, column]
        assert float(draw.depth[at]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("suffix", [".png", ".npy", ".tiff"])
@pytest.mark.parametrize("masks", [False, True])
def test_batches_have_colour_and_depth_of_the_same_pixel(tmp_path: Path, suffix: str, masks: bool) -> None:
    depths = [millimetres(index) for index in range(8)]
    write_depth_capture(
        tmp_path, depths if suffix == ".png" else [depth / np.float32(1000) for depth in depths], suffix, masks=masks
    )
    manager = start(tmp_path, 1e-3 if suffix == ".png" else 1.0)
    for (rays, batch), dataset in (
        (manager.next_train(0), manager.train_dataset),
        (manager.next_eval(0), manager.eval_dataset),
    ):
        assert batch["depth"].shape == (len(rays),) and batch["depth"].dtype == torch.float32
        assert set(batch["pyramid_level"].tolist()) == {0, 1} and (batch["depth"] == 0).any()
        scale = dataset._dataparser_outputs.dataparser_scale
        assert scale != 1
        for at, ((camera, row, column), level) in enumerate(
            zip(batch["indices"].tolist(), batch["pyramid_level"].tolist())
        ):
            index = int(dataset.image_filenames[camera].stem)
            colour = downsample(photo(index), level)[row, column] / 255.0
            np.testing.assert_allclose(batch["image"][at], colour, atol=1e-6)
            depth = downsample_depth(depths[index].astype(np.float32), level)[row, column] / 1000 * scale
            x, y = (column + 0.5) * 2**level - WIDTH / 2, (row + 0.5) * 2**level - HEIGHT / 2
            distance = depth * np.sqrt(1 + (x**2 + y**2) / FOCAL**2)
            assert float(batch["depth"][at]) == pytest.approx(distance, rel=2e-4)


@pytest.mark.parametrize("euclidean", [False, True])
def test_rays_end_on_the_surface(tmp_path: Path, euclidean: bool) -> None:
    """Depth images of the plane z = -1, seen obliquely: in scene units, the batch's distances lead to that plane."""
    row, column = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    local = np.stack([(column - WIDTH / 2) / FOCAL, (HEIGHT / 2 - row) / FOCAL, -np.ones(SHAPE)], axis=-1)
    depths = []
    for pose in ring(8):
        depth = (-1 - pose[2, 3]) / (local @ pose[2, :3])  # along the viewing axis, where local is 1
        depth = depth * np.linalg.norm(local, axis=-1) if euclidean else depth
        depths.append(np.where(depth > 0, depth, np.nan).astype(np.float32))
    write_depth_capture(tmp_path, depths, ".npy")
    manager = start(tmp_path, 1.0, is_euclidean_depth=euclidean)
    rays, batch = manager.next_train(0)
    plane = manager.train_dataparser_outputs.dataparser_transform @ torch.tensor([0.0, 0.0, -1.0, 1.0])
    height = float(plane[2]) * manager.train_dataparser_outputs.dataparser_scale
    known = batch["depth"] > 0
    ends = rays.origins + rays.directions * batch["depth"][:, None]
    # A block of the reduced level ends at its median depth, which on a plane in perspective is a little off.
    for level, tolerance in ((0, 2e-4), (1, 2e-2)):
        chosen = known & (batch["pyramid_level"] == level)
        assert chosen.sum() > 50
        off = (ends[chosen, 2] - height).abs() / batch["depth"][chosen]
        assert float(off.max()) < tolerance


def test_the_distance_of_a_tilted_ray_by_hand(tmp_path: Path) -> None:
    """The upper left pixel of level 1: its centre is 11 rows above the middle of the photo, 15 columns left of it."""
    write_depth_capture(tmp_path, [np.full(SHAPE, 3000, np.uint16)] * 8)
    manager = start(tmp_path, train_num_rays_per_batch=8192)
    _, batch = manager.next_train(0)
    scale = manager.train_dataparser_outputs.dataparser_scale
    corner = (batch["indices"][:, 1:] == 0).all(dim=1) & (batch["pyramid_level"] == 1)
    distance = 3 * np.sqrt(1 + (11 / 30) ** 2 + (15 / 30) ** 2)
    assert distance == pytest.approx(3.52987, abs=1e-5) and corner.sum() > 3
    assert (batch["depth"][corner] / scale).tolist() == pytest.approx([distance] * int(corner.sum()), rel=1e-4)
    _, batch = start(tmp_path, is_euclidean_depth=True).next_train(0)
    assert (batch["depth"] / scale).tolist() == pytest.approx([3.0] * 512, rel=1e-4)


def test_depth_images_of_another_resolution(tmp_path: Path) -> None:
    """As sensors have them: at the photo's size every pixel has the depth of the nearest one, as in nerfstudio."""
    small = np.arange(1, 13 * 17, dtype=np.uint16)[: 12 * 16].reshape(12, 16) * 10
    save(tmp_path / "small.png", small)
    found = read_depth(tmp_path / "small.png", *SHAPE)
    np.testing.assert_array_equal(found, small.repeat(2, axis=0).repeat(2, axis=1))
    theirs = get_depth_image_from_path(tmp_path / "small.png", *SHAPE, scale_factor=1.0)
    np.testing.assert_array_equal(found, theirs[..., 0].numpy())
    write_depth_capture(tmp_path, [small] * 8)
    _, batch = start(tmp_path, camera_res_scale_factor=0.5, is_euclidean_depth=True).next_train(0)
    row, column = batch["indices"][:, 1], batch["indices"][:, 2]
    assert row.max() == 11 and column.max() == 15
    expected = torch.from_numpy(small.astype(np.float32))[row, column]
    torch.testing.assert_close(batch["depth"] / batch["depth"].max(), expected / expected.max(), rtol=2e-4, atol=0.0)


def test_what_is_no_depth_is_zero(tmp_path: Path) -> None:
    depth = np.full((*SHAPE, 1), 2, np.float32)
    depth[0, :4, 0] = np.nan, np.inf, -1, 0
    save(tmp_path / "odd.npy", depth)
    found = read_depth(tmp_path / "odd.npy", *SHAPE)
    assert found[0, :4].tolist() == [0] * 4 and (found.reshape(-1)[4:] == 2).all()


@pytest.mark.parametrize("settings", [{"use_depth": False}, {"test_mode": "test"}])
def test_depth_images_are_left_alone_unless_a_training_asks(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    for file in (tmp_path / "depth").iterdir():
        file.unlink()
    assert not PyramidDataManagerConfig().use_depth
    manager = start(tmp_path, **settings)
    assert "depth" not in manager.next_train(0)[1]
    assert manager._train_source.pyramid.depth is None


def test_without_held_out_photos(tmp_path: Path) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    dataparser = NerfstudioDataParserConfig(train_split_fraction=1.0)
    manager = PyramidDataManagerConfig(data=tmp_path, dataparser=dataparser, use_depth=True).setup(test_mode="val")
    assert len(manager.next_train(0)[1]["depth"]) == 1024


def test_demo_scene_gives_depth(tmp_path: Path) -> None:
    demo = InfNeRFDemoDataParserConfig(
        num_photos=12, image_width=40, image_height=30, supersampling=1, cache_dir=tmp_path, depth=True
    )
    manager = PyramidDataManagerConfig(dataparser=demo, use_depth=True).setup(test_mode="val")
    rays, batch = manager.next_train(0)
    assert (batch["depth"] > 0).float().mean() > 0.7
    points = rays.origins + rays.directions * batch["depth"][:, None]
    box = manager.train_dataset.scene_box.aabb
    inside = (points[:, :2] > box[0, :2]).all(1) & (points[:, :2] < box[1, :2]).all(1) & (batch["depth"] > 0)
    assert inside.sum() > 200 and points[inside, 2].min() > -0.05, "on the ground or above"
    demo.depth = False
    with pytest.raises(InputError, match="--depth True for infnerf-demo"):
        PyramidDataManagerConfig(dataparser=demo, use_depth=True).setup(test_mode="val")


def test_memory_counts_the_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    needed = 7 * WIDTH * HEIGHT * 5 // 4 * (3 + 2)
    memory = "infnerf_ns.data.pyramid_loading.psutil.virtual_memory"
    monkeypatch.setattr(memory, lambda: SimpleNamespace(available=needed))
    start(tmp_path)
    monkeypatch.setattr(memory, lambda: SimpleNamespace(available=needed - 1))
    assert "7 train photos need" in refusal(tmp_path)


REMEDY = "or train without depth losses"


def test_no_depth_in_the_capture(tmp_path: Path) -> None:
    write_capture(tmp_path)
    assert refusal(tmp_path) == (
        "infnerf: the train split has no depth images, which --pipeline.datamanager.use-depth asks for: give every "
        f"photo one ('depth_file_path' in transforms.json; --depth True for infnerf-demo) {REMEDY}"
    )


@pytest.mark.parametrize("use_depth", [True, False])
def test_fewer_depth_images_than_photos(tmp_path: Path, use_depth: bool) -> None:
    meta = write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    for index in (3, 6):
        del meta["frames"][index]["depth_file_path"]
    write_json(tmp_path, meta)
    assert refusal(tmp_path, use_depth=use_depth) == (
        f"infnerf: {tmp_path / 'transforms.json'}: 2 of 8 photos have no 'depth_file_path', the first is "
        "images/003.png: give every photo a depth image, or none"
    )


def test_fewer_depth_images_than_photos_from_another_dataparser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    parser = NerfstudioDataParserConfig().setup().__class__
    parse = parser.get_dataparser_outputs

    def with_one_less(self: Any, split: str = "train", **kwargs: Any) -> Any:
        outputs = parse(self, split, **kwargs)
        outputs.metadata["depth_filenames"].pop()
        return outputs

    monkeypatch.setattr(parser, "get_dataparser_outputs", with_one_less)
    assert refusal(tmp_path) == (
        f"infnerf: the train split has 7 photos but 6 depth images: give every photo one, {REMEDY}"
    )


@pytest.mark.parametrize(("index", "split", "count"), [(0, "val", 1), (5, "train", 7)])
def test_missing_depth_image(tmp_path: Path, index: int, split: str, count: int) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    path = tmp_path / f"depth/{index:03d}.png"
    path.unlink()
    assert refusal(tmp_path) == (
        f"infnerf: depth image {path} does not exist (1 of {count} missing in the {split} split): put it there, at any "
        f"resolution, {REMEDY}"
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("005.png", b"no picture", "cannot identify image file '{path}'"),
        ("005.png", None, "image file is truncated"),
        ("005.npy", b"no array", "the magic string is not correct"),
        ("005.npy", b"", "EOF: reading magic string"),
        ("005.npy", None, "its header claims 1536 bytes"),
    ],
)
def test_unreadable_depth_image(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    suffix = name[-4:]
    noise = np.random.default_rng(0).integers(1, 60000, SHAPE).astype(np.uint16)
    write_depth_capture(tmp_path, [noise] * 8, suffix)
    path = tmp_path / "depth" / name
    path.write_bytes(path.read_bytes()[:-600] if content is None else content)
    message = refusal(tmp_path)
    assert message.startswith(f"infnerf: depth image {path} cannot be read ({reason.format(path=path)}")
    assert message.endswith("): replace the file or take it out of the capture")


def test_depth_image_of_another_shape(tmp_path: Path) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    path = tmp_path / "depth/004.png"
    save(path, millimetres(4).T.copy())
    assert refusal(tmp_path) == (
        f"infnerf: depth image {path} has 24 x 32 pixels but its photo 32 x 24: it must show the same picture, "
        "at any resolution"
    )


def test_depth_image_in_colour(tmp_path: Path) -> None:
    write_depth_capture(tmp_path, [millimetres(index) for index in range(8)])
    path = tmp_path / "depth/004.png"
    save(path, photo(4))
    assert refusal(tmp_path) == (
        f"infnerf: depth image {path} holds 24 x 32 x 3 numbers: save it with one channel, 16 bit or float"
    )
    Image.fromarray(photo(4)).convert("P").save(path)
    assert f"{path} cannot be read (it is a palette image)" in refusal(tmp_path)


def test_depth_images_without_any_depth(tmp_path: Path) -> None:
    write_depth_capture(tmp_path, [np.full(SHAPE, np.nan, np.float32)] * 8, ".npy")
    assert refusal(tmp_path) == (
        f"infnerf: the depth images of the train photos ({tmp_path / 'depth/001.npy'} ...) hold no depth, only 0, NaN "
        "or infinity: correct them, or train without depth losses"
    )


def test_one_surface_is_what_it_says() -> None:
    """The constant and the rule agree: just inside is averaged, just outside is not."""
    for factor, expected in ((0.99, 1 + 0.99 * SAME_SURFACE / 2), (1.01, 1.0)):
        block = np.float32([[1, 1 + factor * SAME_SURFACE]] * 2)
        np.testing.assert_allclose(downsample_depth(block, 1), [[expected]], rtol=1e-6)
