"""Which losses a training has, and their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from infnerf_ns.losses.schedules import ScheduleName, ScheduleShape
from infnerf_ns.validation import Range, Reloadable

SMALLEST_PATCH = 8
"""Side in pixels of the patches that SSIM, LPIPS and the discriminator need."""

_PATCH_LOSSES = ("patch_variation", "ssim", "lpips", "adversarial", "depth_gradient")


@dataclass
class LossSchedules:
    """How the weight of each loss changes over the training."""

    distortion: ScheduleName = "constant"
    """Of the distortion loss."""
    proposal: ScheduleName = "constant"
    """Of the proposal loss."""
    inter_level: ScheduleName = "constant"
    """Of the consistency between a node and its parent."""
    transparency: ScheduleName = "constant"
    """Of the transparency of random points."""
    multi_scale: ScheduleName = "constant"
    """Of the reconstruction with the tree cut at coarser levels."""
    depth_consistency: ScheduleName = "warm_up"
    """Of the depth between adjacent levels."""
    normal_consistency: ScheduleName = "warm_up"
    """Of the normals between adjacent levels."""
    sparsity: ScheduleName = "constant"
    """Of the sparsity of the density."""
    grid_decay: ScheduleName = "constant"
    """Of the decay of the grids."""
    grid_variation: ScheduleName = "constant"
    """Of the total variation of the grids."""
    face_smoothness: ScheduleName = "warm_up"
    """Of the smoothness across faces."""
    patch_variation: ScheduleName = "constant"
    """Of the total variation of rendered depth."""
    ssim: ScheduleName = "warm_up"
    """Of the structural similarity."""
    lpips: ScheduleName = "late_start"
    """Of the perceptual similarity."""
    adversarial: ScheduleName = "late_start"
    """Of the adversarial loss."""
    depth: ScheduleName = "peak_decay"
    """Of the depth supervision."""
    depth_gradient: ScheduleName = "peak_decay"
    """Of the supervision of depth gradients."""
    shape: ScheduleShape = dataclasses.field(default_factory=ScheduleShape)
    """Where the curves bend."""


@dataclass
class LossConfig(Reloadable):
    """Weights of the losses; 0 switches one off."""

    rgb: Literal["mse", "charbonnier"] = "mse"
    """Photometric loss."""
    distortion: Annotated[float, Range(0.0, 10.0)] = 0.002
    """Distortion loss (mip-NeRF 360)."""
    proposal: Annotated[float, Range(0.0, 100.0)] = 1.0
    """Proposal (interlevel) loss (mip-NeRF 360)."""
    inter_level: Annotated[float, Range(0.0, 10.0)] = 0.01
    """The paper's consistency between a node and its parent."""
    transparency: Annotated[float, Range(0.0, 10.0)] = 0.001
    """The paper's transparency of random points."""
    tree_points: Annotated[int, Range(1, 1_000_000)] = 2048
    """Random points of the losses that look at nodes: the two before, grid_decay, grid_variation, face_smoothness."""
    tree_nodes: Annotated[int, Range(1, 10_000)] = 4
    """Random nodes (or faces) that these points lie in."""
    tree_every: Annotated[int, Range(1, 10_000)] = 32
    """Steps between two evaluations of these losses."""
    multi_scale: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Photometric loss of the same rays rendered with the tree cut at coarser levels."""
    depth_consistency: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Smooth L1 between the depths of adjacent cuts, in units of the coarser one's GSD."""
    normal_consistency: Annotated[float, Range(0.0, 100.0)] = 0.0
    """1 - cosine between the normals of adjacent levels."""
    cut_levels: Annotated[tuple[int, ...], Range(0, 20)] = ()
    """Levels at which the tree is cut for these three; empty: all but the deepest."""
    cut_rays: Annotated[int, Range(1, 1_000_000)] = 256
    """Rays of a step that are rendered with the tree cut."""
    cut_every: Annotated[int, Range(1, 10_000)] = 4
    """Steps between two such renderings."""
    coarse_first: Annotated[float, Range(0.0, 1.0)] = 0.3
    """Share of the training over which finer and finer cuts join in."""
    sparsity: Annotated[float, Range(0.0, 10.0)] = 0.0
    """Cauchy loss on the density of all samples (SNeRG)."""
    grid_decay: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Mean square of the entries of the grids (Zip-NeRF)."""
    grid_variation: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Mean squared difference of adjacent entries of the grids."""
    face_smoothness: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Difference of density and colour across the faces between neighbouring nodes."""
    patch_variation: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Total variation of the depth of rendered patches, relative to their mean depth."""
    ssim: Annotated[float, Range(0.0, 10.0)] = 0.0
    """1 - SSIM of rendered patches."""
    lpips: Annotated[float, Range(0.0, 10.0)] = 0.0
    """LPIPS of rendered patches, where its weights are on this machine."""
    adversarial: Annotated[float, Range(0.0, 10.0)] = 0.0
    """Loss against a small discriminator of patches, which is trained beside."""
    depth: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Scale-invariant logarithmic error of the depth, where the capture has depth images."""
    depth_gradient: Annotated[float, Range(0.0, 100.0)] = 0.0
    """Error of the gradients of the logarithm of depth in patches."""
    depth_scale_free: Annotated[float, Range(0.0, 1.0)] = 0.5
    """How far the scale of the depth images is left open: 0, it is known; 1, each batch has its own."""
    balance: bool = False
    """Balance the weights of all losses but the photometric and the adversarial one by their recent variation."""
    schedules: LossSchedules = dataclasses.field(default_factory=LossSchedules)
    """How the weights change over the training."""

    @property
    def wants_depth(self) -> bool:
        """Whether depth images are used."""
        return self.depth > 0 or self.depth_gradient > 0

    def patch_losses(self) -> list[str]:
        """Losses that are on and need patches."""
        return [name for name in _PATCH_LOSSES if getattr(self, name) > 0]
