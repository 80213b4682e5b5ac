"""The tree grows and shrinks: what the samples say, who is born and who dies, and rounds of a model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tiny_field import tiny_field, tiny_samples, tiny_tree
from tiny_model import CONE_ALONE, ray_batch, tiny_config, tiny_model, tiny_scene
from torch import Tensor

from infnerf_ns.kernels import statistics
from infnerf_ns.kernels.statistics import COLUMNS, add_samples
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.octree import Octree, full_octree
from infnerf_ns.training.growth import Growth
from infnerf_ns.training.growth_rules import GrowthConfig, births, deaths, within_budget
from infnerf_ns.training.optimizer import NodeAdam
from infnerf_ns.tree_building import build_tree

# -- statistics --------------------------------------------------------------------------------------------------------


def _sums(tree: Octree, samples: dict[str, Tensor]) -> Tensor:
    table = torch.zeros(tree.num_nodes, 8, len(COLUMNS), dtype=torch.float64)
    gsd = [tree.gsd(level) for level in range(tree.depth + 1)]
    add_samples(**samples, level=tree.level, coords=tree.coords, gsd=gsd, table=table)
    return table


def test_statistics_by_hand() -> None:
    """Two rays of two samples in the root: what lies outside of the cube, or is coarse enough, does not ask."""
    tree = full_octree(tiny_tree().cube, 0, node_resolution=16)
    fine, coarse = 0.9 * tree.gsd(0), 1.1 * tree.gsd(0)
    samples = {
        "unit": torch.tensor([[0.2, 0.2, 0.7], [0.2, 0.3, 0.8], [0.6, 0.1, 0.1], [0.6, 1.2, 0.1]]),
        "node": torch.zeros(4, dtype=torch.long),
        "footprints": torch.tensor([fine, coarse, fine, fine]),
        "share": torch.tensor([1.0, 1.0, 0.5, 1.0]),
        "weights": torch.tensor([0.25, 0.5, 0.75, 0.125]),
        "error": torch.tensor([2.0, 4.0]),
        "gradient": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "order": torch.tensor([1, 0, 2, 3]),
    }
    table = _sums(tree, samples)[0]
    assert table[4].tolist() == [2, 0.75, 1.5, 3, 0.5, 1.0, 1.0]
    assert table[1].tolist() == [1, 0.375, 1.5, 3, 0.375, 1.5, 3.0], "half of the answer is another node's"
    assert table[3].tolist() == [1, 0.125, 0.5, 4, 0, 0, 0], "outside of the root cube"
    assert float(table.sum()) == pytest.approx(float(table[[1, 3, 4]].sum()))


def test_statistics_of_numba_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    field = tiny_field()
    tree = field.octree
    positions, footprints = tiny_samples(tree, 600)
    routed = field.route(positions, footprints)
    generator = torch.Generator().manual_seed(0)
    samples = {
        "unit": routed.unit,
        "node": routed.node,
        "footprints": routed.footprints,
        "share": torch.rand(600, generator=generator),
        "weights": torch.rand(600, generator=generator),
        "error": torch.rand(60, generator=generator),
        "gradient": torch.rand(600, generator=generator),
        "order": routed.order,
    }
    fast = _sums(tree, samples)
    monkeypatch.setattr(statistics, "on_cpu", lambda *_: False)
    assert torch.allclose(fast, _sums(tree, samples), rtol=1e-12)
    shared = samples["share"].double() * samples["weights"][routed.order]
    assert int(fast[..., 0].sum()) == 600 and float(fast[..., 1].sum()) == pytest.approx(float(shared.sum()))
    assert 0 < int((fast[..., 4] > 0).sum()) < int((fast[..., 0] > 0).sum()), "some ask, some do not"


# -- rules -------------------------------------------------------------------------------------------------------------


def _ready(tree: Octree) -> tuple[Tensor, Tensor]:
    """Ages and rests of a tree in which everything may happen."""
    return torch.full((tree.num_nodes,), 9), torch.zeros(tree.num_nodes, 8, dtype=torch.long)


def _table(tree: Octree, weight: float = 1000.0, error: float = 1.0, gradient: float = 1.0) -> Tensor:
    """Every octant has that weight; nothing asks."""
    columns = [1e4, weight, weight * error, weight * gradient, 0, 0, 0]
    return torch.tensor(columns, dtype=torch.float64).repeat(tree.num_nodes, 8, 1)


def _ask(table: Tensor, node: int, octant: int, weight: float, error: float, gradient: float = 0.0) -> None:
    table[node, octant, 4:] = torch.tensor([weight, weight * error, weight * gradient], dtype=torch.float64)


def test_what_asks_and_is_wrong_is_given_nodes() -> None:
    tree = full_octree(tiny_tree().cube, 1, node_resolution=16)
    config, (age, rest) = GrowthConfig(every=1, min_rays=100, error_ratio=0.5, gradient_ratio=2.0), _ready(tree)
    table = _table(tree)
    _ask(table, 3, 5, 200, 0.6)  # wrong enough
    _ask(table, 3, 6, 99, 9.0)  # too few rays
    _ask(table, 4, 0, 200, 0.4)  # right enough
    _ask(table, 4, 1, 200, 0.4, gradient=2.5)  # right enough, but it moves
    _ask(table, 5, 2, 300, 0.7)  # the most urgent: the most error
    _ask(table, 0, 2, 900, 9.0)  # has a child

    def born(age: Tensor = age, rest: Tensor = rest, deepest: int = 2) -> list[tuple[int, int]]:
        return list(zip(*(each.tolist() for each in births(tree, table, age, rest, deepest, config))))

    assert born() == [(5, 2), (3, 5), (4, 1)]
    assert born(deepest=1) == [], "the tree is as deep as it may be"
    resting = rest.clone()
    resting[5, 2] = 1
    assert born(rest=resting) == [(3, 5), (4, 1)]
    young = age.clone()
    young[3] = 0
    assert born(age=young) == [(5, 2), (4, 1)], "a node that has not lived a round has no children"


def test_a_budget_keeps_the_most_urgent() -> None:
    tree = full_octree(tiny_tree().cube, 1, node_resolution=16)
    config, (age, rest) = GrowthConfig(every=1, min_rays=100), _ready(tree)
    table = _table(tree)
    for node in range(1, 9):
        _ask(table, node, 0, 1000, float(node))
    born = births(tree, table, age, rest, 2, config)
    assert born.parents.tolist() == list(range(8, 0, -1))
    for nodes, memory, left in ((3, 1e9, 3), (99, 450.0, 4), (0, 1e9, 0), (-2, 1e9, 0), (99, 99.0, 0)):
        kept = within_budget(born, tree, [10, 50, 100], nodes, memory)
        assert kept.parents.tolist() == list(range(8, 8 - left, -1)) and len(kept.octants) == left


def test_empty_leaves_die_when_they_have_lived_long_enough() -> None:
    tree = full_octree(tiny_tree().cube, 1, node_resolution=16)
    config, (age, _) = GrowthConfig(every=1, prune_rays=20, grace_rounds=2), _ready(tree)
    table = _table(tree, weight=0.0)
    assert deaths(tree, table, age, config).tolist() == list(range(1, 9)), "the root stays, and is no leaf"
    table[2, 3, 1] = 25.0
    age[5] = 1
    assert deaths(tree, table, age, config).tolist() == [1, 3, 4, 6, 7, 8]


def test_thresholds_that_would_make_nodes_flicker_are_refused() -> None:
    assert GrowthConfig().check() == []
    (problem,) = GrowthConfig(min_rays=30, prune_rays=20).check()
    assert "--pipeline.model.growth.prune-rays 20" in problem and "min-rays 30" in problem


# -- rounds of a model -------------------------------------------------------------------------------------------------


def _growing(start: str = "root", **growth: float) -> tuple[InfNeRFModel, list[NodeAdam], Callable[[int], None]]:
    """A model whose every second step ends with a round, its optimizers, and one step of it."""
    torch.manual_seed(0)
    config = tiny_config(sampler=CONE_ALONE, start=start, full_level=1, level_start_steps=0)
    config.growth = GrowthConfig(
        **{"every": 2, "start_step": 2, "min_rays": 0.05, "prune_rays": 0.01, "grace_rounds": 1, **growth}
    )
    model = tiny_model(config).train()
    optimizers = {name: NodeAdam(group) for name, group in model.get_param_groups().items() if name != "appearance"}
    attributes = SimpleNamespace(trainer=None, optimizers=SimpleNamespace(optimizers=optimizers))
    before, after = model.get_training_callbacks(attributes)

    def step(number: int) -> None:
        before.func(step=number)
        rays, batch = ray_batch(seed=number)
        outputs = model(rays)
        sum(model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch)).values()).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        after.func(step=number)

    return model, list(optimizers.values()), step


def test_a_tree_starts_from_points_from_its_root_or_full() -> None:
    scene = tiny_scene()
    assert tiny_model(tiny_config(start="root")).field.octree.nodes_per_level == [1]
    assert tiny_model(tiny_config(start="full", full_level=1)).field.octree.nodes_per_level == [1, 8]
    points = tiny_model(tiny_config()).field.octree
    assert points.num_nodes == build_tree(scene, tiny_config().octree).num_nodes > 9
    assert "--pipeline.model.octree.full-level 5" in tiny_config(start="full", full_level=5).octree.check()[0]


def test_a_root_cube_that_is_given() -> None:
    """Whatever the points would make; levels and GSD follow it."""
    octree = build_tree(tiny_scene(), tiny_config(cube=(0.5, -0.25, 0.125, 8.0), max_level=2).octree)
    assert octree.cube.side == 8.0 and octree.cube.center.tolist() == [0.5, -0.25, 0.125]
    assert octree.gsd(1) == pytest.approx(8.0 / (2 * 2 * octree.node_resolution))
    assert octree.num_nodes > 1
    for wrong in ((0.0, 0.0, 0.0, 0.0), (0.0, float("nan"), 0.0, 1.0)):
        (problem,) = tiny_config(cube=wrong).octree.check()
        assert "--pipeline.model.octree.cube" in problem and "a side above 0" in problem


@pytest.mark.parametrize("start", ["root", "full", "points"])
def test_a_growing_model_keeps_its_budget_and_its_history(start: str) -> None:
    model, _, step = _growing(start, max_nodes=14 if start != "points" else 80)
    counts = [model.field.octree.num_nodes]
    for number in range(12):
        step(number)
        counts.append(model.field.octree.num_nodes)
    assert max(counts) <= max(model.config.growth.max_nodes, counts[0]) and max(counts) > counts[0]
    assert int(model.field.active_level) == model.field.octree.depth
    steps, nodes, born, died = model.growth.history.unbind(dim=1)
    assert steps[:, 0].tolist() == [1, 3, 5, 7, 9, 11]
    assert nodes.sum(1).tolist() == counts[2::2], "the history is that of the tree"
    assert torch.equal(nodes[1:] - nodes[:-1], (born - died)[1:])
    table, octree = model.growth.table, model.field.octree
    assert table.shape == (octree.num_nodes, 8, len(COLUMNS)) and bool(torch.isfinite(table).all())


def test_memory_is_a_budget_too() -> None:
    model, _, step = _growing(max_memory_mib=1)
    pages = model.field.pages
    for number in range(12):
        step(number)
    held = sum(pages.memory_bytes(model.field.octree))
    assert held <= 2**20 < held + 16 * max(sum(pages.node_page(level).values()) for level in (1, 2))


def test_a_growing_run_goes_on_from_its_checkpoint_as_if_never_stopped() -> None:
    whole, optimizers, step = _growing()
    for number in range(5):
        step(number)
    saved = copy.deepcopy((whole.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
    again, others, step_again = _growing()
    for number in range(3):  # another tree, which the checkpoint replaces
        step_again(number)
    again.load_state_dict(saved[0])
    for optimizer, state in zip(others, saved[1]):
        optimizer.load_state_dict(state)
    for each, stepped in ((whole, step), (again, step_again)):
        torch.manual_seed(7)
        for number in range(5, 10):
            stepped(number)
        assert each.field.octree.num_nodes > len(saved[0]["field.tree_level"])
    theirs, mine = whole.state_dict(), again.state_dict()
    assert theirs.keys() == mine.keys()
    for name, value in theirs.items():
        assert torch.equal(value, mine[name]), name


def test_a_checkpoint_of_a_run_that_did_not_grow_can_grow() -> None:
    still = tiny_model(tiny_config(sampler=CONE_ALONE, level_start_steps=0))
    state = {name: value for name, value in still.state_dict().items() if not name.startswith("growth.")}
    del state["field.maturity"]
    model, _, step = _growing()
    model.load_state_dict(state)
    nodes = model.field.octree.num_nodes
    for number in range(8):
        step(number)
    assert model.field.octree.num_nodes > nodes == still.field.octree.num_nodes


def test_no_round_comes_before_the_start_or_after_the_end() -> None:
    model, _, _ = _growing()
    growth = Growth(model.field.octree, 2, GrowthConfig(every=10, start_step=25, end_share=0.5))
    due = [step for step in range(100) if growth.is_due(step, step / 100)]
    assert due == [24, 34, 44]
    assert not any(Growth(model.field.octree, 2, GrowthConfig()).is_due(step, 0.0) for step in range(5000))


def test_levels_that_have_not_started_neither_die_nor_start_with_a_birth() -> None:
    """Regression: they got no samples, so they counted as empty leaves; and the first birth started all of them."""
    model, optimizers, _ = _growing("points", max_nodes=1000)
    field, growth = model.field, model.growth
    field.active_level.fill_(1)
    before, waiting = field.octree.nodes_per_level, field.decoders[2].data.clone()
    for number in (3, 5, 7, 9):
        growth.table[field.octree.level <= 1] = 1e4
        growth.watched[field.octree.level <= 1] = 2
        done = growth.round(number, field, optimizers)
        assert not done.deaths.any() and int(field.active_level) == 1
    assert field.octree.nodes_per_level[1] == 8 >= before[1] and field.octree.nodes_per_level[2] == before[2]
    assert torch.equal(field.decoders[2].data, waiting)
    field.activate_level(2)
    inner = torch.nonzero(field.octree.level == 2)[:, 0]
    parents = field.octree.row[field.octree.parent[inner]]
    assert torch.equal(field.decoders[2].data, field.decoders[1].data[parents]), "they start from their parents"


def test_nodes_that_were_hardly_watched_are_not_judged() -> None:
    model, optimizers, _ = _growing("full", every=10, grace_rounds=0)
    for watched, left in ((4.0, 9), (5.0, 1)):
        model.growth.watched[:] = watched
        model.growth.round(9, model.field, optimizers)
        assert model.field.octree.num_nodes == left


def test_a_density_that_is_infinite_leaves_the_statistics_finite() -> None:
    model, _, step = _growing(every=100)
    step(0)
    rays, batch = ray_batch()
    model.step = 1
    outputs = model(rays)
    watch = outputs["watch"]
    watch.error = torch.ones(len(rays))
    watch._density = torch.full_like(watch._density, torch.inf)
    watch._add(torch.zeros_like(watch._density))
    assert bool(torch.isfinite(model.growth.table).all()) and batch


def test_a_watched_step_leaves_nothing_in_memory() -> None:
    """Regression: a hook that holds its own tensor is a circle through the graph, which no collector sees."""
    model, _, _ = _growing(every=100)
    model.step = 1
    rays, batch = ray_batch()
    gc.disable()
    try:
        outputs = model(rays)
        left = weakref.ref(outputs["watch"]), weakref.ref(outputs["densities"][0])
        sum(model.get_loss_dict(outputs, batch, {}).values()).backward()
        del outputs
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()
