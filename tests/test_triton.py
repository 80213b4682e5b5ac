"""The Triton backend against the torch reference and the numba backend, values and gradients.

On a machine with a GPU the kernels run there; elsewhere in Triton's interpreter, on few samples, as it is slow.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    LAYOUTS,
    assert_close,
    flagged_blocks,
    hash_bank,
    hash_results,
    hash_samples,
    moved,
    path_banks,
    path_cells,
    path_layouts,
    path_samples,
    path_tree,
    reference_features,
    reference_sum,
    wave,
)
from torch import Tensor
from torch.nn import Parameter

pytest.importorskip("triton")

from infnerf_ns.kernels import (
    Groups,
    HashLayout,
    TreePaths,
    enable_bank_gradient,
    grouped_mlp,
    hash_encode,
    path_features,
    path_sum,
    triton_ops,
)

# -- hash_encode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_hash_encode_is_the_reference(layout: HashLayout) -> None:
    reference, fast = hash_results("torch", layout, 150), hash_results("triton", layout, 150, DEVICE)
    for name, expected in reference.items():
        assert_close(fast[name], expected, name, 2e-5)


def test_hash_encode_flags_what_it_adds_in_place() -> None:
    layout = LAYOUTS["hashed"]
    plain, held = (Parameter(hash_bank(layout, 4).to(DEVICE)) for _ in range(2))
    enable_bank_gradient(held)
    positions, row = (each.to(DEVICE) for each in hash_samples(6, 2))
    for bank in (plain, held):
        for _ in range(2):  # gradients accumulate over backward passes
            hash_encode(positions, row, bank, layout, "triton").square().sum().backward()
    torch.testing.assert_close(plain.grad, held.grad, rtol=1e-5, atol=1e-5)
    flags = held.infnerf_gradient
    assert held.grad is flags.grad and flags.rows.tolist() == [1, 1, 0, 0]
    assert torch.equal(flags.touched.bool(), flagged_blocks(held.grad, flags.touched.shape[1]))


def test_views_and_a_gradient_of_one_number_are_taken_as_they_come() -> None:
    """Nothing here is contiguous: every third position, a slice of the rows, pages within wider ones."""
    layout = LAYOUTS["dense"]
    positions, row = hash_samples(40, 3)
    wide = torch.nn.functional.pad(hash_bank(layout, 5), (3, 2))
    results = []
    for backend, device in (("torch", "cpu"), ("triton", DEVICE)):
        bank = wide.to(device, copy=True).requires_grad_()
        moving = positions.T.contiguous().to(device).requires_grad_()
        features = hash_encode(moving.T, row.to(device), bank[1:4, 3:-2], layout, backend)
        features.sum().backward()  # the gradient is one number, expanded
        results.append((features.detach(), bank.grad, moving.grad))
    for name, reference, fast in zip(("features", "bank gradient", "position gradient"), *results):
        assert_close(fast, reference, name)


def test_a_gradient_that_is_not_a_number_gets_through() -> None:
    layout = LAYOUTS["dense"]
    bank = Parameter(hash_bank(layout, 1).to(DEVICE))
    enable_bank_gradient(bank)
    upstream = torch.zeros(2, layout.num_outputs, device=DEVICE)
    upstream[1, 0] = float("nan")
    positions = torch.full((2, 3), 0.4, device=DEVICE)
    hash_encode(positions, torch.zeros(2, dtype=torch.long, device=DEVICE), bank, layout, "triton").backward(upstream)
    flags = bank.infnerf_gradient
    assert int(bank.grad.isnan().sum()) == 8 and flags.rows.tolist() == [1]
    assert bool((flags.touched.bool() >= flagged_blocks(bank.grad, flags.touched.shape[1])).all())


# -- paths down the tree -----------------------------------------------------------------------------------------------


def _features(
    paths: TreePaths, starts: list[int], footprints: Tensor | None, banks: list, layouts: list, width: int
) -> Tensor:
    radii = None if footprints is None else footprints.to(DEVICE)
    return path_features(
        moved(paths, DEVICE), starts, radii, path_cells(layouts), banks, layouts, width, backend="triton"
    )


@pytest.mark.parametrize("features, weighted", [(1, True), (2, True), (2, False), (4, True)])
def test_path_features_are_those_of_all_nodes_on_the_path(features: int, weighted: bool) -> None:
    tree, layouts, count = path_tree(), path_layouts(features), 150
    paths, starts, footprints = path_samples(tree, count)
    footprints = footprints if weighted else None
    width = sum(layout.num_outputs for layout in layouts) + 3
    upstream = wave(count, width)
    upstream[::7] = 0  # samples without a gradient
    fast_banks, banks = path_banks(tree, layouts, DEVICE), path_banks(tree, layouts)
    fast = _features(paths, starts, footprints, fast_banks, layouts, width)
    reference = reference_features(tree, paths, footprints, banks, layouts, width)
    assert_close(fast.detach(), reference.detach(), "features")
    fast.backward(upstream.to(DEVICE))
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


def _sum(paths: TreePaths, footprints: Tensor | None, banks: list, layouts: list) -> Tensor:
    radii = None if footprints is None else footprints.to(DEVICE)
    return path_sum(moved(paths, DEVICE), radii, path_cells(layouts), banks, layouts, "triton")


@pytest.mark.parametrize("weighted", [True, False])
def test_path_sum_is_the_sum_over_all_nodes_on_the_path(weighted: bool) -> None:
    tree, layouts, count = path_tree(), path_layouts(1), 200
    paths, _, footprints = path_samples(tree, count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    paths = paths._replace(unit=paths.unit[shuffled], path=paths.path[shuffled])
    footprints = footprints[shuffled] if weighted else None
    fast_banks, banks = path_banks(tree, layouts, DEVICE), path_banks(tree, layouts)
    fast = _sum(paths, footprints, fast_banks, layouts)
    reference = reference_sum(tree, paths, footprints, banks, layouts)
    assert_close(fast.detach(), reference.detach(), "sums")
    upstream = wave(count)
    upstream[::5] = 0
    fast.backward(upstream.to(DEVICE))
    reference.backward(upstream)
    for level, (fast_bank, bank) in enumerate(zip(fast_banks, banks)):
        assert_close(fast_bank.grad, bank.grad, f"gradient of level {level}")


@pytest.mark.parametrize("kernel", ["features", "sum"])
def test_a_cut_of_the_tree_reads_its_levels_only(kernel: str) -> None:
    """Paths have no column for the levels below the cut; their banks are given all the same to ``path_features``."""
    tree, layouts = path_tree(), path_layouts(1)
    paths, _, footprints = path_samples(tree, 60)
    full, cut = paths, paths._replace(path=paths.path[:, :2])  # a view with the strides of the whole path
    starts = [0, int((paths.path[:, 1] < 0).sum()), 60, 60]
    for column in (2, 3):
        full.path[:, column] = -1
    banks, fast_banks = path_banks(tree, layouts), path_banks(tree, layouts, DEVICE)
    if kernel == "sum":
        fast = _sum(cut, footprints, fast_banks[:2], layouts[:2])
        reference = reference_sum(tree, full, footprints, banks, layouts)
    else:
        width = sum(layout.num_outputs for layout in layouts)
        fast = _features(cut, starts, footprints, fast_banks, layouts, width)
        reference = reference_features(tree, full, footprints, banks, layouts, width)
    assert_close(fast.detach(), reference.detach(), kernel)
    fast.sum().backward()
    reference.sum().backward()
    for level in range(2):
        assert_close(fast_banks[level].grad, banks[level].grad, f"gradient of level {level}")
    assert fast_banks[2].grad is None and fast_banks[3].grad is None


@pytest.mark.parametrize("kernel", ["features", "sum"])
def test_paths_flag_what_they_add_in_place(kernel: str) -> None:
    tree, layouts = path_tree(), path_layouts(1)
    paths, starts, footprints = path_samples(tree, 60)

    def backward(banks: list[Parameter]) -> None:
        if kernel == "sum":
            _sum(paths, footprints, banks, layouts).square().sum().backward()
        else:
            width = sum(layout.num_outputs for layout in layouts)
            _features(paths, starts, footprints, banks, layouts, width).square().sum().backward()

    plain, held = path_banks(tree, layouts, DEVICE), path_banks(tree, layouts, DEVICE)
    held[3].requires_grad_(False)
    for bank in held:
        enable_bank_gradient(bank)
    backward(plain)
    backward(held)
    for level, (bank, other) in enumerate(zip(held[:3], plain)):
        torch.testing.assert_close(bank.grad, other.grad, rtol=1e-5, atol=1e-6)
        flags = bank.infnerf_gradient
        visited = (paths.path[:, level][paths.path[:, level] >= 0] - paths.first[level]).unique()
        assert torch.nonzero(flags.rows)[:, 0].tolist() == visited.tolist()
        assert bool((flags.touched.bool() >= flagged_blocks(bank.grad, flags.touched.shape[1])).all())
        assert int(flags.touched.sum()) <= 8 * 60 * layouts[level].num_levels
    assert held[3].grad is None


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the sample that is not a number
@pytest.mark.parametrize("with_footprints", [True, False])
@pytest.mark.parametrize("cut", [0, 1, None])
def test_route_is_the_reference(cut: int | None, with_footprints: bool) -> None:
    tree = path_tree()
    generator = torch.Generator().manual_seed(5)
    unit = torch.rand(300, 3, generator=generator) * 1.4 - 0.2
    unit[150:] = torch.rand(150, 3, generator=generator) ** 2  # where the tree is deep
    unit[:8] = torch.tensor([0.0, 1.0, 0.5])[torch.randint(3, (8, 3), generator=generator)]  # on faces of cells
    unit[8] = float("nan")
    footprints = tree.gsd(0) * 2 ** (2 - 9 * torch.rand(300, generator=generator))
    footprints[:3] = tree.gsd(1)  # exactly at a limit
    footprints = footprints if with_footprints else None
    expected = tree.route(unit, footprints, cut, "torch")
    assert cut == 0 or bool((expected[:, -1] >= 0).any())
    moved_radii = None if footprints is None else footprints.to(DEVICE)
    assert torch.equal(tree.to(DEVICE).route(unit.to(DEVICE), moved_radii, cut, "triton").cpu(), expected)


def test_route_fills_a_path_that_is_a_view() -> None:
    tree = path_tree().to(DEVICE)
    unit = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gsd = [tree.gsd(level) for level in range(4)]
    whole = torch.full((4, 20), -7, device=DEVICE)
    path = triton_ops.route(unit, None, tree.children, gsd, whole.T)
    assert path.data_ptr() == whole.data_ptr() and torch.equal(path, tree.route(unit, None, None, "torch"))


def test_no_samples_are_no_work() -> None:
    tree, layouts = path_tree(), path_layouts(1)
    paths, _, footprints = path_samples(tree, 60)
    none = paths._replace(unit=paths.unit[:0], path=paths.path[:0])
    banks = path_banks(tree, layouts, DEVICE)
    assert _features(none, [0] * 4, footprints[:0], banks, layouts, 8).shape == (0, 8)
    total = _sum(none, footprints[:0], banks, layouts)
    layout = LAYOUTS["dense"]
    positions = torch.empty(0, 3, device=DEVICE, requires_grad=True)
    rows = torch.empty(0, dtype=torch.long, device=DEVICE)
    features = hash_encode(positions, rows, hash_bank(layout, 1).to(DEVICE), layout, "triton")
    empty = Groups(*(part.to(DEVICE) for part in (torch.zeros(1).long(), *torch.zeros(3, 0).long())))
    pages = [torch.rand(2, 60, device=DEVICE)]
    out = grouped_mlp(features[:, :4], empty, pages, 0, (4, 8, 3), "triton")
    assert total.shape == (0,) and features.shape == (0, layout.num_outputs) and out.shape == (0, 3)
    (total.sum() + out.sum()).backward()
    assert positions.grad.shape == (0, 3) and not bool(banks[0].grad.any())
    assert tree.to(DEVICE).route(none.unit.to(DEVICE), None, None, "triton").shape == (0, 4)
