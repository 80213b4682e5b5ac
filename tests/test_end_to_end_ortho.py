"""infnerf-ortho of a real run, packed or not, against the town itself seen from straight above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from commands import Finished, Running, Trained, run_all
from PIL import Image
from results import correlation

from infnerf_ns.data.demo_scene.photographer import Lens, Photographer
from infnerf_ns.data.demo_scene.raycaster import make_raycaster
from infnerf_ns.data.demo_scene.town import build_town
from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE

pytestmark = pytest.mark.slow
rasterio = pytest.importorskip("rasterio", reason="writes and reads GeoTIFF; pip install infnerf-ns[geo]")

HALF, GSD = 22, 0.5
"""The town's one block in metres, and pixels of half a metre."""
SIDE = round(2 * HALF / GSD)
EXTENT = ["--bounds", -HALF, -HALF, HALF, HALF, "--gsd", GSD]
ORIGIN = (500_000.0, 5_000_000.0)


@dataclass
class Town:
    """The truth, the north in the first row."""

    height: np.ndarray
    """metres [H, W]"""
    rgb: np.ndarray
    """0..1 [H, W, 3]"""


@pytest.fixture(scope="module")
def from_above() -> Town:
    town = build_town(1, 0)
    rays = make_raycaster(town.mesh.corners)
    x, y = np.meshgrid((np.arange(SIDE) + 0.5) * GSD - HALF, HALF - (np.arange(SIDE) + 0.5) * GSD)
    origins = np.stack([x, y, np.full_like(x, 100)], axis=-1).reshape(-1, 3)
    distance = rays.cast(origins, np.broadcast_to([0.0, 0.0, -1.0], origins.shape))[1]
    high = 2000.0  # from there perspective is hardly there
    photographer = Photographer(town, rays, Lens(SIDE, SIDE, SIDE * high / (2 * HALF)), 2)
    photo = photographer.photo(np.column_stack([np.eye(3), [0, 0, high]]).astype(np.float32))
    return Town(100 - distance.reshape(SIDE, SIDE), photo / 255)


@pytest.fixture(scope="module")
def maps(trained: Trained) -> Path:
    """A folder for all maps."""
    folder = trained.workplace.folder / "maps"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def said(trained: Trained, packed: Path, maps: Path) -> dict[str, Finished]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BUDGET_VARIABLE, "16")  # of no effect on the run that is not packed
        return run_all(
            {
                "ortho": ["infnerf-ortho", trained.folder, "--output", maps / "town.tif", "--heights"]
                + [maps / "dsm.tif", "--gsd", GSD, "--crs", "EPSG:32633", "--origin", *ORIGIN, "--bounds"]
                + [ORIGIN[0] - HALF, ORIGIN[1] - HALF, ORIGIN[0] + HALF, ORIGIN[1] + HALF],
                "ortho_packed": ["infnerf-ortho", packed, "--output", maps / "town.png", *EXTENT, "--tile", 32],
                "ortho_default": ["infnerf-ortho", trained.config, "--output", maps / "all.png", "--width", 50],
                "ortho_elsewhere": ["infnerf-ortho", packed, "--output", maps / "not.png", "--bounds", 900, 0, 999, 9],
                "ortho_below": ["infnerf-ortho", packed, "--output", maps / "not.png", "--top", -900],
                "ortho_turned": ["infnerf-ortho", packed, "--output", maps / "not.tif", "--up", "tree"]
                + ["--crs", "EPSG:32633"],
            },
            trained.workplace.logs,
        )


def assert_agrees(made: np.ndarray, truth: np.ndarray, seen: np.ndarray) -> None:
    """It resembles the truth where it is seen, and less so when it is mirrored, turned or moved by two metres."""

    def agreement(change: Callable[[np.ndarray], np.ndarray]) -> float:
        return correlation(change(made)[change(seen)], truth[change(seen)])

    as_it_is = agreement(lambda image: image)
    assert as_it_is > 0.75
    for axes in ((0,), (1,), (0, 1)):
        assert as_it_is > agreement(lambda image, axes=axes: np.flip(image, axes)) + 0.1, f"axes {axes} reversed"
    assert as_it_is > agreement(lambda image: image.swapaxes(0, 1)) + 0.1, "mirrored at the diagonal"
    for axis in (0, 1):
        for pixels in (-4, 4):
            moved = agreement(lambda image, by=pixels, axis=axis: np.roll(image, by, axis))
            assert as_it_is > moved + 0.1, f"moved by {pixels} along {axis}"


def test_heights_are_those_of_the_town(said: dict[str, Finished], maps: Path, from_above: Town) -> None:
    said["ortho"].succeeded()
    with rasterio.open(maps / "dsm.tif") as dataset:
        heights = dataset.read(1, masked=True)
        assert dataset.crs.to_epsg() == 32633
        assert dataset.bounds == (ORIGIN[0] - HALF, ORIGIN[1] - HALF, ORIGIN[0] + HALF, ORIGIN[1] + HALF)
    assert heights.shape == (SIDE, SIDE) and heights.mask.mean() < 0.5
    # After so few steps the ground is partly painted below the ground, or at infinity.
    assert_agrees(heights.filled(0).clip(0), from_above.height, np.full(heights.shape, True))
    roofs = from_above.height > 3
    assert np.ma.median(np.abs(heights - from_above.height)[roofs]) < 1


def test_colours_are_those_of_the_town(said: dict[str, Finished], maps: Path, from_above: Town) -> None:
    said["ortho"].succeeded()
    with rasterio.open(maps / "town.tif") as dataset:
        rgba = np.moveaxis(dataset.read(), 0, -1)
    assert_agrees(rgba[..., :3] / 255, from_above.rgb, rgba[..., 3] == 255)


def test_a_packed_run_gives_the_same_map_with_little_memory(said: dict[str, Finished], maps: Path) -> None:
    finished = said["ortho_packed"].succeeded()
    assert "drawn coarser" not in finished.err
    with rasterio.open(maps / "town.tif") as dataset:
        whole = np.moveaxis(dataset.read(), 0, -1).astype(int)
    assert np.abs(whole - np.array(Image.open(maps / "town.png"))).max() <= 1
    assert (maps / "town.pgw").read_text().splitlines()[4:] == ["-21.75", "21.75"]


def test_the_whole_content_is_shown_by_default(said: dict[str, Finished], maps: Path) -> None:
    said["ortho_default"].succeeded()
    image = np.array(Image.open(maps / "all.png"))
    step, _, _, _, x, y = map(float, (maps / "all.pgw").read_text().split())
    assert image.shape[1] == 50
    assert x < -HALF and x + 50 * step > HALF and y > HALF and y - len(image) * step < -HALF


def test_what_cannot_be_shown_is_one_line(said: dict[str, Finished], maps: Path) -> None:
    assert "--bounds 900.0 0.0 999.0 9.0: the scene lies elsewhere" in said["ortho_elsewhere"].refusal()
    assert "--top -900 is not above --bottom" in said["ortho_below"].refusal()
    assert "--crs: the capture's z axis does not point up" in said["ortho_turned"].refusal()
    assert not list(maps.glob("*not*"))


def test_a_killed_map_goes_on(trained: Trained, maps: Path) -> None:
    output, logs = maps / "killed.png", trained.workplace.logs
    command = ["infnerf-ortho", trained.folder, "--output", output, *EXTENT, "--tile", 16]
    running = Running(command, logs / "ortho_killed")
    running.wait_until(lambda: len(list(maps.glob(".killed.png.tiles/*.npz"))) >= 3)
    running.kill()
    assert not output.exists()
    other = Running([*command, "--top", 30], logs / "ortho_other").wait()
    assert "holds tiles that were made with another top: give the same options" in other.refusal()
    finished = Running(command, logs / "ortho_on").wait().succeeded()
    assert "infnerf: going on with" in finished.out
    whole = ["infnerf-ortho", trained.folder, "--output", maps / "at_once.png", *EXTENT, "--tile", 512]
    Running(whole, logs / "ortho_at_once").wait().succeeded()
    one, other = (np.array(Image.open(path)).astype(int) for path in (output, maps / "at_once.png"))
    assert np.abs(one - other).max() <= 1
    assert not list(maps.glob(".killed*"))
