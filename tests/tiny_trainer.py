"""A trainer on a tiny pipeline, which fits a matrix to random data and has the parameter groups of an octree with two
levels.

Tests with it say nothing about NeRFs; they say that the loop around them can be relied on.
"""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from nerfstudio.configs.base_config import (
    InstantiateConfig,
    LocalWriterConfig,
    LoggingConfig,
    MachineConfig,
    ViewerConfig,
)
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from torch import nn

from infnerf_ns.torch_compat import allow_numpy_scalars
from infnerf_ns.training import checkpoints
from infnerf_ns.training.level_groups import DecayToEndSchedulerConfig
from infnerf_ns.training.trainer import InfNeRFTrainerConfig

allow_numpy_scalars()
STEPS = 12


@dataclass
class TinyPipelineConfig(InstantiateConfig):
    _target: type = field(default_factory=lambda: TinyPipeline)
    nan_from: int = 10**9
    """Losses are NaN from this step ..."""
    nan_steps: int = 0
    """... for so many steps."""
    signal_in_training: int = -1
    """SIGINT arrives while this step trains."""
    signal_in_evaluation: int = -1
    """SIGTERM arrives while the evaluation after this step runs."""
    datamanager: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(data=None))


class TinyPipeline(nn.Module):
    def __init__(self, config: TinyPipelineConfig, **kwargs) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(3, 3)) for name in ("grids_0", "grids_1", "decoders_0")}
        )
        self.datamanager = SimpleNamespace(train_dataset=[0], eval_dataset=[0], get_train_rays_per_batch=lambda: 1)
        self.losses: dict[int, float] = {}
        self.evaluated: list[int] = []

    def get_param_groups(self):
        return {name: [parameter] for name, parameter in self.model.items()}

    def get_training_callbacks(self, attributes):
        return []

    def get_train_loss_dict(self, step):
        data = torch.randn(8, 3)
        loss = ((data @ self.model["grids_0"] @ self.model["grids_1"] @ self.model["decoders_0"] - data) ** 2).mean()
        self.losses[step] = loss.item()
        if step == self.config.signal_in_training:
            os.kill(os.getpid(), signal.SIGINT)
        if self.config.nan_from <= step < self.config.nan_from + self.config.nan_steps:
            loss = loss * float("nan")
        return None, {"loss": loss}, {}

    def get_eval_loss_dict(self, step):
        if step == self.config.signal_in_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        self.evaluated.append(step)
        torch.randn(3)  # as the draw of a batch of held-out pixels
        return None, {"loss": torch.zeros(1)}, {}

    def load_pipeline(self, loaded_state, step):
        self.load_state_dict(loaded_state)


def tiny_config(folder: Path, pipeline: dict | None = None, **settings) -> InfNeRFTrainerConfig:
    group = {
        "optimizer": AdamOptimizerConfig(lr=1e-2),
        "scheduler": DecayToEndSchedulerConfig(lr_final=1e-4),
    }
    defaults = dict(
        output_dir=folder,
        method_name="tiny",
        experiment_name="test",
        timestamp="run",
        machine=MachineConfig(device_type="cpu"),
        logging=LoggingConfig(local_writer=LocalWriterConfig(enable=False), profiler="none"),
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="tensorboard",
        max_num_iterations=STEPS,
        steps_per_save=5,
        steps_per_eval_batch=3,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        optimizers={"grids": group, "decoders": group},
    )
    return InfNeRFTrainerConfig(pipeline=TinyPipelineConfig(**(pipeline or {})), **{**defaults, **settings})


def run(config: InfNeRFTrainerConfig, seed: int = 3):
    """Train; returns the trainer and the exit code (0 if train() returned)."""
    torch.manual_seed(seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    try:
        trainer.train()
    except SystemExit as stop:
        return trainer, stop.code
    return trainer, 0


def steps_saved(trainer) -> list[int]:
    return [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(trainer.checkpoint_dir)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
