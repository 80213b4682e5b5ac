"""The nodes of a packed run that are in memory: a byte budget, least recently used out first, and a loader thread.

The pages lie in the slots of a :class:`~infnerf_ns.streaming.page_pool.PagePool`. :meth:`NodeCache.walk` finds the path
of each sample in the whole tree, has the nodes on it loaded, and answers with the path in the pool's slot tree; a node
that is not there (not yet, damaged, or no room) is left out, and with it all below it: the parent answers, as for a
missing child.

All reading and all changes of slots happen in one loader thread. Own code: what is kept depends on the tree (a child
without its parent is of no use).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.kernels import Backend
from infnerf_ns.octree import Octree
from infnerf_ns.streaming.page_files import PageError, PageFiles, to_float
from infnerf_ns.streaming.page_pool import PagePool
from infnerf_ns.validation import warn

BUDGET_VARIABLE = "INFNERF_BUDGET_MIB"
"""Environment variable: memory for the nodes of a packed run."""


@dataclass
class CacheCounters:
    """What the cache has done since it was made. Nodes count once per walk, whatever the number of samples."""

    hits: int = 0
    """nodes that were there when a walk asked for them"""
    misses: int = 0
    """nodes that were not"""
    prefetched: int = 0
    """pages read before a walk asked for them"""
    bytes_read: int = 0
    """of pages, as they are in the files"""
    pages_read: int = 0
    evictions: int = 0
    damaged: int = 0
    """pages that are missing or damaged"""
    peak_bytes: int = 0
    """most bytes resident at any time, the root's included"""


class NodeCache:
    """Node pages in memory.

    Args:
        octree: the whole tree.
        files: its pages.
        root_bytes: memory of what is always resident: the root's page and shared decoders.
        budget_bytes: for the root and all resident pages together.
        device: of the pool.

    Raises:
        InputError: the device has too little memory.
    """

    def __init__(
        self, octree: Octree, files: PageFiles, root_bytes: int, budget_bytes: int, device: torch.device | str
    ) -> None:
        self.octree, self.files, self.root_bytes = octree.to(device), files, root_bytes
        self.device = torch.device(device)
        self.counters = CacheCounters(peak_bytes=root_bytes)
        self.waits = True
        """whether a walk waits for the pages that it needs; else the loader fetches them for a later one"""
        self.on_arrival: Callable[[set[int]], None] | None = None
        """called by the loader when pages that nobody waited for have come, with the threads whose frames have missed
        them"""
        self.on_pool_change: Callable[[], None] | None = None
        """called when :attr:`pool` and :attr:`slot_tree` are others"""
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "infnerf-pages")
        self._clock = itertools.count(1)
        self._frames: dict[int, int] = {}
        self._last_frame = 0
        self._waiting: set[int] = set()
        self._wanted: dict[int, tuple[int, set[int]]] = {}
        self._told = False
        self._asked: dict[int, Float[Tensor, "N"]] = {}
        count = octree.num_nodes
        self._parent = octree.parent.cpu()
        self._used = torch.zeros(count, dtype=torch.long)
        self._damaged = torch.zeros(count, dtype=torch.bool)
        self._frozen: Bool[Tensor, "N"] | None = None
        self.budget_bytes, self._next_budget = budget_bytes, budget_bytes
        sizes = files.sizes(count - 1) if count > 1 else {}
        try:
            self._pool = PagePool(self.octree, sizes, 0)
            self._pool.allocate(self._fitting(budget_bytes))
            self._publish()
        except (RuntimeError, MemoryError) as error:
            raise InputError(
                f"{budget_bytes / 2**20:.0f} MiB for nodes are more than is free on {self.device}: lower"
                f" {BUDGET_VARIABLE}"
            ) from error

    # -- memory

    @property
    def pool(self) -> dict[str, Tensor]:
        """[slots, page] by kind: the banks of all levels below the root."""
        return self._pool.tensors

    @property
    def slot_tree(self) -> Octree:
        """A node per level and slot of the pool."""
        return self._pool.slot_tree

    @property
    def page_bytes(self) -> int:
        """Memory of one page."""
        return self._pool.page_bytes

    @property
    def capacity(self) -> int:
        """Pages that fit into the budget."""
        return self._pool.capacity

    @property
    def resident(self) -> Bool[Tensor, "N"]:
        """Which nodes are in memory, the root always."""
        there = self._pool.slot >= 0
        there[0] = True
        return there

    @property
    def resident_bytes(self) -> int:
        """Bytes of the root and of all pages in memory."""
        return self.root_bytes + self.page_bytes * int((self._pool.slot >= 0).sum())

    @property
    def model_bytes(self) -> int:
        """Bytes of all nodes."""
        return self.root_bytes + self.page_bytes * (self.octree.num_nodes - 1)

    def set_budget(self, budget_bytes: int) -> None:
        """Another budget, from the next frame on that is alone; what was used last stays."""
        self._next_budget = budget_bytes

    def freeze(self, nodes: Bool[Tensor, "N"] | None) -> None:
        """Shows these nodes and no others, whatever is asked for, until called with None."""

        def change() -> None:
            self._frozen = nodes
            with self._lock:
                self._wanted.clear()
            self._publish()

        self._ask(change)

    def _resize(self) -> None:
        """The next budget; what was used last is read again. The old pool goes first: a change must not take the
        memory of both."""
        there = torch.nonzero(self._pool.slot >= 0)[:, 0].tolist()
        latest = sorted(there, key=lambda node: (-int(self._used[node]), node))
        before, self.budget_bytes = self.budget_bytes, self._next_budget
        try:
            self._exchange_pool()
        except (RuntimeError, MemoryError):  # too little memory, of a GPU above all
            warn(f"{self._next_budget / 2**20:.0f} MiB for nodes are more than there is; it stays as it was")
            self.budget_bytes = self._next_budget = before
            self._exchange_pool()
        for node in sorted(latest[: self.capacity]):
            used = int(self._used[node])
            self._make_resident(node, 0, frozenset())
            self._used[node] = used
        self._publish()

    def _exchange_pool(self) -> None:
        """Gives the pool away, everywhere, before the next one is made."""
        for budget in (0, self.budget_bytes):
            self._pool.allocate(self._fitting(budget))
            self._publish()
            if self.on_pool_change is not None:
                self.on_pool_change()

    def _fitting(self, budget_bytes: int) -> int:
        """Pages that fit beside the root."""
        pages = (budget_bytes - self.root_bytes) // max(self.page_bytes, 1)
        return max(0, min(pages, self.octree.num_nodes - 1))

    # -- looking things up

    @contextmanager
    def frame(self) -> Iterator[int]:
        """While it lasts, nothing that its walks have used is given up for what others want; gives its start on the
        clock of :meth:`used_since`."""
        thread = threading.get_ident()
        if thread in self._frames:  # a part of one
            yield self._frames[thread]
            return
        self._ask(self._begin_frame, thread)
        try:
            yield self._frames[thread]
        finally:
            self._frames.pop(thread, None)

    @property
    def in_frame(self) -> bool:
        """Whether this thread has begun one."""
        return threading.get_ident() in self._frames

    def _begin_frame(self, thread: int) -> None:
        alive = {each.ident for each in threading.enumerate()}
        for gone in set(self._frames) - alive:
            self._frames.pop(gone, None)
        if self._next_budget != self.budget_bytes and not self._frames:
            self._resize()
        self._frames[thread] = self._last_frame = next(self._clock)
        with self._lock:
            self._wanted.pop(thread, None)

    def used_since(self, start: int) -> Bool[Tensor, "N"]:
        """Which nodes walks have asked for since then, and were given; the root always."""
        used = (self._used >= start) & (self._pool.slot >= 0)
        used[0] = True
        return used

    def walk(
        self, unit: Float[Tensor, "M 3"], footprints: Float[Tensor, "M"] | None, max_level: int, backend: Backend
    ) -> Int[Tensor, "M K"]:
        """:meth:`Octree.route` in the slot tree, after the nodes on the way have been loaded, as far as they can be."""
        asked = self._asked.get(threading.get_ident())
        if asked is not None and footprints is not None:
            self._note(asked, unit, footprints, max_level, backend)
        path = self.octree.route(unit, footprints, max_level, backend)
        needed = self._on_paths(path)
        now = next(self._clock)
        with self._lock:
            there = self._pool.slot[needed] >= 0
            self._used[needed] = now
            self.counters.hits += int(there.sum())
            self.counters.misses += int((~there).sum())
        missing = needed[~there & ~self._damaged[needed]].tolist()
        if self._frozen is not None:  # a smaller budget may have cost some of the frozen ones
            missing = [node for node in missing if self._frozen[node]]
        if missing:
            if self.waits:
                self._ask(self._load, missing, now, threading.get_ident())
            else:
                thread = threading.get_ident()
                self._want(missing, thread, self._frames.get(thread, now))
        # -1 (below the sample's own node) finds the last entry, which is -1.
        return torch.take(self._number, path)

    @contextmanager
    def asked_up_to(self) -> Iterator[Float[Tensor, "N"]]:
        """Notes, while it lasts, up to which scale of their footprints the samples of this thread's walks touch each
        node, as :func:`.selection.touched_up_to` does it for all places where samples can be; the root's is
        infinite."""
        asked = torch.zeros(self.octree.num_nodes, device=self.device)
        asked[0] = torch.inf
        self._asked[threading.get_ident()] = asked
        try:
            yield asked
        finally:
            del self._asked[threading.get_ident()]

    def _note(
        self,
        asked: Float[Tensor, "N"],
        unit: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"],
        max_level: int,
        backend: Backend,
    ) -> None:
        path = self.octree.route(unit, None, max_level, backend)
        for level in range(1, path.shape[1]):
            there = torch.nonzero(path[:, level] >= 0)[:, 0]
            scale = self.octree.gsd(level - 1) / footprints[there].clamp(min=1e-20)
            asked.scatter_reduce_(0, path[there, level], scale, "amax")

    def _on_paths(self, path: Int[Tensor, "M K"]) -> Int[Tensor, "n"]:
        """The nodes on the paths without the root, parents first."""
        on = torch.zeros(self.octree.num_nodes, dtype=torch.bool, device=path.device)
        on[path.amax(dim=1)] = True  # nodes are sorted by level, so the deepest of a path has the highest number
        on = on.cpu()
        edges = self.octree.first_of_level.tolist()
        for level in range(path.shape[1] - 1, 1, -1):
            nodes = slice(edges[level], edges[level + 1])
            on[self._parent[nodes][on[nodes]]] = True
        on[0] = False
        return torch.nonzero(on)[:, 0]

    def say_coarser(self, footprint_scale: float) -> None:
        """Says, the first time, that the budget is too small for what a view asks for."""
        self._say_short(f"views are drawn coarser, this one as if footprints were {footprint_scale:.3g} times as large")

    def _say_short(self, consequence: str) -> None:
        if not self._told:
            self._told = True
            warn(
                f"the memory budget of {self.budget_bytes / 2**20:.0f} MiB holds the root and {self.capacity} more of"
                f" {self.octree.num_nodes} nodes: {consequence}; raise {BUDGET_VARIABLE} or the viewer's slider"
            )

    # -- loading; everything below runs in the loader thread, but for the first five

    def _ask(self, job: Callable[..., None], *arguments: Any) -> None:
        """Has the loader do something and waits for it."""
        thread = threading.get_ident()
        self._waiting.add(thread)
        try:
            self._loader.submit(job, *arguments).result()
        finally:
            self._waiting.discard(thread)

    def _later(self, job: Callable[..., None], *arguments: Any) -> None:
        """Has the loader do something that nobody waits for."""

        def try_it() -> None:
            try:
                job(*arguments)
            except Exception as error:  # nobody would be told, and pages would just not come
                warn(f"nodes could not be loaded ahead ({error!r})")

        self._loader.submit(try_it)

    def _want(self, nodes: list[int], thread: int, began: int) -> None:
        """Has the loader fetch nodes that nobody waits for.

        Args:
            nodes: that a frame has missed.
            thread: whose.
            began: when; what an earlier frame of that thread has missed is of no use any more.
        """
        with self._lock:
            before, wanted = self._wanted.get(thread, (began, set()))
            if before <= began:
                self._wanted[thread] = began, set(nodes) | (wanted if before == began else set())
        self._later(self._fetch_wanted)

    def prefetch(self, nodes: Int[Tensor, "n"]) -> None:
        """Has the loader fetch nodes that will be needed, coarse ones first, as far as there is room beside what the
        frames under way and the last one use: of what can be seen from where the camera goes, its samples will touch a
        part, and first of all what they have touched just now. Whoever waits goes first."""
        self._later(self._fetch_ahead, [node for node in nodes.cpu().sort().values.tolist() if node > 0])

    def settle(self) -> None:
        """Waits until the loader has nothing to do."""
        while self._loader.submit(lambda: bool(self._wanted)).result():
            pass

    def _fetch_wanted(self) -> None:
        """Loads what frames that do not wait have missed, coarse nodes first.

        What these frames have used stays, though they may have ended: a view that needs more than there is room for
        would give up one of its nodes for another, and be drawn again and again.
        """
        with self._lock:
            by, self._wanted = self._wanted, {}
        wanted = sorted(set().union(*(nodes for _, nodes in by.values())))
        oldest = min([self._oldest_frame(), *(began for began, _ in by.values())])
        for node in wanted:
            if self._waiting:
                for thread, (began, nodes) in by.items():
                    self._want([each for each in nodes if each >= node], thread, began)
                break
            if not self._make_resident(node, oldest, frozenset(wanted)):
                break
        self._publish()
        if self.on_arrival is not None and any(int(self._pool.slot[node]) >= 0 for node in wanted):
            self.on_arrival(set(by))

    def _fetch_ahead(self, nodes: list[int]) -> None:
        oldest, keep = min(self._oldest_frame(), self._last_frame), frozenset(nodes)
        for node in nodes if self._frozen is None else ():
            before = self.counters.pages_read
            if self._waiting or not self._make_resident(node, oldest, keep):
                break
            self.counters.prefetched += self.counters.pages_read - before
        self._publish()

    def _load(self, nodes: list[int], now: int, by: int) -> None:
        """Loads what a walk waits for; what the walk uses itself, and what other threads' frames use, is not given
        up."""
        # The list is made at once: other threads' frames begin and end meanwhile.
        oldest = min([now, *(began for thread, began in list(self._frames.items()) if thread != by)])
        if not all([self._make_resident(node, oldest, frozenset()) for node in nodes]):
            self._say_short("groups of rays that need more are drawn coarser")
        self._publish()

    def _oldest_frame(self) -> int:
        return min(self._frames.values(), default=next(self._clock))

    def _make_resident(self, node: int, oldest: int, keep: frozenset[int]) -> bool:
        """Reads a page into a slot, if it is not there and can be shown; False: there is no room.

        Args:
            node: below the root.
            oldest: what was used then or later stays.
            keep: nodes that stay, too.
        """
        parent = int(self._parent[node])
        there = self._pool.slot
        if there[node] >= 0 or self._damaged[node] or (parent > 0 and there[parent] < 0):
            return True
        slot = self._room(oldest, keep)
        if slot is None:
            return False
        try:
            page = self.files.read(node)
        except PageError as error:
            self._damaged[node] = True
            self.counters.damaged += 1
            warn(f"{error}; its parent is drawn instead; infnerf-pack with --overwrite writes it anew")
            return True
        self._pool.put(node, slot, {kind: to_float(array) for kind, array in page.items()})
        with self._lock:
            # Just read is as good as used, but no frame under way has asked for it.
            self._used[node] = max(int(self._used[node]), oldest - 1)
        self.counters.pages_read += 1
        self.counters.bytes_read += sum(array.nbytes for array in page.values())
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.resident_bytes)
        return True

    def _room(self, oldest: int, keep: frozenset[int]) -> int | None:
        """An empty slot; else that of the least recently used node, children before their parents."""
        free = self._pool.free_slot()
        if free is not None:
            return free
        with self._lock:
            used = self._used.tolist()
            spare = [node for node in self._pool.node_of_slot if used[node] < oldest and node not in keep]
            if not spare:
                return None
            node = min(spare, key=lambda node: (used[node], -node))
            slot = self._pool.remove(node)
        self.counters.evictions += 1
        self._publish()
        return slot

    def _publish(self) -> None:
        """Lets walks see what is in the pool now."""
        self._number = self._pool.numbers(self._frozen)


def budget_bytes(configured_mib: int) -> int:
    """The memory budget: the environment's, else the configured one.

    Raises:
        InputError: the environment's is not a number of MiB.
    """
    text = os.environ.get(BUDGET_VARIABLE)
    if text is None:
        return configured_mib << 20
    try:
        mib = float(text)
        if not 0 < mib < 1e9:
            raise ValueError
    except ValueError:
        raise InputError(f"{BUDGET_VARIABLE}={text}: give the memory for nodes in MiB, for instance 512") from None
    return int(mib * 2**20)
