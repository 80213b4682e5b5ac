"""infnerf-bench losses, on a clock by which a step takes three seconds."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_capture import write_capture

from infnerf_ns.cli import bench_quality
from infnerf_ns.cli.bench_losses import ROWS, Losses, changes_of, method_of
from infnerf_ns.cli.bench_quality import Quality
from infnerf_ns.errors import InputError
from infnerf_ns.objective import NAMES


@pytest.fixture(autouse=True)
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr(bench_quality, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_every_loss_has_a_row_that_can_be_trained(tmp_path: Path) -> None:
    named = {key.rpartition(".")[2] for settings in ROWS.values() for key in settings}
    assert set(NAMES) - {"proposal"} <= named, "without the proposal loss there is no training"
    write_capture(tmp_path)
    for name in ROWS:
        method = method_of("infnerf", name)
        config = Quality(tmp_path, methods=(method,))._config(method)
        assert config.pipeline.check() == [] and (method != "infnerf" or name == "preset"), name


def test_losses_are_compared_with_what_they_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_capture(tmp_path / "data")
    output = tmp_path / "losses"
    Losses(tmp_path / "data", "infnerf-small", ("sparsity", "ssim"), 0.05, pixels=50, output=output).main()
    rows = _rows(output.with_suffix(".csv"))
    names = ["preset", "sparsity", "patches", "ssim"]
    assert [(row["row"], row["seed"]) for row in rows] == [(name, seed) for seed in ("42", "43") for name in names]
    change = {name: float(changes[:, 0].mean()) for name, _, changes in changes_of(rows)}

    def mean(name: str) -> float:
        return float(np.mean([float(row["psnr_1"]) for row in rows if row["row"] == name]))

    assert change["preset"] == pytest.approx(mean("preset"))
    assert change["sparsity"] == pytest.approx(mean("sparsity") - mean("preset"))
    assert change["ssim"] == pytest.approx(mean("ssim") - mean("patches"))
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("│ preset"))
    assert "+" not in row and "-" not in row, "the preset itself"
    row = next(line for line in printed.splitlines() if line.startswith("│ ssim"))
    assert row.count("+") + row.count("-") >= sum(name.startswith("psnr_") for name in rows[0]), "changes"
    with pytest.raises(InputError, match="--rows nonsense: there are preset, without distortion"):
        Losses(tmp_path / "data", rows=("nonsense",)).main()
    with pytest.raises(InputError, match="--seeds: name at least one, and each only once"):
        Losses(tmp_path / "data", seeds=(42, 42)).main()
    with pytest.raises(InputError, match="--preset nerfacto: there are infnerf"):
        Losses(tmp_path / "data", preset="nerfacto").main()
