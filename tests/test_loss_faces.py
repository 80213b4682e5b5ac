"""Smoothness across faces: all of them are found, the points lie where they should, and values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_field import tiny_cube, tiny_field, tiny_tree

from infnerf_ns.losses.faces import FacePoints, across_faces, random_points_on_faces, shared_faces
from infnerf_ns.octree import Octree, RootCube, build_octree

seeds = st.integers(0, 2**31)


def _tree(seed: int, max_level: int = 4) -> Octree:
    generator = torch.Generator().manual_seed(seed)
    points = tiny_cube().to_world(torch.rand(200, 3, generator=generator) ** 2)
    footprints = 0.1 * torch.rand(200, generator=generator) ** 3
    return build_octree(points, footprints, tiny_cube(), max_level=max_level, min_points=3, node_resolution=16)


def _children(*octants: int) -> Octree:
    """A root and some of its children, named by their octant."""
    coords = [[0, 0, 0], *([o & 1, o >> 1 & 1, o >> 2 & 1] for o in octants)]
    level, parent = [0, *[1] * len(octants)], [-1, *[0] * len(octants)]
    tensors = (torch.tensor(each) for each in (level, coords, parent))
    return Octree(tiny_cube(), *tensors, node_resolution=16)


def _chain(depth: int) -> Octree:
    """Two nodes side by side at the deepest level, far from the cube's corner, and their ancestors."""
    cells = [[(2**depth - 2) >> depth - level, 2**level - 1, 2**level - 1] for level in range(depth + 1)]
    cells.append([2**depth - 1] * 3)
    level = torch.tensor([*range(depth + 1), depth])
    parent = torch.tensor([-1, *range(depth), depth - 1])
    return Octree(tiny_cube(), level, torch.tensor(cells), parent, node_resolution=128)


@given(seeds)
@settings(max_examples=25)
def test_all_shared_faces_are_found(seed: int) -> None:
    tree = _tree(seed)
    for level in range(tree.depth + 1):
        cells = {tuple(c): n for n, c in enumerate(tree.coords.tolist()) if tree.level[n] == level}
        expected = set()
        for (x, y, z), node in cells.items():
            for axis, beside in enumerate([(x + 1, y, z), (x, y + 1, z), (x, y, z + 1)]):
                if beside in cells:
                    expected.add((node, cells[beside], axis))
        found = shared_faces(tree, level)
        found = list(zip(*(each.tolist() for each in found)))
        assert set(found) == expected and len(found) == len(expected)
        assert level != 1 or expected, "the tree has faces to find"


def test_opposite_sides_of_the_cube_do_not_touch() -> None:
    """Cells that follow each other in any row-major order of 2 x 2 x 2."""
    assert len(shared_faces(_children(1, 2), 1).node) == 0
    assert len(shared_faces(_children(4, 3), 1).node) == 0
    assert [each.tolist() for each in shared_faces(_children(0, 4), 1)] == [[1], [2], [2]]


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 60))
@settings(max_examples=40)
def test_points_lie_a_hair_on_both_sides(seed: int, deepest: int, num_faces: int, num_points: int) -> None:
    tree = _tree(seed % 5)
    torch.manual_seed(seed)
    points = random_points_on_faces(tree, deepest, num_faces, num_points)
    assert points.below.shape == points.above.shape == (num_points, 3)
    assert 1 <= points.level <= min(deepest, tree.depth)
    assert ((points.above - points.below).norm(dim=1) / tree.gsd(points.level)).sub(0.5).abs().max() < 1e-2
    # Across the face by exactly one cell; a point may be rounded over another face of its node.
    below, above = (tree.cube.to_unit(side) * 2**points.level for side in (points.below, points.above))
    crossed = above.floor() - below.floor()
    assert bool(((crossed == 1).sum(dim=1) >= 1).all())
    pairs = {pair[:2] for pair in zip(*(each.tolist() for each in shared_faces(tree, points.level)))}
    nodes = [
        tree.route(tree.cube.to_unit(s), None, points.level)[:, points.level] for s in (points.below, points.above)
    ]
    drawn = list(zip(*(each.tolist() for each in nodes)))
    assert sum(pair in pairs for pair in drawn) >= 0.9 * num_points
    assert len(set(drawn) & pairs) <= num_faces


def test_every_face_is_drawn() -> None:
    tree = tiny_tree()
    expected = {
        pair[:2]
        for level in range(1, tree.depth + 1)
        for pair in zip(*(each.tolist() for each in shared_faces(tree, level)))
    }
    assert len(expected) > 20
    found = set()
    for _ in range(150):
        points = random_points_on_faces(tree, 9, 64, 64)
        sides = (tree.cube.to_unit(side) for side in (points.below, points.above))
        found.update(zip(*(tree.route(side, None, points.level)[:, points.level].tolist() for side in sides)))
    assert expected <= found


def test_no_shared_face() -> None:
    assert random_points_on_faces(_children(), 3, 4, 10) is None, "a root alone"
    assert random_points_on_faces(_children(0, 7), 3, 4, 10) is None, "two nodes that touch in a corner"
    assert random_points_on_faces(_children(0, 1), 0, 4, 10) is None, "no level but the root takes part yet"
    assert random_points_on_faces(_children(0, 1), 3, 4, 10).level == 1
    chain = _chain(3)  # only its deepest level has two nodes
    assert random_points_on_faces(chain, 2, 4, 10) is None
    assert {random_points_on_faces(chain, 3, 4, 10).level for _ in range(10)} == {3}


@pytest.mark.parametrize("depth", [1, 8, 12, 15])
def test_deep_nodes_are_told_apart(depth: int) -> None:
    """In float32 a GSD of level 15 is below the spacing of numbers near the cube's far corner."""
    tree = _chain(depth)
    points = random_points_on_faces(tree, depth, 4, 200)
    sides = (tree.cube.to_unit(side) for side in (points.below, points.above))
    routed = [tree.route(side, None, depth)[:, depth] for side in sides]
    hits = (routed[0] == depth) & (routed[1] == depth + 1)
    assert points.level == depth and hits.float().mean() > 0.9


def _two_sides(points: FacePoints, below: tuple, above: tuple):
    """A field that is constant on each side: (density, grey)."""

    def field(positions: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert level == points.level and torch.equal(positions, torch.cat([points.below, points.above]))
        count = len(points.below)
        density, grey = (torch.tensor(pair).repeat_interleave(count) for pair in zip(below, above))
        return density, grey[:, None].expand(-1, 3)

    return field


def test_across_faces_by_hand() -> None:
    tree = tiny_tree()
    points = random_points_on_faces(tree, 3, 8, 50)
    gsd = tree.gsd(points.level)
    below, above = math.exp(-gsd * 3.0), math.exp(-gsd * 50.0)
    losses = across_faces(points, tree, _two_sides(points, (3.0, 0.2), (50.0, 0.6)))
    assert losses.transparency.item() == pytest.approx((below - above) ** 2, rel=1e-3)
    assert losses.color.item() == pytest.approx((1 - below) * 0.4**2, rel=1e-3)


def test_across_faces_vanishes() -> None:
    tree = tiny_tree()
    points = random_points_on_faces(tree, 3, 8, 50)
    same = across_faces(points, tree, _two_sides(points, (9.0, 0.3), (9.0, 0.3)))
    assert same.transparency.item() == 0 and same.color.item() == 0
    empty = across_faces(points, tree, _two_sides(points, (0.0, 0.1), (0.0, 0.9)))
    assert empty.color.item() == 0, "what is transparent has no colour"
    edge = across_faces(points, tree, _two_sides(points, (0.0, 0.1), (1e9, 0.9)))
    assert edge.color.item() == 0 and edge.transparency.item() == pytest.approx(1)


def test_across_faces_gradients() -> None:
    tree = tiny_tree()
    points = random_points_on_faces(tree, 3, 4, 6)
    points = FacePoints(points.below.double(), points.above.double(), points.level)
    side = torch.cat([torch.zeros(6), torch.ones(6)]).double()

    def field(strength: torch.Tensor, tint: torch.Tensor):
        return lambda p, level: (strength[0] + side * strength[1], torch.sigmoid(p * tint[0] + side[:, None] * tint[1]))

    strength, tint = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([3.0, 5.0], [0.4, 0.7])
    )
    assert torch.autograd.gradcheck(
        lambda s: across_faces(points, tree, field(s, tint.detach())).transparency, strength
    )
    assert torch.autograd.gradcheck(lambda t: across_faces(points, tree, field(strength.detach(), t)).color, tint)
    color = across_faces(points, tree, field(strength, tint)).color
    assert torch.autograd.grad(color, strength, allow_unused=True) == (None,), "a seam is not mended by transparency"


def test_a_seam_of_an_octree_field_closes() -> None:
    """Nodes of independent children differ at their faces; a few steps on this loss alone bring them together."""
    field = tiny_field("independent")
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)

    def losses() -> torch.Tensor:
        torch.manual_seed(0)
        points = random_points_on_faces(field.octree, 2, 16, 256)

        def field_fn(positions: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
            density = 30 * field.density_at(positions, None, max_level=level)  # else nothing is opaque
            return density, torch.sigmoid(density)[:, None].expand(-1, 3)

        return sum(across_faces(points, field.octree, field_fn))

    before = losses().item()
    for _ in range(20):
        optimizer.zero_grad()
        losses().backward()
        optimizer.step()
    assert before > 1e-5 and losses().item() < 0.2 * before


def test_cube_far_from_the_origin() -> None:
    cube = RootCube(torch.tensor([40.0, -30.0, 20.0]), 2.0, torch.eye(3))
    tree = Octree(cube, torch.tensor([0, 1, 1]), torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]]),
                  torch.tensor([-1, 0, 0]), node_resolution=128)  # fmt: skip
    points = random_points_on_faces(tree, 1, 2, 100)
    assert bool((points.below[:, 0] < 40).all() and (points.above[:, 0] > 40).all())
    assert bool((points.below[:, 1:] == points.above[:, 1:]).all())
