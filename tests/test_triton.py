"""The Triton backend against the torch reference and the numba backend, values and gradients.

On a machine with a GPU the kernels run there; elsewhere in Triton's interpreter, on few samples, as it is slow.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    LAYOUTS,
    assert_close,
    flagged_blocks,
    hash_bank,
    hash_results,
    hash_samples,
    mlp_case,
    mlp_results,
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
from node_adam_cases import MOMENTS, adam_bank, adam_gradients, dense_step, give
from tiny_field import compare, tiny_field, tiny_samples, values_and_gradients
from torch import Tensor
from torch.nn import Parameter

pytest.importorskip("triton")

from infnerf_ns.field import OctreeField, in_place_gradients
from infnerf_ns.kernels import (
    Groups,
    HashLayout,
    TreePaths,
    bank_gradient,
    enable_bank_gradient,
    grouped_mlp,
    hash_encode,
    path_features,
    path_sum,
    triton_ops,
)
from infnerf_ns.training import optimizer as optimizer_module
from infnerf_ns.training.optimizer import NodeAdam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


# -- grouped_mlp -------------------------------------------------------------------------------------------------------

WIDTHS = [(12, 16, 3), (7, 3), (20, 16, 16, 5), (39, 64, 64, 3), (6, 8, 7, 9), (18, 5, 17, 6, 9, 2)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("sizes", [[5], [40, 0, 3, 100, 1], [64, 32]])
def test_grouped_mlp_is_the_reference(sizes: list[int], widths: tuple[int, ...]) -> None:
    case = mlp_case(sizes, widths)
    reference, fast = mlp_results("torch", case), mlp_results("triton", case, DEVICE)
    for name, expected in reference.items():
        assert_close(fast[name], expected, name)


@pytest.mark.parametrize("precision, tolerance", [("tf32", 1e-2), ("fp16", 1e-2), ("bf16", 1e-1)])
def test_rounded_factors_are_near_the_reference(
    precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter (3.9) multiplies the bits of bf16 as whole numbers")
    monkeypatch.setattr(triton_ops, "_precision", lambda: precision)
    case = mlp_case([40, 3, 70], (20, 16, 16, 5))
    reference, fast = mlp_results("torch", case), mlp_results("triton", case, DEVICE)
    for name, expected in reference.items():
        assert fast[name].dtype == torch.float32
        assert_close(fast[name], expected, name, tolerance)


def test_precision_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, kept = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((False, "ieee"), (True, "tf32")):
            matmul.allow_tf32 = allowed
            assert triton_ops._precision() == precision
    finally:
        matmul.allow_tf32 = kept
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
        assert triton_ops._precision() == precision


def test_the_backward_pass_keeps_the_precision_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case([20], (4, 16, 3))
    launched = []
    launch = triton_ops.launch
    monkeypatch.setattr(
        triton_ops, "launch", lambda *a, **constants: (launched.append(constants["PRECISION"]), launch(*a, **constants))
    )
    monkeypatch.setattr(triton_ops, "_precision", lambda: "fp16")
    inputs = case.inputs.to(DEVICE).requires_grad_()
    banks, groups = [page.to(DEVICE) for page in case.pages], Groups(*(part.to(DEVICE) for part in case.groups))
    out = grouped_mlp(inputs, groups, banks, case.offset, case.widths, "triton")
    monkeypatch.setattr(triton_ops, "_precision", lambda: "ieee")
    out.sum().backward()
    assert launched == ["fp16", "fp16"]


def test_an_input_that_is_not_a_number_gets_through_and_stays_in_its_sample() -> None:
    case = mlp_case([20, 30], (6, 16, 8, 3))
    case.inputs[4, 0] = float("nan")
    reference, fast = mlp_results("torch", case), mlp_results("triton", case, DEVICE)
    for name in ("outputs", "gradient of level 0", "gradient of level 2"):
        assert torch.equal(fast[name].isnan().cpu(), reference[name].isnan()), name
    assert int(fast["outputs"].isnan().sum()) == 3


def test_mlps_too_wide_for_the_chip_are_left_to_torch() -> None:
    case = mlp_case([9, 4], (5, 80, 3))
    reference, other = mlp_results("torch", case), mlp_results("triton", case, DEVICE)
    for name, expected in reference.items():
        if name != "input gradient":  # torch also writes that of inputs beyond the used ones
            assert_close(other[name], expected, name, 1e-5)


def test_grouped_mlp_flags_its_weights_in_place() -> None:
    """Weights that start and end within a block; a node without samples and a bank without groups stay untouched."""
    sizes, widths, offset = [3, 40], (6, 8, 3), 21
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(43, 6, generator=generator).to(DEVICE)
    groups = Groups(*(torch.tensor(part, device=DEVICE) for part in ([0, 3, 43], [0, 1], [2, 0], [6, 4])))
    pages = [torch.randn(3, 150, generator=generator).to(DEVICE) for _ in range(3)]
    plain, held = ([Parameter(page.clone()) for page in pages] for _ in range(2))
    for bank in held:
        enable_bank_gradient(bank)
    for banks in (plain, held):
        for _ in range(2):
            grouped_mlp(inputs, groups, banks, offset, widths, "triton").square().sum().backward()
    for level, (bank, other) in enumerate(zip(held, plain)):
        torch.testing.assert_close(bank.grad, other.grad, rtol=1e-5, atol=1e-5)
        flags = bank.infnerf_gradient
        assert flags.rows.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]][level]
        first, last = offset // 16, (offset + 6 * 8 + 8 * 3 - 1) // 16
        expected = torch.zeros_like(flags.touched)
        expected[flags.rows.bool(), first : last + 1] = 1
        assert torch.equal(flags.touched, expected)
    assert sum(sizes) == len(inputs)


def test_only_the_gradients_asked_for_are_computed() -> None:
    case = mlp_case([20, 30], (6, 8, 3))
    groups = Groups(*(part.to(DEVICE) for part in case.groups))
    pages = [page.to(DEVICE) for page in case.pages]
    reference = mlp_results("torch", case)
    frozen = case.inputs.to(DEVICE).requires_grad_()
    grouped_mlp(frozen, groups, pages, case.offset, case.widths, "triton").backward(wave(50, 3, device=DEVICE))
    assert_close(frozen.grad, reference["input gradient"], "of frozen nodes")
    banks = [Parameter(page) for page in pages]
    banks[0].requires_grad_(False)
    inputs = case.inputs.to(DEVICE)
    grouped_mlp(inputs, groups, banks, case.offset, case.widths, "triton").backward(wave(50, 3, device=DEVICE))
    assert banks[0].grad is None
    assert_close(banks[2].grad, reference["gradient of level 2"], "of inputs without a gradient")


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


# -- the field ---------------------------------------------------------------------------------------------------------


def _on_device(field: OctreeField) -> OctreeField:
    field.octree = field.octree.to(DEVICE)
    return field.to(DEVICE)


@pytest.mark.parametrize(
    "children, sharing, of_positions",
    [("residual", "node", False), ("residual", "tree", True), ("independent", "node", False)],
)
def test_the_field_is_that_of_the_reference(children: str, sharing: str, of_positions: bool) -> None:
    reference = values_and_gradients(tiny_field(children, sharing, backend="torch"), of_positions, 120)
    field = _on_device(tiny_field(children, sharing, backend="triton"))
    compared = compare(reference, values_and_gradients(field, of_positions, 120))
    assert compared >= 4 + of_positions + 4 + 1 + 4, "values, positions, grids, at least one decoder, proposals"


def test_normals_are_those_of_the_reference() -> None:
    field, reference = _on_device(tiny_field(backend="triton")), tiny_field(backend="torch")
    positions, footprints = tiny_samples(reference.octree, 60)
    normals = field.normals(positions.to(DEVICE), footprints.to(DEVICE))
    assert_close(normals, reference.normals(positions, footprints), "normals", 1e-4)
    assert all(parameter.grad is None for parameter in field.parameters())


# -- NodeAdam ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """NodeAdam takes the kernels of a GPU also where they are interpreted on a CPU."""
    from infnerf_ns.kernels import adam_triton

    monkeypatch.setattr(optimizer_module, "_device_kernels", lambda bank: adam_triton)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("page", [37, 20_000], ids=["a small page", "a page of several programs"])
def test_node_adam_is_that_of_the_cpu(page: int, warmup: int, with_triton: None) -> None:
    touched, dense = adam_bank(page=page, device=DEVICE), adam_bank(page=page)
    options = {"lr": 0.03, "warmup": warmup}
    first, second = NodeAdam([touched], **options), NodeAdam([dense], **options)
    for gradient in adam_gradients(4, 5, density=0.2 if page < 100 else 0.002, page=page):
        before = touched.detach().cpu().clone()
        give(touched, gradient)
        first.step()
        dense_step(dense, second, gradient)
        assert torch.equal(touched.detach().cpu()[gradient == 0], before[gradient == 0]), "bit for bit"
        held = bank_gradient(touched)
        assert not bool(held.grad.any()) and not bool(held.touched.any()) and not bool(held.rows.any())
    assert torch.allclose(touched.detach().cpu(), dense, rtol=1e-5, atol=1e-6)
    for moment in MOMENTS:
        now, expected = first.state[touched][moment].cpu(), second.state[dense][moment]
        assert torch.allclose(now, expected, rtol=1e-5, atol=1e-7), moment


def test_zero_grad_forgets_a_backward_pass(with_triton: None) -> None:
    bank = adam_bank(page=20_000, device=DEVICE)
    optimizer = NodeAdam([bank], lr=0.03)
    before = bank.detach().clone()
    give(bank, adam_gradients(0, 1, density=0.01, page=20_000)[0])
    optimizer.zero_grad()
    held = bank_gradient(bank)
    assert not bool(held.grad.any()) and not bool(held.touched.any()) and not bool(held.rows.any())
    optimizer.step()
    assert torch.equal(bank, before)


def test_a_training_step_is_that_of_numba(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From samples to parameters, with gradients in place."""
    results, kernels = [], optimizer_module._device_kernels
    for backend, chosen in (("numba", lambda bank: None), ("triton", kernels)):
        monkeypatch.setattr(optimizer_module, "_device_kernels", chosen)
        field = tiny_field(backend=backend)
        if backend == "triton":
            field = _on_device(field)
        in_place_gradients(field, field.octree.level.device)
        optimizer = NodeAdam([*field.grids, *field.decoders, *field.proposals], lr=0.01, eps=1e-3)
        positions, footprints = tiny_samples(field.octree, 80)
        for _ in range(2):
            optimizer.zero_grad()
            (field.density_at(positions, footprints) + field.proposal_density(positions, footprints)).sum().backward()
            optimizer.step()
        results.append({name: value.detach().cpu() for name, value in field.named_parameters()})
    start = dict(tiny_field().named_parameters())
    for name, expected in results[0].items():
        assert torch.allclose(results[1][name], expected, rtol=1e-4, atol=1e-5), name
        assert name == "appearance.weight" or not torch.equal(expected, start[name]), name


def test_a_gradient_follows_its_bank_to_another_device() -> None:
    """A module that moves takes the gradient buffer with it, but not the flags: all are made anew."""
    bank = adam_bank()
    held = bank_gradient(bank)
    held.rows = held.rows.to("meta")  # as if the bank and its gradient had left a device where the flags still are
    anew = bank_gradient(bank)
    assert anew is not held and bank_gradient(bank) is anew and bank.grad is anew.grad
    assert {part.device for part in (anew.grad, anew.touched, anew.rows)} == {bank.device}
