"""The tcnn backend, and the page layout that it shares with tiny-cuda-nn.

The real tiny-cuda-nn was never run where these tests were written: it needs a GPU and is not on PyPI. They run with a
stand-in that has the interface of its Python bindings (``bindings/torch/tinycudann/modules.py`` and ``bindings.cpp``,
as read in its repository) and computes by the published rule in plain Python. Where tinycudann can be imported and CUDA
is available, they run with the real one, too.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcnn_stand_in import (
    GRANULARITY,
    StandInContext,
    StandInNative,
    exact_levels,
    float32_levels,
    level_table,
    stand_in,
    vertices,
)
from tiny_model import scrambled, tiny_config, tiny_model, training_losses
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.kernels import HashLayout, contracts, hash_encode, tcnn_ops
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.pages import PageLayout
from infnerf_ns.presets import load_preset, preset_names

LAYOUTS = {
    "dense": HashLayout(2, 4, 8, 14, 2),
    "hashed": HashLayout(4, 8, 64, 9, 2),
    "scales between whole numbers": HashLayout(4, 5, 37, 10, 2),
    "one feature": HashLayout(3, 4, 32, 10, 1),
    "four features": HashLayout(3, 4, 27, 8, 4),
    "one level": HashLayout(1, 16, 16, 12, 2),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def install(monkeypatch: pytest.MonkeyPatch, package: ModuleType) -> None:
    """Makes it what ``import tinycudann`` gives."""
    monkeypatch.setitem(sys.modules, "tinycudann", package)
    monkeypatch.setitem(sys.modules, "tinycudann.modules", package.modules)
    tcnn_ops._native.cache_clear()


def _real_library() -> bool:
    try:
        import tinycudann  # noqa: F401
    except Exception:
        return False
    return torch.cuda.is_available()


@pytest.fixture(params=["stand-in"] + ["tinycudann"] * _real_library())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device of the library that a test runs with."""
    if request.param == "tinycudann":
        yield torch.device("cuda", 0)
        return
    install(monkeypatch, stand_in())
    real = contracts.choose_for
    monkeypatch.setattr(contracts, "choose_for", lambda name, x: "tcnn" if name == "tcnn" else real(name, x))
    yield torch.device("cpu")
    tcnn_ops._native.cache_clear()


# -- the layout --------------------------------------------------------------------------------------------------------


@every_layout
def test_the_reference_reads_the_entries_of_the_published_rule(layout: HashLayout) -> None:
    """The gradient of one sample's feature is its weights, at exactly the entries that the rule names."""
    generator = torch.Generator().manual_seed(3)
    positions = torch.rand(24, 3, generator=generator, dtype=torch.float64)
    positions = torch.cat([positions, torch.tensor([[0.0, 0, 0], [0.9999, 0.5, 0.9999], [0.9999] * 3])]).double()
    levels, wrapped = exact_levels(layout), 0
    assert layout.resolutions.tolist() == [level.resolution for level in levels]
    assert layout.offsets.tolist() == [level.offset for level in levels] + [layout.page_size // layout.features]
    for position, (number, level) in itertools.product(positions, enumerate(levels)):
        bank = torch.zeros(2, layout.page_size, dtype=torch.float64, requires_grad=True)
        out = hash_encode(position[None], torch.tensor([1]), bank, layout, "torch")
        column = number * layout.features + layout.features - 1
        out[0, column].backward()
        expected = torch.zeros(2, layout.page_size // layout.features, layout.features, dtype=torch.float64)
        for vertex in vertices(position.tolist(), level):
            expected[1, level.offset + vertex.entry, -1] += vertex.weight
        assert torch.allclose(bank.grad.reshape(expected.shape), expected, atol=1e-5), (position, level)
        top = math.floor(level.scale * position.max().item() + 0.5) + 1
        wrapped += level.resolution**3 <= level.size and top == level.resolution
    assert wrapped or layout.hashed.all(), "samples reach beyond the last vertex of a dense level"


def test_one_native_encoding_of_the_default_root_may_be_another_field() -> None:
    """In float32 its finest scale is 511 or a bit above, as the processor's logarithm rounds. Above it makes one vertex
    more than ours, in a table of equal size: the number of parameters does not tell."""
    config = load_preset("infnerf", "cpu").pipeline.model
    root = PageLayout(config.field, config.octree.node_resolution, 1).grids[0]
    growth = (root.finest_resolution / root.base_resolution) ** (1 / (root.num_levels - 1))
    ends = [growth * (1 - 4e-7), growth * (1 + 4e-7)]  # more than its logarithm can be off
    finest = [float32_levels(root.num_levels, root.base_resolution, each, root.log2_table_size)[-1] for each in ends]
    assert [level.resolution for level in finest] == [512, 513] and root.resolutions[-1] == 512
    for level in finest:
        assert (level.offset + level.size) * root.features == root.page_size


def _agrees_with_tiny_cuda_nn(layout: HashLayout) -> None:
    """The runs of a layout cover its page, and tiny-cuda-nn's float32 sizes of each are the layout's."""
    end, done = 0, 0
    for run in tcnn_ops._runs(layout):
        count = run.layout.num_levels
        ours = slice(done, done + count)
        levels = float32_levels(count, run.layout.base_resolution, 2.0, layout.log2_table_size)
        assert [level.resolution for level in levels] == layout.resolutions[ours].tolist()
        assert run.layout.resolutions.tolist() == layout.resolutions[ours].tolist()
        assert [level.size for level in levels] == layout.sizes[ours].tolist()
        assert [level.scale * run.squeeze for level in levels] == pytest.approx(layout.scales[ours], rel=1e-7)
        assert run.floats == slice(end, end + run.layout.page_size) and run.squeeze <= 1
        end, done = run.floats.stop, done + count
    assert (end, done) == (layout.page_size, layout.num_levels)


@pytest.mark.parametrize("children", ["residual", "independent"])
@pytest.mark.parametrize("machine", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", preset_names())
def test_pages_of_the_presets_are_tiny_cuda_nns(preset: str, machine: str, children: str) -> None:
    config = load_preset(preset, machine).pipeline.model
    config.field.children = children
    pages = PageLayout(config.field, config.octree.node_resolution, 1)
    for layout in {*pages.grids, *pages.proposals}:
        _agrees_with_tiny_cuda_nn(layout)


@given(st.integers(1, 24), st.integers(2, 512), st.integers(8, 16384), st.integers(8, 26), st.sampled_from([1, 2, 4]))
@settings(max_examples=300)
def test_pages_of_any_size_are_tiny_cuda_nns(count: int, base: int, finest: int, log2_size: int, features: int) -> None:
    _agrees_with_tiny_cuda_nn(HashLayout(count, base, finest, log2_size, features))


def test_doubling_levels_are_one_native_encoding() -> None:
    """The nodes of the default settings are evaluated by one native call each, but for the root's grid."""
    config = load_preset("infnerf", "cuda").pipeline.model
    pages = PageLayout(config.field, config.octree.node_resolution, 2)
    assert [len(tcnn_ops._runs(layout)) for layout in (*pages.grids, *pages.proposals)] == [8, 1, 1, 1, 1, 1]


# -- values and gradients ----------------------------------------------------------------------------------------------


def _samples(count: int, nodes: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    row = torch.tensor(nodes)[torch.randint(len(nodes), (count,), generator=generator)]
    return torch.rand(count, 3, generator=generator), row


def _bank(layout: HashLayout, nodes: int) -> Tensor:
    return torch.randn(nodes, layout.page_size, generator=torch.Generator().manual_seed(1))


def _compare(
    positions: Tensor, row: Tensor, bank: Tensor, layout: HashLayout, device: torch.device, wanted: str = "pb"
) -> None:
    """Features and gradients (of positions and bank, if wanted) of the tcnn backend are the reference's."""
    results = []
    for encode in (lambda *inputs: hash_encode(*inputs, "torch"), tcnn_ops.hash_encode):
        p, b = (each.to(device).detach().requires_grad_() for each in (positions, bank))
        out = encode(p if "p" in wanted else p.detach(), row.to(device), b if "b" in wanted else b.detach(), layout)
        assert out.shape == (len(p), layout.num_outputs)
        if out.requires_grad:
            wave = torch.sin(torch.arange(out.numel(), device=device, dtype=torch.float32)).reshape(out.shape)
            (out * wave).sum().backward()
        results.append((out.detach(), p.grad, b.grad))
    for name, reference, fast in zip(("features", "position gradient", "bank gradient"), *results):
        if reference is None:
            assert fast is None, name
        elif reference.numel():
            assert fast is not None and fast.shape == reference.shape, name
            assert (reference - fast).abs().max() <= 2e-5 * reference.abs().max(), name


@every_layout
@pytest.mark.parametrize("wanted", ["pb", "p", "b", ""])
def test_features_and_gradients(device: torch.device, layout: HashLayout, wanted: str) -> None:
    """Unsorted rows, nodes without samples, numbers of samples that are no multiple of the batch granularity."""
    positions, row = _samples(61, [0, 2, 3])
    _compare(positions, row, _bank(layout, 5), layout, device, wanted)


@pytest.mark.parametrize("count", [0, 1, GRANULARITY, GRANULARITY + 1])
def test_few_samples(device: torch.device, count: int) -> None:
    layout = LAYOUTS["hashed"]
    positions, row = _samples(count, [1])
    _compare(positions, row, _bank(layout, 3), layout, device)


def test_sorted_rows_and_strided_inputs(device: torch.device) -> None:
    layout = LAYOUTS["scales between whole numbers"]
    positions, row = _samples(40, [0, 1, 2])
    _compare(positions, row.sort().values, _bank(layout, 3), layout, device)
    strided = positions.T.contiguous().T, torch.stack([row, row], dim=1)[:, 0], _bank(layout, 3).T.contiguous().T
    assert not any(each.is_contiguous() for each in strided)
    leaf = strided[2].to(device).requires_grad_()
    tcnn_ops.hash_encode(strided[0].to(device), strided[1].to(device), leaf, layout).square().sum().backward()
    plain = _bank(layout, 3).to(device).requires_grad_()
    tcnn_ops.hash_encode(positions.to(device), row.to(device), plain, layout).square().sum().backward()
    assert torch.equal(leaf.grad, plain.grad) and bool(plain.grad.any())


def test_backward_twice_and_a_gradient_that_is_expanded(device: torch.device) -> None:
    layout = LAYOUTS["hashed"]
    positions, row = (each.to(device) for each in _samples(20, [0, 1]))
    bank = _bank(layout, 2).to(device).requires_grad_()
    out = tcnn_ops.hash_encode(positions.requires_grad_(), row, bank, layout).sum()  # sum() expands its gradient
    first = torch.autograd.grad(out, (positions, bank), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, (positions, bank))))


def test_second_derivatives_are_refused_rather_than_wrong(device: torch.device) -> None:
    layout = LAYOUTS["dense"]
    positions, row = (each.to(device) for each in _samples(4, [0]))
    out = tcnn_ops.hash_encode(positions.requires_grad_(), row, _bank(layout, 1).to(device), layout)
    (slope,) = torch.autograd.grad(out.square().sum(), positions, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(device: torch.device, mode: type) -> None:
    layout = LAYOUTS["four features"]
    positions, row = (each.to(device) for each in _samples(20, [0, 1]))
    bank = torch.nn.Parameter(_bank(layout, 2).to(device))
    with mode():
        out = tcnn_ops.hash_encode(positions, row, bank, layout)
    assert not out.requires_grad
    assert torch.allclose(out, hash_encode(positions, row, bank, layout, "torch"), atol=1e-5)


def test_pages_are_read_in_place_and_encodings_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    package = stand_in()
    install(monkeypatch, package)
    layout = HashLayout(3, 8, 32, 9, 2)
    positions, row = _samples(30, [0, 2])
    bank = torch.nn.Parameter(_bank(layout, 3))
    random = torch.get_rng_state()
    tcnn_ops.hash_encode(positions, row, bank, layout)
    with torch.no_grad():
        tcnn_ops.hash_encode(positions, row, bank, layout)
    assert len(package.made) == 1
    visits = [(bank[node].data_ptr(), inference) for inference in (False, True) for node in (0, 2)]
    assert package.made[0].calls[1:] == visits, "the first call is its comparison with the reference"
    assert torch.equal(random, torch.get_rng_state()), "the training's random numbers are left alone"


# -- libraries that compute something else -----------------------------------------------------------------------------


class _OneVertexMore(StandInNative):
    """What rounding up a whole scale does to a dense level."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        scales, resolutions = zip(*[(level.scale, level.resolution + 1) for level in self.levels])
        self.levels = level_table(scales, resolutions, arguments[1]["log2_hashmap_size"])


class _OtherHash(StandInNative):
    """As many parameters, in another order."""

    def fwd(self, input: Tensor, params: Tensor) -> tuple[StandInContext | None, Tensor]:
        return super().fwd(input, params.flip(0).contiguous())


class _ScaledGradients(StandInNative):
    """Gradients with a loss scale in them."""

    def bwd(self, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
        to_input, to_params = super().bwd(*arguments)
        return to_input, None if to_params is None else 128 * to_params


@pytest.mark.parametrize(
    "native, reason",
    [
        (_OneVertexMore, "tiny-cuda-nn has 9840 parameters"),
        (_OtherHash, "the features of tiny-cuda-nn"),
        (_ScaledGradients, "the parameter gradients of tiny-cuda-nn"),
    ],
)
def test_a_library_that_differs_is_refused(
    native: type[StandInNative], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, stand_in(native))
    layout = HashLayout(1, 16, 16, 14, 2)
    positions, row = _samples(5, [0])
    with pytest.raises(InputError) as caught:
        tcnn_ops.hash_encode(positions, row, _bank(layout, 1), layout)
    message = str(caught.value)
    assert message.startswith("infnerf: --pipeline.model.field.backend tcnn: ") and reason in message
    assert message.endswith("use triton or torch") and "\n" not in message


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tinycudann", "tinycudann.modules"):
        monkeypatch.setitem(sys.modules, name, None)
    tcnn_ops._native.cache_clear()
    layout = LAYOUTS["dense"]
    with pytest.raises(InputError, match="backend tcnn: tinycudann cannot be imported .*; use triton or torch"):
        tcnn_ops.hash_encode(*_samples(3, [0]), _bank(layout, 1), layout)


# -- in the field ------------------------------------------------------------------------------------------------------


def _models(children: str, device: torch.device) -> list[InfNeRFModel]:
    """One model with the torch backend and the same one with tcnn."""
    models = []
    for backend in ("torch", "tcnn"):
        torch.manual_seed(5)
        config = tiny_config(field={"children": children, "hash_levels": 4, "backend": "torch"})
        models.append(scrambled(tiny_model(config)).to(device))
        models[-1].field.config.backend = backend
    return models


every_children = pytest.mark.parametrize("children", ["residual", "independent"])


@every_children
def test_density_and_normals_of_the_field(device: torch.device, children: str) -> None:
    generator = torch.Generator().manual_seed(4)
    positions = (1.4 * torch.rand(150, 3, generator=generator) - 0.7).to(device)
    footprints = (0.02 * torch.rand(150, generator=generator)).to(device)
    values = []
    for model in _models(children, device):
        field = model.eval().field
        with torch.no_grad():
            density, proposal = field.density_at(positions, footprints), field.proposal_density(positions, footprints)
            values.append((density, proposal, field.normals(positions, footprints)))
        assert int(field.octree.level[field.route(positions, footprints).node].max()) > 0
    for reference, fast in zip(*values):
        assert torch.allclose(reference, fast, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@every_children
def test_a_training_step_of_the_model(device: torch.device, children: str) -> None:
    if device.type == "cuda":
        pytest.skip("the batch of rays is on the CPU")
    losses, gradients = [], []
    for model in _models(children, device):
        torch.manual_seed(6)
        losses.append(training_losses(model))
        sum(losses[-1].values()).backward()
        gradients.append({name: value.grad for name, value in model.field.named_parameters()})
    for name, reference in losses[0].items():
        assert torch.allclose(reference, losses[1][name], rtol=1e-4), name
    compared = {name for name, reference in gradients[0].items() if reference is not None and bool(reference.any())}
    assert {"grids.0", "grids.1", "proposals.0"} <= compared
    for name in compared:
        difference = (gradients[0][name] - gradients[1][name]).abs().max()
        assert difference <= 1e-3 * gradients[0][name].abs().max(), name
