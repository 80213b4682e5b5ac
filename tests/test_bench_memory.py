"""infnerf-bench memory: the views show what they are called, and a view takes no more than it uses."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_bench_scaling import TINY

from infnerf_ns.cli.bench_memory import Memory
from infnerf_ns.cli.bench_views import VIEWS, TownViews, view_camera
from infnerf_ns.data.demo_dataparser import METRES_PER_UNIT
from infnerf_ns.data.demo_scene.town import build_town
from infnerf_ns.errors import InputError
from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE

STREET, ROOF, ABOVE = range(len(VIEWS))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_view_from_above_shows_the_whole_town(size: int) -> None:
    pose, half = TownViews(size, 0).poses[ABOVE], build_town(size, 0).half_side / METRES_PER_UNIT
    camera = view_camera(pose, 960, 540)
    local = (np.array([[x, y, 0.0] for x in (-half, half) for y in (-half, half)]) - pose[:, 3]) @ pose[:, :3]
    focal = float(camera.fx[0, 0])
    right, down = focal * local[:, 0] / -local[:, 2], focal * local[:, 1] / local[:, 2]
    assert (local[:, 2] < 0).all() and (np.abs(right) < 480).all() and (np.abs(down) < 270).all()
    assert np.ptp(right) > 480, "and is not lost in it"


def test_the_views_stand_where_they_are_said_to() -> None:
    for size in (1, 2, 8):
        height = [pose[2, 3] * METRES_PER_UNIT for pose in TownViews(size, 0).poses]
        assert 1.5 < height[STREET] < 3 and 6 < height[ROOF] < 30 and height[ABOVE] > 40 * size


@pytest.mark.slow
def test_a_town_is_trained_packed_and_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUDGET_VARIABLE, "0.001")  # of no effect here
    preset, output = tmp_path / "tiny.yaml", tmp_path / "memory"
    preset.write_text(TINY)
    bench = Memory((1,), steps=4, rays=32, width=48, height=27, preset=str(preset), log2_table_size=8, output=output)
    bench.main()
    with open(output.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert [(row["area"], row["view"]) for row in rows] == [("1", view) for view in VIEWS]
    for row in rows:
        used, seen, nodes = (int(row[name]) for name in ("nodes_used", "nodes_in_view", "nodes"))
        assert 1 <= used <= seen <= nodes
        assert 1 <= int(row["nodes_of_surfaces"]) <= seen
        page = (float(row["model_mib"]) - float(row["resident_mib"])) / max(nodes - used, 1)
        assert float(row["share"]) == pytest.approx(float(row["resident_mib"]) / float(row["model_mib"]), abs=0.01)
        assert float(row["read_mib"]) == pytest.approx((used - 1) * page, abs=0.02), "what is used and nothing else"
    assert int(rows[0]["nodes"]) > 1
    assert Image.open(tmp_path / "memory_views.png").size == (3 * 48, 27)
    assert Image.open(tmp_path / "memory.png").size[0] > 300


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": (2, 1)}, "--sizes 2 1: give rising numbers"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"log2_table_size": 3}, "--log2-table-size 3: give 8 to 26"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_wrong_options_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Memory(**options).main()
