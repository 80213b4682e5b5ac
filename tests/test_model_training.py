"""The losses of the model, short trainings, and the refinement of poses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from tiny_model import ray_batch, scrambled, tiny_config, tiny_model, training_losses
from torch import Tensor

from infnerf_ns.model import InfNeRFModelConfig
from infnerf_ns.training.optimizer import NodeAdam

# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("children", ["residual", "independent"])
def test_all_losses_reach_all_parameters(children: str) -> None:
    # Short intervals, so that the proposal grids of all levels are asked.
    model = scrambled(tiny_model(tiny_config({"children": children}, {"proposal_samples": (64, 160)})))
    losses = training_losses(model)
    names = ("rgb", "distortion", "proposal", "inter_level", "transparency")
    assert set(losses) == {f"{name}_loss" for name in names}
    assert all(loss.shape == () and bool(torch.isfinite(loss)) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.field.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_losses_follow_their_schedules_and_switches() -> None:
    model = tiny_model(tiny_config(sampler={"proposal_warmup": 4, "proposal_update_every": 4}))
    assert set(training_losses(model, 3)) == {"rgb_loss", "distortion_loss", "proposal_loss"}, (
        "tree losses come every 8 steps"
    )
    assert set(training_losses(model, 5)) == {"rgb_loss", "distortion_loss"}
    off = {"distortion": 0.0, "proposal": 0.0, "inter_level": 0.0, "transparency": 0.0, "rgb": "charbonnier"}
    assert set(training_losses(tiny_model(tiny_config(losses=off)))) == {"rgb_loss"}
    assert "inter_level_loss" not in training_losses(tiny_model(active=0)), "a root alone has no levels to tie together"
    rays, batch = ray_batch()
    model.eval()
    assert set(model.get_loss_dict(model(rays), batch)) == {"rgb_loss"}


def test_the_weights_of_the_losses_are_factors() -> None:
    names = ("distortion", "proposal", "inter_level", "transparency")

    def weighted(factor: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return training_losses(scrambled(tiny_model(tiny_config(losses={name: factor for name in names}))))

    plain, heavy = weighted(0.5), weighted(1.0)
    assert plain["rgb_loss"].item() == heavy["rgb_loss"].item()
    for name in names:
        assert 2 * plain[f"{name}_loss"].item() == pytest.approx(heavy[f"{name}_loss"].item(), rel=1e-6), name


# -- training ----------------------------------------------------------------------------------------------------------


def _train(config: InfNeRFModelConfig, steps: int, seed: int = 0) -> list[float]:
    """Losses of a short training on a scene of one colour."""
    torch.manual_seed(seed)
    model = tiny_model(config, active=0).train()
    groups = model.get_param_groups()
    banks = [parameter for name, group in groups.items() if name != "appearance" for parameter in group]
    optimizers = [NodeAdam(banks, lr=1e-2), torch.optim.Adam(groups["appearance"], lr=1e-2)]
    callback, _ = model.get_training_callbacks(SimpleNamespace(trainer=None, optimizers=None))
    curve = []
    for step in range(steps):
        callback.run_callback(step)
        rays, batch = ray_batch(128, seed=step)
        batch["image"] = torch.tensor([0.9, 0.2, 0.4]).expand(len(rays), 3)
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = model(rays)
        losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        sum(losses.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
        curve.append(losses["rgb_loss"].item())
    return curve


@pytest.mark.parametrize("children", ["residual", "independent"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_training_learns_a_colour(children: str, backend: str) -> None:
    curve = _train(tiny_config({"children": children, "backend": backend}, level_start_steps=10), 30)
    assert all(math.isfinite(loss) for loss in curve)
    assert np.mean(curve[-5:]) < 0.1 * curve[0]


def test_the_same_seed_gives_the_same_curve() -> None:
    config = tiny_config(level_start_steps=4)
    first, second, other = _train(config, 12), _train(config, 12), _train(config, 12, seed=1)
    assert first == second
    assert first != other


# -- poses -------------------------------------------------------------------------------------------------------------


def test_refinement_finds_the_pose_of_a_photo() -> None:
    """Photos rendered from known poses, trained on from a wrong one, on a field without finer detail than the error."""
    config = tiny_config({"hash_levels": 2, "base_resolution": 3}, {"samples": 32}, max_level=0, node_resolution=6)
    config.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3", trans_l2_penalty=0.0, rot_l2_penalty=0.0)
    model = scrambled(tiny_model(config, active=0), by=0.5).train()
    (pose,) = model.get_param_groups()["camera_opt"]

    def render(step: int) -> Tensor:
        torch.manual_seed(step)  # of the samples along the rays
        return model(ray_batch(256, seed=step)[0])["rgb"]

    photos = [render(step).detach() for step in range(40)]
    wrong = torch.tensor([0.04, -0.03, 0.02, 0.02, 0.03, -0.02])
    pose.data[0] = wrong
    optimizer = torch.optim.Adam([pose], lr=3e-3)
    for step, photo in enumerate(photos):
        optimizer.zero_grad()
        (render(step) - photo).square().mean().backward()
        assert pose.grad[1:].abs().max() < 1e-4 * pose.grad[0].abs().max(), "poses that are right stay so"
        optimizer.step()
    assert pose.data[0].norm() < 0.25 * wrong.norm()


def test_refined_poses_keep_full_precision_under_autocast() -> None:
    """Half precision would turn the rays by pixels."""
    config = tiny_config()
    config.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3")
    model = tiny_model(config).train()
    with torch.no_grad():
        model.camera_optimizer.pose_adjustment += 0.01
    directions = []
    for half in (False, True):
        rays, _ = ray_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            model(rays)
        directions.append(rays.directions)
    assert directions[1].dtype == torch.float32 and torch.equal(*directions)
