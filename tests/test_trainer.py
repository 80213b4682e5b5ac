"""The trainer on a tiny pipeline: stops, resumption, NaN recovery, damaged checkpoints, optimizers per octree level.

The pipeline fits a matrix to random data and has the parameter groups of an octree with two levels. So these tests say
nothing about NeRFs; they say that the loop around them can be relied on.
"""

import copy
import os
import signal
import stat
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from nerfstudio.configs.base_config import (
    InstantiateConfig,
    LocalWriterConfig,
    LoggingConfig,
    MachineConfig,
    ViewerConfig,
)
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import eval_utils
from torch import nn

from infnerf_ns.errors import InputError
from infnerf_ns.torch_compat import allow_numpy_scalars
from infnerf_ns.training import checkpoints
from infnerf_ns.training.level_groups import DecayToEndSchedulerConfig, expand_optimizers
from infnerf_ns.training.trainer import InfNeRFTrainerConfig

allow_numpy_scalars()
STEPS = 12


@dataclass
class TinyPipelineConfig(InstantiateConfig):
    _target: type = field(default_factory=lambda: TinyPipeline)
    nan_from: int = 10**9
    """Losses are NaN from this step ..."""
    nan_steps: int = 0
    """... for so many steps."""
    signal_in_training: int = -1
    """SIGINT arrives while this step trains."""
    signal_in_evaluation: int = -1
    """SIGTERM arrives while the evaluation after this step runs."""
    datamanager: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(data=None))


class TinyPipeline(nn.Module):
    def __init__(self, config: TinyPipelineConfig, **kwargs) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(3, 3)) for name in ("grids_0", "grids_1", "decoders_0")}
        )
        self.datamanager = SimpleNamespace(train_dataset=[0], eval_dataset=[0], get_train_rays_per_batch=lambda: 1)
        self.losses: dict[int, float] = {}
        self.evaluated: list[int] = []

    def get_param_groups(self):
        return {name: [parameter] for name, parameter in self.model.items()}

    def get_training_callbacks(self, attributes):
        return []

    def get_train_loss_dict(self, step):
        data = torch.randn(8, 3)
        loss = ((data @ self.model["grids_0"] @ self.model["grids_1"] @ self.model["decoders_0"] - data) ** 2).mean()
        self.losses[step] = loss.item()
        if step == self.config.signal_in_training:
            os.kill(os.getpid(), signal.SIGINT)
        if self.config.nan_from <= step < self.config.nan_from + self.config.nan_steps:
            loss = loss * float("nan")
        return None, {"loss": loss}, {}

    def get_eval_loss_dict(self, step):
        if step == self.config.signal_in_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        self.evaluated.append(step)
        torch.randn(3)  # as the draw of a batch of held-out pixels
        return None, {"loss": torch.zeros(1)}, {}

    def load_pipeline(self, loaded_state, step):
        self.load_state_dict(loaded_state)


@pytest.fixture(autouse=True)
def quiet_writers(monkeypatch):
    """nerfstudio's writers are process-wide: this run's must not see an earlier run's."""
    from nerfstudio.utils import writer

    monkeypatch.setattr(writer, "EVENT_WRITERS", [])
    monkeypatch.setattr(writer, "EVENT_STORAGE", [])
    monkeypatch.setattr(writer, "GLOBAL_BUFFER", {})


def tiny_config(folder: Path, pipeline: dict | None = None, **settings) -> InfNeRFTrainerConfig:
    group = {
        "optimizer": AdamOptimizerConfig(lr=1e-2),
        "scheduler": DecayToEndSchedulerConfig(lr_final=1e-4),
    }
    defaults = dict(
        output_dir=folder,
        method_name="tiny",
        experiment_name="test",
        timestamp="run",
        machine=MachineConfig(device_type="cpu"),
        logging=LoggingConfig(local_writer=LocalWriterConfig(enable=False), profiler="none"),
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="tensorboard",
        max_num_iterations=STEPS,
        steps_per_save=5,
        steps_per_eval_batch=3,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        optimizers={"grids": group, "decoders": group},
    )
    return InfNeRFTrainerConfig(pipeline=TinyPipelineConfig(**(pipeline or {})), **{**defaults, **settings})


def run(config: InfNeRFTrainerConfig, seed: int = 3):
    """Train; returns the trainer and the exit code (0 if train() returned)."""
    torch.manual_seed(seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    try:
        trainer.train()
    except SystemExit as stop:
        return trainer, stop.code
    return trainer, 0


def steps_saved(trainer) -> list[int]:
    return [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(trainer.checkpoint_dir)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


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


def test_resuming_passes_over_a_truncated_checkpoint(tmp_path, capsys):
    done, _ = run(tiny_config(tmp_path / "a"))
    truncate(checkpoints.checkpoint_path(done.checkpoint_dir, STEPS - 1))
    resumed, code = run(tiny_config(tmp_path / "b", load_dir=done.checkpoint_dir))
    assert code == 0 and list(resumed.pipeline.losses) == [11]
    assert "is damaged (truncated?); step-000000010.ckpt is used instead" in capsys.readouterr().err


def test_resuming_another_model_is_one_line(tmp_path):
    done, _ = run(tiny_config(tmp_path / "a", max_num_iterations=6))
    path = checkpoints.list_checkpoints(done.checkpoint_dir)[0]
    state = torch.load(path)
    state["pipeline"]["model.grids_2"] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(InputError, match="parameters are with model.grids_2"):
        run(tiny_config(tmp_path / "b", load_dir=done.base_dir))


def test_ns_eval_loads_the_checkpoint_before_a_truncated_one_from_a_read_only_run(tmp_path, capsys):
    """What ns-eval, ns-render, ns-export and ns-viewer do: config.yml, then nerfstudio's own loading."""
    trainer, _ = run(tiny_config(tmp_path))
    trainer.config.save_config()
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


def test_the_config_of_a_resumed_run_does_not_name_the_old_runs_step_to_ns_eval(tmp_path):
    """Regression: --load-step is stored in config.yml; nerfstudio then looks for that step in the new run's folder."""
    done, _ = run(tiny_config(tmp_path / "a", save_only_latest_checkpoint=False))
    resumed, _ = run(tiny_config(tmp_path / "b", load_dir=done.base_dir, load_step=5))
    assert list(resumed.pipeline.losses)[0] == 6
    assert resumed.config.load_step == 5
    resumed.config.get_checkpoint_dir()
    assert resumed.config.load_step == STEPS - 1


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


def test_several_devices_are_refused(tmp_path):
    with pytest.raises(InputError, match="--machine.num-devices"):
        tiny_config(tmp_path, machine=MachineConfig(device_type="cpu", num_devices=2)).setup()


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
    assert "No space left on device" in capsys.readouterr().err


def test_a_run_whose_every_checkpoint_failed_ends_with_an_error(tmp_path, monkeypatch):
    def full_disk(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    trainer, code = run(tiny_config(tmp_path))
    assert "no checkpoint could be written" in str(code)


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
