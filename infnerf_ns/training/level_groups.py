"""Parameter groups named ``<kind>_<octree level>``: their optimizers and learning rates, from one setting per kind."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig

from infnerf_ns.errors import InputError
from infnerf_ns.training.optimizer import NodeAdamOptimizerConfig


@dataclass
class DecayToEndSchedulerConfig(ExponentialDecaySchedulerConfig):
    """nerfstudio's exponential decay, whose length can follow the length of the training."""

    max_steps: int = 0
    """Step at which lr_final is reached; 0 stands for the trainer's max_num_iterations."""


def level_group(name: str) -> Optional[re.Match[str]]:
    """The parts ``kind`` and ``level`` of a group's name; None for a group that belongs to no octree level."""
    return re.fullmatch(r"(?P<kind>.+)_(?P<level>\d+)", name)


def expand_optimizers(
    optimizers: dict[str, Any], group_names: Iterable[str], *, level_lr_factor: float, total_steps: int
) -> dict[str, Any]:
    """Optimizer and scheduler configurations for the model's parameter groups.

    A group's own name wins; else ``<kind>_<level>`` takes the configuration of its kind with learning rates multiplied
    by ``level_lr_factor ** level``.

    Args:
        optimizers: by kind, as in nerfstudio's trainer configuration; not changed.
        group_names: of the model.
        level_lr_factor: as above.
        total_steps: where a `DecayToEndSchedulerConfig` without ``max_steps`` ends.

    Raises:
        InputError: a group without configuration.
    """
    expanded = {}
    for name in group_names:
        match = level_group(name)
        kind, level = (name, 0) if name in optimizers or match is None else (match["kind"], int(match["level"]))
        if kind not in optimizers:
            raise InputError(
                f"no optimizer for the parameter group '{name}': --optimizers has only {', '.join(optimizers)}"
            )
        group = copy.deepcopy(optimizers[kind])
        factor = level_lr_factor**level
        group["optimizer"].lr *= factor
        scheduler = group.setdefault("scheduler", None)
        if getattr(scheduler, "lr_final", None) is not None:
            scheduler.lr_final *= factor
        if isinstance(scheduler, DecayToEndSchedulerConfig) and scheduler.max_steps == 0:
            scheduler.max_steps = max(total_steps, scheduler.warmup_steps + 1)
        expanded[name] = group
    return expanded


def optimizer_problems(kind: str, group: dict[str, Any]) -> list[str]:
    """What is wrong with the optimizer settings of a kind, a line each, naming the flag."""
    optimizer, problems = group["optimizer"], []
    if not 0 < optimizer.lr < 10:
        problems.append(f"--optimizers.{kind}.optimizer.lr {optimizer.lr}: allowed is above 0 and below 10")
    if not optimizer.eps > 0:
        problems.append(f"--optimizers.{kind}.optimizer.eps {optimizer.eps}: allowed is above 0")
    betas = getattr(optimizer, "betas", ())
    if not all(0 <= beta < 1 for beta in betas):
        values = " ".join(map(str, betas))
        problems.append(f"--optimizers.{kind}.optimizer.betas {values}: allowed is 0 to below 1")
    if isinstance(optimizer, NodeAdamOptimizerConfig) and optimizer.weight_decay:
        problems.append(f"--optimizers.{kind}.optimizer.weight-decay: not supported, it would visit every entry")
    final = getattr(group.get("scheduler"), "lr_final", None)
    if final is not None and not 0 < final < 10:
        problems.append(f"--optimizers.{kind}.scheduler.lr-final {final}: allowed is above 0 and below 10")
    return problems
