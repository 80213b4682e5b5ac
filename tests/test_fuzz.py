"""No damaged or hostile file ends in a silent wrong result, a hang, a traceback or gigabytes of memory; and the harness
that says so sees all of them. The mutations are in fuzz.py; a table is printed at the end of pytest's output."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest

from infnerf_ns.errors import InputError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness needs fork(), which this system lacks")


@pytest.mark.slow
def test_mutated_files_end_well(tmp_path: Path, report: Callable[..., None]) -> None:
    """In a program of its own, which has no threads when it forks."""
    results = tmp_path / "results.json"
    run = subprocess.run(
        [sys.executable, Path(fuzz.__file__), "--json", results], capture_output=True, text=True, cwd=tmp_path
    )
    assert results.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    found = [fuzz.Result(**each) for each in json.loads(results.read_text())]
    head, *rows = fuzz.table(found)
    for row in rows:
        report("mutated files", head, *row)
    wrong = [
        f"{each.kind} {each.number}: {each.outcome}: {each.what}: {each.detail[-200:]}" for each in found if each.wrong
    ]
    assert not wrong, "\n".join(wrong)
    assert all(int(row[1]) == fuzz.COUNT for row in rows) and len(rows) > 20


def _refuse(message: str) -> None:
    raise InputError(message)


def _take_memory() -> int:
    """Pages of their own: an array may lie in memory that the tests before have freed, which is resident already."""
    with mmap.mmap(-1, 128 << 20) as pages:
        pages[:: mmap.PAGESIZE] = b"1" * (len(pages) // mmap.PAGESIZE)
        return int(pages[:1])


def _execute(folder: Path) -> int:
    (folder / "executed").touch()
    return 1


@pytest.mark.parametrize(
    ("outcome", "wrong", "read"),
    [
        ("same", False, lambda folder: 1),
        ("other", True, lambda folder: 2),
        ("line", False, lambda folder: _refuse("the file is damaged: copy it again")),
        ("lines", True, lambda folder: _refuse("x" * 5000)),
        ("traceback", True, lambda folder: {}["no such key"]),
        ("traceback", True, lambda folder: os.write(1, b"Traceback (most recent call last):\n") and 2),
        ("crash", True, lambda folder: os.kill(os.getpid(), signal.SIGKILL)),
        ("hang", True, lambda folder: time.sleep(60)),
        ("memory", True, lambda folder: np.zeros(10**12)),
        ("memory", True, lambda folder: _take_memory()),
        ("executed", True, _execute),
    ],
)
def test_the_harness_sees_it(
    outcome: str, wrong: bool, read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    monkeypatch.setattr(fuzz, "MEMORY", 100 << 20)
    (tmp_path / "file").write_text("whole")

    def mutate(rng: random.Random, data: bytes) -> fuzz.Mutation:
        return fuzz.Mutation("cut", data[:2], may_differ=False)

    kind = fuzz.Kind("text", lambda: [tmp_path / "file"], lambda: read(tmp_path), mutate)
    result = fuzz.run_mutation(kind, 0, 1, fuzz.Workshop(tmp_path))
    assert (result.outcome, result.wrong) == (outcome, wrong), result
    assert (tmp_path / "file").read_text() == "whole"


def test_a_mutation_is_the_same_every_time(tmp_path: Path) -> None:
    """And nearly all of them change something."""
    data = bytes(range(256)) * 20
    one, other = ([fuzz.any_file(random.Random(f"kind {n}"), data) for n in range(300)] for _ in range(2))
    assert one == other
    assert sum(each.content == data for each in one) < 10
    assert {each.what.split(" ")[-1] for each in one if each.special} == {"place"}


def test_results_are_compared_number_by_number() -> None:
    whole = {"a": [np.arange(3.0), "text"], "b": 1.0}
    assert fuzz.difference(whole, {"a": [np.arange(3.0) + 1e-9, "text"], "b": 1.0}) is None
    assert fuzz.difference(whole, {"a": [np.arange(3.0) + 0.1, "text"], "b": 1.0}).startswith(".a.0")
    assert fuzz.difference(whole, {"a": [np.arange(4.0), "text"], "b": 1.0}) is not None
    assert fuzz.difference(whole, {"a": [np.arange(3.0), "text"]}) is not None
