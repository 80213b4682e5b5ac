"""What a training shows beside numbers: pictures of the tree, of its levels and of the sampling.

They go the way of nerfstudio's evaluation images, so they reach TensorBoard and W&B through its writer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from infnerf_ns.data.pyramid import level_mean
from infnerf_ns.data.pyramid_rays import level_camera
from infnerf_ns.training.image_pictures import error_map, side_by_side
from infnerf_ns.training.pictures import octree_picture, sampling_picture, tree_history_picture

if TYPE_CHECKING:
    from infnerf_ns.model import InfNeRFModel
    from infnerf_ns.ray_nodes import Evaluated

_STRIP_SIDE = 360
"""Longest side in pixels of the renders that are shown side by side: each costs a rendering of its own."""


@torch.no_grad()
def training_pictures(
    model: InfNeRFModel, camera: Cameras, photo: Float[Tensor, "H W 3"], rendered: Float[Tensor, "H W2 3"]
) -> dict[str, Float[Tensor, "h w 3"]]:
    """Pictures of the state of a training, by name.

    Args:
        model: in evaluation mode.
        camera: of a held-out photo, shape (1,).
        photo: that photo.
        rendered: what the model shows in its place, or in that of its right part.
    """
    octree = model.field.whole_tree
    pictures = {
        "error": error_map(rendered.cpu(), photo[:, -rendered.shape[1] :].cpu()),
        "levels": _levels(model, camera, photo),
        "octree": octree_picture(octree),
        "sampling": _sampling(model, camera),
    }
    history = model.growth.history.cpu()
    if len(history):
        steps, (nodes, births, deaths) = history[:, 0, 0], history[:, 1:].unbind(dim=1)
        used = int(nodes.any(dim=0).nonzero().max()) + 1
        pictures["tree_history"] = tree_history_picture(steps, nodes[:, :used], births[:, :used], deaths[:, :used])
    return pictures


def _levels(model: InfNeRFModel, camera: Cameras, photo: Float[Tensor, "H W 3"]) -> Float[Tensor, "h w 3"]:
    """The same view with the tree cut at each level, and the photo."""
    coarser = 0
    while max(photo.shape[:2]) >> coarser > _STRIP_SIDE:
        coarser += 1
    small = level_mean(photo.cpu(), coarser)
    rays = model.camera_rays(level_camera(camera, coarser, *small.shape[:2]).to(model.device))
    images, before = {}, model.field.level_cap
    deepest = min(model.field.octree.depth, int(model.field.active_level))
    try:
        for level in range(deepest + 1):
            model.field.level_cap = level
            name = "root" if level == 0 else f"level {level}"
            images[name] = model.get_outputs_for_camera_ray_bundle(rays)["rgb"].cpu()
    finally:
        model.field.level_cap = before
    return side_by_side({**images, "photo": small})


def _sampling(model: InfNeRFModel, camera: Cameras) -> Float[Tensor, "h w 3"]:
    """Proposals and samples along the ray in the middle of a view."""
    rays = model.camera_rays(camera.to(model.device))
    height, width = rays.shape
    ray = rays[height // 2 : height // 2 + 1, width // 2].flatten()
    field_samples, weights, rounds = model.sampler(ray, partial(model.field.proposal_density), model.step)
    told, seen = model.on_evaluated, []
    model.on_evaluated = seen.append
    try:
        model.get_outputs(ray)
    finally:
        model.on_evaluated = told
    (evaluated,) = seen
    return sampling_picture(
        [each.edges[0].cpu() for each in (*rounds, field_samples)],
        [each[0, :, 0].cpu() for each in (*weights, evaluated.weights)],
        _mean_level(model, evaluated).cpu(),
        model.field.octree.depth,
    )


def _mean_level(model: InfNeRFModel, evaluated: Evaluated) -> Float[Tensor, "S"]:
    """Mean octree level of the nodes that have evaluated each sample of a single ray."""
    routed, share, weights = evaluated
    level = share * model.field.octree.level[routed.node]
    return torch.zeros(weights.shape[1], device=share.device).index_add(0, routed.order, level)
