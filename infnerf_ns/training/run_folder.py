"""The folder that a training writes into is its own: no other run's checkpoints are in it, and no other training.

A training deletes the checkpoints that it does not keep. So a second one with the same ``--timestamp`` would delete a
finished run, and two at once each other's files. While a training runs it holds a lock on a file in the folder; the
system gives it back when the process ends, however it ends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from nerfstudio.engine.trainer import TrainerConfig

from infnerf_ns.errors import InputError
from infnerf_ns.training.checkpoints import list_checkpoints
from infnerf_ns.validation import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".training.lock"
"""Name of the file in a run's folder."""


def require_own_folder(config: TrainerConfig) -> Path:
    """Ends with one line if the folder of a training cannot be written, or holds checkpoints that it does not resume.

    Args:
        config: of the training.

    Returns:
        The folder, which is there.

    Raises:
        InputError: it cannot, or does.
    """
    folder = config.get_base_dir()
    problem = _write_problem(folder)
    if problem is not None:
        raise InputError(f"the folder of the run, {folder}, cannot be written ({problem}): choose another --output-dir")
    held = list_checkpoints(folder / config.relative_model_dir)
    if held and not _resumes_into(config, folder):
        raise InputError(
            f"{folder} holds a run already ({held[0].name}), which this training would delete: leave out --timestamp or"
            f" choose another one, or train that run on with --load-dir {folder}"
        )
    return folder


def inner_folder_problems(config: TrainerConfig, prefix: str = "--") -> list[str]:
    """Folders of a run that are not within it. A run is moved, copied and packed as one folder, and one of a stranger
    must not name files elsewhere.

    Args:
        config: of the run.
        prefix: before the settings' names.
    """
    folders = {
        "relative-model-dir": config.relative_model_dir,
        "logging.relative-log-dir": config.logging.relative_log_dir,
    }
    return [
        f"{prefix}{name} {folder}: allowed is a folder within the run's, without '..'"
        for name, folder in folders.items()
        if Path(folder).is_absolute() or ".." in Path(folder).parts
    ]


def _resumes_into(config: TrainerConfig, folder: Path) -> bool:
    """Whether what the training starts from is in its own folder."""
    start = config.load_dir or config.load_checkpoint
    if start is None:
        return False
    start, own = start.resolve(), folder.resolve()
    return start == own or own in start.parents


def _write_problem(folder: Path) -> Optional[str]:
    """Why nothing can be written into a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(_open_lock(folder))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _open_lock(folder: Path) -> int:
    """The descriptor of the lock's file; a link in its place, in a folder that a stranger has made, is no such file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(folder / LOCK, flags, 0o666)


class FolderLock:
    """Holds a folder for this process, from `acquire` to `release` or the end of the process.

    Args:
        folder: of a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: Optional[int] = None

    def acquire(self) -> None:
        """Takes the lock. Where the file system knows no locks, a warning says so.

        Raises:
            InputError: another training holds it.
        """
        if self._descriptor is not None:
            return
        descriptor = _open_lock(self.folder)
        try:
            if fcntl is None:
                raise OSError("this system has no file locks")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"another training is writing into {self.folder}: wait for its end, or choose another --timestamp"
            ) from error
        except OSError as error:
            os.close(descriptor)
            warn(
                f"{self.folder} cannot be locked ({error.strerror or error}): start no other training that writes into"
                " it"
            )
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Gives the lock back; nothing where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
