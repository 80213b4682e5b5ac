"""A run's folder, configuration and pipeline, as the own commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils.eval_utils import eval_setup

from infnerf_ns.errors import InputError
from infnerf_ns.pipeline import InfNeRFPipeline
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
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, ImportError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as the configuration of a run ({error})") from error
    if not isinstance(config, InfNeRFTrainerConfig):
        raise InputError(f"{path}: this is not a run of infnerf")
    return config, path.parent


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
    _, folder = load_run_config(run)

    def at_home(config: TrainerConfig) -> TrainerConfig:
        place_config(config, folder)
        return config

    _, pipeline, checkpoint, _ = eval_setup(folder / "config.yml", test_mode=test_mode, update_config_callback=at_home)
    assert isinstance(pipeline, InfNeRFPipeline)
    return OpenRun(pipeline, folder, checkpoint)


def place_config(config: TrainerConfig, folder: Path) -> None:
    """Makes the configuration's run folder this one, if it is another.

    Args:
        config: of a run.
        folder: absolute.

    Raises:
        InputError: the folder is not three deep, as a configuration says it.
    """
    if config.get_base_dir().resolve() != folder:
        if len(folder.parents) < 3:
            raise InputError(f"{folder}: put the run into a folder such as outputs/SCENE/infnerf/DATE_TIME")
        config.output_dir, config.experiment_name = folder.parents[2], folder.parents[1].name
        config.method_name, config.timestamp = folder.parent.name, folder.name


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
