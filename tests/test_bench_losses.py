"""infnerf-bench losses and growth, on clocks by which a step takes three seconds."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from tiny_capture import write_capture

from infnerf_ns.cli import bench_growth, bench_quality
from infnerf_ns.cli.bench_growth import Growth
from infnerf_ns.cli.bench_losses import ROWS, Losses, changes_of, method_of
from infnerf_ns.cli.bench_quality import Quality
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.errors import InputError
from infnerf_ns.objective import NAMES

DISTRICT = (0.0, -10.0, 15.0, 10.0)


@pytest.fixture(autouse=True)
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr(bench_quality, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_every_loss_has_a_row_that_can_be_trained(tmp_path: Path) -> None:
    named = {key.rpartition(".")[2] for settings in ROWS.values() for key in settings}
    assert set(NAMES) - {"proposal"} <= named, "without the proposal loss there is no training"
    write_capture(tmp_path)
    for name in ROWS:
        method = method_of("infnerf", name)
        config = Quality(tmp_path, methods=(method,))._config(method)
        assert config.pipeline.check() == [] and (method != "infnerf" or name == "preset"), name


def test_losses_are_compared_with_what_they_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_capture(tmp_path / "data")
    output = tmp_path / "losses"
    Losses(tmp_path / "data", "infnerf-small", ("sparsity", "ssim"), 0.05, pixels=50, output=output).main()
    rows = _rows(output.with_suffix(".csv"))
    names = ["preset", "sparsity", "patches", "ssim"]
    assert [(row["row"], row["seed"]) for row in rows] == [(name, seed) for seed in ("42", "43") for name in names]
    change = {name: float(changes[:, 0].mean()) for name, _, changes in changes_of(rows)}

    def mean(name: str) -> float:
        return float(np.mean([float(row["psnr_1"]) for row in rows if row["row"] == name]))

    assert change["preset"] == pytest.approx(mean("preset"))
    assert change["sparsity"] == pytest.approx(mean("sparsity") - mean("preset"))
    assert change["ssim"] == pytest.approx(mean("ssim") - mean("patches"))
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("│ preset"))
    assert "+" not in row and "-" not in row, "the preset itself"
    row = next(line for line in printed.splitlines() if line.startswith("│ ssim"))
    assert row.count("+") + row.count("-") >= sum(name.startswith("psnr_") for name in rows[0]), "changes"
    with pytest.raises(InputError, match="--rows nonsense: there are preset, without distortion"):
        Losses(tmp_path / "data", rows=("nonsense",)).main()


def test_growth_in_a_district_without_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny_town(**options: object) -> InfNeRFDemoDataParserConfig:
        small = {"num_photos": 24, "image_width": 32, "image_height": 24, "supersampling": 1}
        return InfNeRFDemoDataParserConfig(**{**options, **small}, cache_dir=tmp_path / "town")

    monkeypatch.setattr(bench_growth, "InfNeRFDemoDataParserConfig", tiny_town)
    output = tmp_path / "growth"
    Growth(size=1, district=DISTRICT, every=2, minutes=(0.05, 0.1), pixels=64, output=output).main()
    rows = _rows(output.with_suffix(".csv"))
    assert [row["method"] for row in rows] == [n for n in ("all points", "without", "without, growing") for _ in "12"]
    for row in rows:
        assert all(0 < float(row[f"psnr_1 {part}"]) < 60 for part in ("district", "elsewhere"))
    assert Image.open(output.with_suffix(".png")).size[0] > 300
    pictures = np.asarray(Image.open(output.with_name("growth-photos.png")))
    assert pictures.shape[1] > 3 * 32 and pictures.std() > 10
    assert "held-out PSNR at the end" in capsys.readouterr().out


def test_pixels_of_the_district_show_points_of_the_district(tmp_path: Path) -> None:
    config = InfNeRFDemoDataParserConfig(
        num_photos=24, image_width=64, image_height=48, supersampling=1, cache_dir=tmp_path, depth=True
    )
    outputs = config.setup().get_dataparser_outputs("test")
    points = config.setup().get_dataparser_outputs("train").metadata["points3D_xyz"]
    dataset = InputDataset(outputs)
    district = bench_growth.District(dataset, DISTRICT)
    inside = [district.inside(number, 0, (48, 64)) for number in range(len(dataset))]
    elsewhere = [district.elsewhere(number, 0, (48, 64)) for number in range(len(dataset))]
    scale = outputs.dataparser_scale
    x0, y0, x1, y1 = (bound * scale for bound in DISTRICT)
    within = (points[:, 0] > x0) & (points[:, 0] < x1) & (points[:, 1] > y0) & (points[:, 1] < y1)
    right = total = 0
    for number, (mask, other) in enumerate(zip(inside, elsewhere)):
        assert not (mask & other).any()
        pose = outputs.cameras.camera_to_worlds[number]
        local = (points - pose[:, 3]) @ pose[:, :3]
        pixel = local[:, :2] / -local[:, 2:] * outputs.cameras.fx[number] * torch.tensor([1.0, -1.0])
        pixel = (pixel + torch.stack([outputs.cameras.cx[number, 0], outputs.cameras.cy[number, 0]])).floor().long()
        shown = (local[:, 2] < 0) & (pixel >= 0).all(1) & (pixel[:, 0] < 64) & (pixel[:, 1] < 48)
        column, row = pixel[shown].unbind(1)
        right += int((torch.from_numpy(mask)[row, column] == within[shown]).sum())
        total += int(shown.sum())
    assert total > 1000 and right > 0.8 * total, "but for what is hidden"
    assert 0.01 < float(np.mean(inside)) < 0.6
    shares = np.mean(inside, axis=(1, 2))
    assert all(shares[number] >= shares.max() / 2 for number in district.shown())


def test_a_district_without_points(tmp_path: Path) -> None:
    town = {"num_photos": 24, "image_width": 32, "image_height": 24, "supersampling": 1, "cache_dir": tmp_path}
    every = InfNeRFDemoDataParserConfig(**town).setup().get_dataparser_outputs("train")
    some = InfNeRFDemoDataParserConfig(**town, pointless_district=DISTRICT).setup().get_dataparser_outputs("train")
    xyz = every.metadata["points3D_xyz"] / every.dataparser_scale
    x0, y0, x1, y1 = DISTRICT
    inside = (xyz[:, 0] >= x0) & (xyz[:, 0] <= x1) & (xyz[:, 1] >= y0) & (xyz[:, 1] <= y1)
    assert 0 < int(inside.sum()) < len(inside)
    for name in ("points3D_xyz", "points3D_rgb", "points3D_num_points2D", "points3D_track_footprint"):
        assert torch.equal(some.metadata[name], every.metadata[name][~inside]), name
    with pytest.raises(InputError, match="--pointless-district 3 0 1 2 is no rectangle"):
        InfNeRFDemoDataParserConfig(**town, pointless_district=(3, 0, 1, 2)).setup().get_dataparser_outputs("train")
