"""infnerf-ortho's options: what cannot work is one line, and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from infnerf_ns.cli.ortho import Ortho
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import MapFrame


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


def test_without_rasterio_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(InputError, match=r'pip install "infnerf-ns\[geo\]" or write a .png'):
        Ortho(tmp_path, output=tmp_path / "map.tif").main()
    with pytest.raises(InputError, match=r'pip install "infnerf-ns\[geo\]"$'):
        Ortho(tmp_path, heights=tmp_path / "dsm.tif").main()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gsd": 1e-300}, "--gsd 1e-300: the map would have .* pixels, which is too many"),
        ({"gsd": 5e-324}, "--gsd 4.94066e-324: the map would have inf x inf pixels"),
        ({"gsd": 1e300}, r"--gsd 1e\+300: one pixel would be larger than the map, 10 x 5"),
        ({"bounds": (0.0, 0.0, 1e-12, 1e-12)}, "--bounds .*: a pixel would be .* less than the scene's numbers"),
        ({"width": 10_000_000}, "--width 10000000: the map would have"),
        ({"bounds": (-1e308, -1e308, 1e308, 1e308)}, "--bounds .* 1,000,000 times as wide as the scene"),
        ({"origin": (1e300, 0.0)}, r"--origin 1e\+300 0.0: allowed is -1e\+10 to 1e\+10"),
    ],
)
def test_maps_beyond_all_bounds_are_one_line(tmp_path: Path, options: dict, message: str) -> None:
    """Regression: ``--gsd 1e-300`` was an OverflowError, after the run had been loaded."""
    ortho = Ortho(tmp_path, output=tmp_path / "map.png", **options)
    with pytest.raises(InputError, match=message):
        ortho._check_options()
        ortho._grid(np.array([0.0, 0.0, 0.0]), np.array([10.0, 5.0, 1.0]))


@pytest.mark.parametrize("flag", ["top", "bottom"])
def test_heights_far_from_the_scene_are_one_line(tmp_path: Path, flag: str) -> None:
    ortho = Ortho(tmp_path, output=tmp_path / "map.png", **{flag: 1e300})
    low, high = np.array([0.0, 0.0, 0.0]), np.array([10.0, 5.0, 1.0])
    with pytest.raises(InputError, match=rf"--{flag} 1e\+300: that is far from the scene, whose heights are 0 to 1"):
        ortho._rays(None, None, ortho._grid(low, high), low, high)  # type: ignore[arg-type]


def test_older_outputs_stay(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_text("older")
    with pytest.raises(InputError, match="map.png is there already: choose another name, or give --overwrite"):
        Ortho(tmp_path, output=path).main()
    assert path.read_text() == "older"
    path.rename(tmp_path / "map.pgw")
    with pytest.raises(InputError, match="map.pgw is there already: choose another name, or give --overwrite"):
        Ortho(tmp_path, output=path).main()
    assert (tmp_path / "map.pgw").read_text() == "older"
    with pytest.raises(InputError, match="map.pgw is a file, nothing can be put into it"):
        Ortho(tmp_path, output=tmp_path / "map.pgw" / "map.png").main()
    with pytest.raises(InputError, match="is a folder"):
        Ortho(tmp_path, output=_folder(tmp_path / "folder.png"), overwrite=True).main()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
