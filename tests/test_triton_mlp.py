"""The Triton backend's decoders against the torch reference, values and gradients; see test_triton.py."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, assert_close, mlp_case, mlp_results, wave
from torch.nn import Parameter

pytest.importorskip("triton")

from infnerf_ns.kernels import Groups, enable_bank_gradient, grouped_mlp, triton_ops

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
