"""The octree grows while it trains: statistics of the training samples, and rounds of births and deaths.

The statistics are gathered in the training step itself, from what it has computed anyway. A round changes the tree
between two steps; everything that a later round decides from is in the model's checkpoint, so an interrupted run goes
on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from infnerf_ns.field import OctreeField
from infnerf_ns.kernels.gradients import moved_rows
from infnerf_ns.kernels.statistics import COLUMNS, add_samples
from infnerf_ns.octree import Changed, Octree
from infnerf_ns.rendering import Shaded
from infnerf_ns.training import growth_rules
from infnerf_ns.training.child_pages import start_children
from infnerf_ns.training.growth_rules import GrowthConfig
from infnerf_ns.training.tree_change import change_tree

_MEMORY_SHARE = 0.7
"""Of the free memory, that a tree may grow into."""


class Round(NamedTuple):
    """What a round has done."""

    births: Int[Tensor, "L"]
    """nodes born at each level"""
    deaths: Int[Tensor, "L"]
    """nodes that have died at each level"""


class Growth(nn.Module):
    """Statistics and history of a growing tree.

    Args:
        octree: the tree, N nodes.
        max_level: deepest level that the tree may ever have.
        config: thresholds.
    """

    def __init__(self, octree: Octree, max_level: int, config: GrowthConfig) -> None:
        super().__init__()
        self.config, self.max_level = config, max_level
        for name, value in self._fresh(octree.num_nodes).items():
            self.register_buffer(name, value)
        self.register_buffer("history", torch.zeros(0, 4, max_level + 1, dtype=torch.long))
        """[T, 4, L] of T rounds: the step (everywhere in the first row), nodes, births and deaths per level"""

    @staticmethod
    def _fresh(nodes: int) -> dict[str, Tensor]:
        return {
            "table": torch.zeros(nodes, 8, len(COLUMNS), dtype=torch.float64),
            "watched": torch.zeros(nodes, dtype=torch.float64),
            "age": torch.zeros(nodes, dtype=torch.long),
            "rest": torch.zeros(nodes, 8, dtype=torch.long),
        }

    def fit(self, octree: Octree, state: dict[str, Any]) -> None:
        """Makes room for a checkpoint; one of a run that did not grow, or of an earlier version, gets empty statistics.

        Args:
            octree: of the checkpoint.
            state: of the model; what it lacks is added.
        """
        fresh = self._fresh(octree.num_nodes)
        for name in (*fresh, "history"):
            empty = fresh.get(name, self.history[:0])
            value = state.setdefault(f"growth.{name}", empty)
            if value.shape[1:] != empty.shape[1:] or (name in fresh and len(value) != len(empty)):
                value = state[f"growth.{name}"] = empty  # the levels of the history are those of another max_level
            setattr(self, name, value.to(self.history.device).clone())

    def is_due(self, step: int, progress: float) -> bool:
        """Whether the tree changes after this step.

        Args:
            step: that was done.
            progress: share of the training that is done.
        """
        config = self.config
        after = step + 1 - config.start_step
        return bool(config.every) and after >= 0 and after % config.every == 0 and progress <= config.end_share

    def watches(self, step: int, progress: float) -> bool:
        """Whether a later round is going to decide from this step: not from the fog before the first round's own
        steps, nor after the last round.

        Args:
            step, progress: as in :meth:`is_due`.
        """
        config = self.config
        return bool(config.every) and step >= config.start_step - config.every and progress <= config.end_share

    @torch.no_grad()
    def round(self, step: int, field: OctreeField, optimizers: Iterable[torch.optim.Optimizer]) -> Round:
        """One round of deaths and births.

        Args:
            step: that was done.
            field: its tree and banks change.
            optimizers: that hold the banks.
        """
        config, optimizers = self.config, list(optimizers)
        self.age += field.octree.level <= field.active_level  # the others have not started
        self.rest.sub_(1).clamp_(min=0)
        dying = growth_rules.deaths(field.octree, self._rates(), self._judged_age(), config)
        died = self._per_level(field.octree.level[dying])
        if len(dying):
            self.rest[field.octree.parent[dying], field.octree.octant[dying]] = 2 * config.grace_rounds
            self._change(field, field.octree.prune(dying), optimizers)
        deepest = self._deepest(field)
        born = growth_rules.births(field.octree, self._rates(), self._judged_age(), self.rest, deepest, config)
        page_bytes = [field.pages.page_bytes(level) for level in range(self.max_level + 1)]
        born = growth_rules.within_budget(born, field.octree, page_bytes, *self._room(field))
        appeared = self._per_level(field.octree.level[born.parents] + 1)
        if len(born.parents):
            changed = field.octree.subdivide(*born)
            self._change(field, changed, optimizers)
            new = torch.nonzero(changed.origin < 0)[:, 0]
            start_children(field, new)
            # Only now do they take part; levels below them may still wait for their start.
            field.active_level.fill_(max(int(field.active_level), int(field.octree.level[new].max())))
        self.table *= config.memory
        self.watched *= config.memory
        self._note(step, field.octree, appeared, died)
        return Round(appeared, died)

    def _rates(self) -> Float[Tensor, "N 8 C"]:
        """The table per step."""
        return self.table / self.watched.clamp(min=1)[:, None, None]

    def _judged_age(self) -> Int[Tensor, "N"]:
        """Ages; -1 of nodes that were watched for less than half a round, of which nothing can be said."""
        return torch.where(self.watched >= self.config.every / 2, self.age, -1)

    def _deepest(self, field: OctreeField) -> int:
        """Level below which no node is born: while levels wait for their start, none below those that have started."""
        active = int(field.active_level)
        return self.max_level if active >= field.octree.depth else active

    def _change(self, field: OctreeField, changed: Changed, optimizers: list[torch.optim.Optimizer]) -> None:
        change_tree(field, changed, optimizers)
        for name in ("table", "watched", "age", "rest"):
            setattr(self, name, moved_rows(getattr(self, name), changed.origin))

    def _room(self, field: OctreeField) -> tuple[int, float]:
        """Nodes and bytes that are left."""
        nodes = self.config.max_nodes - field.octree.num_nodes
        largest = max(bank.nbytes for banks in (field.grids, field.decoders, field.proposals) for bank in banks)
        if self.config.max_memory_mib:
            held = sum(field.pages.memory_bytes(field.octree))
            return nodes, self.config.max_memory_mib * 2.0**20 - held
        device = field.octree.level.device
        on_cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
        return nodes, _MEMORY_SHARE * free - largest  # a bank stands beside its successor while rows move

    def _per_level(self, levels: Int[Tensor, "n"]) -> Int[Tensor, "L"]:
        return torch.bincount(levels, minlength=self.max_level + 1)

    def _note(self, step: int, octree: Octree, born: Tensor, died: Tensor) -> None:
        row = torch.stack([torch.full_like(born, step), self._per_level(octree.level), born, died])
        self.history = torch.cat([self.history, row[None]])


class Watch:
    """The samples of a step, on their way into the statistics: their photometric error comes with the losses, their
    gradient with the backward pass. A step whose loss is not finite has none, and leaves no trace.

    Args:
        growth: whose statistics these are.
        field: whose tree the samples were routed in.
        shaded: the samples; their density has a graph.
    """

    def __init__(self, growth: Growth, field: OctreeField, shaded: Shaded) -> None:
        self.error: Float[Tensor, "R"] | None = None
        """mean squared error of each ray's colour; to be set before the backward pass"""
        self._growth, self._field, self._routed = growth, field, shaded.routed
        # Nothing with a graph: a hook that holds what leads back to it is a circle that no collector sees.
        self._share, self._density = shaded.share.detach(), shaded.density.detach()
        self._weights = shaded.weights.detach().reshape(-1)
        shaded.density.register_hook(self._add)

    def _add(self, gradient: Float[Tensor, "M"]) -> None:
        octree, routed, growth = self._field.octree, self._routed, self._growth
        if self.error is None or routed.footprints is None:
            return
        growth.watched += octree.level <= self._field.active_level
        # The gradient of the logarithm of the density, which does not depend on the scene's scale. A density may be
        # infinite, and a gradient where mixed precision scales it.
        magnitude = (gradient * self._density).abs().nan_to_num(0.0, 0.0, 0.0)
        add_samples(
            routed.unit.detach(),
            routed.node,
            routed.footprints.detach(),
            self._share,
            self._weights,
            self.error,
            magnitude,
            routed.order,
            octree.level,
            octree.coords,
            [octree.gsd(level) for level in range(octree.depth + 1)],
            growth.table,
        )
