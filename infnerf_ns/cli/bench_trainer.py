"""A model that takes training steps on given rays, as the trainer does, without data manager, schedules and logs; and
a tree and rays made up for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from torch import Tensor

from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.model import InfNeRFModel, InfNeRFModelConfig
from infnerf_ns.training.level_groups import expand_optimizers
from infnerf_ns.training.optimizer import NodeAdam
from infnerf_ns.training.stability import groups_not_finite

Loss: TypeAlias = Callable[[dict[str, Any], dict[str, Tensor]], Tensor]


class StepTrainer:
    """A model on the CPU and its optimizers.

    Args:
        config: of the model; its ``level_start_steps`` 0 starts all octree levels at once.
        scene: what the tree is built from.
        num_photos: number of appearance codes.
        optimizers: settings by kind of parameter, as in a preset; by default NodeAdam's own.
    """

    def __init__(
        self, config: InfNeRFModelConfig, scene: SfMScene, num_photos: int, optimizers: dict[str, Any] | None = None
    ) -> None:
        box = SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.model: InfNeRFModel = config.setup(
            scene_box=box, num_train_data=num_photos, metadata={"sfm_scene": scene}, device="cpu", grad_scaler=None
        )
        self.model.train()
        groups = self.model.get_param_groups()
        if optimizers is None:
            self.optimizers = [
                NodeAdam(group) if name != "appearance" else torch.optim.Adam(group) for name, group in groups.items()
            ]
        else:
            settings = expand_optimizers(optimizers, groups, level_lr_factor=1.0, total_steps=1)
            self.optimizers = [settings[name]["optimizer"].setup(params=group) for name, group in groups.items()]
        held = SimpleNamespace(optimizers=dict(enumerate(self.optimizers)))
        attributes = TrainingCallbackAttributes(held, None, None, None)  # type: ignore[arg-type]
        self._callbacks = self.model.get_training_callbacks(attributes)

    def step(self, step: int, rays: RayBundle, batch: dict[str, Tensor], extra_loss: Loss | None = None) -> None:
        """Forward, losses, backward, the check of the gradients, optimizers.

        Args:
            step: of the training, for the schedules.
            rays: R rays.
            batch: with ``image [R, 3]``.
            extra_loss: of the model's outputs and the batch, added to the model's own.
        """
        self.backward(step, rays, batch, extra_loss)
        if groups_not_finite({"": self.model.parameters()}):
            raise ValueError(f"step {step}: a gradient is not finite")
        for optimizer in self.optimizers:
            optimizer.step()
        self._call(TrainingCallbackLocation.AFTER_TRAIN_ITERATION, step)

    def backward(self, step: int, rays: RayBundle, batch: dict[str, Tensor], extra_loss: Loss | None = None) -> None:
        """The same without the update: only gradients."""
        self._call(TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, step)
        self.zero_grad()
        outputs = self.model(rays)
        losses = self.model.get_loss_dict(outputs, batch, self.model.get_metrics_dict(outputs, batch))
        if extra_loss is not None:
            losses["extra_loss"] = extra_loss(outputs, batch)
        torch.stack(list(losses.values())).sum().backward()

    def _call(self, location: TrainingCallbackLocation, step: int) -> None:
        for callback in self._callbacks:
            callback.run_callback_at_location(step, location)

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def full_tree(level: int) -> StepTrainer:
    """A model with a tree full to one level."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200 * 8**level, 3, generator=generator) * 2 - 1
    count = len(points)
    scene = SfMScene(points, torch.full((count,), 1e-9), torch.full((count,), 9), near=0.5, source="tracks")
    config = InfNeRFModelConfig()
    config.octree.max_level, config.octree.level_start_steps, config.octree.trim = level, 0, 0.0
    config.losses.inter_level = config.losses.transparency = 0.0
    config.sampler.interval_footprint = 0.0  # nothing is learnt, so all intervals are long
    return StepTrainer(config, scene, num_photos=8)


def random_rays(step: int, count: int) -> tuple[RayBundle, dict[str, Tensor]]:
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
