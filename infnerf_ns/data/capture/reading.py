"""How the photos of a capture are read, the same in every split and every command; and the dataset that does so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE

from infnerf_ns.data.capture import orientation
from infnerf_ns.data.capture.consistency.agreement import photo_agreement
from infnerf_ns.data.capture.photo_files import Depth, Header, read_header
from infnerf_ns.data.capture.photos import (
    Levels,
    Turn,
    capture_levels,
    companion_turn,
    read_mask,
    read_photo,
    wrong_mask_size,
)

METADATA_KEY = "capture_photos"
"""Where the outputs of a dataparser keep the :class:`CapturePhotos` that reads their files."""


class CapturePhotos:
    """What the train photos of a capture decide: their orientation, and the levels of more than 8 bits.

    It is found out when it is first asked for, as some commands never look at a photo, and depends on nothing but the
    capture, so that a run that is loaded later reads its photos as the training did.

    Args:
        outputs: of the train split.
        with_points: gives the same outputs with SfM points; only called where nothing else decides on an orientation.
    """

    def __init__(self, outputs: DataparserOutputs, with_points: Callable[[], DataparserOutputs] | None = None) -> None:
        self._outputs = outputs
        self._with_points = with_points or (lambda: outputs)
        self._headers: dict[Path, Header] = {}

    def decisions(self) -> dict[str, Any]:
        """What has been decided so far, as plain values: whether tags are followed (None: not asked), and black and
        white by kind of numbers."""
        levels = vars(self).get("levels", {})
        return {
            "upright": vars(self).get("upright"),
            "levels": {depth: [level.black, level.white] for depth, level in levels.items()},
        }

    def decide_as(self, decisions: Mapping[str, Any]) -> None:
        """Takes over the decisions of a training.

        Args:
            decisions: of :meth:`decisions`.

        Raises:
            ValueError: they are not such.
        """
        levels = {}
        for depth, (black, white) in dict(decisions["levels"]).items():
            levels[depth] = Levels(float(black), float(white))
            if not (np.isfinite([black, white]).all() and white > black):
                raise ValueError(f"{black} and {white} are no levels of black and white")
        if decisions["upright"] not in (True, False, None):
            raise ValueError("'upright' is neither true nor false")
        vars(self)["levels"] = levels
        if decisions["upright"] is not None:
            vars(self)["upright"] = decisions["upright"]

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturePhotos:
        return self  # nerfstudio's datasets copy the metadata of their outputs

    def header(self, path: Path) -> Header:
        """Of a photo; read once."""
        if path not in self._headers:
            self._headers[path] = read_header(path, "photo")
        return self._headers[path]

    @cached_property
    def levels(self) -> dict[Depth, Levels]:
        """Black and white of photos with more than 8 bits."""
        levels = capture_levels([self.header(path) for path in self._outputs.image_filenames])
        for depth, level in levels.items():
            CONSOLE.log(
                f"photos of {depth} numbers: {level.black:.6g} becomes black and {level.white:.6g} white, "
                "in all photos of the capture"
            )
        return levels

    @cached_property
    def upright(self) -> bool:
        """Whether EXIF tags are followed where the sizes of photos and cameras do not say it."""
        names = self._outputs.image_filenames
        headers = [self.header(path) for path in names]
        followed, reason = orientation.decide(headers, _camera_sizes(self._outputs), self._agreement)
        CONSOLE.log(reason)
        return followed

    def turn(self, path: Path, camera: tuple[int, int]) -> Turn:
        """How a photo is read whose camera has this width and height.

        Raises:
            InputError: the photo cannot be read, or has another size.
        """
        header = self.header(path)
        turn = orientation.turn_by_size(header, camera)
        return turn if turn is not None else Turn(header.orientation, self.upright)

    def _agreement(self, followed: bool) -> float | None:
        """Of the photos at the points, if the tags that sizes say nothing about are followed, or not."""
        outputs = self._with_points()

        def upright(index: int) -> bool:
            header = self.header(outputs.image_filenames[index])
            turn = orientation.turn_by_size(header, _camera_sizes(outputs)[index])
            return followed if turn is None else turn.followed

        tagged = [self.header(path).orientation != 1 for path in outputs.image_filenames]
        return photo_agreement(outputs, upright, self.levels, prefer=tagged)


def _camera_sizes(outputs: DataparserOutputs) -> list[tuple[int, int]]:
    """Width and height of every camera."""
    cameras = outputs.cameras
    return list(zip(cameras.width.flatten().tolist(), cameras.height.flatten().tolist()))


def capture_photos(outputs: DataparserOutputs) -> CapturePhotos:
    """What reads the files of these outputs; without a decision of the train split they decide themselves."""
    found = outputs.metadata.get(METADATA_KEY)
    return found if found is not None else CapturePhotos(outputs)


def check_sizes(outputs: DataparserOutputs) -> None:
    """Photos have the sizes of their cameras, masks those of their photos; nothing is decoded.

    Raises:
        InputError: a file cannot be read, or has another size.
    """
    photos, sizes = capture_photos(outputs), _camera_sizes(outputs)
    several = []
    for index, path in enumerate(outputs.image_filenames):
        turn, header = photos.turn(path, sizes[index]), photos.header(path)
        if header.orientation != 1:
            _ = photos.upright  # decided, and said, for the whole capture
        if header.frames > 1:
            several.append(header)
        if outputs.mask_filenames is not None:
            mask = read_header(outputs.mask_filenames[index], "mask")
            size = header.upright_size if turn.followed else header.stored_size
            if companion_turn(mask.stored_size, mask.orientation, turn, size.__eq__) is None:
                raise wrong_mask_size(mask, size)
    if several:
        CONSOLE.log(
            f"[yellow]infnerf: {len(several)} photos have more than one picture in their file, {several[0].path} "
            f"{several[0].frames}: the first counts"
        )


class PhotoDataset(InputDataset):
    """nerfstudio's dataset, with photos and masks read by :mod:`.photos`.

    Args:
        dataparser_outputs: of a split; ``metadata["capture_photos"]`` is the :class:`CapturePhotos` of the capture,
            and if there is none these photos decide.
        scale_factor: of the photos' size.
    """

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0) -> None:
        super().__init__(dataparser_outputs, scale_factor)
        self.photos = capture_photos(dataparser_outputs)
        self._camera_sizes = _camera_sizes(dataparser_outputs)

    def turn(self, image_idx: int) -> Turn:
        """How a photo is read."""
        return self.photos.turn(self.image_filenames[image_idx], self._camera_sizes[image_idx])

    def size(self, image_idx: int) -> tuple[int, int]:
        """Width and height of a photo as it is read, before it is scaled."""
        header = self.photos.header(self.image_filenames[image_idx])
        return header.upright_size if self.turn(image_idx).followed else header.stored_size

    def channels(self, image_idx: int) -> int:
        """3, or 4 for a photo with alpha."""
        return self.photos.header(self.image_filenames[image_idx]).channels

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "h w c"]:
        """The pixels of a photo, C = 3 or 4."""
        return read_photo(
            self.image_filenames[image_idx],
            upright=self.turn(image_idx).followed,
            levels=self.photos.levels,
            scale=self.scale_factor,
        )

    def get_mask(self, image_idx: int) -> Bool[torch.Tensor, "h w 1"] | None:
        """The mask of a photo, true = the pixel counts; None where the capture has no masks."""
        files = self._dataparser_outputs.mask_filenames
        if files is None:
            return None
        mask = read_mask(files[image_idx], self.size(image_idx), self.turn(image_idx), self.scale_factor)
        return torch.from_numpy(mask)[..., None]

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """As nerfstudio's, whose function for masks knows no other modes than grey."""
        images = {"float32": self.get_image_float32, "uint8": self.get_image_uint8}
        data: dict[str, Any] = {"image_idx": image_idx, "image": images[image_type](image_idx)}
        mask = self.get_mask(image_idx)
        if mask is not None:
            data["mask"] = mask
            if self.mask_color:
                data["image"] = _masked(data["image"], mask, self.mask_color)
        data.update(self.get_metadata(data))
        return data


def _masked(image: torch.Tensor, mask: Bool[torch.Tensor, "h w 1"], colour: tuple[float, float, float]) -> torch.Tensor:
    """An image [H, W, 3 or 4] with an opaque colour (0 to 1) where the mask is not set."""
    full = torch.tensor([*colour, 1.0][: image.shape[-1]])
    if image.dtype == torch.uint8:
        full = (full * 255).to(torch.uint8)
    return torch.where(mask, image, full.expand_as(image))
