"""infnerf-ortho's tiles and files: what they hold, going on after an interruption, full disks, damage."""

from __future__ import annotations

import errno
import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_ortho import GRID

from infnerf_ns.cli import ortho_map
from infnerf_ns.cli.ortho_map import Map
from infnerf_ns.cli.ortho_tiles import Tile, TileFolder
from infnerf_ns.cli.raster_files import NO_HEIGHT
from infnerf_ns.cli.raster_grid import RasterGrid, Window
from infnerf_ns.errors import InputError
from infnerf_ns.training import stopping

SETTINGS = {"gsd": 0.25, "top": 1.0}


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
            assert stopping._kept == ["finished tiles are kept, the same command goes on with them"]
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
    with pytest.raises(KeyboardInterrupt):
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
    with pytest.raises(KeyboardInterrupt):
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
    with pytest.raises(KeyboardInterrupt):
        plan.make(Painted(stop_after=4), TileFolder(path, SETTINGS), anew=True)
    rest = Painted()
    plan.make(rest, TileFolder(path, SETTINGS), anew=True)
    assert rest.windows == GRID.windows(16)[4:]


def test_damaged_tiles_are_rendered_again(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    folder = TileFolder(path, SETTINGS)
    plan = Map(GRID, {"rgb": path}, tile=16)
    with pytest.raises(KeyboardInterrupt):
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


@pytest.mark.parametrize(
    ("disks", "first_free", "second_free", "fits"),
    [("ab", 83, 72, True), ("ab", 81, 72, False), ("ab", 83, 70, False), ("aa", 91, 91, True), ("aa", 89, 89, False)],
)
def test_every_disk_is_asked_for_its_own_share(
    disks: str, first_free: int, second_free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1.4 million pixels the tiles take 11 MiB, each file 7.3 MiB; 64 MiB are to be spared on every disk."""
    first, second = tmp_path / "a" / "map.png", tmp_path / "b" / "heights.tif"
    free = {first.parent: first_free, second.parent: second_free}
    monkeypatch.setattr(ortho_map, "_disk", lambda folder: disks[folder == second.parent])
    monkeypatch.setattr(ortho_map.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder] << 20))
    grid = RasterGrid(0.0, 0.0, 1.0, 1200, 1200)
    source = Painted(stop_after=0)
    with pytest.raises(KeyboardInterrupt if fits else InputError, match="" if fits else "make room"):
        Map(grid, {"rgb": first, "height": second}).make(source, TileFolder(first, SETTINGS), anew=False)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "map.png"
    with pytest.raises(InputError, match="file cannot be written"):
        Map(GRID, {"rgb": path}).make(Painted(), TileFolder(path, SETTINGS), anew=False)
