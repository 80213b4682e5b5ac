"""The own commands: their output, and their one-line errors. ``infnerf-picture`` on a real run: test_end_to_end.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from infnerf_ns.cli import bench, picture
from infnerf_ns.errors import InputError


def test_bench_prints_a_row_per_tree(capsys: pytest.CaptureFixture[str]) -> None:
    bench.Nodes(levels=(0, 1), rays=16, steps=2, warm_up=1).main()
    lines = capsys.readouterr().out.strip().splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("nodes"))
    assert [line.split()[0] for line in lines[header + 1 :]] == ["1", "9"]
    assert lines[header + 1].split()[-1] == "1.00"
    assert "16 rays per step" in " ".join(lines)


def test_picture_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a run's config.yml"):
        picture.Picture(load_config=tmp_path / "config.yml", output=tmp_path / "out.png").main()
