"""nerfstudio's trainer made reliable: safe checkpoints, clean stops, exact resumption, NaN recovery.

It also gives each octree level its own optimizer, from one configuration per kind of parameter.
"""

import functools
import shlex
import signal
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, cast

import torch
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TRAIN_INTERATION_OUTPUT, Trainer, TrainerConfig
from nerfstudio.utils import profiler, writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.rich_utils import CONSOLE
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from infnerf_ns.errors import InputError
from infnerf_ns.streaming.packing import CHECKSUMS
from infnerf_ns.streaming.page_files import PAGES
from infnerf_ns.threads import MeasuredThreads, fix_threads, thread_problems
from infnerf_ns.training import checkpoints
from infnerf_ns.training.level_groups import expand_optimizers, level_group, optimizer_problems
from infnerf_ns.training.stability import StabilityConfig, StepGuard, gradients_finite, values_finite
from infnerf_ns.training.stopping import StopSignals, exit_code, say
from infnerf_ns.validation import Range, Report, enforce, validate_config, warn

_LARGEST_SEED = 2**32 - 1
"""That NumPy takes."""


@dataclass
class InfNeRFTrainerConfig(TrainerConfig):
    """nerfstudio's settings for training, where these two mean something else:

    - ``max_num_iterations`` is the *total*, also after ``--load-dir``: the same command with ``--load-dir`` finishes an
      interrupted run. (nerfstudio would train that many steps more; growth and learning rates are planned for the
      total.)
    - ``save_only_latest_checkpoint`` keeps the *two* newest, so that one is left should the newest be damaged.

    ``load_dir`` may name a run's folder, its nerfstudio_models folder or its config.yml.
    """

    _target: type = field(default_factory=lambda: InfNeRFTrainer)
    level_lr_factor: Annotated[float, Range(0.1, 10.0)] = 1.0
    """Learning rate of the parameters of octree level L = learning rate of their kind * level_lr_factor ** L."""
    threads: int = 0
    """Threads that compute on the CPU; 0: as many as are fastest, which is measured while training and depends on what
    else the machine does. The result does not depend on it."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """What happens when the loss or a gradient is NaN or infinite."""

    def get_checkpoint_dir(self) -> Path:
        """The checkpoint folder; also points ``load_step`` at the newest whole file in it, where there is one, and the
        model at the folder of its pages, should the run be packed.

        ns-eval, ns-render, ns-export and ns-viewer call this right before they load. Left to themselves they take the
        file with the highest step even if it is truncated. Nothing is written or moved, so a read-only run works too.
        """
        folder = super().get_checkpoint_dir()
        whole = checkpoints.whole_checkpoints(folder)
        if whole and (self.load_step is None or checkpoints.checkpoint_path(folder, self.load_step) not in whole):
            self.load_step = checkpoints.checkpoint_step(whole[0])
        streaming = getattr(getattr(self.pipeline, "model", None), "streaming", None)
        if streaming is not None:
            streaming.pages = self.get_base_dir() / PAGES
        return folder

    def check(self) -> list[str]:
        """Values that cannot work; one line each, naming the flag."""
        problems = thread_problems(self.threads)
        if self.max_num_iterations < 1:
            problems.append(f"--max-num-iterations {self.max_num_iterations}: allowed is at least 1")
        for name in ("steps_per_save", "steps_per_eval_batch", "steps_per_eval_image", "steps_per_eval_all_images"):
            if getattr(self, name) < 0:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: allowed is at least 0 (0: never)")
        for name, steps in self.gradient_accumulation_steps.items():
            match = level_group(name)
            if name not in self.optimizers and (match is None or match["kind"] not in self.optimizers):
                problems.append(
                    f"--gradient-accumulation-steps {name}: there is no such group; there are"
                    f" {', '.join(self.optimizers)}, each also for one octree level, as in grids_2"
                )
            if steps < 1:
                problems.append(f"--gradient-accumulation-steps {name} {steps}: allowed is at least 1")
        for kind, group in self.optimizers.items():
            problems += optimizer_problems(kind, group)
        return problems + _machine_problems(self.machine)

    def print_to_terminal(self) -> None:
        """Check the settings, then print them.

        It is the first that ns-train asks of a configuration, also of one from ``--load-config``; it goes on to write a
        config.yml, and to start a process per device if there are several.

        Raises:
            InputError: some setting is wrong.
        """
        enforce(Report(validate_config(self).problems + _device_problems(self.machine)))
        super().print_to_terminal()

    def advise(self) -> list[str]:
        """Legal values that are rarely wanted."""
        advice = [
            f"--optimizers.{kind}.optimizer.lr {group['optimizer'].lr} is unusually large (above 0.1)"
            for kind, group in self.optimizers.items()
            if group["optimizer"].lr > 0.1
        ]
        octree, growth = (getattr(getattr(self.pipeline, "model", None), name, None) for name in ("octree", "growth"))
        deepest = 0 if octree is None else {"root": 0, "full": octree.full_level}.get(octree.start, octree.max_level)
        starts = octree.level_start_steps * deepest if octree is not None else 0
        if growth is not None and growth.every and growth.start_step > growth.end_share * self.max_num_iterations:
            advice.append(
                f"--max-num-iterations {self.max_num_iterations}: the tree never grows, as its first round is due at"
                f" step {growth.start_step}, and none after {growth.end_share:g} of the training; lower"
                " --pipeline.model.growth.start-step"
            )
        if starts and starts >= self.max_num_iterations:
            last = (self.max_num_iterations - 1) // octree.level_start_steps
            advice.append(
                f"--max-num-iterations {self.max_num_iterations}: octree levels above {last} never start; lower"
                " --pipeline.model.octree.level-start-steps or --pipeline.model.octree.max-level"
            )
        return advice


def _machine_problems(machine: MachineConfig) -> list[str]:
    problems = []
    for name in ("num_devices", "num_machines"):
        count, flag = getattr(machine, name), f"--machine.{name.replace('_', '-')}"
        if count > 1:
            problems.append(f"{flag} {count}: training on several devices is not built; leave it at 1")
        if count < 1:
            problems.append(f"{flag} {count}: allowed is 1")
    if machine.machine_rank != 0:
        problems.append(f"--machine.machine-rank {machine.machine_rank}: there is one machine, its rank is 0")
    if machine.dist_url != "auto":
        problems.append(f"--machine.dist-url {machine.dist_url}: training on several machines is not built")
    if not 0 <= machine.seed <= _LARGEST_SEED:
        problems.append(f"--machine.seed {machine.seed}: allowed is 0 to {_LARGEST_SEED}")
    return problems


def _device_problems(machine: MachineConfig) -> list[str]:
    """A device that is not there. No part of the configuration's own check: it may be for another machine."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there.get(machine.device_type, True):
        return []
    return [
        f"--machine.device-type {machine.device_type}: torch {torch.__version__} finds no such device here; give"
        " --machine.device-type cpu, or install the driver and the torch that fit the device"
    ]


class _EvaluationStopped(Exception):
    """Raised by the signal handler to leave a running evaluation."""


class InfNeRFTrainer(Trainer):
    """Trains a pipeline whose parameter groups are named ``<kind>_<octree level>``.

    Args:
        config: validated here; wrong settings raise InputError before anything is loaded.
        local_rank: rank of this process on its machine.
        world_size: number of processes.
    """

    config: InfNeRFTrainerConfig

    def __init__(self, config: InfNeRFTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        enforce(validate_config(config))
        enforce(Report(_device_problems(config.machine)))
        self._candidates = _find_checkpoints_to_resume(config)
        requested_step = config.load_step
        with CONSOLE.capture() as said:
            super().__init__(config, local_rank, world_size)
        lines = said.get().splitlines(keepends=True)
        # nerfstudio says this of every training on a CPU.
        untrue = "" if config.mixed_precision else "Mixed precision is disabled for CPU training."
        CONSOLE.file.write("".join(line for line in lines if line.strip() != untrue))
        config.load_step = requested_step
        self._half_type: Optional[torch.dtype] = None  # torch's default for the device
        if self.mixed_precision and torch.cuda.is_bf16_supported(including_emulation=False):
            # bfloat16 has the range of float32, so nothing must be scaled: the grad scaler would visit every entry of
            # every bank in every step, a cost that grows with the tree.
            self._half_type = torch.bfloat16
            self.grad_scaler = GradScaler("cuda", enabled=config.use_grad_scaler)
        fix_threads(config.threads)
        self._threads = MeasuredThreads("trains", "a step", "--threads N")
        self._signals = StopSignals(self._on_stop_request)
        self._phase: Literal["setup", "training", "evaluating", "waiting"] = "setup"
        self.stop_training = False
        self._guard = StepGuard(config.stability)
        self._lr_scale = 1.0
        self._resumed_from: Optional[Path] = None
        self._resumed_random_state: Optional[dict[str, Any]] = None
        self._completed_step: Optional[int] = None
        self._saved_step: Optional[int] = None

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Build the pipeline, the optimizers and the viewer, and load the checkpoint to resume from. See nerfstudio."""
        with self._signals:
            super().setup(test_mode)
        if self._signals.received is not None:  # Python drops what is raised within some callbacks
            raise SystemExit(exit_code(self._signals.received))

    def setup_optimizers(self) -> Optimizers:
        """One optimizer per parameter group; the configuration names kinds, the model's groups are kinds per level."""
        groups = self.pipeline.get_param_groups()
        for name in groups:
            match = level_group(name)
            if match is not None and match["kind"] in self.gradient_accumulation_steps:
                self.gradient_accumulation_steps.setdefault(name, self.gradient_accumulation_steps[match["kind"]])
        expanded = expand_optimizers(
            self.config.optimizers,
            groups,
            level_lr_factor=self.config.level_lr_factor,
            total_steps=self.config.max_num_iterations,
        )
        return Optimizers(expanded, groups)

    def train(self) -> None:
        """Train up to ``max_num_iterations`` steps in total, then save and say how to look at the result.

        Raises:
            SystemExit: after Ctrl-C (130), SIGTERM (143) or SIGHUP (129), with everything saved.
        """
        total = self.config.max_num_iterations
        if self._resumed_random_state is not None:
            checkpoints.restore_random_state(self._resumed_random_state)
            self._resumed_random_state = None
        self._phase = "training"
        with self._signals:
            try:
                self.config.max_num_iterations = total - self._start_step  # nerfstudio's loop adds it to the start
                super().train()
            finally:
                self.config.max_num_iterations = total

    @profiler.time_function
    def train_iteration(self, step: int) -> TRAIN_INTERATION_OUTPUT:
        """One optimisation step; it is skipped if the loss or a gradient is not finite (see `StabilityConfig`)."""
        with self._threads.piece() if self.device == "cpu" else nullcontext():
            return self._step(step)

    def _step(self, step: int) -> TRAIN_INTERATION_OUTPUT:
        groups = list(self.optimizers.parameters)
        accumulation = self.gradient_accumulation_steps
        self.optimizers.zero_grad_some([group for group in groups if step % accumulation[group] == 0])

        with torch.autocast(self.device.split(":")[0], dtype=self._half_type, enabled=self.mixed_precision):
            _, loss_dict, metrics_dict = self.pipeline.get_train_loss_dict(step=step)
            loss = functools.reduce(torch.add, loss_dict.values())
        good = bool(torch.isfinite(loss))
        if good:
            cast(torch.Tensor, self.grad_scaler.scale(loss)).backward()
            # With mixed precision an infinite gradient is the grad scaler's everyday business: it skips such a step.
            good = self.grad_scaler.is_enabled() or gradients_finite(self._all_parameters())
        if self.config.log_gradients:
            metrics_dict.update(self._gradient_norms())

        scale = self.grad_scaler.get_scale()
        if good:
            due = [group for group in groups if step % accumulation[group] == accumulation[group] - 1]
            self.optimizers.optimizer_scaler_step_some(self.grad_scaler, due)
            self.grad_scaler.update()
        else:
            self.optimizers.zero_grad_all()
            warn(f"step {step}: the loss or a gradient is not finite, the step is skipped")
        if self._guard.record(good):
            self._restore_last_good(step)
        if scale <= self.grad_scaler.get_scale():  # a lowered scale means that the grad scaler skipped the step
            self.optimizers.scheduler_step_all(step)

        metrics_dict["skipped_steps"] = torch.tensor(float(self._guard.skipped))
        self._completed_step = step
        self.stop_training = self.stop_training or self._signals.received is not None
        return loss.detach(), {name: value.detach() for name, value in loss_dict.items()}, metrics_dict

    def eval_iteration(self, step: int) -> None:
        """Periodic evaluation; a stop request ends it early."""
        due = (
            self.config.steps_per_eval_batch,
            self.config.steps_per_eval_image,
            self.config.steps_per_eval_all_images,
        )
        if self._signals.received is not None or not any(step_check(step, every) for every in due):
            return
        random_state = checkpoints.random_state()  # how often a run is evaluated must not change what it learns
        try:
            try:
                self._phase = "evaluating"
                super().eval_iteration(step)
            finally:
                self._phase = "training"
                checkpoints.restore_random_state(random_state)
        except _EvaluationStopped:
            pass

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write the checkpoint of a step atomically; on failure warn and leave the older ones as they are.

        If a parameter is not finite, nothing is written and the run goes back to the checkpoint before.
        """
        if step == self._saved_step:
            return
        if not values_finite(self._all_parameters()):
            warn(f"step {step}: no checkpoint written, as some parameter is not finite")
            self._guard.restores += 1
            with self.train_lock:  # the viewer must not render half of it; nerfstudio saves without the lock
                self._restore_last_good(step)
            return
        state = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            "infnerf": {
                "random_state": checkpoints.random_state(),
                "lr_scale": self._lr_scale,
                "skipped_steps": self._guard.skipped,
            },
        }
        keep = checkpoints.KEPT_CHECKPOINTS if self.config.save_only_latest_checkpoint else None
        path = checkpoints.checkpoint_path(self.checkpoint_dir, step)
        failure = checkpoints.write_checkpoint(state, path, keep)
        if failure is None:
            self._saved_step = step
        else:
            warn(f"the checkpoint {path} could not be written ({failure}); older ones are untouched, training goes on")

    def _load_checkpoint(self) -> None:
        """Load the newest readable candidate, found at construction; nothing to do for a new run."""
        for path in self._candidates:
            state = checkpoints.read_checkpoint(path)
            if state is None:
                warn(f"the checkpoint {path} is damaged; the one before is used")
                continue
            self._check_steps_left(path, state["step"])
            self._load_state(state, path)
            extras = state.get("infnerf", {})
            self._resumed_random_state = extras.get("random_state")
            self._lr_scale = extras.get("lr_scale", 1.0)
            self._guard.skipped = extras.get("skipped_steps", 0)
            self._start_step = state["step"] + 1
            self._resumed_from = path
            print(f"infnerf: resumed from {path}; training goes on at step {self._start_step}", flush=True)
            return
        if self._candidates:
            raise InputError(f"none of the checkpoints in {self._candidates[0].parent} can be read")

    def _check_steps_left(self, path: Path, step: int) -> None:
        if step + 1 >= self.config.max_num_iterations:
            raise InputError(
                f"--max-num-iterations {self.config.max_num_iterations}: it is the total and {path} "
                f"has done {step + 1} steps already; give a larger number"
            )

    def _load_state(self, state: dict[str, Any], path: Path) -> None:
        """Parameters, optimizers, schedulers and grad scaler from a checkpoint that fits this run."""
        names = {key.removeprefix("module."): value for key, value in state["pipeline"].items()}
        if f"_model.{CHECKSUMS}" in names:
            raise InputError(f"{path} is packed, for rendering only: train on from the run that it was packed from")
        wanted = {
            name: None
            for name in self.pipeline.state_dict()
            if name in names or not name.startswith(checkpoints.ADDED_LATER)
        }
        checkpoints.check_fits(names, wanted, "parameters", path)
        checkpoints.check_fits(state["optimizers"], self.optimizers.optimizers, "parameter groups", path)
        try:
            self.pipeline.load_pipeline(state["pipeline"], state["step"])
            self.optimizers.load_optimizers(state["optimizers"])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not fit these settings ({error}); train with the settings in the config.yml beside it"
            ) from error
        if self.config.load_scheduler:
            schedulers = state.get("schedulers", {})
            self.optimizers.load_schedulers(
                {name: schedulers[name] for name in self.optimizers.schedulers if name in schedulers}
            )
        self._apply_configured_rates(state.get("infnerf", {}).get("lr_scale", 1.0))
        if state.get("scalers"):  # empty where the run before had no mixed precision
            self.grad_scaler.load_state_dict(state["scalers"])

    def _apply_configured_rates(self, scale: float) -> None:
        """Learning rates follow the flags of this run, at the point of the schedule where the checkpoint stands."""
        for name, optimizer in self.optimizers.optimizers.items():
            base = self.optimizers.config[name]["optimizer"].lr * scale
            scheduler = self.optimizers.schedulers.get(name)
            if scheduler is not None:
                scheduler.base_lrs = [base] * len(scheduler.base_lrs)
            for group in optimizer.param_groups:
                if isinstance(scheduler, LambdaLR):
                    group["lr"] = base * scheduler.lr_lambdas[0](scheduler.last_epoch)
                else:
                    group["lr"] *= base / group.get("initial_lr", group["lr"])
                group["initial_lr"] = base

    def _restore_last_good(self, step: int) -> None:
        """Go back to the last checkpoint with lower learning rates; the step counter and the schedules go on."""
        config = self.config.stability
        found = self._own_checkpoints() or ([self._resumed_from] if self._resumed_from else [])
        remedy = "lower --optimizers.grids.optimizer.lr and --optimizers.decoders.optimizer.lr"
        if not found or self._guard.restores > config.max_restores:
            why = "after several restores" if found else "before the first checkpoint"
            raise InputError(f"step {step}: the loss or a parameter stays NaN or infinite {why}; {remedy}")
        state = checkpoints.read_checkpoint(found[0])
        if state is None:
            raise InputError(
                f"step {step}: the loss or a parameter stays NaN or infinite and {found[0]} cannot be read; {remedy}"
            )
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        self.optimizers.load_optimizers(state["optimizers"])
        self.optimizers.zero_grad_all()
        # The checkpoint may hold learning rates from before an earlier restore; the schedulers hold the current ones.
        saved_scale = state.get("infnerf", {}).get("lr_scale", 1.0)
        wanted_scale = self._lr_scale * config.lr_factor
        for name, optimizer in self.optimizers.optimizers.items():
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] *= wanted_scale / saved_scale
            if name in self.optimizers.schedulers:
                scheduler = self.optimizers.schedulers[name]
                scheduler.base_lrs = [rate * config.lr_factor for rate in scheduler.base_lrs]
        self._lr_scale = wanted_scale
        warn(f"step {step}: restored {found[0]}, learning rates are now {wanted_scale:g} of the configured ones")

    def _own_checkpoints(self) -> list[Path]:
        """Whole checkpoints that this process has written, newest first; the folder may hold those of another run."""
        if self._saved_step is None:
            return []
        whole = checkpoints.whole_checkpoints(self.checkpoint_dir)
        return [path for path in whole if cast(int, checkpoints.checkpoint_step(path)) <= self._saved_step]

    def _after_train(self) -> None:
        """Save; after a stop request exit, else print where the result is and how to look at it."""
        if self._completed_step is not None:
            self.step = self._completed_step  # nerfstudio's loop has already counted the step that it did not run
        if self._signals.received is not None:
            self._exit_after_stop()
        viewer = self.config.viewer
        quit_at_end, viewer.quit_on_train_completion = viewer.quit_on_train_completion, True
        try:
            super()._after_train()
        finally:
            viewer.quit_on_train_completion = quit_at_end
        if self._saved_step is None:
            raise InputError(
                f"training ended but no checkpoint could be written to {self.checkpoint_dir}, see the warnings above"
            )
        self._print_result()
        if not quit_at_end:
            self._phase = "waiting"
            self._train_complete_viewer()

    def _exit_after_stop(self) -> None:
        """Save the last complete step and leave with the signal's exit code."""
        if self._completed_step is not None:
            self.save_checkpoint(self._completed_step)
            writer.write_out_storage()
        files = self._own_checkpoints()
        if files:
            run = shlex.quote(str(self.base_dir))
            print(
                f"infnerf: stopped after step {self.step}; saved {files[0]}; "
                f"add --load-dir {run} to the command to go on",
                flush=True,
            )
        else:
            print("infnerf: stopped before there was anything to save", flush=True)
        raise SystemExit(exit_code(cast(int, self._signals.received)))

    def _on_stop_request(self, number: int) -> None:
        """Called from the signal handler, in the main thread, at the first request."""
        if self._phase == "setup":
            say("stopped before training began; nothing to save")
            raise SystemExit(exit_code(number))
        if self._phase == "waiting":  # nerfstudio has said that Ctrl-C ends it
            raise SystemExit(0 if number == signal.SIGINT else exit_code(number))
        self.stop_training = True
        say("stopping: the current step is finished and saved; once more to stop at once")
        if self._phase == "evaluating":
            raise _EvaluationStopped

    @check_main_thread
    def _print_result(self) -> None:
        config = shlex.quote(str(self.base_dir / "config.yml"))
        kept = "" if self._saved_step == self.step else f" (the checkpoint is of step {self._saved_step})"
        print(f"infnerf: trained {self.step + 1} steps{kept}; the result is in {self.base_dir}")
        print("infnerf: look at it, measure it, render it with")
        print(f"  ns-viewer --load-config {config}")
        print(f"  ns-eval --load-config {config} --output-path {shlex.quote(str(self.base_dir / 'eval.json'))}")
        print(
            f"  ns-render dataset --load-config {config} --output-path {shlex.quote(str(self.base_dir / 'renders'))}",
            flush=True,
        )

    def _all_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizers.parameters.values() for parameter in group]

    def _gradient_norms(self) -> dict[str, torch.Tensor]:
        """Norm of every parameter's gradient and their sum, under nerfstudio's names."""
        norms = {
            f"Gradients/{name}": parameter.grad.norm()
            for name, parameter in self.pipeline.model.named_parameters()
            if parameter.grad is not None
        }
        return {**norms, "Gradients/Total": torch.stack(list(norms.values())).sum()} if norms else {}


def _find_checkpoints_to_resume(config: TrainerConfig) -> list[Path]:
    """Checkpoints to try, best first; empty for a new run. Raises InputError if what the flags name is not there."""
    if config.load_dir is not None:
        return checkpoints.resume_candidates(config.load_dir, config.relative_model_dir, config.load_step)
    if config.load_checkpoint is not None:
        if not checkpoints.is_whole(config.load_checkpoint):
            what = "is damaged" if config.load_checkpoint.exists() else "does not exist"
            raise InputError(f"--load-checkpoint {config.load_checkpoint}: the file {what}")
        return [config.load_checkpoint]
    return []
