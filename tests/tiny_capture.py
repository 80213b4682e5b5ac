"""Tiny captures for the tests of the data room: a ring of cameras around the origin, photos of a few pixels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WIDTH, HEIGHT, FOCAL = 32, 24, 30.0


def look_at_origin(position: np.ndarray) -> np.ndarray:
    """Camera-to-world matrix [4, 4] with OpenGL axes, z up, at ``position`` and looking at the origin."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, position], axis=1)
    return pose


def ring(count: int, radius: float = 3.0) -> list[np.ndarray]:
    """Poses on a tilted ring; the distances to the origin differ a little."""
    angles = 2 * np.pi * np.arange(count) / count
    return [
        look_at_origin((radius + 0.1 * i) * np.array([np.cos(a), np.sin(a), 0.4 + 0.1 * np.sin(2 * a)]))
        for i, a in enumerate(angles)
    ]


def photo(index: int) -> np.ndarray:
    """A random photo [HEIGHT, WIDTH, 3]."""
    return np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def points(count: int = 60) -> np.ndarray:
    """Points [count, 3] in a ball around the origin."""
    return np.random.default_rng(7).uniform(-0.5, 0.5, (count, 3))


def write_photos(folder: Path, count: int) -> list[str]:
    """Writes ``images/NNN.png`` and returns the names relative to ``folder``."""
    (folder / "images").mkdir(parents=True)
    names = [f"images/{index:03d}.png" for index in range(count)]
    for index, name in enumerate(names):
        Image.fromarray(photo(index)).save(folder / name)
    return names


def write_capture(folder: Path, count: int = 8, *, ply: bool = True, masks: bool = False) -> dict[str, Any]:
    """Writes photos, ``transforms.json``, and the points as ``sparse_pc.ply``; returns what is in the JSON file."""
    names = write_photos(folder, count)
    meta: dict[str, Any] = {
        **{"camera_model": "OPENCV", "fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2},
        **{"w": WIDTH, "h": HEIGHT, "k1": 0.02, "k2": 0.0, "p1": 0.001, "p2": 0.0},
        "frames": [{"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(names, ring(count))],
    }
    if masks:
        (folder / "masks").mkdir()
        for index, frame in enumerate(meta["frames"]):
            mask = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
            mask[: HEIGHT // 2, : index + 1] = 0
            frame["mask_path"] = f"masks/{index:03d}.png"
            Image.fromarray(mask).save(folder / frame["mask_path"])
    if ply:
        meta["ply_file_path"] = "sparse_pc.ply"
        write_ply(folder / "sparse_pc.ply", points())
    write_json(folder, meta)
    return meta


def write_json(folder: Path, meta: dict[str, Any]) -> None:
    """Writes ``transforms.json`` (again)."""
    (folder / "transforms.json").write_text(json.dumps(meta))


def write_ply(path: Path, positions: np.ndarray, kind: str = "float") -> None:
    """An ASCII ply file with grey points."""
    header = ["ply", "format ascii 1.0", f"element vertex {len(positions)}"]
    header += [f"property {kind} {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    rows = [f"{x:.8f} {y:.8f} {z:.8f} 128 128 128" for x, y, z in positions]
    path.write_text("\n".join([*header, "end_header", *rows, ""]))


def write_colmap(folder: Path, count: int = 8, ids: list[int] | None = None) -> list[list[int]]:
    """Writes photos and a COLMAP text model in ``sparse/0``.

    Args:
        folder: of the capture.
        count: photos.
        ids: COLMAP's id of each photo.

    Returns:
        The photos (indices into the file names) of each point's track: point ``i`` is seen by ``2 + i % 4`` photos.
    """
    names = write_photos(folder, count)
    ids = ids or list(range(1, count + 1))
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text(f"1 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n")
    world = points()
    tracks = [[(i + step) % count for step in range(2 + i % 4)] for i in range(len(world))]
    matches: list[list[str]] = [[] for _ in range(count)]
    references: list[list[str]] = [[] for _ in world]
    world_to_camera = [np.linalg.inv(pose @ np.diag([1.0, -1.0, -1.0, 1.0])) for pose in ring(count)]
    for i, track in enumerate(tracks):
        for camera in track:
            local = world_to_camera[camera][:3] @ np.append(world[i], 1.0)
            x, y = FOCAL * local[:2] / local[2] + np.array([WIDTH / 2, HEIGHT / 2])
            references[i].append(f"{ids[camera]} {len(matches[camera])}")
            matches[camera].append(f"{x:.6f} {y:.6f} {i + 1}")
    images = []
    for camera, name in enumerate(names):
        w, x, y, z = _quaternion(world_to_camera[camera][:3, :3])
        t = world_to_camera[camera][:3, 3]
        images.append(f"{ids[camera]} {w} {x} {y} {z} {t[0]} {t[1]} {t[2]} 1 {Path(name).name}")
        images.append(" ".join(matches[camera]))
    (model / "images.txt").write_text("\n".join(images) + "\n")
    rows = [f"{i + 1} {p[0]} {p[1]} {p[2]} 9 9 9 0.5 {' '.join(references[i])}" for i, p in enumerate(world)]
    (model / "points3D.txt").write_text("\n".join(rows) + "\n")
    return tracks


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of a rotation: the eigenvector of the symmetric 4x4 form of it (Bar-Itzhack)."""
    m = rotation
    form = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    return np.linalg.eigh(form)[1][:, -1]


def shared_capture(name: str) -> Path:
    """Folder of a real capture, which is not part of the repository; the test is skipped where it is absent.

    ``INFNERF_TEST_DATA`` names the folder of the captures, by default ``shared/data`` beside the repository.
    """
    root = Path(os.environ.get("INFNERF_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"the capture {name} is not in {root} (set INFNERF_TEST_DATA)")
    return root / name
