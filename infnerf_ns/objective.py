"""The losses of a training step: which of them are due, their values from the model's outputs, and their weights.

The losses themselves are pure functions in :mod:`infnerf_ns.losses`; here they meet the model. A weight is the
configured one, times its schedule, times its share of the balance; all are logged.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from nerfstudio.model_components.losses import interlevel_loss, ray_samples_to_sdist
from torch import Tensor, nn

from infnerf_ns.field import OctreeField
from infnerf_ns.losses import consistency, depth, faces, grids, multi_scale, patches, reconstruction, tree
from infnerf_ns.losses import ray as ray_losses
from infnerf_ns.losses.adversarial import PatchDiscriminator, adversarial_losses
from infnerf_ns.losses.balancing import LossBalance
from infnerf_ns.losses.config import LossConfig, LossSchedules
from infnerf_ns.losses.schedules import schedule_factor
from infnerf_ns.rendering import field_at
from infnerf_ns.sampler import LoDSampler

NAMES = tuple(field.name for field in fields(LossSchedules) if field.name != "shape")
"""Of all losses but the photometric one."""
_OF_CUTS = ("multi_scale", "depth_consistency", "normal_consistency")
_UNBALANCED = ("adversarial",)
"""It may be negative, and its variation says nothing."""


class RenderingModel(Protocol):
    """What the losses ask of the model (:class:`infnerf_ns.model.InfNeRFModel` explains it)."""

    field: OctreeField
    sampler: LoDSampler
    step: int

    @property
    def progress(self) -> float:
        """Share of the training that is done."""

    def rgb_pair(
        self, outputs: dict[str, Any], photo: Float[Tensor, "R C"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
        """Colours and those of the photo, in front of the same background."""

    def render_cut(
        self, outputs: dict[str, Any], chosen: Int[Tensor, "n"], level: int, deepest: int
    ) -> dict[str, Tensor]:
        """Rays of a step once more, with the tree cut at a level."""


def distortion(outputs: dict[str, Any]) -> Float[Tensor, ""]:
    """Distortion loss of the field's samples."""
    edges = ray_samples_to_sdist(outputs["ray_samples_list"][-1])
    return ray_losses.distortion(outputs["weights_list"][-1][..., 0], edges)


def first_single(batch: dict[str, Any]) -> int:
    """First ray of the photometric losses, and of what is rendered with cuts: that of the rays behind the patches,
    unless all are in patches.

    A patch is one place of one photo. As a quarter of the rays and of the photometric loss, it cost 1.35 dB on
    caliterra and 2.1 dB on the demo: in its step, the decoders of a few nodes learn from it alone.
    """
    patched = int(batch.get("patch_rays", 0))
    return patched if patched < len(batch["image"]) else 0


class Objective(nn.Module):
    """Losses of a model; holds the discriminator and the state of the balance, where these are on.

    Args:
        config: weights.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator() if config.adversarial else None
        balanced = [name for name in NAMES if name not in _UNBALANCED]
        self.balance = LossBalance(balanced) if config.balance else None

    def weights(self, progress: float) -> dict[str, float]:
        """Configured weight times schedule of the losses that are on.

        Args:
            progress: share of the training that is done.
        """
        schedules = self.config.schedules
        weights = {
            name: getattr(self.config, name) * schedule_factor(getattr(schedules, name), progress, schedules.shape)
            for name in NAMES
            if getattr(self.config, name)
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def forward(
        self,
        model: RenderingModel,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        pair: tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]],
        metrics: dict[str, Tensor],
    ) -> dict[str, Float[Tensor, ""]]:
        """The weighted losses of a training step.

        Args:
            model: that has rendered the rays.
            outputs: of the model in training.
            batch: ``image [R, 3 or 4]``; with depth supervision ``depth [R]`` (along the ray, scene units, 0: not
                known); with patches their number of rays in ``patch_rays``.
            pair: colours, and those of the photos in front of the same background.
            metrics: is given the weights.

        Returns:
            By name with ``_loss`` behind it.
        """
        wanted = self.weights(model.progress)
        values: dict[str, Tensor] = {}
        if "distortion" in wanted:
            values["distortion"] = metrics["distortion"] if "distortion" in metrics else distortion(outputs)
        if "proposal" in wanted and model.sampler.updates_proposals(model.step):
            values["proposal"] = interlevel_loss(outputs["weights_list"], outputs["ray_samples_list"])
        if "sparsity" in wanted:
            values["sparsity"] = self._sparsity(model, outputs)
        if model.step % self.config.tree_every == 0:
            values.update(self._of_nodes(model, wanted))
        if model.step % self.config.cut_every == 0 and not wanted.keys().isdisjoint(_OF_CUTS):
            values.update(self._of_cuts(model, outputs, batch, wanted))
        values.update(self._of_patches(outputs, batch, pair, wanted))
        if "depth" in wanted:
            predicted, target = outputs["expected_depth"][None, None, :, 0], batch["depth"][None, None]
            free = self.config.depth_scale_free
            values["depth"] = depth.scale_invariant_log(predicted, target, target > 0, free)
        first = first_single(batch)
        losses = {"rgb_loss": getattr(reconstruction, self.config.rgb)(*(colors[first:] for colors in pair))}
        if "discriminator" in values:
            losses["discriminator_loss"] = values.pop("discriminator")
        factors: dict[str, Tensor] = {}
        if self.balance is not None:
            self.balance.observe({name: value for name, value in values.items() if name not in _UNBALANCED})
            factors = self.balance.factors()
        for name, value in values.items():
            weight = wanted[name] * factors.get(name, value.new_ones(()))
            losses[f"{name}_loss"] = weight * value
            metrics[f"weight_{name}"] = weight
        return losses

    def _sparsity(self, model: RenderingModel, outputs: dict[str, Any]) -> Float[Tensor, ""]:
        octree, (density, node) = model.field.octree, outputs["densities"]
        gsd = torch.tensor([octree.gsd(level) for level in range(octree.depth + 1)], device=density.device)
        return ray_losses.sparsity(density, gsd[octree.level[node]])

    def _of_nodes(self, model: RenderingModel, wanted: dict[str, float]) -> dict[str, Tensor]:
        """Losses at random places of random nodes of a random level."""
        config, field = self.config, model.field
        octree, deepest = field.octree, int(field.active_level)
        values: dict[str, Tensor] = {}

        def density_fn(points: Tensor, level: int) -> Tensor:
            return field.density_at(points, None, max_level=level)

        if "inter_level" in wanted or "transparency" in wanted:
            drawn = tree.random_points_in_nodes(octree, deepest, config.tree_nodes, config.tree_points)
            if drawn is not None and "inter_level" in wanted:
                values["inter_level"] = tree.inter_level(*drawn, octree, density_fn)
            if drawn is not None and "transparency" in wanted:
                values["transparency"] = tree.transparency(*drawn, octree, density_fn)
        for name, loss in (("grid_decay", grids.grid_decay), ("grid_variation", grids.grid_total_variation)):
            if name in wanted:
                level = int(torch.randint(min(deepest, octree.depth) + 1, ()))
                rows = torch.randint(octree.nodes_per_level[level], (config.tree_nodes,), device=octree.level.device)
                bank, layout = field.grids[level], field.layouts[level]
                values[name] = loss(bank, layout, rows, config.tree_points, field.config.backend)
        if "face_smoothness" in wanted:
            points = faces.random_points_on_faces(octree, deepest, config.tree_nodes, config.tree_points)
            if points is not None:
                values["face_smoothness"] = sum(faces.across_faces(points, octree, partial(field_at, field)))
        return values

    def _of_cuts(
        self, model: RenderingModel, outputs: dict[str, Any], batch: dict[str, Any], wanted: dict[str, float]
    ) -> dict[str, Tensor]:
        """Losses of some of the rays, rendered once more with the tree cut at coarser levels."""
        config, octree = self.config, model.field.octree
        deepest = min(int(model.field.active_level), octree.depth)
        levels = [level for level in config.cut_levels or range(deepest) if level < deepest]
        if not levels:
            return {}
        depths = outputs["expected_depth"]
        chosen = torch.arange(first_single(batch), len(depths), device=depths.device)
        chosen = chosen[:: max(1, len(chosen) // config.cut_rays)][: config.cut_rays]
        photo = batch["image"].to(depths.device)[chosen]
        cuts = {level: model.render_cut(outputs, chosen, level, deepest) for level in sorted(set(levels))}
        cuts[deepest] = {name: outputs[name][chosen] for name in ("expected_depth", "accumulation")}
        values: dict[str, Tensor] = {}
        if "multi_scale" in wanted:
            shares = multi_scale.level_weights(sorted(set(levels)), model.progress, config.coarse_first)
            photometric = getattr(reconstruction, config.rgb)
            parts = [photometric(*model.rgb_pair(cuts[level], photo)) for level in sorted(set(levels))]
            values["multi_scale"] = (shares.to(depths) * torch.stack(parts)).sum()
        pairs = [(level, level + 1) for level in cuts if level + 1 in cuts]
        if "depth_consistency" in wanted and pairs:
            values["depth_consistency"] = torch.stack([
                consistency.depth_consistency(
                    cuts[coarse]["expected_depth"][:, 0],
                    cuts[fine]["expected_depth"][:, 0],
                    depths.new_full((len(chosen),), octree.gsd(coarse)),
                )
                for coarse, fine in pairs
            ]).mean()  # fmt: skip
        if "normal_consistency" in wanted and pairs:
            values["normal_consistency"] = self._normals(model, outputs, chosen, pairs)
        return values

    def _normals(
        self, model: RenderingModel, outputs: dict[str, Any], chosen: Int[Tensor, "n"], pairs: list[tuple[int, int]]
    ) -> Float[Tensor, ""]:
        """Consistency of normals where the chosen rays end."""
        field, rays = model.field, outputs["rays"][chosen]
        points = (rays.origins + rays.directions * outputs["expected_depth"][chosen]).detach()
        normals = {
            level: consistency.numerical_normals(
                points,
                lambda corners, level=level: field.density_at(corners, None, max_level=level),
                field.octree.gsd(level),
            )
            for level in {level for pair in pairs for level in pair}
        }
        weight = outputs["accumulation"][chosen, 0]
        parts = [consistency.normal_consistency(normals[coarse], normals[fine], weight) for coarse, fine in pairs]
        return torch.stack(parts).mean()

    def _of_patches(
        self,
        outputs: dict[str, Any],
        batch: dict[str, Any],
        pair: tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]],
        wanted: dict[str, float],
    ) -> dict[str, Tensor]:
        """Losses of the rays that are drawn in patches."""
        rays, side = int(batch.get("patch_rays", 0)), int(batch.get("patch_size", 1))
        names = set(self.config.patch_losses()) & wanted.keys()
        if not names or not rays:
            return {}

        def cut(values: Tensor) -> Tensor:
            return values[:rays].reshape(-1, side, side, *values.shape[1:])

        predicted, target = map(cut, pair)
        values: dict[str, Tensor] = {}
        if "ssim" in names:
            values["ssim"] = patches.ssim_loss(predicted, target)
        if "lpips" in names and (value := patches.lpips_loss(predicted, target)) is not None:
            values["lpips"] = value
        if "adversarial" in names:
            assert self.discriminator is not None
            both = adversarial_losses(self.discriminator, target, predicted)
            values["adversarial"], values["discriminator"] = both.generator, both.discriminator
        expected = cut(outputs["expected_depth"])
        if "patch_variation" in names:
            mean = expected.detach().mean(dim=(1, 2), keepdim=True).clamp(min=1e-9)
            values["patch_variation"] = patches.total_variation(expected / mean)
        if "depth_gradient" in names:
            known = cut(batch["depth"])
            values["depth_gradient"] = depth.log_gradient(expected[..., 0], known, known > 0)
        return values
