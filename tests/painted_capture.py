"""A capture in which the photos agree: a ring of cameras around a painted ball above a painted floor, ray traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_capture import ring, write_json

WIDTH, HEIGHT, FOCAL = 128, 96, 110.0
RADIUS, FLOOR = 0.9, -0.9
"""Of the ball around the origin; height of the floor."""


def paint(points: np.ndarray) -> np.ndarray:
    """The colours 0 to 255 of places [..., 3]: waves that no mirror and no turn leaves as they are."""
    phases = np.stack(
        [
            points @ np.array([2.1, 0.7, 1.3]) + 0.4,
            points @ np.array([-1.1, 2.3, 0.8]) + 1.9,
            points @ np.array([0.6, -1.2, 2.6]) + 3.1,
        ],
        axis=-1,
    )
    return (127.5 + 100 * np.sin(2.5 * phases) + 27 * np.sin(7 * phases[..., ::-1])).clip(0, 255)


def hit(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Where rays [..., 3] meet the ball, or else the floor, or else a far wall."""
    directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    along = directions @ origin
    inside = along**2 - origin @ origin + RADIUS**2
    ball = np.where(inside > 0, -along - np.sqrt(np.maximum(inside, 0)), np.inf)
    down = np.minimum(directions[..., 2], -1e-6)
    floor = np.where(directions[..., 2] < 0, (FLOOR - origin[2]) / down, np.inf)
    return origin + directions * np.minimum(np.minimum(ball, floor), 12.0)[..., None]


def view(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The photo [HEIGHT, WIDTH, 3] of a camera, and the places that its pixels show."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5 - WIDTH / 2, np.arange(HEIGHT) + 0.5 - HEIGHT / 2)
    rays = np.stack([x / FOCAL, -y / FOCAL, -np.ones_like(x)], axis=-1) @ pose[:3, :3].T
    places = hit(pose[:3, 3], rays)
    return paint(places).round().astype(np.uint8), places


def write_painted(folder: Path, count: int = 16, colours: bool = True) -> dict[str, Any]:
    """Writes photos, ``transforms.json`` and ``points.ply``: points of the surfaces, 40 from each photo."""
    (folder / "images").mkdir(parents=True)
    poses, frames, points = ring(count), [], []
    random = np.random.default_rng(0)
    for index, pose in enumerate(poses):
        photo, places = view(pose)
        name = f"images/{index:03d}.png"
        Image.fromarray(photo).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
        near = places[np.linalg.norm(places, axis=-1) < 3]
        points.append(near[random.choice(len(near), 40, replace=False)])
    meta: dict[str, Any] = {
        **{"camera_model": "PINHOLE", "fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2},
        **{"w": WIDTH, "h": HEIGHT, "ply_file_path": "points.ply", "frames": frames},
    }
    write_points(folder / "points.ply", np.concatenate(points), colours)
    write_json(folder, meta)
    return meta


def write_points(path: Path, positions: np.ndarray, colours: bool = True) -> None:
    """An ASCII ply file with the colours of the places, or in grey."""
    painted = paint(positions).round().astype(int) if colours else np.full(positions.shape, 128)
    header = ["ply", "format ascii 1.0", f"element vertex {len(positions)}"]
    header += [f"property double {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    rows = [" ".join([*(f"{v:.9g}" for v in p), *map(str, c)]) for p, c in zip(positions.tolist(), painted.tolist())]
    path.write_text("\n".join([*header, "end_header", *rows, ""]))


def read_points(path: Path) -> np.ndarray:
    """The positions in such a file."""
    lines = path.read_text().split("end_header\n")[1].splitlines()
    return np.array([[float(value) for value in line.split()[:3]] for line in lines])
