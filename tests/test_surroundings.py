"""What commands find around them: outputs that cannot print everything, no place for compiled kernels, warnings."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numba
import pytest
from tiny_trainer import tiny_config

import infnerf_ns
from infnerf_ns import surroundings
from infnerf_ns.errors import InputError
from infnerf_ns.kernels import numba_cache

_NERFSTUDIO = """
import sys
sys.argv = {}
import infnerf_ns
print("\\N{{PARTY POPPER}} Training Finished \\N{{BOX DRAWINGS LIGHT HORIZONTAL}}")
"""


def printed(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """A process of that ``sys.argv`` that imports the package, as nerfstudio does, and prints as nerfstudio does."""
    return subprocess.run(
        [sys.executable, "-c", _NERFSTUDIO.format(arguments)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("program", ["/usr/bin/ns-train", "/lib/nerfstudio/scripts/train.py"])
def test_an_output_that_knows_no_emoji_gets_question_marks(encoding: str, program: str) -> None:
    """Regression: every training ended in a UnicodeEncodeError, at its very end."""
    found = printed([program], PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (found.returncode, found.stdout, found.stderr) == (0, b"? Training Finished ?\n", b"")


def test_other_outputs_and_other_programs_stay_as_they_are() -> None:
    found = printed(["ns-train"], PYTHONIOENCODING="utf-8")
    assert found.stdout.decode() == "\N{PARTY POPPER} Training Finished ─\n"
    found = printed(["my-program"], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert found.returncode == 1 and b"UnicodeEncodeError" in found.stderr


@pytest.mark.parametrize("stream", [None, io.BytesIO(), io.StringIO()])
def test_outputs_that_are_no_text_files_are_left_alone(monkeypatch: pytest.MonkeyPatch, stream: object) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    surroundings.prepare_process()


def test_what_no_user_can_act_on_is_silent_and_everything_else_is_said() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.resetwarnings()
        surroundings.prepare_process()
        module = "nerfstudio.engine.trainer"
        scaler = "`torch.cuda.amp.GradScaler(args...)` is deprecated. Please use another."
        warnings.warn_explicit(scaler, FutureWarning, "trainer.py", 137, module)
        warnings.warn_explicit(scaler, FutureWarning, "mine.py", 1, "mine")
        warnings.warn_explicit("The disk is nearly full", UserWarning, "trainer.py", 1, module)
    assert [str(each.message) for each in said] == [scaler, "The disk is nearly full"]


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        (
            "import pathlib; pathlib.Path('/dev/full').write_text('x')",
            "infnerf: what was computed cannot be written (No space left on device)",
        ),
        ("raise OSError(30, 'Read-only file system', 'out.mp4')", "infnerf: out.mp4 cannot be written (Read-only"),
        ("open('no such file')", "FileNotFoundError: [Errno 2]"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_command_that_cannot_write_its_results_ends_with_one_line(fault: str, ending: str) -> None:
    script = f"from infnerf_ns.surroundings import say_disk_errors\nsay_disk_errors()\n{fault}\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert lines[-1].startswith(ending)
    assert len(lines) == 1 or not ending.startswith("infnerf")


def test_only_a_training_of_ours_is_ended_by_our_line_before_it_begins() -> None:
    code = "import signal, sys; sys.argv = {}; import infnerf_ns; print(signal.getsignal(15) == signal.SIG_DFL)"
    for arguments, untouched in ((["ns-train", "infnerf-small"], b"False\n"), (["ns-train", "nerfacto"], b"True\n")):
        found = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, timeout=120)
        assert found.stdout == untouched, found.stderr


# -- numba's cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """numba finds no folder; the temporary folder is another one. Returns it."""

    def njit(**settings: object) -> object:
        def refuse(function: object) -> None:
            if not numba.config.CACHE_DIR:
                raise RuntimeError("cannot cache function: no locator available for file")

        return refuse

    monkeypatch.setattr(numba, "njit", njit)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_kernels_are_kept_in_a_temporary_folder_of_ones_own(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numba_cache.require_cache_folder()
    folder = Path(numba.config.CACHE_DIR)
    assert folder == nowhere / f"infnerf-numba-{os.getuid()}" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    said = capsys.readouterr().err
    assert (
        said.startswith(f"infnerf: warning: compiled kernels are kept in {folder}, as neither") and "a minute" in said
    )
    numba.config.CACHE_DIR = ""
    numba_cache.require_cache_folder()
    assert Path(numba.config.CACHE_DIR) == folder, "the next start finds them"


def test_a_folder_that_others_may_write_is_not_used(nowhere: Path) -> None:
    """What is loaded from it is executed."""
    planted = nowhere / f"infnerf-numba-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    numba_cache.require_cache_folder()
    folder = Path(numba.config.CACHE_DIR)
    assert folder != planted and folder.parent == nowhere and stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_is_not_followed(nowhere: Path) -> None:
    (nowhere / "mine").mkdir(mode=0o700)
    (nowhere / f"infnerf-numba-{os.getuid()}").symlink_to(nowhere / "mine")
    numba_cache.require_cache_folder()
    assert Path(numba.config.CACHE_DIR).parent == nowhere and not list((nowhere / "mine").iterdir())
    assert Path(numba.config.CACHE_DIR).name != f"infnerf-numba-{os.getuid()}"


def test_no_temporary_folder_either_is_one_line(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(
        InputError, match="no folder for compiled kernels can be written .*: set NUMBA_CACHE_DIR to one"
    ):
        numba_cache.require_cache_folder()


def test_a_folder_that_numba_finds_is_left_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = numba.config.CACHE_DIR
    numba_cache.require_cache_folder()
    assert numba.config.CACHE_DIR == before and capsys.readouterr().err == ""


def _without_power() -> None:
    """In a child of root, before its program starts: permissions hold for it as for everybody."""
    drop_from_bounding_set, dac_override, dac_read_search = 24, 1, 2  # prctl.h, capability.h
    if os.getuid() == 0:
        for capability in (dac_override, dac_read_search):
            if ctypes.CDLL(None, use_errno=True).prctl(drop_from_bounding_set, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "root's capabilities cannot be dropped here")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="drops the capabilities of Linux's root")
def test_kernels_run_from_a_read_only_installation_without_a_home(tmp_path: Path) -> None:
    """Regression: numba's "no locator available" ended every command at its import."""
    source, package, home = Path(infnerf_ns.__file__).parent, tmp_path / "package", tmp_path / "home"
    shutil.copytree(source, package / "infnerf_ns", ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    for folder in (home, *(each for each in package.rglob("*") if each.is_dir())):
        folder.chmod(0o555)
    (tmp_path / "tmp").mkdir()
    code = (
        "import infnerf_ns, torch; from infnerf_ns.kernels import frames; print(infnerf_ns.__file__);"
        "print(frames.affine(torch.ones(4, 3), torch.zeros(3), torch.eye(3), 1.0).sum().item())"
    )
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(package)}
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        preexec_fn=_without_power,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{package}/infnerf_ns/__init__.py\n24.0\n"
    assert found.stderr.count("infnerf: warning: compiled kernels are kept in") == 1
    kept = tmp_path / "tmp" / f"infnerf-numba-{os.getuid()}"
    assert list(kept.rglob("*.nbc")), "they are there for the next start"


def test_mixed_precision_is_spoken_of_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet_writers: None
) -> None:
    """nerfstudio tells everybody on a CPU that it is off."""
    for asked in (False, True):
        tiny_config(tmp_path, mixed_precision=asked).setup()
        said = capsys.readouterr().out
        assert ("Mixed precision is disabled" in said) == asked and "Saving checkpoints to" in said
