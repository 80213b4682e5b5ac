"""How much of a tree's memory one training step touches.

Counted are the banks and what training keeps beside them, in the blocks of 16 floats (64 bytes, a cache line) that the
kernels flag for NodeAdam:

- the parameters of every block that is *read*: by the samples of the proposal rounds and of the field, whatever their
  weight, and by the colours;
- gradient and both moments of every block that is *written*, because a gradient reached it;
- the flags of the touched nodes, which NodeAdam looks through, a byte per block of a node.

A block counts once per step however often it is visited. The two tree losses' random points are not counted: they are
part of one step in 32. Nor is what does not belong to the tree: activations, rays, appearance codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from infnerf_ns.cli.bench_trainer import StepTrainer
from infnerf_ns.field import OctreeField, Routed
from infnerf_ns.kernels import bank_gradient

BLOCK_BYTES = 64
_WRITTEN_ARRAYS = 3
_KINDS = ("grids", "decoders", "proposals")


@dataclass
class Touched:
    """What one step touches."""

    nodes: int
    """nodes of which anything is read"""
    read_blocks: dict[str, int]
    """by kind of bank"""
    written_blocks: dict[str, int]
    """by kind of bank"""
    flag_bytes: int
    """flags of all touched nodes"""
    levels_per_sample: float
    """mean number of nodes on the path of a sample of the field"""

    @property
    def bytes(self) -> int:
        """See the module."""
        blocks = sum(self.read_blocks.values()) + _WRITTEN_ARRAYS * sum(self.written_blocks.values())
        return BLOCK_BYTES * blocks + self.flag_bytes


@dataclass
class _Reads:
    """What a step asked the field for."""

    proposals: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """positions and footprints of the rounds"""
    routed: list[Routed] = field(default_factory=list)
    """samples of the field"""


def touched_by_step(trainer: StepTrainer, step: int, rays: RayBundle, batch: dict[str, Tensor]) -> Touched:
    """Counts what the forward and backward pass of a step touch; the model stays as it is.

    Args:
        trainer: of a model whose bank gradients are in place.
        step: of the training; one that trains the proposals touches the most.
        rays: R rays.
        batch: with ``image [R, 3]``.
    """
    tree = trainer.model.field
    with _recorded(tree) as reads:
        trainer.backward(step, rays, batch)
    written, flags = _flagged(tree)
    # A read leaves no trace of its own; a gradient that vanishes nowhere flags all that the same samples read.
    for positions, footprints in reads.proposals:
        density = tree.proposal_density(positions, footprints)
        density.backward(torch.ones_like(density))
    for routed in reads.routed:
        outputs = tree.density(routed)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    read, _ = _flagged(tree)
    nodes = sum(
        int((bank_gradient(grids).rows | bank_gradient(proposals).rows).sum())
        for grids, proposals in zip(tree.grids, tree.proposals)
        if len(grids)
    )
    levels = torch.cat([(routed.path >= 0).sum(dim=1) for routed in reads.routed])
    trainer.zero_grad()
    return Touched(nodes, read, written, flags, float(levels.float().mean()))


@contextmanager
def _recorded(tree: OctreeField) -> Iterator[_Reads]:
    """Notes the arguments of the field's two kinds of questions."""
    reads = _Reads()
    proposal_density, density = tree.proposal_density, tree.density

    def note_proposals(positions: Tensor, footprints: Tensor | None, routing_scale: float) -> Tensor:
        reads.proposals.append((positions.detach(), None if footprints is None else footprints.detach()))
        return proposal_density(positions, footprints, routing_scale)

    def note_density(routed: Routed, frozen: bool = False) -> tuple[Tensor, Tensor]:
        reads.routed.append(routed)
        return density(routed, frozen)

    tree.proposal_density, tree.density = note_proposals, note_density  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        del tree.proposal_density, tree.density


def _flagged(tree: OctreeField) -> tuple[dict[str, int], int]:
    """Flagged blocks of each kind of bank, and the bytes of the flags of all rows in which one is flagged."""
    blocks, flags = dict.fromkeys(_KINDS, 0), 0
    for kind in _KINDS:
        for bank in getattr(tree, kind):
            if len(bank):
                held = bank_gradient(bank)
                rows = held.touched.numpy()[np.flatnonzero(held.rows.numpy())]
                blocks[kind] += int(rows.sum())
                flags += rows.size
    return blocks, flags
