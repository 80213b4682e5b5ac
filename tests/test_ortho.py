"""infnerf-ortho without a run: pixels and their places, the rays through them, tiles without seams.

Its files: test_ortho_files.py; its options: test_ortho_options.py; on a real run: test_end_to_end_ortho.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import scrambled, tiny_config, tiny_model
from tiny_packed import tiny_packed

from infnerf_ns.cli.ortho import Ortho
from infnerf_ns.cli.ortho_render import TileRenderer, content_box
from infnerf_ns.cli.ortho_tiles import Tile
from infnerf_ns.cli.raster_files import NO_HEIGHT
from infnerf_ns.cli.raster_grid import ParallelRays, RasterGrid, Window
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import MapFrame
from infnerf_ns.sampler import ORTHOGRAPHIC_FOOTPRINT

GRID = RasterGrid(west=1000.0, north=500.0, gsd=0.25, width=70, height=45)
TURNED = MapFrame(  # east is scene y, north is scene -x
    np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]), np.array([0.1, -0.2, 0.3]), 40.0, True, (1005.0, 495.0)
)


# -- geometry


def test_pixels_lie_where_the_grid_says() -> None:
    center = GRID.centers(Window(0, 0, 70, 45))
    assert center.shape == (45, 70, 2)
    assert np.allclose(center[0, 0], [1000.125, 499.875]), "the first pixel is the north-western one"
    assert np.allclose(center[-1, -1], [1000 + 70 * 0.25 - 0.125, 500 - 45 * 0.25 + 0.125])
    assert np.array_equal(GRID.centers(Window(30, 20, 5, 7)), center[20:27, 30:35])
    assert GRID.bounds == (1000.0, 500 - 45 * 0.25, 1000 + 70 * 0.25, 500.0)


@pytest.mark.parametrize("snapped", [True, False])
def test_a_grid_covers_its_bounds_and_no_more(snapped: bool) -> None:
    bounds, gsd = (-3.14, 10.07, 8.0, 20.0), 0.3
    grid = RasterGrid.covering(bounds, gsd, snapped=snapped)
    west, south, east, north = grid.bounds
    slack = 1e-3 * gsd
    assert west <= bounds[0] and south <= bounds[1] + slack and east >= bounds[2] - slack and north >= bounds[3]
    assert east - bounds[2] < gsd + slack and bounds[1] - south < gsd + slack
    if snapped:
        assert np.allclose(np.array(grid.bounds) / gsd, np.rint(np.array(grid.bounds) / gsd))
    else:
        assert (west, north) == (bounds[0], bounds[3])


def test_whole_pixels_are_not_rounded_up() -> None:
    grid = RasterGrid.covering((0.1, 0.1, 0.1 + 7 * 0.1, 0.4), 0.1, snapped=False)
    assert (grid.width, grid.height) == (7, 3)


@pytest.mark.parametrize("side", [1, 16, 45, 70, 100])
def test_tiles_cover_every_pixel_once_and_follow_each_other(side: int) -> None:
    count = np.zeros((GRID.height, GRID.width), int)
    tiles = GRID.windows(side)
    for column, row, width, height in tiles:
        count[row : row + height, column : column + width] += 1
    assert (count == 1).all()
    for one, other in zip(tiles, tiles[1:]):
        assert abs(one.column - other.column) + abs(one.row - other.row) == side


def test_halves_of_a_window() -> None:
    for window in (Window(3, 4, 9, 5), Window(3, 4, 5, 9)):
        pixels = [
            {(x, y) for x in range(w.column, w.column + w.width) for y in range(w.row, w.row + w.height)}
            for w in (window, *window.halves())
        ]
        assert pixels[0] == pixels[1] | pixels[2] and not pixels[1] & pixels[2]


def test_rays_fall_straight_down_through_their_pixels() -> None:
    rays = ParallelRays(GRID, TURNED, top=12.0, bottom=-4.0, least_near=0.05)
    window = Window(10, 20, 6, 3)
    bundle = rays.bundle(window, "cpu")
    assert bundle.shape == (3, 6)
    first, last = (
        TURNED.to_map((bundle.origins + t * bundle.directions).double().numpy()) for t in (bundle.nears, bundle.fars)
    )
    assert np.allclose(first[..., :2], GRID.centers(window), atol=1e-3)
    assert np.allclose(last[..., :2], GRID.centers(window), atol=1e-3)
    assert np.allclose(first[..., 2], 12, atol=1e-3) and np.allclose(last[..., 2], -4, atol=1e-3)
    assert bool((bundle.pixel_area == 0).all())
    assert torch.allclose(bundle.metadata[ORTHOGRAPHIC_FOOTPRINT], torch.tensor(0.25 / 40 / 2))
    assert np.allclose(rays.heights(bundle.nears.numpy()), 12) and np.allclose(rays.heights(bundle.fars.numpy()), -4)


def test_rays_of_a_flat_scene_keep_the_models_near_plane() -> None:
    bundle = ParallelRays(GRID, TURNED, top=0.001, bottom=0.0, least_near=0.3).bundle(Window(0, 0, 2, 2), "cpu")
    assert bool((bundle.nears >= 0.3).all()) and bool((bundle.fars > bundle.nears).all())


# -- rendering


def of_scene(model, gsd: float, width: int, height: int, beyond: float = 0.0) -> ParallelRays:  # noqa: ANN001
    """Rays down on the middle of the tiny scene, which begin and end that far beyond it."""
    frame = MapFrame(np.eye(3), np.zeros(3), 1.0, True)
    low, high = content_box(model, frame)
    grid = RasterGrid(-width * gsd / 2, height * gsd / 2, gsd, width, height)
    return ParallelRays(grid, frame, float(high[2]) + beyond, float(low[2]) - beyond, model.sampler.near)


def picture_in_tiles(model, rays: ParallelRays, side: int) -> Tile:  # noqa: ANN001
    """The whole map, put together from its tiles."""
    render = TileRenderer(model, rays, {"rgb", "height"})
    grid = rays.grid
    whole = {"rgb": np.zeros((grid.height, grid.width, 4), np.uint8)}
    whole["height"] = np.zeros((grid.height, grid.width), np.float32)
    for window in grid.windows(side):
        render.expect(window)
        for name, tile in render(window).items():
            assert tile.dtype == whole[name].dtype
            whole[name][window.row : window.row + window.height, window.column : window.column + window.width] = tile
    return whole


def assert_same(one: Tile, other: Tile) -> None:
    """Up to rounding."""
    assert np.abs(one["rgb"].astype(int) - other["rgb"]).max() <= 1
    assert np.allclose(one["height"], other["height"], atol=1e-3)


def test_tiles_meet_without_a_seam() -> None:
    model = scrambled(tiny_model(), 0.5).eval()
    rays = of_scene(model, 0.012, 40, 30)
    whole = picture_in_tiles(model, rays, 64)
    assert whole["rgb"][..., :3].std() > 5
    hit = whole["rgb"][..., 3] == 255
    assert 0.2 < hit.mean() < 0.8 and ((whole["rgb"][..., 3] == 0) == ~hit).all()
    assert ((whole["height"] == NO_HEIGHT) == ~hit).all()
    assert ((whole["height"][hit] <= rays.top) & (whole["height"][hit] >= rays.bottom)).all()
    for side in (7, 16):
        assert_same(whole, picture_in_tiles(model, rays, side))


def test_where_nothing_is_hit_the_map_is_transparent() -> None:
    model = tiny_model().eval()
    for bank in model.field.decoders:
        bank.data.zero_()
    rays = of_scene(model, 0.01, 8, 8)
    rays = ParallelRays(rays.grid, rays.frame, rays.bottom + 1e-3, rays.bottom, rays.least_near)
    tile = TileRenderer(model, rays, {"rgb", "height"})(Window(0, 0, 8, 8))
    assert (tile["rgb"] == 0).all() and (tile["height"] == NO_HEIGHT).all()


def test_only_what_is_asked_for_is_made() -> None:
    model = scrambled(tiny_model()).eval()
    rays = of_scene(model, 0.05, 4, 4)
    assert set(TileRenderer(model, rays, {"rgb"})(Window(0, 0, 4, 4))) == {"rgb"}
    assert set(TileRenderer(model, rays, {"height"})(Window(0, 0, 4, 4))) == {"height"}


def test_a_packed_model_gives_the_same_map_within_any_budget(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    rays = of_scene(packed.model, 0.004, 200, 150, beyond=1.0)
    expected = picture_in_tiles(packed.model, rays, 256)
    assert (expected["rgb"][..., 3] == 255).all() and expected["rgb"][..., :3].std() > 3
    streamed = packed.load()
    assert_same(expected, picture_in_tiles(streamed, rays, 256))
    used = int(streamed.views.used.sum()) - 1
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + int(0.7 * used) * cache.page_bytes)
    TileRenderer(streamed, rays, {"rgb"})(Window(0, 0, 1, 1))  # after which the budget holds
    assert_same(expected, picture_in_tiles(streamed, rays, 256))
    assert cache.capacity < used, "the nodes of the map did not fit together"
    assert not streamed.views.last_frame.coarsened


def test_a_budget_too_small_for_a_few_pixels_ends_the_map(tmp_path: Path) -> None:
    """Regression: such tiles were coarser, and kept for good."""
    streamed = tiny_packed(tmp_path).load()
    rays = of_scene(streamed, 0.004, 16, 16, beyond=1.0)
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + cache.page_bytes)
    with cache.frame():
        pass
    with pytest.raises(
        InputError, match="does not hold the nodes of 16 x 16 pixels: raise INFNERF_BUDGET_MIB; finished"
    ):
        TileRenderer(streamed, rays, {"rgb"})(Window(0, 0, 16, 16))


def test_what_comes_next_is_loaded_ahead(tmp_path: Path) -> None:
    streamed = tiny_packed(tmp_path).load()
    rays = of_scene(streamed, 0.01, 32, 32)
    TileRenderer(streamed, rays, {"rgb"}).expect(Window(0, 0, 16, 16))
    cache = streamed.views.cache
    cache.settle()
    assert cache.counters.prefetched > 0
    missed = cache.counters.misses
    TileRenderer(streamed, rays, {"rgb"})(Window(0, 0, 16, 16))
    assert cache.counters.misses == missed


def test_content_is_where_the_points_are() -> None:
    frame = MapFrame(np.eye(3), np.zeros(3), 10.0, True, (100.0, 0.0))
    low, high = content_box(tiny_model(), frame)  # points fill the cube of side 1 around 0
    assert np.allclose(low, [95, -5, -5], atol=0.4) and np.allclose(high, [105, 5, 5], atol=0.4)
    no_points = tiny_model(tiny_config(sampler={"near_plane": 0.1}))
    low, high = content_box(no_points, frame)
    side = 10 * no_points.field.octree.cube.side
    assert np.allclose(high - low, side)


def test_points_at_one_height_have_room_above_and_below() -> None:
    model = tiny_model().eval()
    rays = Ortho(Path())._rays(
        model, MapFrame(np.eye(3), np.zeros(3), 1.0, True), GRID, np.zeros(3), np.array([9, 7, 0])
    )
    assert rays.bottom < 0 < rays.top
