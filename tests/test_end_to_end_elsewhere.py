"""Runs are looked at from other folders, without their photos, moved, copied to another machine; real commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import Finished, Running, run_all
from results import picture
from tiny_capture import write_capture

from infnerf_ns.data.capture.record import RECORD, CaptureRecord

pytestmark = pytest.mark.slow

PORT = 7993


@dataclass
class Moved:
    """What the commands said of runs whose capture is gone; ``place`` is where they stood."""

    said: dict[str, Finished]
    place: Path
    here: Path
    packed: Path


def train(capture: object, out: object, *flags: object) -> list[object]:
    """A training of a few steps on 14 photos of noise."""
    settings = ["--vis", "tensorboard", "--timestamp", "run", "--max-num-iterations", 20, "--steps-per-eval-image", 0]
    settings += ["--pipeline.datamanager.train-num-rays-per-batch", 64, "--pipeline.model.octree.max-level", 1]
    settings += ["--pipeline.model.octree.level-start-steps", 5]
    parser = ["nerfstudio-data", "--eval-mode", "interval", "--eval-interval", 7]
    return ["ns-train", "infnerf-small", "--data", capture, "--output-dir", out, *settings, *flags, *parser]


def render(config: Path, out: Path) -> list[object]:
    kinds = ["--output-format", "images", "--interpolation-steps", 2, "--rendered-output-names", "rgb"]
    return ["ns-render", "interpolate", "--load-config", config, "--output-path", out, *kinds]


def rewrite(run: Path, *flags: object) -> list[object]:
    return ["infnerf-config", run, *flags]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    place = tmp_path_factory.mktemp("elsewhere")
    write_capture(place / "cap", count=14)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "cap")
        said = run_all({"train": train(".", "../out")}, place / "logs")
        said["train"].succeeded()
        patch.chdir("/")
        run = place / "out" / "cap" / "infnerf-small" / "run"
        config = run / "config.yml"
        said |= run_all(
            {
                "eval": ["ns-eval", "--load-config", config, "--output-path", place / "eval.json"],
                "render": render(config, place / "render"),
            },
            place / "logs",
        )
        (place / "cap").rename(place / "gone")
        write_capture(place / "more", count=16)
        said |= run_all(
            {
                "photoless_eval": ["ns-eval", "--load-config", config, "--output-path", place / "never.json"],
                "photoless_render": render(config, place / "photoless"),
                "photoless_inspect": ["infnerf-inspect", run, "--photo", 1],
                "photoless_map": ["infnerf-ortho", run, "--output", place / "map.png", "--width", 24],
                "photoless_picture": ["infnerf-picture", "--load-config", config, "--output", place / "never.png"],
                "pack": ["infnerf-pack", run],
                "train_on": train(place / "more", place / "on", "--load-dir", run, "--max-num-iterations", 40),
            },
            place / "logs",
        )
        here, packed = place / "another machine" / "r", place / "p"
        here.parent.mkdir()
        shutil.copytree(run, here)
        shutil.copytree(run.with_name("run-packed"), packed)
        shutil.rmtree(place / "out")
        said |= run_all(
            {
                "copied_render": render(here / "config.yml", place / "never"),
                "packed_map": ["infnerf-ortho", packed, "--output", place / "packed.png", "--width", 24],
                "packed_inspect": ["infnerf-inspect", packed, "--photo", 1],
                "rewrite": rewrite(here, "--data", place / "gone"),
                "rewrite_packed": rewrite(packed),
            },
            place / "logs",
        )
        said |= run_all(
            {
                "here_eval": ["ns-eval", "--load-config", here / "config.yml", "--output-path", place / "here.json"],
                "packed_render": render(packed / "config.yml", place / "packed_render"),
            },
            place / "logs",
        )
    return Moved(said, place, here, packed)


def test_a_run_of_a_relative_path_is_evaluated_from_elsewhere(moved: Moved) -> None:
    """Regression: "transforms.json does not exist", "the data folder ../cap does not exist"."""
    moved.said["eval"].succeeded()
    assert json.loads((moved.place / "eval.json").read_text())["results"]["psnr"] > 3


def pictures(folder: Path) -> list[np.ndarray]:
    return [picture(file) for file in sorted(folder.rglob("*.jpg"))]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: ns-render wants it")
def test_camera_paths_are_rendered_without_photos(moved: Moved) -> None:
    for name in ("render", "photoless_render", "packed_render"):
        moved.said[name].succeeded()
    whole = pictures(moved.place / "render")
    assert len(whole) == 2 and whole[0].std() > 0
    for folder in ("photoless", "packed_render"):
        for one, other in zip(whole, pictures(moved.place / folder), strict=True):
            assert np.abs(one - other).max() < 2 / 255


def test_maps_and_views_need_no_photos(moved: Moved) -> None:
    for name in ("photoless_map", "photoless_inspect", "packed_map", "packed_inspect"):
        moved.said[name].succeeded()
    assert "held-out photo 1" in moved.said["photoless_inspect"].out
    assert np.abs(picture(moved.place / "map.png") - picture(moved.place / "packed.png")).max() < 2 / 255


def test_what_needs_photos_says_which_and_where(moved: Moved) -> None:
    for name in ("photoless_eval", "photoless_picture"):
        line = moved.said[name].refusal()
        assert (
            f"2 of the 2 held-out photos (or masks) of the run cannot be found, the first is {moved.place}/cap" in line
        )
        assert f"looked for in {moved.place}/cap: " in line and "infnerf-config RUN --data FOLDER" in line


def test_training_on_with_more_photos_says_so(moved: Moved) -> None:
    line = moved.said["train_on"].refusal()
    assert "it was trained on 12 photos, and now there are 13" in line and "added" in line


def test_a_packed_run_has_the_record_of_the_run(moved: Moved) -> None:
    assert (moved.packed / RECORD).read_bytes() == (moved.here / RECORD).read_bytes()
    record = CaptureRecord.read(moved.packed / RECORD)
    assert (len(record.splits["train"].image_filenames), len(record.splits["test"].image_filenames)) == (12, 2)
    assert record.data == moved.place / "cap" and record.scene["source"] == "visibility"


def test_a_copied_run_is_opened_by_nerfstudio_when_it_is_written_anew(moved: Moved) -> None:
    line = moved.said["copied_render"].refusal()
    assert f"the run is not in {moved.place}" in line and "infnerf-config RUN" in line
    for name in ("rewrite", "rewrite_packed", "here_eval"):
        moved.said[name].succeeded()
    results = [json.loads((moved.place / f"{name}.json").read_text())["results"] for name in ("eval", "here")]
    for name in results[0]:
        if "psnr" in name:
            assert results[0][name] == results[1][name], name


def test_the_viewer_opens_without_photos(moved: Moved) -> None:
    command = ["ns-viewer", "--load-config", moved.packed / "config.yml", "--viewer.websocket-port", PORT]
    running = Running(command, moved.place / "logs" / "viewer")

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5).status == 200
        except OSError:
            return False

    try:
        running.wait_until(answers)
        time.sleep(5)  # it draws the photos after it has begun to answer
        assert running.process.poll() is None, running.kill()
    finally:
        ended = running.kill()
    assert "Traceback" not in ended.out + ended.err


def test_point_clouds_are_exported_without_photos(moved: Moved) -> None:
    attempt = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True)
    if attempt.returncode != 0:
        pytest.skip(f"ns-export needs open3d, which does not load: {attempt.stderr.strip().splitlines()[-1]}")
    config, out = moved.packed / "config.yml", moved.place / "exports"
    said = run_all(
        {
            "cloud": ["ns-export", "pointcloud", "--load-config", config, "--output-dir", out, "--num-points", 500]
            + ["--num-rays-per-batch", 512, "--remove-outliers", "False"],
            "cameras": ["ns-export", "cameras", "--load-config", config, "--output-dir", out],
        },
        moved.place / "logs",
    )
    for finished in said.values():
        finished.succeeded()
    assert "rays are drawn from the recorded cameras" in said["cloud"].out
    assert len(json.loads((out / "transforms_train.json").read_text())) == 12
    assert (out / "point_cloud.ply").is_file()


def test_a_run_of_an_earlier_version_is_evaluated_from_its_capture(moved: Moved, tmp_path: Path) -> None:
    """It has no record."""
    run = tmp_path / "old"
    shutil.copytree(moved.here, run)
    (run / RECORD).unlink()
    commands = {"rewrite_old": rewrite(run, "--data", moved.place / "gone")}
    run_all(commands, moved.place / "logs")["rewrite_old"].succeeded()
    evaluate = ["ns-eval", "--load-config", run / "config.yml", "--output-path", tmp_path / "old.json"]
    run_all({"old": evaluate}, moved.place / "logs")["old"].succeeded()
    results = [json.loads(file.read_text())["results"] for file in (moved.place / "eval.json", tmp_path / "old.json")]
    assert results[0]["psnr"] == results[1]["psnr"]


def test_a_hostile_configuration_is_not_trained_with(moved: Moved, tmp_path: Path) -> None:
    config = yaml.safe_dump({"a": 1}) + f"b: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n"
    (tmp_path / "config.yml").write_text(config)
    command = ["ns-train", "infnerf", "--load-config", tmp_path / "config.yml"]
    line = run_all({"hostile": command}, moved.place / "logs")["hostile"].refusal()
    assert "asks for a call of os.system" in line and not (tmp_path / "executed").exists()
