"""The frame of a map: x east, y north, z up, in the units of the capture, against nerfstudio's scene units.

nerfstudio turns, moves and scales the poses of a capture (``scene = scale * (R @ capture + t)``) and writes R, t and
the scale into ``dataparser_transforms.json`` beside ``config.yml``. Undone, they lead back to the capture's own
coordinates, which are metres where it is georeferenced. Where the capture's z axis does not point up (COLMAP's axes are
those of its first photo), the tree says what is up.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import read_small_file
from infnerf_ns.validation import shortened

TRANSFORMS = "dataparser_transforms.json"
_UPRIGHT = np.cos(np.radians(15))
"""A capture whose z axis is within that angle of the tree's up is taken to be z up: georeferenced captures are, and
their terrain may slope."""


@dataclass(frozen=True)
class MapFrame:
    """``map = unit * axes @ (scene - zero) + (shift, 0)``, all in double precision."""

    axes: Float[np.ndarray, "3 3"]
    """east, north and up as rows, in scene coordinates"""
    zero: Float[np.ndarray, "3"]
    """scene coordinates of the map's zero, before the shift"""
    unit: float
    """map units per scene unit"""
    is_capture: bool
    """the axes are the capture's own"""
    shift: tuple[float, float] = (0.0, 0.0)
    """added to x and y: what a georeferenced capture was moved by to keep its numbers small"""

    def to_map(self, scene: Float[np.ndarray, "*bs 3"]) -> Float[np.ndarray, "*bs 3"]:
        """Scene to map coordinates."""
        return self.unit * (np.asarray(scene, np.float64) - self.zero) @ self.axes.T + (*self.shift, 0.0)

    def to_scene(self, place: Float[np.ndarray, "*bs 3"]) -> Float[np.ndarray, "*bs 3"]:
        """Map to scene coordinates."""
        return (np.asarray(place, np.float64) - (*self.shift, 0.0)) / self.unit @ self.axes + self.zero

    def shifted(self, shift: tuple[float, float]) -> MapFrame:
        """The same with another shift."""
        return replace(self, shift=shift)


def map_frame(
    folder: Path, tree_up: Float[np.ndarray, "3"], up: Literal["auto", "capture", "tree"] = "auto"
) -> MapFrame:
    """The map frame of a run.

    Args:
        folder: of the run; without ``dataparser_transforms.json`` in it the scene's own frame is that of the capture.
        tree_up: up in scene coordinates as the tree knows it, the root cube's third axis.
        up: ``capture``: the capture's z axis; ``tree``: ``tree_up``, and east is the capture's x axis laid level;
            ``auto``: the capture's z axis where it is within 15 degrees of ``tree_up``, else the tree's.

    Raises:
        InputError: the file cannot be read.
    """
    path = folder / TRANSFORMS
    rotation, moved, scale = np.eye(3), np.zeros(3), 1.0
    if os.path.lexists(path):
        try:
            content = json.loads(read_small_file(path, "the run's transform,").decode("utf-8"))
            transform, scale = np.array(content["transform"], np.float64).reshape(3, 4), float(content["scale"])
            rotation, moved = transform[:, :3], transform[:, 3]
            if not (
                np.isfinite(transform).all() and scale > 0 and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3)
            ):
                raise ValueError("it is not a rotation, a shift and a scale")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read ({shortened(str(error))}): copy it from the run that ns-train wrote"
            ) from error
    capture = rotation.T  # its axes as rows
    tree_up = np.asarray(tree_up, np.float64) / np.linalg.norm(tree_up)
    if up == "capture" or (up == "auto" and capture[2] @ tree_up > _UPRIGHT):
        return MapFrame(capture, scale * moved, 1 / scale, is_capture=True)
    east = capture[0] if abs(capture[0] @ tree_up) < 0.9 else capture[1]
    east = east - (east @ tree_up) * tree_up
    east = east / np.linalg.norm(east)
    return MapFrame(np.stack([east, np.cross(tree_up, east), tree_up]), scale * moved, 1 / scale, is_capture=False)
