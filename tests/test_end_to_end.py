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
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from scipy.spatial import cKDTree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infnerf_ns.cli.picture import Picture
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.pyramid import level_mean
from infnerf_ns.errors import InputError
from infnerf_ns.image_metrics import image_metrics
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


def town(trained: Trained, split: str) -> DataparserOutputs:
    """What the trainings see."""
    config = InfNeRFDemoDataParserConfig(**TOWN, cache_dir=trained.workplace.town_cache)
    return config.setup().get_dataparser_outputs(split=split)


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


# -- rendering ---------------------------------------------------------------------------------------------------------

OUTPUTS = ("rgb", "depth", "expected_depth", "accumulation", "level", "normals")
CAMERAS = {"perspective": (WIDTH, HEIGHT), "fisheye": (HEIGHT, HEIGHT), "equirectangular": (4 * WIDTH, 2 * WIDTH)}


LOOKED_FROM = 28  # number of a train photo: straight down on the town


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
            write_camera_path(folder / f"{kind}.json", kind, town(trained, "train").cameras[LOOKED_FROM])
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
            assert images.std(axis=(1, 2)).mean(axis=0).max() > 0.02, f"{output} is blank"


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


FLIPS = {"rows": 0, "columns": 1, "both": (0, 1)}


@needs_ffmpeg
def test_the_middle_of_a_fisheye_image_is_that_of_a_perspective_one(renders: Path) -> None:
    fisheye, perspective = (picture(renders / kind / "00000.png") for kind in ("fisheye", "perspective"))
    assert fisheye.shape == (HEIGHT, HEIGHT, 3)

    def middle(image: np.ndarray) -> np.ndarray:
        row, column = image.shape[0] // 2, image.shape[1] // 2
        return image[row - 8 : row + 8, column - 8 : column + 8]

    difference = np.abs(middle(fisheye) - middle(perspective)).mean()
    assert difference < 0.01
    for name, axes in FLIPS.items():
        assert np.abs(np.flip(middle(fisheye), axes) - middle(perspective)).mean() > 2 * difference, f"{name} reversed"


@needs_ffmpeg
def test_an_equirectangular_image_shows_directions_where_they_are(renders: Path, trained: Trained) -> None:
    """Its pixels within 0.4 rad of the middle against the perspective render in their directions."""
    image, perspective = (picture(renders / kind / "00000.png") for kind in ("equirectangular", "perspective"))
    height, width = image.shape[:2]
    assert (width, height) == CAMERAS["equirectangular"]
    latitude = np.pi * (0.5 - (np.arange(height) + 0.5) / height)
    longitude = 2 * np.pi * ((np.arange(width) + 0.5) / width - 0.5)
    rows, columns = np.nonzero((np.abs(latitude) < 0.4)[:, None] & (np.abs(longitude) < 0.4)[None])
    focal = float(town(trained, "train").cameras[LOOKED_FROM].fy)
    right = np.tan(longitude[columns])
    up = np.tan(latitude[rows]) / np.cos(longitude[columns])
    seen = perspective[(HEIGHT / 2 - focal * up).astype(int), (WIDTH / 2 + focal * right).astype(int)]
    shape = (len(np.unique(rows)), len(np.unique(columns)), 3)
    shown, expected = image[rows, columns].reshape(shape), seen.reshape(shape)
    agreement = correlation(shown, expected)
    assert agreement > 0.8
    for name, axes in FLIPS.items():
        assert agreement > correlation(np.flip(shown, axes), expected) + 0.1, f"{name} reversed"


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


def share_on_surface(points: np.ndarray, trained: Trained) -> float:
    """Share of the points above the town's block that lie within 2 m of a surface point of the town."""
    core = points[(np.abs(points[:, :2]) < 0.8).all(axis=1)]
    assert len(core) > 300
    surface = cKDTree(town(trained, "train").metadata["points3D_xyz"].numpy())
    return float((surface.query(core)[0] < 0.05).mean())


def test_exported_points_lie_on_the_town(exports: Path, trained: Trained) -> None:
    file = exports / "pointcloud" / "point_cloud.ply"
    assert b" nx\n" in file.read_bytes()[:500]
    cloud = trimesh.load(file)
    assert len(cloud.vertices) > 1000 and np.isfinite(cloud.vertices).all()
    assert np.asarray(cloud.colors)[:, :3].std(axis=0).min() > 10
    mesh = trimesh.load(exports / "poisson" / "poisson_mesh.ply")  # the voxels of the small tsdf are coarser than 2 m
    for vertices in (cloud.vertices, mesh.vertices):
        assert share_on_surface(vertices, trained) > 0.35
        assert share_on_surface(vertices + (0, 0, 0.2), trained) < 0.25, "a shifted one would be noticed"


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
    np.testing.assert_allclose(poses[:, :3], town(trained, "test").cameras.camera_to_worlds.numpy(), atol=1e-5)


# -- help and wrong input ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(trained: Trained) -> dict[str, Finished]:
    """What short commands answer."""
    place = trained.workplace
    picture_of = ["--load-config", trained.config]
    quiet = ["--vis", "tensorboard", "--output-dir", place.folder / "refused"]
    return run_all(
        {
            "help": ["ns-train", "infnerf", "-h"],
            "bench_help": ["infnerf-bench", "quality", "-h"],
            "picture": ["infnerf-picture", *picture_of, "--output", place.folder / "by_hand.jpg", "--photos", 0, 2],
            "picture_type": ["infnerf-picture", *picture_of, "--output", place.folder / "by_hand.txt"],
            "level": place.train("refused", "--pipeline.model.octree.max-level", 99),
            "data": ["ns-train", "infnerf-small", *quiet, "--data", place.folder / "nowhere"],
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


def test_own_commands_answer(answers: dict[str, Finished], trained: Trained) -> None:
    assert "--methods" in answers["bench_help"].succeeded().out
    assert "infnerf: wrote" in answers["picture"].succeeded().out
    assert picture(trained.workplace.folder / "by_hand.jpg").shape[0] == 2 * HEIGHT
    assert "the name must end in .png or .jpg" in answers["picture_type"].refusal()


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
        assert correlation(row[:, :64], row[:, 64:128]) > 0.5, "the render resembles the photo beside it"
    with pytest.raises(InputError, match="--photos 99: the run has 20 held-out photos"):
        Picture(load_config=trained.config, output=output, photos=(99,)).main()
