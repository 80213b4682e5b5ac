"""A model of a few kilobytes on a hand-made SfM scene, its cameras and rays."""

from __future__ import annotations

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from tiny_capture import look_at_origin
from torch import Tensor

from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.field import FieldConfig
from infnerf_ns.model import InfNeRFModel, InfNeRFModelConfig, LossConfig
from infnerf_ns.sampler import SamplerConfig
from infnerf_ns.tree_building import OctreeConfig

PHOTOS, DEPTH = 3, 2


CONE_ALONE = {"interval_footprint": 0.0}
"""Sampler options: so few samples have long intervals, for which coarse nodes answer; where much of the tree shall be
touched, the pixel's cone alone asks."""


def tiny_scene(seed: int = 0, count: int = 600) -> SfMScene:
    """Points in a cube, some of them seen from close by."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator) - 0.5
    footprints = 0.05 * torch.rand(count, generator=generator) ** 3
    return SfMScene(points, footprints, torch.full((count,), 3), near=0.2 + 0.01 * seed, source="tracks")


def tiny_config(
    field: dict | None = None, sampler: dict | None = None, losses: dict | None = None, **octree
) -> InfNeRFModelConfig:
    """A model of a few kilobytes."""
    sizes = {
        **{"hash_levels": 3, "base_resolution": 4, "log2_table_size": 10, "hidden_width": 16, "color_hidden_width": 16},
        **{"color_hidden_layers": 1, "geo_features": 7, "appearance_dim": 4},
        **{"proposal_resolution": 16, "proposal_log2_table_size": 10},
    }
    return InfNeRFModelConfig(
        octree=OctreeConfig(**{"max_level": DEPTH, "node_resolution": 16, "min_points": 4, **octree}),
        field=FieldConfig(**{**sizes, **(field or {})}),
        sampler=SamplerConfig(**{"proposal_samples": (24, 12), "samples": 8, **(sampler or {})}),
        losses=LossConfig(**{"tree_points": 64, "tree_every": 8, **(losses or {})}),
    )


def tiny_model(
    config: InfNeRFModelConfig | None = None, scene: SfMScene | None = None, active: int = DEPTH
) -> InfNeRFModel:
    """On that scene; its levels down to ``active`` have started."""
    box = SceneBox(torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))
    model = (config or tiny_config()).setup(
        scene_box=box,
        num_train_data=PHOTOS,
        metadata={"sfm_scene": scene or tiny_scene()},
        device="cpu",
        grad_scaler=None,
    )
    model.field.activate_level(active)
    return model


def scrambled(model: InfNeRFModel, by: float = 0.2) -> InfNeRFModel:
    """The same model, as if it had learnt something: every page is another."""
    generator = torch.Generator().manual_seed(9)
    for bank in (*model.field.grids, *model.field.decoders, *model.field.proposals):
        bank.data.add_(by * torch.randn(bank.shape, generator=generator))
    return model


def tiny_camera(kind: CameraType, focal: float, width: int = 12, height: int = 8) -> Cameras:
    """One that looks at the scene."""
    pose = torch.from_numpy(look_at_origin(np.array([0.3, -1.5, 0.8]))[None, :3]).float()
    return Cameras(pose, focal, focal, width / 2, height / 2, width, height, camera_type=kind)


def ray_batch(count: int = 64, seed: int = 0) -> tuple[RayBundle, dict[str, Tensor]]:
    """Training rays from random places around the scene towards it, and photo colours."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1) * 1.5
    targets = 0.4 * torch.randn(count, 3, generator=generator)
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    photos = torch.randint(PHOTOS, (count, 1), generator=generator)
    rays = RayBundle(origins, directions, torch.full((count, 1), 1e-5), camera_indices=photos)
    return rays, {"image": torch.rand(count, 3, generator=generator)}


def training_losses(model: InfNeRFModel, step: int = 0) -> dict[str, Tensor]:
    """The losses of one step on a batch of rays."""
    model.train()
    model.step = step
    rays, batch = ray_batch()
    outputs = model(rays)
    metrics = model.get_metrics_dict(outputs, batch)
    assert {"psnr", "distortion"} <= set(metrics)
    return model.get_loss_dict(outputs, batch, metrics)
