"""A run's folder, configuration and pipeline, as the own commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from nerfstudio.utils.eval_utils import eval_load_checkpoint

from infnerf_ns.errors import InputError
from infnerf_ns.pipeline import InfNeRFPipeline
from infnerf_ns.run_config import read_run_config
from infnerf_ns.training import checkpoints
from infnerf_ns.training.trainer import InfNeRFTrainerConfig


def load_run_config(run: Path) -> tuple[InfNeRFTrainerConfig, Path]:
    """The configuration of a run, and its folder.

    Args:
        run: its folder or its config.yml.

    Raises:
        InputError: there is none, or it is not of this package.
    """
    run = run.resolve()  # "." has no name
    path = run / "config.yml" if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{run}: there is no config.yml; give the folder that ns-train printed at its end")
    return read_run_config(path), path.parent


class OpenRun(NamedTuple):
    """A run that has been loaded."""

    pipeline: InfNeRFPipeline
    """in evaluation mode"""
    folder: Path
    """of the run"""
    checkpoint: Path
    """that was loaded"""


def open_run(run: Path, test_mode: Literal["test", "val", "inference"] = "test") -> OpenRun:
    """Loads a run from the folder it is in, wherever the command was started and whatever the folder was called when
    it was trained.

    Args:
        run: its folder or its config.yml.
        test_mode: nerfstudio's; which photos are loaded.

    Raises:
        InputError: there is none, it is not of this package, or its data are not where its configuration says.
    """
    config, folder = load_run_config(run)
    place_config(config, folder)
    # What nerfstudio's eval_setup does with a configuration, which it would read without any care.
    config.load_dir = config.get_checkpoint_dir()
    if not checkpoints.list_checkpoints(config.load_dir):
        raise InputError(f"{config.load_dir}: there is no checkpoint (step-*.ckpt); copy the whole folder of the run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = config.pipeline.setup(device=device, test_mode=test_mode)
    assert isinstance(pipeline, InfNeRFPipeline)
    pipeline.eval()
    checkpoint, _ = eval_load_checkpoint(config, pipeline)
    return OpenRun(pipeline, folder, checkpoint)


def place_config(config: InfNeRFTrainerConfig, folder: Path) -> None:
    """Makes the configuration's run folder this one, if it is another.

    Args:
        config: of a run.
        folder: absolute.
    """
    config.run_folder = None
    if config.get_base_dir().resolve() != folder:
        config.run_folder = folder


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
