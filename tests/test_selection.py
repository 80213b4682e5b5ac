"""The selected nodes against those that samples along all rays touch: never one missed, at most twice as many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from tiny_capture import look_at_origin
from torch import Tensor

from infnerf_ns.footprint import cone_radius
from infnerf_ns.octree import Octree, RootCube, build_octree
from infnerf_ns.streaming.selection import Tiles, fitting_scale, touched_up_to, view_tiles

KINDS = {
    "perspective": (CameraType.PERSPECTIVE, 55.0),
    "narrow": (CameraType.PERSPECTIVE, 400.0),
    "wide": (CameraType.PERSPECTIVE, 20.0),
    "fisheye": (CameraType.FISHEYE, 30.0),
    "equirectangular": (CameraType.EQUIRECTANGULAR, 48.0),
}
WIDTH, HEIGHT = 96, 64
NEAR = 0.02


def surface_tree(max_level: int = 5, turned: bool = False) -> Octree:
    """Hills over a plane, as a scene has its surface; all cells that hold some of it, down to the level."""
    generator = torch.Generator().manual_seed(3)
    place = 2 * torch.rand(60_000, 2, generator=generator) - 1
    height = 0.2 * torch.sin(4 * place[:, 0]) * torch.cos(3 * place[:, 1])
    angle = math.radians(30) if turned else 0.0
    rotation = torch.tensor(
        [[math.cos(angle), math.sin(angle), 0.0], [-math.sin(angle), math.cos(angle), 0.0], [0.0, 0.0, 1.0]]
    )
    cube = RootCube(torch.tensor([0.1, -0.2, 0.0]), 2.2, rotation)
    points = torch.cat([place, height[:, None]], dim=1)
    return build_octree(points, torch.zeros(len(points)), cube, max_level=max_level, min_points=1, node_resolution=24)


def rays_of(kind: str, position: np.ndarray) -> RayBundle:
    """Rays [H, W] of a camera that looks at the origin."""
    camera_type, focal = KINDS[kind]
    pose = torch.from_numpy(look_at_origin(position)[None, :3]).float()
    camera = Cameras(pose, focal, focal, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT, camera_type=camera_type)
    return camera.generate_rays(camera_indices=0, keep_shape=True)


def tiles_of(tree: Octree, rays: RayBundle, parallel: Tensor | None = None) -> Tiles:
    nears = torch.full_like(rays.pixel_area, NEAR)
    return view_tiles(tree.cube, rays.origins, rays.directions, rays.pixel_area, nears, parallel)


def really_touched(tree: Octree, rays: RayBundle, scale: float = 1.0, parallel: float | None = None) -> Tensor:
    """Nodes on the paths of samples that stand close to each other along every ray (a hundredth of the distance)."""
    distance = NEAR * 1.01 ** torch.arange(int(math.log(6 / NEAR) / math.log(1.01)))
    touched = torch.zeros(tree.num_nodes + 1, dtype=torch.bool)
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    for t in distance.tolist():
        radius = cone_radius(torch.full_like(origins[:, 0], t), rays.pixel_area.reshape(-1))
        radius = radius if parallel is None else torch.full_like(radius, parallel)
        path = tree.route(tree.cube.to_unit(origins + t * directions), scale * radius, backend="torch")
        touched[path.reshape(-1)] = True
    return touched[:-1]


positions = st.tuples(st.floats(-1.6, 1.6), st.floats(-1.6, 1.6), st.floats(0.05, 2.5)).filter(
    lambda place: np.hypot(place[0], place[1]) > 0.1
)


@settings(max_examples=8)
@given(positions, st.sampled_from(sorted(KINDS)), st.booleans())
def test_no_touched_node_is_missed(position: tuple, kind: str, turned: bool) -> None:
    tree = surface_tree(turned=turned)
    rays = rays_of(kind, np.array(position))
    selected = touched_up_to(tree, tiles_of(tree, rays)) > 1
    missed = really_touched(tree, rays) & ~selected
    assert not bool(missed.any()), tree.level[missed].tolist()


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("position", [(1.3, 0.4, 0.5), (0.3, 0.3, 0.25), (-0.4, 1.5, 2.3)])
def test_at_most_twice_as_many_are_selected(kind: str, position: tuple) -> None:
    tree = surface_tree(6)
    rays = rays_of(kind, np.array(position))
    selected = touched_up_to(tree, tiles_of(tree, rays)) > 1
    touched = really_touched(tree, rays)
    assert not bool((touched & ~selected).any())
    assert int(selected.sum()) <= 2 * int(touched.sum())


def test_a_street_view_needs_a_small_part_of_a_large_tree() -> None:
    tree = surface_tree(6)
    rays = rays_of("perspective", np.array([0.5, 0.4, 0.12]))
    share = float((touched_up_to(tree, tiles_of(tree, rays)) > 1).float().mean())
    assert 0 < share < 0.3, share


def test_what_is_behind_the_camera_is_not_selected() -> None:
    tree = surface_tree()
    rays = rays_of("narrow", np.array([0.5, 0.0, 0.3]))
    selected = touched_up_to(tree, tiles_of(tree, rays)) > 1
    fine = selected & (tree.level >= 4)
    low = tree.cube.to_world(tree.coords / 2.0 ** tree.level[:, None])
    assert bool(fine.any())
    assert float(low[fine, 0].max()) < 0.5 + 1e-3


@pytest.mark.parametrize("scale", [1.0, 1.7, 5.0])
def test_the_scale_says_when_a_node_is_no_longer_needed(scale: float) -> None:
    tree = surface_tree()
    rays = rays_of("perspective", np.array([1.0, 0.4, 0.5]))
    selected = touched_up_to(tree, tiles_of(tree, rays)) > scale
    touched = really_touched(tree, rays, scale)
    assert not bool((touched & ~selected).any())
    assert int(selected.sum()) <= 2 * int(touched.sum())


def test_children_are_never_needed_longer_than_their_parents() -> None:
    tree = surface_tree()
    scale = touched_up_to(tree, tiles_of(tree, rays_of("fisheye", np.array([0.2, 0.4, 0.5]))))
    assert scale[0] == torch.inf
    assert bool((scale[1:] <= scale[tree.parent[1:]]).all())


def test_parallel_rays_have_one_footprint_everywhere() -> None:
    tree = surface_tree()
    side, pixels = 0.5, 64
    step = (torch.arange(pixels) + 0.5) / pixels * side - side / 2
    y, x = torch.meshgrid(step, step, indexing="ij")
    origins = torch.stack([x, y, torch.full_like(x, 2.0)], dim=-1)
    directions = torch.tensor([0.0, 0.0, -1.0]).expand_as(origins)
    rays = RayBundle(origins, directions, torch.zeros(pixels, pixels, 1))
    for footprint in (side / pixels / 2, 1.5 * tree.gsd(3), 1.5 * tree.gsd(1)):
        parallel = torch.full_like(rays.pixel_area, footprint)
        selected = touched_up_to(tree, tiles_of(tree, rays, parallel)) > 1
        touched = really_touched(tree, rays, parallel=footprint)
        assert not bool((touched & ~selected).any())
        assert int(selected.sum()) <= 2 * int(touched.sum())
    assert int(tree.level[selected].max()) == 1  # the last footprint is coarser than what a node of level 1 shows


@given(st.lists(st.floats(0.0, 50.0), min_size=2, max_size=30), st.integers(0, 30))
def test_the_fitting_scale_is_the_least_that_fits(scales: list[float], capacity: int) -> None:
    touched = torch.tensor([torch.inf, *scales])
    scale = fitting_scale(touched, capacity)
    assert int((touched[1:] > scale).sum()) <= capacity
    if scale > 0:  # at any smaller one, the next node belongs to the view
        assert int((touched[1:] >= scale).sum()) > capacity
