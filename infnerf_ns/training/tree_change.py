"""A field and its optimizers take over a tree that has grown or shrunk: every node keeps its page, its gradient and its
optimizer state; those of new nodes are zero.

nerfstudio's optimizers hold the Parameters that they were built with, so the tensors inside are replaced. That must
happen while no graph of an earlier step lives: torch would check the next gradient against the old shape.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from infnerf_ns.field import OctreeField
from infnerf_ns.kernels.gradients import move_bank, moved_rows
from infnerf_ns.octree import Changed
from infnerf_ns.training.optimizer import NodeAdam


@torch.no_grad()
def change_tree(field: OctreeField, changed: Changed, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Moves what belongs to the nodes to their new rows.

    Args:
        field: with the old tree.
        changed: the new one.
        optimizers: that hold the banks.
    """
    old, (new, origin) = field.octree, changed
    samples, maturity, young = moved_rows(field.node_samples, origin), moved_rows(field.maturity, origin), field.young
    holders = [optimizer for optimizer in optimizers if isinstance(optimizer, NodeAdam)]
    for level, shapes in enumerate(field.pages.bank_shapes(new)):
        of_nodes = origin[new.level == level]
        of_nodes = torch.where(of_nodes < 0, -1, old.row[of_nodes])
        for kind, (count, _) in shapes.items():
            bank = getattr(field, kind)[level]
            rows = of_nodes
            if kind == "decoders" and field.config.decoder_sharing != "node":
                rows = torch.arange(count, device=origin.device)
                rows[rows >= len(bank)] = -1
            if len(rows) != len(bank) or not torch.equal(rows, torch.arange(len(bank), device=rows.device)):
                for optimizer in holders:
                    optimizer.move_rows(bank, rows)
                move_bank(bank, rows)
    field.set_octree(new)
    field.node_samples, field.maturity = samples, torch.where(origin < 0, 1.0, maturity)
    field.young = young
