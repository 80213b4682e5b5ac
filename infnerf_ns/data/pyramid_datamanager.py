"""The data manager: rays drawn uniformly over the pixels of all photos and all their pyramid levels.

Pyramid supervision (InfNeRF, section 3.4): photos at 1, 1/2, ... 1/16, each ray with the pixel area of its own level,
so the octree is trained at every level that a photo can show. All levels are in memory as uint8. Beside the datasets
that nerfstudio expects, the train dataset's metadata carries the :class:`~infnerf_ns.data.sfm.SfMScene` that the model
builds its octree from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import torch
import tyro
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from infnerf_ns.data import checks
from infnerf_ns.data.camera_rays import CameraRays
from infnerf_ns.data.capture import splits
from infnerf_ns.data.capture.consistency.check import check_consistency
from infnerf_ns.data.capture.parsers import make_parser, read_split, want_points
from infnerf_ns.data.capture.reading import METADATA_KEY, CapturePhotos
from infnerf_ns.data.capture.record import CaptureRecord
from infnerf_ns.data.capture.recorded_photos import HeldOutPhotos, RecordedOutputs, RecordedPhotos
from infnerf_ns.data.depth import check_depth
from infnerf_ns.data.photo_order import neighbour_order
from infnerf_ns.data.pyramid import PixelPyramid, downsample_mask, level_mean, num_levels
from infnerf_ns.data.pyramid_loading import circle_mask, load_pyramid
from infnerf_ns.data.pyramid_rays import PyramidRays, level_camera
from infnerf_ns.data.sfm import SfMScene, build_sfm_scene
from infnerf_ns.errors import InputError
from infnerf_ns.validation import Range, warn


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
    record: Annotated[Optional[Path], tyro.conf.Suppress] = None
    """What a run that is loaded has kept of its capture; set when its checkpoint is looked up."""


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


class PyramidDataManager(VanillaDataManager[RecordedPhotos]):
    """Data manager with photo pyramids.

    A run that is loaded takes its cameras from the record that its training has written
    (:mod:`infnerf_ns.data.capture.record`), if there is one, and else from the capture.

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
    record: CaptureRecord | None
    """of the run that is loaded; None in training and for runs of earlier versions"""

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
        self.record = recorded_capture(config, test_mode)
        self.dataparser = self._make_dataparser(points=test_mode == "val" and self.record is None)
        if self.record is not None:
            self.dataparser.downscale_factor = self.record.downscale_factor
            outputs = self._recorded("train")
        else:
            outputs = self._parse_train_split()
            again = None if test_mode == "val" else lambda: read_split(config.dataparser, "train", points=True)
            outputs.metadata = {**outputs.metadata, METADATA_KEY: CapturePhotos(outputs, again)}
            checks.check_outputs(outputs, "train", photos=test_mode != "inference")
        if self._with_depth:
            check_depth(outputs, "train")
        scene = SfMScene.placeholder()
        if test_mode == "val" and self.record is None:  # else the model loads a checkpoint, with the tree in it
            cameras = copy.deepcopy(outputs.cameras)
            cameras.rescale_output_resolution(config.camera_res_scale_factor)
            check_consistency(outputs)
            scene = build_sfm_scene(outputs, cameras)
            CONSOLE.log(f"{len(scene.points)} SfM points ({scene.source}), near plane {scene.near:.3g}")
        kept = {key: value for key, value in outputs.metadata.items() if key != "tracks"}
        outputs.metadata = {**kept, "sfm_scene": scene}

        self.train_dataparser_outputs = outputs
        self.includes_time = self.dataparser.includes_time
        self.train_dataset = self.create_train_dataset()
        self.eval_dataset = self.create_eval_dataset()
        if test_mode == "val" and self.record is None:
            rule = outputs.metadata.get(splits.RULE, splits.rule(config.dataparser))
            held_out = self.eval_dataset.image_filenames
            CONSOLE.log(splits.summary(outputs.image_filenames, held_out, rule))
        for dataset in (self.train_dataset, self.eval_dataset):
            dataset.cameras.metadata = dataset.cameras.metadata or {}  # ns-export cameras asserts that there are some
        self.exclude_batch_keys_from_device = self.train_dataset.exclude_batch_keys_from_device
        DataManager.__init__(self)  # calls setup_train and setup_eval

    @property
    def _with_depth(self) -> bool:
        return self.config.use_depth and self.test_mode == "val" and self.record is None  # only a training has losses

    def _recorded(self, split: str) -> RecordedOutputs:
        """A split as the run that is loaded was trained with it."""
        assert self.record is not None
        config = self.config.dataparser
        return self.record.outputs(split, config.data, lambda: read_split(config, split))

    def write_record(self, file: Path) -> None:
        """Writes down what rendering will need of the capture that is trained on.

        Args:
            file: in the run's folder.

        Raises:
            InputError: it cannot be written.
        """
        held_out = self.eval_dataset._dataparser_outputs
        try:  # ns-eval and the like take this split
            test = self.dataparser.get_dataparser_outputs(split="test")
        except Exception:  # there is none, as there may be no `val`
            test = held_out
        CaptureRecord.of_capture(
            self.config.dataparser,
            {"train": self.train_dataparser_outputs, "val": held_out, "test": test},
            self.test_split,
            self.train_dataset.metadata["sfm_scene"],
            self.train_dataset.photos.decisions(),
            getattr(self.dataparser, "downscale_factor", None),
        ).write(file)

    def get_datapath(self) -> Path:
        """Where nerfstudio's viewer keeps camera paths: with the capture, or with the run where that is gone."""
        data, record = self.config.dataparser.data, self.config.record
        return data if data.exists() or record is None else record.parent

    def show_missing_photos(self) -> None:
        """From now on missing photos are small grey pictures: the viewer asks for all of them."""
        self.train_dataset.show_missing = self.eval_dataset.show_missing = True

    def _make_dataparser(self, points: bool) -> DataParser:
        dataparser = make_parser(self.config.dataparser, points)
        if self.test_mode == "inference":
            dataparser.downscale_factor = 1  # nerfstudio's way not to open photos
            if isinstance(dataparser, ColmapDataParser):
                dataparser._downscale_factor = 1
        return dataparser

    def _parse_train_split(self) -> DataparserOutputs:
        """Outputs of the train split; in a training with SfM points and tracks if there are any."""
        config = self.config.dataparser
        try:
            outputs = self.dataparser.get_dataparser_outputs(split="train")
        except Exception as error:
            raise checks.explain(error, config) from error
        finally:
            want_points(self.dataparser.config, False)  # the other splits need none
        return outputs

    def create_eval_dataset(self) -> InputDataset:
        """The held-out photos; may be empty. ``val`` and ``test`` stand for each other where a capture has one only."""
        if self.record is not None:
            outputs = self._recorded(self.test_split)
            return self.dataset_type(dataparser_outputs=outputs, scale_factor=self.config.camera_res_scale_factor)
        try:
            try:
                outputs = self.dataparser.get_dataparser_outputs(split=self.test_split)
            except FileNotFoundError as error:
                other = "test" if self.test_split == "val" else "val"
                try:
                    outputs = self.dataparser.get_dataparser_outputs(split=other)
                except FileNotFoundError:
                    raise error from None
                warn(
                    f"no '{self.test_split}' split ({error.filename or error}): the '{other}' split is held out instead"
                )
                self.test_split = other
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
    def _train_source(self) -> _RaySource | CameraRays:
        config = self.config
        if self._without_photos(self.train_dataset):
            return CameraRays(self.train_dataset.cameras.to(self.device), self._crop_radius(self.train_dataset))
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
    def eval_dataloader(self) -> HeldOutPhotos:
        """Random held-out photos."""
        self._require_held_out()
        return HeldOutPhotos(input_dataset=self.eval_dataset, device=self.device)

    def _without_photos(self, dataset: RecordedPhotos) -> bool:
        """Whether photos are missing that only tell which pixels are masked: point clouds need no more than rays."""
        outputs = dataset._dataparser_outputs
        if not isinstance(outputs, RecordedOutputs) or not outputs.missing():
            return False
        masked = " and may lie where the masks hid the photos" if outputs.mask_filenames is not None else ""
        CONSOLE.log(f"infnerf: the photos are not there: rays are drawn from the recorded cameras{masked}")
        return True

    def _require_held_out(self) -> None:
        """There are held-out photos, wherever their files are."""
        if len(self.eval_dataset) == 0:
            raise InputError(
                f"the capture {self.config.data} has no held-out photos to evaluate: "
                "change --eval-mode / --train-split-fraction / --eval-interval of the dataparser"
            )

    def _require_eval_photos(self) -> None:
        """There are held-out photos, and their files are at hand."""
        self._require_held_out()
        outputs = self.eval_dataset._dataparser_outputs
        if isinstance(outputs, RecordedOutputs):
            outputs.require()
            checks.check_outputs(outputs, outputs.split)
            outputs.warn_of_changes()

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
        self, source: _RaySource | CameraRays, num_rays: int, nears: Float[Tensor, "c"] | None
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


def recorded_capture(config: PyramidDataManagerConfig, test_mode: str) -> CaptureRecord | None:
    """What a run that is loaded has kept of its capture, None if the capture is to be read instead: by a training, for
    a run of an earlier version, and where photos are wanted in another way than they were trained on (``ns-render
    dataset --downscale-factor``).

    Raises:
        InputError: the record is damaged, or neither run nor capture is where the configuration says.
    """
    data = config.dataparser.data
    if config.record is not None and config.record.is_file():
        record = CaptureRecord.read(config.record)
        return record if test_mode == "inference" or record.stands_for(config.dataparser) else None
    if test_mode != "val" and config.record is not None:
        if not config.record.parent.is_dir():
            raise InputError(
                f"the run is not in {config.record.parent}, where its config.yml says that it is: if it was moved or"
                " copied, write the file anew with infnerf-config RUN"
            )
        if not data.exists():
            raise InputError(
                f"the capture {data} does not exist, and the run was trained with an earlier version, which has kept"
                " nothing of it: put it back, or say where it is now with infnerf-config RUN --data FOLDER"
            )
    return None
