"""Losses: a value worked out by hand, the cases in which they must vanish, and derivatives against numerical ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.model_components.losses import lossfun_distortion

from infnerf_ns.losses.ray import distortion
from infnerf_ns.losses.reconstruction import charbonnier, mse
from infnerf_ns.losses.tree import inter_level, random_points_in_nodes, transparency
from infnerf_ns.octree import Octree, RootCube, build_octree

TURN = torch.tensor([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
CUBE = RootCube(torch.tensor([0.5, 0.0, -1.0]), 2.0, TURN)
seeds = st.integers(0, 2**31)


def _tree(seed: int = 0, max_level: int = 3) -> Octree:
    generator = torch.Generator().manual_seed(seed)
    points = CUBE.to_world(torch.rand(300, 3, generator=generator) ** 2)
    footprints = 0.1 * torch.rand(300, generator=generator) ** 3
    return build_octree(points, footprints, CUBE, max_level=max_level, min_points=4, node_resolution=8)


def test_photometric_losses_by_hand() -> None:
    predicted, target = torch.full((5, 3), 0.503), torch.full((5, 3), 0.5)
    assert mse(predicted, target).item() == pytest.approx(9e-6, rel=1e-4)
    assert charbonnier(predicted, target, width=0.004).item() == pytest.approx(0.005, rel=1e-4)
    assert charbonnier(target, target).item() == pytest.approx(1e-3), "the width is what remains"
    colors = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    goal = torch.rand(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: charbonnier(c, goal), colors)


def test_distortion_by_hand() -> None:
    """Halves of the ray with half of the weight each: 2 * 1/4 * 1/2 between them and 2 * 1/4 * 1/2 / 3 within them."""
    weights, edges = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 0.5, 1.0]])
    assert distortion(weights, edges).item() == pytest.approx(1 / 4 + 1 / 12)
    one = torch.tensor([[0.0, 1.0, 0.0]])
    assert distortion(one, torch.tensor([[0.0, 0.2, 0.3, 1.0]])).item() == pytest.approx(0.1 / 3)
    assert distortion(torch.zeros(3, 4), torch.linspace(0, 1, 5).expand(3, 5)).item() == 0


@given(seeds, st.integers(1, 40))
@settings(max_examples=25)
def test_distortion_is_the_sum_over_all_pairs(seed: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.rand(6, samples + 1, generator=generator, dtype=torch.float64).sort(dim=1).values
    weights = torch.rand(6, samples, generator=generator, dtype=torch.float64) / samples
    expected = lossfun_distortion(edges, weights).mean()
    assert distortion(weights, edges).item() == pytest.approx(expected.item(), rel=1e-11)
    assert distortion(weights.float(), edges.float()).item() == pytest.approx(expected.item(), rel=1e-4)


def test_distortion_gradcheck() -> None:
    edges = torch.rand(3, 7, dtype=torch.float64).sort(dim=1).values.requires_grad_()
    weights = (torch.rand(3, 6, dtype=torch.float64) / 6).requires_grad_()
    assert torch.autograd.gradcheck(distortion, (weights, edges))


@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(1, 200))
@settings(max_examples=40)
def test_random_points_lie_in_few_nodes_of_one_level(seed: int, deepest: int, num_nodes: int, num_points: int) -> None:
    tree = _tree(seed % 7)
    torch.manual_seed(seed)
    points, level = random_points_in_nodes(tree, deepest, num_nodes, num_points)
    assert points.shape == (num_points, 3) and 1 <= level <= min(deepest, tree.depth)
    cells = CUBE.to_unit(points) * 2**level
    nodes = tree.coords[tree.level == level]
    # A point may be rounded onto its node's face on the way to world coordinates and back.
    outside = (cells[:, None] - nodes - 0.5).abs().amax(dim=2) - 0.5  # [points, nodes]
    assert outside.min(dim=1).values.max() < 1e-4
    assert len(outside.argmin(dim=1).unique()) <= num_nodes


def test_random_points_reach_every_node() -> None:
    tree = _tree()
    found = {level: set() for level in (1, 2, 3)}
    for _ in range(300):
        points, level = random_points_in_nodes(tree, 9, 4, 8)
        found[level].update(tree.route(CUBE.to_unit(points), None, level)[:, level].tolist())
    for level, nodes in found.items():
        assert nodes - {-1} == set(torch.nonzero(tree.level == level)[:, 0].tolist())


def test_random_points_of_a_root_alone() -> None:
    assert random_points_in_nodes(_tree(max_level=0), 4, 4, 100) is None
    assert random_points_in_nodes(_tree(), 0, 4, 100) is None, "no level but the root takes part yet"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_inter_level_by_hand(level: int) -> None:
    tree = _tree()
    points, parent, child = torch.rand(20, 3), 3.0, 5.0

    def density(positions, at):
        assert at in (level - 1, level)
        return torch.full((len(positions),), child if at == level else parent)

    gsd = tree.gsd(level)
    expected = (math.exp(-gsd * parent) - math.exp(-gsd * child)) ** 2
    assert inter_level(points, level, tree, density).item() == pytest.approx(expected, rel=1e-3)
    expected = 1 - math.exp(-gsd * child)
    assert transparency(points, level, tree, density).item() == pytest.approx(expected, rel=1e-4)


def test_inter_level_averages_the_child_over_its_cross_of_neighbours() -> None:
    tree = _tree()
    gsd = tree.gsd(2)
    points = torch.rand(20, 3, dtype=torch.float64)

    def field(transparent_at):
        return lambda positions, level: -transparent_at(positions).log() / gsd

    def linear(p):
        return 0.5 + 0.1 * p @ torch.tensor([1.0, -2.0, 1.5], dtype=p.dtype)

    def square(p):
        return 0.3 + 0.1 * p.square().sum(-1)

    assert inter_level(points, 2, tree, field(linear)).item() < 1e-30, "the mean of a linear function is its middle"
    expected = (6 / 7 * 0.1 * gsd**2) ** 2  # six of the seven points are gsd away
    assert inter_level(points, 2, tree, field(square)).item() == pytest.approx(expected, rel=1e-6)


def test_tree_losses_vanish_in_empty_space_and_where_levels_agree() -> None:
    tree, points = _tree(), torch.rand(20, 3)
    constant = inter_level(points, 2, tree, lambda p, level: torch.full((len(p),), 7.0))
    assert constant.item() == pytest.approx(0, abs=1e-13)
    assert transparency(points, 2, tree, lambda p, level: torch.zeros(len(p))).item() == 0


def test_tree_losses_gradcheck() -> None:
    tree, points = _tree(), torch.rand(6, 3, dtype=torch.float64)
    strength = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def density(weights):
        return lambda p, level: weights[level] * (1 + p.square().sum(-1))

    for loss in (inter_level, transparency):
        assert torch.autograd.gradcheck(lambda w, loss=loss: loss(points, 2, tree, density(w)), strength)
