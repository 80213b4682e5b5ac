"""The trainer on a tiny pipeline: stops, resumption, settings, optimizers per octree level."""

import os
import signal

import pytest
import torch
from nerfstudio.configs.base_config import (
    MachineConfig,
)
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import Trainer
from nerfstudio.scripts import train as ns_train
from tiny_trainer import STEPS, TinyPipeline, run, steps_saved, tiny_config

from infnerf_ns.errors import InputError
from infnerf_ns.training import checkpoints
from infnerf_ns.training.level_groups import expand_optimizers

pytestmark = pytest.mark.usefixtures("quiet_writers")


def test_mixed_precision_takes_bfloat16_without_a_grad_scaler(tmp_path, monkeypatch):
    """Where the GPU has it. nerfstudio allows mixed precision on CUDA alone; here its answer stands in for a GPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation)
    original = Trainer.__init__

    def with_mixed_precision(self, *arguments, **settings):
        original(self, *arguments, **settings)
        self.mixed_precision = True

    monkeypatch.setattr(Trainer, "__init__", with_mixed_precision)
    types = []
    computed = TinyPipeline.get_train_loss_dict

    def recorded(self, step):
        types.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return computed(self, step)

    monkeypatch.setattr(TinyPipeline, "get_train_loss_dict", recorded)
    trainer, code = run(tiny_config(tmp_path))
    assert code == 0 and types == [torch.bfloat16] * STEPS
    assert not trainer.grad_scaler.is_enabled()


def test_a_run_ends_with_the_two_newest_checkpoints_and_says_how_to_look_at_it(tmp_path, capsys):
    trainer, code = run(tiny_config(tmp_path))
    assert code == 0 and list(trainer.pipeline.losses) == list(range(STEPS))
    assert steps_saved(trainer) == [STEPS - 1, 10]
    output = capsys.readouterr().out
    for command in ("ns-viewer", "ns-eval", "ns-render"):
        assert f"{command}" in output and f"--load-config {tmp_path}/test/tiny/run/config.yml" in output


def test_ctrl_c_finishes_the_step_saves_and_exits_with_130(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    trainer, code = run(tiny_config(tmp_path, {"signal_in_training": 6}))
    assert code == 130 and list(trainer.pipeline.losses)[-1] == 6
    assert steps_saved(trainer) == [6, 5]
    assert f"--load-dir {tmp_path}/test/tiny/run" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_during_an_evaluation_ends_it_saves_and_exits_with_143(tmp_path):
    trainer, code = run(tiny_config(tmp_path, {"signal_in_evaluation": 6}))
    assert code == 143 and trainer.pipeline.evaluated == [3]
    assert steps_saved(trainer) == [6, 5]


def test_a_stop_during_the_step_before_an_evaluation_skips_the_evaluation(tmp_path):
    trainer, _ = run(tiny_config(tmp_path, {"signal_in_training": 6}))
    assert trainer.pipeline.evaluated == [3]


def test_a_second_ctrl_c_exits_at_once(tmp_path):
    config = tiny_config(tmp_path)
    trainer = config.setup()
    with trainer._signals, pytest.raises(SystemExit) as stop:
        trainer._phase = "training"
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 130


def test_a_stop_during_setup_ends_with_one_line(tmp_path, capsys):
    trainer = tiny_config(tmp_path).setup()
    with trainer._signals, pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143 and "nothing to save" in capsys.readouterr().out


def test_ctrl_c_while_the_finished_training_waits_for_the_viewer_is_a_normal_end(tmp_path):
    trainer = tiny_config(tmp_path).setup()
    trainer._phase = "waiting"
    with trainer._signals, pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.code == 0


def test_a_stopped_and_resumed_run_is_the_uninterrupted_run(tmp_path):
    """Same losses step by step: parameters, Adam's moments, learning rates and random numbers all continue."""
    whole, _ = run(tiny_config(tmp_path / "whole"))
    stopped, _ = run(tiny_config(tmp_path / "stopped", {"signal_in_training": 6}))
    resumed, code = run(tiny_config(tmp_path / "resumed", load_dir=stopped.base_dir), seed=99)
    assert code == 0
    assert {**stopped.pipeline.losses, **resumed.pipeline.losses} == whole.pipeline.losses
    for name, parameter in whole.pipeline.model.items():
        assert torch.equal(parameter, resumed.pipeline.model[name])
    assert steps_saved(resumed) == steps_saved(whole)


def test_max_num_iterations_is_the_total_and_a_finished_run_says_so(tmp_path):
    done, _ = run(tiny_config(tmp_path / "a"))
    with pytest.raises(
        InputError, match=f"--max-num-iterations {STEPS}: it is the total .* has done {STEPS} steps already"
    ):
        run(tiny_config(tmp_path / "b", load_dir=done.base_dir))
    longer, _ = run(tiny_config(tmp_path / "c", load_dir=done.base_dir, max_num_iterations=STEPS + 3))
    assert list(longer.pipeline.losses) == [STEPS, STEPS + 1, STEPS + 2]
    assert longer.config.max_num_iterations == STEPS + 3


def test_resuming_another_model_is_one_line(tmp_path):
    done, _ = run(tiny_config(tmp_path / "a", max_num_iterations=6))
    path = checkpoints.list_checkpoints(done.checkpoint_dir)[0]
    state = torch.load(path)
    state["pipeline"]["model.grids_2"] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(InputError, match="parameters are with model.grids_2"):
        run(tiny_config(tmp_path / "b", load_dir=done.base_dir))


def test_the_config_of_a_resumed_run_does_not_name_the_old_runs_step_to_ns_eval(tmp_path):
    """Regression: --load-step is stored in config.yml; nerfstudio then looks for that step in the new run's folder."""
    done, _ = run(tiny_config(tmp_path / "a", save_only_latest_checkpoint=False))
    resumed, _ = run(tiny_config(tmp_path / "b", load_dir=done.base_dir, load_step=5))
    assert list(resumed.pipeline.losses)[0] == 6
    assert resumed.config.load_step == 5
    resumed.config.get_checkpoint_dir()
    assert resumed.config.load_step == STEPS - 1


def test_how_often_a_run_is_evaluated_does_not_change_what_it_learns(tmp_path):
    often, _ = run(tiny_config(tmp_path / "often", steps_per_eval_batch=2))
    never, _ = run(tiny_config(tmp_path / "never", steps_per_eval_batch=0))
    assert often.pipeline.evaluated and not never.pipeline.evaluated
    assert often.pipeline.losses == never.pipeline.losses


def test_learning_rate_flags_hold_for_a_resumed_run_too(tmp_path):
    stopped, _ = run(tiny_config(tmp_path / "a", {"signal_in_training": 6}))
    config = tiny_config(tmp_path / "b", load_dir=stopped.base_dir)
    config.optimizers = {
        kind: {**group, "optimizer": AdamOptimizerConfig(lr=1e-3)} for kind, group in config.optimizers.items()
    }
    resumed = config.setup()
    resumed.setup()
    for name, optimizer in resumed.optimizers.optimizers.items():
        scheduler = resumed.optimizers.schedulers[name]
        assert scheduler.last_epoch == 7
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * scheduler.lr_lambdas[0](7))


def test_gradients_are_accumulated_by_kind_or_by_group(tmp_path):
    trainer = tiny_config(tmp_path, gradient_accumulation_steps={"grids": 4, "grids_1": 2}).setup()
    trainer.setup()
    before = {name: parameter.detach().clone() for name, parameter in trainer.pipeline.model.items()}
    moved = []
    for step in range(4):
        trainer.train_iteration(step)
        moved.append(
            {name for name, parameter in trainer.pipeline.model.items() if not torch.equal(parameter, before[name])}
        )
    assert moved == [{"decoders_0"}, {"decoders_0", "grids_1"}, {"decoders_0", "grids_1"}, set(before)]
    with pytest.raises(
        InputError, match="--gradient-accumulation-steps nonsense: there is no such group; there are grids"
    ):
        tiny_config(tmp_path, gradient_accumulation_steps={"nonsense": 2}).setup()


@pytest.mark.parametrize(
    "machine, line",
    [
        ({"num_devices": 2}, "--machine.num-devices 2: training on several devices is not built"),
        ({"num_devices": 0}, "--machine.num-devices 0: allowed is 1"),
        ({"num_devices": -1, "num_machines": -1}, "2 settings are wrong"),
        ({"num_machines": 3}, "--machine.num-machines 3: training on several devices is not built"),
        ({"machine_rank": 1}, "--machine.machine-rank 1: there is one machine, its rank is 0"),
        (
            {"dist_url": "tcp://10.0.0.1:8686"},
            "--machine.dist-url tcp://10.0.0.1:8686: training on several machines is",
        ),
        ({"seed": -1}, "--machine.seed -1: allowed is 0 to 4294967295"),
        ({"seed": 2**32}, "--machine.seed 4294967296: allowed is 0 to 4294967295"),
        ({"device_type": "mps"}, "--machine.device-type mps: torch .* finds no such device here"),
    ],
)
def test_ns_train_refuses_a_machine_before_it_prints_saves_or_starts_anything(
    tmp_path, capsys, monkeypatch, machine, line
):
    """Regression: it started a process per device, which ended in a traceback after minutes."""
    started = []
    monkeypatch.setattr(ns_train, "launch", lambda **_: started.append(True))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=line):
        ns_train.main(tiny_config(tmp_path, machine=MachineConfig(**{"device_type": "cpu", **machine})))
    assert not started and capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_ns_train_starts_with_one_device(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ns_train, "launch", lambda **_: started.append(True))
    ns_train.main(tiny_config(tmp_path))
    assert started and (tmp_path / "test" / "tiny" / "run" / "config.yml").exists()


def test_wrong_settings_are_named_as_flags_before_anything_is_built(tmp_path, capsys):
    with pytest.raises(InputError, match="--steps-per-save -1: allowed is at least 0"):
        tiny_config(tmp_path, steps_per_save=-1).setup()
    with pytest.raises(InputError, match="--stability.max-bad-steps 0: allowed is 1 to 1000"):
        config = tiny_config(tmp_path)
        config.stability.max_bad_steps = 0
        config.setup()
    with pytest.raises(InputError, match="--load-dir .*nowhere: there is no such folder"):
        tiny_config(tmp_path, load_dir=tmp_path / "nowhere").setup()
    config = tiny_config(tmp_path)
    config.optimizers["grids"]["optimizer"].lr = 0.5
    config.setup()
    assert "--optimizers.grids.optimizer.lr 0.5 is unusually large" in capsys.readouterr().err


def test_optimizers_are_expanded_per_octree_level(tmp_path):
    optimizers = tiny_config(tmp_path).optimizers
    settings = {"level_lr_factor": 0.5, "total_steps": STEPS}
    expanded = expand_optimizers(optimizers, ["grids_0", "grids_3", "decoders_1"], **settings)
    assert expanded["grids_0"]["optimizer"].lr == 1e-2
    assert expanded["grids_3"]["optimizer"].lr == pytest.approx(1e-2 / 8)
    assert expanded["grids_3"]["scheduler"].lr_final == pytest.approx(1e-4 / 8)
    assert expanded["grids_3"]["scheduler"].max_steps == STEPS
    assert optimizers["grids"]["optimizer"].lr == 1e-2
    with pytest.raises(InputError, match="no optimizer for the parameter group 'fields'"):
        expand_optimizers(optimizers, ["fields"], **settings)
