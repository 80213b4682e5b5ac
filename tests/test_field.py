"""The octree field: backends agree; what a node, a new level, a cut and a blend of the tree mean. Random pages."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_field import (
    MAX_LEVEL,
    TINY,
    TURN,
    compare,
    tiny_cube,
    tiny_field,
    tiny_samples,
    tiny_tree,
    values_and_gradients,
)
from torch import Tensor

from infnerf_ns.field import FieldConfig, OctreeField, in_place_gradients
from infnerf_ns.octree import build_octree
from infnerf_ns.state_validation import octree_from_state
from infnerf_ns.training.optimizer import NodeAdam

every_children = pytest.mark.parametrize("children", ["residual", "independent"])
every_sharing = pytest.mark.parametrize("sharing", ["node", "level", "tree"])


def _levels(field: OctreeField, positions: Tensor, footprints: Tensor | None) -> Tensor:
    return field.octree.level[field.octree.locate(positions, footprints).node]


def test_the_tree_of_these_tests_is_deep_and_pruned() -> None:
    tree = tiny_tree()
    assert tree.depth == MAX_LEVEL and tree.nodes_per_level[3] > 8
    assert tree.summary()[3]["pruned"] > 0.5
    levels = _levels(tiny_field(), *tiny_samples(tree))
    assert levels.bincount(minlength=4).min() > 10


# -- backends ----------------------------------------------------------------------------------------------------------


@every_children
@every_sharing
@pytest.mark.parametrize("of_positions", [True, False])
def test_numba_is_the_torch_reference(of_positions: bool, sharing: str, children: str) -> None:
    fields = (tiny_field(children, sharing, backend=name) for name in ("torch", "numba"))
    reference, fast = (values_and_gradients(field, of_positions) for field in fields)
    compared = compare(reference, fast)
    assert compared >= 4 + of_positions + 4 + 1 + 4, "values, positions, grids, at least one decoder, proposals"


@every_children
def test_in_place_gradients_are_autograds(children: str) -> None:
    plain, held = tiny_field(children), tiny_field(children)
    in_place_gradients(held)
    for field in (plain, held):
        positions, footprints = tiny_samples(field.octree)
        (field.density_at(positions, footprints) + field.proposal_density(positions, footprints)).sum().backward()
    for (name, expected), (_, got) in zip(plain.named_parameters(), held.named_parameters()):
        if expected.grad is not None:
            scale = float(expected.grad.abs().max())
            assert torch.allclose(expected.grad, got.grad, rtol=1e-5, atol=1e-6 * scale), name


# -- children and parents ----------------------------------------------------------------------------------------------


@every_sharing
def test_a_new_residual_child_without_features_is_its_parent(sharing: str) -> None:
    field = tiny_field("residual", sharing)
    positions, _ = tiny_samples(field.octree)
    footprints = torch.full((len(positions),), field.octree.gsd(3) / 8)
    field.active_level.fill_(1)
    before, geo_before = field.density(field.route(positions, footprints, 1))
    for bank in field.grids[2:]:
        bank.data.zero_()
    field.activate_level(3)
    routed = field.route(positions, footprints)
    after, geo_after = field.density(routed)
    assert int((field.octree.level[routed.node] > 1).sum()) > 50
    # Only rounding: the kernels add the zero features in another grouping.
    back = torch.argsort(field.route(positions, footprints, 1).order)
    assert torch.allclose(after[torch.argsort(routed.order)], before[back], rtol=2e-6, atol=0)
    assert torch.allclose(geo_after[torch.argsort(routed.order)], geo_before[back], atol=1e-6)


def test_a_new_node_starts_with_the_decoder_of_its_parent() -> None:
    for children in ("residual", "independent"):
        field = tiny_field(children)
        field.active_level.fill_(1)
        field.activate_level(2)
        tree = field.octree
        nodes = torch.nonzero(tree.level == 2)[:, 0]
        assert torch.equal(field.decoders[2].data, field.decoders[1].data[tree.row[tree.parent[nodes]]]), children


def test_weights_of_features_that_a_node_lacks_keep_their_first_value() -> None:
    """They are what its children start with: were they trained, or zero, the children's features would be."""
    field = tiny_field("residual")
    positions, footprints = tiny_samples(field.octree)
    in_place_gradients(field)
    optimizer = NodeAdam(list(field.decoders))
    before = [bank.data.clone() for bank in field.decoders]
    field.density_at(positions, footprints).sum().backward()
    optimizer.step()
    features = (6, 10, 14, 18)  # root 3 x 2, each level 2 x 2
    for level, (bank, old) in enumerate(zip(field.decoders, before)):
        used = 8 * features[level]
        assert torch.equal(bank.data[:, used : 8 * 18], old[:, used : 8 * 18]), level
        assert level > field.octree.depth or not torch.equal(bank.data[:, :used], old[:, :used]), level


def test_levels_start_in_order_and_end_at_the_depth_of_the_tree() -> None:
    field = tiny_field(tree=tiny_tree(max_level=2))
    field.active_level.fill_(0)
    positions, _ = tiny_samples(field.octree)
    for level, expected in ((0, 0), (1, 1), (1, 1), (0, 1), (9, 2)):
        field.activate_level(level)
        assert int(field.active_level) == expected
        assert int(field.octree.level[field.route(positions, None).node].max()) == expected


def test_all_nodes_start_with_one_decoder() -> None:
    field = OctreeField(tiny_tree(), FieldConfig(**TINY), MAX_LEVEL, num_photos=2)
    pages = torch.cat([bank.data for bank in field.decoders])
    assert len(pages) == field.octree.num_nodes and bool((pages == pages[0]).all())


@every_children
def test_only_residual_children_read_their_ancestors(children: str) -> None:
    field = tiny_field(children)
    positions, footprints = tiny_samples(field.octree)
    levels = _levels(field, positions, footprints)
    before = field.density_at(positions, footprints)
    field.grids[0].data.mul_(-1)
    after = field.density_at(positions, footprints)
    changed = after != before
    assert bool(changed[levels == 0].all())
    assert bool(changed[levels > 0].any()) == (children == "residual")


@every_children
def test_gradients_reach_only_the_nodes_that_the_samples_pass(children: str) -> None:
    field = tiny_field(children)
    tree = field.octree
    deepest = tree.num_nodes - 1
    unit = (tree.coords[deepest] + torch.rand(40, 3)) / 2**MAX_LEVEL
    positions = tree.cube.to_world(unit.clamp(max=1 - 1e-3))
    path = tree.route(tree.cube.to_unit(positions), None)
    assert bool((path[:, -1] >= 0).any())
    field.density_at(positions).sum().backward()
    kept = path.max(dim=1).values
    for level in range(MAX_LEVEL + 1):
        own = kept[tree.level[kept] == level]
        passed = path[:, level][path[:, level] >= 0] if children == "residual" else own
        for bank, nodes in ((field.grids[level], passed), (field.decoders[level], own)):
            rows = (nodes - tree.first_of_level[level]).unique().tolist()
            found = [] if bank.grad is None else torch.nonzero(bank.grad.any(dim=1))[:, 0].tolist()
            assert found == rows, level


# -- routing -----------------------------------------------------------------------------------------------------------


@cache
def _shared_field(children: str) -> OctreeField:
    return tiny_field(children)


@every_children
@given(st.integers(0, 2**31))
@settings(max_examples=15)
def test_density_is_in_the_order_of_the_caller(children: str, seed: int) -> None:
    field = _shared_field(children)
    positions, footprints = tiny_samples(field.octree, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole, shuffled = field.density_at(positions, footprints), field.density_at(positions[order], footprints[order])
        some = field.density_at(positions[order[:7]], footprints[order[:7]])
    assert torch.allclose(shuffled, whole[order], rtol=1e-6, atol=0)
    assert torch.allclose(some, whole[order[:7]], rtol=1e-6, atol=0)


@every_children
@every_sharing
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_cut_is_a_tree_without_the_deeper_levels(children: str, sharing: str, cut: int) -> None:
    whole, small = tiny_field(children, sharing), tiny_field(children, sharing, tree=tiny_tree(max_level=cut))
    for banks, others in ((whole.grids, small.grids), (whole.decoders, small.decoders)):
        for bank, other in zip(banks, others):
            other.data.copy_(bank.data[: len(other)])
    positions, footprints = tiny_samples(whole.octree)
    for asked in (None, footprints):
        expected = small.density_at(positions, asked)
        assert torch.allclose(whole.density_at(positions, asked, max_level=cut), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(whole.density_at(positions), small.density_at(positions), rtol=1e-2)


def test_without_footprints_the_finest_node_answers() -> None:
    field = tiny_field()
    positions, _ = tiny_samples(field.octree)
    routed = field.route(positions, None)
    assert routed.footprints is None
    assert torch.equal(routed.node, field.octree.locate(positions, None).node[routed.order])
    assert torch.equal(routed.node, field.octree.locate(positions, torch.zeros(len(positions))).node[routed.order])


@every_children
def test_no_samples(children: str) -> None:
    """A chunk of pure sky has no sample that needs a normal."""
    field = tiny_field(children)
    nothing, no_footprint = torch.zeros(0, 3), torch.zeros(0)
    assert field.density_at(nothing, no_footprint).shape == (0,)
    assert field.density_at(nothing).shape == (0,)
    assert field.proposal_density(nothing, no_footprint).shape == (0,)
    assert field.normals(nothing, no_footprint).shape == (0, 3)
    routed = field.route(nothing, no_footprint)
    assert field.color(routed.node, torch.zeros(0, 3 + 16 + 2)).shape == (0, 3)


# -- the blend of adjacent levels --------------------------------------------------------------------------------------


def _blended(field: OctreeField, positions: Tensor, footprints: Tensor):
    routed = field.route(positions, footprints)
    share = field.octree.fraction(field.octree.level[routed.node], footprints[routed.order])
    routed, share = field.with_parents(routed, share)
    density, _ = field.density(routed)
    return routed, share, torch.zeros(len(positions)).index_add(0, routed.order, share * density)


@every_children
def test_blend_weights_sum_to_one_and_the_others_are_the_parents(children: str) -> None:
    field = tiny_field(children)
    positions, footprints = tiny_samples(field.octree)
    routed, share, _ = _blended(field, positions, footprints)
    total = torch.zeros(len(positions)).index_add(0, routed.order, share)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    assert bool((share > 0).all()) and bool((routed.node.diff() >= 0).all()), "sorted by node again"
    assert torch.equal(routed.footprints, footprints[routed.order])
    assert torch.equal(routed.unit, field.octree.cube.to_unit(positions)[routed.order])
    assert torch.equal(routed.path.max(dim=1).values, routed.node)
    own = field.octree.locate(positions, footprints).node[routed.order]
    added = routed.node != own
    assert 20 < int(added.sum()) == len(share) - len(positions)
    assert torch.equal(routed.node[added], field.octree.parent[own[added]])


@every_children
@torch.no_grad()
def test_nothing_pops_while_a_footprint_shrinks(children: str) -> None:
    field = tiny_field(children)
    tree = field.octree
    steps = 1601
    footprints = tree.gsd(0) * 2 ** torch.linspace(1, -4, steps)
    for node in range(tree.num_nodes - 4, tree.num_nodes):
        center = tree.cube.to_world((tree.coords[node] + 0.4) / 2**MAX_LEVEL).expand(steps, 3)
        assert _levels(field, center, footprints).unique().tolist() == [0, 1, 2, 3]
        smooth = _blended(field, center, footprints)[2]
        span = float(smooth.max() - smooth.min())
        # 320 steps per octave: a sample that crosses the whole span within one octave moves by span / 320 per step.
        assert smooth.diff().abs().max() < 0.01 * span
        assert field.density_at(center, footprints).diff().abs().max() > 0.05 * span, "the blend has something to hide"


# -- values ------------------------------------------------------------------------------------------------------------


def test_density_is_per_scene_unit() -> None:
    """A scene ten times as large has a tenth of the density everywhere."""
    small, large = tiny_field(tree=tiny_tree(side=3.0)), tiny_field(tree=tiny_tree(side=30.0))
    assert small.octree.nodes_per_level == large.octree.nodes_per_level
    positions, footprints = tiny_samples(small.octree)
    center = small.octree.cube.center
    scaled = (positions - center) * 10 + center
    expected = small.density_at(positions, footprints) / 10
    assert torch.allclose(large.density_at(scaled, footprints * 10), expected, rtol=2e-4)
    expected = small.proposal_density(positions, footprints) / 10
    assert torch.allclose(large.proposal_density(scaled, footprints * 10), expected, rtol=2e-4)


def test_detail_finer_than_the_footprint_fades() -> None:
    field, blank, sharp = tiny_field(), tiny_field(), tiny_field(downweight=0.0)
    for bank in blank.grids:
        bank.data.zero_()
    positions, _ = tiny_samples(field.octree)
    ones = torch.ones(len(positions))
    huge, tiny, cell = 1e5 * ones, 1e-7 * ones, 1.01 * field.octree.gsd(0) * ones
    assert torch.allclose(field.density_at(positions, huge), blank.density_at(positions, huge), rtol=1e-3)
    assert torch.allclose(field.density_at(positions, tiny, 0), field.density_at(positions, None, 0), rtol=1e-5)
    assert torch.equal(sharp.density_at(positions, huge), sharp.density_at(positions, cell))
    assert not torch.allclose(field.density_at(positions, cell), field.density_at(positions, huge), rtol=1e-2)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("level", [0, 1])
def test_hash_levels_of_the_proposals_fade_by_the_interval(level: int, strength: float, backend: str) -> None:
    """A grid of ones interpolates to 1, so the sum of the features is the sum of their weights (Zip-NeRF, eq. 9)."""
    field = tiny_field(backend=backend, proposal_downweight=strength, downweight=0.0)
    tree = field.octree
    for number, bank in enumerate(field.proposals):
        bank.data.fill_(float(number == level))
    coords = tree.coords[tree.level == 1] + 0.4
    positions = tree.cube.to_world(coords / 2)
    radius = 0.2 * tree.cube.side if level == 0 else 0.95 * tree.gsd(0)
    density = field.proposal_density(positions, torch.full((len(coords),), radius))
    side = [2 * tree.cube.side, tree.cube.side / 2][level]
    weights = [math.erf(strength / 8**0.5 * side / scale / radius) for scale in field.proposal_layouts[level].scales]
    assert 0.2 < min(weights) < 0.9
    expected = torch.full_like(density, sum(weights))
    assert torch.allclose((density * tree.cube.side / 2).log() + 1, expected, rtol=1e-4)


def test_intervals_far_outside_shrink_as_lengths_along_the_ray_do() -> None:
    """Twice as far outside of the cube, an interval four times as long is as long in the contracted space."""
    field = tiny_field(downweight=0.0)
    field.proposals[0].data.fill_(1.0)
    cube = field.octree.cube
    near, far = (cube.to_world(torch.tensor([[0.5 + distance, 0.5, 0.5]])) for distance in (3.0, 6.0))
    radius = torch.tensor([4.0 * cube.side])
    density = field.proposal_density(near, radius)
    assert torch.allclose(field.proposal_density(far, 4 * radius), density, rtol=1e-4)
    assert field.proposal_density(far, radius) > 1.1 * density


def test_without_down_weighting_an_interval_only_chooses_the_node() -> None:
    field = tiny_field(proposal_downweight=0.0)
    positions, _ = tiny_samples(field.octree)
    cell, huge = (torch.full((len(positions),), radius) for radius in (1.01 * field.octree.gsd(0), 1e5))
    assert torch.equal(field.proposal_density(positions, cell), field.proposal_density(positions, huge))
    faded = tiny_field().proposal_density(positions, huge)
    assert torch.allclose(faded, torch.full_like(faded, math.exp(-1) * 2 / field.octree.cube.side), rtol=1e-3)


def test_normal_of_a_slope() -> None:
    """Log density grows linearly along a known direction: the normal is the opposite one, everywhere in the cube."""
    tree = build_octree(torch.zeros(1, 3), torch.ones(1), tiny_cube(), max_level=0, min_points=1, node_resolution=8)
    config = FieldConfig(**{**TINY, "hash_levels": 1, "features_per_level": 1, "log2_table_size": 12})
    field = OctreeField(tree, config, 0, num_photos=2)
    assert field.grids[0].shape == (1, 16**3)
    slope = torch.tensor([0.1, -0.05, 0.08])
    z, y, x = torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij")  # x is the fastest axis of the table
    field.grids[0].data[0] = 2 + (torch.stack([x, y, z], dim=-1) @ slope).reshape(-1)
    field.decoders[0].data.zero_()
    field.decoders[0].data[0, [0, 8]] = 1.0  # feature -> first hidden unit -> log density
    positions = tree.cube.to_world(torch.rand(50, 3))
    expected = -TURN.T @ (slope / slope.norm())
    normals = field.normals(positions, None)
    assert torch.allclose(normals, expected.expand(50, 3), atol=1e-4)
    assert not normals.requires_grad and field.grids[0].grad is None


@every_children
def test_normals_are_finite_differences(children: str) -> None:
    field = tiny_field(children).double()
    positions = tiny_samples(field.octree)[0].double()
    step = 1e-6
    moved = positions[:, None, None] + step * torch.stack([torch.eye(3), -torch.eye(3)]).double()
    logs = field.density_at(moved.reshape(-1, 3)).log().reshape(len(positions), 2, 3)
    gradient = (logs[:, 0] - logs[:, 1]) / (2 * step)
    steep = gradient.norm(dim=1) > 1e-3
    # Positions next to a face of a node, where the density itself jumps, are no place for a difference.
    smooth = (field.octree.cube.to_unit(positions) * 8).frac().abs().sub(0.5).abs().amax(dim=1) < 0.499
    assert int((steep & smooth).sum()) > 200
    expected = -torch.nn.functional.normalize(gradient, dim=1)
    got = field.normals(positions, None)
    assert got.norm(dim=1)[steep].sub(1).abs().max() < 1e-9
    assert torch.allclose(got[steep & smooth], expected[steep & smooth], atol=1e-5)


# -- the tree in the state ---------------------------------------------------------------------------------------------


@every_sharing
def test_memory_is_what_the_parameters_take(sharing: str) -> None:
    field = tiny_field("residual", sharing)
    counts = [sum(bank.numel() for bank in banks) for banks in zip(field.grids, field.decoders, field.proposals)]
    assert field.pages.memory_bytes(field.octree, training=False) == [4 * count for count in counts]
    assert field.pages.memory_bytes(
        field.octree,
    ) == [16 * count for count in counts], "with gradient and two moments"
    # Root by hand: 3 hash levels of 512 entries x 2; 18 x 8 + 8 x 4 and 21 x 8 + 8 x 3 weights; 4 proposal levels.
    root = 3 * 512 * 2 + (18 * 8 + 8 * 4 + 21 * 8 + 8 * 3) + field.proposal_layouts[0].page_size
    assert counts[0] == root
    shallow = tiny_field(tree=tiny_tree(max_level=1))
    assert len(shallow.pages.memory_bytes(shallow.octree)) == 2


def test_the_tree_survives_the_state_dict() -> None:
    field = tiny_field()
    state = {f"module.{name}": value for name, value in field.state_dict().items()}
    tree = octree_from_state(state, "module.")
    for name in ("level", "coords", "parent", "children"):
        assert torch.equal(getattr(tree, name), getattr(field.octree, name)), name
    assert (tree.node_resolution, tree.gsd_sharpness) == (16, 2.0)
    assert tree.cube.side == field.octree.cube.side
    assert torch.equal(tree.cube.rotation, TURN) and torch.equal(tree.cube.center, field.octree.cube.center)
    other = OctreeField(tiny_tree(max_level=1), field.config, MAX_LEVEL, num_photos=2)
    other.set_octree(tree)
    other.load_state_dict(field.state_dict())
    positions, footprints = tiny_samples(tree)
    assert torch.equal(other.density_at(positions, footprints), field.density_at(positions, footprints))
