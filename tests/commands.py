"""Runs the real ns-* commands, as a user does, on a village in tiny photos.

Every command takes about ten seconds to import torch and nerfstudio; `run_all` therefore runs two at a time, each on
one thread, which also makes a training reproducible to the last bit.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

STEPS = 700
"""Of every training. Enough for held-out renders that are closer to their photos than any constant image."""
STEPS_PER_SAVE = 50
TOWN = {"size": 1, "num_photos": 160, "image_width": 64, "image_height": 48, "supersampling": 2, "eval_interval": 8}
"""Options of the demo scene: 140 photos to train on, 20 held out."""
_TIMEOUT = 600.0


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    command: tuple[str, ...]
    code: int
    out: str
    err: str

    def succeeded(self) -> Finished:
        """Itself; fails the test if the exit code is not 0."""
        assert self.code == 0, f"{self}\nended with exit code {self.code}"
        return self

    def refusal(self) -> str:
        """The one line of ours on stderr, its last, with which a command refuses its input."""
        assert self.code == 1, f"{self}\nended with exit code {self.code}"
        assert "Traceback" not in self.out + self.err, self
        lines = self.err.strip().splitlines()
        assert [line for line in lines if line.startswith("infnerf: ")] == lines[-1:], self
        return lines[-1]

    def __str__(self) -> str:
        return "\n".join([" ".join(self.command), self.out[-3000:], self.err[-3000:]])


class Running:
    """A command under way; its output goes to files, so that it never waits for a reader."""

    def __init__(self, command: Iterable[object], log: Path) -> None:
        self.command = tuple(map(str, command))
        log.parent.mkdir(parents=True, exist_ok=True)
        self._files = (log.with_suffix(".out"), log.with_suffix(".err"))
        program = Path(sys.executable).parent / self.command[0]
        with open(self._files[0], "wb") as out, open(self._files[1], "wb") as err:
            self.process = subprocess.Popen(
                [program, *self.command[1:]],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=_environment(),
                preexec_fn=_as_from_a_terminal,
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text(errors="replace")

    def wait(self, timeout: float = _TIMEOUT) -> Finished:
        """Wait for its end; it is killed, and the test fails, when that takes too long."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{' '.join(self.command)}\ntook more than {timeout:.0f} s\n{self.output()[-3000:]}")
        out, err = (file.read_text(errors="replace") for file in self._files)
        return Finished(self.command, code, out, err)

    def wait_until(self, done: Callable[[], bool], timeout: float = _TIMEOUT) -> None:
        """Wait until ``done()``; the test fails if the command ends before."""
        end = time.monotonic() + timeout
        while not done():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{self.kill()}\ncame to no good")
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> Finished:
        """Send it a signal and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()


def run_all(commands: dict[str, Iterable[object]], logs: Path) -> dict[str, Finished]:
    """Runs named commands, two at a time; their output is kept in ``logs``."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = {name: pool.submit(_run, command, logs / name) for name, command in commands.items()}
        return {name: future.result() for name, future in pending.items()}


def _run(command: Iterable[object], log: Path) -> Finished:
    return Running(command, log).wait()


@dataclass(frozen=True)
class Workplace:
    """A folder with a demo scene and trainings on it."""

    folder: Path

    @property
    def logs(self) -> Path:
        """Where the commands' outputs are kept."""
        return self.folder / "logs"

    @property
    def town_cache(self) -> Path:
        """Where the demo scene is kept."""
        return self.folder / "town"

    def run_folder(self, name: str) -> Path:
        """Where the training ``name`` writes to."""
        return self.folder / "outputs" / name / "infnerf-small" / "run"

    def train(self, name: str, *flags: object) -> list[object]:
        """The command of a training; all trainings have the same settings."""
        town = [part for key, value in TOWN.items() for part in (f"--{key.replace('_', '-')}", value)]
        settings: dict[str, object] = {
            "output-dir": self.folder / "outputs",
            "experiment-name": name,
            "timestamp": "run",
            "vis": "tensorboard",
            "logging.steps-per-log": 1,
            "max-num-iterations": STEPS,
            "steps-per-save": STEPS_PER_SAVE,
            "steps-per-eval-batch": 40,
            "steps-per-eval-image": 200,
            "pipeline.datamanager.train-num-rays-per-batch": 512,
            "pipeline.datamanager.eval-num-rays-per-batch": 512,
            "pipeline.model.octree.max-level": 2,
            "pipeline.model.octree.level-start-steps": 60,
            "pipeline.model.sampler.anneal-steps": 60,
        }
        given = [part for key, value in settings.items() for part in (f"--{key}", value)]
        return ["ns-train", "infnerf-small", *given, *flags, "infnerf-demo", *town, "--cache-dir", self.town_cache]


@dataclass(frozen=True)
class Trained:
    """The finished training that most tests look at."""

    workplace: Workplace
    finished: Finished

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.workplace.run_folder("whole")

    @property
    def config(self) -> Path:
        """What ``--load-config`` takes."""
        return self.folder / "config.yml"


@functools.cache
def trained_run(session_folder: Path) -> Trained:
    """Trains once per test session (``tmp_path_factory.getbasetemp()``), whichever test asks first."""
    workplace = Workplace(session_folder / "commands")
    finished = Running(workplace.train("whole"), workplace.logs / "whole").wait().succeeded()
    return Trained(workplace, finished)


def _as_from_a_terminal() -> None:
    """The tests may have been started with nohup, which their commands would inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _environment() -> dict[str, str]:
    """One thread, no GPU, lines that are not wrapped."""
    fixed = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "500"}
    return {**os.environ, **fixed, "TERM": "dumb", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
