"""infnerf-ortho without a run: pixels and places, tiles without seams, files, going on after an interruption, refusals.
On a real run: test_end_to_end_ortho.py."""

from __future__ import annotations

import errno
import io
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import scrambled, tiny_config, tiny_model
from tiny_packed import tiny_packed

from infnerf_ns.cli import ortho_map
from infnerf_ns.cli.ortho import Ortho
from infnerf_ns.cli.ortho_map import Map
from infnerf_ns.cli.ortho_render import TileRenderer, content_box
from infnerf_ns.cli.ortho_tiles import Tile, TileFolder
from infnerf_ns.cli.raster_files import NO_HEIGHT
from infnerf_ns.cli.raster_grid import ParallelRays, RasterGrid, Window
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import MapFrame
from infnerf_ns.sampler import ORTHOGRAPHIC_FOOTPRINT

GRID = RasterGrid(west=1000.0, north=500.0, gsd=0.25, width=70, height=45)
TURNED = MapFrame(  # east is scene y, north is scene -x
    np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]), np.array([0.1, -0.2, 0.3]), 40.0, True, (1005.0, 495.0)
)
SETTINGS = {"gsd": 0.25, "top": 1.0}


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


# -- tiles and files


class Painted:
    """Pixels that are known without a model.

    Args:
        stop_after: so many tiles, then Ctrl-C.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.windows: list[Window] = []
        self.expected: list[Window] = []
        self._stop_after = stop_after

    def __call__(self, window: Window) -> Tile:
        if len(self.windows) == self._stop_after:
            raise KeyboardInterrupt
        self.windows.append(window)
        return self.paint(window)

    def expect(self, window: Window) -> None:
        self.expected.append(window)

    @staticmethod
    def paint(window: Window) -> Tile:
        column, row = np.meshgrid(
            window.column + np.arange(window.width), window.row + np.arange(window.height), indexing="xy"
        )
        seen = (column + row) % 5 > 0
        rgb = np.stack([3 * column % 256, 7 * row % 256, (column * row) % 256, np.full_like(row, 255)], axis=-1)
        height = np.where(seen, 0.5 * column - 0.25 * row, NO_HEIGHT)
        return {"rgb": (rgb * seen[..., None]).astype(np.uint8), "height": height.astype(np.float32)}


def whole(grid: RasterGrid = GRID) -> Tile:
    return Painted.paint(Window(0, 0, grid.width, grid.height))


def png(path: Path) -> np.ndarray:
    """As it is, RGBA."""
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        return np.array(image)


def test_a_png_holds_every_pixel_and_its_world_file_says_where(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "map.png"
    Map(GRID, {"rgb": path}, tile=16).make(Painted(), TileFolder(path, SETTINGS), anew=False)
    assert np.array_equal(png(path), whole()["rgb"])
    numbers = [float(line) for line in path.with_suffix(".pgw").read_text().splitlines()]
    assert numbers == [0.25, 0.0, 0.0, -0.25, 1000.125, 499.875]
    assert sorted(file.name for file in path.parent.iterdir()) == ["map.pgw", "map.png"], "nothing is left over"


def test_gis_software_finds_the_place_of_a_png(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="reads world files; pip install infnerf-ns[geo]")
    path = tmp_path / "map.png"
    Map(GRID, {"rgb": path}, tile=16).make(Painted(), TileFolder(path, SETTINGS), anew=False)
    with rasterio.open(path) as dataset:
        assert tuple(dataset.bounds) == GRID.bounds


def test_geotiffs_hold_pixels_place_and_overviews(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="writes GeoTIFF; pip install infnerf-ns[geo]")
    grid = RasterGrid(500_000.0, 4_000_000.0, 0.5, 700, 300)
    paths = {"rgb": tmp_path / "map.tif", "height": tmp_path / "dsm.tif"}
    Map(grid, paths, crs="EPSG:32614", tile=128).make(Painted(), TileFolder(paths["rgb"], SETTINGS), anew=False)
    expected = whole(grid)
    for content, path in paths.items():
        with rasterio.open(path) as dataset:
            assert tuple(dataset.bounds) == grid.bounds and dataset.crs.to_epsg() == 32614
            assert dataset.transform * (0.5, 0.5) == (500_000.25, 3_999_999.75)
            assert dataset.profile["tiled"] and dataset.profile["compress"] == "deflate"
            assert dataset.overviews(1) == [2, 4]
            pixels = dataset.read()
            if content == "rgb":
                assert np.array_equal(np.moveaxis(pixels, 0, -1), expected["rgb"])
                assert [band.name for band in dataset.colorinterp] == ["red", "green", "blue", "alpha"]
            else:
                assert np.array_equal(pixels[0], expected["height"])
                assert dataset.nodata == NO_HEIGHT
                assert (dataset.read(1, masked=True).mask == (expected["height"] == NO_HEIGHT)).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dsm.tif", "map.tif"]


def test_a_local_frame_has_no_reference_system(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio", reason="writes GeoTIFF; pip install infnerf-ns[geo]")
    path = tmp_path / "map.tif"
    Map(GRID, {"rgb": path}).make(Painted(), TileFolder(path, SETTINGS), anew=False)
    with rasterio.open(path) as dataset:
        assert dataset.crs is None and tuple(dataset.bounds) == GRID.bounds and dataset.overviews(1) == []


def test_an_interrupted_map_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "map.png"
    plan = Map(GRID, {"rgb": path}, tile=16)
    stopped = Painted(stop_after=4)
    with pytest.raises(InputError, match="stopped; finished tiles are kept, the same command goes on"):
        plan.make(stopped, TileFolder(path, SETTINGS), anew=False)
    assert not path.exists()
    tiles = GRID.windows(16)
    rest = Painted()
    plan.make(rest, TileFolder(path, SETTINGS), anew=False)
    assert stopped.windows + rest.windows == tiles
    assert rest.expected == tiles[5:], "each tile but the first is announced"
    assert f"going on with 4 of {len(tiles)} tiles" in capsys.readouterr().out
    assert np.array_equal(png(path), whole()["rgb"])


def test_a_map_of_two_files_goes_on_when_the_second_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the first file was there already, and the same command refused to go on."""
    pytest.importorskip("rasterio", reason="writes GeoTIFF; pip install infnerf-ns[geo]")
    targets = {"rgb": tmp_path / "map.png", "height": tmp_path / "dsm.tif"}
    plan = Map(GRID, targets, tile=16)
    raster_writer = ortho_map.raster_writer

    def full(draft: Path, path: Path, content: str, *rest):  # noqa: ANN002, ANN202
        if content == "height":
            raise OSError(errno.ENOSPC, "No space left on device")
        return raster_writer(draft, path, content, *rest)

    monkeypatch.setattr(ortho_map, "raster_writer", full)
    with pytest.raises(InputError, match="No space left on device.*the same command goes on"):
        plan.make(Painted(), TileFolder(targets["rgb"], SETTINGS), anew=False)
    assert [path.name for path in tmp_path.iterdir()] == [".map.png.tiles"]
    monkeypatch.undo()
    rest = Painted()
    plan.make(rest, TileFolder(targets["rgb"], SETTINGS), anew=False)
    assert rest.windows == [] and sorted(p.name for p in tmp_path.iterdir()) == ["dsm.tif", "map.pgw", "map.png"]


def test_tiles_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    plan = Map(GRID, {"rgb": path}, tile=16)
    with pytest.raises(InputError, match="stopped"):
        plan.make(Painted(stop_after=4), TileFolder(path, SETTINGS), anew=False)
    other = {**SETTINGS, "gsd": 0.5}
    with pytest.raises(InputError, match="made with another gsd: give the same options .* or --overwrite"):
        plan.make(Painted(), TileFolder(path, other), anew=False)
    assert len(list(tmp_path.glob(".map.png.tiles/*.npz"))) == 4, "they are still there"
    anew = Painted()
    plan.make(anew, TileFolder(path, other), anew=True)
    assert anew.windows == GRID.windows(16)


def test_overwrite_goes_on_with_tiles_of_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    plan = Map(GRID, {"rgb": path}, tile=16)
    with pytest.raises(InputError, match="stopped"):
        plan.make(Painted(stop_after=4), TileFolder(path, SETTINGS), anew=True)
    rest = Painted()
    plan.make(rest, TileFolder(path, SETTINGS), anew=True)
    assert rest.windows == GRID.windows(16)[4:]


def test_damaged_tiles_are_rendered_again(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    folder = TileFolder(path, SETTINGS)
    plan = Map(GRID, {"rgb": path}, tile=16)
    with pytest.raises(InputError, match="stopped"):
        plan.make(Painted(stop_after=4), folder, anew=False)
    files = sorted(folder.path.glob("*.npz"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    files[1].write_bytes(b"")
    files[2].write_bytes(content[:60] + bytes([content[60] ^ 255]) + content[61:])
    rest = Painted()
    plan.make(rest, folder, anew=False)
    assert len(rest.windows) == len(GRID.windows(16)) - 1
    assert np.array_equal(png(path), whole()["rgb"])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses larger ones, as it does on a full disk. What is printed goes to none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["map.png", "map.tif"])
@pytest.mark.parametrize("size, tiles", [(900, "none"), (3000, "all")])
def test_a_full_disk_is_one_line_and_loses_no_tile(tmp_path: Path, name: str, size: int, tiles: str) -> None:
    if name.endswith("tif"):
        pytest.importorskip("rasterio", reason="writes GeoTIFF; pip install infnerf-ns[geo]")
    path = tmp_path / name
    plan = Map(GRID, {"rgb": path}, tile=16)
    with largest_file(size), pytest.raises(InputError, match="cannot be written .*make room") as refusal:
        plan.make(Painted(), TileFolder(path, SETTINGS), anew=False)
    assert "\n" not in str(refusal.value)
    kept = len(list(tmp_path.glob(f".{name}.tiles/*.npz")))
    assert kept == {"none": 0, "all": len(GRID.windows(16))}[tiles]
    assert [file.name for file in tmp_path.iterdir()] == [f".{name}.tiles"], "no half file is left"
    rest = Painted()
    plan.make(rest, TileFolder(path, SETTINGS), anew=False)
    assert len(rest.windows) == len(GRID.windows(16)) - kept and path.exists()


def test_a_truncated_geotiff_does_not_pass_for_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GDAL is silent about a disk that fills up as it closes a file."""
    rasterio = pytest.importorskip("rasterio", reason="writes GeoTIFF; pip install infnerf-ns[geo]")
    path = tmp_path / "map.tif"
    grid = RasterGrid(0.0, 0.0, 1.0, 700, 300)
    build = rasterio.io.DatasetWriter.build_overviews

    def and_lose_the_end(dataset, *arguments) -> None:  # noqa: ANN001
        build(dataset, *arguments)
        dataset.close()
        file = Path(dataset.name)
        with open(file, "r+b") as content:
            content.truncate(file.stat().st_size - 500)

    monkeypatch.setattr(rasterio.io.DatasetWriter, "build_overviews", and_lose_the_end)
    with pytest.raises(InputError, match="make room"):
        Map(grid, {"rgb": path}).make(Painted(), TileFolder(path, SETTINGS), anew=False)
    assert not path.exists()


def test_too_little_space_is_said_before_anything_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    monkeypatch.setattr(ortho_map.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50 << 20))
    source = Painted()
    with pytest.raises(InputError, match=r"70 x 45 pixels need up to 0\.1 GiB, but .* has 0\.0 GiB free"):
        Map(GRID, {"rgb": path}).make(source, TileFolder(path, SETTINGS), anew=False)
    assert not source.windows and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "map.png"
    with pytest.raises(InputError, match="file cannot be written"):
        Map(GRID, {"rgb": path}).make(Painted(), TileFolder(path, SETTINGS), anew=False)


# -- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": None}, "nothing to write: give --output ortho.tif"),
        ({"output": "map.jpg"}, r"--output .*map.jpg: the name must end in .tif \(GeoTIFF\) or .png"),
        ({"heights": "dsm.png"}, r"--heights .*dsm.png: the name must end in .tif \(GeoTIFF\)"),
        ({"gsd": 0.0}, "--gsd 0: the side of a pixel must be above 0"),
        ({"gsd": float("nan")}, "--gsd nan: is not a number"),
        ({"gsd": 0.1, "width": 100}, "--gsd and --width both"),
        ({"width": 0}, "--width 0"),
        ({"tile": 5000}, "--tile 5000"),
        ({"bounds": (0.0, 0.0, -1.0, 5.0)}, "--bounds 0.0 0.0 -1.0 5.0: they are xmin ymin xmax ymax"),
        ({"top": float("inf")}, "--top inf: give finite numbers"),
        ({"crs": "EPSG:32614"}, "--crs EPSG:32614: a PNG's world file has no place for it"),
        ({}, "there is no config.yml; give the folder that ns-train printed"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: dict, message: str) -> None:
    paths = {"output": "map.png", **options}
    for name in ("output", "heights"):
        if paths.get(name) is not None:
            paths[name] = tmp_path / paths[name]
    with pytest.raises(InputError, match=message):
        Ortho(tmp_path, **paths).main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "crs, message",
    [("EPSG:32614x", "--crs EPSG:32614x: .*give a code such as"), ("EPSG:4326", "4326 is not a projected system")],
)
def test_wrong_reference_systems_are_one_line(tmp_path: Path, crs: str, message: str) -> None:
    pytest.importorskip("rasterio", reason="knows reference systems; pip install infnerf-ns[geo]")
    with pytest.raises(InputError, match=message):
        Ortho(tmp_path, output=tmp_path / "map.tif", crs=crs).main()


def test_a_reference_system_needs_the_captures_coordinates(tmp_path: Path) -> None:
    """Regression: without the file, the map lay in scene units at the wrong place."""
    ortho, frame = Ortho(tmp_path, origin=(5e5, 4e6)), MapFrame(np.eye(3), np.zeros(3), 1.0, True)
    with pytest.raises(InputError, match="--origin: .* has no dataparser_transforms.json.*copy it from the run"):
        ortho._check_frame(frame, tmp_path)
    (tmp_path / "dataparser_transforms.json").write_text("{}")
    ortho._check_frame(frame, tmp_path)


def test_points_at_one_height_have_room_above_and_below() -> None:
    model = tiny_model().eval()
    rays = Ortho(Path())._rays(
        model, MapFrame(np.eye(3), np.zeros(3), 1.0, True), GRID, np.zeros(3), np.array([9, 7, 0])
    )
    assert rays.bottom < 0 < rays.top


def test_without_rasterio_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r'pip install "infnerf-ns\[geo\]" or write a .png'):
        Ortho(tmp_path, output=tmp_path / "map.tif").main()
    with pytest.raises(InputError, match=r'pip install "infnerf-ns\[geo\]"$'):
        Ortho(tmp_path, heights=tmp_path / "dsm.tif").main()


def test_older_outputs_stay(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_text("older")
    with pytest.raises(InputError, match="map.png is there already: choose another name, or give --overwrite"):
        Ortho(tmp_path, output=path).main()
    assert path.read_text() == "older"
    with pytest.raises(InputError, match="is a folder"):
        Ortho(tmp_path, output=_folder(tmp_path / "folder.png"), overwrite=True).main()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
