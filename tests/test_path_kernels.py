"""The kernels that follow the samples' paths down the tree, against the same written out with torch operations."""

from __future__ import annotations

import numba
import pytest
import torch
from kernel_cases import (
    assert_close,
    flagged_blocks,
    path_banks,
    path_cells,
    path_layouts,
    path_samples,
    path_tree,
    reference_features,
    reference_sum,
    wave,
)

from infnerf_ns.kernels import enable_bank_gradient, path_features, path_sum

every_threads = pytest.mark.parametrize("threads", [1, 2, 4])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("features", [1, 2, 4])
@every_threads
def test_path_features_are_those_of_all_nodes_on_the_path(threads: int, features: int, weighted: bool) -> None:
    numba.set_num_threads(threads)
    tree, layouts = path_tree(), path_layouts(features)
    paths, starts, footprints = path_samples(tree, 3000)
    footprints = footprints if weighted else None
    width = sum(layout.num_outputs for layout in layouts) + 3
    upstream = wave(3000, width)
    upstream[::7] = 0  # samples without a gradient
    fast_banks, banks = path_banks(tree, layouts), path_banks(tree, layouts)
    fast = path_features(paths, starts, footprints, path_cells(layouts), fast_banks, layouts, width)
    reference = reference_features(tree, paths, footprints, banks, layouts, width)
    assert_close(fast.detach(), reference.detach(), "features")
    fast.backward(upstream)
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


def test_values_are_the_same_where_no_backward_pass_follows() -> None:
    """Then the weights by the footprints are not kept: in evaluation, and where all banks are frozen."""
    tree, layouts, sum_layouts = path_tree(), path_layouts(2), path_layouts(1)
    paths, starts, footprints = path_samples(tree, 300)
    width = sum(layout.num_outputs for layout in layouts)
    banks, sum_banks = path_banks(tree, layouts), path_banks(tree, sum_layouts)

    def values(banks: list, sum_banks: list) -> tuple:
        return (
            path_features(paths, starts, footprints, path_cells(layouts), banks, layouts, width),
            path_sum(paths, footprints, path_cells(sum_layouts), sum_banks, sum_layouts),
        )

    trained = values(banks, sum_banks)
    frozen = values([bank.detach() for bank in banks], [bank.detach() for bank in sum_banks])
    with torch.no_grad():
        evaluated = values(banks, sum_banks)
    for kept, *others in zip(trained, frozen, evaluated):
        assert kept.requires_grad and all(torch.equal(kept, other) for other in others)


@pytest.mark.parametrize("weighted", [True, False])
@every_threads
def test_path_sum_is_the_sum_over_all_nodes_on_the_path(threads: int, weighted: bool) -> None:
    numba.set_num_threads(threads)
    tree, layouts = path_tree(), path_layouts(1)
    paths, _, footprints = path_samples(tree, 3000)
    footprints = footprints if weighted else None
    fast_banks, banks = path_banks(tree, layouts), path_banks(tree, layouts)
    fast = path_sum(paths, footprints, path_cells(layouts), fast_banks, layouts)
    reference = reference_sum(tree, paths, footprints, banks, layouts)
    assert_close(fast.detach(), reference.detach(), "sums")
    upstream = wave(3000)
    upstream[::5] = 0
    fast.backward(upstream)
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


@pytest.mark.parametrize("kernel", ["features", "sum"])
def test_in_place_gradients_are_autograds_and_flag_what_was_touched(kernel: str) -> None:
    tree, layouts = path_tree(), path_layouts(1)
    paths, starts, footprints = path_samples(tree, 100)

    def backward(banks: list[torch.nn.Parameter]) -> None:
        if kernel == "sum":
            path_sum(paths, footprints, path_cells(layouts), banks, layouts).square().sum().backward()
        else:
            width = sum(layout.num_outputs for layout in layouts)
            cells = path_cells(layouts)
            path_features(paths, starts, footprints, cells, banks, layouts, width).square().sum().backward()

    plain, held = path_banks(tree, layouts), path_banks(tree, layouts)
    for bank in held:
        enable_bank_gradient(bank)
    for banks in (plain, held):
        for _ in range(2):  # gradients accumulate over backward passes
            backward(banks)
    for level, (bank, other) in enumerate(zip(held, plain)):
        torch.testing.assert_close(bank.grad, other.grad, rtol=1e-5, atol=1e-6)
        flags = bank.infnerf_gradient
        visited = (paths.path[:, level][paths.path[:, level] >= 0] - paths.first[level]).unique()
        assert torch.nonzero(flags.rows)[:, 0].tolist() == visited.tolist()
        assert torch.equal(flags.touched.bool(), flagged_blocks(bank.grad, flags.touched.shape[1]))


def test_banks_that_ask_for_no_gradient_get_none() -> None:
    tree, layouts = path_tree(), path_layouts(1)
    paths, _, footprints = path_samples(tree, 100)
    fast_banks, banks = path_banks(tree, layouts), path_banks(tree, layouts)
    for some in (fast_banks, banks):
        some[1].requires_grad_(False)
    path_sum(paths, footprints, path_cells(layouts), fast_banks, layouts).sum().backward()
    reference_sum(tree, paths, footprints, banks, layouts).sum().backward()
    assert [bank.grad is None for bank in fast_banks] == [False, True, False, False]
    for level in (0, 2, 3):
        assert_close(fast_banks[level].grad, banks[level].grad, f"gradient of level {level}")
