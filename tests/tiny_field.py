"""A field of a few kilobytes over a deep and pruned tree, for the tests of the field and of the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infnerf_ns.field import FieldConfig, OctreeField
from infnerf_ns.octree import Octree, RootCube, build_octree

TINY = {
    **{"hash_levels": 3, "base_resolution": 4, "log2_table_size": 9, "features_per_level": 2, "child_hash_levels": 2},
    **{"hidden_width": 8, "color_hidden_width": 8, "color_hidden_layers": 1, "geo_features": 3, "appearance_dim": 2},
    **{"proposal_resolution": 8, "proposal_log2_table_size": 9},
}
COS, SIN = math.cos(math.radians(30)), math.sin(math.radians(30))
TURN = torch.tensor([[COS, SIN, 0.0], [-SIN, COS, 0.0], [0.0, 0.0, 1.0]])
MAX_LEVEL = 3


def tiny_cube(side: float = 3.0) -> RootCube:
    """A cube that is turned and off the origin."""
    return RootCube(torch.tensor([1.0, -2.0, 0.5]), side, TURN)


def tiny_tree(max_level: int = MAX_LEVEL, side: float = 3.0) -> Octree:
    """Points crowd in one corner, so the tree is deep there and pruned elsewhere."""
    generator = torch.Generator().manual_seed(0)
    cube = tiny_cube(side)
    points = cube.to_world(torch.rand(600, 3, generator=generator) ** 2)
    footprints = 0.03 * side * torch.rand(600, generator=generator) ** 3
    return build_octree(points, footprints, cube, max_level=max_level, min_points=6, node_resolution=16)


def tiny_field(
    children: str = "residual", sharing: str = "node", tree: Octree | None = None, **sizes: int | str
) -> OctreeField:
    """A field whose nodes all take part and all differ."""
    tree = tree or tiny_tree()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        field = OctreeField(tree, FieldConfig(children, sharing, **{**TINY, **sizes}), MAX_LEVEL, num_photos=2)
        for bank in (*field.grids, *field.decoders, *field.proposals):
            bank.data.add_(0.3 * torch.randn(bank.shape))
    field.active_level.fill_(tree.depth)
    return field


def tiny_samples(tree: Octree, count: int = 300) -> tuple[Tensor, Tensor]:
    """World positions, some of them outside of the root cube, and footprints that ask for every level."""
    generator = torch.Generator().manual_seed(2)
    unit = 1.1 * torch.rand(count, 3, generator=generator) ** 2.3 - 0.002
    device = tree.level.device
    footprints = tree.gsd(0) * 2 ** (6 * torch.rand(count, generator=generator) - 5.5)
    return tree.cube.to_world(unit).to(device), footprints.to(device)


def values_and_gradients(field: OctreeField, of_positions: bool, count: int = 300) -> dict[str, Tensor | None]:
    """All that a field computes, and the gradients of all that it has.

    Without gradients of the positions, the fast backends follow the paths as they do in training.
    """
    positions, footprints = tiny_samples(field.octree, count)
    positions.requires_grad_(of_positions)
    routed = field.route(positions, footprints)
    density, geo = field.density(routed)
    code = torch.sin(torch.arange(len(positions) * 16.0, device=positions.device)).reshape(-1, 16)
    color = field.color(routed.node, torch.cat([geo, code, code[:, :2]], dim=1))
    proposal = field.proposal_density(positions, footprints)
    wave = torch.cos(torch.arange(float(len(positions)), device=positions.device))
    parameters = {**({"positions": positions} if of_positions else {}), **dict(field.named_parameters())}
    loss = (wave * (density + proposal + color @ torch.tensor([1.0, -2.0, 3.0], device=color.device))).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    values = {"density": density, "geometry": geo, "color": color, "proposal": proposal}
    return {**values, **{f"gradient of {name}": grad for name, grad in zip(parameters, gradients)}}


def compare(reference: dict[str, Tensor | None], fast: dict[str, Tensor | None], tolerance: float = 5e-5) -> int:
    """Asserts that two answers of :func:`values_and_gradients` are the same, and says how many tensors they hold."""
    compared = 0
    for name, expected in reference.items():
        if expected is None or expected.numel() == 0:  # a bank that this configuration does not use
            assert fast[name] is None or not bool(fast[name].any()), name
            continue
        assert bool(expected.abs().max() > 0), name
        assert (expected - fast[name].cpu()).abs().max() < tolerance * expected.abs().max(), name
        compared += 1
    return compared
