"""The ns-* commands from training to export, as a user types them."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from commands import STEPS, STEPS_PER_SAVE, TOWN, Finished, Running, Trained, run_all, trained_run
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infnerf_ns.cli.picture import Picture
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.errors import InputError
from infnerf_ns.model import APPEARANCE
from infnerf_ns.sampler import LoDSampler, SamplerConfig
from infnerf_ns.training.checkpoints import checkpoint_path, is_whole, list_checkpoints

pytestmark = pytest.mark.slow
WIDTH, HEIGHT = TOWN["image_width"], TOWN["image_height"]
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: ns-render refuses to make videos and camera paths"
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_run(tmp_path_factory.getbasetemp())


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("Train Loss")}


def picture(path: Path) -> np.ndarray:
    """An image file [H, W, 3], 0..1."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


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
    """A training that SIGTERM ended and its continuation; a training that SIGKILL ended."""

    stopped: Finished
    stopped_folder: Path
    resumed: Finished
    resumed_folder: Path
    killed_folder: Path


@pytest.fixture(scope="module")
def interrupted(trained: Trained) -> Interrupted:
    place = trained.workplace
    folders = {name: place.run_folder(name) for name in ("stopped", "killed", "resumed")}
    running = {name: Running(place.train(name), place.logs / name) for name in ("stopped", "killed")}
    try:
        models = {name: folders[name] / "nerfstudio_models" for name in running}
        running["stopped"].wait_until(lambda: bool(list_checkpoints(models["stopped"])))
        stopped = running["stopped"].kill(signal.SIGTERM)
        running["killed"].wait_until(lambda: len(list_checkpoints(models["killed"])) >= 2)
        running["killed"].kill(signal.SIGKILL)
    finally:
        for command in running.values():
            command.kill()
    resumed = Running(place.train("resumed", "--load-dir", folders["stopped"]), place.logs / "resumed").wait()
    return Interrupted(stopped, folders["stopped"], resumed, folders["resumed"], folders["killed"])


def last_step(run: Path) -> int:
    return int(list_checkpoints(run / "nerfstudio_models")[0].stem.removeprefix("step-"))


def test_sigterm_saves_and_exits(interrupted: Interrupted) -> None:
    assert interrupted.stopped.code == 128 + signal.SIGTERM
    assert "Traceback" not in interrupted.stopped.out + interrupted.stopped.err
    step = last_step(interrupted.stopped_folder)
    assert STEPS_PER_SAVE <= step < STEPS - 1
    line = next(x for x in interrupted.stopped.out.splitlines() if x.startswith("infnerf: stopped after"))
    assert f"after step {step}" in line and f"--load-dir {interrupted.stopped_folder}" in line


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


@pytest.mark.parametrize("protocol", ["full", "half"])
def test_eval_reports_every_pyramid_level_and_the_mean(evaluated: dict, protocol: str) -> None:
    results = evaluated[protocol][1]["results"]
    scales = ["1", "1/2", "1/4"]  # 1/8 would be 8 x 6 pixels, smaller than the pyramid goes
    large_enough = scales[:2] if protocol == "half" else scales  # SSIM needs 11 pixels
    for metric, expected, lowest, highest in (("psnr", scales, 10, 40), ("ssim", large_enough, 0, 1)):
        levels = [results.get(f"{metric}_{scale}") for scale in expected]
        assert None not in levels and f"{metric}_1/8" not in results
        assert results[metric] == pytest.approx(np.mean(levels))
        assert all(lowest < level < highest for level in levels)


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


# -- rendering ---------------------------------------------------------------------------------------------------------

OUTPUTS = ("rgb", "depth", "expected_depth", "accumulation", "level", "normals")
CAMERAS = {"perspective": (WIDTH, HEIGHT), "fisheye": (HEIGHT, HEIGHT), "equirectangular": (WIDTH, WIDTH // 2)}


LOOKED_FROM = 2  # number of a train photo: straight down on the town


def town_cameras(trained: Trained, split: str) -> Cameras:
    town = InfNeRFDemoDataParserConfig(**TOWN, cache_dir=trained.workplace.town_cache).setup()
    return town.get_dataparser_outputs(split=split).cameras


def write_camera_path(path: Path, kind: str, camera: Cameras) -> None:
    """A path of one camera, as the viewer writes it."""
    pose = np.eye(4)
    pose[:3] = camera.camera_to_worlds.numpy()
    fov = math.degrees(2 * math.atan(HEIGHT / 2 / float(camera.fy)))
    width, height = CAMERAS[kind]
    frame = {"camera_to_world": pose.ravel().tolist(), "fov": fov, "aspect": width / height}
    content = {"camera_type": kind, "render_width": width, "render_height": height, "seconds": 1.0, "fps": 1.0}
    path.write_text(json.dumps({**content, "camera_path": [frame], "crop": None}))


@pytest.fixture(scope="module")
def renders(trained: Trained) -> Path:
    """A folder with everything that ns-render renders, by kind."""
    place, folder = trained.workplace, trained.workplace.folder / "renders"
    folder.mkdir()
    images = ["--output-format", "images", "--image-format", "png"]
    kinds = {"dataset": ["--output-path", folder / "dataset", "--image-format", "png", "--split", "train+test"]}
    if shutil.which("ffmpeg") is not None:
        names = ["--rendered-output-names", "rgb", "depth", "level", "normals"]
        kinds["interpolate"] = ["--output-path", folder / "interpolate", "--interpolation-steps", 2, *images, *names]
        kinds["spiral"] = ["--output-path", folder / "spiral.mp4", "--seconds", 0.25]
        for kind in CAMERAS:
            write_camera_path(folder / f"{kind}.json", kind, town_cameras(trained, "train")[LOOKED_FROM])
            path = ["--camera-path-filename", folder / f"{kind}.json"]
            kinds[kind] = ["--output-path", folder / kind, *path, *images]
    subcommands = dict.fromkeys(CAMERAS, "camera-path")
    commands = {
        f"render_{kind}": ["ns-render", subcommands.get(kind, kind), "--load-config", trained.config, *flags]
        for kind, flags in kinds.items()
    }
    for finished in run_all(commands, place.logs).values():
        finished.succeeded()
    return folder


def dataset_renders(renders: Path, split: str, output: str) -> np.ndarray:
    """All renders of a split [photos, H, W, 3]."""
    return np.stack([picture(path) for path in sorted((renders / "dataset" / split / output).iterdir())])


def test_dataset_renders_every_output(renders: Path) -> None:
    held_out = TOWN["num_photos"] // TOWN["eval_interval"]
    for split, count in (("train", TOWN["num_photos"] - held_out), ("test", held_out)):
        for output in OUTPUTS:
            images = dataset_renders(renders, split, output)
            assert images.shape == (count, HEIGHT, WIDTH, 3)
            assert output == "accumulation" or images.std(axis=(0, 1, 2)).max() > 0.02, f"{output} is blank"


def test_renders_are_upright(renders: Path) -> None:
    photos, rendered = (dataset_renders(renders, "train", output) for output in ("gt-rgb", "rgb"))
    upright = correlation(photos, rendered)
    assert upright > 0.6
    wrong = {"photos": 0, "rows": 1, "columns": 2, "colours": 3}
    for name, axis in wrong.items():
        assert upright > correlation(photos, np.flip(rendered, axis)) + 0.1, f"the {name} are reversed"


@needs_ffmpeg
def test_camera_path_renders_what_the_dataset_renders(renders: Path) -> None:
    expected = dataset_renders(renders, "train", "rgb")[LOOKED_FROM]
    rendered = picture(renders / "perspective" / "00000.png")
    assert rendered.shape == expected.shape
    assert np.abs(rendered - expected).mean() < 2 / 255


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["fisheye", "equirectangular"])
def test_wide_cameras_look_the_same_way(renders: Path, kind: str) -> None:
    width, height = CAMERAS[kind]
    image = picture(renders / kind / "00000.png")
    assert image.shape == (height, width, 3)
    assert image.std(axis=(0, 1)).max() > 0.05

    def middle(x: np.ndarray, radius: int) -> np.ndarray:
        row, column = x.shape[0] // 2, x.shape[1] // 2
        return x[row - radius : row + radius, column - radius : column + radius].mean(axis=(0, 1))

    narrow = middle(picture(renders / "perspective" / "00000.png"), 6 if kind == "equirectangular" else 3)
    assert np.abs(middle(image, 1 if kind == "equirectangular" else 3) - narrow).max() < 0.12


@needs_ffmpeg
def test_interpolate_renders_outputs_side_by_side(renders: Path) -> None:
    frames = sorted((renders / "interpolate").glob("*.png"))
    assert len(frames) == 2 * (TOWN["num_photos"] // TOWN["eval_interval"] - 1)
    for frame in frames:
        assert picture(frame).shape == (HEIGHT, 4 * WIDTH, 3)


@needs_ffmpeg
def test_spiral_is_a_video(renders: Path) -> None:
    video = renders / "spiral.mp4"
    command = ["ffmpeg", "-v", "error", "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    frames = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, dtype=np.uint8)
    frames = frames.reshape(-1, HEIGHT, WIDTH, 3)
    assert len(frames) == 6
    assert frames.std(axis=(1, 2)).max() > 5


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(trained: Trained) -> Path:
    """A folder with everything that ns-export exports, by kind, in small."""
    attempt = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True)
    if attempt.returncode != 0:
        pytest.skip(f"ns-export needs open3d, which does not load: {attempt.stderr.strip().splitlines()[-1]}")
    folder = trained.workplace.folder / "exports"
    texture = ["--num-pixels-per-side", 128, "--target-num-faces", 300]
    points = ["--num-points", 3000, "--num-rays-per-batch", 2048]
    kinds = {"pointcloud": points, "tsdf": ["--resolution", 32, *texture], "poisson": [*points, *texture]}
    kinds["cameras"] = []
    commands = {
        f"export_{kind}": ["ns-export", kind, "--load-config", trained.config, "--output-dir", folder / kind, *flags]
        for kind, flags in kinds.items()
    }
    for finished in run_all(commands, trained.workplace.logs).values():
        finished.succeeded()
    return folder


def test_exported_point_cloud_lies_in_the_town(exports: Path) -> None:
    file = exports / "pointcloud" / "point_cloud.ply"
    assert b" nx\n" in file.read_bytes()[:500]
    cloud = trimesh.load(file)
    assert len(cloud.vertices) > 1000 and np.isfinite(cloud.vertices).all()
    assert np.asarray(cloud.colors)[:, :3].std(axis=0).min() > 10
    assert (np.abs(cloud.vertices).max(axis=1) < 3).mean() > 0.8  # the town reaches to 0.8, its surroundings further


@pytest.mark.parametrize("kind, mesh_file", [("tsdf", "tsdf_mesh.ply"), ("poisson", "poisson_mesh.ply")])
def test_exported_mesh_has_a_texture(exports: Path, kind: str, mesh_file: str) -> None:
    mesh = trimesh.load(exports / kind / mesh_file)
    assert len(mesh.faces) > 100 and np.isfinite(mesh.vertices).all()
    assert len(trimesh.load(exports / kind / "mesh.obj").faces) > 50
    assert picture(exports / kind / "material_0.png").std(axis=(0, 1)).max() > 0.03


def test_texture_rays_are_rendered_where_they_are() -> None:
    """Texture export renders rays shorter than the near plane, which must not push them through the mesh."""
    sampler = LoDSampler(SamplerConfig(), near=0.3, bend=5.0).eval()
    ones = torch.ones(4, 1)
    rays = RayBundle(torch.zeros(4, 3), torch.eye(3)[[0, 1, 2, 0]], ones, nears=0 * ones, fars=0.02 * ones)
    samples, _, _ = sampler(rays, lambda positions, footprints: torch.ones(len(positions)), step=0)
    assert samples.frustums.ends.max() <= 0.02 + 1e-6
    assert ((samples.frustums.starts < 0.01) & (samples.frustums.ends > 0.01)).any(dim=1).all()


def test_exported_cameras_are_those_of_the_capture(exports: Path, trained: Trained) -> None:
    frames = {
        split: json.loads((exports / "cameras" / f"transforms_{split}.json").read_text()) for split in ("train", "eval")
    }
    assert len(frames["train"]) + len(frames["eval"]) == TOWN["num_photos"]
    poses = np.array([frame["transform"] for frame in frames["eval"]])
    np.testing.assert_allclose(poses[:, :3], town_cameras(trained, "test").camera_to_worlds.numpy(), atol=1e-5)


# -- help and wrong input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(trained: Trained) -> dict[str, Finished]:
    """What short commands answer."""
    place = trained.workplace
    quiet = ["--vis", "tensorboard", "--output-dir", place.folder / "refused"]
    return run_all(
        {
            "help": ["ns-train", "infnerf", "-h"],
            "level": place.train("refused", "--pipeline.model.octree.max-level", 99),
            "data": ["ns-train", "infnerf-small", *quiet, "--data", place.folder / "nowhere", "nerfstudio-data"],
        },
        place.logs,
    )


def test_help_explains_the_options(answers: dict[str, Finished]) -> None:
    text = answers["help"].succeeded().out
    for option in ("octree.max-level", "field.log2-table-size", "losses.transparency", "sampler.samples"):
        assert f"--pipeline.model.{option}" in text
    assert "--pipeline.eval-protocol {full,half}" in text
    assert "Learning rate of the parameters of octree level L" in text
    assert "the paper's protocol" in text
    assert "Deepest octree level (0: the root alone)." in text


def test_impossible_setting_is_one_line(answers: dict[str, Finished]) -> None:
    line = answers["level"].refusal()
    assert "--pipeline.model.octree.max-level 99" in line and "allowed is" in line


def test_missing_capture_is_one_line(answers: dict[str, Finished], trained: Trained) -> None:
    assert f"{trained.workplace.folder / 'nowhere'} does not exist: check --data" in answers["data"].refusal()


def test_checkpoint_names_are_nerfstudios(trained: Trained) -> None:
    assert checkpoint_path(trained.folder / "nerfstudio_models", STEPS - 1).is_file()


def test_picture_shows_held_out_photos(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "held_out.png"
    Picture(load_config=trained.config, output=output, photos=(0, 2), width=480).main()
    shown = picture(output)
    assert shown.shape[1] == 320, "five panels of 64 pixels are not enlarged"
    assert shown.shape[0] == 2 * 48
    for number in (0, 1):
        row = shown[48 * number : 48 * (number + 1)]
        assert np.abs(row[:, :64] - row[:, 64:128]).mean() < 0.25, "the render resembles the photo beside it"
    with pytest.raises(InputError, match="--photos 99: the run has 4 held-out photos"):
        Picture(load_config=trained.config, output=output, photos=(99,)).main()
