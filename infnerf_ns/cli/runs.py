"""A run's folder and configuration, as the own commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from infnerf_ns.errors import InputError
from infnerf_ns.training import checkpoints
from infnerf_ns.training.trainer import InfNeRFTrainerConfig


def load_run_config(run: Path) -> tuple[InfNeRFTrainerConfig, Path]:
    """The configuration of a run, and its folder.

    Args:
        run: its folder or its config.yml.

    Raises:
        InputError: there is none, or it is not of this package.
    """
    path = run / "config.yml" if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{run}: there is no config.yml; give the folder that ns-train printed at its end")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, ImportError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as the configuration of a run ({error})") from error
    if not isinstance(config, InfNeRFTrainerConfig):
        raise InputError(f"{path}: this is not a run of infnerf")
    return config, path.parent


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any], Path]:
    """The newest checkpoint whose checksums are right, its tensors left in the file, and which file that is.

    Args:
        folder: of a run's checkpoints.

    Raises:
        InputError: there is none.
    """
    for path in checkpoints.whole_checkpoints(folder):
        state = checkpoints.read_checkpoint(path, mapped=True)
        if state is not None:
            return state, path
    raise InputError(f"{folder}: there is no whole checkpoint (step-*.ckpt)")
