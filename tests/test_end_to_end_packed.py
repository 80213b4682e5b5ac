"""The usual commands on a packed run, with and without room for all of its nodes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trimesh
import yaml
from commands import Finished, Trained, run_all
from results import picture, share_on_surface

from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE

pytestmark = pytest.mark.slow

BUDGET_MIB = 8
"""The root and three nodes of the town's."""


@dataclass
class Ran:
    """What the commands said, and where they wrote."""

    said: dict[str, Finished]
    folder: Path


def copied(packed: Path, name: str) -> Path:
    """A packed run beside the other that a test may harm."""
    folder = packed.with_name(name)
    shutil.copytree(packed, folder)
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    config.timestamp = name
    (folder / "config.yml").write_text(yaml.dump(config))
    return folder


@pytest.fixture(scope="module")
def ran(trained: Trained, packed: Path) -> Ran:
    folder = trained.workplace.folder / "packed"
    folder.mkdir()
    harmed = copied(packed, "harmed")
    missing, *_, damaged = sorted((harmed / "pages" / "level-1").iterdir())
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    configs = {"whole": trained.config, "packed": packed / "config.yml", "harmed": harmed / "config.yml"}
    commands: dict[str, list[object]] = {
        f"eval_{name}": ["ns-eval", "--load-config", config, "--output-path", folder / f"{name}.json"]
        for name, config in configs.items()
    }
    images = ["--image-format", "png", "--split", "test", "--rendered-output-names", "rgb", "depth", "level", "node"]
    for name in ("whole", "packed"):
        out = ["--output-path", folder / f"{name}_renders", *images]
        commands[f"render_{name}"] = ["ns-render", "dataset", "--load-config", configs[name], *out]
    commands["train"] = trained.workplace.train("on", "--load-dir", packed, "--max-num-iterations", 9999)
    commands["flyin"] = ["infnerf-bench", "flyin", packed, "--budget-mib", BUDGET_MIB, "--output", folder / "flyin"]
    commands["flyin"] += ["--frames", 4, "--width", 32, "--height", 18]
    commands["flyin_whole"] = ["infnerf-bench", "flyin", trained.folder, "--output", folder / "never"]
    said = run_all(commands, trained.workplace.logs)
    small = {
        "eval_small": ["ns-eval", "--load-config", configs["packed"], "--output-path", folder / "small.json"],
        "flown": ["ns-render", "camera-path", "--load-config", configs["packed"], "--output-path", folder / "flown"],
        "wrong_budget": ["ns-eval", "--load-config", configs["packed"], "--output-path", folder / "never.json"],
    }
    small["flown"] += ["--camera-path-filename", folder / "flyin.json", "--output-format", "images"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BUDGET_VARIABLE, str(BUDGET_MIB))
        said |= run_all({name: small[name] for name in ("eval_small", "flown")}, trained.workplace.logs)
        patch.setenv(BUDGET_VARIABLE, "plenty")
        said |= run_all({"wrong_budget": small["wrong_budget"]}, trained.workplace.logs)
    return Ran(said, folder)


def metrics(ran: Ran, name: str) -> dict[str, float]:
    ran.said[f"eval_{name}"].succeeded()
    return json.loads((ran.folder / f"{name}.json").read_text())["results"]


def warnings(finished: Finished) -> list[str]:
    return [line for line in finished.err.splitlines() if line.startswith("infnerf: warning:")]


def test_a_packed_run_is_evaluated_as_the_run(ran: Ran) -> None:
    whole, packed = metrics(ran, "whole"), metrics(ran, "packed")
    for name in whole:
        if "psnr" in name or "ssim" in name:
            assert packed[name] == pytest.approx(whole[name], abs=1e-3), name
    assert whole["psnr"] > 10 and warnings(ran.said["eval_packed"]) == []


def test_a_packed_run_renders_as_the_run(ran: Ran) -> None:
    for name in ("whole", "packed"):
        ran.said[f"render_{name}"].succeeded()
    files = sorted((ran.folder / "whole_renders").rglob("*.png"))
    assert len(files) == 4 * 20
    for file in files:
        other = ran.folder / "packed_renders" / file.relative_to(ran.folder / "whole_renders")
        assert np.abs(picture(file) - picture(other)).max() < 1.5 / 255, file


def test_too_small_a_budget_is_said_and_costs_quality_only(ran: Ran) -> None:
    whole, small = metrics(ran, "whole"), metrics(ran, "small")
    # After so few steps the fine nodes know little more than their parents; that they were not there shows.
    assert 1e-3 < abs(whole["psnr_1"] - small["psnr_1"]) < 3
    assert small["psnr_1/4"] == pytest.approx(whole["psnr_1/4"], abs=1.0), "from far away the root is enough"
    (line,) = warnings(ran.said["eval_small"])
    assert f"budget of {BUDGET_MIB} MiB" in line and "drawn coarser" in line and BUDGET_VARIABLE in line


def test_a_budget_that_is_no_number_is_one_line(ran: Ran) -> None:
    assert f"{BUDGET_VARIABLE}=plenty: give the memory for nodes in MiB" in ran.said["wrong_budget"].refusal()


def test_bad_pages_are_named_and_their_parents_rendered(ran: Ran) -> None:
    whole, harmed = metrics(ran, "whole"), metrics(ran, "harmed")
    lines = warnings(ran.said["eval_harmed"])
    assert any("level-1" in line and "is missing; its parent is drawn" in line for line in lines)
    assert any("level-1" in line and "is damaged" in line for line in lines)
    assert len(lines) == 2
    assert 1e-3 < abs(whole["psnr_1"] - harmed["psnr_1"]) < 3, "two corners of the town are coarser"


def test_a_packed_run_is_not_trained_on(ran: Ran) -> None:
    line = ran.said["train"].refusal()
    assert "is packed, for rendering only: train on from the run that it was packed from" in line


def test_the_flight_stays_within_its_budget(ran: Ran) -> None:
    assert "infnerf: wrote" in ran.said["flyin"].succeeded().out
    with open(ran.folder / "flyin.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((ran.folder / "flyin").glob("*.png"))) == 4
    assert all(0 < float(row["resident_mib"]) <= float(row["peak_mib"]) <= BUDGET_MIB for row in rows)
    assert [int(row["nodes_used"]) for row in rows][0] == 1, "from orbit the root is enough"
    assert sum(float(row["read_ahead_mib"]) for row in rows) > 0, "and the next frame's nodes are loaded behind it"
    assert float(rows[0]["read_mib"]) == float(rows[-1]["read_ahead_mib"]) == 0
    assert max(int(row["nodes_used"]) for row in rows) > 1
    assert all(float(row["change_still"]) == 0 for row in rows)
    assert picture(ran.folder / "flyin.png").std() > 0.05
    assert "is not packed; make a packed one with infnerf-pack" in ran.said["flyin_whole"].refusal()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: ns-render wants it")
def test_ns_render_flies_the_same_path(ran: Ran) -> None:
    ran.said["flown"].succeeded()
    flown = sorted((ran.folder / "flown").iterdir())
    assert len(flown) == 4
    for number, file in enumerate(flown):
        assert np.abs(picture(file) - picture(ran.folder / "flyin" / f"{number:04d}.png")).mean() < 0.02


def test_exports_of_a_packed_run_need_no_more_than_the_budget(trained: Trained, packed: Path) -> None:
    attempt = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True)
    if attempt.returncode != 0:
        pytest.skip(f"ns-export needs open3d, which does not load: {attempt.stderr.strip().splitlines()[-1]}")
    folder = trained.workplace.folder / "packed_exports"
    config = ["--load-config", packed / "config.yml"]
    texture = ["--num-pixels-per-side", 64, "--target-num-faces", 300]
    points = ["--num-points", 3000, "--num-rays-per-batch", 4096]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BUDGET_VARIABLE, "16")
        said = run_all(
            {
                "packed_cloud": ["ns-export", "pointcloud", *config, "--output-dir", folder / "cloud", *points],
                "packed_tsdf": [
                    "ns-export",
                    "tsdf",
                    *config,
                    "--output-dir",
                    folder / "tsdf",
                    "--resolution",
                    32,
                    *texture,
                ],
            },
            trained.workplace.logs,
        )
    for finished in said.values():
        finished.succeeded()
    cloud = trimesh.load(folder / "cloud" / "point_cloud.ply")
    assert share_on_surface(cloud.vertices, trained) > 0.35
    assert len(trimesh.load(folder / "tsdf" / "tsdf_mesh.ply").faces) > 100
