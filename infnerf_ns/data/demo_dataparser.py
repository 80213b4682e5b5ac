"""The dataparser ``infnerf-demo``: a procedural town that is made on first use, so that training needs no data.

It is also the ruler for experiments on scale: ``--size`` is the side of the town in blocks; the number of photos grows
with its area while the smallest visible detail stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import appdirs
import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from infnerf_ns.data.capture.downscaling import downscale_images
from infnerf_ns.data.demo_scene import DemoScene, DemoSceneOptions, load_or_generate, load_or_generate_depths
from infnerf_ns.data.demo_scene.town import BLOCK
from infnerf_ns.errors import InputError
from infnerf_ns.footprint import point_footprint

METRES_PER_UNIT = 40.0
"""One unit of the scene, whatever the size of the town."""
MAX_SIZE = 64
"""Blocks per side of the largest town."""
_MIN_PHOTOS = 8
_PAIRS_AT_ONCE = 1 << 20
"""(Point, photo) pairs; a large town has over a hundred million."""


@dataclass
class InfNeRFDemoDataParserConfig(DataParserConfig):
    """A procedural town photographed by a virtual drone; made on first use, then cached."""

    _target: type = field(default_factory=lambda: InfNeRFDemoDataParser)
    """target class to instantiate"""
    data: Path = Path()
    """Not read: the town needs no data."""
    size: int = 1
    """Blocks per side of the town, 44 m each (1 to 64). Photos, points and detail grow with the square of it."""
    seed: int = 0
    """Another seed, another town. The same seed gives the same photos, bit for bit, on the same machine."""
    num_photos: int = 0
    """How many photos the drone takes; 0: as many as cover the town at every altitude, 160 for one block,
    about 100 for each block of a larger town."""
    image_width: int = 320
    """Width of the photos in pixels."""
    image_height: int = 240
    """Height of the photos in pixels."""
    supersampling: int = 4
    """Rays per pixel and direction: 4 means that every pixel is the average of 4 x 4 samples of its area."""
    cache_dir: Optional[Path] = None
    """Where towns are kept; by default infnerf_ns/demo in the user's cache folder."""
    eval_interval: int = 8
    """Every so manieth photo is held out for evaluation."""
    load_3D_points: bool = True
    """Hand over the surface points that the training photos see, as structure from motion would find them."""
    depth: bool = False
    """Make exact depth images beside the photos, for --pipeline.datamanager.use-depth."""
    downscale_factor: Optional[float] = None
    """Whole number by which the photos are smaller than they were taken; ns-render dataset sets it."""


@dataclass
class InfNeRFDemoDataParser(DataParser):
    """Makes or loads the town and hands it over in units of ``METRES_PER_UNIT`` metres, z up, around the origin."""

    config: InfNeRFDemoDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs) -> DataparserOutputs:
        config = self.config
        _check(config)
        options = DemoSceneOptions(
            size=config.size,
            seed=config.seed,
            num_photos=config.num_photos,
            width=config.image_width,
            height=config.image_height,
            supersampling=config.supersampling,
        )
        cache_dir = config.cache_dir or Path(appdirs.user_cache_dir("infnerf_ns")) / "demo"
        scene = load_or_generate(options, Path(cache_dir))
        depths = load_or_generate_depths(scene) if config.depth else None
        outputs = scene_outputs(scene, split, config.eval_interval, points=config.load_3D_points, depths=depths)
        if config.downscale_factor not in (None, 1):
            _downscale(outputs, Path(cache_dir) / options.folder_name, int(config.downscale_factor))
        return outputs


def scene_outputs(
    scene: DemoScene, split: str, eval_interval: int, points: bool = True, depths: list[Path] | None = None
) -> DataparserOutputs:
    """A split of a town in scene units: cameras, photos (where the scene has any) and surface points.

    Args:
        scene: the town.
        split: ``train``; anything else gives the held-out photos.
        eval_interval: every so manieth photo is held out.
        points: hand over the points that the training photos see.
        depths: the depth image of every photo, metres along its viewing axis.
    """
    is_train = np.arange(len(scene.poses)) % eval_interval != eval_interval // 2
    chosen = np.nonzero(is_train if split == "train" else ~is_train)[0]
    poses = torch.from_numpy(scene.poses[chosen].copy())
    poses[:, :, 3] /= METRES_PER_UNIT
    lens = scene.options.lens
    cameras = Cameras(
        camera_to_worlds=poses,
        fx=lens.focal,
        fy=lens.focal,
        cx=lens.width / 2,
        cy=lens.height / 2,
        width=lens.width,
        height=lens.height,
        camera_type=CameraType.PERSPECTIVE,
    )
    metadata = _point_metadata(scene, is_train) if points else {}
    if depths is not None:
        metadata |= {"depth_filenames": [depths[i] for i in chosen], "depth_unit_scale_factor": 1.0}
    half = (scene.options.size * BLOCK / 2 + 10) / METRES_PER_UNIT
    return DataparserOutputs(
        image_filenames=[scene.photos[i] for i in chosen] if scene.photos else [],
        cameras=cameras,
        scene_box=SceneBox(aabb=torch.tensor([[-half, -half, -half], [half, half, half]], dtype=torch.float32)),
        dataparser_scale=1 / METRES_PER_UNIT,
        metadata=metadata,
    )


def _downscale(outputs: DataparserOutputs, folder: Path, factor: int) -> None:
    """Replaces photos and depth images by smaller ones, which are made beside the town's folder on first use."""
    small = folder.with_name(f"{folder.name}_{factor}")
    copies = {}
    for kind, paths in (("photos", outputs.image_filenames), ("depths", outputs.metadata.get("depth_filenames", []))):
        copies[kind] = [small / kind / path.name for path in paths]
        if not all(copy.exists() for copy in copies[kind]):
            downscale_images(paths, lambda path, kind=kind: small / kind / path.name, factor, nearest=kind == "depths")
    outputs.image_filenames = copies["photos"]
    outputs.cameras.rescale_output_resolution(1 / factor)
    if "depth_filenames" in outputs.metadata:
        outputs.metadata["depth_filenames"] = copies["depths"]
    if "points3D_track_footprint" in outputs.metadata:
        outputs.metadata["points3D_track_footprint"] *= factor


def _check(config: InfNeRFDemoDataParserConfig) -> None:
    """Raise :class:`InputError` for the first option that makes no sense."""
    if not 1 <= config.size <= MAX_SIZE:
        raise InputError(f"--size {config.size} blocks per side cannot be built: choose 1 to {MAX_SIZE}")
    if config.seed < 0:
        raise InputError(f"--seed {config.seed} is negative: choose 0 or more")
    if config.num_photos and config.num_photos < _MIN_PHOTOS:
        raise InputError(
            f"--num-photos {config.num_photos} is too few for all altitudes: choose {_MIN_PHOTOS} or more, "
            "or 0 for as many as the town needs"
        )
    if min(config.image_width, config.image_height) < 8:
        raise InputError(
            f"--image-width {config.image_width} --image-height {config.image_height} is too small: choose 8 or more"
        )
    if not 1 <= config.supersampling <= 16:
        raise InputError(f"--supersampling {config.supersampling} is out of range: choose 1 to 16")
    factor = 1 if config.downscale_factor is None else config.downscale_factor
    if not (1 <= factor <= min(config.image_width, config.image_height) / 8 and float(factor).is_integer()):
        raise InputError(
            f"--downscale-factor {factor:g}: choose a whole number from 1 to"
            f" {min(config.image_width, config.image_height) // 8}, so that 8 pixels are left"
        )
    if config.eval_interval < 2:
        raise InputError(f"--eval-interval {config.eval_interval} leaves no photo to train on: choose 2 or more")


def _point_metadata(scene: DemoScene, is_train: Bool[np.ndarray, "p"]) -> dict:
    """What the training photos know about the surface. Points that were picked in a held-out photo are left out.

    Returns:
        points3D_xyz: float32 [n, 3], scene units.
        points3D_rgb: uint8 [n, 3].
        points3D_num_points2D: int64 [n], how many training photos see the point.
        points3D_track_footprint: float32 [n], the finest z^2 / (f ||p_cam||) over those photos, scene units.
        points3D_depth_percentile: 0.1 percentile of the distances of all (photo, seen point) pairs, scene units.
    """
    points = scene.points
    known = is_train[points.source]
    pair = is_train[points.seen_photo] & known[points.seen_point]
    point, photo = points.seen_point[pair], points.seen_photo[pair]
    footprint, distance = _pair_geometry(scene, point, photo)
    count: Int64[np.ndarray, "n"] = np.bincount(point, minlength=len(points.xyz))
    finest = np.full(len(points.xyz), np.inf, np.float32)
    np.minimum.at(finest, point, footprint)
    known &= count > 0
    return {
        "points3D_xyz": torch.from_numpy(points.xyz[known] / np.float32(METRES_PER_UNIT)),
        "points3D_rgb": torch.from_numpy(points.rgb[known]),
        "points3D_num_points2D": torch.from_numpy(count[known].astype(np.int64)),
        "points3D_track_footprint": torch.from_numpy(finest[known] / np.float32(METRES_PER_UNIT)),
        "points3D_depth_percentile": float(np.percentile(distance, 0.1)) / METRES_PER_UNIT,
    }


def _pair_geometry(
    scene: DemoScene, point: Int64[np.ndarray, "pairs"], photo: Int64[np.ndarray, "pairs"]
) -> tuple[Float32[np.ndarray, "pairs"], Float32[np.ndarray, "pairs"]]:
    """Footprint and distance of each (point, photo) pair, metres."""
    footprint, distance = (np.empty(len(point), np.float32) for _ in range(2))
    for start in range(0, len(point), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        way = scene.points.xyz[point[part]] - scene.poses[photo[part], :, 3]
        distance[part] = np.linalg.norm(way, axis=-1)
        depth = -np.einsum("nd,nd->n", way, scene.poses[photo[part], :, 2])
        footprint[part] = point_footprint(depth, distance[part], scene.options.lens.focal)
    return footprint, distance


demo_dataparser_spec = DataParserSpecification(
    config=InfNeRFDemoDataParserConfig(),
    description="Built-in procedural town, photographed from its surroundings down to 2 m; needs no data.",
)
