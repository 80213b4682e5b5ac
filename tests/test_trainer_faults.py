"""The trainer on a tiny pipeline: NaN recovery, damaged checkpoints and those that cannot be written."""

import copy
import stat

import pytest
import torch
import yaml
from nerfstudio.utils import eval_utils
from tiny_trainer import STEPS, TinyPipeline, TinyPipelineConfig, run, steps_saved, tiny_config, truncate

from infnerf_ns.errors import InputError
from infnerf_ns.kernels import bank_gradient, enable_bank_gradient
from infnerf_ns.training import checkpoints, stability
from infnerf_ns.training.level_groups import DecayToEndSchedulerConfig, accumulation_problems, optimizer_problems
from infnerf_ns.training.optimizer import NodeAdamOptimizerConfig

pytestmark = pytest.mark.usefixtures("quiet_writers")


def test_resuming_passes_over_a_truncated_checkpoint(tmp_path, capsys):
    done, _ = run(tiny_config(tmp_path / "a"))
    truncate(checkpoints.checkpoint_path(done.checkpoint_dir, STEPS - 1))
    resumed, code = run(tiny_config(tmp_path / "b", load_dir=done.checkpoint_dir))
    assert code == 0 and list(resumed.pipeline.losses) == [11]
    assert "is damaged (truncated?); step-000000010.ckpt is used instead" in capsys.readouterr().err


def test_ns_eval_loads_the_checkpoint_before_a_truncated_one_from_a_read_only_run(tmp_path, capsys):
    """What ns-eval, ns-render, ns-export and ns-viewer do: config.yml, then nerfstudio's own loading."""
    config = tiny_config(tmp_path)
    config.save_config()
    trainer, _ = run(config)
    truncate(checkpoints.checkpoint_path(trainer.checkpoint_dir, STEPS - 1))
    trainer.checkpoint_dir.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        config = yaml.load((trainer.base_dir / "config.yml").read_text(), Loader=yaml.Loader)
        config.load_dir = config.get_checkpoint_dir()
        _, step = eval_utils.eval_load_checkpoint(config, TinyPipeline(TinyPipelineConfig()))
    finally:
        trainer.checkpoint_dir.chmod(stat.S_IRWXU)
    assert step == 10
    assert "is damaged" in capsys.readouterr().err


def test_single_nan_losses_are_skipped_and_change_nothing(tmp_path, capsys):
    trainer, code = run(tiny_config(tmp_path, {"nan_from": 4, "nan_steps": 2}))
    assert code == 0 and trainer._guard.skipped == 2 and trainer._guard.restores == 0
    assert all(torch.isfinite(parameter).all() for parameter in trainer.pipeline.model.values())
    assert "step 4: the loss or a gradient is not finite, the step is skipped" in capsys.readouterr().err


def test_an_infinite_gradient_is_skipped_too(tmp_path):
    config = tiny_config(tmp_path, max_num_iterations=3)
    trainer = config.setup()
    trainer.setup()
    before = {name: parameter.detach().clone() for name, parameter in trainer.pipeline.model.items()}
    trainer.pipeline.model["grids_0"].register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_iteration(0)
    assert trainer._guard.skipped == 1
    for name, parameter in trainer.pipeline.model.items():
        assert torch.equal(parameter, before[name])


def test_nan_losses_in_a_row_restore_the_last_checkpoint_with_half_the_learning_rate(tmp_path, capsys):
    """The checkpoint is of step 5, step 6 trains, steps 7 and 8 are NaN."""
    config = tiny_config(tmp_path, {"nan_from": 7, "nan_steps": 2}, save_only_latest_checkpoint=False)
    config.stability.max_bad_steps = 2
    trainer = config.setup()
    trainer.setup()
    train, held = trainer.pipeline.get_train_loss_dict, {}

    def watched(step):
        optimizers = trainer.optimizers.optimizers.items()
        held[step] = copy.deepcopy((trainer.pipeline.state_dict(), {name: x.state_dict() for name, x in optimizers}))
        return train(step)

    trainer.pipeline.get_train_loss_dict = watched
    trainer.train()
    saved = torch.load(checkpoints.checkpoint_path(trainer.checkpoint_dir, 5))
    for name, value in saved["pipeline"].items():
        assert torch.equal(held[9][0][name], value) and not torch.equal(held[8][0][name], value), name
    for name, state in saved["optimizers"].items():
        for moment, value in state["state"][0].items():
            before, after = (held[step][1][name]["state"][0][moment] for step in (8, 9))
            assert torch.equal(after, value) and not torch.equal(before, value), (name, moment)
    whole, _ = run(tiny_config(tmp_path / "whole"))
    assert trainer._guard.restores == 1 and trainer._guard.skipped == 2
    assert "restored" in capsys.readouterr().err
    for name in trainer.optimizers.optimizers:
        rate, expected = (run.optimizers.optimizers[name].param_groups[0]["lr"] for run in (trainer, whole))
        assert rate == pytest.approx(expected / 2)
    resumed, _ = run(tiny_config(tmp_path / "b", load_dir=trainer.base_dir, max_num_iterations=STEPS + 1))
    assert resumed._lr_scale == 0.5


def test_a_last_step_with_a_nan_loss_does_not_cost_the_steps_before(tmp_path):
    trainer, code = run(tiny_config(tmp_path, {"nan_from": STEPS - 1, "nan_steps": 1}))
    assert code == 0 and steps_saved(trainer)[0] == STEPS - 1


@pytest.mark.parametrize("poisoned_at", [7, STEPS - 1])
def test_a_nan_in_a_parameter_is_found_at_the_next_checkpoint(tmp_path, poisoned_at, capsys):
    """Some parameters reach no loss while they are NaN (nerfstudio's weights end in nan_to_num)."""
    trainer = tiny_config(tmp_path, max_num_iterations=STEPS).setup()
    trainer.setup()
    train = trainer.pipeline.get_train_loss_dict

    def poison(step):
        if step == poisoned_at:
            trainer.pipeline.model["grids_0"].data[0, 0] = float("nan")
        _, losses, metrics = train(step)
        return None, {"loss": losses["loss"].nan_to_num()}, metrics

    trainer.pipeline.get_train_loss_dict = poison
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.pipeline.model.values())
    output = capsys.readouterr()
    assert "some parameter is not finite" in output.err and "restored" in output.err
    if poisoned_at == STEPS - 1:
        assert steps_saved(trainer) == [10, 5] and "the checkpoint is of step 10" in output.out


def test_nan_before_the_first_checkpoint_ends_with_the_remedy(tmp_path):
    config = tiny_config(tmp_path, {"nan_from": 0, "nan_steps": 100})
    trainer = config.setup()
    trainer.setup()
    with pytest.raises(InputError, match="stays NaN or infinite before the first checkpoint; lower --optimizers"):
        trainer.train()


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    original = torch.save

    def full_disk(state, file):
        if state["step"] == 10:
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    trainer, code = run(tiny_config(tmp_path))
    assert code == 0 and steps_saved(trainer) == [STEPS - 1, 5]
    assert "the disk is full: a checkpoint needs" in capsys.readouterr().err


def test_a_run_whose_every_checkpoint_failed_ends_with_an_error(tmp_path, monkeypatch):
    def full_disk(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    trainer, code = run(tiny_config(tmp_path))
    assert "its last weights could not be written to" in str(code)


def test_a_gradient_that_is_not_finite_in_a_large_bank_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    """Regression: banks above 2**20 entries were not looked at, and stayed NaN; the group is in the warning."""
    monkeypatch.setattr(stability, "LARGEST_CHECKED_BANK", 0)
    config = tiny_config(tmp_path, max_num_iterations=4)
    config.optimizers["grids"] = {"optimizer": NodeAdamOptimizerConfig(lr=1e-2, max_norm=1.0), "scheduler": None}
    trainer = config.setup()
    trainer.setup()
    bank = trainer.pipeline.model["grids_1"]
    enable_bank_gradient(bank)
    train = trainer.pipeline.get_train_loss_dict

    def poisoned(step):
        held = bank_gradient(bank)
        held.grad[0, 1] = float("nan") if step == 2 else 1.0
        held.touched[0], held.rows[0] = 1, 1
        return train(step)

    trainer.pipeline.get_train_loss_dict = poisoned
    for step in range(4):
        trainer.train_iteration(step)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.pipeline.model.values())
    assert all(torch.isfinite(value).all() for value in trainer.optimizers.optimizers["grids_1"].state[bank].values())
    said = capsys.readouterr().err
    assert said.count("are left out") == 1 and trainer._guard.skipped == 1
    assert "step 2: 1 entries of the gradient of grids_1 are not finite and are left out" in said


def test_the_group_of_an_infinite_gradient_is_named(tmp_path, capsys):
    trainer = tiny_config(tmp_path, max_num_iterations=3).setup()
    trainer.setup()
    trainer.pipeline.model["grids_0"].register_hook(lambda gradient: gradient * float("inf"))
    trainer.train_iteration(0)
    assert "the loss or a gradient is not finite (grids_0), the step is skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, name, value, said",
    [
        ("optimizer", "max_norm", -1.0, "--optimizers.grids.optimizer.max-norm -1.0: allowed is above 0"),
        ("optimizer", "max_norm", 0.0, "max-norm 0.0: allowed is above 0"),
        ("optimizer", "max_norm", float("nan"), "max-norm nan"),
        ("optimizer", "lr", float("inf"), "optimizer.lr inf: allowed is above 0 and below 10"),
        ("optimizer", "lr", "x", "optimizer.lr x: "),
        ("optimizer", "eps", 0.0, "optimizer.eps 0.0: allowed is above 0"),
        ("optimizer", "betas", (0.9, 1.0), "optimizer.betas 0.9 1.0: allowed is 0 to below 1"),
        ("optimizer", "betas", (0.9,), "betas 0.9: "),
        ("scheduler", "warmup_steps", -1, "--optimizers.grids.scheduler.warmup-steps -1: allowed is a whole number"),
        ("scheduler", "warmup_steps", 200, "scheduler.max-steps 100: allowed is more than the 200 of warmup-steps"),
        ("scheduler", "lr_final", 0.0, "scheduler.lr-final 0.0: allowed is above 0"),
        ("scheduler", "lr_pre_warmup", float("nan"), "scheduler.lr-pre-warmup nan: "),
    ],
)
def test_settings_of_optimizers_that_cannot_work_are_named(tmp_path, part, name, value, said):
    """Regression: a max_norm of -1 turned descent into ascent."""
    config = tiny_config(tmp_path)
    scheduler = DecayToEndSchedulerConfig(lr_final=1e-4, max_steps=100)
    group = {"optimizer": NodeAdamOptimizerConfig(), "scheduler": scheduler}
    assert optimizer_problems("grids", group) == []
    setattr(group[part], name, value)
    assert any(said in line for line in optimizer_problems("grids", group))
    config.optimizers = {**config.optimizers, "grids": group}
    with pytest.raises(InputError):
        config.setup()


@pytest.mark.parametrize("steps", [{"grids": "x"}, {"grids": 0}, {"grids": 1.5}, {"grids": True}, {"grids": None}, 3])
def test_steps_of_accumulation_are_whole_numbers(tmp_path, steps):
    """Regression: a bare TypeError."""
    with pytest.raises(InputError, match="--gradient-accumulation-steps|settings are wrong"):
        tiny_config(tmp_path, gradient_accumulation_steps=steps).setup()
    assert accumulation_problems(steps, ["grids"])
