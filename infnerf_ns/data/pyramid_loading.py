"""Photos and depth images of a dataset, decoded in threads into a pyramid; or one line about what is wrong."""

from __future__ import annotations

import numpy as np
import psutil
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from infnerf_ns.data import depth
from infnerf_ns.data.capture.reading import PhotoDataset
from infnerf_ns.data.pyramid import PixelPyramid, num_levels
from infnerf_ns.data.thread_pool import threads
from infnerf_ns.errors import InputError


def load_pyramid(
    dataset: PhotoDataset,
    max_levels: int,
    name: str,
    *,
    ignore_masks: bool = False,
    level_share: float = 0.0,
    crop_radius: float | None = None,
    order: list[int] | None = None,
    with_depth: bool = False,
) -> PixelPyramid:
    """Decodes all photos of a dataset, in threads, into a pyramid.

    Args:
        dataset: its scaling, alpha compositing and mask colour apply.
        max_levels: pyramid levels per photo.
        name: of the split, for the progress bar.
        ignore_masks: draw masked pixels, too.
        level_share: share of the draws in which every level has the same chance.
        crop_radius: pixels farther from the middle of a photo are masked.
        order: of the photos in the pyramid.
        with_depth: read the depth images, too; the pyramid then has depths in scene units.

    Raises:
        InputError: a photo, mask or depth image cannot be decoded, no depth is known, or the photos do not fit into
            memory.
    """
    outputs = dataset._dataparser_outputs
    scale = dataset.scale_factor
    photo_sizes = [dataset.size(index) for index in range(len(dataset))]
    sizes = [(int(height * scale), int(width * scale)) for width, height in photo_sizes]
    composited = outputs.alpha_color is not None
    channels = 3 if composited else max(dataset.channels(index) for index in range(len(dataset)))
    masked = (outputs.mask_filenames is not None and not ignore_masks) or crop_radius is not None
    _check_memory(sizes, channels + masked + with_depth * depth.BYTES_PER_PIXEL, max_levels, name)
    pyramid = PixelPyramid(sizes, channels, max_levels, masked, level_share, order, with_depth)
    depth_files, unit = depth.depth_files(outputs) if with_depth else [], depth.depth_unit(outputs)
    image_type = (
        "float32" if composited or dataset.mask_color else "uint8"
    )  # nerfstudio truncates composited uint8 colours

    def load(index: int) -> None:
        data = dataset.get_data(index, image_type=image_type)
        image = data["image"].numpy()
        if image.dtype != np.uint8:
            image = np.rint(image * 255.0).astype(np.uint8)
        if image.shape[2] < channels:
            image = np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)
        mask = data["mask"][..., 0].numpy() if "mask" in data and not ignore_masks else None
        if crop_radius is not None:
            circle = circle_mask(image.shape[0], image.shape[1], crop_radius)
            mask = circle if mask is None else mask & circle
        depths = None
        if with_depth:
            depths = depth.read_depth(depth_files[index], *sizes[index], dataset.turn(index)) * np.float32(unit)
        pyramid.set_photo(index, image, mask, depths)

    with threads(most=8) as pool:
        done = pool.map(load, range(len(dataset)))
        for _ in track(done, f"Loading {len(dataset)} {name} photos", len(dataset), console=CONSOLE, transient=True):
            pass
    if pyramid.depth is not None and not pyramid.depth.any_known():
        raise InputError(
            f"the depth images of the {name} photos ({depth_files[0]} ...) hold no depth, only 0, NaN or infinity: "
            "correct them, or train without depth losses"
        )
    return pyramid


def _check_memory(sizes: list[tuple[int, int]], bytes_per_pixel: int, max_levels: int, name: str) -> None:
    """One line before anything is loaded if the pyramids do not fit into memory."""
    pixels = sum(
        (height >> level) * (width >> level)
        for height, width in sizes
        for level in range(num_levels(height, width, max_levels))
    )
    needed, free = pixels * bytes_per_pixel, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"the {len(sizes)} {name} photos need {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of memory"
            " are free: train on smaller photos with --pipeline.datamanager.camera-res-scale-factor 0.5, or the"
            " dataparser's --downscale-factor"
        )


def circle_mask(height: int, width: int, radius: float) -> np.ndarray:
    """The pixels of a fisheye photo within ``radius`` of its centre, where nerfstudio's pixel sampler draws."""
    rows, columns = np.ogrid[:height, :width]
    return (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= radius**2
