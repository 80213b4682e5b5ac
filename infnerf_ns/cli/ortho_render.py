"""What a map shows: the extent of the scene, and the pixels of a tile, rendered."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle

from infnerf_ns.cli.ortho_tiles import Tile
from infnerf_ns.cli.raster_files import NO_HEIGHT, Content
from infnerf_ns.cli.raster_grid import ParallelRays, Window
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import MapFrame
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE
from infnerf_ns.streaming.selection import fitting_scale

_SMALLEST_PART = 16
"""Pixels; a tile whose nodes do not fit into the memory budget is rendered in parts down to that size."""
_HIT = 0.5
"""Accumulation from which a ray has hit something."""
_MIN_POINTS = 100


def content_box(model: InfNeRFModel, frame: MapFrame) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """The extent of what the photos show, in map coordinates: of the middle 98 % of the SfM points in x and in y (with
    a margin, as the root cube), and of all but one in a thousand at both ends in z; of the root cube where there are no
    points."""
    points = model.near_planes.points if model.near_planes is not None else torch.empty(0, 3)
    if len(points) < _MIN_POINTS:
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        places = frame.to_map(model.field.octree.cube.to_world(corners).cpu().numpy())
        return places.min(axis=0), places.max(axis=0)
    places = frame.to_map(points.cpu().numpy())
    low, high = np.quantile(places[:, :2], (0.01, 0.99), axis=0)
    margin = 0.025 * (high - low)
    bottom, top = np.quantile(places[:, 2], (0.001, 0.999))
    return np.array([*(low - margin), bottom]), np.array([*(high + margin), top])


class TileRenderer:
    """Renders windows of a map.

    Args:
        model: in evaluation.
        rays: of the map.
        contents: what its pixels hold.
    """

    def __init__(self, model: InfNeRFModel, rays: ParallelRays, contents: set[Content]) -> None:
        self._model, self._rays, self._contents = model, rays, contents
        model.config.render_normals = False  # they would cost a second look at the field

    def __call__(self, window: Window) -> Tile:
        """A tile. Nodes that do not fit into the memory budget together are loaded one part of the tile after the
        other, so that no tile is coarser than its neighbour.

        Raises:
            InputError: not even those of the smallest part fit.
        """
        rays = self._rays.bundle(window, self._model.device)
        if max(window.width, window.height) > _SMALLEST_PART and not self._fits(rays):
            first, second = (self(half) for half in window.halves())
            axis = 1 if window.width >= window.height else 0
            return {name: np.concatenate([first[name], second[name]], axis) for name in first}
        outputs = self._model.get_outputs_for_camera_ray_bundle(rays)
        views = self._model.views
        if views is not None and views.last_frame is not None and views.last_frame.coarsened:
            raise InputError(
                f"a budget of {views.cache.budget_bytes / 2**20:.0f} MiB does not hold the nodes of"
                f" {window.width} x {window.height} pixels: raise {BUDGET_VARIABLE}; finished tiles are kept, the same"
                " command goes on with them"
            )
        hit = (outputs["accumulation"][..., 0] >= _HIT).cpu().numpy()
        tile: Tile = {}
        if "rgb" in self._contents:
            color = (outputs["rgb"].cpu().numpy().clip(0, 1) * 255 + 0.5).astype(np.uint8)
            opacity = np.full((*hit.shape, 1), 255, np.uint8)
            tile["rgb"] = np.concatenate([color, opacity], axis=-1) * hit[..., None]
        if "height" in self._contents:
            heights = self._rays.heights(outputs["depth"][..., 0].cpu().numpy())
            tile["height"] = np.where(hit, heights, NO_HEIGHT).astype(np.float32)
        return tile

    def expect(self, window: Window) -> None:
        """Has the nodes of a window loaded while something else is done."""
        views = self._model.views
        if views is not None:
            touched = views.touched_up_to(self._rays.bundle(window, self._model.device))
            scale = max(1.0, fitting_scale(touched, views.cache.capacity))
            views.cache.prefetch(torch.nonzero(touched > scale)[:, 0])

    def _fits(self, rays: RayBundle) -> bool:
        views = self._model.views
        return views is None or fitting_scale(views.touched_up_to(rays), views.cache.capacity) <= 1
