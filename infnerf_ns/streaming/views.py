"""Images and rays of a packed model: what is done before and after the rendering itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from infnerf_ns.sampler import ORTHOGRAPHIC_FOOTPRINT, ROUTING_SCALE
from infnerf_ns.streaming.node_cache import NodeCache
from infnerf_ns.streaming.selection import fitting_scale, touched_up_to, view_tiles

_REGION_RAYS = 2048
"""Rays from different places that are rendered at once: their nodes must fit into the budget together."""
_LOOK_AHEAD_WIDTH = 96
"""Pixels across the rays that stand for the next image's."""
_PROBE_RAYS = 4096
"""About so many rays of an image tell which nodes its samples touch, before it is rendered."""
_PROBE_MARGIN = 0.1
"""Share of the pages left free for nodes that none of these rays has touched."""


@dataclass
class FrameReport:
    """What an image needed."""

    seconds: float
    nodes_in_view: int
    """that its rays can touch at full detail, the root included"""
    nodes_used: int
    """that its samples have touched"""
    bytes_used: int
    """of those, in memory"""
    bytes_read: int
    """from page files"""
    bytes_resident: int
    """when it was done"""
    footprint_scale: float
    """samples were routed by footprints this much larger"""
    coarsened: bool
    """more than asked for, to fit the budget"""


class StreamedViews:
    """Plans the images of a packed model.

    Args:
        cache: of its nodes.
        sharpening: the model routes samples by their footprints over this.
        level_cap: the level below which the model does not look at the moment; None: all are looked at.
    """

    def __init__(self, cache: NodeCache, sharpening: float, level_cap: Callable[[], int | None]) -> None:
        self.cache = cache
        self._level_cap = level_cap
        self.last_frame: FrameReport | None = None
        self.in_view: Bool[Tensor, "N"] | None = None
        """nodes of the last image's view"""
        self.used: Bool[Tensor, "N"] | None = None
        """nodes that it has used"""
        self._sharpening = sharpening
        self._last_pose: Float[Tensor, "3 4"] | None = None

    def touched_up_to(self, rays: RayBundle) -> Float[Tensor, "N"]:
        """Up to which footprint scale an image of rays [H, W] touches each node (:mod:`.selection`)."""
        octree = self.cache.octree
        tiles = view_tiles(
            octree.cube,
            rays.origins,
            rays.directions,
            rays.pixel_area,
            rays.nears,
            (rays.metadata or {}).get(ORTHOGRAPHIC_FOOTPRINT),
        )
        touched, cap = touched_up_to(octree, tiles, self._sharpening), self._level_cap()
        return touched if cap is None else torch.where(octree.level > cap, 0.0, touched)

    @contextmanager
    def image(
        self, rays: RayBundle, footprint_scale: float, render: Callable[[RayBundle], dict[str, Tensor]]
    ) -> Iterator[float]:
        """While an image is rendered; writes a report at its end.

        Args:
            rays: of the image, [H, W].
            footprint_scale: that is asked for.
            render: renders flat rays.

        Gives:
            The footprint scale to route by, larger where the memory budget asks for it.
        """
        start = perf_counter()
        with self.cache.frame() as began:
            known = not bool((rays.pixel_area == 1).any())  # texture export names no pixels: it takes what it gets
            touched = self.touched_up_to(rays) if known else None
            before = self.cache.counters.bytes_read
            scale = footprint_scale if touched is None else self._fitting(rays, touched, footprint_scale, render)
            yield scale
            self.used = self.cache.used_since(began)
            self.in_view = self.used if touched is None else (touched > footprint_scale).cpu()
            below_root = int(self.used.sum()) - 1
            self.last_frame = FrameReport(
                seconds=perf_counter() - start,
                nodes_in_view=int(self.in_view.sum()),
                nodes_used=below_root + 1,
                bytes_used=self.cache.root_bytes + below_root * self.cache.page_bytes,
                bytes_read=self.cache.counters.bytes_read - before,
                bytes_resident=self.cache.resident_bytes,
                footprint_scale=scale,
                coarsened=scale > footprint_scale,
            )

    def _fitting(
        self,
        rays: RayBundle,
        touched: Float[Tensor, "N"],
        footprint_scale: float,
        render: Callable[[RayBundle], dict[str, Tensor]],
    ) -> float:
        """The footprint scale at which an image fits into the budget, at least the one asked for.

        The nodes that rays can touch are more than their samples do touch, as most rays end at the first surface. So
        where they do not fit, some of the rays are rendered, coarse enough to fit for certain, and their samples say
        how fine it can be. Rays that they do not stand for may still need more than there is room for: then pages are
        read again, and the image is as it should be.
        """
        certain = fitting_scale(touched, self.cache.capacity)
        if certain <= footprint_scale:
            return footprint_scale
        step = max(1, round((len(rays) / _PROBE_RAYS) ** 0.5))
        down, along = (min(step, side) for side in rays.shape)
        probe = rays[down // 2 :: down, along // 2 :: along].flatten()
        probe.metadata[ROUTING_SCALE] = torch.full_like(probe.pixel_area, certain)
        with self.cache.asked_up_to() as asked:
            render(probe)
        fitting = certain * fitting_scale(asked, int((1 - _PROBE_MARGIN) * self.cache.capacity))
        scale = max(footprint_scale, min(certain, fitting))
        if scale > footprint_scale:
            self.cache.say_coarser(scale)
        return scale

    def expect_next(
        self, camera: Cameras, camera_rays: Callable[[Cameras], RayBundle], footprint_scale: float = 1.0
    ) -> None:
        """Loads what the next image needs, if the camera moves on as it moved from the one before.

        Args:
            camera: of the image just rendered.
            camera_rays: the rays of a camera.
            footprint_scale: that the image was asked for with.
        """
        pose = camera.camera_to_worlds.reshape(-1, 3, 4)[0].clone()
        before, self._last_pose = self._last_pose, pose
        if before is not None and not torch.equal(before, pose):
            following = copy.deepcopy(camera)
            following.camera_to_worlds = _moved_on(before, pose).expand_as(camera.camera_to_worlds).clone()
            self.prefetch(following, camera_rays, footprint_scale)

    def prefetch(
        self, camera: Cameras, camera_rays: Callable[[Cameras], RayBundle], footprint_scale: float = 1.0
    ) -> None:
        """Loads what an image needs while something else is done.

        Args:
            camera: of that image.
            camera_rays: the rays of a camera.
            footprint_scale: that it will be asked for with.
        """
        small = copy.deepcopy(camera)
        factor = min(1.0, _LOOK_AHEAD_WIDTH / float(camera.width.max()))
        small.rescale_output_resolution(factor, scale_rounding_mode="ceil")  # no side may vanish
        rays = camera_rays(small)
        rays.pixel_area = factor**2 * rays.pixel_area  # of the image that it stands for
        touched = self.touched_up_to(rays)
        nodes = touched > max(footprint_scale, fitting_scale(touched, self.cache.capacity))
        self.cache.prefetch(torch.nonzero(nodes)[:, 0])

    def by_region(self, rays: RayBundle, render: Callable[[RayBundle], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Renders flat rays; where they are no part of an image and come from many places, those that start near each
        other at once.

        Args:
            rays: R rays.
            render: renders some of them.
        """
        if self.cache.in_frame:
            return render(rays)
        with self.cache.frame():
            if len(rays) <= _REGION_RAYS or bool((rays.origins == rays.origins[0]).all()):
                return render(rays)
            order = self._along_curve(rays.origins)
            parts = [render(rays[part]) for part in order.split(_REGION_RAYS)]
            back = torch.argsort(order)
            return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _along_curve(self, places: Float[Tensor, "R 3"]) -> Int[Tensor, "R"]:
        """Order of places along a Morton curve through the root cube and around it."""
        cell = (self.cache.octree.cube.to_unit(places) * 64 + 512).clamp(0, 1023).long()
        code = torch.zeros_like(cell[:, 0])
        for bit in range(10):
            for axis in range(3):
                code |= ((cell[:, axis] >> bit) & 1) << (3 * bit + axis)
        return torch.argsort(code, stable=True)


def _moved_on(before: Float[Tensor, "3 4"], now: Float[Tensor, "3 4"]) -> Float[Tensor, "3 4"]:
    """The pose after the same rigid motion again."""
    turn = now[:, :3] @ before[:, :3].T
    return torch.cat([turn @ now[:, :3], (now[:, 3] + (now[:, 3] - before[:, 3]))[:, None]], dim=1)
