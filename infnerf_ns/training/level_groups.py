"""Parameter groups named ``<kind>_<octree level>``: their optimizers and learning rates, from one setting per kind."""

import copy
import math
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


def optimizer_problems(kind: str, group: Any) -> list[str]:
    """What is wrong with the optimizer settings of a kind, a line each, naming the flag."""
    if not isinstance(group, dict) or "optimizer" not in group:
        return [f"--optimizers.{kind}: needs an entry 'optimizer', and may have one 'scheduler'"]
    optimizer, scheduler, problems = group["optimizer"], group.get("scheduler"), []

    def require(part: str, name: str, value: Any, good: bool, allowed: str) -> None:
        if not good:
            shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            problems.append(f"--optimizers.{kind}.{part}.{name.replace('_', '-')} {shown}: allowed is {allowed}")

    rate = getattr(optimizer, "lr", None)
    require("optimizer", "lr", rate, _is_number(rate) and 0 < rate < 10, "above 0 and below 10")
    if hasattr(optimizer, "eps"):
        require("optimizer", "eps", optimizer.eps, _is_number(optimizer.eps) and optimizer.eps > 0, "above 0")
    betas = getattr(optimizer, "betas", (0.9, 0.99))
    good = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)
    require("optimizer", "betas", betas, good, "0 to below 1, two of them")
    norm = getattr(optimizer, "max_norm", None)
    require("optimizer", "max_norm", norm, norm is None or _is_number(norm) and norm > 0, "above 0 (None: no clipping)")
    if isinstance(optimizer, NodeAdamOptimizerConfig) and optimizer.weight_decay:
        problems.append(f"--optimizers.{kind}.optimizer.weight-decay: not supported, it would visit every entry")
    if scheduler is None:
        return problems
    final, before = getattr(scheduler, "lr_final", None), getattr(scheduler, "lr_pre_warmup", 0)
    good = final is None or _is_number(final) and 0 < final < 10
    require("scheduler", "lr_final", final, good, "above 0 and below 10")
    require("scheduler", "lr_pre_warmup", before, _is_number(before) and 0 <= before < 10, "0 to below 10")
    name = "warm_up_end" if hasattr(scheduler, "warm_up_end") else "warmup_steps"
    warmup, steps = getattr(scheduler, name, 0), getattr(scheduler, "max_steps", 1)
    require("scheduler", name, warmup, _is_count(warmup), "a whole number, at least 0")
    to_end = isinstance(scheduler, DecayToEndSchedulerConfig) and steps == 0
    if _is_count(warmup) and not to_end:
        good = _is_count(steps) and steps > warmup
        require("scheduler", "max_steps", steps, good, f"more than the {warmup} of {name.replace('_', '-')}")
    return problems


def accumulation_problems(steps: Any, kinds: Iterable[str]) -> list[str]:
    """What is wrong with ``gradient_accumulation_steps``, a line each.

    Args:
        steps: by kind of parameter, or by group.
        kinds: that there are.
    """
    flag, problems, kinds = "--gradient-accumulation-steps", [], list(kinds)
    if not isinstance(steps, dict):
        return [f"{flag} {steps}: must be groups with their numbers of steps, such as {{grids: 2}}"]
    for name, count in steps.items():
        match = level_group(str(name))
        if name not in kinds and (match is None or match["kind"] not in kinds):
            problems.append(
                f"{flag} {name}: there is no such group; there are {', '.join(kinds)}, each also for one octree level,"
                " as in grids_2"
            )
        if not _is_count(count) or count < 1:
            problems.append(f"{flag} {name} {count}: allowed is a whole number, at least 1")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
