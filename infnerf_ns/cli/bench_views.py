"""Three views of a demo town whatever its size, and which nodes of a tree the surfaces lie in that they show."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType

from infnerf_ns.data.demo_dataparser import METRES_PER_UNIT
from infnerf_ns.data.demo_scene import DemoSceneOptions
from infnerf_ns.data.demo_scene.flight import look_at
from infnerf_ns.data.demo_scene.raycaster import make_raycaster
from infnerf_ns.data.demo_scene.town import BLOCK, build_town
from infnerf_ns.footprint import cone_radius
from infnerf_ns.octree import Octree

VIEWS = ("street", "roof", "above")


class TownViews:
    """In the street next to the middle of the town, above the house next to it towards a corner of the town, and above
    all of it.

    Args:
        size: blocks per side.
        seed: of the town.
    """

    def __init__(self, size: int, seed: int) -> None:
        town = build_town(size, seed)
        self._rays = make_raycaster(town.mesh.corners)
        street = 0.0 if size % 2 == 0 else BLOCK / 2
        inwards = -1.0 if size % 2 else 1.0
        self.poses = [look_at(np.array([-8.0, street + 0.8, 2.2]), np.array([12.0, street + 3.0 * inwards, 2.6]))]
        """of :data:`VIEWS`, camera to world, scene units"""
        house = int(np.argmin(np.linalg.norm(town.facades.foot, axis=-1)))
        top = self._height(town.facades.foot[house] - 2 * town.facades.outward[house])
        roof = town.facades.foot[house] * np.array([1, 1, 0]) + np.array([0, 0, top + 4.0])
        self.poses.append(look_at(roof, np.array([town.half_side, town.half_side, 0.0])))
        over = town.half_side * np.array([0.0, -1.8, 2.4])
        self.poses.append(look_at(over, np.array([0.0, -0.1 * town.half_side, 0.0])))
        for pose in self.poses:
            pose[:, 3] /= METRES_PER_UNIT

    def _height(self, place: Float[np.ndarray, "3"]) -> float:
        """Of the town at a place, metres."""
        start = np.array([[place[0], place[1], 200.0]], np.float32)
        _, depth = self._rays.cast(start, np.array([[0, 0, -1.0]], np.float32))
        return 200.0 - float(depth[0])

    def surface_nodes(self, octree: Octree, camera: Cameras, sharpening: float) -> int:
        """How many nodes a view would touch if its samples lay on the surfaces that it shows and nowhere else: those on
        the paths to them, the root included.

        Args:
            octree: of the town.
            camera: one.
            sharpening: samples are routed by their footprints over this.
        """
        rays = camera.generate_rays(camera_indices=0).flatten()
        _, metres = self._rays.cast(rays.origins.numpy() * np.float32(METRES_PER_UNIT), rays.directions.numpy())
        hit = torch.from_numpy(np.isfinite(metres))
        distance = torch.from_numpy(metres)[hit] / METRES_PER_UNIT
        places = rays.origins[hit] + rays.directions[hit] * distance[:, None]
        footprints = cone_radius(distance, rays.pixel_area[hit, 0]) / sharpening
        nodes = octree.route(octree.cube.to_unit(places), footprints).unique()
        return len(nodes[nodes >= 0]) if len(places) else 1


def view_camera(pose: Float[np.ndarray, "3 4"], width: int, height: int) -> Cameras:
    """A camera with the field of view of the demo scene's photos.

    Args:
        pose: camera to world, scene units.
        width, height: pixels.
    """
    lens = DemoSceneOptions(1).lens
    focal = lens.focal / lens.width * width
    pose = torch.from_numpy(pose.astype(np.float32))[None]
    return Cameras(pose, focal, focal, width / 2, height / 2, width, height, camera_type=CameraType.PERSPECTIVE)
