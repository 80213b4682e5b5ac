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
from nerfstudio.data.scene_box import SceneBox
from rich.progress import track

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.model import InfNeRFModel, InfNeRFModelConfig
from infnerf_ns.training.optimizer import NodeAdam


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
        trainers = [_Trainer(level, self.rays) for level in self.levels]
        times: list[list[float]] = [[] for _ in trainers]
        for step in track(range(self.warm_up + self.steps), description="training", transient=True):
            for trainer, row in zip(trainers, times):
                start = perf_counter()
                trainer.step(step)
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


class _Trainer:
    """A model with a tree full to one level, and its optimizers."""

    def __init__(self, level: int, rays: int) -> None:
        generator = torch.Generator().manual_seed(0)
        points = torch.rand(200 * 8**level, 3, generator=generator) * 2 - 1
        count = len(points)
        scene = SfMScene(points, torch.full((count,), 1e-9), torch.full((count,), 9), near=0.5, source="tracks")
        config = InfNeRFModelConfig()
        config.octree.max_level, config.octree.level_start_steps, config.octree.trim = level, 0, 0.0
        config.losses.inter_level = config.losses.transparency = 0.0
        box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.model: InfNeRFModel = config.setup(
            scene_box=box, num_train_data=8, metadata={"sfm_scene": scene}, device="cpu", grad_scaler=None
        )
        self.model.train()
        self.optimizers = [
            NodeAdam(group) if name != "appearance" else torch.optim.Adam(group)
            for name, group in self.model.get_param_groups().items()
        ]
        (self.callback,) = self.model.get_training_callbacks(None)  # type: ignore[arg-type]
        self.rays = rays

    def step(self, step: int) -> None:
        """One step on random rays that pass through the cube, with footprints that ask for the finest level."""
        generator = torch.Generator().manual_seed(step)
        origins = torch.nn.functional.normalize(torch.randn(self.rays, 3, generator=generator), dim=-1) * 2.5
        targets = torch.rand(self.rays, 3, generator=generator) - 0.5
        directions = torch.nn.functional.normalize(targets - origins, dim=-1)
        bundle = RayBundle(
            origins,
            directions,
            pixel_area=torch.full((self.rays, 1), 1e-9),
            camera_indices=torch.zeros(self.rays, 1, dtype=torch.long),
            metadata={},
        )
        self.callback.func(step=step)
        batch = {"image": targets + 0.5}
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        outputs = self.model(bundle)
        losses = self.model.get_loss_dict(outputs, batch, self.model.get_metrics_dict(outputs, batch))
        torch.stack(list(losses.values())).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
