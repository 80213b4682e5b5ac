"""PLY files are read whole, in double precision, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_capture import points, write_ply

from infnerf_ns.data.capture.point_cloud import read_ply
from infnerf_ns.errors import InputError


def binary(path: Path, xyz: np.ndarray, order: str = "<", rgb: np.ndarray | None = None) -> None:
    kind = [("xyz", f"{order}f8", 3)] + ([] if rgb is None else [("rgb", "u1", 3)])
    table = np.zeros(len(xyz), kind)
    table["xyz"] = xyz
    colours = ""
    if rgb is not None:
        table["rgb"] = rgb
        colours = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    coordinates = "".join(f"property double {axis}\n" for axis in "xyz")
    form = "binary_little_endian" if order == "<" else "binary_big_endian"
    head = f"ply\nformat {form} 1.0\nelement vertex {len(xyz)}\n{coordinates}{colours}end_header\n"
    path.write_bytes(head.encode() + table.tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
def test_binary(tmp_path: Path, order: str) -> None:
    xyz = points() + np.array([452300.25, 4512345.5, 312.0])
    rgb = np.random.default_rng(0).integers(0, 256, (60, 3))
    binary(tmp_path / "a.ply", xyz, order, rgb)
    cloud = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.xyz, xyz)
    np.testing.assert_array_equal(cloud.rgb, rgb)
    binary(tmp_path / "b.ply", xyz, order)
    assert read_ply(tmp_path / "b.ply").rgb is None


def test_text(tmp_path: Path) -> None:
    write_ply(tmp_path / "a.ply", points())
    cloud = read_ply(tmp_path / "a.ply")
    np.testing.assert_allclose(cloud.xyz, points(), atol=1e-7)
    assert (cloud.rgb == 128).all()


def test_equal_points_of_a_mesh_stay_apart(tmp_path: Path) -> None:
    rows = ["0 0 0", "1 0 0", "0 1 0", "0 0 0"]
    head = ["ply", "format ascii 1.0", "element vertex 4", *(f"property float {axis}" for axis in "xyz")]
    head += ["element face 1", "property list uchar int vertex_indices", "end_header"]
    (tmp_path / "a.ply").write_text("\n".join([*head, *rows, "3 0 1 2", ""]))
    assert read_ply(tmp_path / "a.ply").xyz.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("form", ["binary", "text"])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, points()) if form == "text" else binary(path, points())
    whole = path.read_bytes()
    last = len(whole.rstrip()) - len(b"128") if form == "text" else len(whole) - 1
    for length in [*range(0, last, len(whole) // 61), last]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="a.ply are damaged"):
            read_ply(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"vertex 60", b"vertex 1000000000000", "promises 1000000000000 points, which need more than"),
        (b"vertex 60", b"vertex -3", "has '-3' for the number"),
        (b"element vertex", b"element corner", "names no vertices"),
        (b"end_header", b"end_heading", "has no PLY header"),
        (b"ply\n", b"nothing\n", "has no PLY header"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(tmp_path: Path, old: bytes, new: bytes, expected: str) -> None:
    path = tmp_path / "a.ply"
    write_ply(path, points())
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(InputError, match=expected):
        read_ply(path)


def test_no_points_and_no_file(tmp_path: Path) -> None:
    write_ply(tmp_path / "a.ply", points()[:0])
    assert len(read_ply(tmp_path / "a.ply").xyz) == 0
    with pytest.raises(InputError, match="the points .*b.ply: there is no such file"):
        read_ply(tmp_path / "b.ply")
