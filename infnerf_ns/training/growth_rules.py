"""Which nodes are born and which die: rules on the statistics of the training samples.

Own code, as the octree is: the paper builds its tree once, from the SfM points, and design section 4 asks that it
follows what training finds. The rule for a birth is the routing rule seen from the other side: samples whose footprint
is finer than what their node resolves ask for a child in their octant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels.statistics import COLUMNS
from infnerf_ns.octree import Octree
from infnerf_ns.validation import Range


@dataclass
class GrowthConfig:
    """When the octree grows and shrinks while it trains."""

    every: Annotated[int, Range(0, 1_000_000)] = 0
    """Steps between two rounds of births and deaths, 1000 for example; 0: the tree stays as it was built."""
    start_step: Annotated[int, Range(0, 10_000_000)] = 1000
    """No round before this step: until surfaces appear, samples ask for detail all over the fog."""
    end_share: Annotated[float, Range(0.0, 1.0)] = 0.7
    """Share of the training after which the tree stays as it is, so that the last nodes are trained, too."""
    min_rays: Annotated[float, Range(1e-3, 1e9)] = 3.0
    """Rays per step (by rendering weight) that must ask an octant for more detail: a node with fewer hardly learns."""
    error_ratio: Annotated[float, Range(0.0, 100.0)] = 0.3
    """A child is born where the mean error of what asks is at least this much of the whole tree's, or ..."""
    gradient_ratio: Annotated[float, Range(0.0, 100.0)] = 2.0
    """... where the mean gradient is at least this much of the whole tree's."""
    prune_rays: Annotated[float, Range(0.0, 1e9)] = 0.1
    """A leaf dies where fewer rays per step (by rendering weight) end: it is rarely visited, or empty."""
    grace_rounds: Annotated[int, Range(0, 1000)] = 2
    """A node lives at least so many rounds, has no children before one, and an octant whose node has died stays empty
    for twice as many."""
    memory: Annotated[float, Range(0.0, 0.99)] = 0.5
    """Share of the statistics that each round hands on to the next, so that a photo that was not drawn for a while does
    not decide."""
    max_nodes: Annotated[int, Range(1, 1_000_000)] = 1024
    """The tree never has more nodes."""
    max_memory_mib: Annotated[int, Range(0)] = 0
    """Nor do its parameters, gradients and moments need more memory; 0: than most of what is free."""

    def check(self) -> list[str]:
        """Values that do not fit each other."""
        if self.prune_rays > self.min_rays / 2:
            return [
                f"--pipeline.model.growth.prune-rays {self.prune_rays:g}: must be at most half of"
                f" --pipeline.model.growth.min-rays {self.min_rays:g}, or nodes are born and die by turns"
            ]
        return []


class Births(NamedTuple):
    """Octants that are given a node, the most urgent first."""

    parents: Int[Tensor, "B"]
    octants: Int[Tensor, "B"]


def deaths(
    octree: Octree, rates: Float[Tensor, "N 8 7"], age: Int[Tensor, "N"], config: GrowthConfig
) -> Int[Tensor, "D"]:
    """Leaves in which hardly any ray ends.

    Args:
        octree: the tree.
        rates: sums over the samples (:data:`infnerf_ns.kernels.statistics.COLUMNS`) per step.
        age: rounds that each node has lived.
        config: thresholds.
    """
    leaf = (octree.children < 0).all(dim=1)
    rays = rates[:, :, COLUMNS.index("weight")].sum(dim=1)
    dying = leaf & (rays < config.prune_rays) & (age >= config.grace_rounds) & (octree.level > 0)
    return torch.nonzero(dying)[:, 0]


def births(
    octree: Octree,
    rates: Float[Tensor, "N 8 7"],
    age: Int[Tensor, "N"],
    rest: Int[Tensor, "N 8"],
    deepest: int,
    config: GrowthConfig,
) -> Births:
    """Octants without a node that enough rays ask for more detail and that are drawn wrongly, or still move.

    Args:
        octree: the tree.
        rates, age, config: as in :func:`deaths`.
        rest: rounds for which an octant stays empty.
        deepest: level below which no node is born.
    """
    sums = dict(zip(COLUMNS, rates.unbind(dim=-1)))
    weight = sums["asking_weight"]
    wanted = (octree.children < 0) & (weight >= config.min_rays) & (rest == 0)
    wanted &= ((octree.level < deepest) & (age >= 1))[:, None]
    urgent = torch.zeros_like(wanted)
    for name, ratio in (("error", config.error_ratio), ("gradient", config.gradient_ratio)):
        mean = sums[name].sum() / sums["weight"].sum().clamp(min=1e-12)
        urgent |= sums[f"asking_{name}"] >= ratio * mean * weight
    parents, octants = torch.nonzero(wanted & urgent, as_tuple=True)
    order = torch.argsort(sums["asking_error"][parents, octants], descending=True, stable=True)
    return Births(parents[order], octants[order])


def within_budget(born: Births, octree: Octree, page_bytes: list[int], nodes: int, memory: float) -> Births:
    """The first births that nodes and memory are left for.

    Args:
        born: most urgent first.
        octree: the tree.
        page_bytes: memory of a node of each level.
        nodes: that may be born.
        memory: bytes for them.
    """
    needed = torch.tensor(page_bytes, device=born.parents.device)[octree.level[born.parents] + 1].cumsum(0)
    count = min(max(nodes, 0), int((needed <= memory).sum()))
    return Births(born.parents[:count], born.octants[:count])
