"""The memory of a packed run's nodes: slots side by side, each a page, and the tree that the kernels see of them.

There is one pool per kind of tensor; the banks of all levels below the root are that same pool. The *slot tree* has at
every level one node per slot, so whatever node a slot holds, its page is in the right bank. Which pages are in the pool
is decided by :class:`~infnerf_ns.streaming.node_cache.NodeCache`. Own code: the kernels want the pages side by side.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from infnerf_ns.octree import Octree


class PagePool:
    """Slots for pages.

    Args:
        octree: the whole tree, on the device of the pool.
        sizes: numbers in a page, by kind.
        slots: pages that there is room for.

    Raises:
        RuntimeError: the device has too little memory (on the CPU, MemoryError).
    """

    def __init__(self, octree: Octree, sizes: dict[str, int], slots: int) -> None:
        self.octree, self.sizes = octree, sizes
        self._parent, self._level = octree.parent.cpu(), octree.level.cpu()
        self.allocate(slots)

    @property
    def page_bytes(self) -> int:
        """Memory of one page."""
        return 4 * sum(self.sizes.values())

    @property
    def capacity(self) -> int:
        """Pages that there is room for."""
        return len(self.node_of_slot)

    def allocate(self, slots: int) -> None:
        """Empty slots instead of the ones before; all nodes are forgotten."""
        device = self.octree.level.device
        self.node_of_slot = [-1] * slots
        self.slot = torch.full((self.octree.num_nodes,), -1)
        """of each node; -1: it has none, as the root"""
        # At least one slot, so that there is a bank to hand to the kernels; nothing is ever put into a spare one.
        self._stride = max(slots, 1)
        self.tensors = {kind: _lazy_zeros(self._stride, size, device) for kind, size in self.sizes.items()}
        """[slots, page] by kind"""
        depth = self.octree.depth
        level = torch.cat([torch.zeros(1), torch.arange(1, depth + 1).repeat_interleave(self._stride)]).long()
        self.slot_tree = Octree(
            self.octree.cube,
            level,
            torch.zeros(len(level), 3, dtype=torch.long),
            torch.full_like(level, -1),
            node_resolution=self.octree.node_resolution,
            gsd_sharpness=self.octree.gsd_sharpness,
        ).to(device)

    def free_slot(self) -> int | None:
        """An empty slot, if there is one."""
        return self.node_of_slot.index(-1) if -1 in self.node_of_slot else None

    def put(self, node: int, slot: int, page: Mapping[str, Tensor]) -> None:
        """A node's page into a slot that is free."""
        for kind, pool in self.tensors.items():
            pool[slot].copy_(page[kind])
        number = 1 + (int(self._level[node]) - 1) * self._stride + slot
        self.slot_tree.coords[number] = self.octree.coords[node]
        self.node_of_slot[slot] = node
        self.slot[node] = slot

    def remove(self, node: int) -> int:
        """Gives up a node; its slot."""
        slot = int(self.slot[node])
        self.slot[node] = -1
        self.node_of_slot[slot] = -1
        return slot

    def numbers(self, shown: Bool[Tensor, "N"] | None) -> Int[Tensor, "N1"]:
        """The number in the slot tree of each node that is there with all of its ancestors; -1 for the others, and
        behind the last one for "no node".

        Args:
            shown: the nodes that may be shown at all; None: all of them.
        """
        edges = self.octree.first_of_level.tolist()
        number = torch.full((self.octree.num_nodes + 1,), -1)
        number[0] = 0
        for level in range(1, self.octree.depth + 1):
            nodes = slice(edges[level], edges[level + 1])
            slot = self.slot[nodes]
            there = (slot >= 0) & (number[self._parent[nodes]] >= 0)
            if shown is not None:
                there &= shown[nodes]
            number[nodes] = torch.where(there, 1 + (level - 1) * self._stride + slot, -1)
        return number.to(self.octree.level.device)


def _lazy_zeros(rows: int, size: int, device: torch.device) -> Tensor:
    """On the CPU memory that is filled when a page is first put into it."""
    if device.type != "cpu":
        return torch.zeros(rows, size, device=device)
    return torch.from_numpy(np.zeros((rows, size), np.float32))
