"""Checkpoint files: written atomically, checked before use, found from whatever path a user names.

The format is nerfstudio's, ``{step, pipeline, optimizers, schedulers, scalers}``, so that ns-eval, ns-render, ns-export
and ns-viewer load it, with one more key of our own, ``infnerf``. nerfstudio reads a step number out of *every* name in
the checkpoint folder; so the temporary file stands beside that folder, on the same file system, and never in it.
"""

import os
import pickle
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn

KEPT_CHECKPOINTS = 2
"""With ``save_only_latest_checkpoint`` the two newest stay: should the newest be damaged, the one before is used."""

_NAME = re.compile(r"step-(\d+)\.ckpt")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""torch's name of the object that it refuses"""
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
    """A cheap test for truncation: torch writes zip files, whose table of contents stands at their end.

    Reads a few kilobytes whatever the file's size. Damaged numbers in its middle are found by `read_checkpoint`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return bool(pickles) and all(archive.read(name) for name in pickles)  # read() compares the checksum
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that pass `is_whole`, newest first; a warning for each damaged one that is newer than all of them."""
    files = list_checkpoints(folder)
    whole = [path for path in files if is_whole(path)]
    for path in files:
        if whole and path == whole[0]:
            break
        instead = f"{whole[0].name} is used instead" if whole else "there is none before it"
        warn(f"the checkpoint {path} is damaged (truncated?); {instead}")
    return whole


def write_checkpoint(state: dict[str, Any], path: Path, keep: Optional[int]) -> Optional[str]:
    """Write a checkpoint so that at any moment the folder holds only complete files; then delete the older ones.

    Args:
        state: what `torch.save` gets.
        path: final file; its folder is made if missing.
        keep: how many checkpoints stay, None for all: this one and the newest of earlier steps. Files of later steps
            are of another run in the same folder and go, too.

    Returns:
        None, or why it failed (disk full, no permission); the older checkpoints are then untouched.
    """
    folder = path.parent.resolve()
    temporary = folder.parent / f".{path.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(".step-*.ckpt.tmp"):
            leftover.unlink()
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / path.name)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        return str(error)
    finally:
        temporary.unlink(missing_ok=True)
    if keep is not None:
        _delete_all_but(folder, path.name, keep)
    return None


def read_checkpoint(path: Path, mapped: bool = False) -> Optional[dict[str, Any]]:
    """Load a checkpoint on the CPU; None if it is damaged. All checksums are compared, which `torch.load` does not do.

    Args:
        path: the file.
        mapped: its tensors stay in the file, and memory is only used for what is looked at.

    Raises:
        InputError: the file is whole but is not a checkpoint of a nerfstudio run.
    """
    if not is_whole(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        raise InputError(
            f"{path} holds objects that are not safe to load ({found[1] if found else 'pickled code'}): it was not"
            " written by infnerf; name another checkpoint"
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile):
        return None
    if not isinstance(state, dict) or any(key not in state for key in _REQUIRED_KEYS):
        raise InputError(f"{path} is not a checkpoint of ns-train: it lacks {', '.join(_REQUIRED_KEYS)}")
    return state


def resume_candidates(load_dir: Path, relative_model_dir: Path, load_step: Optional[int]) -> list[Path]:
    """The checkpoints that ``--load-dir`` may mean, the best first.

    Args:
        load_dir: a run's folder, its checkpoint folder, its config.yml, or one checkpoint file.
        relative_model_dir: name of the checkpoint folder within a run's folder.
        load_step: ``--load-step``; None for the newest.

    Raises:
        InputError: nothing there, or not the step asked for.
    """
    if not load_dir.exists():
        raise InputError(f"--load-dir {load_dir}: there is no such folder")
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
        if wanted not in files or not is_whole(wanted):
            steps = ", ".join(str(checkpoint_step(path)) for path in files if is_whole(path)) or "none"
            what = "is damaged" if wanted in files else "is not there"
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


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue the random sequences of `random_state`; the CUDA part only on as many devices as it was taken from."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


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
            try:
                path.unlink()
            except OSError as error:
                warn(f"cannot delete the old checkpoint {path}: {error}")
