"""infnerf-bench growth: a district without points, and which pixels show it."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from PIL import Image

from infnerf_ns.cli import bench_growth, bench_quality
from infnerf_ns.cli.bench_district import District, DistrictPixels
from infnerf_ns.cli.bench_growth import Growth, without_points
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.depth import read_depth
from infnerf_ns.errors import InputError

TOWN = {"num_photos": 24, "image_width": 64, "image_height": 48, "supersampling": 1}
BOUNDS = (0.4, 0.5, 0.8, 0.9)


def _outputs(tmp_path: Path, split: str, **options: object) -> DataparserOutputs:
    config = InfNeRFDemoDataParserConfig(**TOWN, cache_dir=tmp_path, **options)
    return config.setup().get_dataparser_outputs(split)


def test_a_district_in_the_root_cube() -> None:
    points = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 100.0, 10.0])
    district = District(points, (0.5, 0.25, 1.0, 0.75))
    expected = (points[:, 0] > 50) & (points[:, 0] < 101.5) & (points[:, 1] > 25) & (points[:, 1] < 75)
    assert (district.holds(points) == expected).float().mean() > 0.97
    assert district.holds(torch.tensor([75.0, 50.0, 300.0])), "any height"


def test_points_of_a_district_are_left_out(tmp_path: Path) -> None:
    config = InfNeRFDemoDataParserConfig(**TOWN, cache_dir=tmp_path)
    every = config.setup().get_dataparser_outputs("train").metadata
    district = District(every["points3D_xyz"], BOUNDS)
    some = without_points(config, district).setup().get_dataparser_outputs("train").metadata
    inside = district.holds(every["points3D_xyz"])
    assert 100 < int(inside.sum()) < len(inside) - 100
    for name in ("points3D_xyz", "points3D_rgb", "points3D_num_points2D", "points3D_track_footprint"):
        assert torch.equal(some[name], every[name][~inside]), name
    again = config.setup().get_dataparser_outputs("train").metadata
    assert len(again["points3D_xyz"]) == len(inside), "the config that was given is as it was"


def test_pixels_that_show_a_district(tmp_path: Path) -> None:
    """Against the town's exact depth."""
    outputs = _outputs(tmp_path, "train", depth=True)
    points = outputs.metadata["points3D_xyz"]
    district = District(points, BOUNDS)
    pixels = DistrictPixels(outputs.cameras, points, district)
    right, told, surfaces, share = 0, 0, 0, []
    for number in range(len(outputs.cameras)):
        rays = outputs.cameras[number : number + 1].generate_rays(camera_indices=0, keep_shape=True)
        depth = torch.from_numpy(read_depth(outputs.metadata["depth_filenames"][number], 48, 64))
        along = depth[..., None] * outputs.dataparser_scale * rays.metadata["directions_norm"]
        truth = district.holds(rays.origins + rays.directions * along).numpy()
        hit = depth.numpy() > 0
        inside, elsewhere = (of(number, 0, (48, 64)) for of in (pixels.inside, pixels.elsewhere))
        assert not (inside & elsewhere).any()
        right += int((hit & ((inside & truth) | (elsewhere & ~truth))).sum())
        told += int((hit & (inside | elsewhere)).sum())
        surfaces += int(hit.sum())
        share.append(float(inside.mean()))
    assert right > 0.93 * told and told > 0.8 * surfaces
    assert 0.02 < np.mean(share) < 0.6
    assert all(share[number] >= max(share) / 2 for number in pixels.shown())
    half = pixels.inside(0, 1, (24, 32))
    assert half.shape == (24, 32) and half.mean() == pytest.approx(share[0], abs=0.05)


def test_a_photo_that_shows_no_point_counts_nowhere() -> None:
    points = torch.rand(100, 3)
    camera = Cameras(
        torch.eye(4)[None, :3] + torch.tensor([[[0.0, 0, 0, 0]] * 2 + [[0.0, 0, 0, -5.0]]]),
        40.0,
        40.0,
        32.0,
        24.0,
        64,
        48,
    )
    pixels = DistrictPixels(camera, points, District(points, BOUNDS))
    assert not pixels.inside(0, 0, (48, 64)).any() and not pixels.elsewhere(0, 0, (48, 64)).any()


def test_three_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr(bench_quality, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    def tiny_town(**options: object) -> InfNeRFDemoDataParserConfig:
        return InfNeRFDemoDataParserConfig(
            **{**TOWN, "image_width": 32, "image_height": 24, **options}, cache_dir=tmp_path
        )

    monkeypatch.setattr(bench_growth, "InfNeRFDemoDataParserConfig", tiny_town)
    output = tmp_path / "growth"
    preset = ":".join(
        ["infnerf-small", "pipeline.model.growth.start_step=2", "pipeline.model.growth.min_rays=0.01"]
        + ["pipeline.model.growth.prune_rays=0.001", "pipeline.model.octree.level_start_steps=0"]
        + ["pipeline.model.growth.end_share=1", "pipeline.model.octree.node_resolution=32"]
        + ["pipeline.model.field.base_resolution=8", "pipeline.model.growth.every=3"]
    )
    Growth(district=BOUNDS, preset=preset, every=2, minutes=(0.2, 0.4), pixels=64, output=output).main()
    with open(output.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [n for n in ("all points", "without", "without, growing") for _ in "12"]
    for row in rows:
        assert all(0 < float(row[f"psnr_1 {part}"]) < 60 for part in ("district", "elsewhere"))
        assert (int(row["births"]) > 0) == (row["method"] == "without, growing"), "also where the preset grows"
    assert int(rows[0]["nodes"]) > int(rows[2]["nodes"]), "a tree of all points, and one without those of the district"
    assert Image.open(output.with_suffix(".png")).size[0] > 300
    assert np.asarray(Image.open(output.with_name("growth-photos.png"))).shape[1] > 3 * 32
    assert "held-out PSNR at the end" in capsys.readouterr().out


def test_photos_beside_their_renders_in_one_picture(tmp_path: Path) -> None:
    """A column per training, whatever the photos' sizes."""
    images = {
        name: [torch.full((240, 320, 3), value), torch.full((320, 240, 3), value)]
        for name, value in (("photo", 0.2), ("all points", 0.4), ("without", 0.6))
    }
    bench_growth._draw(images, tmp_path / "photos.png")
    picture = np.asarray(Image.open(tmp_path / "photos.png"))
    colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    for value in (51, 102, 153):
        assert counts[(colors == value).all(axis=1)].sum() > 0.15 * picture.shape[0] * picture.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"district": (2.0, 2.0, 3.0, 3.0)}, "--district 2 2 3 3: no point lies there"),
        ({"district": (-9.0, -9.0, 9.0, 9.0)}, "--district -9 -9 9 9: is the whole scene"),
        ({"every": 0}, "--every 0: give at least 1"),
        ({"preset": "root"}, "--preset root: there are infnerf"),
        ({"minutes": (2.0, 1.0)}, "--minutes"),
        ({"data": Path("nowhere")}, "--data nowhere: there is neither"),
    ],
)
def test_wrong_options_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    def tiny_town(**settings: object) -> InfNeRFDemoDataParserConfig:
        return InfNeRFDemoDataParserConfig(**{**TOWN, **settings}, cache_dir=tmp_path)

    monkeypatch.setattr(bench_growth, "InfNeRFDemoDataParserConfig", tiny_town)
    monkeypatch.setattr(bench_quality.Quality, "_train", lambda *_: pytest.fail("nothing may be trained"))
    with pytest.raises(InputError, match=message):
        Growth(**{"output": tmp_path / "growth", **options}).main()
