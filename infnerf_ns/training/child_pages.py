"""What a new node starts from: its parent.

A residual child whose grid is zero and whose decoder is its parent's *is* its parent. An independent one is a complete
NeRF over an eighth of its parent's cube; its grid is fitted to its parent's features, which one and the same decoder
turns into the same field. That is as close as its grid allows, which is not enough (below); and a residual one whose
level shares a decoder has another decoder than its parent. Such a child takes over from its parent step by step
(:attr:`infnerf_ns.field.OctreeField.maturity`).

Own code: nothing fits one hash grid to another. The fit is linear, as features are linear in the entries of a grid; it
is solved by simultaneous iterations (SIRT: Gilbert 1972), each of which is one ``hash_encode`` forward and two
backward.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.field import OctreeField
from infnerf_ns.kernels import hash_encode

FIT_ROUNDS = 8
"""Iterations of the fit. Three times as many fit no better: 27.4 dB right after a subdivision on caliterra at half
size, where the parent had 28.4 and an empty grid 25.3. Nor does a fit of the decoder's outputs by Adam, with the
decoder or without, come near enough (27.7): vertices that share an entry of the child's table want different values. So
the child takes over step by step."""
_POINTS_PER_ENTRY = 0.5
"""Points of an iteration per entry of the largest hash level."""
_MOST_POINTS = 1 << 18
_PLACES = 4
"""Times as many places in a node, from which the points of all iterations are drawn."""
_ANYWHERE = 1e-3
"""Chance of an empty place against that of a dense one: features of empty places would spoil the entries that they
share with dense ones."""


@torch.no_grad()
def start_children(field: OctreeField, nodes: Int[Tensor, "B"]) -> None:
    """Fills the pages of new nodes, whose grids and proposals are zero, so that they show what their parents show.
    Where that is not exact, they are young: at first their parents answer.

    Args:
        field: with the new tree.
        nodes: the new ones; their parents are old.
    """
    for level in field.octree.level[nodes].unique().tolist():
        of_level = nodes[field.octree.level[nodes] == level]
        field.inherit_decoders(of_level)
        if field.config.children == "independent":
            for node in of_level:  # one at a time: the fit needs a few times a node's page
                _fit_grid(field, node, level)
    if field.config.children == "independent" or field.config.decoder_sharing == "level":
        field.maturity[nodes], field.young = 0.0, True


def _fit_grid(field: OctreeField, node: Int[Tensor, ""], level: int) -> None:
    """Fits a node's grid to its parent's features, above all where its parent is dense."""
    octree, bank = field.octree, field.grids[level].data
    row, parent = octree.row, octree.parent[node]
    page = torch.zeros_like(bank[:1], requires_grad=True)
    count = min(int(_POINTS_PER_ENTRY * field.layouts[level].sizes.max()), _MOST_POINTS)
    places, chance = _places(field, node, level, _PLACES * count)
    for done in range(FIT_ROUNDS):
        unit = places[torch.multinomial(chance, count, replacement=True)]
        # Of the samples that this node takes over: from where its own children would, to where its parent still does.
        footprints = octree.gsd(level - 1) * torch.exp2(-torch.rand(len(unit), device=unit.device))

        def features(pages: Tensor, of: Tensor, at: Tensor, level: int) -> Tensor:
            local = octree.local(unit, at.expand(len(unit)), level)  # noqa: B023
            return hash_encode(local, of.expand(len(unit)), pages, field.layouts[level], field.config.backend)  # noqa: B023

        target = features(field.grids[level - 1].detach(), row[parent], parent, level - 1)
        target = target * field.grid_fading(level - 1, footprints, unit)
        fading = field.grid_fading(level, footprints, unit)
        with torch.enable_grad():
            found = features(page, torch.zeros_like(node), node, level)
        (push,) = torch.autograd.grad(found, page, fading * (target - fading * found.detach()), retain_graph=True)
        (weight,) = torch.autograd.grad(found, page, fading.square())
        # Each iteration sees other points: shorter and shorter steps end near the mean of what they want.
        page.data += (1 + done) ** -0.7 * push / weight.clamp(min=1e-3)
    bank[row[node]] = page.data[0]


def _places(
    field: OctreeField, node: Int[Tensor, ""], level: int, count: int
) -> tuple[Float[Tensor, "P 3"], Float[Tensor, "P"]]:
    """Unit coordinates uniform in a node, and the chance of each by the opacity of a cell of its parent there."""
    octree = field.octree
    unit = (octree.coords[node] + torch.rand(count, 3, device=node.device)) / 2**level
    gsd = octree.gsd(level - 1)
    footprints = torch.full_like(unit[:, 0], gsd)
    density = field.density_at(octree.cube.to_world(unit), footprints, max_level=level - 1)
    return unit, _ANYWHERE - torch.expm1(-2 * gsd * density)
