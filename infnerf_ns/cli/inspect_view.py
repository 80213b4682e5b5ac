"""Which levels and nodes of the octree one view of a trained run uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from infnerf_ns.camera_paths import read_camera_path
from infnerf_ns.cli.runs import open_run
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.octree import Octree
from infnerf_ns.ray_nodes import Evaluated
from infnerf_ns.rendering import BLEND_SHARPENING
from infnerf_ns.sampler import ORTHOGRAPHIC_FOOTPRINT
from infnerf_ns.streaming.selection import touched_up_to, view_tiles


@dataclass
class View:
    """What rendering an image has used; L levels, N nodes."""

    name: str
    """as the report calls it"""
    camera_to_world: Float[Tensor, "3 4"]
    """of the camera"""
    picture_share: Float[Tensor, "L"]
    """of the rendering weight of all samples, what each level has evaluated: the mean level of each pixel, weighted by
    its accumulation, as a histogram; sums to 1, or to 0 where the picture is empty"""
    sample_share: Float[Tensor, "L"]
    """of the field's samples; sums to 1. A sample that two levels are blended for counts by its shares."""
    in_view: Bool[Tensor, "N"]
    """nodes that the view's rays can touch at full detail"""
    used: Bool[Tensor, "N"]
    """nodes that the samples of proposals and field have touched, with their ancestors"""
    footprint_scale: float
    """above 1: drawn coarser than asked for, to fit the memory budget of a packed run"""
    rgb: Float[np.ndarray, "H W 3"]
    """the picture"""
    level_color: Float[np.ndarray, "H W 3"]
    """the model's output `level`"""


def load_model(folder: Path) -> tuple[InfNeRFModel, Cameras]:
    """The trained model of a run, in evaluation mode, and the cameras of its held-out photos.

    Raises:
        InputError: its data are not where its configuration says.
    """
    pipeline = open_run(folder).pipeline
    return pipeline.model, pipeline.datamanager.eval_dataset.cameras


def path_cameras(path: Path) -> Cameras:
    """The cameras of a camera path, as the viewer exports it.

    Raises:
        InputError: see `read_camera_path`.
    """
    return get_path_from_json(read_camera_path(path, "--camera-path"))


@torch.no_grad()
def look(model: InfNeRFModel, camera: Cameras, name: str) -> View:
    """Renders a camera at its full size and notes what that uses.

    Args:
        model: in evaluation mode, packed or not.
        camera: one.
        name: what the view is called.
    """
    octree = model.field.whole_tree
    rays = model.camera_rays(camera.to(model.device))
    model.config.render_normals = False  # another look at the field, at nodes that the samples have used before
    with _noted_levels(model) as levels, _noted_nodes(octree) as routed:
        outputs = model.get_outputs_for_camera_ray_bundle(rays)
    if model.views is None:
        in_view, used, scale = _in_view(model, octree, rays), routed, 1.0
    else:
        assert model.views.in_view is not None and model.views.used is not None and model.views.last_frame is not None
        in_view, used, scale = model.views.in_view, model.views.used, model.views.last_frame.footprint_scale
    return View(
        name=name,
        camera_to_world=camera.camera_to_worlds.reshape(-1, 3, 4)[0].cpu(),
        picture_share=levels.weight.cpu() / max(float(levels.weight.sum()), 1e-12),
        sample_share=levels.samples.cpu() / max(float(levels.samples.sum()), 1e-12),
        in_view=in_view.cpu(),
        used=used.cpu(),
        footprint_scale=scale,
        rgb=outputs["rgb"].clamp(0, 1).cpu().numpy(),
        level_color=outputs["level"].cpu().numpy(),
    )


def _in_view(model: InfNeRFModel, octree: Octree, rays: RayBundle) -> Bool[Tensor, "N"]:
    parallel = (rays.metadata or {}).get(ORTHOGRAPHIC_FOOTPRINT)
    tiles = view_tiles(octree.cube, rays.origins, rays.directions, rays.pixel_area, rays.nears, parallel)
    return touched_up_to(octree, tiles, BLEND_SHARPENING if model.config.blend_levels else 1.0) > 1


@dataclass
class _LevelSums:
    """Of all samples of the field, by the level that evaluates them."""

    weight: Float[Tensor, "L"]
    """rendering weight"""
    samples: Float[Tensor, "L"]
    """number"""


@contextmanager
def _noted_levels(model: InfNeRFModel) -> Iterator[_LevelSums]:
    """Sums up what the output `level` is made of."""
    count = model.field.whole_tree.depth + 1
    zeros = torch.zeros(count, dtype=torch.float64, device=model.device)
    sums = _LevelSums(zeros, zeros.clone())

    def note(evaluated: Evaluated) -> None:
        routed, share, weights = evaluated
        level = model.field.octree.level[routed.node]
        sums.samples.index_add_(0, level, share.double())
        sums.weight.index_add_(0, level, (share * weights.reshape(-1)[routed.order]).double())

    model.on_evaluated = note
    try:
        yield sums
    finally:
        model.on_evaluated = None


@contextmanager
def _noted_nodes(octree: Octree) -> Iterator[Bool[Tensor, "N"]]:
    """Marks the nodes on the paths of all samples that are routed, of the proposals and of the field."""
    used, route = torch.zeros(octree.num_nodes, dtype=torch.bool, device=octree.level.device), octree.route

    def note(*arguments: object, **named: object) -> Int[Tensor, "M K"]:
        path = route(*arguments, **named)  # type: ignore[arg-type]
        used[path[path >= 0]] = True
        return path

    octree.route = note  # type: ignore[method-assign]
    try:
        yield used
    finally:
        del octree.route
