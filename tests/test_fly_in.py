"""The flight from orbit height down to a photo: where it starts, how it moves, how it ends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infnerf_ns.cli.bench_flyin import Flyin
from infnerf_ns.cli.fly_in_path import between, fly_in
from infnerf_ns.errors import InputError

UP = torch.tensor([0.0, 0.0, 1.0])
TARGET = torch.tensor([3.0, -2.0, 0.5])


def photo(down: float, roll: float) -> Tensor:
    """A pose 0.4 from the target: so many degrees below the horizon, turned by so many about its view."""
    down, roll = math.radians(down), math.radians(roll)
    backward = torch.tensor([0.0, -math.cos(down), math.sin(down)])
    right = torch.tensor([1.0, 0.0, 0.0])
    above = torch.linalg.cross(backward, right)
    turned = math.cos(roll) * right + math.sin(roll) * above
    return torch.stack([turned, torch.linalg.cross(backward, turned), backward, TARGET + 0.4 * backward], dim=1)


@pytest.mark.parametrize("down, roll", [(0, 0), (10, 3), (45, -20), (89.9, 0), (20, 88), (20, 90), (5, 180)])
def test_every_pose_is_one_and_looks_at_the_target(down: float, roll: float) -> None:
    end = photo(down, roll)
    path = fly_in(end, 0.4, UP, orbit=100.0, frames=9)
    assert torch.isfinite(path).all()
    rotation = path[:, :, :3]
    assert torch.allclose(rotation @ rotation.transpose(1, 2), torch.eye(3).expand(9, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(9), atol=1e-5)
    away = path[:, :, 3] - TARGET
    assert torch.allclose(away / away.norm(dim=1, keepdim=True), path[:, :, 2], atol=1e-4)
    ratios = away.norm(dim=1)[1:] / away.norm(dim=1)[:-1]
    assert torch.allclose(ratios, ratios[:1].expand(8), rtol=1e-3), "in powers of one number"
    assert torch.allclose(path[-1], end, atol=1e-4)


@pytest.mark.parametrize("down, roll", [(0, 0), (45, -20), (89.9, 0), (5, 180)])
def test_it_starts_straight_above(down: float, roll: float) -> None:
    path = fly_in(photo(down, roll), 0.4, UP, orbit=100.0, frames=5)
    assert path[0, 2, 3] > 0.9 * 100


def test_a_small_step_is_a_share_of_the_way() -> None:
    one, other = photo(10, 0), photo(12, 4)
    step = between(one, other, 0.01)
    assert torch.allclose(step[:, 3] - one[:, 3], 0.01 * (other[:, 3] - one[:, 3]), atol=1e-6)
    assert torch.allclose(step[:, :3] @ step[:, :3].T, torch.eye(3), atol=1e-6)
    assert torch.allclose(between(one, other, 0.0), one, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frames": 1}, "--frames 1: give 2 or more"),
        ({"camera_path": "nowhere.json"}, "nowhere.json: there is no such file"),
        ({"camera_path": "path.json", "frames": 9}, "--frames 9: --camera-path says that; leave it out"),
        ({"camera_path": "path.json", "photo": 0}, "--photo 0: --camera-path says that"),
        ({"output": "path.json"}, "path.json: cannot be written"),
        ({"output": "photos"}, "photos: the folder holds other files; choose another"),
    ],
)
def test_what_cannot_be_flown_is_one_line_and_nothing_is_lost(tmp_path: Path, options: dict, message: str) -> None:
    (tmp_path / "path.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0001.png").write_text("somebody's")
    for name in {"camera_path", "output"} & set(options):
        options = {**options, name: tmp_path / options[name]}
    with pytest.raises(InputError, match=message):
        Flyin(**{"run": tmp_path, "output": tmp_path / "flight", **options}).main()
    assert (tmp_path / "photos" / "0001.png").read_text() == "somebody's"


def test_frames_of_an_older_longer_flight_go(tmp_path: Path) -> None:
    (tmp_path / "flight").mkdir()
    for name in ("0000.png", "0071.png", "note.txt"):
        (tmp_path / "flight" / name).write_text("")
    (tmp_path / "flight.csv").write_text("frame")
    Flyin(tmp_path, output=tmp_path / "flight")._check()
    assert [path.name for path in (tmp_path / "flight").iterdir()] == ["note.txt"]
