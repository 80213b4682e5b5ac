"""``infnerf-bench nodes``: does a training step cost more in a larger tree?

Trees that are full to a level (1, 9, 73 ... nodes of the same size) are trained on the same random rays through their
cube; the step times of the trees are taken in turns, so that whatever else the machine does hits all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from nerfstudio.cameras.rays import RayBundle
from rich.progress import track
from torch import Tensor

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_trainer import StepTrainer
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.model import InfNeRFModelConfig


@dataclass
class Nodes:
    """Time of a training step against the number of nodes in the tree."""

    levels: tuple[int, ...] = (1, 2)
    """Trees full to these levels: 1 has 9 nodes, 2 has 73, 3 has 585."""
    rays: int = 1024
    """Rays per step."""
    steps: int = 40
    """Timed steps per tree."""
    warm_up: int = 10
    """Untimed steps before."""

    def main(self) -> None:
        """Prints a row per tree: nodes, median step time and its spread, ratio to the first tree."""
        trainers = [_full_tree(level) for level in self.levels]
        times: list[list[float]] = [[] for _ in trainers]
        for step in track(range(self.warm_up + self.steps), description="training", transient=True):
            for trainer, row in zip(trainers, times):
                rays, batch = _random_rays(step, self.rays)
                start = perf_counter()
                trainer.step(step, rays, batch)
                if step >= self.warm_up:
                    row.append(perf_counter() - start)
        print(describe_machine())
        print(f"{self.rays} rays per step, residual children, {self.steps} steps")
        print("nodes   ms per step (median, 10 % to 90 %)   ratio")
        first = float(np.median(times[0]))
        for trainer, row in zip(trainers, times):
            low, middle, high = np.percentile(row, [10, 50, 90])
            nodes = trainer.model.field.octree.num_nodes
            print(f"{nodes:5d}   {1e3 * middle:6.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})   {middle / first:14.2f}")


def _full_tree(level: int) -> StepTrainer:
    """A model with a tree full to one level."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200 * 8**level, 3, generator=generator) * 2 - 1
    count = len(points)
    scene = SfMScene(points, torch.full((count,), 1e-9), torch.full((count,), 9), near=0.5, source="tracks")
    config = InfNeRFModelConfig()
    config.octree.max_level, config.octree.level_start_steps, config.octree.trim = level, 0, 0.0
    config.losses.inter_level = config.losses.transparency = 0.0
    return StepTrainer(config, scene, num_photos=8)


def _random_rays(step: int, count: int) -> tuple[RayBundle, dict[str, Tensor]]:
    """Rays that pass through the cube, with footprints that ask for the finest level, and colours."""
    generator = torch.Generator().manual_seed(step)
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1) * 2.5
    targets = torch.rand(count, 3, generator=generator) - 0.5
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    bundle = RayBundle(
        origins,
        directions,
        pixel_area=torch.full((count, 1), 1e-9),
        camera_indices=torch.zeros(count, 1, dtype=torch.long),
        metadata={},
    )
    return bundle, {"image": targets + 0.5}
