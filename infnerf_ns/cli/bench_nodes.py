"""``infnerf-bench nodes``: does a training step cost more in a larger tree, and what do its statistics cost?

Trees that are full to a level (1, 9, 73 ... nodes of the same size) are trained on the same random rays through their
cube; the step times of the trees, with the statistics and without, are taken in turns, so that whatever else the
machine does hits all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import numpy as np
from rich.progress import track

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_trainer import full_tree, random_rays
from infnerf_ns.cli.command import Command
from infnerf_ns.validation import Range, require_valid

_NEVER = 10**9
"""Steps between two rounds: statistics are gathered, the tree stays."""


@dataclass
class Nodes(Command):
    """Time of a training step against the number of nodes in the tree, and of the statistics of a growing tree."""

    levels: Annotated[tuple[int, ...], Range(0, 4)] = (1, 2)
    """Trees full to these levels: 1 has 9 nodes, 2 has 73, 3 has 585."""
    rays: Annotated[int, Range(1, 1 << 20)] = 1024
    """Rays per step."""
    steps: Annotated[int, Range(1, 10_000_000)] = 40
    """Timed steps per tree."""
    warm_up: Annotated[int, Range(0, 10_000_000)] = 10
    """Untimed steps before."""

    def main(self) -> None:
        """Prints a row per tree: nodes, median step time and its spread, ratio to the first tree, and what the
        statistics add (median over the steps of the ratio of two steps in a row)."""
        require_valid(self)
        trainers = [full_tree(level) for level in self.levels]
        times: list[list[float]] = [[] for _ in trainers]
        ratios: list[list[float]] = [[] for _ in trainers]
        for step in track(range(self.warm_up + self.steps), description="training", transient=True):
            for trainer, row, ratio in zip(trainers, times, ratios):
                seconds = {}
                for growing in (False, True) if step % 2 else (True, False):
                    trainer.model.config.growth.every = _NEVER if growing else 0
                    rays, batch = random_rays(step, self.rays)
                    start = perf_counter()
                    trainer.step(step, rays, batch)
                    seconds[growing] = perf_counter() - start
                if step >= self.warm_up:
                    row.append(seconds[False])
                    ratio.append(seconds[True] / seconds[False])
        print(describe_machine())
        print(f"{self.rays} rays per step, residual children, {self.steps} steps")
        print("nodes   ms per step (median, 10 % to 90 %)   ratio   with statistics")
        first = float(np.median(times[0]))
        for trainer, row, ratio in zip(trainers, times, ratios):
            low, middle, high = np.percentile(row, [10, 50, 90])
            nodes = trainer.model.field.octree.num_nodes
            spread = f"{1e3 * middle:6.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"
            print(f"{nodes:5d}   {spread}   {middle / first:14.2f}   {np.median(ratio):13.3f}")
