"""``infnerf-bench quality``: minutes of training against held-out PSNR per pyramid level, ours and nerfacto's.

Each method trains in this process by its own trainer's ``train_iteration``; the clock stands still while held-out
photos are measured. All methods are measured on the same pixels. Our learning rates, the weights of our losses and the
growth of the tree follow the time instead of the steps, so that the last measurement is of a finished training;
nerfacto keeps its own schedule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import yaml
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.models.base_model import Model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.command import Command
from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig
from infnerf_ns.data.pyramid import downsample_mask, level_mean, level_name, num_levels
from infnerf_ns.data.pyramid_rays import level_camera
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.presets import load_preset, preset_names
from infnerf_ns.training.trainer import InfNeRFTrainer
from infnerf_ns.validation import Range, apply_yaml, validate_config

PYRAMID_LEVELS = 5
_ROOT_ALONE = "infnerf:pipeline.model.octree.max_level=0"
_CHUNK = 4096
_POINTS = Path("sparse_pc.ply")
"""Points of a Blender capture, in its folder, where there are any."""
_ENDLESS = 10_000_000
_WARM_UP_STEPS = 50
_LR_FINAL = 0.03
"""Share of the learning rate that is left at the end."""


@dataclass
class Quality(Command):
    """Minutes of training against held-out PSNR per pyramid level, for several methods."""

    data: Path
    """Capture: a folder with transforms.json or transforms_train.json, or the word `demo`."""
    methods: tuple[str, ...] = ("infnerf", "nerfacto")
    """What is trained: `nerfacto`, or a preset of this package, also with settings of its own behind colons
    (`infnerf:pipeline.model.field.children=independent`); `root` is the preset infnerf with its root alone."""
    minutes: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    """When the held-out photos are measured; the last is the length of the training."""
    scale: float = 1.0
    """Size of the photos, relative."""
    pixels: int = 2048
    """Held-out pixels per photo and pyramid level."""
    clock: Literal["wall", "cpu"] = "wall"
    """wall: minutes of the clock; cpu: minutes of the processor over all threads, for a machine that is not idle."""
    seed: int = 42
    """Of the trainings and of the pixels."""
    output: Path = Path("quality")
    """Table and plot: this name with .csv and .png."""

    def main(self) -> None:
        """Trains, measures, prints a table, writes it and a plot."""
        print(describe_machine())
        table, plot = table_and_plot(self.output)
        rows: list[dict] = []
        for row in self.measure():
            rows.append(row)
            print(result_line(row), flush=True)
            write_table(rows, table)
        _print_table(rows)
        _plot(rows, plot, f"{self.data.name}, {self.clock} time")
        print(f"infnerf: wrote {table} and {plot}")

    def measure(self) -> Iterator[dict]:
        """Trains one method after the other; a row per measurement.

        Raises:
            InputError: an option is wrong; nothing has been trained.
        """
        configs = self.check()  # all, before the first one trains
        for number, (method, config) in enumerate(configs.items()):
            # All settings together may be too long for the name of a folder.
            config.timestamp = f"{number}-{method.partition(':')[0]}"
            for row in self._train(config):
                yield {"method": method, **row}

    def check(self) -> dict[str, TrainerConfig]:
        """What is trained, by method.

        Raises:
            InputError: an option is wrong.
        """
        finite = all(0 < minutes < math.inf for minutes in self.minutes)
        if not self.minutes or not finite or list(self.minutes) != sorted(self.minutes):
            raise InputError(f"--minutes {self.minutes}: give rising numbers above 0")
        limits = {"scale": Range(0.01, 1), "pixels": Range(1, 1 << 24), "seed": Range(0, 2**32 - 1)}
        for name, allowed in limits.items():
            if not allowed.allows(getattr(self, name)):
                raise InputError(f"--{name} {getattr(self, name)}: allowed is {allowed}")
        if not self.methods:
            raise InputError("--methods: name at least one")
        return {method: self._config(method) for method in self.methods}

    def _train(self, config: TrainerConfig) -> Iterator[dict]:
        """A row per measurement."""
        torch.manual_seed(self.seed)
        trainer = self._trainer(config)
        now: Callable[[], float] = time.process_time if self.clock == "cpu" else time.perf_counter
        budget = 60 * self.minutes[-1]
        # The first step compiles kernels that every later run finds in numba's cache.
        _step(trainer, 0)
        spent, step = 0.0, 1
        for minute in self.minutes:
            while spent < 60 * minute:
                start = now()
                if isinstance(trainer.pipeline.model, InfNeRFModel):
                    _set_rates(trainer, step, spent / budget)
                    trainer.pipeline.model.total_steps = round(step / max(spent / budget, 1e-6))
                _step(trainer, step)
                spent += now() - start
                step += 1
            rays = step * trainer.pipeline.datamanager.get_train_rays_per_batch()
            row = {"minutes": minute, "steps": step, "rays_per_s": round(rays / spent), "nodes": _num_nodes(trainer)}
            trainer.pipeline.eval()
            row.update(self._measure(trainer, now))
            trainer.pipeline.train()
            yield row

    def _measure(self, trainer: Trainer, now: Callable[[], float]) -> dict:
        """The columns of a measurement."""
        dataset = trainer.pipeline.datamanager.eval_dataset
        psnr, rate = held_out_psnr(trainer.pipeline.model, dataset, self.pixels, self.seed, now)
        return {"render_rays_per_s": round(rate), **{f"psnr_{level}": round(value, 2) for level, value in psnr.items()}}

    def _trainer(self, config: TrainerConfig) -> Trainer:
        config.output_dir, config.experiment_name = self.output.parent, self.output.name
        config.vis, config.viewer = "tensorboard", ViewerConfig(quit_on_train_completion=True)
        config.machine.seed = self.seed
        config.max_num_iterations = _ENDLESS
        with _lpips_without_weights():
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
        if isinstance(trainer, InfNeRFTrainer):
            trainer.release_folder()  # nothing is saved
        return trainer

    def _config(self, method: str) -> TrainerConfig:
        if method == "nerfacto":
            config = copy.deepcopy(method_configs["nerfacto"])
            rays = config.pipeline.datamanager.train_num_rays_per_batch
            config.pipeline.datamanager = VanillaDataManagerConfig(
                train_num_rays_per_batch=rays, eval_num_rays_per_batch=rays
            )
            if not torch.cuda.is_available():
                config.machine.device_type, config.mixed_precision = "cpu", False
        else:
            config = _preset_with_settings(method)
        datamanager = config.pipeline.datamanager
        datamanager.dataparser, datamanager.data = self._dataparser(), None
        if isinstance(datamanager.dataparser, InfNeRFDemoDataParserConfig) and method != "nerfacto":
            datamanager.dataparser.depth |= config.pipeline.model.losses.wants_depth
        datamanager.camera_res_scale_factor = self.scale
        return config

    def _dataparser(self) -> DataParserConfig:
        if str(self.data) == "demo":
            return InfNeRFDemoDataParserConfig()
        if (self.data / "transforms_train.json").is_file():
            points = _POINTS if (self.data / _POINTS).is_file() else None
            return BlenderDataParserConfig(data=self.data, ply_path=points)
        if not (self.data / "transforms.json").is_file():
            raise InputError(f"--data {self.data}: there is neither a transforms.json nor a transforms_train.json")
        return NerfstudioDataParserConfig(
            data=self.data, orientation_method="none", eval_mode="interval", eval_interval=8
        )


def require_preset(preset: str) -> None:
    """Raises InputError where a preset that is to be given more settings is none of this package's."""
    if preset.partition(":")[0] not in preset_names():
        raise InputError(f"--preset {preset}: there are {', '.join(preset_names())}")


def _preset_with_settings(method: str) -> TrainerConfig:
    """``PRESET:KEY=VALUE:KEY=VALUE``, where keys are dotted as on the command line and values are YAML."""
    preset, *settings = _ROOT_ALONE.split(":") if method == "root" else method.split(":")
    if preset not in preset_names():
        raise InputError(f"--methods {method}: there are root, nerfacto, {', '.join(preset_names())}")
    config = load_preset(preset)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--methods {method}: write '{setting}' as KEY=VALUE")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--methods {method}: '{text}' is not a YAML value") from error
        for name in reversed(key.split(".")):
            value = {name: value}
        apply_yaml(config, value, f"--methods {method}")
    report = validate_config(config)
    if report.problems:
        raise InputError(f"--methods {method}: {'; '.join(report.problems)}")
    return config


def _num_nodes(trainer: Trainer) -> int:
    model = trainer.pipeline.model
    return model.field.octree.num_nodes if isinstance(model, InfNeRFModel) else 1


def _step(trainer: Trainer, step: int) -> None:
    """One training step with the callbacks around it."""
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, location=TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
    trainer.train_iteration(step)
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, location=TrainingCallbackLocation.AFTER_TRAIN_ITERATION)


def _set_rates(trainer: Trainer, step: int, done: float) -> None:
    """Learning rates at this share of the time: exponential decay after a short warm-up."""
    factor = _LR_FINAL ** min(done, 1.0) * min(1.0, (step + 1) / _WARM_UP_STEPS)
    for name, optimizer in trainer.optimizers.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = trainer.optimizers.config[name]["optimizer"].lr * factor


Where: TypeAlias = Callable[[int, int, tuple[int, int]], np.ndarray]


@torch.no_grad()
def held_out_psnr(
    model: Model,
    dataset: InputDataset,
    pixels: int,
    seed: int,
    now: Callable[[], float] = time.perf_counter,
    where: Where | None = None,
) -> tuple[dict[str, float], float]:
    """Mean PSNR per pyramid level over the photos of a dataset, on random pixels of each; and rendered rays per second.

    Args:
        model: in evaluation mode.
        dataset: held-out photos.
        pixels: per photo and level, without replacement and not masked; all of them where a level has fewer.
        seed: the same seed takes the same pixels.
        now: clock; it runs while the model renders, not while photos are read or rays are made.
        where: the pixels [h, w] of a photo's (its number) pyramid level that count; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    psnr: dict[str, list[Tensor]] = {}
    count, seconds = 0, 0.0
    for number in range(len(dataset)):
        photo = dataset[number]
        image, mask = photo["image"], photo.get("mask")
        for level in range(num_levels(*image.shape[:2], PYRAMID_LEVELS)):
            target = model.renderer_rgb.blend_background(level_mean(image, level))
            camera = level_camera(dataset.cameras[number : number + 1], level, *target.shape[:2]).to(model.device)
            valid = np.ones(target.shape[:2], bool) if mask is None else downsample_mask(mask[..., 0].numpy(), level)
            if where is not None:
                valid = valid & where(number, level, target.shape[:2])
            candidates = torch.from_numpy(np.flatnonzero(valid))
            if len(candidates) == 0:
                continue
            chosen = candidates[torch.randperm(len(candidates), generator=generator)[:pixels]]
            rays = _camera_rays(model, camera).flatten()[chosen.to(model.device)]
            start = now()
            colors = torch.cat([model(rays[start : start + _CHUNK])["rgb"] for start in range(0, len(rays), _CHUNK)])
            seconds += now() - start
            error = (colors.clamp(0, 1).cpu() - target.reshape(-1, 3)[chosen]).square().mean()
            psnr.setdefault(level_name(level), []).append(-10 * torch.log10(error))
            count += len(chosen)
    return {level: float(torch.stack(values).mean()) for level, values in psnr.items()}, count / seconds


def _camera_rays(model: Model, camera: Cameras) -> RayBundle:
    if isinstance(model, InfNeRFModel):
        return model.camera_rays(camera)
    return camera.generate_rays(camera_indices=0, keep_shape=True)


@contextmanager
def _lpips_without_weights() -> Iterator[None]:
    """nerfacto builds an LPIPS network, which downloads its weights; it is not measured here, so it gets none."""
    from torchmetrics.image import lpip

    original = lpip.LearnedPerceptualImagePatchSimilarity
    lpip.LearnedPerceptualImagePatchSimilarity = lambda **_: torch.nn.Identity()
    try:
        yield
    finally:
        lpip.LearnedPerceptualImagePatchSimilarity = original


def result_line(row: dict) -> str:
    """A row in words."""
    levels = " ".join(f"{value:.2f}" for name, value in row.items() if name.startswith("psnr_"))
    return (
        f"{row['method']} after {row['minutes']:g} min: {row['steps']} steps, {row['rays_per_s']} rays/s, {levels} dB"
    )


def _print_table(rows: list[dict]) -> None:
    table = Table(title="held-out PSNR per pyramid level, dB")
    for name in rows[0]:
        table.add_column(name.removeprefix("psnr_"), justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)


def _plot(rows: list[dict], path: Path, title: str) -> None:
    """PSNR over minutes, a panel per pyramid level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    levels = [name for name in rows[0] if name.startswith("psnr_")]
    minutes = sorted({row["minutes"] for row in rows})
    figure, axes = pyplot.subplots(1, len(levels), figsize=(2.6 * len(levels), 3), sharey=True, squeeze=False)
    for axis, level in zip(axes[0], levels):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            axis.plot([row["minutes"] for row in own], [row[level] for row in own], "o-", label=method)
        axis.set(xscale="log", xlabel="minutes", title=f"photos at {level.removeprefix('psnr_')}")
        axis.set_xticks(minutes, [f"{minute:g}" for minute in minutes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out PSNR, dB")
    # Below the panels: the name of a method with settings of its own is longer than a panel is wide.
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), fontsize="small"
    )
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
