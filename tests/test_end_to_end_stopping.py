"""Real commands that a signal ends in the middle of what they do: one line, the shell's exit code, nothing lost."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Running, Trained, Workplace

from infnerf_ns.training.checkpoints import is_whole, list_checkpoints
from infnerf_ns.training.stopping import exit_code

pytestmark = pytest.mark.slow
_SECONDS = 60.0
"""A hang, even on a machine that does much else."""


def stopped(running: Running, number: int, done: Callable[[], bool]) -> list[str]:
    """Sends a signal once ``done()``; the lines of ours after it."""
    running.wait_until(done)
    running.process.send_signal(number)
    finished = running.wait(_SECONDS)
    assert finished.code == exit_code(number), finished
    assert "Traceback" not in finished.out + finished.err, finished
    lines = (finished.out + "\n" + finished.err).splitlines()
    return [line for line in lines if line.startswith("infnerf: stop")]


@pytest.mark.parametrize(
    "number, printed",
    [(signal.SIGINT, "Saving config to"), (signal.SIGHUP, "Saving config"), (signal.SIGTERM, "root cube")],
)
def test_a_training_that_has_not_begun(tmp_path_factory: pytest.TempPathFactory, number: int, printed: str) -> None:
    place = Workplace(tmp_path_factory.getbasetemp() / "commands")
    name = f"before-{number}"
    running = Running(place.train(name), place.logs / name)
    assert stopped(running, number, lambda: printed in running.output()) == [
        "infnerf: stopped before training began; nothing to save"
    ]


def test_a_training_whose_terminal_is_closed_is_saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Regression: SIGHUP killed it without a save."""
    place = Workplace(tmp_path_factory.getbasetemp() / "commands")
    running = Running(place.train("hung-up", "--max-num-iterations", 100_000), place.logs / "hung-up")
    lines = stopped(running, signal.SIGHUP, lambda: "Step (% Done)" in running.output())
    folder = place.run_folder("hung-up")
    (checkpoint,) = list_checkpoints(folder / "nerfstudio_models")[:1]
    assert is_whole(checkpoint)
    assert lines[0].startswith("infnerf: stopping") and f"saved {checkpoint}; add --load-dir {folder}" in lines[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_map_keeps_its_tiles(trained: Trained, tmp_path: Path, number: int) -> None:
    """Regression: SIGINT ended it with 1, SIGTERM killed it."""
    output = tmp_path / "map.png"
    command = ["infnerf-ortho", trained.folder, "--output", output, "--width", 1500, "--tile", 64]
    running = Running(command, tmp_path / "log")
    lines = stopped(running, number, lambda: bool(list(tmp_path.glob(".map.png.tiles/*.npz"))))
    assert lines == ["infnerf: stopped; finished tiles are kept, the same command goes on with them"]
    assert list(tmp_path.glob(".map.png.tiles/*.npz")) and not output.exists()


@pytest.mark.parametrize(
    "number, command, printed",
    [
        (signal.SIGINT, "ns-eval --load-config {config} --output-path {out}/e.json", "Done loading"),
        (
            signal.SIGTERM,
            "ns-render dataset --load-config {config} --output-path {out}/renders",
            "Done loading",
        ),
        (signal.SIGHUP, "ns-viewer --load-config {config} --viewer.websocket-port 7961", "Done loading"),
        (signal.SIGTERM, "infnerf-inspect {run} --photo 0 1 2 3 4 5 6 7", "Octree of"),
        (signal.SIGINT, "infnerf-bench nodes --levels 1 --steps 100000", "Octree of"),
    ],
)
def test_everything_else_ends_where_it_is(
    trained: Trained, tmp_path: Path, number: int, command: str, printed: str
) -> None:
    places = {"config": trained.config, "run": trained.folder, "out": tmp_path}
    running = Running([part.format(**places) for part in command.split()], tmp_path / "log")
    assert stopped(running, number, lambda: printed in running.output()) == ["infnerf: stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_imports_of_an_own_command(tmp_path: Path, number: int) -> None:
    """The first is torch's, of seconds."""
    code = "import sys; print('begun', flush=True); from infnerf_ns.cli import scripts; scripts.ortho()"
    spied = f"import builtins; {code}".replace("scripts.ortho()", "print('ready', flush=True); scripts.ortho()")
    running = Running(["python", "-c", spied, "--help"], tmp_path / "log")
    running.wait_until(lambda: "ready" in running.output())
    assert stopped(running, number, lambda: _imports_torch(running)) == ["infnerf: stopped"]


def _imports_torch(running: Running) -> bool:
    """Whether the process has mapped a library of torch's."""
    maps = Path(f"/proc/{running.process.pid}/maps")
    return not maps.exists() or "libtorch" in maps.read_text()
