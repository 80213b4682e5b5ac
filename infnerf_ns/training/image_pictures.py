"""Pictures made of rendered images for TensorBoard and W&B: where a render is wrong, and renders side by side.

As in :mod:`infnerf_ns.training.pictures`, all are images [H, W, 3] in 0..1 on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from nerfstudio.utils import colormaps
from torch import Tensor

from infnerf_ns.training.pictures import DOTS_PER_INCH, rendered

ERROR_SCALE = 0.25
"""Mean absolute error that has the brightest colour of an error map, and all above it: the same in every picture, so
that those of different steps can be compared."""
_STRIP_WIDTH, _PER_ROW, _GAP, _LABEL = 1600, 4, 8, 34
"""Of side_by_side: largest width, images per row, pixels between them and above each for its label."""
_SMALLEST = 240
"""Width to which smaller images are enlarged, so that their labels fit."""


def error_map(predicted: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 3"]:
    """Mean absolute error of a render, black = 0 to pale yellow = `ERROR_SCALE` and above (matplotlib's inferno, whose
    lightness is even); what is not a number has the brightest colour too."""
    error = (predicted.detach().cpu().float() - target.detach().cpu().float()).abs().mean(dim=-1, keepdim=True)
    share = torch.nan_to_num(error / ERROR_SCALE, nan=1.0, posinf=1.0).clamp(0, 1)
    return colormaps.apply_float_colormap(share, "inferno").float()


def side_by_side(images: Mapping[str, Float[Tensor, "H W 3"]]) -> Float[Tensor, "H2 W2 3"]:
    """Images with their names above them, in rows of at most four, at most 1600 pixels wide.

    Args:
        images: in 0..1, at least one, by label; their sizes may differ, and each keeps its aspect.
    """
    rows = -(-len(images) // _PER_ROW)
    columns = -(-len(images) // rows)
    widest = max(image.shape[1] for image in images.values())
    cell = min((_STRIP_WIDTH - _GAP * (columns + 1)) // columns, max(widest, _SMALLEST))
    scaled = {label: _to_width(image, cell) for label, image in images.items()}
    tallest = max(image.shape[0] for image in scaled.values())
    width, height = columns * (cell + _GAP) + _GAP, rows * (tallest + _LABEL + _GAP)
    figure = Figure(figsize=((width + 0.5) / DOTS_PER_INCH, (height + 0.5) / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    places = []
    for number, (label, image) in enumerate(scaled.items()):
        top = number // columns * (tallest + _LABEL + _GAP)
        left = _GAP + number % columns * (cell + _GAP)
        figure.text(left / width, 1 - (top + _LABEL / 2) / height, label, va="center", fontsize=11)
        places.append((slice(top + _LABEL, top + _LABEL + image.shape[0]), slice(left, left + cell), image))
    strip = rendered(figure)
    for down, across, image in places:
        strip[down, across] = image
    return strip


def _to_width(image: Tensor, width: int) -> Float[Tensor, "H W 3"]:
    """Resized: averaged where it gets smaller, with its pixels as blocks where it gets larger."""
    image = torch.nan_to_num(image.detach().cpu().float()).clamp(0, 1)
    if image.shape[1] == width:
        return image
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    smaller = width < image.shape[1]
    how = {"mode": "bilinear", "antialias": True} if smaller else {"mode": "nearest-exact"}
    resized = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], (height, width), **how)
    return resized[0].permute(1, 2, 0).clamp(0, 1)
