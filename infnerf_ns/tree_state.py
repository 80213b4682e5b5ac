"""The octree as named tensors of a checkpoint, there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from infnerf_ns.octree import Octree, RootCube


def tree_buffers(octree: Octree) -> dict[str, Tensor]:
    """What a checkpoint says of a tree: its nodes, its root cube, and what its levels resolve."""
    cube, device = octree.cube, octree.level.device
    return {
        "tree_level": octree.level,
        "tree_coords": octree.coords,
        "tree_parent": octree.parent,
        "cube_center": cube.center.to(device),
        "cube_side": torch.tensor(cube.side, dtype=torch.float64, device=device),
        "cube_rotation": cube.rotation.to(device),
        "tree_resolution": torch.tensor(
            [octree.node_resolution, octree.gsd_sharpness], dtype=torch.float64, device=device
        ),
    }


def octree_from_state(state: dict[str, Tensor], prefix: str) -> Octree:
    """The tree that a state dict holds under these names, each after the prefix."""
    cube = RootCube(state[prefix + "cube_center"], float(state[prefix + "cube_side"]), state[prefix + "cube_rotation"])
    resolution, sharpness = state[prefix + "tree_resolution"].tolist()
    return Octree(
        cube,
        state[prefix + "tree_level"],
        state[prefix + "tree_coords"],
        state[prefix + "tree_parent"],
        node_resolution=int(resolution),
        gsd_sharpness=sharpness,
    )
