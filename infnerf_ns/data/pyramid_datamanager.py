"""The data manager: rays drawn uniformly over the pixels of all photos and all their pyramid levels.

Pyramid supervision (InfNeRF, section 3.4): photos at 1, 1/2, ... 1/16, each ray with the pixel area of its own level,
so the octree is trained at every level that a photo can show. All levels are in memory as uint8. Beside the datasets
that nerfstudio expects, the train dataset's metadata carries the :class:`~infnerf_ns.data.sfm.SfMScene` that the model
builds its octree from.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser, ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from infnerf_ns.data import checks
from infnerf_ns.data.capture.consistency import check_consistency
from infnerf_ns.data.capture.reading import METADATA_KEY, CapturePhotos, PhotoDataset
from infnerf_ns.data.depth import check_depth
from infnerf_ns.data.photo_order import neighbour_order
from infnerf_ns.data.point_files import IMPLIED_TRANSFORM, colmap_tracks, ply_points
from infnerf_ns.data.pyramid import PixelPyramid, downsample_mask, level_mean, num_levels
from infnerf_ns.data.pyramid_loading import circle_mask, load_pyramid
from infnerf_ns.data.pyramid_rays import PyramidRays, level_camera
from infnerf_ns.data.sfm import SfMScene, build_sfm_scene
from infnerf_ns.errors import InputError
from infnerf_ns.validation import Range


@dataclass
class PyramidDataManagerConfig(VanillaDataManagerConfig):
    """Pyramid data manager: rays over the pixels of all photos at 1, 1/2, 1/4 ... of their size."""

    _target: type = field(default_factory=lambda: PyramidDataManager)
    num_pyramid_levels: Annotated[int, Range(1, 16)] = 5
    """Pyramid levels per photo: 1, 1/2 ... 1/16. A photo has fewer where a level would be smaller than 8 pixels."""
    level_share: Annotated[float, Range(0.0, 1.0)] = 0.4
    """Share of the training rays in which every pyramid level has the same chance. The others are uniform over the
    pixels of all levels (the paper), of which the coarsest level has less than 1 in 300."""
    photos_per_step: Annotated[int, Range(0)] = 0
    """Photos that the rays of a training step come from: a random one and its neighbours in the air. A step then visits
    one part of the tree, whatever the size of the scene. 0: all photos."""
    ray_table_mib: Annotated[int, Range(0)] = 512
    """Memory for precomputed ray directions (16 bytes per pixel of one photo, photos with equal intrinsics share them).
    If they do not fit, rays are computed anew for every batch, which is about 10 times slower."""
    # nerfstudio's own, with limits
    train_num_rays_per_batch: Annotated[int, Range(1)] = 1024
    """Rays of a training step."""
    eval_num_rays_per_batch: Annotated[int, Range(1)] = 1024
    """Rays of an evaluation batch."""
    patch_size: Annotated[int, Range(1, 1024)] = 1
    """Side of the square patches that rays are drawn in; 1: single pixels."""
    patch_share: Annotated[float, Range(0.0, 1.0)] = 1.0
    """Share of the rays that are drawn in patches (at least one) where patch_size is above 1; the others are single
    pixels, and the photometric loss is theirs alone (1: that of all)."""
    use_depth: bool = False
    """Load the depth images of the capture, for losses on depth."""
    is_euclidean_depth: bool = False
    """The depth images hold distances from the camera. False: depths along its viewing axis, nerfstudio's usual."""
    camera_res_scale_factor: Annotated[float, Range(1e-3, 16.0)] = 1.0
    """Size of the photos, relative: 0.5 trains on half-size photos."""


@dataclass
class _RaySource:
    """The pixels of one split and the rays through them."""

    pyramid: PixelPyramid
    rays: PyramidRays
    photos: int
    """that a batch comes from; 0: all"""
    euclidean: bool
    """whether the pyramid's depths are distances"""

    def batch(self, num_rays: int, patch_size: int, patch_share: float) -> tuple[RayBundle, dict[str, Any]]:
        """R random rays and their batch, as :meth:`PyramidDataManager.next_train` describes it."""
        try:
            draw = self.pyramid.draw(num_rays, patch_size, photos=self.photos, patch_share=patch_share)
        except ValueError as error:
            raise InputError(f"{error}: check the masks, or lower --pipeline.datamanager.patch-size") from error
        device = self.rays.cameras.device
        batch = {
            "image": draw.image.to(device).float() / 255.0,
            "indices": torch.stack([draw.photo, draw.row, draw.column], dim=-1).to(device),
            "pyramid_level": draw.level.to(device),
            "patch_rays": draw.patch_rays,
            "patch_size": patch_size,
        }
        rays = self.rays(draw)
        if draw.depth is not None:
            depth = draw.depth.to(device)
            batch["depth"] = depth if self.euclidean else depth * rays.metadata["directions_norm"][:, 0]
        return rays, batch


class PyramidDataManager(VanillaDataManager[PhotoDataset]):
    """Data manager with photo pyramids.

    Args:
        config: all photos of a split are always in memory: ``*_num_images_to_sample_from`` and
            ``*_num_times_to_repeat_images`` have no effect. With ``patch_size`` > 1 a batch begins with whole patches,
            each within one photo and level.
        device: where the rays and batches go; with ``images_on_gpu`` the pixels are kept there, too.
        test_mode: ``val`` (training) loads all photos at once; ``test`` loads a split when its rays are first asked
            for (most scripts never do); ``inference`` never looks at a photo.
        world_size: number of processes.
        local_rank: rank of this process on its machine.

    Raises:
        InputError: the capture is not usable.
    """

    config: PyramidDataManagerConfig
    near_planes: Callable[[Cameras], Float[Tensor, "c"]] | None = None
    """Gives every photo's rays their near plane; the pipeline sets it, as the points come with the model's
    checkpoint."""

    def __init__(
        self,
        config: PyramidDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.device = device
        self.world_size = world_size
        self.local_rank = local_rank
        self.sampler = None
        self.test_mode = test_mode
        self.test_split = "val" if test_mode == "val" else "test"
        if config.data is None:
            config.data = config.dataparser.data
        config.dataparser.data = Path(config.data)
        self.dataparser_config = config.dataparser
        checks.check_config(config.dataparser)

        outputs = self._parse_train_split(points=test_mode == "val")
        photos = CapturePhotos(outputs, None if test_mode == "val" else lambda: self._parse_train_split(points=True))
        outputs.metadata = {**outputs.metadata, METADATA_KEY: photos}
        checks.check_outputs(outputs, "train", photos=test_mode != "inference")
        if self._with_depth:
            check_depth(outputs, "train")
        scene = SfMScene.placeholder()
        if test_mode == "val":  # else the model loads a checkpoint, with the tree in it
            cameras = copy.deepcopy(outputs.cameras)
            cameras.rescale_output_resolution(config.camera_res_scale_factor)
            check_consistency(outputs)
            scene = build_sfm_scene(outputs, cameras)
            CONSOLE.log(f"{len(scene.points)} SfM points ({scene.source}), near plane {scene.near:.3g}")
        kept = {key: value for key, value in outputs.metadata.items() if key != "tracks"}
        outputs.metadata = {**kept, "sfm_scene": scene}

        self.train_dataparser_outputs = outputs
        self.dataparser = self._make_dataparser(with_points(config.dataparser, False))
        self.includes_time = self.dataparser.includes_time
        self.train_dataset = self.create_train_dataset()
        self.eval_dataset = self.create_eval_dataset()
        for dataset in (self.train_dataset, self.eval_dataset):
            dataset.cameras.metadata = dataset.cameras.metadata or {}  # ns-export cameras asserts that there are some
        self.exclude_batch_keys_from_device = self.train_dataset.exclude_batch_keys_from_device
        DataManager.__init__(self)  # calls setup_train and setup_eval

    @property
    def _with_depth(self) -> bool:
        return self.config.use_depth and self.test_mode == "val"  # only a training has losses

    def _make_dataparser(self, config: DataParserConfig) -> DataParser:
        dataparser = quiet_dataparser(config)
        if self.test_mode == "inference":
            dataparser.downscale_factor = 1  # nerfstudio's way not to open photos
            if isinstance(dataparser, ColmapDataParser):
                dataparser._downscale_factor = 1
        return dataparser

    def _parse_train_split(self, points: bool) -> DataparserOutputs:
        """Outputs of the train split, on demand with SfM points and tracks if there are any."""
        config = self.config.dataparser
        points_error = None
        if points:
            try:
                outputs = self._make_dataparser(with_points(config, True)).get_dataparser_outputs(split="train")
            except Exception as error:
                points_error = error
        if not points or points_error is not None:
            try:
                outputs = self._make_dataparser(with_points(config, False)).get_dataparser_outputs(split="train")
            except Exception as error:
                raise checks.explain(error, config) from error
        if not points:
            return outputs
        if "points3D_xyz" not in outputs.metadata:
            self._add_ply_points(outputs, points_error)
        elif isinstance(config, ColmapDataParserConfig):
            tracks = colmap_tracks(config.data / config.colmap_path, outputs.image_filenames)
            outputs.metadata = {**outputs.metadata, "tracks": tracks}
        return outputs

    def _add_ply_points(self, outputs: DataparserOutputs, error: Exception | None) -> None:
        """Reads the ply file of a ``transforms.json`` where the dataparser did not, or logs why there are no points."""
        transforms = checks.transforms_file(self.config.dataparser)
        meta = json.loads(transforms.read_text(encoding="utf-8")) if transforms is not None else {}
        if transforms is not None and "ply_file_path" in meta:
            path = transforms.parent / meta["ply_file_path"]
            try:
                implied = IMPLIED_TRANSFORM if (transforms.parent / "colmap/sparse/0").exists() else None
                points = ply_points(path, outputs, meta.get("applied_transform", implied))
                outputs.metadata = {**outputs.metadata, **points}
                return
            except Exception as ply_error:  # whatever is wrong with the file, training can go on without it
                error = ply_error
                CONSOLE.log(f"[yellow]infnerf: no points from {path}, which {transforms} names")
        if error is not None:
            CONSOLE.log(f"[yellow]infnerf: the SfM points could not be read ({type(error).__name__}: {error})")

    def create_eval_dataset(self) -> InputDataset:
        """The held-out photos; may be empty. A capture without a ``val`` split gives its ``test`` split."""
        try:
            try:
                outputs = self.dataparser.get_dataparser_outputs(split=self.test_split)
            except (FileNotFoundError, RuntimeError) as error:
                missing = isinstance(error, FileNotFoundError) or "split val is missing" in str(error)
                if self.test_split != "val" or not missing:
                    raise
                why = getattr(error, "filename", None) or error
                CONSOLE.log(f"[yellow]infnerf: no 'val' split ({why}): the 'test' split is held out instead")
                self.test_split = "test"
                outputs = self.dataparser.get_dataparser_outputs(split=self.test_split)
        except Exception as error:
            raise checks.explain(error, self.config.dataparser) from error
        photos = self.train_dataparser_outputs.metadata[METADATA_KEY]
        outputs.metadata = {**outputs.metadata, METADATA_KEY: photos}
        checks.check_outputs(outputs, self.test_split, photos=self.test_mode != "inference")
        if self._with_depth:
            check_depth(outputs, self.test_split)
        return self.dataset_type(dataparser_outputs=outputs, scale_factor=self.config.camera_res_scale_factor)

    def setup_train(self) -> None:
        """Loads the train photos where a training follows."""
        self.train_pixel_sampler = PixelSamplerConfig().setup(num_rays_per_batch=self.config.train_num_rays_per_batch)
        if self.test_mode == "val":
            _ = self._train_source

    def setup_eval(self) -> None:
        """Loads the held-out photos where a training follows."""
        self.eval_pixel_sampler = PixelSamplerConfig().setup(num_rays_per_batch=self.config.eval_num_rays_per_batch)
        if self.test_mode == "val":
            _ = self._eval_source

    @cached_property
    def _train_source(self) -> _RaySource:
        config = self.config
        return self._load_source(
            self.train_dataset, "train", config.ray_table_mib << 20, config.level_share, config.photos_per_step
        )

    @cached_property
    def _eval_source(self) -> _RaySource:
        self._require_eval_photos()
        return self._load_source(self.eval_dataset, "held-out", 0, 0.0, 0)

    @cached_property
    def fixed_indices_eval_dataloader(self) -> FixedIndicesEvalDataloader:
        """All held-out photos in order."""
        self._require_eval_photos()
        return FixedIndicesEvalDataloader(input_dataset=self.eval_dataset, device=self.device)

    @cached_property
    def eval_dataloader(self) -> RandIndicesEvalDataloader:
        """Random held-out photos."""
        self._require_eval_photos()
        return RandIndicesEvalDataloader(input_dataset=self.eval_dataset, device=self.device)

    def _require_eval_photos(self) -> None:
        if len(self.eval_dataset) == 0:
            raise InputError(
                f"the capture {self.config.data} has no held-out photos to evaluate: "
                "change --eval-mode / --train-split-fraction / --eval-interval of the dataparser"
            )

    def _load_source(
        self, dataset: InputDataset, name: str, table_bytes: int, level_share: float, photos: int
    ) -> _RaySource:
        config = self.config
        pyramid = load_pyramid(
            dataset,
            # Rays outside of training are for point clouds, which want the photos at full size only.
            config.num_pyramid_levels if self.test_mode == "val" else 1,
            name,
            ignore_masks=config.pixel_sampler.ignore_mask,
            level_share=level_share,
            crop_radius=self._crop_radius(dataset),
            order=neighbour_order(dataset.cameras) if photos else None,
            with_depth=self._with_depth,
        )
        if not pyramid.any_valid():
            raise InputError(f"the masks hide every pixel of the {name} photos: in a mask 0 means ignore")
        if config.images_on_gpu:
            pyramid.to(self.device)
        rays = PyramidRays(dataset.cameras.to(self.device), pyramid, table_bytes)
        return _RaySource(pyramid, rays, photos, config.is_euclidean_depth)

    def _crop_radius(self, dataset: InputDataset) -> float | None:
        """Radius in pixels of the part of a fisheye photo that counts. nerfstudio's is one of the full-size photo, for
        downscaled copies as well."""
        radius = (dataset.cameras.metadata or {}).get("fisheye_crop_radius")
        if radius is None:
            return None
        return float(radius) * dataset.scale_factor / (getattr(self.dataparser, "downscale_factor", None) or 1)

    @cached_property
    def _train_nears(self) -> Float[Tensor, "c"] | None:
        return None if self.near_planes is None else self.near_planes(self.train_dataset.cameras).to(self.device)

    @cached_property
    def _eval_nears(self) -> Float[Tensor, "c"] | None:
        return None if self.near_planes is None else self.near_planes(self.eval_dataset.cameras).to(self.device)

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """R random rays of the train photos.

        Returns:
            rays [R] with the pixel area of their own level, the photo as camera index and its near plane; batch with
            ``image [R, 3 or 4]`` float32 in 0..1, ``indices [R, 3]`` (photo, row, column; the latter two within the
            level), ``pyramid_level [R]`` int64, and the integers ``patch_rays`` and ``patch_size``: the first
            ``patch_rays`` rays (0 without patches) are whole patches, one after the other and each row by row, so that
            they reshape to ``[-1, patch_size, patch_size]``. With ``use_depth`` (in training) also ``depth [R]``
            float32, the distance along the ray in scene units, 0 where it is not known.
        """
        self.train_count += 1
        return self._batch(self._train_source, self.get_train_rays_per_batch(), self._train_nears)

    def next_eval(self, step: int) -> tuple[RayBundle, dict[str, Any]]:
        """R random rays of the held-out photos, as :meth:`next_train`."""
        self.eval_count += 1
        return self._batch(self._eval_source, self.get_eval_rays_per_batch(), self._eval_nears)

    def _batch(
        self, source: _RaySource, num_rays: int, nears: Float[Tensor, "c"] | None
    ) -> tuple[RayBundle, dict[str, Any]]:
        rays, batch = source.batch(num_rays, self.config.patch_size, self.config.patch_share)
        if nears is not None:
            rays.nears = nears[rays.camera_indices]
        return rays, batch

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A random held-out photo at full size."""
        return next(self.eval_dataloader)

    def eval_pyramid(
        self, camera: Cameras, batch: dict[str, Any]
    ) -> Iterator[tuple[int, Cameras, Float[Tensor, "h w c"], Bool[Tensor, "h w 1"] | None]]:
        """The pyramid of one held-out photo.

        Args:
            camera: shape (1,), at full size.
            batch: its batch, with ``image [H, W, C]`` float in 0..1 and perhaps ``mask [H, W, 1]``.

        Yields:
            level, the camera at that level, the photo at that level (not rounded to uint8), its mask or None.
        """
        image = batch["image"]
        mask = batch.get("mask")
        radius = self._crop_radius(self.eval_dataset)
        if radius is not None:
            circle = torch.from_numpy(circle_mask(*image.shape[:2], radius))[..., None]
            mask = circle if mask is None else mask.bool().cpu() & circle
        for level in range(num_levels(*image.shape[:2], self.config.num_pyramid_levels)):
            level_image = level_mean(image, level)
            level_mask = None
            if mask is not None:
                level_mask = torch.from_numpy(downsample_mask(mask[..., 0].bool().cpu().numpy(), level))[..., None]
            yield level, level_camera(camera, level, *level_image.shape[:2]), level_image, level_mask


def quiet_dataparser(config: DataParserConfig) -> DataParser:
    """The dataparser of a config, which asks nothing and leaves the capture as it is."""
    dataparser = config.setup()
    if isinstance(dataparser, Nerfstudio):
        dataparser.prompted_user = True  # else it may ask whether to rewrite the capture
        dataparser.create_pc = False
    return dataparser


def read_split(config: DataParserConfig, split: str) -> DataparserOutputs:
    """What a dataparser says of a split, without a data manager.

    Raises:
        InputError: it cannot be read.
    """
    checks.check_config(config)
    try:
        return quiet_dataparser(config).get_dataparser_outputs(split)
    except Exception as error:
        raise checks.explain(error, config) from error


def with_points(config: DataParserConfig, points: bool) -> DataParserConfig:
    """A copy of the dataparser's config that loads, or does not load, SfM points."""
    config = copy.copy(config)
    if hasattr(config, "load_3D_points"):
        config.load_3D_points = points
    if hasattr(config, "max_2D_matches_per_3D_point"):
        config.max_2D_matches_per_3D_point = 0  # colmap_tracks reads them without padding
    return config
