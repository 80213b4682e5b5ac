"""InfNeRFModel: wires sampler, octree field, renderers and losses into a nerfstudio model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.camera_optimizers import CameraOptimizer, CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.model_components.renderers import (
    AccumulationRenderer,
    DepthRenderer,
    NormalsRenderer,
    RGBRenderer,
)
from nerfstudio.model_components.shaders import NormalsShader
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn import Parameter

from infnerf_ns.camera_paths import drawable
from infnerf_ns.checkpoint_loading import (
    checkpoint_octree,
    fit_whole,
    open_pages,
    paged_names,
    require_names_and_shapes,
)
from infnerf_ns.errors import InputError
from infnerf_ns.field import FieldConfig, OctreeField, in_place_gradients
from infnerf_ns.interruption import interrupted_between_chunks, may_be_interrupted
from infnerf_ns.kernels import explain
from infnerf_ns.losses import multi_scale, reconstruction
from infnerf_ns.losses.config import LossConfig
from infnerf_ns.near_plane import NearPlanes
from infnerf_ns.objective import Objective, distortion
from infnerf_ns.pages import PageLayout
from infnerf_ns.ray_nodes import Evaluated, level_image, node_image
from infnerf_ns.rendering import BLEND_SHARPENING, Shaded, route, shade
from infnerf_ns.sampler import (
    ORTHOGRAPHIC_FOOTPRINT,
    ROUTING_SCALE,
    Intervals,
    LoDSampler,
    SamplerConfig,
    sample_geometry,
    weight_quantiles,
)
from infnerf_ns.streaming.config import StreamingConfig
from infnerf_ns.streaming.node_cache import budget_bytes
from infnerf_ns.streaming.packing import CHECKSUMS
from infnerf_ns.streaming.views import StreamedViews
from infnerf_ns.threads import THREADS_VARIABLE, MeasuredThreads
from infnerf_ns.training.growth import Growth, Watch
from infnerf_ns.training.growth_rules import GrowthConfig
from infnerf_ns.tree_building import SOURCES, OctreeConfig, build_tree, log_tree, require_memory
from infnerf_ns.validation import Range, Reloadable

_NORMALS_PER_RAY = 4
"""Samples of a ray whose normals are taken. The weights of a surface are spread over most samples of its ray, and each
normal costs a second, differentiated look at the field."""
_TAKE_OVER_STEPS = 1000
"""Steps in which a young node takes over where growth is off; else it is a round."""
APPEARANCE = "appearance_code"
"""Key of the ray metadata that holds an appearance code [R, A] to be used instead of the trained ones."""


@dataclass
class InfNeRFModelConfig(Reloadable, ModelConfig):
    """InfNeRF: an octree of NeRFs."""

    _target: type = dataclasses.field(default_factory=lambda: InfNeRFModel)
    enable_collider: bool = False
    """Unused: the sampler sets the near plane from the data."""
    eval_num_rays_per_chunk: Annotated[int, Range(1)] = 8192
    """Rays per chunk when images are rendered."""
    octree: OctreeConfig = dataclasses.field(default_factory=OctreeConfig)
    """The tree."""
    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)
    """How the tree changes while it trains."""
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    """The nodes."""
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    """The samples along rays."""
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The losses."""
    streaming: StreamingConfig = dataclasses.field(default_factory=StreamingConfig)
    """The nodes of a packed run."""
    camera_optimizer: CameraOptimizerConfig = dataclasses.field(
        default_factory=lambda: CameraOptimizerConfig(mode="off")
    )
    """Pose refinement (nerfstudio's)."""
    background_color: Literal["last_sample", "random", "black", "white"] = "last_sample"
    """What lies behind the last sample."""
    color_weight_threshold: Annotated[float, Range(0.0, 0.1)] = 1e-3
    """Samples with a smaller rendering weight are not given a colour."""
    mean_appearance_share: Annotated[float, Range(0.0, 1.0)] = 0.5
    """Share of the training rays that are rendered with the mean of all appearance codes instead of their photo's, so
    that the mean, with which new views are rendered, is one that the colours have learnt."""
    blend_levels: bool = True
    """Evaluation blends a node with its parent by the fractional level, so that nothing pops while the camera moves."""
    render_normals: bool = True
    """Rendered images have an output `normals` (point clouds and Poisson meshes need it)."""

    def check(self) -> list[str]:
        """Values that do not fit each other."""
        problems = []
        if self.enable_collider:
            problems.append("--pipeline.model.enable-collider True: not supported, every camera's near plane is known")
        resolution, base = self.octree.node_resolution, self.field.base_resolution
        if resolution <= base:
            problems.append(
                f"--pipeline.model.octree.node-resolution {resolution}: must be above"
                f" --pipeline.model.field.base-resolution {base}"
            )
        deepest = max(self.losses.cut_levels, default=0)
        if deepest > self.octree.max_level:
            problems.append(
                f"--pipeline.model.losses.cut-levels {deepest}: must not be above"
                f" --pipeline.model.octree.max-level {self.octree.max_level}"
            )
        if not self.sampler.proposal_samples:
            problems.append("--pipeline.model.sampler.proposal-samples: at least one round is needed, e.g. 64 32")
        return problems

    def advise(self) -> list[str]:
        """Legal values that are rarely wanted."""
        growing, octree = self.growth.every > 0, self.octree
        if growing and octree.max_level == 0:
            return ["--pipeline.model.growth.every: nothing grows, as --pipeline.model.octree.max-level is 0"]
        if not growing and octree.start == "root" and octree.max_level > 0:
            return ["--pipeline.model.octree.start root: stays the root alone; give --pipeline.model.growth.every 1000"]
        return []


class InfNeRFModel(Model):
    """An octree of NeRFs (InfNeRF, SIGGRAPH Asia 2024)."""

    config: InfNeRFModelConfig

    def populate_modules(self) -> None:
        """Builds the tree from the SfM scene that the data manager provides, and the modules on top of it."""
        super().populate_modules()
        scene = self.kwargs["metadata"].get("sfm_scene")
        if scene is None:
            raise InputError(
                "the data manager gives no SfM scene: --pipeline.datamanager must be infnerf_ns's PyramidDataManager"
            )
        octree = build_tree(scene, self.config.octree)
        self.sampler = LoDSampler(self.config.sampler, self.config.sampler.near_plane or scene.near, octree.cube.side)
        self.near_planes = None
        if self.config.sampler.near_plane is None:
            # Points in the frusta are made up: nothing says that the air before them is empty.
            self.near_planes = NearPlanes(scene.points[: 0 if scene.source == "frusta" else None], scene.near)
        if scene.source != "checkpoint":
            layout = PageLayout(self.config.field, octree.node_resolution, self.config.octree.max_level)
            log_tree(octree, layout.memory_bytes(octree), f"{len(scene.points)} {SOURCES[scene.source]}")
            center = " ".join(f"{value:.4g}" for value in octree.cube.center.tolist())
            CONSOLE.print(f"root cube: centre {center}, side {octree.cube.side:.4g} (scene units)")
            CONSOLE.print(f"near plane {scene.near:.4g} or more (scene units)")
            require_memory(layout.memory_bytes(octree), self.kwargs.get("device", "cpu"))
        self.field = OctreeField(octree, self.config.field, self.config.octree.max_level, self.num_train_data)
        self.objective = Objective(self.config.losses)
        self.growth = Growth(octree, self.config.octree.max_level, self.config.growth)
        device = torch.device(self.kwargs.get("device", "cpu"))
        in_place_gradients(self.field, device)
        CONSOLE.print(f"infnerf: {explain(self.config.field.backend, device)}")
        self.camera_optimizer: CameraOptimizer = self.config.camera_optimizer.setup(
            num_cameras=self.num_train_data, device="cpu"
        )
        self.renderer_rgb = RGBRenderer(background_color=self.config.background_color)
        self.renderer_accumulation = AccumulationRenderer()
        self.renderer_depth = DepthRenderer(method="median")
        self.renderer_expected_depth = DepthRenderer(method="expected")
        self.renderer_normals = NormalsRenderer()
        self.normals_shader = NormalsShader()
        self.step, self.total_steps = 0, 0
        self._threads = MeasuredThreads("renders", "a chunk of rays", f"{THREADS_VARIABLE}=N")
        self.views: StreamedViews | None = None
        """what a packed model does before and after an image"""
        self.footprint_scale = 1.0
        """samples of rendered images are routed as if their footprints were this much larger (level-of-detail bias)"""
        self.on_evaluated: Callable[[Evaluated], None] | None = None
        """called with every chunk of an image, or of other rays, that is rendered in evaluation"""

    # -- parameters

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """One group per kind of bank and octree level."""
        groups: dict[str, list[Parameter]] = {}
        for kind in ("grids", "decoders", "proposals"):
            for level, bank in enumerate(getattr(self.field, kind)):
                groups[f"{kind}_{level}"] = [bank]
        if self.field.appearance is not None:
            groups["appearance"] = list(self.field.appearance.parameters())
        if self.objective.discriminator is not None:
            groups["discriminator"] = list(self.objective.discriminator.parameters())
        self.camera_optimizer.get_param_groups(groups)
        return groups

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes over the checkpoint's tree first; nodes of a packed run come from its pages when they are needed."""
        octree = checkpoint_octree(self.field, state_dict, self.device)
        self.growth.fit(octree, state_dict)
        if CHECKSUMS not in state_dict:
            fit_whole(self.field, self.near_planes, octree, state_dict, self.training)
            require_names_and_shapes(self.state_dict(), state_dict, set())
            loaded = super().load_state_dict(state_dict, strict=strict)
            self.field.young = bool((self.field.maturity < 1).any())
            return loaded
        pages, budget = self.config.streaming.pages, budget_bytes(self.config.streaming.budget_mib)
        cache = open_pages(self.field, self.near_planes, octree, state_dict, pages, budget)
        require_names_and_shapes(self.state_dict(), state_dict, paged_names(self.field.pages, octree))
        loaded = super().load_state_dict(state_dict, strict=False)
        sharpening = BLEND_SHARPENING if self.config.blend_levels else 1.0
        self.views = StreamedViews(cache, sharpening, lambda: self.field.level_cap)
        return loaded

    def to(self, *args: Any, **kwargs: Any) -> InfNeRFModel:
        """Moves the model; the tree's index tensors move with it."""
        if self.views is not None and torch._C._nn._parse_to(*args, **kwargs)[0] not in (None, self.device):
            raise InputError("a packed model stays on the device on which it was loaded")
        super().to(*args, **kwargs)
        self.field.octree = self.field.octree.to(self.field.tree_level.device)
        return self

    def update_to_step(self, step: int) -> None:
        """Schedules continue from a loaded checkpoint."""
        self.step = step

    @property
    def progress(self) -> float:
        """Share of the training that is done; 0 while its length is not known."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Before each step: the step number for the schedules, and the start of the octree levels whose time has
        come. After it: the growth of the tree, where it is due."""
        trainer, held = training_callback_attributes.trainer, training_callback_attributes.optimizers
        if trainer is not None:
            self.total_steps = trainer.config.max_num_iterations

        def begin(step: int) -> None:
            self.step = step
            spacing = self.config.octree.level_start_steps
            self.field.activate_level(step // spacing if spacing else self.config.octree.max_level)
            self.field.grow_up(1 / (self.growth.config.every or _TAKE_OVER_STEPS))

        def grow(step: int) -> None:
            if self.growth.is_due(step, self.progress):
                done = self.growth.round(step, self.field, held.optimizers.values())
                CONSOLE.log(
                    f"step {step}: {int(done.births.sum())} nodes were born and {int(done.deaths.sum())} have died;"
                    f" nodes per level {self.field.octree.nodes_per_level}"
                )

        before, after = TrainingCallbackLocation.BEFORE_TRAIN_ITERATION, TrainingCallbackLocation.AFTER_TRAIN_ITERATION
        return [TrainingCallback([before], begin), TrainingCallback([after], grow)]

    # -- rendering

    def camera_rays(self, camera: Cameras, obb_box: OrientedBox | None = None) -> RayBundle:
        """Rays [H, W] of one camera with its near plane; orthographic ones have the constant footprint of their ground
        pixel.

        Raises:
            InputError: it cannot be drawn.
        """
        camera = drawable(camera)
        rays = camera.generate_rays(camera_indices=0, keep_shape=True, obb_box=obb_box)
        if int(camera.camera_type.flatten()[0]) == CameraType.ORTHOPHOTO.value:
            radius = 1 / (2 * float(camera.fx.flatten()[0]))
            rays.metadata[ORTHOGRAPHIC_FOOTPRINT] = torch.full_like(rays.pixel_area, radius)
        if self.near_planes is not None:
            near = torch.full_like(rays.pixel_area, float(self.near_planes(camera)[0]))
            rays.nears = near if rays.nears is None else torch.maximum(rays.nears, near)
        return rays

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Renders an image of rays [H, W]; where they come without a near plane (ns-export tsdf), they get one."""
        rays = camera_ray_bundle
        if rays.nears is None and self.near_planes is not None and not bool((rays.pixel_area == 1).any()):
            rays.nears = torch.full_like(rays.pixel_area, self.near_planes.of_image(rays.origins, rays.directions))
        with interrupted_between_chunks():
            if self.views is None:
                return self._image(rays, self.footprint_scale)
            with self.views.image(rays, self.footprint_scale, self._probe) as scale:
                return self._image(rays, scale)

    def _probe(self, rays: RayBundle) -> dict[str, Tensor]:
        """Renders rays that are no part of an image."""
        told, self.on_evaluated = self.on_evaluated, None
        try:
            return self.get_outputs(rays)
        finally:
            self.on_evaluated = told

    def _image(self, rays: RayBundle, routing_scale: float) -> dict[str, Tensor]:
        if routing_scale != 1:
            rays.metadata[ROUTING_SCALE] = torch.full_like(rays.pixel_area, routing_scale)
        return super().get_outputs_for_camera_ray_bundle(rays)

    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Renders a camera; of a packed model, what the next camera needs is loaded behind it."""
        with interrupted_between_chunks():
            camera = drawable(camera)
            outputs = self.get_outputs_for_camera_ray_bundle(self.camera_rays(camera, obb_box))
            if self.views is not None and self.config.streaming.prefetch:
                self.views.expect_next(camera, self.camera_rays, self.footprint_scale)
            return outputs

    def forward(self, ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Renders rays; those of a packed model region by region, where they do not come from one place."""
        may_be_interrupted()
        if self.training:  # the trainer measures whole steps
            return super().forward(ray_bundle)
        with self._threads.piece(len(ray_bundle)) if self.device.type == "cpu" else nullcontext():
            if self.views is None:
                return super().forward(ray_bundle)
            return self.views.by_region(ray_bundle, super().forward)

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Float[Tensor, "*bs 4"]:
        """Colour with the accumulation as alpha, so that exported point clouds and meshes leave the background out."""
        return torch.cat([outputs[output_name], outputs["accumulation"]], dim=-1)

    def _appearance(self, rays: RayBundle) -> Float[Tensor, "R A"] | None:
        """Appearance code per ray: the given one; in training the photo's own, or for a share of the rays the mean of
        all photos; otherwise that mean. The codes learn from their own photos alone."""
        if self.field.appearance is None:
            return None
        if APPEARANCE in rays.metadata:
            return rays.metadata[APPEARANCE]
        mean = self.field.appearance.weight.detach().mean(dim=0).expand(len(rays), -1)
        if not self.training:
            return mean
        assert rays.camera_indices is not None
        of_mean = torch.rand(len(rays), 1, device=mean.device) < self.config.mean_appearance_share
        return torch.where(of_mean, mean, self.field.appearance(rays.camera_indices[:, 0]))

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Any]:
        """Renders rays.

        Returns:
            ``rgb [R, 3]``, ``accumulation``, ``depth`` (median) and ``expected_depth`` [R, 1]; in evaluation also
            ``level [R, 3]`` (mean octree level as a colour, blue = root), ``node [R, 3]`` (a colour per node, of the
            one that evaluates the middle of the ray's weight) and ``normals [R, 3]`` in 0..1; in training what the
            losses need.
        """
        if self.training:
            # Half precision would turn the rays by pixels.
            with torch.autocast(ray_bundle.origins.device.type, enabled=False):
                self.camera_optimizer.apply_to_raybundle(ray_bundle)
        routing_scale = 1.0
        if ROUTING_SCALE in (ray_bundle.metadata or {}):
            routing_scale = float(ray_bundle.metadata[ROUTING_SCALE][0])
        proposal_density = partial(self.field.proposal_density, routing_scale=routing_scale)
        samples, weights_list, samples_list = self.sampler(ray_bundle, proposal_density, self.step)
        positions, footprints, shaded = self._shade(ray_bundle, samples, routing_scale=routing_scale)
        weights = shaded.weights
        outputs: dict[str, Any] = {
            "rgb": self.renderer_rgb(rgb=shaded.rgb, weights=weights),
            "accumulation": self.renderer_accumulation(weights=weights),
            "expected_depth": self.renderer_expected_depth(weights=weights, ray_samples=samples),
        }
        with torch.no_grad():
            outputs["depth"] = self.renderer_depth(weights=weights, ray_samples=samples)
        if self.training:
            self.field.count_samples(shaded.routed)
            if self.growth.watches(self.step, self.progress) and shaded.density.requires_grad:
                outputs["watch"] = Watch(self.growth, self.field, shaded)
            outputs["weights_list"] = [*weights_list, weights]
            outputs["ray_samples_list"] = [*samples_list, samples]
            outputs["rays"], outputs["densities"] = ray_bundle, (shaded.density, shaded.routed.node)
        else:
            evaluated = Evaluated(shaded.routed, shaded.share, weights)
            outputs["level"] = level_image(self.field.octree, evaluated)
            outputs["node"] = node_image(self.field.octree, evaluated)
            if self.on_evaluated is not None:
                self.on_evaluated(evaluated)
            if self.config.render_normals:
                outputs["normals"] = self._normal_color(
                    positions, footprints, weights, outputs["accumulation"], routing_scale
                )
        return outputs

    def _shade(
        self, rays: RayBundle, samples: Intervals, *, routing_scale: float = 1.0, max_level: int | None = None
    ) -> tuple[Float[Tensor, "M 3"], Float[Tensor, "M"] | None, Shaded]:
        """Positions and footprints of the samples, and what the field says of them."""
        positions, footprints = sample_geometry(
            rays,
            samples,
            interval_share=self.config.sampler.interval_footprint,
            cube=self.field.octree.cube,
            jitter=self.training and self.config.sampler.footprint_jitter,
        )
        positions = positions.reshape(-1, 3)
        footprints = None if footprints is None else footprints.reshape(-1)
        blended = self.config.blend_levels and not self.training
        routed = route(
            self.field, positions, footprints, max_level=max_level, routing_scale=routing_scale, blended=blended
        )
        threshold = self.config.color_weight_threshold
        return positions, footprints, shade(self.field, rays, samples, routed, self._appearance(rays), threshold)

    def render_cut(
        self, outputs: dict[str, Any], chosen: Int[Tensor, "n"], level: int, deepest: int
    ) -> dict[str, Tensor]:
        """Rays of a training step once more, with the tree cut at a level and with fewer samples.

        Args:
            outputs: of the step.
            chosen: which of its rays.
            level: deepest level that takes part.
            deepest: of the tree.

        Returns:
            ``rgb [n, 3]``, ``accumulation`` and ``expected_depth`` [n, 1].
        """
        rays = outputs["rays"][chosen]
        count = multi_scale.cut_samples(self.config.sampler.samples, level, deepest)
        last, weights = outputs["ray_samples_list"][-2], outputs["weights_list"][-2]
        proposal = Intervals(last.bins[chosen], last.edges[chosen])
        samples = self.sampler.resample(rays, proposal, weights[chosen].detach(), count, self.step)
        _, _, shaded = self._shade(rays, samples, max_level=level)
        return {
            "rgb": self.renderer_rgb(rgb=shaded.rgb, weights=shaded.weights),
            "accumulation": self.renderer_accumulation(weights=shaded.weights),
            "expected_depth": self.renderer_expected_depth(weights=shaded.weights, ray_samples=samples),
        }

    def _normal_color(
        self,
        positions: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"] | None,
        weights: Float[Tensor, "R S 1"],
        accumulation: Float[Tensor, "R 1"],
        routing_scale: float,
    ) -> Float[Tensor, "R 3"]:
        """Mean normal of each ray in 0..1."""
        at = weight_quantiles(weights[..., 0], _NORMALS_PER_RAY).reshape(-1)
        normals = self.field.normals(positions[at], None if footprints is None else footprints[at], routing_scale)
        normals = normals.reshape(len(weights), _NORMALS_PER_RAY, 3)
        share = accumulation[:, None].expand(-1, _NORMALS_PER_RAY, 1) / _NORMALS_PER_RAY
        return self.normals_shader(self.renderer_normals(normals=normals, weights=share)).clamp(0, 1)

    # -- losses and metrics

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """PSNR of the batch (over all its pyramid levels), distortion."""
        predicted, target = self.rgb_pair(outputs, batch["image"])
        metrics = {"psnr": -10 * torch.log10(reconstruction.mse(predicted, target))}
        if self.training:
            metrics["distortion"] = distortion(outputs)
            if self.config.growth.every:
                counts = enumerate(self.field.octree.nodes_per_level)
                metrics.update({f"nodes_level_{level}": torch.tensor(float(count)) for level, count in counts})
        self.camera_optimizer.get_metrics_dict(metrics)
        return metrics

    def rgb_pair(
        self, outputs: dict[str, Any], photo: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
        """Colours, and those of the photo (which may be transparent), in front of the same background."""
        return self.renderer_rgb.blend_background_for_loss_computation(
            pred_image=outputs["rgb"],
            pred_accumulation=outputs["accumulation"],
            gt_image=photo.to(outputs["rgb"].device),
        )

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses, by name; their weights join the metrics."""
        pair = self.rgb_pair(outputs, batch["image"])
        if not self.training:
            return {"rgb_loss": getattr(reconstruction, self.config.losses.rgb)(*pair)}
        if "watch" in outputs:
            outputs["watch"].error = (pair[0] - pair[1]).detach().square().mean(dim=-1)
        losses = self.objective(self, outputs, batch, pair, {} if metrics_dict is None else metrics_dict)
        self.camera_optimizer.get_loss_dict(losses)
        return losses

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR and SSIM of one image (LPIPS where its weights are at hand), and images to look at."""
        from infnerf_ns.image_metrics import image_metrics

        target = self.renderer_rgb.blend_background(batch["image"].to(outputs["rgb"].device))
        predicted = outputs["rgb"]
        metrics = image_metrics(predicted, target, batch.get("mask"))
        images = {
            "img": torch.cat([target, predicted], dim=1),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
            "depth": colormaps.apply_depth_colormap(outputs["depth"], accumulation=outputs["accumulation"]),
            "level": outputs["level"],
            "node": outputs["node"],
        }
        if "normals" in outputs:
            images["normals"] = outputs["normals"]
        return metrics, images
