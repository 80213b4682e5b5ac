"""Inputs of the kernels and their references, shared by the tests of the backends.

Everything is made on the CPU from fixed seeds and then moved to the device asked for, so that a backend on another
device gets the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from infnerf_ns.kernels import Groups, HashLayout, TreePaths, grouped_mlp, hash_encode, mlp_page_size
from infnerf_ns.octree import Octree, RootCube, build_octree

LAYOUTS = {
    "dense": HashLayout(2, 4, 8, 14, 2),
    "hashed": HashLayout(4, 8, 64, 9, 2),
    "one feature": HashLayout(3, 4, 32, 10, 1),
    "four features": HashLayout(3, 4, 32, 8, 4),
    "one level": HashLayout(1, 16, 16, 12, 2),
}

Device = str | torch.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels for GPUs are tested; on a CPU Triton interprets them."""


def assert_close(fast: Tensor, reference: Tensor, name: str, tolerance: float = 3e-5) -> None:
    """The largest difference, against the largest value of the reference."""
    assert (fast.cpu() - reference).abs().max() <= tolerance * reference.abs().max(), name


def wave(*shape: int, device: Device = "cpu") -> Tensor:
    """A gradient that differs from entry to entry."""
    return torch.sin(torch.arange(float(np.prod(shape)))).reshape(shape).to(device)


# -- hash_encode -------------------------------------------------------------------------------------------------------


def hash_bank(layout: HashLayout, nodes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pages."""
    return torch.randn(nodes, layout.page_size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def hash_samples(count: int, nodes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Local positions and rows."""
    generator = torch.Generator().manual_seed(2)
    positions = torch.rand(count, 3, generator=generator, dtype=dtype)
    return positions, torch.randint(nodes, (count,), generator=generator)


def hash_results(backend: str, layout: HashLayout, count: int, device: Device = "cpu") -> dict[str, Tensor]:
    """Features of samples in three nodes, and gradients."""
    bank = hash_bank(layout, 3).to(device).requires_grad_()
    positions, row = (each.to(device) for each in hash_samples(count, 3))
    positions.requires_grad_()
    out = hash_encode(positions, row, bank, layout, backend)
    out.backward(wave(*out.shape, device=device))
    return {"features": out.detach(), "bank gradient": bank.grad, "position gradient": positions.grad}


def flagged_blocks(gradient: Tensor, blocks: int) -> Tensor:
    """Which blocks of 16 floats [N, blocks] hold a gradient."""
    padded = torch.nn.functional.pad(gradient, (0, blocks * 16 - gradient.shape[1]))
    return padded.reshape(len(gradient), -1, 16).ne(0).any(-1)


# -- grouped_mlp -------------------------------------------------------------------------------------------------------


class MLPCase(NamedTuple):
    """Samples of groups of two octree levels, the first and the last of three; rows in random order."""

    inputs: Tensor
    groups: Groups
    pages: list[Tensor]
    offset: int
    widths: tuple[int, ...]


def mlp_case(sizes: list[int], widths: tuple[int, ...]) -> MLPCase:
    """Groups of these sizes; their inputs are zero from a random column on."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(sum(sizes), widths[0], generator=generator)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    used = torch.randint(1, widths[0] + 1, (len(sizes),), generator=generator)
    for group in range(len(sizes)):
        inputs[starts[group] : starts[group + 1], used[group] :] = 0
    of_first = (len(sizes) + 1) // 2
    level = torch.tensor([0] * of_first + [2] * (len(sizes) - of_first))
    row = torch.cat([torch.randperm(of_first + 1, generator=generator)[:of_first], torch.arange(len(sizes) - of_first)])
    pages = [
        torch.randn(nodes, mlp_page_size(widths) + 9, generator=generator) / widths[0] ** 0.5
        for nodes in (of_first + 1, 2, len(sizes) - of_first + 1)
    ]
    return MLPCase(inputs, Groups(starts, level, row, used), pages, 5, widths)


def mlp_results(backend: str, case: MLPCase, device: Device = "cpu") -> dict[str, Tensor]:
    """Outputs and gradients; no gradient is owed beyond ``used_inputs``, so it is set to zero there."""
    x = case.inputs.to(device, copy=True).requires_grad_()
    banks = [page.to(device, copy=True).requires_grad_() for page in case.pages]
    groups = Groups(*(part.to(device) for part in case.groups))
    out = grouped_mlp(x, groups, banks, case.offset, case.widths, backend)
    out.backward(wave(*out.shape, device=device))
    results = {"outputs": out.detach(), "input gradient": x.grad.clone()}
    for level, bank in enumerate(banks):
        results[f"gradient of level {level}"] = torch.zeros_like(bank) if bank.grad is None else bank.grad
    if backend == "torch":
        for start, stop, used in zip(case.groups.starts[:-1], case.groups.starts[1:], case.groups.used_inputs):
            results["input gradient"][start:stop, used:] = 0
    return results


# -- paths down the tree -----------------------------------------------------------------------------------------------

PATH_DEPTH = 3
MIXED = [(4, 4, 32, 9), (1, 32, 32, 9), (2, 8, 32, 12), (1, 6, 6, 9)]
"""Hash levels, resolutions and table of each octree level: dense and hashed ones."""


def path_layouts(features: int) -> list[HashLayout]:
    """Layouts of the octree levels."""
    return [HashLayout(*sizes, features) for sizes in MIXED]


def path_tree() -> Octree:
    """Every level has nodes, and not all that it could have."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, generator=generator) ** 2 * 2 - 1
    cube = RootCube(torch.zeros(3), 2.0, torch.eye(3))
    tree = build_octree(points, torch.zeros(300), cube, max_level=PATH_DEPTH, min_points=6, node_resolution=32)
    assert tree.depth == PATH_DEPTH and min(tree.nodes_per_level) >= 1
    return tree


def path_samples(tree: Octree, count: int) -> tuple[TreePaths, list[int], Tensor]:
    """Samples of all levels in and around the cube, sorted by level; first sample per level; footprints."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(count, 3, generator=generator) * 1.6 - 0.3
    unit[: count // 2] = unit[: count // 2].abs() ** 2
    footprints = tree.gsd(0) * 2 ** (2 - (PATH_DEPTH + 3) * torch.rand(count, generator=generator))
    path = tree.route(unit, footprints)
    order = torch.argsort(path.max(dim=1).values)
    unit, path, footprints = unit[order].contiguous(), path[order].contiguous(), footprints[order]
    level = tree.level[path.max(dim=1).values]
    assert set(level.tolist()) == set(range(PATH_DEPTH + 1))
    starts = [int((level < each).sum()) for each in range(PATH_DEPTH + 1)]
    return TreePaths(unit, path, tree.coords, tree.first_of_level.tolist()), starts, footprints


def moved(paths: TreePaths, device: Device) -> TreePaths:
    """The same on another device."""
    return TreePaths(*(part.to(device) for part in paths[:3]), paths.first)


def path_banks(tree: Octree, layouts: list[HashLayout], device: Device = "cpu") -> list[Parameter]:
    """Random pages."""
    generator = torch.Generator().manual_seed(2)
    sizes = zip(tree.nodes_per_level, layouts)
    pages = [torch.randn(nodes, layout.page_size, generator=generator) for nodes, layout in sizes]
    return [Parameter(page.to(device)) for page in pages]


def path_cells(layouts: list[HashLayout]) -> list[np.ndarray]:
    """What footprints are compared with."""
    return [0.02 / 2**level * np.arange(1, 1 + x.num_levels, dtype=np.float32) for level, x in enumerate(layouts)]


def _level(tree: Octree, paths: TreePaths, level: int, bank: Tensor, layout: HashLayout) -> tuple[Tensor, Tensor]:
    """The samples that have a node at this level, and their features there."""
    at = torch.nonzero(paths.path[:, level] >= 0)[:, 0]
    node = paths.path[at, level]
    local = tree.local(paths.unit[at], node, level)
    return at, hash_encode(local, node - paths.first[level], bank, layout, "torch")


def _weights(
    paths: TreePaths, footprints: Tensor, layouts: list[HashLayout], level: int, at: Tensor, along: bool
) -> Float[Tensor, "S L"]:
    """Of the hash levels at the samples ``at`` (Zip-NeRF, eq. 9); footprints are lengths along the rays, or across."""
    radii = footprints[at]
    if level == 0:
        norm = (2 * paths.unit[at] - 1).abs().amax(dim=1).clamp(min=1)
        radii = radii / norm**2 if along else radii * (2 - 1 / norm) / norm
    return torch.erf(torch.from_numpy(path_cells(layouts)[level]) / radii[:, None])


def reference_features(
    tree: Octree,
    paths: TreePaths,
    footprints: Tensor | None,
    banks: list[Tensor],
    layouts: list[HashLayout],
    width: int,
) -> Tensor:
    """``path_features`` written out with torch operations."""
    columns = []
    for level, (bank, layout) in enumerate(zip(banks, layouts)):
        at, features = _level(tree, paths, level, bank, layout)
        if footprints is not None:
            weights = _weights(paths, footprints, layouts, level, at, along=False)
            features = features * weights.repeat_interleave(layout.features, dim=1)
        columns.append(torch.zeros(len(paths.unit), layout.num_outputs).index_add(0, at, features))
    features = torch.cat(columns, dim=1)
    return torch.nn.functional.pad(features, (0, width - features.shape[1]))


def reference_sum(
    tree: Octree, paths: TreePaths, footprints: Tensor | None, banks: list[Tensor], layouts: list[HashLayout]
) -> Tensor:
    """``path_sum`` written out with torch operations."""
    total = torch.zeros(len(paths.unit))
    for level, (bank, layout) in enumerate(zip(banks, layouts)):
        at, features = _level(tree, paths, level, bank, layout)
        if footprints is not None:
            features = features * _weights(paths, footprints, layouts, level, at, along=True)
        total = total.index_add(0, at, features.sum(dim=1))
    return total
