"""ns-train and ns-eval as a user types them: training, interruption, resume, evaluation."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import STEPS, STEPS_PER_SAVE, Finished, Running, Trained, run_all
from nerfstudio.utils.eval_utils import eval_setup
from results import WIDTH, losses, picture, town

from infnerf_ns.data.pyramid import level_mean
from infnerf_ns.image_metrics import image_metrics
from infnerf_ns.model import APPEARANCE
from infnerf_ns.training.checkpoints import is_whole, list_checkpoints

pytestmark = pytest.mark.slow


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_ends_by_saying_where_the_result_is(trained: Trained) -> None:
    lines = [line for line in trained.finished.out.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"infnerf: trained {STEPS} steps"))
    assert str(trained.folder) in lines[start]
    following = " ".join(lines[start:])
    for command in ("ns-viewer", "ns-eval", "ns-render"):
        assert command in following
    assert f"--load-config {trained.config}" in following
    assert "Traceback" not in trained.finished.out + trained.finished.err


def test_training_learns(trained: Trained) -> None:
    curve = losses(trained.folder)
    assert sorted(curve) == list(range(STEPS))
    assert np.mean([curve[step] for step in range(STEPS - 20, STEPS)]) < 0.5 * np.mean([curve[s] for s in range(5)])


@dataclass(frozen=True)
class Interrupted:
    """A training that SIGTERM ended and its continuation; trainings that SIGKILL and Ctrl-C ended."""

    stopped: Finished
    stopped_folder: Path
    resumed: Finished
    resumed_folder: Path
    killed_folder: Path
    ctrl_c: Finished
    ctrl_c_folder: Path


@pytest.fixture(scope="module")
def interrupted(trained: Trained) -> Interrupted:
    place = trained.workplace
    folders = {name: place.run_folder(name) for name in ("stopped", "killed", "ctrl_c", "resumed")}
    running = {name: Running(place.train(name), place.logs / name) for name in ("stopped", "killed")}
    try:
        models = {name: folders[name] / "nerfstudio_models" for name in running}
        running["stopped"].wait_until(lambda: bool(list_checkpoints(models["stopped"])))
        stopped = running["stopped"].kill(signal.SIGTERM)
        running["killed"].wait_until(lambda: len(list_checkpoints(models["killed"])) >= 2)
        running["killed"].kill(signal.SIGKILL)
        running["ctrl_c"] = Running(place.train("ctrl_c"), place.logs / "ctrl_c")
        running["ctrl_c"].wait_until(lambda: "% Done" in running["ctrl_c"].output())
        ctrl_c = running["ctrl_c"].kill(signal.SIGINT)
    finally:
        for command in running.values():
            command.kill()
    resumed = Running(place.train("resumed", "--load-dir", folders["stopped"]), place.logs / "resumed").wait()
    return Interrupted(
        stopped, folders["stopped"], resumed, folders["resumed"], folders["killed"], ctrl_c, folders["ctrl_c"]
    )


def last_step(run: Path) -> int:
    return int(list_checkpoints(run / "nerfstudio_models")[0].stem.removeprefix("step-"))


def test_sigterm_saves_and_exits(interrupted: Interrupted) -> None:
    assert interrupted.stopped.code == 128 + signal.SIGTERM
    assert "Traceback" not in interrupted.stopped.out + interrupted.stopped.err
    step = last_step(interrupted.stopped_folder)
    assert STEPS_PER_SAVE <= step < STEPS - 1
    line = next(x for x in interrupted.stopped.out.splitlines() if x.startswith("infnerf: stopped after"))
    assert f"after step {step}" in line and f"--load-dir {interrupted.stopped_folder}" in line


def test_ctrl_c_saves_and_exits(interrupted: Interrupted) -> None:
    assert interrupted.ctrl_c.code == 128 + signal.SIGINT
    assert "Traceback" not in interrupted.ctrl_c.out + interrupted.ctrl_c.err
    assert f"--load-dir {interrupted.ctrl_c_folder}" in interrupted.ctrl_c.out
    assert is_whole(list_checkpoints(interrupted.ctrl_c_folder / "nerfstudio_models")[0])


def test_same_seed_same_curve(trained: Trained, interrupted: Interrupted) -> None:
    whole, stopped = losses(trained.folder), losses(interrupted.stopped_folder)
    assert sorted(stopped) == list(range(last_step(interrupted.stopped_folder) + 1))
    assert stopped == {step: whole[step] for step in stopped}


def test_resumed_run_continues_the_curve_of_an_uninterrupted_one(trained: Trained, interrupted: Interrupted) -> None:
    first = last_step(interrupted.stopped_folder) + 1
    assert f"training goes on at step {first}" in interrupted.resumed.succeeded().out
    whole, resumed = losses(trained.folder), losses(interrupted.resumed_folder)
    assert sorted(resumed) == list(range(first, STEPS))
    assert resumed == {step: whole[step] for step in resumed}
    assert last_step(interrupted.resumed_folder) == STEPS - 1


def test_kill_leaves_whole_checkpoints(interrupted: Interrupted) -> None:
    files = list_checkpoints(interrupted.killed_folder / "nerfstudio_models")
    assert len(files) >= 2 and all(is_whole(file) for file in files)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained: Trained, interrupted: Interrupted) -> dict[str, tuple[Finished, dict]]:
    """ns-eval of whole photos, with the protocol of half photos, and of a run whose newest checkpoint is damaged."""
    place = trained.workplace
    half = place.folder / "half.yml"
    settings = trained.config.read_text().replace("eval_protocol: full", "eval_protocol: half")
    half.write_text(settings.replace("half_fit_steps: 50", "half_fit_steps: 5"))
    newest = list_checkpoints(interrupted.killed_folder / "nerfstudio_models")[0]
    with open(newest, "r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    configs = {"full": trained.config, "half": half, "damaged": interrupted.killed_folder / "config.yml"}
    commands = {
        f"eval_{name}": ["ns-eval", "--load-config", config, "--output-path", place.folder / f"{name}.json"]
        for name, config in configs.items()
    }
    done = run_all(commands, place.logs)
    return {
        name: (done[f"eval_{name}"].succeeded(), json.loads((place.folder / f"{name}.json").read_text()))
        for name in configs
    }


def flat_metrics(trained: Trained, level: int, columns: slice) -> dict[str, float]:
    """Mean metrics over the held-out photos of the best constant image for each of them."""
    rows = []
    for path in town(trained, "test").image_filenames:
        photo = level_mean(torch.from_numpy(picture(path)).float(), level)[:, columns]
        rows.append(image_metrics(photo.mean(dim=(0, 1)).expand_as(photo).contiguous(), photo))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@pytest.mark.parametrize("protocol", ["full", "half"])
def test_eval_reports_every_pyramid_level_and_the_mean(evaluated: dict, trained: Trained, protocol: str) -> None:
    results = evaluated[protocol][1]["results"]
    scales = ["1", "1/2", "1/4"]  # 1/8 would be 8 x 6 pixels, smaller than the pyramid goes
    large_enough = scales[:2] if protocol == "half" else scales  # SSIM needs 11 pixels
    for metric, expected in (("psnr", scales), ("ssim", large_enough)):
        levels = [results.get(f"{metric}_{scale}") for scale in expected]
        assert None not in levels and f"{metric}_1/8" not in results
        assert results[metric] == pytest.approx(np.mean(levels))
        for number, level in enumerate(levels):
            columns = slice((WIDTH >> number) // 2 if protocol == "half" else 0, None)
            assert flat_metrics(trained, number, columns)[metric] < level < {"psnr": 40, "ssim": 1}[metric]


def test_the_half_protocol_fits_the_appearance_of_the_left_half(trained: Trained) -> None:
    """And it leaves no gradient of a held-out photo in the model."""
    _, pipeline, _, _ = eval_setup(trained.config)
    pipeline.config.half_fit_steps = 20
    camera, batch = pipeline.datamanager.fixed_indices_eval_dataloader.get_camera(1)
    rays = pipeline.model.camera_rays(camera)[:, : WIDTH // 2]

    def left_error(code: torch.Tensor) -> float:
        rays.metadata[APPEARANCE] = code.expand(*rays.shape, -1)
        rendered = pipeline.model.get_outputs_for_camera_ray_bundle(rays)["rgb"]
        return float((rendered - batch["image"][:, : WIDTH // 2]).square().mean())

    mean = pipeline.model.field.appearance.weight.detach().mean(dim=0)
    fitted = pipeline._fit_appearance(camera, batch)
    assert left_error(fitted) < left_error(mean)
    for name, parameter in pipeline.model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None, name


def test_eval_falls_back_where_the_newest_checkpoint_is_damaged(evaluated: dict, interrupted: Interrupted) -> None:
    finished, written = evaluated["damaged"]
    damaged, before = list_checkpoints(interrupted.killed_folder / "nerfstudio_models")[:2]
    warning = next(line for line in finished.err.splitlines() if line.startswith("infnerf: warning"))
    assert damaged.name in warning and before.name in warning
    assert written["checkpoint"] == str(before)
