"""Checkpoint files: written atomically, checked before use, found from whatever path a user names.

The format is nerfstudio's, ``{step, pipeline, optimizers, schedulers, scalers}``, so that ns-eval, ns-render, ns-export
and ns-viewer load it, with one more key of our own, ``infnerf``. nerfstudio reads a step number out of *every* name in
the checkpoint folder; so the temporary file stands beside that folder, on the same file system, and never in it.
"""

import errno
import io
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from infnerf_ns.checkpoint_archive import damage, quick_damage, record_problem, tensors_of
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import file_problem
from infnerf_ns.validation import warn

KEPT_CHECKPOINTS = 2
"""With ``save_only_latest_checkpoint`` the two newest stay: should the newest be damaged, the one before is used."""

_NAME = re.compile(r"step-(\d+)\.ckpt")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""torch's name of the object that it refuses"""
MODEL = "_model."
"""Before the names of the model's tensors in a pipeline's state."""
_REQUIRED_KEYS = ("step", "pipeline", "optimizers")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of a step, named as nerfstudio names it."""
    return folder / f"step-{step:09d}.ckpt"


def checkpoint_step(path: Path) -> Optional[int]:
    """The step in a checkpoint's file name, None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, newest (highest step) first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    named = [(checkpoint_step(path), path) for path in folder.iterdir()]
    return [path for _, path in sorted((item for item in named if item[0] is not None), reverse=True)]


def is_whole(path: Path) -> bool:
    """A cheap test: torch writes zip files, whose table of contents stands at their end.

    Reads a few kilobytes whatever the file's size. Damaged numbers in its middle are found by `read_checkpoint`.
    """
    return quick_damage(path) is None


def whole_checkpoints(folder: Path, first: Optional[int] = None) -> list[Path]:
    """Checkpoints of a folder, newest first, without the damaged ones; a warning for each damaged one that is newer
    than all of them.

    All checksums of the first of them have been compared; the others pass `is_whole`.

    Args:
        folder: with the checkpoints.
        first: step whose checkpoint comes first, if there is one.
    """
    files = list_checkpoints(folder)
    files.sort(key=lambda path: checkpoint_step(path) != first)
    passed: list[tuple[Path, str]] = []
    while files:
        problem = damage(files[0])
        if problem is None:
            break
        passed.append((files.pop(0), problem))
    instead = f"{files[0].name} is used instead" if files else "there is none before it"
    for path, problem in passed:
        warn(f"the checkpoint {path} is damaged ({problem}); {instead}")
    return files[:1] + [path for path in files[1:] if is_whole(path)]


def write_checkpoint(state: dict[str, Any], path: Path, keep: Optional[int]) -> Optional[str]:
    """Write a checkpoint so that at any moment the folder holds only complete files; then delete the older ones.

    On a full disk the older ones but the newest of them go first, if they were going to, and it is tried once more: so
    there is always one that is whole.

    Args:
        state: what `torch.save` gets.
        path: final file; its folder is made if missing.
        keep: how many checkpoints stay, None for all: this one and the newest of earlier steps. Files of later steps
            are of another run in the same folder and go, too.

    Returns:
        None, or why it failed (disk full, no permission); a whole older checkpoint is then still there.
    """
    folder = path.parent.resolve()
    failure = _write(state, folder, path.name)
    if failure is not None and _is_full(failure) and keep is not None:
        spare = [file for file in list_checkpoints(folder) if file.name != path.name]
        spare.sort(key=lambda file: file.name > path.name)  # stable: newest first, those of later steps last
        newest_whole = next((file for file in spare if damage(file) is None), None)
        if newest_whole is not None and len(spare) > 1:
            warn(f"the disk is full: older checkpoints than {newest_whole} are deleted to make room for {path.name}")
            for file in spare:
                if file != newest_whole:
                    _delete(file)
            failure = _write(state, folder, path.name)
    if failure is not None:
        return _full_disk(state, folder) if _is_full(failure) else str(failure)
    if keep is not None:
        _delete_all_but(folder, path.name, keep)
    return None


class _NotingWriter(io.FileIO):
    """A file that keeps the error of a failed write: torch's zip writer turns it into "unexpected pos"."""

    error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        """All of it, or an error."""
        left = memoryview(data).cast("B")
        total = len(left)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
            raise
        return total


def _write(state: dict[str, Any], folder: Path, name: str) -> Optional[Exception]:
    """Writes a file and renames it to its place; what went wrong."""
    temporary = folder.parent / f".{name}.tmp"
    file: Optional[_NotingWriter] = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(".step-*.ckpt.tmp"):
            leftover.unlink()
        with _NotingWriter(temporary, "xb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports what the file has raised as a RuntimeError
        return (file and file.error) or error
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _full_disk(state: dict[str, Any], folder: Path) -> str:
    needed = sum(tensor.nbytes for _, tensor in tensors_of(state))
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return (
        f"the disk is full: a checkpoint needs {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free, or less"
        " by a quota"
    )


def require_space(folder: Path, checkpoints: Path, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Ends a training before its first step if none of its checkpoints could be written; a warning where one could, but
    no second beside it. (Quotas are not known.)

    Args:
        folder: of the run, which is there.
        checkpoints: where those of the run are, or will be.
        parameters: of the model; a checkpoint holds them and two moments of each.

    Raises:
        InputError: the disk is too full.
    """
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return
    if disk.total == 0:  # some network disks say nothing
        return
    # Older checkpoints make room for newer ones.
    spare = sum(path.stat().st_size for path in list_checkpoints(checkpoints)[1:])
    needed, free = 3 * sum(parameter.nbytes for parameter in parameters), disk.free + spare
    sizes = f"{free / 2**20:.0f} MiB are free in {folder}, and a checkpoint needs {needed / 2**20:.0f} MiB"
    if free < needed:
        raise InputError(f"{sizes}: make room, or choose another --output-dir")
    if free < 2 * needed:
        warn(f"{sizes}: once there is one, a second may not find room; make room, or choose another --output-dir")


def read_checkpoint(path: Path, mapped: bool = False) -> Optional[dict[str, Any]]:
    """Load a checkpoint on the CPU; None if it is damaged. What `torch.load` believes is compared with the file: all
    checksums, and the sizes of all tensors.

    Args:
        path: the file.
        mapped: its tensors stay in the file, and memory is only used for what is looked at.

    Raises:
        InputError: the file is whole but is not a checkpoint of a nerfstudio run.
    """
    if damage(path) is not None:
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        problem = record_problem(path, state)
        if problem is None and not mapped:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        raise InputError(
            f"{path} holds objects that are not safe to load ({found[1] if found else 'pickled code'}): it was not"
            " written by infnerf; name another checkpoint"
        ) from error
    except OSError:
        return None
    except Exception as error:  # the checksums are right, so whoever wrote it has written something else
        problem = type(error).__name__
    if problem is not None:
        raise InputError(f"{path} is not a checkpoint of ns-train ({problem}): name another checkpoint")
    if not isinstance(state, dict) or any(key not in state for key in _REQUIRED_KEYS):
        raise InputError(f"{path} is not a checkpoint of ns-train: it lacks {', '.join(_REQUIRED_KEYS)}")
    for key in ("pipeline", "optimizers"):
        if not isinstance(state[key], Mapping) or not all(isinstance(name, str) for name in state[key]):
            raise InputError(f"{path} is not a checkpoint of ns-train: its entry '{key}' holds no names")
    if type(state["step"]) is not int or not 0 <= state["step"] < 2**31:
        raise InputError(f"{path} is not a checkpoint of ns-train: its step is {str(state['step'])[:40]}")
    return state


def model_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the model, by the model's own names."""
    names = {name.removeprefix("module."): value for name, value in state["pipeline"].items()}
    return {name.removeprefix(MODEL): value for name, value in names.items() if name.startswith(MODEL)}


def resume_candidates(load_dir: Path, relative_model_dir: Path, load_step: Optional[int]) -> list[Path]:
    """The checkpoints that ``--load-dir`` may mean, the best first.

    Args:
        load_dir: a run's folder, its checkpoint folder, its config.yml, or one checkpoint file.
        relative_model_dir: name of the checkpoint folder within a run's folder.
        load_step: ``--load-step``; None for the newest.

    Raises:
        InputError: nothing there, or not the step asked for.
    """
    try:
        if not load_dir.exists():
            raise InputError(f"--load-dir {load_dir}: there is no such folder")
        if not load_dir.is_dir() and not load_dir.is_file():
            raise InputError(f"--load-dir {load_dir}: {file_problem(load_dir)}; give a run's folder")
    except OSError as error:
        raise InputError(f"--load-dir {load_dir}: {error.strerror}: allow reading it") from error
    if load_dir.is_file():
        if checkpoint_step(load_dir) is not None:
            return [load_dir]
        if load_dir.suffix not in (".yml", ".yaml"):
            raise InputError(
                f"--load-dir {load_dir}: expected a run's folder, its {relative_model_dir} folder or its config.yml"
            )
        load_dir = load_dir.parent
    nested = load_dir / relative_model_dir
    folder = nested if list_checkpoints(nested) else load_dir
    files = list_checkpoints(folder)
    if not files:
        raise InputError(f"--load-dir {load_dir}: no checkpoint (step-*.ckpt) there nor in {nested}")
    if load_step is not None:
        wanted = checkpoint_path(folder, load_step)
        problem = damage(wanted)
        if problem is not None:
            steps = ", ".join(str(checkpoint_step(path)) for path in files if damage(path) is None) or "none"
            what = f"is damaged ({problem})" if wanted in files else "is not there"
            raise InputError(f"--load-step {load_step}: {wanted} {what}; steps that can be loaded: {steps}")
        return [wanted]
    whole = whole_checkpoints(folder)
    if not whole:
        raise InputError(f"--load-dir {load_dir}: none of the {len(files)} checkpoints in {folder} can be read")
    return whole


ADDED_LATER = ("_model.field.node_samples", "_model.field.maturity", "_model.growth.")
"""Beginnings of the names that checkpoints of earlier versions lack; the model fills them in."""


def check_fits(saved: Mapping[str, Any], current: Mapping[str, Any], what: str, path: Path) -> None:
    """Compare the names in a checkpoint with those of this run; nerfstudio would drop the difference silently.

    Raises:
        InputError: names the first ones that are missing or too many.
    """
    missing, extra = sorted(set(current) - set(saved)), sorted(set(saved) - set(current))
    if missing or extra:
        parts = [f"{label} {', '.join(names[:3])}" for label, names in (("without", missing), ("with", extra)) if names]
        raise InputError(
            f"{path} does not fit these settings: its {what} are {' and '.join(parts)}; "
            "train with the settings in the config.yml beside it"
        )


def random_state() -> dict[str, Any]:
    """State of all random number generators of this process, as types that ``weights_only`` loading accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Continue the random sequences of `random_state`; the CUDA part only on as many devices as it was taken from.

    Args:
        state: of the generators.
        source: of the state, for the error.

    Raises:
        InputError: a generator does not take it.
    """
    try:
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        np.random.set_state(tuple(state["numpy"]))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{source} cannot be used: its state of the random numbers is none ({error}); it is damaged or was not"
            " written by infnerf: use another one"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where the file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do some network file systems sync them; the file itself is complete
        pass
    finally:
        os.close(descriptor)


def _delete_all_but(folder: Path, newest: str, keep: int) -> None:
    """Delete all but ``keep`` whole checkpoints, the one named ``newest`` and those before it, and every damaged
    one."""
    files = list_checkpoints(folder)
    start = [path.name for path in files].index(newest)
    kept = [files[start], *[path for path in files[start + 1 :] if is_whole(path)][: keep - 1]]
    for path in files:
        if path not in kept:
            _delete(path)


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        warn(f"cannot delete the old checkpoint {path}: {error}")
