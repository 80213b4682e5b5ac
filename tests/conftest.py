"""Settings for all tests: one thread, fixed seeds and examples, so that a test does the same on every machine."""

import os

os.environ.setdefault("NUMBA_NUM_THREADS", "4")  # the most that a test can ask for; read when numba is imported

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import numba
import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this when it is imported and when a kernel
# is defined, so it must be set before the first import of either; torch imports Triton only when it needs it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
hypothesis.settings.register_profile("infnerf", derandomize=True, deadline=None)
hypothesis.settings.load_profile("infnerf")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state and on one thread."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    numba.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """A real run of the demo scene, for all end-to-end tests."""
    from commands import trained_run

    return trained_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def packed(trained) -> Path:  # noqa: ANN001
    """The folder of that run, packed once by the real infnerf-pack; only to be read."""
    from commands import Running

    Running(["infnerf-pack", trained.folder], trained.workplace.logs / "pack").wait().succeeded()
    return trained.folder.with_name(f"{trained.folder.name}-packed")


@pytest.fixture
def quiet_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """nerfstudio's writers are process-wide: this run's must not see an earlier run's."""
    from nerfstudio.utils import writer

    monkeypatch.setattr(writer, "EVENT_WRITERS", [])
    monkeypatch.setattr(writer, "EVENT_STORAGE", [])
    monkeypatch.setattr(writer, "GLOBAL_BUFFER", {})


_TABLES = pytest.StashKey[dict[str, dict[str, Sequence[str]]]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``report(title, columns, first, *others)`` adds a row to a table that is printed at the end of pytest's output; a
    row with the same first entry is replaced."""
    tables = request.config.stash.setdefault(_TABLES, {})

    def add(title: str, columns: Sequence[str], first: str, *others: str) -> None:
        tables.setdefault(title, {"": columns})[first] = (first, *others)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables."""
    for title, rows in config.stash.get(_TABLES, {}).items():
        terminalreporter.section(title)
        widths = [max(len(row[column]) for row in rows.values()) for column in range(len(rows[""]))]
        for row in rows.values():
            terminalreporter.write_line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
