"""A tree gets and loses nodes, and nobody else notices: pages, gradients, moments, and the picture."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_field import MAX_LEVEL, tiny_field, tiny_samples, tiny_tree
from torch import Tensor

from infnerf_ns.field import OctreeField, in_place_gradients
from infnerf_ns.octree import Octree, full_octree
from infnerf_ns.rendering import route
from infnerf_ns.training.child_pages import start_children
from infnerf_ns.training.optimizer import NodeAdam
from infnerf_ns.training.tree_change import change_tree

seeds = st.integers(0, 2**31)
KINDS = ("grids", "decoders", "proposals")
every_children = pytest.mark.parametrize("children", ["residual", "independent"])
every_sharing = pytest.mark.parametrize("sharing", ["node", "level", "tree"])


def _cells(octree: Octree) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.cat([octree.level[:, None], octree.coords], dim=1).tolist()]


def _missing(octree: Octree, max_level: int = MAX_LEVEL) -> tuple[Tensor, Tensor]:
    """All octants that could get a node."""
    return torch.nonzero((octree.children < 0) & (octree.level < max_level)[:, None], as_tuple=True)


# -- the octree --------------------------------------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=25)
def test_a_tree_that_grows_and_shrinks_again_is_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tree = tiny_tree()
    parents, octants = _missing(tree)
    some = torch.randperm(len(parents), generator=generator)[: 1 + seed % 20]
    grown, origin = tree.subdivide(parents[some], octants[some])
    assert grown.num_nodes == tree.num_nodes + len(some) and bool((grown.level.diff() >= 0).all())
    inner = grown.parent[1:]
    assert torch.equal(grown.level[1:], grown.level[inner] + 1)
    assert torch.equal(grown.coords[1:] // 2, grown.coords[inner])
    old = torch.nonzero(origin >= 0)[:, 0]
    assert [_cells(grown)[i] for i in old] == [_cells(tree)[i] for i in origin[old].tolist()]
    assert bool((origin[old].diff() > 0).all()), "nodes that stay keep their order"
    same, back = grown.prune(torch.nonzero(origin < 0)[:, 0])
    assert _cells(same) == _cells(tree) and torch.equal(same.children, tree.children)
    assert torch.equal(origin[back], torch.arange(tree.num_nodes))


def test_octants_and_nodes_that_cannot_change_are_refused() -> None:
    tree = tiny_tree()
    parent = int(torch.nonzero((tree.children >= 0).any(1) & (tree.level > 0))[0])
    taken = int(torch.nonzero(tree.children[parent] >= 0)[0])
    with pytest.raises(ValueError, match="at most one child"):
        tree.subdivide(torch.tensor([parent]), torch.tensor([taken]))
    free = int(torch.nonzero(tree.children[tree.num_nodes - 1] < 0)[0])
    with pytest.raises(ValueError, match="at most one child"):
        tree.subdivide(torch.tensor([tree.num_nodes - 1] * 2), torch.tensor([free] * 2))
    for nodes in ([0], [parent]):
        with pytest.raises(ValueError, match="subtrees below the root"):
            tree.prune(torch.tensor(nodes))
    subtree = [parent, *[node for node in range(tree.num_nodes) if _is_below(tree, node, parent)]]
    pruned, _ = tree.prune(torch.tensor(subtree))
    assert pruned.num_nodes == tree.num_nodes - len(subtree)


def _is_below(tree: Octree, node: int, above: int) -> bool:
    while node > 0:
        node = int(tree.parent[node])
        if node == above:
            return True
    return False


def test_a_full_tree_has_every_cell() -> None:
    for level in range(3):
        tree = full_octree(tiny_tree().cube, level, node_resolution=16)
        assert tree.nodes_per_level == [8**each for each in range(level + 1)]
        assert len(set(_cells(tree))) == tree.num_nodes


# -- pages, gradients, moments -----------------------------------------------------------------------------------------


def _trained(children: str, sharing: str) -> tuple[OctreeField, list[NodeAdam]]:
    field = tiny_field(children, sharing)
    in_place_gradients(field)
    optimizers = [NodeAdam(list(getattr(field, kind))) for kind in KINDS]
    positions, footprints = tiny_samples(field.octree)
    for _ in range(3):
        _loss(field, positions, footprints).backward()
        for optimizer in optimizers:
            optimizer.step()
    return field, optimizers


def _loss(field: OctreeField, positions: Tensor, footprints: Tensor) -> Tensor:
    density = field.density_at(positions, footprints)
    return density.log().square().mean() + field.proposal_density(positions, footprints).log().square().mean()


def _state(field: OctreeField, optimizers: list[NodeAdam]) -> dict[tuple, list[Tensor]]:
    """Of every node: its page of each kind, its moments and steps, its pending gradient."""
    held = {}
    for node, cell in enumerate(_cells(field.octree)):
        level, row = cell[0], int(field.octree.row[node])
        for kind, optimizer in zip(KINDS, optimizers):
            bank = getattr(field, kind)[level]
            if len(bank) == field.octree.nodes_per_level[level]:
                state = optimizer.state[bank]
                held[cell, kind] = [
                    values[row].clone()
                    for values in (bank.data, state["exp_avg"], state["exp_avg_sq"], state["row_steps"], bank.grad)
                ]
    return held


@every_children
@every_sharing
def test_nobody_else_notices_a_birth_or_a_death(children: str, sharing: str) -> None:
    field, optimizers = _trained(children, sharing)
    positions, footprints = tiny_samples(field.octree)
    _loss(field, positions, footprints).backward()  # gradients are pending, as with gradient accumulation
    before, tree = _state(field, optimizers), field.octree
    parents, octants = _missing(tree)
    changed = tree.subdivide(parents[::9], octants[::9])
    field.node_samples += torch.arange(tree.num_nodes)
    change_tree(field, changed, optimizers)
    after = _state(field, optimizers)
    assert before.keys() <= after.keys() and len(after) > len(before)
    for key, values in after.items():
        for value, old in zip(values, before.get(key, [torch.zeros(())] * 5)):
            assert torch.equal(value, old.expand_as(value)), key
    new = changed.origin < 0
    assert torch.equal(field.node_samples[~new], torch.arange(tree.num_nodes)) and not field.node_samples[new].any()
    change_tree(field, changed.octree.prune(torch.nonzero(new)[:, 0]), optimizers)
    again = _state(field, optimizers)
    assert again.keys() == before.keys()
    assert all(torch.equal(*pair) for key in again for pair in zip(again[key], before[key]))


@every_children
@every_sharing
def test_a_field_that_has_grown_trains_on_as_one_that_was_built_so(children: str, sharing: str) -> None:
    field, optimizers = _trained(children, sharing)
    parents, octants = _missing(field.octree)
    changed = field.octree.subdivide(parents[::9], octants[::9])
    change_tree(field, changed, optimizers)
    start_children(field, torch.nonzero(changed.origin < 0)[:, 0])
    twin = tiny_field(children, sharing, changed.octree)
    in_place_gradients(twin)
    twin.load_state_dict(field.state_dict())
    theirs = [NodeAdam(list(getattr(twin, kind))) for kind in KINDS]
    for mine, other in zip(optimizers, theirs):
        other.load_state_dict(copy.deepcopy(mine.state_dict()))
    positions, footprints = tiny_samples(changed.octree)
    for _ in range(2):
        for each, held in ((field, optimizers), (twin, theirs)):
            _loss(each, positions, footprints).backward()
            for optimizer in held:
                optimizer.step()
    for (name, mine), (_, other) in zip(field.named_parameters(), twin.named_parameters()):
        assert torch.equal(mine, other), name
    new = torch.nonzero(changed.origin < 0)[:, 0]
    trained = [field.grids[int(changed.octree.level[n])].data[changed.octree.row[n]].any() for n in new]
    assert sum(map(bool, trained)) > len(new) / 4, "children that samples reach learn"


# -- children start as their parents -----------------------------------------------------------------------------------


def _shown(field: OctreeField, positions: Tensor, footprints: Tensor) -> tuple[Tensor, Tensor]:
    """Density and geometry features as a picture shows them, in the caller's order."""
    routed, share = route(field, positions, footprints, blended=True)
    density, geo = field.density(routed)
    zeros = density.new_zeros
    return (
        zeros(len(positions)).index_add(0, routed.order, share * density),
        zeros(len(positions), geo.shape[1]).index_add(0, routed.order, share[:, None] * geo),
    )


@every_children
@every_sharing
@torch.no_grad()
def test_a_birth_does_not_change_the_picture(children: str, sharing: str) -> None:
    field = tiny_field(children, sharing)
    positions, footprints = tiny_samples(field.octree, 2000)
    before = _shown(field, positions, footprints)
    parents, octants = _missing(field.octree)
    crowded = (field.octree.coords[parents] == 0).all(1) | (children == "residual")  # a fit takes its time
    changed = field.octree.subdivide(parents[crowded], octants[crowded])
    change_tree(field, changed, [])
    field.active_level.fill_(MAX_LEVEL)
    start_children(field, torch.nonzero(changed.origin < 0)[:, 0])
    asked = route(field, positions, footprints)[0].node
    share = float((changed.origin[asked] < 0).double().mean())
    assert share > (0.2 if children == "residual" else 0.02), "new nodes answer for many samples"
    for old, new in zip(before, _shown(field, positions, footprints)):
        assert torch.allclose(old, new, rtol=1e-4, atol=1e-5)


def test_an_independent_child_is_fitted_to_its_parent() -> None:
    """Its own answer, without its parent's share, is much nearer to its parent than that of an empty grid."""
    field = tiny_field("independent", log2_table_size=14)
    tree = field.octree
    parent = int(torch.nonzero(tree.level == 1)[0])
    octant = int(torch.nonzero(tree.children[parent] < 0)[0])
    changed = tree.subdivide(torch.tensor([parent]), torch.tensor([octant]))
    change_tree(field, changed, [])
    (node,) = torch.nonzero(changed.origin < 0)[:, 0].tolist()
    octree = changed.octree
    unit = (octree.coords[node] + torch.rand(4000, 3)) / 2 ** int(octree.level[node])
    positions = octree.cube.to_world(unit)
    footprints = torch.full((4000,), 0.8 * octree.gsd(int(octree.level[node]) - 1))

    @torch.no_grad()
    def difference() -> float:
        child = field.density_at(positions, footprints).log()
        return float(
            (child - field.density_at(positions, footprints, int(octree.level[node]) - 1).log()).square().mean()
        )

    field.inherit_decoders(torch.tensor([node]))
    empty = difference()
    start_children(field, torch.tensor([node]))
    assert field.young and float(field.maturity[node]) == 0
    assert difference() < 0.1 * empty


def test_a_young_child_takes_over_step_by_step() -> None:
    field = tiny_field("independent")
    positions, footprints = tiny_samples(field.octree)
    leaf = int(torch.nonzero((field.octree.children < 0).all(1))[0])
    field.maturity[leaf], field.young = 0.0, True
    of_leaf = field.route(positions, footprints)
    mine = of_leaf.order[of_leaf.node == leaf]
    alone = field.density_at(positions, footprints)[mine]
    cut = field.density_at(positions, footprints, int(field.octree.level[leaf]) - 1)[mine]
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    for share in shares:
        routed, parts = route(field, positions, footprints)
        density, _ = field.density(routed)
        shown = torch.zeros(len(positions)).index_add(0, routed.order, parts * density)[mine]
        assert torch.allclose(shown, share * alone + (1 - share) * cut, rtol=1e-4)
        field.grow_up(0.25)
    assert not field.young
