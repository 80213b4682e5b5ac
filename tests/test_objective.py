"""The losses meet the model: each is there when it is on, weighs what it should, and reaches what it is to train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import ray_batch, scrambled, tiny_config, tiny_model
from torch import Tensor

from infnerf_ns import objective
from infnerf_ns.losses import multi_scale
from infnerf_ns.losses.config import LossConfig, LossSchedules
from infnerf_ns.losses.schedules import schedule_factor
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.objective import NAMES
from infnerf_ns.pipeline import InfNeRFPipelineConfig

OFF = {"distortion": 0.0, "proposal": 0.0, "inter_level": 0.0, "transparency": 0.0}
SIDE, RAYS = 8, 3 * 64
"""Of the patches; rays of which all but a third are in patches."""
NEED_WEIGHTS = {"lpips"}
"""The network's weights are not on a test machine; tests/test_loss_patches.py has some of its own."""
constant = LossSchedules(**{name: "constant" for name in NAMES})


def _model(losses: dict[str, Any], sampler: dict | None = None) -> InfNeRFModel:
    torch.manual_seed(0)
    config = tiny_config(
        sampler={"proposal_samples": (48, 24), "interval_footprint": 0.0, **(sampler or {})},
        losses={**OFF, "tree_every": 1, "cut_every": 1, "schedules": constant, **losses},
    )
    model = scrambled(tiny_model(config))
    model.total_steps = 100
    model.train()
    return model


def _step(model: InfNeRFModel) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, batch, losses and metrics of one step, with patches and depth."""
    rays, batch = ray_batch(RAYS)
    generator = torch.Generator().manual_seed(3)
    depth = 1 + torch.rand(RAYS, generator=generator)
    batch = {**batch, "patch_rays": 2 * SIDE**2, "patch_size": SIDE, "depth": depth}
    outputs = model(rays)
    metrics = model.get_metrics_dict(outputs, batch)
    return outputs, batch, model.get_loss_dict(outputs, batch, metrics), metrics


@pytest.mark.parametrize("name", sorted(set(NAMES) - NEED_WEIGHTS))
def test_each_loss_alone(name: str) -> None:
    """It joins the photometric loss, its weight is a factor and is logged, and it moves the field."""
    values = {}
    for weight in (0.5, 1.0):
        model = _model({name: weight})
        _, _, losses, metrics = _step(model)
        extra = {"discriminator_loss"} if name == "adversarial" else set()
        assert set(losses) == {"rgb_loss", f"{name}_loss"} | extra
        assert float(metrics[f"weight_{name}"]) == weight
        values[weight] = float(losses[f"{name}_loss"])
        losses[f"{name}_loss"].backward()
        gradients = [bank.grad for bank in (*model.field.grids, *model.field.proposals) if bank.grad is not None]
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients)
    assert values[0.5] != 0 and 2 * values[0.5] == pytest.approx(values[1.0], rel=1e-6)


def test_losses_that_are_off_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model({})

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is rendered once more")

    monkeypatch.setattr(model, "render_cut", never)
    monkeypatch.setattr(objective, "field_at", never)
    _, _, losses, metrics = _step(model)
    assert set(losses) == {"rgb_loss"} and not [name for name in metrics if name.startswith("weight_")]


def test_single_rays_alone_have_a_photometric_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside patches; where all rays are in patches, all of them have it."""
    model = _model({"cut_rays": 16, "multi_scale": 1.0})
    rays, batch = ray_batch(RAYS)
    outputs, error, cut = model(rays), {}, []
    render = model.render_cut

    def render_cut(outputs: dict[str, Any], chosen: Tensor, *levels: int) -> dict[str, Tensor]:
        cut[:] = chosen.tolist()
        return render(outputs, chosen, *levels)

    monkeypatch.setattr(model, "render_cut", render_cut)
    for patched in (0, 2 * SIDE**2, RAYS):
        known = {**batch, "patch_rays": patched, "patch_size": SIDE}
        losses = model.get_loss_dict(outputs, known, {})
        first = patched if patched < RAYS else 0
        expected = (outputs["rgb"] - batch["image"])[first:].square().mean()
        assert float(losses["rgb_loss"]) == pytest.approx(float(expected))
        error[patched] = float(losses["rgb_loss"])
        gradient = torch.autograd.grad(losses["rgb_loss"], outputs["rgb"], retain_graph=True)[0]
        assert not gradient[:first].any() and gradient[first:].any()
        assert min(cut) == first and len(cut) == 16
    assert error[0] == error[RAYS] != error[2 * SIDE**2]


def test_multi_scale_by_hand() -> None:
    """Two cuts above the deepest level 2, on every 4th ray: weights 2**(-l/2), normalised."""
    model = _model({"multi_scale": 1.0, "cut_rays": 48, "coarse_first": 0.0}, {"footprint_jitter": False})
    rays, batch = ray_batch(RAYS)
    outputs = model(rays)
    torch.manual_seed(5)
    total = model.get_loss_dict(outputs, batch, {})["multi_scale_loss"]
    torch.manual_seed(5)
    chosen, expected = torch.arange(0, RAYS, 4), 0.0
    for level, share in ((0, 1 / (1 + 2**-0.5)), (1, 2**-0.5 / (1 + 2**-0.5))):
        cut = model.render_cut(outputs, chosen, level, 2)
        expected += share * float((cut["rgb"] - batch["image"][chosen]).square().mean())
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_a_cut_is_a_cap_on_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model({})
    rays, _ = ray_batch(RAYS)
    outputs = model(rays)
    seen: list[Tensor] = []
    density = model.field.density
    monkeypatch.setattr(model.field, "density", lambda routed: (seen.append(routed.node), density(routed))[1])
    chosen = torch.arange(32)
    for level in (0, 1, 2):
        cut = model.render_cut(outputs, chosen, level, 2)
        assert int(model.field.octree.level[seen[-1]].max()) == level
        assert len(seen[-1]) == 32 * multi_scale.cut_samples(8, level, 2)
        assert cut["rgb"].shape == (32, 3) and cut["expected_depth"].shape == (32, 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_weights_of_cuts(count: int) -> None:
    levels = list(range(count))
    late = multi_scale.level_weights(levels, 1.0, 0.3)
    assert torch.allclose(late, multi_scale.level_weights(levels, 0.0, 0.0)), "0: all from the beginning"
    assert float(late.sum()) == pytest.approx(1) and torch.allclose(late[1:] / late[:-1], torch.tensor(2**-0.5))
    early = multi_scale.level_weights(levels, 0.0, 0.3)
    assert early.tolist() == [1.0] + [0.0] * (count - 1), "coarse first"
    finest = [float(multi_scale.level_weights(levels, p, 0.3)[-1]) for p in torch.linspace(0, 0.3, 20).tolist()]
    assert finest == sorted(finest)


def test_coarse_cuts_have_fewer_samples() -> None:
    assert [multi_scale.cut_samples(32, level, 4) for level in range(5)] == [8, 11, 16, 23, 32]
    assert multi_scale.cut_samples(8, 0, 10) == 4


def test_schedules_of_the_weights() -> None:
    model = _model({"sparsity": 0.2, "schedules": LossSchedules(**{**vars(constant), "sparsity": "warm_up"})})
    for step, factor in ((0, None), (5, 0.5), (10, 1.0), (99, 1.0)):
        model.step = step
        _, _, losses, metrics = _step(model)
        assert ("sparsity_loss" in losses) == (factor is not None), "a weight of 0 is not computed"
        if factor is not None:
            assert float(metrics["weight_sparsity"]) == pytest.approx(0.2 * factor)
    assert schedule_factor("warm_up", 0.05, constant.shape) == pytest.approx(0.5)


def test_balanced_losses_weigh_by_their_variation() -> None:
    model = _model({"distortion": 0.01, "sparsity": 0.01, "balance": True})
    for _ in range(20):
        _step(model)
    _, _, losses, metrics = _step(model)
    weights = [float(metrics[f"weight_{name}"]) for name in ("distortion", "sparsity")]
    assert sum(weights) == pytest.approx(0.02, rel=1e-4) and weights[0] != weights[1]
    assert any(name.startswith("objective.balance.") for name in model.state_dict()), "a resumed run goes on as before"


def test_the_discriminator_and_the_field_do_not_move_each_other() -> None:
    model = _model({"adversarial": 0.1})
    own = dict(model.objective.discriminator.named_parameters())
    assert {id(p) for p in model.get_param_groups()["discriminator"]} == {id(p) for p in own.values()}
    _, _, losses, _ = _step(model)
    of_field = torch.autograd.grad(
        losses["discriminator_loss"], list(model.field.grids), allow_unused=True, retain_graph=True
    )
    assert not any(g is not None and g.any() for g in of_field)
    of_critic = torch.autograd.grad(losses["adversarial_loss"], list(own.values()), allow_unused=True)
    assert not any(g is not None and g.any() for g in of_critic)
    assert "discriminator" not in _model({}).get_param_groups()


def test_patch_losses_without_patches_are_refused() -> None:
    config = InfNeRFPipelineConfig()
    config.model.losses = LossConfig(ssim=0.1)
    (problem,) = config.check()
    assert "--pipeline.model.losses.ssim needs patches" in problem and "--pipeline.datamanager.patch-size 16" in problem
    config.datamanager.patch_size = 16
    assert config.check() == []
    config.datamanager.patch_share = 0.0
    assert len(config.check()) == 1


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_statistics_of_a_step(backend: str) -> None:
    """All samples count, the error is shared out by weight, and watching changes no gradient."""
    gradients = []
    for every in (0, 10):
        torch.manual_seed(0)
        config = tiny_config({"backend": backend}, losses={**OFF, "tree_every": 10**4})
        config.growth.every, config.growth.start_step = every, 0
        model = scrambled(tiny_model(config))
        model.train()
        rays, batch = ray_batch()
        torch.manual_seed(1)
        outputs = model(rays)
        losses = model.get_loss_dict(outputs, batch, {})
        sum(losses.values()).backward()
        gradients.append([bank.grad.clone() for bank in model.field.grids if bank.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    table = model.growth.table
    weights = outputs["weights_list"][-1][..., 0].detach().double()
    error = (outputs["rgb"] - batch["image"]).detach().square().mean(-1).double()
    assert int(table[..., 0].sum()) == weights.numel()
    assert float(table[..., 1].sum()) == pytest.approx(float(weights.sum()))
    assert float(table[..., 2].sum()) == pytest.approx(float((weights.sum(1) * error).sum()))
    assert float(table[..., 3].sum()) > 0 and bool((table[..., 4:] <= table[..., 1:4]).all())


def test_cuts_stand_in_front_of_the_same_background_as_their_photos() -> None:
    """Regression: with random backgrounds a transparent photo was compared with a cut in front of black."""
    model = _model({"multi_scale": 1.0})
    model.renderer_rgb.background_color = "random"
    for bank in (*model.field.grids, *model.field.decoders, *model.field.proposals):
        bank.data.zero_()
    model.config.color_weight_threshold = 0.1
    rays, batch = ray_batch(RAYS)
    rays.fars = torch.full_like(rays.pixel_area, 0.3)  # nothing but air
    rays.nears = torch.full_like(rays.pixel_area, 0.299)
    batch["image"] = torch.zeros(RAYS, 4)
    losses = model.get_loss_dict(model(rays), batch, {})
    assert float(losses["rgb_loss"]) < 1e-3 and float(losses["multi_scale_loss"]) < 1e-3
