"""The octree field, NodeAdam and a training step on the Triton backend against the numba backend and the reference; see
test_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, assert_close
from node_adam_cases import MOMENTS, adam_bank, adam_gradients, dense_step, give
from tiny_field import compare, tiny_field, tiny_samples, values_and_gradients

pytest.importorskip("triton")

from infnerf_ns.field import OctreeField, in_place_gradients
from infnerf_ns.kernels import bank_gradient
from infnerf_ns.training import optimizer as optimizer_module
from infnerf_ns.training.child_pages import start_children
from infnerf_ns.training.optimizer import NodeAdam
from infnerf_ns.training.tree_change import change_tree


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


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_node_adam_leaves_out_what_is_not_finite_and_clips_the_rest(max_norm: float | None, with_triton: None) -> None:
    touched, dense = adam_bank(page=200, device=DEVICE), adam_bank(page=200)
    options = {"lr": 0.03, "eps": 1e-2, "max_norm": max_norm}
    first, second = NodeAdam([touched], **options), NodeAdam([dense], **options)
    for gradient in adam_gradients(4, 3, density=0.3, page=200):
        gradient[2, 5:8] = torch.tensor([float("nan"), float("inf"), -1e30])
        give(touched, gradient)
        first.step()
        dense_step(dense, second, gradient)
        assert bool(torch.isfinite(touched).all())
        assert not bool(bank_gradient(touched).grad.any())
    assert first.left_out() == 9
    assert torch.allclose(touched.detach().cpu(), dense, rtol=1e-5, atol=1e-6)


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


def test_a_tree_that_grows_trains_on_as_on_the_cpu(with_triton: None) -> None:
    """Banks, gradient buffers and moments are made anew in a birth."""
    results = []
    for backend in ("triton", "torch"):
        field = tiny_field(backend=backend)
        field = _on_device(field) if backend == "triton" else field
        if backend == "triton":
            in_place_gradients(field, DEVICE)
        optimizer = NodeAdam([*field.grids, *field.decoders, *field.proposals], lr=1e-2)
        for step in range(4):
            positions, footprints = (each.to(field.tree_level.device) for each in tiny_samples(tiny_field().octree, 60))
            field.density_at(positions, footprints).log().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                octree = field.octree
                parents, octants = torch.nonzero((octree.children < 0) & (octree.level < 3)[:, None], as_tuple=True)
                changed = octree.subdivide(parents[::9], octants[::9])
                change_tree(field, changed, [optimizer])
                start_children(field, torch.nonzero(changed.origin < 0)[:, 0])
        results.append(dict(field.named_parameters()))
    for name, value in results[1].items():
        assert_close(results[0][name].detach(), value.detach(), name, 2e-3)
