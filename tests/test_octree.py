"""Geometry and routing of the octree: facts that hold for every tree, and one tree worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infnerf_ns.footprint import cone_radius, continuous_level, level_gsd, point_footprint
from infnerf_ns.octree import RootCube, build_octree, contract, root_cube

CUBE = RootCube(torch.zeros(3), 2.0, torch.eye(3))


def _random_tree(seed: int, max_level: int = 4, count: int = 400):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator) ** 3 * 2 - 1
    footprints = 0.1 * torch.rand(count, generator=generator) ** 4
    return build_octree(points, footprints, CUBE, max_level=max_level, min_points=4, node_resolution=8)


seeds = st.integers(0, 2**31)


@given(seeds)
@settings(max_examples=30)
def test_tree_is_consistent(seed: int) -> None:
    tree = _random_tree(seed)
    inner = torch.nonzero(tree.parent >= 0)[:, 0]
    assert tree.level.tolist() == sorted(tree.level.tolist()), "nodes are sorted by level"
    assert bool((tree.level[inner] == tree.level[tree.parent[inner]] + 1).all())
    assert bool((tree.coords[inner] // 2 == tree.coords[tree.parent[inner]]).all())
    assert bool((tree.coords >= 0).all() and (tree.coords < (2**tree.level)[:, None]).all())
    cells = {(int(level), *coords) for level, coords in zip(tree.level, tree.coords.tolist())}
    assert len(cells) == tree.num_nodes, "no cell has two nodes"
    assert sum(tree.nodes_per_level) == tree.num_nodes == int((tree.children >= 0).sum()) + 1
    for level, count in enumerate(tree.nodes_per_level):
        assert sorted(tree.row[tree.level == level].tolist()) == list(range(count))


@given(seeds)
@settings(max_examples=30)
def test_locate_agrees_with_a_walk_down_the_definition(seed: int) -> None:
    tree = _random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(200, 3, generator=generator) * 2.6 - 1.3
    footprints = tree.gsd(0) * 2 ** (torch.rand(200, generator=generator) * 8 - 5)
    located = tree.locate(positions, footprints)
    unit = CUBE.to_unit(positions)
    for i in range(len(positions)):
        node = 0
        inside = bool(((unit[i] >= 0) & (unit[i] < 1)).all())
        while inside and footprints[i] < tree.gsd(int(tree.level[node])):
            cell = (unit[i] * 2 ** (int(tree.level[node]) + 1)).long() & 1
            child = int(tree.children[node, int(cell[0] + 2 * cell[1] + 4 * cell[2])])
            if child < 0:
                break
            node = child
        assert node == int(located.node[i])
    assert bool(((located.local >= 0) & (located.local < 1)).all())


@given(seeds)
@settings(max_examples=20)
def test_route_in_numba_is_the_route_in_torch(seed: int) -> None:
    tree = _random_tree(seed)
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(300, 3, generator=generator) * 1.2 - 0.1
    footprints = tree.gsd(0) * 2 ** (torch.rand(300, generator=generator) * 8 - 5)
    for radii in (None, footprints):
        for cap in (None, 1):
            # Float64 samples take the torch walk; every float32 is exact in float64.
            reference = tree.route(unit.double(), None if radii is None else radii.double(), cap)
            assert torch.equal(tree.route(unit, radii, cap), reference)


@given(seeds, st.integers(0, 4))
@settings(max_examples=20)
def test_a_cut_is_a_cap_on_the_path(seed: int, cap: int) -> None:
    tree = _random_tree(seed)
    unit = torch.rand(100, 3, generator=torch.Generator().manual_seed(seed))
    whole, cut = tree.route(unit, None), tree.route(unit, None, max_level=cap)
    assert torch.equal(whole[:, : cut.shape[1]], cut)
    assert bool((tree.level[cut.max(dim=1).values] <= cap).all())
    assert bool((tree.level[whole.max(dim=1).values] >= tree.level[cut.max(dim=1).values]).all())


def test_children_contain_their_samples_in_local_coordinates() -> None:
    tree = _random_tree(3)
    positions = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    located = tree.locate(positions, None)
    deep = tree.level[located.node] > 0
    assert int(deep.sum()) > 50
    corner = (located.local + tree.coords[located.node]) / (2.0 ** tree.level[located.node])[:, None]
    assert torch.allclose(CUBE.to_world(corner[deep]), positions[deep], atol=1e-5)


def test_blend_weight_is_continuous_in_the_footprint() -> None:
    """A sample that shrinks passes from a node to its child without a jump: the child begins with weight 0."""
    points = torch.full((64, 3), 0.3)
    tree = build_octree(points, torch.full((64,), 1e-6), CUBE, max_level=3, min_points=1, node_resolution=8)
    assert tree.nodes_per_level == [1, 1, 1, 1]
    footprints = tree.gsd(0) * 2.0 ** torch.linspace(1.5, -4.5, 2401)
    located = tree.locate(points[:1].expand(2401, 3), footprints)
    level = tree.level[located.node] - 1 + located.fraction  # where between parent and node the result lies
    assert level.diff().abs().max() < 0.01 and level[0] == 0 and level[-1] == 3
    assert located.fraction[0] == 1 and located.fraction[-1] == 1


def test_background_stays_in_the_root() -> None:
    tree = _random_tree(5)
    outside = torch.tensor([[1.5, 0.0, 0.0], [0.0, -3.0, 0.0], [100.0, 100.0, 100.0]])
    assert tree.locate(outside, torch.full((3,), 1e-9)).node.tolist() == [0, 0, 0]


def test_tree_by_hand() -> None:
    """Side 2, resolution 8, sharpness 2: gsd(0) = 1/8, gsd(1) = 1/16. Three points in one octant, one in another."""
    points = torch.tensor([[0.6, 0.6, 0.6], [0.7, 0.6, 0.6], [0.1, 0.1, 0.1], [-0.5, 0.5, 0.5], [5.0, 0.0, 0.0]])
    footprints = torch.tensor([0.05, 0.05, 0.1, 0.01, 0.001])
    tree = build_octree(points, footprints, CUBE, max_level=5, min_points=2, node_resolution=8)
    assert tree.gsd(0) == pytest.approx(1 / 8) and tree.gsd(1) == pytest.approx(1 / 16)
    # level 1: three points of octant (1, 1, 1) are finer than 1/8; the single one elsewhere is too few. level 2: two
    # are finer
    # than 1/16, both in cell (3, 3, 3). level 3 would need footprints below 1/32.
    assert tree.level.tolist() == [0, 1, 2]
    assert tree.coords.tolist() == [[0, 0, 0], [1, 1, 1], [3, 3, 3]]
    assert [row["pruned"] for row in tree.summary()] == [0, pytest.approx(7 / 8), pytest.approx(63 / 64)]


def test_contraction() -> None:
    unit = torch.rand(100, 3)
    assert torch.allclose(contract(unit), 0.25 + unit / 2), "the cube is the middle half"
    far = torch.tensor([[1e7, 0.5, 0.5]])
    assert torch.allclose(contract(far), torch.tensor([[1.0, 0.5, 0.5]]), atol=1e-5)
    grid = torch.linspace(-3, 4, 400)[:, None] * torch.ones(1, 3)
    assert bool((contract(grid).diff(dim=0) > 0).all()), "monotone along a diagonal"
    points = (torch.rand(50, 3, dtype=torch.float64) * 8 - 4).requires_grad_()
    assert torch.autograd.gradcheck(contract, points)


@given(seeds)
@example(200)
@settings(max_examples=20)
def test_root_cube_round_trip_and_cover(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(500, 3, generator=generator) * torch.tensor([5.0, 3.0, 0.5]) + 7
    outliers = torch.randn(2, 3, generator=generator) * 1000
    for align in ("none", "pca"):
        cube = root_cube(torch.cat([points, outliers]), align=align)
        turned = points @ cube.rotation.T
        extent = torch.quantile(turned, 0.985, dim=0) - torch.quantile(turned, 0.015, dim=0)
        assert extent.max() < cube.side < 1.5 * extent.max(), "outliers do not stretch the cube"
        assert torch.allclose(cube.rotation @ cube.rotation.T, torch.eye(3), atol=1e-5)
        assert torch.linalg.det(cube.rotation) == pytest.approx(1.0, abs=1e-4)
        unit = cube.to_unit(points)
        assert torch.allclose(cube.to_world(unit), points, atol=1e-3)
        assert ((unit >= 0) & (unit < 1)).all(dim=1).float().mean() > 0.9


def test_root_cube_levels_a_tilted_flat_scene_only() -> None:
    flat = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 8.0, 0.4])
    angle = math.radians(25)
    tilt = torch.tensor(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]], dtype=torch.float32
    )
    levelled = root_cube(flat @ tilt.T, align="auto")
    assert (levelled.rotation[2] @ (tilt @ torch.tensor([0.0, 0.0, 1.0]))).item() > math.cos(math.radians(3))
    assert torch.equal(root_cube(flat, align="auto").rotation, torch.eye(3))
    room = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(root_cube(room @ tilt.T, align="auto").rotation, torch.eye(3))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("align", ["auto", "pca"])
def test_root_cube_of_a_flat_scene_along_any_axis(axis: int, align: str) -> None:
    """Regression: a plane whose normal is exactly y left a rotation with two rows of zeros."""
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 2.5])
    points[:, axis] = 0
    cube = root_cube(points, align=align)
    assert torch.allclose(cube.rotation @ cube.rotation.T, torch.eye(3), atol=1e-5)
    assert torch.linalg.det(cube.rotation) == pytest.approx(1.0, abs=1e-4)
    assert cube.rotation[2].abs().argmax() == axis and cube.rotation[2, axis] > 0


def test_root_cube_without_extent() -> None:
    with pytest.raises(ValueError, match="no extent"):
        root_cube(torch.ones(10, 3))


def test_footprints() -> None:
    assert level_gsd(4.0, 2, 16, 2.0) == pytest.approx(4 / (4 * 32))
    focal = 500.0
    radius = cone_radius(torch.tensor(10.0), torch.tensor(1 / focal**2))  # solid angle of a pixel at the image centre
    assert math.pi * radius.item() ** 2 == pytest.approx(
        (10 / focal) ** 2, rel=1e-5
    )  # the pixel's area at that distance
    assert point_footprint(torch.tensor(3.0), torch.tensor(5.0), 100.0).item() == pytest.approx(9 / 500)
    assert continuous_level(torch.tensor([0.5, 0.25, 0.125]), 0.5).tolist() == [0, 1, 2]
    assert math.isinf(continuous_level(torch.tensor(0.0), 0.5).item())
