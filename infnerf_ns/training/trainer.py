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
import tyro
from nerfstudio.configs.base_config import MachineConfig
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TRAIN_INTERATION_OUTPUT, Trainer, TrainerConfig
from nerfstudio.utils import profiler, writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.rich_utils import CONSOLE
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from infnerf_ns import viewer_guard
from infnerf_ns.checkpoint_archive import damage
from infnerf_ns.command_line import check_command
from infnerf_ns.data.capture.record import RECORD, CaptureRecord, same_photos
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file
from infnerf_ns.run_config import make_paths_absolute, read_run_config
from infnerf_ns.state_validation import require_model_state, require_optimizer_state, require_plain
from infnerf_ns.streaming.packing import CHECKSUMS
from infnerf_ns.streaming.page_files import PAGES
from infnerf_ns.threads import MeasuredThreads, fix_threads, thread_problems
from infnerf_ns.training import checkpoints
from infnerf_ns.training.event_files import spare_the_training
from infnerf_ns.training.level_groups import accumulation_problems, expand_optimizers, level_group, optimizer_problems
from infnerf_ns.training.logging_services import require_services
from infnerf_ns.training.optimizer import LevelOptimizers, NodeAdam
from infnerf_ns.training.run_folder import FolderLock, inner_folder_problems, require_own_folder
from infnerf_ns.training.stability import StabilityConfig, StepGuard, groups_not_finite, values_finite
from infnerf_ns.training.stopping import StopSignals, exit_code, leave, say
from infnerf_ns.validation import Range, Report, enforce, validate_config, warn
from infnerf_ns.viewer_address import for_ns_viewer, port_problems, require_address, require_guarded

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
    else the machine does. The result depends on it by rounding alone; a fixed number makes it the same each time."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """What happens when the loss or a gradient is NaN or infinite."""
    run_folder: Annotated[Optional[Path], tyro.conf.Suppress] = None
    """Where the run is, if not in output_dir/experiment_name/method_name/timestamp: it was moved or renamed."""

    def __post_init__(self) -> None:
        """``--load-config``: reads the file safely, and refuses what it must not hold, before nerfstudio reads it and
        executes what is in it."""
        if self.load_config is not None:
            read_run_config(self.load_config)

    def get_base_dir(self) -> Path:
        """Folder of the run."""
        usual = super().get_base_dir()
        return usual if self.run_folder is None else self.run_folder

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever; but ns-viewer puts settings of its own in place of the run's right before it opens a viewer."""
        if name == "viewer" and name in vars(self) and self.vis.startswith("viewer"):
            value = for_ns_viewer(value, self.vis)
        super().__setattr__(name, value)

    def get_checkpoint_dir(self) -> Path:
        """The checkpoint folder; also points ``load_step`` at the newest whole file in it, where there is one, the
        model at the folder of its pages, should the run be packed, and the data manager at what the run has kept of
        its capture; what cannot work is said first (`check_command`).

        ns-eval, ns-render, ns-export and ns-viewer call this right before they load. Left to themselves they take the
        file with the highest step even if it is truncated. Nothing is written or moved, so a read-only run works too.
        """
        check_command(self)
        folder = super().get_checkpoint_dir()
        whole = checkpoints.whole_checkpoints(folder, first=self.load_step)
        if whole:
            self.load_step = checkpoints.checkpoint_step(whole[0])
            state = checkpoints.read_checkpoint(whole[0], mapped=True)
            if state is not None:
                self.require_sound(state, whole[0])
        elif checkpoints.list_checkpoints(folder):
            raise InputError(f"{folder}: there is no whole checkpoint (step-*.ckpt)")
        streaming = getattr(getattr(self.pipeline, "model", None), "streaming", None)
        if streaming is not None:
            streaming.pages = self.get_base_dir() / PAGES
        datamanager = getattr(self.pipeline, "datamanager", None)
        if hasattr(datamanager, "record"):
            datamanager.record = self.get_base_dir() / RECORD
        return folder

    def save_config(self) -> None:
        """Writes config.yml, unless the folder holds another run: ns-train does this before anything else.

        Its paths are absolute, as a run is looked at from other folders than it was started in.
        """
        make_paths_absolute(self)
        folder = require_own_folder(self)
        lock = FolderLock(folder)
        lock.acquire()  # only looked at: the trainer takes it
        lock.release()
        try:
            super().save_config()
        except OSError as error:
            raise InputError(
                f"{folder / 'config.yml'} cannot be written ({error.strerror or error}): free disk space, or choose"
                " another --output-dir"
            ) from error

    def require_sound(self, state: dict[str, Any], path: Path) -> None:
        """Ends with one line if what a checkpoint says of the model cannot be used with this configuration.

        Args:
            state: the checkpoint.
            path: its file, for the line.

        Raises:
            InputError: the tree, or a shape, type or number of a tensor is wrong.
        """
        model = getattr(self.pipeline, "model", None)
        if hasattr(model, "field") and hasattr(model, "octree"):
            sizes = model.field, model.octree.node_resolution, model.octree.max_level
            require_model_state(checkpoints.model_state(state), *sizes, source=str(path))

    def check(self) -> list[str]:
        """Values that cannot work; one line each, naming the flag."""
        problems = port_problems(self.viewer) + thread_problems(self.threads) + inner_folder_problems(self)
        if self.max_num_iterations < 1:
            problems.append(f"--max-num-iterations {self.max_num_iterations}: allowed is at least 1")
        for name in ("steps_per_save", "steps_per_eval_batch", "steps_per_eval_image", "steps_per_eval_all_images"):
            if getattr(self, name) < 0:
                problems.append(f"--{name.replace('_', '-')} {getattr(self, name)}: allowed is at least 0 (0: never)")
        problems += accumulation_problems(self.gradient_accumulation_steps, self.optimizers)
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
            if not optimizer_problems(kind, group) and group["optimizer"].lr > 0.1
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
        require_guarded(config.vis)
        require_services(config)
        if config.is_viewer_enabled():
            require_address(config.viewer)
        enforce(Report(_device_problems(config.machine)))
        self._candidates = _find_checkpoints_to_resume(config)
        self._lock = FolderLock(require_own_folder(config))
        requested_step = config.load_step
        with CONSOLE.capture() as said:
            super().__init__(config, local_rank, world_size)
        lines = said.get().splitlines(keepends=True)
        # nerfstudio says this of every training on a CPU.
        untrue = "" if config.mixed_precision else "Mixed precision is disabled for CPU training."
        CONSOLE.file.write("".join(line for line in lines if line.strip() != untrue))
        config.load_step = requested_step
        if hasattr(config.pipeline.datamanager, "record"):
            config.pipeline.datamanager.record = None  # a training reads the capture
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
        self._not_written: Optional[str] = None
        """why the newest checkpoint is not on the disk"""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Build the pipeline, the optimizers and the viewer, and load the checkpoint to resume from. See nerfstudio."""
        if self.local_rank == 0:
            self._lock.acquire()
        with self._signals, viewer_guard.armed(self.config.viewer.websocket_host, self.config.viewer.make_share_url):
            super().setup(test_mode)
            write_record = getattr(self.pipeline.datamanager, "write_record", None)
            if write_record is not None and self.local_rank == 0:
                write_record(self.base_dir / RECORD)
            if self.local_rank == 0:
                checkpoints.require_space(self.base_dir, self.checkpoint_dir, self._all_parameters())
        spare_the_training()
        if self._signals.received is not None:  # Python drops what is raised within some callbacks
            leave(exit_code(self._signals.received))

    def release_folder(self) -> None:
        """Lets other trainings write into the run's folder: for whoever takes the steps without `train`, and saves
        nothing."""
        self._lock.release()

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
        return LevelOptimizers(expanded, groups)

    def train(self) -> None:
        """Train up to ``max_num_iterations`` steps in total, then save and say how to look at the result.

        Raises:
            SystemExit: after Ctrl-C (130), SIGTERM (143) or SIGHUP (129), with everything saved.
        """
        total = self.config.max_num_iterations
        if self._resumed_random_state is not None:
            checkpoints.restore_random_state(self._resumed_random_state, str(self._resumed_from))
            self._resumed_random_state = None
        self._phase = "training"
        with self._signals:
            try:
                self.config.max_num_iterations = total - self._start_step  # nerfstudio's loop adds it to the start
                super().train()
            finally:
                self.config.max_num_iterations = total
                self.release_folder()

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
        good, bad_groups = bool(torch.isfinite(loss)), []
        if good:
            cast(torch.Tensor, self.grad_scaler.scale(loss)).backward()
            # With mixed precision an infinite gradient is the grad scaler's everyday business: it skips such a step.
            bad_groups = [] if self.grad_scaler.is_enabled() else groups_not_finite(self.optimizers.parameters)
            good = not bad_groups
        if self.config.log_gradients:
            metrics_dict.update(self._gradient_norms())

        scale = self.grad_scaler.get_scale()
        if good:
            due = [group for group in groups if step % accumulation[group] == accumulation[group] - 1]
            self.optimizers.optimizer_scaler_step_some(self.grad_scaler, due)
            self.grad_scaler.update()
        else:
            self.optimizers.zero_grad_all()
            where = f" ({', '.join(bad_groups)})" if bad_groups else ""
            warn(f"step {step}: the loss or a gradient is not finite{where}, the step is skipped")
        left_out = self._left_out()
        for name, count in left_out.items():
            warn(f"step {step}: {count} entries of the gradient of {name} are not finite and are left out")
        if self._guard.record(good and not left_out):
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
        failure = self._not_written = checkpoints.write_checkpoint(state, path, keep)
        if failure is None:
            self._saved_step = step
        else:
            kept = "the one before is kept" if self._own_checkpoints() or self._resumed_from else "there is none before"
            warn(f"the checkpoint {path} could not be written ({failure}); {kept}")

    def _load_checkpoint(self) -> None:
        """Load the newest readable candidate, found at construction; nothing to do for a new run."""
        for path in self._candidates:
            state = checkpoints.read_checkpoint(path)
            if state is None:
                warn(f"the checkpoint {path} is damaged; the one before is used")
                continue
            self._check_steps_left(path, state["step"])
            self._check_photos(path)
            self._load_state(state, path)
            extras = _extras(state, path)
            self._resumed_random_state = extras["random_state"]
            self._lr_scale = extras["lr_scale"]
            self._guard.skipped = extras["skipped_steps"]
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

    def _check_photos(self, path: Path) -> None:
        """The photos must be those of the run that is loaded, as far as it has kept their names."""
        run, outputs = path.parent.parent, getattr(self.pipeline.datamanager, "train_dataparser_outputs", None)
        if outputs is not None and (run / RECORD).is_file():
            same_photos(CaptureRecord.read(run / RECORD), outputs, run)

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
        self._load_parameters_and_moments(state, path)
        source, schedulers = str(path), state.get("schedulers")
        if self.config.load_scheduler and isinstance(schedulers, dict):
            for name, scheduler in self.optimizers.schedulers.items():
                if name in schedulers:
                    what = f"learning rate schedule of {name}"
                    scheduler.load_state_dict(require_plain(schedulers[name], scheduler.state_dict(), what, source))
        self._apply_configured_rates(_extras(state, path)["lr_scale"])
        scaler = self.grad_scaler.state_dict()
        if scaler and state.get("scalers"):  # empty where a run has no mixed precision
            scaler.update(require_plain(state["scalers"], scaler, "gradient scaler", source))
            self.grad_scaler.load_state_dict(scaler)

    def _load_parameters_and_moments(self, state: dict[str, Any], path: Path) -> None:
        """Takes over the model and the optimizers of a checkpoint, whose names are those of this run."""
        self.config.require_sound(state, path)
        try:
            self.pipeline.load_pipeline(state["pipeline"], state["step"])
            for name, optimizer in self.optimizers.optimizers.items():
                require_optimizer_state(state["optimizers"][name], optimizer, name, str(path))
            self.optimizers.load_optimizers(state["optimizers"])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not fit these settings ({error}); train with the settings in the config.yml beside it"
            ) from error

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
        self._load_parameters_and_moments(state, found[0])
        self.optimizers.zero_grad_all()
        # The checkpoint may hold learning rates from before an earlier restore; the schedulers hold the current ones.
        saved_scale = _extras(state, found[0])["lr_scale"]
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
        if self._not_written is not None:
            files = self._own_checkpoints() or ([self._resumed_from] if self._resumed_from else [])
            kept = f"; {files[0]} is kept: train on from it with --load-dir {files[0]}" if files else ""
            raise InputError(
                f"training ended, but its last weights could not be written to {self.checkpoint_dir}"
                f" ({self._not_written}): make room there, or allow writing{kept}"
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
        leave(exit_code(cast(int, self._signals.received)))

    def _on_stop_request(self, number: int) -> None:
        """Called from the signal handler, in the main thread, at the first request."""
        if self.config.logging.profiler == "basic":
            self.config.logging.profiler = "none"  # ns-train would print its table behind our last line
        if self._phase == "setup":
            say("stopped before training began; nothing to save")
            leave(exit_code(number))
        if self._phase == "waiting":  # nerfstudio has said that Ctrl-C ends it
            leave(0 if number == signal.SIGINT else exit_code(number))
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

    def _left_out(self) -> dict[str, int]:
        """Entries of banks, by parameter group, whose gradient was not finite."""
        banks = {name: each for name, each in self.optimizers.optimizers.items() if isinstance(each, NodeAdam)}
        return {name: count for name, optimizer in banks.items() if (count := optimizer.left_out())}

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


def _extras(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint holds under our own key, or what it would hold at the start of a run.

    Raises:
        InputError: a number there is not one.
    """
    fresh: dict[str, Any] = {"lr_scale": 1.0, "skipped_steps": 0}
    saved = state.get("infnerf") or {}
    extras = {**fresh, **require_plain(saved, fresh, "training", str(path))}
    if not 0 < extras["lr_scale"] <= 1:
        raise InputError(f"{path} cannot be used: its learning rates are {extras['lr_scale']:g} of the configured ones")
    return {**extras, "random_state": saved.get("random_state")}


def _find_checkpoints_to_resume(config: TrainerConfig) -> list[Path]:
    """Checkpoints to try, best first; empty for a new run. Raises InputError if what the flags name is not there."""
    if config.load_dir is not None:
        return checkpoints.resume_candidates(config.load_dir, config.relative_model_dir, config.load_step)
    if config.load_checkpoint is not None:
        require_regular_file(config.load_checkpoint, "--load-checkpoint")
        problem = damage(config.load_checkpoint)
        if problem is not None:
            raise InputError(f"--load-checkpoint {config.load_checkpoint}: the file is damaged ({problem})")
        return [config.load_checkpoint]
    return []
