"""The nerfstudio pipeline of InfNeRF: evaluation at every level of the photo pyramid.

``ns-eval`` and the periodic evaluation report each metric for every pyramid level (``psnr_1``, ``psnr_1/2``, ...) and
its mean over the levels under the plain name (``psnr``).
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, Optional

import torch
import torchvision
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import DataManagerConfig
from nerfstudio.models.base_model import ModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import profiler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from infnerf_ns.data.pyramid import level_name
from infnerf_ns.data.pyramid_datamanager import PyramidDataManager, PyramidDataManagerConfig
from infnerf_ns.errors import InputError
from infnerf_ns.losses.config import SMALLEST_PATCH
from infnerf_ns.model import APPEARANCE, InfNeRFModel, InfNeRFModelConfig
from infnerf_ns.surroundings import is_nerfstudio
from infnerf_ns.training.stopping import end_on_signals
from infnerf_ns.training_pictures import training_pictures
from infnerf_ns.validation import Range
from infnerf_ns.viewer import OctreeViewer, PhotosInViewer


@dataclass
class InfNeRFPipelineConfig(VanillaPipelineConfig):
    """Data, model and evaluation protocol."""

    _target: type = dataclasses.field(default_factory=lambda: InfNeRFPipeline)
    datamanager: DataManagerConfig = dataclasses.field(default_factory=PyramidDataManagerConfig)
    """The photos as pyramids."""
    model: ModelConfig = dataclasses.field(default_factory=InfNeRFModelConfig)
    """The octree of NeRFs."""
    eval_protocol: Literal["full", "half"] = "full"
    """full: whole held-out photos with the mean appearance code; half: the paper's protocol, the code of a held-out
    photo is fitted on its left half and the metrics are taken on the right half."""
    half_fit_steps: Annotated[int, Range(1, 10_000)] = 50
    """Steps of that fit."""
    half_fit_lr: Annotated[float, Range(1e-6, 1.0, warn_above=0.1)] = 0.02
    """Learning rate of that fit."""

    def check(self) -> list[str]:
        """Values that do not fit each other."""
        losses, data = getattr(self.model, "losses", None), self.datamanager
        names = losses.patch_losses() if losses is not None else []
        side = getattr(data, "patch_size", 1)
        if names and (side < SMALLEST_PATCH or getattr(data, "patch_share", 1.0) == 0):
            flag = names[0].replace("_", "-")
            return [
                f"--pipeline.model.losses.{flag} needs patches: give --pipeline.datamanager.patch-size 16 (at least"
                f" {SMALLEST_PATCH}) and a --pipeline.datamanager.patch-share above 0, e.g. 0.25"
            ]
        return []


@contextmanager
def _said_if_not_written(path: Path) -> Iterator[None]:
    """One line where the disk is full or nothing may be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): free disk space, or choose another folder with"
            " --render-output-path"
        ) from error


class InfNeRFPipeline(VanillaPipeline):
    """Evaluates per pyramid level; everything else is nerfstudio's."""

    config: InfNeRFPipelineConfig
    datamanager: PyramidDataManager

    def __init__(self, config: InfNeRFPipelineConfig, *args: Any, **kwargs: Any) -> None:
        losses = getattr(config.model, "losses", None)
        if losses is not None and losses.wants_depth:
            config.datamanager.use_depth = True  # type: ignore[attr-defined]
        if is_nerfstudio(
            Path(sys.argv[0])
        ):  # ns-eval, ns-render ...: they have no hook before it; ns-train has its own
            end_on_signals()
        super().__init__(config, *args, **kwargs)
        if self.model.near_planes is not None:
            # The method, as the module would become part of the data manager, which is one too, and be saved twice.
            self.datamanager.near_planes = self.model.near_planes.forward
        self.octree_viewer = OctreeViewer(self.model)
        """found by nerfstudio's viewer"""
        self.photos_in_viewer = PhotosInViewer(getattr(self.datamanager, "show_missing_photos", lambda: None))
        """also found by it"""

    @property
    def model(self) -> InfNeRFModel:
        """The model, without the wrapper of distributed training."""
        return super().model  # type: ignore[return-value]

    def _fit_appearance(self, camera: Cameras, batch: dict[str, Any]) -> Optional[Tensor]:
        """Appearance code [A] of a held-out photo, fitted on its left half; None where the model has no codes."""
        table = self.model.field.appearance
        if table is None:
            return None
        _, camera, image, mask = next(self.datamanager.eval_pyramid(camera, batch))
        image = self.model.renderer_rgb.blend_background(image.to(self.device))
        height, half = image.shape[0], image.shape[1] // 2
        code = table.weight.detach().mean(dim=0).clone().requires_grad_()
        optimizer = torch.optim.Adam([code], lr=self.config.half_fit_lr)
        rays = self.model.camera_rays(camera.to(self.device))[:, :half].flatten()
        target = image[:, :half].reshape(-1, 3)
        seen = None if mask is None else mask[:, :half].reshape(-1).to(self.device)
        candidates = torch.arange(height * half, device=target.device) if seen is None else torch.nonzero(seen)[:, 0]
        if len(candidates) == 0:
            return code.detach()
        generator = torch.Generator().manual_seed(0)
        with self._frozen(), self._without_normals():
            for _ in range(self.config.half_fit_steps):
                chosen = candidates[torch.randint(len(candidates), (1024,), generator=generator).to(candidates.device)]
                bundle = rays[chosen]
                bundle.metadata[APPEARANCE] = code.expand(len(chosen), -1)
                with torch.enable_grad():
                    loss = (self.model(bundle)["rgb"] - target[chosen]).square().mean()
                    (code.grad,) = torch.autograd.grad(loss, code)
                optimizer.step()
        return code.detach()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No parameter of the model gathers gradients: what is fitted to held-out photos must not reach it."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def _without_normals(self) -> Iterator[None]:
        """Images are rendered without the output `normals`, which costs another look at the field."""
        normals, self.model.config.render_normals = self.model.config.render_normals, False
        try:
            yield
        finally:
            self.model.config.render_normals = normals

    def evaluate_photo(self, camera: Cameras, batch: dict[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of one held-out photo at every pyramid level and their means, and images to look at."""
        half = self.config.eval_protocol == "half"
        code = self._fit_appearance(camera, batch) if half else None
        metrics: dict[str, float] = {}
        images: dict[str, Tensor] = {}
        per_level = defaultdict(list)
        num_rays, start = 0, perf_counter()
        for level, camera_at_level, image, mask in self.datamanager.eval_pyramid(camera, batch):
            rays = self.model.camera_rays(camera_at_level.to(self.device))
            if code is not None:
                rays.metadata[APPEARANCE] = code.expand(*rays.shape, -1)
            with nullcontext() if level == 0 else self._without_normals():
                outputs = self.model.get_outputs_for_camera_ray_bundle(rays)
            num_rays += len(rays)
            photo = {"image": image} if mask is None else {"image": image, "mask": mask}
            if half:
                right = image.shape[1] // 2
                outputs = {name: value[:, right:] for name, value in outputs.items()}
                photo = {name: value[:, right:] for name, value in photo.items()}
            level_metrics, level_images = self.model.get_image_metrics_and_images(outputs, photo)
            scale = level_name(level)
            for name, value in level_metrics.items():
                metrics[f"{name}_{scale}"] = value
                per_level[name].append(value)
            images.update(level_images if level == 0 else {f"img_{2**level}": level_images["img"]})
        metrics.update({name: sum(values) / len(values) for name, values in per_level.items()})
        metrics["num_rays"] = num_rays
        metrics["num_rays_per_sec"] = num_rays / (perf_counter() - start)
        return metrics, images

    @profiler.time_function
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """One held-out photo, at every pyramid level."""
        self.eval()
        camera, batch = self.datamanager.next_eval_image(step)
        with self.octree_viewer.measuring():
            metrics, images = self.evaluate_photo(camera, batch)
            photo = self.model.renderer_rgb.blend_background(batch["image"])
            with self._without_normals():
                rendered = images["img"][:, images["img"].shape[1] // 2 :]
                images.update(training_pictures(self.model, camera, photo, rendered))
        del metrics["num_rays_per_sec"]  # the trainer reports it from num_rays
        self.train()
        return metrics, images

    @profiler.time_function
    def get_average_image_metrics(
        self,
        data_loader: Any,
        image_prefix: str,
        step: Optional[int] = None,
        output_path: Optional[Path] = None,
        get_std: bool = False,
    ) -> dict[str, float]:
        """Mean (and spread) of the metrics over the photos of a loader; images are saved below ``output_path``."""
        del step
        self.eval()
        if output_path is not None:
            with _said_if_not_written(output_path):
                output_path.mkdir(exist_ok=True, parents=True)
        rows = []
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            MofNCompleteColumn(),
        )
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("[green]Evaluating all images at all pyramid levels...", total=len(data_loader))
            for number, (camera, batch) in enumerate(data_loader):
                with self.octree_viewer.measuring():
                    metrics, images = self.evaluate_photo(camera, batch)
                metrics["fps"] = metrics["num_rays_per_sec"] / metrics.pop("num_rays")
                rows.append(metrics)
                for name, image in images.items() if output_path is not None else ():
                    file = output_path / f"{image_prefix}_{name}_{number:04d}.png"
                    with _said_if_not_written(file):
                        torchvision.utils.save_image(image.permute(2, 0, 1).cpu(), file)
                progress.advance(task)
        self.train()
        averages = {}
        for name in {name: None for row in rows for name in row}:
            values = torch.tensor([row[name] for row in rows if name in row], dtype=torch.float64)
            averages[name] = float(values.mean())
            if get_std:
                averages[f"{name}_std"] = float(values.std()) if len(values) > 1 else 0.0
        return averages
