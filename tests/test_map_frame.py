"""The map frame: nerfstudio's transforms undone, and what is up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import TRANSFORMS, MapFrame, map_frame

UP = np.array([0.0, 0.0, 1.0])
NORTH = np.array([0.0, 1.0, 0.0])
EAST = np.array([1.0, 0.0, 0.0])


def turned(axis: int, degrees: float) -> np.ndarray:
    """Rotation about an axis."""
    angle, (a, b) = np.radians(degrees), [(1, 2), (2, 0), (0, 1)][axis]
    rotation = np.eye(3)
    rotation[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return rotation


def written(folder: Path, rotation: np.ndarray, moved: tuple[float, float, float], scale: float) -> Path:
    """A run's folder with nerfstudio's file: ``scene = scale * (rotation @ capture + moved)``."""
    content = {"transform": np.column_stack([rotation, moved]).tolist(), "scale": scale}
    (folder / TRANSFORMS).write_text(json.dumps(content))
    return folder


def assert_is_a_map(frame: MapFrame) -> None:
    """Its axes are right-handed and of unit length, so nothing is mirrored or stretched."""
    assert np.allclose(frame.axes @ frame.axes.T, np.eye(3)) and np.isclose(np.linalg.det(frame.axes), 1)


def test_the_captures_coordinates_come_back(tmp_path: Path) -> None:
    rotation = turned(2, 130) @ turned(0, 4)
    frame = map_frame(written(tmp_path, rotation, (3.0, -2.0, 50.0), 0.02), UP).shifted((500_000.0, 4_000_000.0))
    capture = np.random.default_rng(0).normal(size=(5, 4, 3)) * 100
    scene = 0.02 * (capture @ rotation.T + (3.0, -2.0, 50.0))
    assert frame.is_capture and np.isclose(frame.unit, 50)
    assert_is_a_map(frame)
    assert np.allclose(frame.to_map(scene), capture + (500_000, 4_000_000, 0))
    assert np.allclose(frame.to_scene(frame.to_map(scene)), scene, atol=1e-9)


def test_without_the_file_the_scene_is_the_capture(tmp_path: Path) -> None:
    frame = map_frame(tmp_path, UP)
    assert frame.is_capture and frame.unit == 1
    assert np.allclose(frame.to_map(np.array([1.0, 2.0, 3.0])), [1, 2, 3])


def test_a_capture_that_is_not_z_up_is_turned(tmp_path: Path) -> None:
    """COLMAP with y down, as its dataparser has turned it: scene z = - capture y."""
    frame = map_frame(written(tmp_path, np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), (-6, 0.3, -54), 0.5), UP)
    assert not frame.is_capture
    assert_is_a_map(frame)
    capture = np.array([7.0, -20.0, 9.0])  # 20 up, as y is down
    scene = 0.5 * (np.array([7.0, 9.0, 20.0]) + (-6, 0.3, -54))
    assert np.allclose(frame.to_map(scene), [capture[0], capture[2], -capture[1]])


@pytest.mark.parametrize("degrees, own", [(10, True), (20, False)])
def test_up_is_the_captures_unless_the_tree_differs_much(tmp_path: Path, degrees: float, own: bool) -> None:
    written(tmp_path, np.eye(3), (0, 0, 0), 1.0)
    tree_up = turned(0, degrees) @ UP
    frame = map_frame(tmp_path, tree_up)
    assert frame.is_capture == own
    assert_is_a_map(frame)
    assert np.allclose(frame.axes[2], UP if own else tree_up)
    assert np.allclose(frame.axes[0], EAST), "the tilt was about the east axis"
    assert np.allclose(map_frame(tmp_path, tree_up, "capture").axes, np.eye(3))
    level = map_frame(tmp_path, tree_up, "tree")
    assert np.allclose(level.axes[2], tree_up) and not level.is_capture


def test_east_is_found_where_the_captures_x_axis_is_up(tmp_path: Path) -> None:
    frame = map_frame(written(tmp_path, np.eye(3), (0, 0, 0), 1.0), EAST)
    assert_is_a_map(frame)
    assert np.allclose(frame.axes, [NORTH, UP, EAST])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"scale": 1}', '{"transform": [[1, 0, 0, 0]], "scale": 1}']
    + [json.dumps({"transform": np.eye(4)[:3].tolist(), "scale": scale}) for scale in (0, -1, None)]
    + [json.dumps({"transform": (2 * np.eye(4)[:3]).tolist(), "scale": 1})],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / TRANSFORMS).write_text(content)
    with pytest.raises(InputError, match=f"{TRANSFORMS} cannot be read"):
        map_frame(tmp_path, UP)
