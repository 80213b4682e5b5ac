"""The node cache: what is in memory, what is given up, what is read, and what happens to pages that cannot be read."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_packed import TinyPacked, tiny_packed
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.streaming import page_pool
from infnerf_ns.streaming.node_cache import BUDGET_VARIABLE, NodeCache, budget_bytes


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> TinyPacked:
    return tiny_packed(tmp_path_factory.mktemp("packed"))


def inside(packed: TinyPacked, node: int, count: int = 5) -> Tensor:
    """Unit coordinates in a node's cube."""
    tree = packed.model.field.octree
    return (tree.coords[node] + 0.1 + 0.8 * torch.rand(count, 3)) / 2.0 ** tree.level[node]


def ask(cache: NodeCache, packed: TinyPacked, node: int) -> Tensor:
    """Path in the slot tree of a sample that wants just that node."""
    tree = packed.model.field.octree
    path = cache.walk(inside(packed, node), torch.full((5,), tree.gsd(int(tree.level[node]))), 99, "torch")
    assert bool((path == path[:1]).all())
    return path[0]


def ancestors(packed: TinyPacked, node: int) -> set[int]:
    tree, found = packed.model.field.octree, set()
    while node > 0:
        found.add(node)
        node = int(tree.parent[node])
    return found


def leaf(packed: TinyPacked, number: int = 0) -> int:
    """One of the deepest nodes."""
    tree = packed.model.field.octree
    return int(tree.first_of_level[tree.depth]) + number


def holds(cache: NodeCache) -> set[int]:
    return set(torch.nonzero(cache.resident)[1:, 0].tolist())


def page_of(cache: NodeCache, number: int) -> Tensor:
    """Grids in the slot of a node of the slot tree."""
    return cache.pool["grids"][(number - 1) % cache.capacity]


def test_a_walk_loads_the_nodes_on_the_way_and_no_others(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    node = leaf(packed)
    path = ask(cache, packed, node)
    assert holds(cache) == ancestors(packed, node)
    assert cache.counters.pages_read == cache.counters.misses == 3 and cache.counters.hits == 0
    assert cache.counters.bytes_read == 3 * cache.page_bytes
    assert cache.slot_tree.level[path].tolist() == [0, 1, 2, 3]
    tree = packed.model.field.octree
    for level, number in enumerate(path[1:].tolist(), 1):
        own = [each for each in ancestors(packed, node) if tree.level[each] == level][0]
        assert torch.equal(cache.slot_tree.coords[number], tree.coords[own])
        bank = packed.model.field.grids[level][own - int(tree.first_of_level[level])]
        assert torch.equal(page_of(cache, number), bank)
    ask(cache, packed, node)
    assert cache.counters.pages_read == 3 and cache.counters.hits == 3, "the second time nothing is read"


def test_coarse_samples_need_no_pages(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    path = cache.walk(inside(packed, leaf(packed)), torch.full((5,), 1e9), 99, "torch")
    assert bool((path[:, 0] == 0).all()) and bool((path[:, 1:] == -1).all())
    assert cache.counters.pages_read == 0 and cache.resident_bytes == cache.root_bytes


def test_the_least_recently_used_node_goes_first_and_children_before_parents(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=4)
    first, second = leaf(packed, 0), next(
        each for each in range(leaf(packed), packed.model.field.octree.num_nodes)
        if not ancestors(packed, each) & ancestors(packed, leaf(packed))
    )  # fmt: skip
    ask(cache, packed, first)
    ask(cache, packed, second)
    assert ancestors(packed, second) <= holds(cache)
    left = holds(cache) - ancestors(packed, second)
    assert len(left) == 1 and left == {min(ancestors(packed, first))}, "of the older path its coarsest node stays"
    assert cache.counters.evictions == 2


@settings(max_examples=25)
@given(st.integers(0, 12), st.lists(st.integers(1, 10_000), min_size=1, max_size=12))
def test_the_budget_holds_whatever_is_asked_for(packed: TinyPacked, nodes: int, wishes: list[int]) -> None:
    cache = packed.cache(nodes)
    for wish in wishes:
        node = 1 + wish % (packed.model.field.octree.num_nodes - 1)
        path = ask(cache, packed, node)
        deepest = int(path.max())
        assert int((path >= 0).sum()) == int(cache.slot_tree.level[deepest]) + 1, "a path has no gap"
        assert cache.resident_bytes <= cache.budget_bytes
        room = cache.capacity >= len(ancestors(packed, node))
        if room:
            assert ancestors(packed, node) <= holds(cache)
    assert cache.resident_bytes <= cache.counters.peak_bytes <= cache.budget_bytes


def test_one_walk_may_need_more_than_there_is(packed: TinyPacked, capsys: pytest.CaptureFixture) -> None:
    cache = packed.cache(nodes=2)
    path = ask(cache, packed, leaf(packed))
    assert path[-1] == -1 and int((path >= 0).sum()) == 3
    ask(cache, packed, leaf(packed))
    warning = capsys.readouterr().err
    assert warning.count("infnerf: warning:") == 1 and BUDGET_VARIABLE in warning
    assert "holds the root and 2 more of" in warning


def test_prefetched_nodes_are_there_when_they_are_asked_for(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    node = leaf(packed)
    cache.prefetch(torch.tensor(sorted(ancestors(packed, node) | {0})))
    cache.settle()
    assert holds(cache) == ancestors(packed, node)
    ask(cache, packed, node)
    assert cache.counters.misses == 0 and cache.counters.hits == 3 and cache.counters.prefetched == 3


def test_prefetching_takes_nothing_from_a_frame_under_way(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=3)
    with cache.frame():
        ask(cache, packed, leaf(packed))
        cache.prefetch(torch.arange(packed.model.field.octree.num_nodes))
        cache.settle()
        assert holds(cache) == ancestors(packed, leaf(packed))
    assert cache.counters.prefetched == 0


def test_prefetching_takes_nothing_from_the_last_frame(packed: TinyPacked) -> None:
    """Regression: what could be seen next took the room of what was used, which was read again frame by frame."""
    cache, last = packed.cache(nodes=5), packed.model.field.octree.nodes_per_level[3] - 1
    with cache.frame():
        ask(cache, packed, leaf(packed, last))
    for _ in range(4):
        with cache.frame():
            ask(cache, packed, leaf(packed))
        cache.prefetch(torch.arange(packed.model.field.octree.num_nodes))
        cache.settle()
        assert ancestors(packed, leaf(packed)) <= holds(cache)
    assert cache.counters.misses == 6 and len(holds(cache)) == 5, "the room beside it is taken"


def test_a_walk_that_does_not_wait_gets_coarse_nodes_first(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    cache.waits = False
    arrivals = []
    cache.on_arrival = lambda threads: arrivals.append((len(holds(cache)), threads))
    with cache.frame():
        first = ask(cache, packed, leaf(packed))
    assert first.tolist() == [0, -1, -1, -1], "the root's picture is there at once"
    cache.settle()
    assert arrivals[-1] == (3, {threading.get_ident()})
    with cache.frame():
        assert bool((ask(cache, packed, leaf(packed)) >= 0).all())
    cache.settle()
    assert len(arrivals) == 1, "nothing is missing any more, so nothing is drawn again"


@pytest.mark.parametrize("loader", ["quick", "slow"])
def test_a_view_that_does_not_fit_comes_to_rest(packed: TinyPacked, loader: str) -> None:
    """Regression: pages that nobody waits for took the room of others of the same view, which then were missed.

    Which four stay depends on whether the loader comes between two chunks of a frame or after it.
    """
    cache = packed.cache(nodes=4)
    cache.waits = False
    arrivals = []
    cache.on_arrival = lambda threads: arrivals.append(threads)
    for _ in range(6):
        before, read = len(arrivals), cache.counters.pages_read
        after_the_frame = threading.Event()
        with cache.frame():
            if loader == "slow":
                cache._loader.submit(after_the_frame.wait, 60)
            ask(cache, packed, leaf(packed, 0))
            if loader == "quick":
                cache.settle()
            ask(cache, packed, leaf(packed, packed.model.field.octree.nodes_per_level[3] - 1))
        after_the_frame.set()
        cache.settle()
    assert len(arrivals) == before and cache.counters.pages_read == read, "the last frame has brought nothing new"
    assert len(holds(cache)) == 4


def test_frozen_nodes_are_all_that_is_drawn(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    with cache.frame() as start:
        ask(cache, packed, 1)
        used = cache.used_since(start)
    assert used[0] and used[1]
    cache.freeze(used)
    other = next(each for each in range(1, len(used)) if not used[each])
    path = ask(cache, packed, other)
    assert not holds(cache) - set(torch.nonzero(used)[:, 0].tolist())
    assert int((path >= 0).sum()) < int(packed.model.field.octree.level[other]) + 1
    cache.freeze(None)
    assert int((ask(cache, packed, other) >= 0).sum()) >= int(packed.model.field.octree.level[other]) + 1


def test_frozen_nodes_that_a_smaller_budget_has_cost_come_back(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    with cache.frame() as start:
        ask(cache, packed, leaf(packed))
        used = cache.used_since(start)
    cache.freeze(used)
    for nodes in (1, 50):
        cache.set_budget(cache.root_bytes + nodes * cache.page_bytes)
        with cache.frame():
            path = ask(cache, packed, leaf(packed))
    assert holds(cache) == ancestors(packed, leaf(packed)) and bool((path >= 0).all())


def test_nothing_is_loaded_for_a_selection_that_was_frozen(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    cache.waits = False
    stopped, go_on = threading.Event(), threading.Event()
    cache._loader.submit(lambda: (stopped.set(), go_on.wait(60)))
    assert stopped.wait(60)
    cache.walk(inside(packed, leaf(packed)), torch.full((5,), 1e-9), 99, "torch")  # misses what the loader cannot fetch
    freezing = threading.Thread(target=cache.freeze, args=(torch.zeros_like(cache.resident),))
    freezing.start()
    while not cache._waiting:
        pass
    go_on.set()
    freezing.join()
    cache.settle()
    assert cache.counters.pages_read == 0


def test_what_an_earlier_view_has_missed_is_not_loaded_any_more(packed: TinyPacked) -> None:
    cache, tree = packed.cache(nodes=50), packed.model.field.octree
    cache.waits = False
    go_on = threading.Event()
    other = next(
        each for each in range(leaf(packed), tree.num_nodes) if not ancestors(packed, each) & {1, leaf(packed)}
    )
    with cache.frame():
        cache._loader.submit(go_on.wait, 60)
        ask(cache, packed, leaf(packed))
    threading.Timer(0.2, go_on.set).start()
    with cache.frame():
        ask(cache, packed, other)
    cache.settle()
    assert ancestors(packed, other) <= holds(cache) and leaf(packed) not in holds(cache)


def test_nodes_read_ahead_during_a_frame_are_not_used_by_it(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    with cache.frame() as start:
        cache.prefetch(torch.arange(20))
        cache.settle()
        assert len(holds(cache)) == 19 and int(cache.used_since(start).sum()) == 1, "the root"


def test_a_thread_takes_nothing_from_the_frame_of_another(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=4)
    last = leaf(packed, packed.model.field.octree.nodes_per_level[3] - 1)
    with cache.frame():
        ask(cache, packed, leaf(packed))
        thread = threading.Thread(target=ask, args=(cache, packed, last))
        thread.start()
        thread.join()
        assert ancestors(packed, leaf(packed)) <= holds(cache)


def test_a_budget_that_cannot_be_had_leaves_the_old_one(
    packed: TinyPacked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cache = packed.cache(nodes=3)
    ask(cache, packed, leaf(packed))
    lazy_zeros = page_pool._lazy_zeros

    def no_more_than_ten(rows: int, *rest) -> Tensor:  # noqa: ANN002
        if rows > 10:
            raise MemoryError
        return lazy_zeros(rows, *rest)

    monkeypatch.setattr(page_pool, "_lazy_zeros", no_more_than_ten)
    cache.set_budget(cache.root_bytes + 30 * cache.page_bytes)
    with cache.frame():
        assert cache.capacity == 3 and holds(cache) == ancestors(packed, leaf(packed))
        assert bool((ask(cache, packed, leaf(packed)) >= 0).all())
    assert "it stays as it was" in capsys.readouterr().err


def test_samples_say_up_to_which_scale_they_need_a_node(packed: TinyPacked) -> None:
    cache, tree = packed.cache(nodes=50), packed.model.field.octree
    node = leaf(packed)
    unit, footprints = inside(packed, node, 4), torch.tensor([2.0, 3.0, 4.0, 8.0]) * tree.gsd(3)
    with cache.asked_up_to() as asked:
        cache.walk(unit, footprints, 99, "torch")
    assert cache.counters.pages_read == 2, "to note what finer samples would need is not to load it"
    assert asked[0] == torch.inf
    for each in ancestors(packed, node):
        assert asked[each] == pytest.approx(tree.gsd(int(tree.level[each]) - 1) / (2 * tree.gsd(3)))
    assert set(torch.nonzero(asked)[1:, 0].tolist()) >= ancestors(packed, node)
    cache.walk(unit, footprints / 100, 99, "torch")
    assert asked[node] == pytest.approx(1.0), "only while it is asked for"


def test_another_budget_keeps_what_was_used_last(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=50)
    changed = []
    cache.on_pool_change = lambda: changed.append(cache.capacity)
    for number in range(6):
        ask(cache, packed, leaf(packed, number))
    last, missed = ancestors(packed, leaf(packed, 5)), cache.counters.misses
    cache.set_budget(cache.root_bytes + 3 * cache.page_bytes)
    assert cache.capacity == 50, "not before the next frame begins"
    with cache.frame():
        assert cache.capacity == 3 and changed == [0, 3], "the old pool goes before the new one comes"
        assert holds(cache) == last
        path = ask(cache, packed, leaf(packed, 5))
    assert cache.counters.evictions == 0 and cache.counters.misses == missed, "they were there"
    bank = packed.model.field.grids[3][5]
    assert torch.equal(page_of(cache, int(path[3])), bank), "the pages have moved with their nodes"


def test_an_abandoned_frame_blocks_nothing(packed: TinyPacked) -> None:
    cache = packed.cache(nodes=3)
    with pytest.raises(KeyboardInterrupt), cache.frame():
        ask(cache, packed, leaf(packed))
        raise KeyboardInterrupt
    with cache.frame():
        ask(cache, packed, 1)
        assert 1 in holds(cache)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", ["missing", "flipped number", "flipped header", "truncated", "empty", "other page"])
def test_a_damaged_page_is_named_and_its_parent_drawn(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    packed = tiny_packed(tmp_path)
    cache = packed.cache(nodes=50)
    node = next(each for each in range(1, packed.model.field.octree.num_nodes) if len(ancestors(packed, each)) == 2)
    path = cache.files.path(node)
    {
        "missing": path.unlink,
        "flipped number": lambda: flip(path, -5),
        "flipped header": lambda: flip(path, 12),
        "truncated": lambda: path.write_bytes(path.read_bytes()[:-100]),
        "empty": lambda: path.write_bytes(b""),
        "other page": lambda: path.write_bytes(cache.files.path(node - 1).read_bytes()),
    }[harm]()
    for _ in range(2):
        walked = ask(cache, packed, node)
        assert walked.tolist()[2:] == [-1, -1] and walked[1] > 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("infnerf: warning:")]
    assert len(warnings) == 1 and str(path) in warnings[0] and "parent is drawn" in warnings[0]
    assert ("missing" if harm == "missing" else "damaged") in warnings[0]
    assert cache.counters.damaged == 1


def test_the_budget_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUDGET_VARIABLE, raising=False)
    assert budget_bytes(3) == 3 << 20
    monkeypatch.setenv(BUDGET_VARIABLE, "1.5")
    assert budget_bytes(3) == 3 << 19
    for wrong in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv(BUDGET_VARIABLE, wrong)
        with pytest.raises(InputError, match=f"{BUDGET_VARIABLE}={wrong}: give"):
            budget_bytes(3)
