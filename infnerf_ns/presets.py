"""Presets: YAML files of settings that become a validated trainer configuration.

A preset file has a ``description`` and up to three sections of settings, applied in this order: ``common``, then
``cpu`` or ``cuda``, whichever this machine has. Keys are those of the command line:
``--pipeline.model.octree.max-level 6`` is ``pipeline: {model: {octree: {max_level: 6}}}``. Flags win over the preset.

A file of one's own is used from Python with `load_preset`, and from the command line with the environment variable
``INFNERF_SETTINGS=my.yaml``: its settings are applied on top of each preset, below the flags.
"""

import os
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig

from infnerf_ns.data.pyramid_datamanager import PyramidDataManagerConfig
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModelConfig
from infnerf_ns.pipeline import InfNeRFPipelineConfig
from infnerf_ns.regular_files import file_problem
from infnerf_ns.training.level_groups import DecayToEndSchedulerConfig
from infnerf_ns.training.optimizer import NodeAdamOptimizerConfig
from infnerf_ns.training.trainer import InfNeRFTrainerConfig
from infnerf_ns.validation import apply_yaml, read_yaml, validate_config
from infnerf_ns.viewer_address import HOST

SETTINGS_VARIABLE = "INFNERF_SETTINGS"
_SECTIONS = ("description", "common", "cpu", "cuda")


def load_preset(
    name_or_path: Union[str, Path], device: Optional[Literal["cpu", "cuda"]] = None
) -> InfNeRFTrainerConfig:
    """The trainer configuration of a preset.

    Args:
        name_or_path: a name in `preset_names`, or the path of a YAML file (it ends in .yaml or .yml).
        device: which section besides ``common``; by default what this machine has.

    Raises:
        InputError: no such preset, or a wrong key or value in the file.
    """
    return preset_from_file(_find(name_or_path), device)


def preset_from_file(path: Path, device: Optional[Literal["cpu", "cuda"]] = None) -> InfNeRFTrainerConfig:
    """As `load_preset`; the method is named after a packaged file. A file of one's own keeps the name `infnerf`, by
    which ns-eval and the like find the method of a run."""
    config = base_config(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if path.parent == presets_folder():
        config.method_name = path.stem
    apply_preset(config, path)
    return config


def apply_preset(config: InfNeRFTrainerConfig, path: Path) -> None:
    """Apply a preset file's sections to a configuration, in place, and check the result.

    Raises:
        InputError: a wrong key or value; the message names the file.
    """
    content = read_yaml(path)
    for key in content:
        if key not in _SECTIONS:
            raise InputError(f"{path}: unknown section '{key}'; a preset has the sections {', '.join(_SECTIONS)}")
    for section in ("common", config.machine.device_type):
        settings = content.get(section) or {}
        if not isinstance(settings, dict):
            raise InputError(f"{path}: the section '{section}' must hold 'key: value' lines")
        apply_yaml(config, settings, path)
    problems = validate_config(config).problems
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")


def preset_description(name_or_path: Union[str, Path]) -> str:
    """The one-line description in a preset file."""
    return str(read_yaml(_find(name_or_path)).get("description", ""))


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def presets_folder() -> Path:
    """``configs/``: inside the package when it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "configs"
    return beside if (package.parent / "pyproject.toml").is_file() and beside.is_dir() else package / "configs"


def user_settings() -> Optional[Path]:
    """The file in ``INFNERF_SETTINGS``, if set."""
    value = os.environ.get(SETTINGS_VARIABLE)
    if not value:
        return None
    path = Path(value)
    problem = file_problem(path)
    if problem is not None:
        raise InputError(f"{SETTINGS_VARIABLE}={value}: {problem}; unset the variable or correct it")
    return path


def base_config(device: Literal["cpu", "cuda"]) -> InfNeRFTrainerConfig:
    """What all presets share and what is not a number to tune: the parts and how they are wired.

    Training ends by itself (``quit_on_train_completion``), unlike nerfstudio's methods, and evaluates along the way;
    while it runs, the viewer is open, to this machine alone.
    """
    return InfNeRFTrainerConfig(
        method_name="infnerf",
        machine=MachineConfig(device_type=device),
        pipeline=InfNeRFPipelineConfig(
            datamanager=PyramidDataManagerConfig(dataparser=NerfstudioDataParserConfig()), model=InfNeRFModelConfig()
        ),
        optimizers={
            "grids": _group(NodeAdamOptimizerConfig(lr=1e-2, eps=1e-15)),
            "proposals": _group(NodeAdamOptimizerConfig(lr=1e-2, eps=1e-15)),
            "decoders": _group(NodeAdamOptimizerConfig(lr=1e-2, eps=1e-15)),
            "appearance": _group(AdamOptimizerConfig(lr=1e-2, eps=1e-15)),
            "discriminator": _group(AdamOptimizerConfig(lr=2e-4, eps=1e-8)),
            "camera_opt": _group(AdamOptimizerConfig(lr=1e-3, eps=1e-15)),
        },
        viewer=ViewerConfig(websocket_host=HOST, num_rays_per_chunk=1 << 15, quit_on_train_completion=True),
        vis="viewer+tensorboard",
    )


def _group(optimizer: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "scheduler": DecayToEndSchedulerConfig(lr_final=optimizer.lr * 0.01)}


def _find(name_or_path: Union[str, Path]) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    if str(name_or_path) not in preset_names():
        names = ", ".join(preset_names())
        raise InputError(f"there is no preset '{name_or_path}'; there are {names}, or give the path of a .yaml file")
    return presets_folder() / f"{name_or_path}.yaml"
