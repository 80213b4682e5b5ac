"""The kernels that follow the samples' paths down the tree, against the same written out with torch operations."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from infnerf_ns.kernels import HashLayout, TreePaths, enable_bank_gradient, hash_encode, path_features, path_sum
from infnerf_ns.octree import Octree, RootCube, build_octree

DEPTH = 3
MIXED = [(4, 4, 32, 9), (1, 32, 32, 9), (2, 8, 32, 12), (1, 6, 6, 9)]
"""Hash levels, resolutions and table of each octree level: dense and hashed ones."""

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


def _layouts(features: int) -> list[HashLayout]:
    return [HashLayout(*sizes, features) for sizes in MIXED]


def _tree() -> Octree:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, generator=generator) ** 2 * 2 - 1
    cube = RootCube(torch.zeros(3), 2.0, torch.eye(3))
    tree = build_octree(points, torch.zeros(300), cube, max_level=DEPTH, min_points=6, node_resolution=32)
    assert tree.depth == DEPTH and min(tree.nodes_per_level) >= 1
    return tree


def _samples(tree: Octree, count: int) -> tuple[TreePaths, list[int], Tensor]:
    """Samples of all levels in and around the cube, sorted by level; first sample per level; footprints."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(count, 3, generator=generator) * 1.6 - 0.3
    unit[: count // 2] = unit[: count // 2].abs() ** 2
    footprints = tree.gsd(0) * 2 ** (2 - (DEPTH + 3) * torch.rand(count, generator=generator))
    path = tree.route(unit, footprints)
    order = torch.argsort(path.max(dim=1).values)
    unit, path, footprints = unit[order].contiguous(), path[order].contiguous(), footprints[order]
    level = tree.level[path.max(dim=1).values]
    assert set(level.tolist()) == set(range(DEPTH + 1))
    starts = [int((level < each).sum()) for each in range(DEPTH + 1)]
    return TreePaths(unit, path, tree.coords, tree.first_of_level.tolist()), starts, footprints


def _banks(tree: Octree, layouts: list[HashLayout]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    sizes = zip(tree.nodes_per_level, layouts)
    return [torch.nn.Parameter(torch.randn(nodes, layout.page_size, generator=generator)) for nodes, layout in sizes]


def _cells(layouts: list[HashLayout]) -> list[np.ndarray]:
    return [0.02 / 2**level * np.arange(1, 1 + x.num_levels, dtype=np.float32) for level, x in enumerate(layouts)]


def _level(tree: Octree, paths: TreePaths, level: int, bank: Tensor, layout: HashLayout) -> tuple[Tensor, Tensor]:
    """Reference: the samples that have a node at this level, and their features there."""
    at = torch.nonzero(paths.path[:, level] >= 0)[:, 0]
    node = paths.path[at, level]
    local = tree.local(paths.unit[at], node, level)
    return at, hash_encode(local, node - paths.first[level], bank, layout, "torch")


def _reference_features(
    tree: Octree,
    paths: TreePaths,
    footprints: Tensor | None,
    banks: list[Tensor],
    layouts: list[HashLayout],
    width: int,
) -> Tensor:
    columns = []
    for level, (bank, layout) in enumerate(zip(banks, layouts)):
        at, features = _level(tree, paths, level, bank, layout)
        if footprints is not None:
            radii = footprints[at]
            if level == 0:
                norm = (2 * paths.unit[at] - 1).abs().amax(dim=1).clamp(min=1)
                radii = radii * (2 - 1 / norm) / norm
            weight = torch.erf(torch.from_numpy(_cells(layouts)[level]) / radii[:, None])
            features = features * weight.repeat_interleave(layout.features, dim=1)
        columns.append(torch.zeros(len(paths.unit), layout.num_outputs).index_add(0, at, features))
    features = torch.cat(columns, dim=1)
    return torch.nn.functional.pad(features, (0, width - features.shape[1]))


def _assert_close(fast: Tensor, reference: Tensor, name: str) -> None:
    assert (fast - reference).abs().max() <= 3e-5 * reference.abs().max(), name


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("features", [1, 2, 4])
@every_threads
def test_path_features_are_those_of_all_nodes_on_the_path(threads: int, features: int, weighted: bool) -> None:
    numba.set_num_threads(threads)
    tree, layouts = _tree(), _layouts(features)
    paths, starts, footprints = _samples(tree, 3000)
    footprints = footprints if weighted else None
    width = sum(layout.num_outputs for layout in layouts) + 3
    upstream = torch.sin(torch.arange(3000 * width).reshape(3000, width).float())
    upstream[::7] = 0  # samples without a gradient
    fast_banks, banks = _banks(tree, layouts), _banks(tree, layouts)
    fast = path_features(paths, starts, footprints, _cells(layouts), fast_banks, layouts, width)
    reference = _reference_features(tree, paths, footprints, banks, layouts, width)
    _assert_close(fast.detach(), reference.detach(), "features")
    fast.backward(upstream)
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        _assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


@every_threads
def test_path_sum_is_the_sum_over_all_nodes_on_the_path(threads: int) -> None:
    numba.set_num_threads(threads)
    tree, layouts = _tree(), _layouts(1)
    paths, _, _ = _samples(tree, 3000)
    fast_banks, banks = _banks(tree, layouts), _banks(tree, layouts)
    fast = path_sum(paths, fast_banks, layouts)
    reference = torch.zeros(3000)
    for level, (bank, layout) in enumerate(zip(banks, layouts)):
        at, features = _level(tree, paths, level, bank, layout)
        reference = reference.index_add(0, at, features.sum(dim=1))
    _assert_close(fast.detach(), reference.detach(), "sums")
    upstream = torch.sin(torch.arange(3000.0))
    upstream[::5] = 0
    fast.backward(upstream)
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        _assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


@pytest.mark.parametrize("kernel", ["features", "sum"])
def test_in_place_gradients_are_autograds_and_flag_what_was_touched(kernel: str) -> None:
    tree, layouts = _tree(), _layouts(1)
    paths, starts, footprints = _samples(tree, 100)

    def backward(banks: list[torch.nn.Parameter]) -> None:
        if kernel == "sum":
            path_sum(paths, banks, layouts).square().sum().backward()
        else:
            width = sum(layout.num_outputs for layout in layouts)
            path_features(paths, starts, footprints, _cells(layouts), banks, layouts, width).square().sum().backward()

    plain, held = _banks(tree, layouts), _banks(tree, layouts)
    for bank in held:
        enable_bank_gradient(bank)
    for banks in (plain, held):
        for _ in range(2):  # gradients accumulate over backward passes
            backward(banks)
    for level, (bank, other) in enumerate(zip(held, plain)):
        torch.testing.assert_close(bank.grad, other.grad, rtol=1e-5, atol=1e-6)
        flags, size = bank.infnerf_gradient, bank.grad.shape[1]
        visited = (paths.path[:, level][paths.path[:, level] >= 0] - paths.first[level]).unique()
        assert torch.nonzero(flags.rows)[:, 0].tolist() == visited.tolist()
        blocks = torch.nn.functional.pad(bank.grad, (0, -size % 16)).reshape(len(bank), -1, 16).ne(0).any(-1)
        assert bool((flags.touched[:, : blocks.shape[1]].bool() >= blocks).all())
        assert int(flags.touched.sum()) <= 8 * 100 * layouts[level].num_levels


def test_banks_that_ask_for_no_gradient_get_none() -> None:
    tree, layouts = _tree(), _layouts(1)
    paths, _, _ = _samples(tree, 100)
    banks = _banks(tree, layouts)
    banks[1].requires_grad_(False)
    path_sum(paths, banks, layouts).sum().backward()
    assert [bank.grad is None for bank in banks] == [False, True, False, False]
