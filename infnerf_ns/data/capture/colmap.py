"""COLMAP captures: nerfstudio's dataparser, fed with what the model's files mean.

nerfstudio's options, orientation, splits and scaling stay. Read differently are the files
(:mod:`~infnerf_ns.data.capture.colmap_files`), which of several models is meant
(:mod:`~infnerf_ns.data.capture.colmap_models`), each photo's own lens, masks in COLMAP's naming, and large coordinates
(:mod:`~infnerf_ns.data.capture.georeference`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser, ColmapDataParserConfig
from torch import Tensor

from infnerf_ns.data.capture import splits
from infnerf_ns.data.capture.colmap_files import Image, Points, read_cameras, read_images, read_points
from infnerf_ns.data.capture.colmap_models import ModelFiles, find_model
from infnerf_ns.data.capture.downscaling import downscale_images
from infnerf_ns.data.capture.files import find_file
from infnerf_ns.data.capture.georeference import CaptureOutputs, Georeference, placed
from infnerf_ns.data.capture.intrinsics import Intrinsics, from_colmap, set_kinds
from infnerf_ns.data.capture.photo_files import check_first_photo
from infnerf_ns.data.checks import check_outliers, check_pose, check_spread
from infnerf_ns.data.point_files import Tracks
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file
from infnerf_ns.validation import warn

_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
"""nerfstudio's guess of what is up in COLMAP's coordinates, ``assume_colmap_world_coordinate_convention``"""
_MASKS = "masks"
_LISTS = {
    "train": ("train_list.txt",),
    "val": ("val_list.txt", "validation_list.txt"),  # nerfstudio looks for both, but reads the first only
    "test": ("test_list.txt",),
}


class CaptureColmap(ColmapDataParser):
    """nerfstudio's parser of COLMAP captures, which reads what the capture's files mean.

    Args:
        config: nerfstudio's. ``colmap_path`` may name a model, or the folder of several.
    """

    def __init__(self, config: ColmapDataParserConfig) -> None:
        super().__init__(copy.copy(config))
        self._images: list[Image] = []
        self._lenses: list[Intrinsics] = []
        self._indices = np.empty(0, dtype=np.int64)
        self._points: Points | None = None
        self._georeference = Georeference()
        self._split_rule = ""
        self._model: ModelFiles | None = None

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Any) -> CaptureOutputs:
        data = self.config.data
        if not data.is_dir():
            raise InputError(f"the data folder {data} does not exist: check --data")
        if self._model is None:
            self._model = find_model(data, self.config.colmap_path)
            if self.config.masks_path is None and (data / _MASKS).is_dir():
                warn(f"{data / _MASKS} is not used: give --masks-path {_MASKS} after colmap to leave out what it hides")
            self.config.colmap_path = self._model.folder.absolute()
        parsed = super()._generate_dataparser_outputs(split, **kwargs)
        outputs = self._georeference.restored(parsed)
        set_kinds(outputs.cameras, [self._lenses[row] for row in self._indices])
        if self.config.orientation_method == "pca":
            poses = self._poses[self._indices]
            outputs.cameras.camera_to_worlds = placed(poses, parsed.dataparser_transform, parsed.dataparser_scale)
        outputs.metadata = {**outputs.metadata, splits.RULE: self._split_rule}
        if self._points is not None and len(self._points.track_point):
            outputs.metadata["tracks"] = self._tracks(self._points)
        self._points = None  # large, and not asked for again
        return outputs

    def _get_all_images_and_cameras(self, recon_dir: Path) -> dict[str, Any]:
        """Frames as nerfstudio's parser wants them; called by it."""
        assert self._model is not None
        folder, kind = self._model
        cameras = read_cameras(folder, kind)
        source = folder / f"cameras.{kind}"
        lenses = {number: from_colmap(*camera, f"{source}: camera {number}") for number, camera in cameras.items()}
        path = folder / f"images.{kind}"
        self._images = read_images(folder, kind, matches=self.config.load_3D_points)
        if not self._images:
            raise InputError(f"{path} has no photos: COLMAP has registered none; give it photos that overlap more")
        lost = [image for image in self._images if image.camera not in lenses]
        if lost:
            raise InputError(f"{path}: photo {lost[0].name} has camera {lost[0].camera}, which cameras.{kind} lacks")
        self._lenses = [lenses[image.camera] for image in self._images]
        applied = _Z_UP if self.config.assume_colmap_world_coordinate_convention else np.eye(4)[:3]
        poses = np.stack([image.camera_to_world for image in self._images])
        poses[:, :3, 1:3] *= -1  # OpenCV's camera axes to OpenGL's
        poses[:, :3] = applied @ poses
        if self.config.auto_scale_poses:
            check_spread(poses[:, :3, 3], str(path))
        check_outliers(poses[:, :3, 3], [image.name for image in self._images], str(path))
        self._georeference = Georeference.of(poses[:, :3, 3], applied)
        poses[:, :3, 3] -= self._georeference.offset
        self._poses = poses
        frames = [self._frame(image, lens, pose) for image, lens, pose in zip(self._images, self._lenses, poses)]
        check_first_photo(Path(frames[0]["file_path"]))
        return {"frames": frames, "camera_model": frames[0]["camera_model"]}

    def _frame(self, image: Image, lens: Intrinsics, pose: Float[np.ndarray, "4 4"]) -> dict[str, Any]:
        config, frame = self.config, lens.entries()
        check_pose(pose[:3], image.name, str(self.config.colmap_path))
        frame["file_path"] = find_file(config.data / config.images_path, image.name).as_posix()
        frame["transform_matrix"] = pose
        for entry, folder in (("mask_path", config.masks_path), ("depth_path", config.depths_path)):
            if folder is not None:
                frame[entry] = _beside(config.data / folder, image.name).as_posix()
        return frame

    def _get_image_indices(self, image_filenames: list[Path], split: str) -> np.ndarray:
        """Rows of a split; called by nerfstudio's parser."""
        lists, where = {}, {}
        for name, files in _LISTS.items():
            path = next((self.config.data / file for file in files if (self.config.data / file).exists()), None)
            if path is not None:
                lists[name] = _listed(path)
                where[name] = str(path)
        if lists:
            names = [image.name for image in self._images]
            self._split_rule = " and ".join(Path(path).name for path in where.values())
            indices = np.array(splits.complete(lists, names, where)[split], dtype=np.int64)
        else:
            self._split_rule = splits.rule(self.config)
            indices = super()._get_image_indices(image_filenames, split)
        self._indices = indices
        return indices

    def _load_3D_points(self, colmap_path: Path, transform_matrix: Tensor, scale_factor: float) -> dict[str, Tensor]:
        """Points in the scene; called by nerfstudio's parser. Without any, an empty dictionary."""
        assert self._model is not None
        folder, kind = self._model
        if not (folder / f"points3D.{kind}").exists():
            warn(f"{folder} has no points3D.{kind}: the SfM points could not be read")
            return {}
        points = read_points(folder, kind)
        if len(points.xyz) == 0:
            warn(f"{folder / f'points3D.{kind}'} is empty: the SfM points could not be read")
            return {}
        self._points = points
        applied = self._georeference.applied
        xyz = points.xyz @ applied[:, :3].T + applied[:, 3]
        return {
            "points3D_xyz": self._georeference.in_scene(xyz, transform_matrix, scale_factor),
            "points3D_rgb": torch.from_numpy(points.rgb),
            "points3D_num_points2D": torch.from_numpy(np.bincount(points.track_point, minlength=len(xyz))),
        }

    def _tracks(self, points: Points) -> Tracks:
        """Which photo of the split sees which point, and where in the size that is used. Matches in other photos, also
        those that are no longer in the model, are left out."""
        images = [self._images[row] for row in self._indices]
        numbers = np.array([image.number for image in images], dtype=np.int64)
        order = np.argsort(numbers)
        slot = order[np.searchsorted(numbers, points.track_image, sorter=order).clip(max=len(images) - 1)]
        known = numbers[slot] == points.track_image
        point, photo, match = points.track_point[known], slot[known], points.track_match[known]
        _, first = np.unique(point * len(images) + photo, return_index=True)  # a track may hold a photo twice
        point, photo, match = point[first], photo[first], match[first]
        lengths = np.array([len(image.matches) for image in images])
        if not ((0 <= match) & (match < lengths[photo])).all():
            assert self._model is not None
            raise InputError(
                f"{self._model.folder}: points3D and images are not of one model, as tracks name matches that the"
                " photos do not have: write the model again with COLMAP"
            )
        matches = np.concatenate([np.empty((0, 2)), *(image.matches for image in images)])
        pixel = matches[(np.cumsum(lengths) - lengths)[photo] + match] / (self._downscale_factor or 1)
        return Tracks(torch.from_numpy(point), torch.from_numpy(photo), torch.from_numpy(pixel).float())

    def _downscale_images(
        self,
        paths: list[Path],
        get_fname: Callable[[Path], Path],
        downscale_factor: int,
        downscale_rounding_mode: str = "floor",
        nearest_neighbor: bool = False,
    ) -> None:
        """Smaller copies of photos, if the user wants them; called by nerfstudio's parser, whose own way hands the
        photos' names to a shell."""
        downscale_images(paths, get_fname, downscale_factor, downscale_rounding_mode, nearest_neighbor)


def _beside(folder: Path, name: str) -> Path:
    """The mask or depth image of a photo: named like the photo with ``.png`` behind it (COLMAP), with ``.png`` instead
    of its ending (nerfstudio, whose name is returned where there is none), or like it."""
    instead = Path(name).with_suffix(".png").as_posix()
    for candidate in (f"{name}.png", instead, name):
        found = find_file(folder, candidate)
        if found.is_file():
            return found
    return folder / instead


def _listed(path: Path) -> list[str]:
    """The photos of a list file, one a line."""
    require_regular_file(path, "the list of photos")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): write one photo's name a line, or remove it") from error
    return [line.strip() for line in lines if line.strip()]
