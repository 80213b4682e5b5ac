"""The octree as named tensors of a checkpoint; :mod:`infnerf_ns.state_validation` reads them back."""

from __future__ import annotations

import torch
from torch import Tensor

from infnerf_ns.octree import Octree


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
