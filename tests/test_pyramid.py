"""Pixel pyramids: exact block means, masks, uniform draws; and the rays through their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.model_components.ray_generators import RayGenerator
from tiny_capture import ring

from infnerf_ns.data.photo_order import hilbert_index, neighbour_order
from infnerf_ns.data.pyramid import PixelPyramid, downsample, downsample_mask, level_mean, num_levels
from infnerf_ns.data.pyramid_rays import PyramidRays

SIDE = st.integers(8, 70)
SEED = st.integers(0, 2**31)


def block_mean(image: np.ndarray, level: int) -> np.ndarray:
    size = 1 << level
    height, width = image.shape[0] // size, image.shape[1] // size
    cropped = image[: height * size, : width * size].astype(np.float64)
    return cropped.reshape(height, size, width, size, -1).mean(axis=(1, 3))


def make_pyramid(sizes: list[tuple[int, int]], masks: bool = False, levels: int = 5) -> PixelPyramid:
    """Random photos; masks hide the left third."""
    rng = np.random.default_rng(3)
    pyramid = PixelPyramid(sizes, 3, levels, masks)
    for index, (height, width) in enumerate(sizes):
        mask = np.ones((height, width), dtype=bool)
        mask[:, : width // 3] = False
        pyramid.set_photo(index, rng.integers(0, 256, (height, width, 3), dtype=np.uint8), mask if masks else None)
    return pyramid


@settings(max_examples=40)
@given(SIDE, SIDE, st.integers(0, 4), SEED)
def test_downsample_is_the_block_mean(height: int, width: int, level: int, seed: int) -> None:
    level = min(level, num_levels(height, width, 5) - 1)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = block_mean(image, level)
    found = downsample(image, level)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, expected, atol=0.5 + 1e-3)
    exact = level_mean(torch.from_numpy(image).float(), level)
    np.testing.assert_allclose(exact.numpy(), expected, atol=1e-3)


@given(st.integers(0, 255), st.sampled_from([3, 4]))
def test_constant_image_stays_constant(value: int, channels: int) -> None:
    image = np.full((45, 70, channels), value, dtype=np.uint8)
    image[..., 3:] = 200
    for level in range(num_levels(45, 70, 5)):
        assert np.unique(downsample(image, level)[..., :3]).tolist() == [value]


def test_alpha_weights_the_colours() -> None:
    """A transparent pixel has no colour of its own: compositing the mean is the mean of the composited photo."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    background = np.array([255.0, 0.0, 90.0])

    def composite(rgba: np.ndarray) -> np.ndarray:
        alpha = rgba[..., 3:] / 255.0
        return rgba[..., :3] * alpha + background * (1 - alpha)

    expected = block_mean(composite(image.astype(np.float64)), 1)
    np.testing.assert_allclose(composite(downsample(image, 1).astype(np.float64)), expected, atol=1.5)
    exact = level_mean(torch.from_numpy(image).double(), 1).numpy()
    np.testing.assert_allclose(composite(exact), expected, atol=1e-6)
    assert not downsample(np.zeros((16, 16, 4), dtype=np.uint8), 1).any()


@settings(max_examples=40)
@given(SIDE, SIDE, st.integers(0, 4), SEED)
def test_mask_needs_all_pixels_of_a_block(height: int, width: int, level: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.9
    found = downsample_mask(mask, level)
    assert found.shape == (height >> level, width >> level)
    for row, column in np.ndindex(*found.shape):
        block = mask[row << level : (row + 1) << level, column << level : (column + 1) << level]
        assert found[row, column] == block.all()


def test_number_of_levels() -> None:
    assert [num_levels(1920, 1080, 5), num_levels(32, 24, 5), num_levels(16, 300, 5), num_levels(5, 5, 5)] == [
        5,
        2,
        2,
        1,
    ]
    assert num_levels(1920, 1080, 1) == 1


def test_levels_stand_in_the_buffer() -> None:
    pyramid = make_pyramid([(40, 50), (33, 20)])
    image = np.random.default_rng(5).integers(0, 256, (33, 20, 3), dtype=np.uint8)
    pyramid.set_photo(1, image)
    for segment in range(len(pyramid.photo)):
        if pyramid.photo[segment] == 1:
            start, level = int(pyramid.start[segment]), int(pyramid.level[segment])
            expected = downsample(image, level).reshape(-1, 3)
            assert np.array_equal(pyramid.pixels[start : start + len(expected)], expected)
    draw = pyramid.draw(500)
    chosen = (draw.photo == 1) & (draw.level == 1)
    assert np.array_equal(draw.image[chosen], downsample(image, 1)[draw.row[chosen], draw.column[chosen]])


@pytest.mark.parametrize("masks", [False, True])
def test_draws_are_uniform_over_all_valid_pixels(masks: bool) -> None:
    """Chi-square of the counts per pixel: mean k, standard deviation sqrt(2 k) for k + 1 valid pixels."""
    pyramid = make_pyramid([(32, 40), (24, 16)], masks)
    valid = torch.ones(pyramid.num_pixels, dtype=torch.bool) if pyramid.valid is None else pyramid.valid
    draw = pyramid.draw(40 * pyramid.num_pixels)
    counts = (pyramid.start[draw.segment] + draw.local).bincount(minlength=pyramid.num_pixels).double()
    assert counts[~valid].sum() == 0
    expected = counts.sum() / valid.sum()
    chi_square = ((counts[valid] - expected) ** 2 / expected).sum()
    freedom = int(valid.sum()) - 1
    assert abs(float(chi_square) - freedom) < 5 * (2 * freedom) ** 0.5


def test_seed_reproduces_the_draw() -> None:
    pyramid = make_pyramid([(32, 40)], masks=True)
    draws = [pyramid.draw(64, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(draws[0].local, draws[1].local) and torch.equal(draws[0].segment, draws[1].segment)
    torch.manual_seed(9)
    first = pyramid.draw(64)
    torch.manual_seed(9)
    assert torch.equal(first.local, pyramid.draw(64).local)


@pytest.mark.parametrize("masks", [False, True])
def test_patches_lie_within_one_level(masks: bool) -> None:
    pyramid = make_pyramid([(32, 40), (24, 30)], masks)
    draw = pyramid.draw(100 * 36 + 5, patch_size=6)
    assert len(draw.photo) == 100 * 36
    segment, row, column = (value.reshape(100, 6, 6) for value in (draw.segment, draw.row, draw.column))
    assert (segment == segment[:, :1, :1]).all()
    assert (row - row[:, :1, :1] == torch.arange(6)[:, None]).all()
    assert (column - column[:, :1, :1] == torch.arange(6)).all()
    assert set(pyramid.level[segment[:, 0, 0]].tolist()) == {0, 1, 2}
    if pyramid.valid is not None:
        assert pyramid.valid[pyramid.start[draw.segment] + draw.local].all()


@pytest.mark.parametrize("photos", [0, 2])
@pytest.mark.parametrize(("share", "patches"), [(0.5, 5), (0.34, 3), (0.01, 1), (0.0, 0), (0.99, 10), (1.0, 10)])
def test_patches_come_first_and_have_their_share(share: float, patches: int, photos: int) -> None:
    """Of 370 pixels, ten patches of 36 at most; with share 1 what is left over is not drawn."""
    pyramid = make_pyramid([(32, 40)] * 4, masks=True)
    draw = pyramid.draw(370, patch_size=6, photos=photos, patch_share=share)
    assert draw.patch_rays == patches * 36 and len(draw.photo) == (360 if share == 1 else 370)
    segment, row, column = (value[: patches * 36].reshape(-1, 6, 6) for value in (draw.segment, draw.row, draw.column))
    assert (segment == segment[:, :1, :1]).all()
    assert (row - row[:, :1, :1] == torch.arange(6)[:, None]).all()
    assert (column - column[:, :1, :1] == torch.arange(6)).all()
    assert pyramid.valid[pyramid.start[draw.segment] + draw.local].all()
    assert torch.equal(pyramid.pixels[pyramid.start[draw.segment] + draw.local], draw.image)
    if share < 0.9:  # single pixels, not patches
        assert (draw.row[patches * 36 :].diff() == 0).float().mean() < 0.5
    if photos:  # patches and single pixels come from the same neighbours
        assert set(draw.photo.tolist()) in [{first, (first + 1) % 4} for first in range(4)]


def test_without_patches_there_are_no_patch_rays() -> None:
    assert make_pyramid([(32, 40)]).draw(50).patch_rays == 0
    draw = make_pyramid([(32, 40)]).draw(50, patch_size=8, patch_share=0.5)
    assert draw.patch_rays == 64 == len(draw.photo), "one patch, though it is larger than what was asked for"


def test_level_share_holds_for_single_patches() -> None:
    """Regression: 0.4 of one patch was rounded to none, so that patches never came from the coarse levels."""
    pyramid = PixelPyramid([(64, 64)], 3, 2, level_share=0.4)
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([int(pyramid.draw(16, 4, generator).level[0]) for _ in range(2000)])
    share, corners = 0.4, torch.tensor([61.0**2, 29.0**2])  # places where a patch fits, at the two levels
    places = corners / torch.tensor([64.0**2, 32.0**2])
    expected = share * places[1] / places.sum() + (1 - share) * corners[1] / corners.sum()
    assert abs(float((levels == 1).float().mean()) - float(expected)) < 0.04


def test_no_room_for_a_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no 50 x 50 patch"):
        make_pyramid([(32, 40)]).draw(2500, patch_size=50)


def make_cameras(camera_type: CameraType, sizes: list[tuple[int, int]], distorted: bool = True) -> Cameras:
    count = len(sizes)
    height, width = torch.tensor(sizes).T
    params = torch.tensor([0.06, -0.08, 0.0, 0.0, -0.001, 0.0002])
    focal = width.float() / (2 if camera_type == CameraType.EQUIRECTANGULAR else 0.8)
    return Cameras(
        camera_to_worlds=torch.tensor(np.stack(ring(count))[:, :3], dtype=torch.float32),
        fx=focal,
        fy=focal * (1 if camera_type == CameraType.EQUIRECTANGULAR else 1.01),
        cx=width / 2 + 0.3,
        cy=height / 2 - 0.2,
        width=width,
        height=height,
        distortion_params=params.repeat(count, 1) if distorted else None,
        camera_type=camera_type,
        times=torch.arange(float(count)),
    )


@pytest.mark.parametrize("camera_type", [CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.EQUIRECTANGULAR])
@pytest.mark.parametrize("sizes", [[(48, 64)] * 4, [(48, 64), (48, 64), (40, 36)]])
def test_rays_are_those_of_nerfstudio(camera_type: CameraType, sizes: list[tuple[int, int]]) -> None:
    """Per level: the rays of nerfstudio's RayGenerator for the photo's camera at that resolution."""
    cameras = make_cameras(camera_type, sizes)
    pyramid = make_pyramid(sizes)
    tables = PyramidRays(cameras, pyramid)
    assert tables.table is not None and PyramidRays(cameras, pyramid, table_bytes=0).table is None
    draw = pyramid.draw(400)
    for rays in (tables(draw), PyramidRays(cameras, pyramid, table_bytes=0)(draw)):
        assert torch.equal(rays.camera_indices, draw.photo[:, None])
        assert rays.nears is None and rays.fars is None
        torch.testing.assert_close(rays.times, draw.photo[:, None].float())
        for level in range(2):
            scaled = make_cameras(camera_type, sizes)
            scaled.rescale_output_resolution(0.5**level)
            at = draw.level == level
            expected = RayGenerator(scaled)(torch.stack([draw.photo, draw.row, draw.column], dim=-1)[at])
            torch.testing.assert_close(rays.origins[at], expected.origins)
            torch.testing.assert_close(rays.directions[at], expected.directions, atol=1e-6, rtol=0)
            torch.testing.assert_close(rays.pixel_area[at], expected.pixel_area, atol=1e-7, rtol=1e-3)
            torch.testing.assert_close(rays.metadata["directions_norm"][at], expected.metadata["directions_norm"])


def test_equal_intrinsics_share_the_table() -> None:
    shared = PyramidRays(make_cameras(CameraType.PERSPECTIVE, [(48, 64)] * 5), make_pyramid([(48, 64)] * 5))
    single = make_pyramid([(48, 64)])
    assert len(shared.table) == single.num_pixels


def test_orthographic_cameras_go_through_nerfstudio() -> None:
    cameras = make_cameras(CameraType.ORTHOPHOTO, [(48, 64)] * 2, distorted=False)
    pyramid = make_pyramid([(48, 64)] * 2)
    rays = PyramidRays(cameras, pyramid)
    assert rays.table is None
    assert len(torch.unique(rays(pyramid.draw(50)).origins, dim=0)) > 2


def test_a_level_sees_the_centres_and_areas_of_its_blocks() -> None:
    """The ray of a level-l pixel passes through the centre of its block; its pixel covers 4**l pixels of the photo."""
    sizes = [(64, 96)]
    cameras = make_cameras(CameraType.PERSPECTIVE, sizes, distorted=False)
    pyramid = make_pyramid(sizes)
    rays = PyramidRays(cameras, pyramid)
    draw = pyramid.draw(500)
    drawn = rays(draw)
    scale = 2**draw.level
    center = torch.stack([(draw.row + 0.5) * scale, (draw.column + 0.5) * scale], dim=-1)
    full = cameras.generate_rays(torch.zeros(500, 1, dtype=torch.int64), coords=center)
    torch.testing.assert_close(drawn.directions, full.directions, atol=1e-6, rtol=0)
    ratio = drawn.pixel_area[:, 0] / full.pixel_area[:, 0]
    torch.testing.assert_close(ratio, 4.0**draw.level, rtol=0.15, atol=0)
    assert len(draw.level.unique()) == 4


def test_level_share_counts_valid_pixels() -> None:
    """Scattered masked pixels empty the coarse levels, whose blocks must be valid as a whole."""
    pyramid = PixelPyramid([(64, 64), (64, 64)], 3, 4, masked=True, level_share=1.0)
    generator = np.random.default_rng(0)
    for index in range(2):
        pyramid.set_photo(index, np.zeros((64, 64, 3), np.uint8), generator.random((64, 64)) > 0.02 * (1 + index))
    draw = pyramid.draw(40_000, generator=torch.Generator().manual_seed(0))
    flat = pyramid.start[draw.segment] + draw.local
    assert bool(pyramid.valid[flat].all())
    counts = draw.level.bincount() / 40_000
    torch.testing.assert_close(counts, torch.full((4,), 0.25), atol=0.01, rtol=0)
    for level in range(4):
        valid = [int(pyramid.valid[s : s + n].sum()) for s, n in _segments_of_level(pyramid, level)]
        share = float((draw.photo[draw.level == level] == 0).float().mean())
        assert abs(share - valid[0] / sum(valid)) < 0.02, "alike within a level"


def _segments_of_level(pyramid: PixelPyramid, level: int) -> list[tuple[int, int]]:
    at = (pyramid.level == level).nonzero()[:, 0]
    return [(int(pyramid.start[s]), int(pyramid.height[s] * pyramid.width[s])) for s in at]


@pytest.mark.parametrize("level_share", [0.0, 0.5])
def test_a_few_valid_pixels_are_found(level_share: float) -> None:
    """Regression: 60 x 60 valid pixels of 1000 x 1000 ended in "no valid pixels found"."""
    pyramid = PixelPyramid([(1000, 1000)], 3, 3, masked=True, level_share=level_share)
    mask = np.zeros((1000, 1000), dtype=bool)
    mask[400:404, 300:304] = True
    pyramid.set_photo(0, np.zeros((1000, 1000, 3), np.uint8), mask)
    draw = pyramid.draw(2000, generator=torch.Generator().manual_seed(0))
    assert len(draw.row) == 2000 and bool(
        (draw.row << draw.level >= 400).all() and (draw.row << draw.level < 404).all()
    )


def test_level_share_gives_every_level_the_same_chance() -> None:
    """With share 1 the levels are drawn alike; with share 1/2, half of the rays are."""
    for share in (1.0, 0.5):
        pyramid = PixelPyramid([(64, 96)], 3, 4, level_share=share)
        count = torch.bincount(pyramid.draw(40_000, generator=torch.Generator().manual_seed(0)).level, minlength=4)
        pixels = (pyramid.height * pyramid.width).double()
        expected = 40_000 * (share / 4 + (1 - share) * pixels / pixels.sum())
        assert (count - expected).abs().max() < 5 * expected.sqrt().max()


def test_neighbours_follow_each_other() -> None:
    """A Hilbert curve visits every cell once, and moves to an adjacent one each time."""
    cells = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    index = hilbert_index(cells, bits=4)
    assert np.array_equal(np.sort(index), np.arange(16**3))
    assert np.abs(np.diff(cells[np.argsort(index)], axis=0)).sum(axis=1).tolist() == [1] * (16**3 - 1)
    poses = torch.eye(4)[:3].repeat(400, 1, 1)
    poses[:, :3, 3] = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([90.0, 60.0, 9.0])
    cameras = Cameras(poses, fx=50.0, fy=50.0, cx=32.0, cy=24.0, width=64, height=48)
    order = neighbour_order(cameras)
    assert sorted(order) == list(range(400))
    flown = (poses[order, :, 3].diff(dim=0)).norm(dim=-1).mean()
    assert flown < 8, "an order by chance has 40"
    cameras.camera_to_worlds[:, :3, 3] = 1.0
    assert sorted(neighbour_order(cameras)) == list(range(400)), "all at one place"


@pytest.mark.parametrize("level_share", [0.0, 0.4])
@pytest.mark.parametrize("masked", ["no", "partly", "mostly"])
def test_draws_from_neighbouring_photos(masked: str, level_share: float) -> None:
    """All pixels of a draw lie in photos that follow each other on the ring; over many draws photos and levels are
    drawn as without neighbours."""
    order, photos = [3, 1, 2, 0, 9, 8, 7, 6, 5, 4], 3
    pyramid = PixelPyramid([(64, 64)] * 10, 3, 3, masked != "no", level_share, order)
    rng, mask = np.random.default_rng(0), np.zeros((64, 64), bool)
    mask[:, 32:] = masked == "partly"
    mask[16:20, 8:12] = masked == "mostly"
    images = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in order]
    for photo, image in enumerate(images):
        pyramid.set_photo(photo, image, None if masked == "no" else mask)
    generator = torch.Generator().manual_seed(0)
    counts, levels = torch.zeros(10), torch.zeros(3)
    for _ in range(600):
        draw = pyramid.draw(64, generator=generator, photos=photos)
        place = torch.tensor([order.index(int(photo)) for photo in draw.photo])
        assert any(set((place - first).remainder(10).tolist()) <= set(range(photos)) for first in range(10))
        counts += draw.photo.bincount(minlength=10)
        levels += draw.level.bincount(minlength=3)
        photo, level, row, column = (int(each[0]) for each in (draw.photo, draw.level, draw.row, draw.column))
        assert draw.image[0].tolist() == downsample(images[photo], level)[row, column].tolist()
        if masked != "no":
            assert bool(pyramid.valid[pyramid.start[draw.segment] + draw.local].all())
    # 600 intervals, each photo in three tenths of them: a standard deviation of 6 % of its share
    assert ((counts / counts.sum() - 0.1).abs() < 0.025).all()
    everywhere = pyramid.draw(600 * 64, generator=generator).level.bincount(minlength=3)
    torch.testing.assert_close(levels / levels.sum(), everywhere / everywhere.sum(), atol=0.01, rtol=0)
