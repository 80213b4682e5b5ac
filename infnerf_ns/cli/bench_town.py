"""A demo town of any size to train on without taking its photos: its cameras, SfM points, rays and their colours.

Cameras, points and the pixels that are drawn are those of ``ns-train ... infnerf-demo --size N``. The photos of a town
of 8 x 8 blocks would take hours and gigabytes; of the few hundred thousand pixels that a benchmark draws, the colours
are found by casting rays into the town, 2 x 2 per pixel, and the depths by another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from rich.progress import track
from torch import Tensor

from infnerf_ns.data.demo_dataparser import METRES_PER_UNIT, InfNeRFDemoDataParserConfig, scene_outputs
from infnerf_ns.data.demo_scene import DemoScene, DemoSceneOptions
from infnerf_ns.data.demo_scene.photographer import Lens, Photographer
from infnerf_ns.data.demo_scene.survey import Survey
from infnerf_ns.data.photo_order import neighbour_order
from infnerf_ns.data.pyramid import PixelDraw, PixelPyramid
from infnerf_ns.data.pyramid_datamanager import PyramidDataManagerConfig
from infnerf_ns.data.pyramid_rays import PyramidRays
from infnerf_ns.data.sfm import SfMScene, build_sfm_scene
from infnerf_ns.data.thread_pool import threads
from infnerf_ns.near_plane import near_planes

_SAMPLES_PER_SIDE = 2
_PIXELS_AT_ONCE = 1 << 13


@dataclass
class Town:
    """What a training needs to know about a town, except for the drawing of rays (:class:`TownRays`)."""

    size: int
    """blocks per side"""
    cameras: Cameras
    """of the C train photos"""
    scene: SfMScene
    """SfM points, as training has them"""
    near_planes: Float[Tensor, "c"]
    """of the cameras, scene units"""
    colors: UInt8[Tensor, "b r 3"]
    """of the rays of batch 0, 1, 2 ..."""
    depths: Float[Tensor, "b r"]
    """along the same rays, scene units; inf: sky"""


class TownRays:
    """Draws batches of rays as the data manager does, the same ones in every process.

    Args:
        cameras: of the train photos.
        config: pyramid levels, how they share the rays, and photos per step.
    """

    def __init__(self, cameras: Cameras, config: PyramidDataManagerConfig) -> None:
        sizes = [(int(cameras.height[0]), int(cameras.width[0]))] * len(cameras)
        # The pixels are never written, so they take address space but no memory.
        self._photos = config.photos_per_step
        order = neighbour_order(cameras) if self._photos else None
        self.pyramid = PixelPyramid(sizes, 3, config.num_pyramid_levels, level_share=config.level_share, order=order)
        self._rays = PyramidRays(cameras, self.pyramid, config.ray_table_mib << 20)

    def draw(self, batch: int, count: int) -> PixelDraw:
        """The pixels of a batch."""
        return self.pyramid.draw(count, generator=torch.Generator().manual_seed(batch), photos=self._photos)

    def __call__(self, town: Town, batch: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays of a batch, each with the near plane of its photo, and beside ``image [R, 3]`` their ``depth [R]``; the
        batches go round."""
        batch %= len(town.colors)
        rays = self.through(self.draw(batch, town.colors.shape[1]))
        rays.nears = town.near_planes[rays.camera_indices]
        return rays, {"image": town.colors[batch].float() / 255, "depth": town.depths[batch]}

    def through(self, draw: PixelDraw) -> RayBundle:
        """Rays through drawn pixels."""
        return self._rays(draw)


def survey_town(size: int, seed: int, data: PyramidDataManagerConfig, rays: int, batches: int) -> Town:
    """The town of that many blocks per side, and colours and depths of the first batches of rays in it.

    Args:
        size: blocks per side.
        seed: of the town.
        data: how rays are drawn.
        rays: R, per batch.
        batches: B.
    """
    options, parser = DemoSceneOptions(size, seed), InfNeRFDemoDataParserConfig()
    survey = Survey(size, seed, options.num_photos, options.lens)
    scene = DemoScene(options, [], survey.poses, survey.look_distance, survey.black_points())
    outputs = scene_outputs(scene, "train", parser.eval_interval)
    poses = survey.poses[np.arange(len(survey.poses)) % parser.eval_interval != parser.eval_interval // 2]
    sfm = build_sfm_scene(outputs, outputs.cameras)
    nears = near_planes(sfm.points, outputs.cameras, sfm.near)
    source = TownRays(outputs.cameras, data)
    drawn = [source.draw(batch, rays) for batch in range(batches)]
    where = torch.cat([torch.stack([draw.photo, draw.level, draw.row, draw.column]) for draw in drawn], dim=1).numpy()
    colors = _colors(survey, poses, where).reshape(batches, rays, 3)
    depths = torch.stack([_depths(survey, source.through(draw)) for draw in drawn])
    return Town(size, outputs.cameras, sfm, nears, torch.from_numpy(colors), depths)


def _depths(survey: Survey, rays: RayBundle) -> Float[Tensor, "r"]:
    """Distance to the town along rays, scene units."""
    _, metres = survey.rays.cast(rays.origins.numpy() * np.float32(METRES_PER_UNIT), rays.directions.numpy())
    return torch.from_numpy(metres) / METRES_PER_UNIT


def _colors(
    survey: Survey, poses: Float32[np.ndarray, "c 3 4"], where: Int64[np.ndarray, "4 n"]
) -> UInt8[np.ndarray, "n 3"]:
    """What photos of the size of each pixel's pyramid level show there.

    Args:
        survey: of the town.
        poses: of the photos.
        where: photo, level, row and column of each pixel.
    """
    photo, level, row, column = where
    colors = np.empty((len(photo), 3), np.uint8)
    order = np.argsort(level, kind="stable")
    parts = np.array_split(order, np.searchsorted(level[order], np.arange(1, level.max() + 1)))
    chunks = [part[start : start + _PIXELS_AT_ONCE] for part in parts for start in range(0, len(part), _PIXELS_AT_ONCE)]

    def fill(at: Int64[np.ndarray, "k"]) -> None:
        reduced, full = int(level[at[0]]), survey.lens
        lens = Lens(full.width >> reduced, full.height >> reduced, full.focal / 2**reduced)
        photographer = Photographer(survey.town, survey.rays, lens, _SAMPLES_PER_SIDE)
        colors[at] = photographer.pixels(poses[photo[at]], row[at], column[at])

    title = f"Colours in a town of {survey.town.size} x {survey.town.size} blocks"
    with threads() as pool:
        for _ in track(pool.map(fill, chunks), title, total=len(chunks), transient=True):
            pass
    return colors
