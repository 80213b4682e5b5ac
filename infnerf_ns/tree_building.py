"""The model's octree: its options, how it comes from the SfM scene, and what the log says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Optional

import psutil
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.octree import Octree, RootCube, build_octree, full_octree, root_cube
from infnerf_ns.validation import Range

SOURCES = {
    "tracks": "SfM points with tracks",
    "visibility": "SfM points",
    "frusta": "points in the camera frusta (no SfM points)",
}
"""In words, what an SfM scene was made from."""
TIGHT_MEMORY = 0.7
"""Share of the free memory above which a tree is worth a warning."""


@dataclass
class OctreeConfig:
    """How the octree is built."""

    max_level: Annotated[int, Range(0, 20, warn_above=15)] = 4
    """Deepest octree level (0: the root alone)."""
    node_resolution: Annotated[int, Range(8, 8192)] = 256
    """Finest resolution of a node's grid: cells per edge of its cube."""
    gsd_sharpness: Annotated[float, Range(0.25, 8.0)] = 2.0
    """How much finer than a grid cell a node is trusted to be; the paper uses 2."""
    min_points: Annotated[int, Range(1, 1_000_000)] = 32
    """SfM points finer than the parent's GSD that an octant needs to become a node."""
    start: Literal["points", "root", "full"] = "points"
    """What the tree starts from: nodes where the SfM points want them (points), the root alone, or all nodes down to
    `full_level`. `growth` changes it while it trains."""
    full_level: Annotated[int, Range(0, 6)] = 2
    """Deepest level of a tree that starts full."""
    align: Literal["auto", "none", "pca"] = "auto"
    """Axes of the root cube: the scene's (none), the points' principal axes with the shortest up (pca), or pca only
    where the scene is flat and tilted (auto)."""
    trim: Annotated[float, Range(0.0, 0.2)] = 0.01
    """Share of outlying SfM points that the root cube ignores at both ends of each axis."""
    cube: Optional[tuple[float, float, float, float]] = None
    """x, y and z of the root cube's centre and its side, scene units, where the SfM points miss too much of the scene
    to tell; by default they tell. The log of a training says what they made."""
    level_start_steps: Annotated[int, Range(0, 1_000_000)] = 1500
    """Steps between the starts of two octree levels; a level starts from what its parents have learnt."""

    def check(self) -> list[str]:
        """Values that do not fit each other."""
        if self.cube is not None and not (all(map(math.isfinite, self.cube)) and self.cube[3] > 0):
            given = " ".join(f"{value:g}" for value in self.cube)
            return [f"--pipeline.model.octree.cube {given}: give x, y and z of the centre, and a side above 0"]
        if self.start == "full" and self.full_level > self.max_level:
            return [
                f"--pipeline.model.octree.full-level {self.full_level}: must not be above"
                f" --pipeline.model.octree.max-level {self.max_level}"
            ]
        return []


def build_tree(scene: SfMScene, config: OctreeConfig) -> Octree:
    """The octree of an SfM scene.

    Raises:
        InputError: the points have no extent.
    """
    try:
        cube = root_cube(scene.points, align=config.align, trim=config.trim)
    except ValueError as error:
        raise InputError(
            "all SfM points lie at one place: check the sparse model, or leave it out to use the cameras"
        ) from error
    if config.cube is not None:
        cube = RootCube(torch.tensor(config.cube[:3]), config.cube[3], cube.rotation)
    sizes = {"node_resolution": config.node_resolution, "gsd_sharpness": config.gsd_sharpness}
    if config.start != "points" or scene.source == "checkpoint":
        known = config.start == "full" and scene.source != "checkpoint"
        return full_octree(cube, config.full_level if known else 0, **sizes)
    return build_octree(
        scene.points,
        scene.footprints,
        cube,
        max_level=config.max_level,
        min_points=config.min_points,
        **sizes,
    )


def log_tree(octree: Octree, bytes_per_level: list[int], source: str) -> None:
    """Prints nodes, GSD, pruned share and memory of each level.

    Args:
        octree: the tree.
        bytes_per_level: memory of each level.
        source: what the tree was made from.
    """
    table = Table(title=f"Octree of {octree.num_nodes} nodes from {source}")
    for name in ("level", "nodes", "GSD", "pruned", "memory"):
        table.add_column(name, justify="right", overflow="fold")
    for row in octree.summary(bytes_per_level):
        table.add_row(
            str(row["level"]),
            str(row["nodes"]),
            f"{row['gsd']:.4g}",
            f"{100 * row['pruned']:.0f} %",
            f"{row['bytes'] / 2**20:.0f} MiB",
        )
    CONSOLE.print(table)


def require_memory(bytes_per_level: list[int], device: torch.device | str) -> None:
    """Ends with one line before anything is allocated if the tree does not fit into the device's free memory; warns if
    hardly.

    Raises:
        InputError: the tree does not fit.
    """
    on_cuda = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    needed, free = sum(bytes_per_level) / 2**30, free / 2**30
    if needed > free:
        raise InputError(
            f"the tree needs {needed:.1f} GiB, but only {free:.1f} GiB of memory are free: lower"
            " --pipeline.model.octree.max-level or --pipeline.model.field.log2-table-size, or raise"
            " --pipeline.model.octree.min-points"
        )
    if needed > TIGHT_MEMORY * free:
        CONSOLE.print(f"[yellow]the tree needs {needed:.1f} GiB of the {free:.1f} GiB of memory that are free[/yellow]")
