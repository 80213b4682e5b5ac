"""ns-render of a real run: every command, output and kind of camera."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import TOWN, Trained, run_all
from nerfstudio.cameras.cameras import Cameras
from results import HEIGHT, WIDTH, correlation, picture, town

pytestmark = pytest.mark.slow
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: ns-render refuses to make videos and camera paths"
)

OUTPUTS = ("rgb", "depth", "expected_depth", "accumulation", "level", "node", "normals")
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
