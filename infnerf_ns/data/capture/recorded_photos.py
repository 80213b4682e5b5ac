"""The photos of a run that is loaded: they are looked for when somebody asks for their pixels, and may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.utils.dataloaders import RandIndicesEvalDataloader

from infnerf_ns.data.capture.georeference import CaptureOutputs
from infnerf_ns.data.capture.reading import PhotoDataset
from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn

_THUMBNAIL = 100
"""Rows of the grey picture that stands for a missing photo in the viewer."""


@dataclass
class RecordedOutputs(CaptureOutputs):
    """A split as it was when the run was trained; ``image_filenames`` are where the photos are now, or were then."""

    split: str = "train"
    """``train``, or ``held-out``"""
    places: tuple[Path, ...] = ()
    """folders in which the photos were looked for"""
    sizes: list[int] = field(default_factory=list)
    """bytes of the photos' files then"""
    parse_again: Callable[[], DataparserOutputs] | None = None
    """reads the split from the capture as it is now"""

    def missing(self, indices: Sequence[int] | None = None) -> list[Path]:
        """For each photo whose file, or whose mask, is not there, that file; of all photos or those with the given
        indices."""
        kinds = [self.image_filenames] + ([] if self.mask_filenames is None else [self.mask_filenames])
        chosen = range(len(self.image_filenames)) if indices is None else indices
        absent = (next((kind[index] for kind in kinds if not kind[index].is_file()), None) for index in chosen)
        return [path for path in absent if path is not None]

    def require(self) -> None:
        """Makes sure that all photos are there.

        A dataparser that finds the same photos elsewhere now (the demo's makes its town anew) is followed.

        Raises:
            InputError: some are not; says which, and where they were looked for.
        """
        missing = self.missing()
        if missing and self._found_again():
            missing = self.missing()
        if missing:
            places = " and ".join(str(place) for place in self.places[:3])
            raise InputError(
                f"{len(missing)} of the {len(self.image_filenames)} {self.split} photos (or masks) of the run"
                f" cannot be found, the first is {missing[0]}; looked for in {places}: put them back, or say where the"
                " capture is now with infnerf-config RUN --data FOLDER"
            )

    def _found_again(self) -> bool:
        if self.parse_again is None:
            return False
        try:
            now = self.parse_again()
        except (Exception, SystemExit):  # whatever keeps it from being read: the photos stay missing
            return False
        finally:
            self.parse_again = None
        same = now.cameras.camera_to_worlds.shape == self.cameras.camera_to_worlds.shape and torch.equal(
            now.cameras.camera_to_worlds, self.cameras.camera_to_worlds
        )
        if same and len(now.image_filenames) == len(self.image_filenames):
            self.image_filenames, self.mask_filenames = now.image_filenames, now.mask_filenames
        return same

    def warn_of_changes(self) -> None:
        """A warning where the photos' files are not those of the training."""
        changed = [
            path
            for path, size in zip(self.image_filenames, self.sizes)
            if size and path.is_file() and path.stat().st_size != size
        ]
        if changed:
            warn(
                f"{len(changed)} of the {len(self.sizes)} {self.split} photos are other files than those of the"
                f" training, the first is {changed[0]}; the run is compared with what is there now"
            )


class RecordedPhotos(PhotoDataset):
    """The dataset of photos, which may be missing until one of them is asked for."""

    show_missing: bool = False
    """Give a small grey picture in place of a missing photo, for the viewer."""

    def get_data(self, image_idx: int, image_type: Any = "float32") -> dict:
        """A photo and its mask. Raises InputError if they are not there."""
        outputs = self._dataparser_outputs
        if isinstance(outputs, RecordedOutputs) and outputs.missing([image_idx]):
            if self.show_missing:
                aspect = float(self.cameras.width[image_idx]) / float(self.cameras.height[image_idx])
                grey = torch.full((_THUMBNAIL, max(1, round(_THUMBNAIL * aspect)), 3), 0.5)
                return {"image_idx": image_idx, "image": grey}
            outputs.require()
        return super().get_data(image_idx, image_type)


class _NoPhoto(dict):
    """The batch of a photo that is missing: says so when it is looked into."""

    def __init__(self, outputs: RecordedOutputs) -> None:
        super().__init__()
        self._outputs = outputs

    def __missing__(self, key: str) -> Any:
        self._outputs.require()
        raise KeyError(key)


class HeldOutPhotos(RandIndicesEvalDataloader):
    """nerfstudio's loader of held-out photos, of which some scripts (``ns-render spiral``) want the camera alone."""

    def get_camera(self, image_idx: int = 0) -> tuple[Cameras, dict]:
        """A camera and the batch of its photo."""
        outputs = self.input_dataset._dataparser_outputs
        if isinstance(outputs, RecordedOutputs) and outputs.missing([image_idx]):
            return self.cameras[image_idx : image_idx + 1], _NoPhoto(outputs)
        return super().get_camera(image_idx)
