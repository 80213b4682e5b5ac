"""Footprints and ground sampling distances: how large a sample is on screen, and which octree level shows that size.

Vocabulary (design section 2): the *footprint* of a sample is the radius of its pixel's cone there; the *GSD* of a
level is the finest cell that a node of that level resolves; the *continuous level* of a sample is ``log2(gsd(0) /
footprint)``. Pure functions on tensors, no nerfstudio. Source: InfNeRF (SIGGRAPH Asia 2024), section 3.2 and its
supplement.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def level_gsd(side: float, level: int | Tensor, node_resolution: int, sharpness: float = 2.0) -> float | Tensor:
    """Ground sampling distance of an octree level, in the unit of ``side``.

    Args:
        side: edge length of the root cube.
        level: octree level, root = 0.
        node_resolution: finest grid resolution of one node.
        sharpness: how much finer than one grid cell a node is trusted to be (the paper uses 2).
    """
    return side / (2.0**level * sharpness * node_resolution)


def cone_radius(distance: Float[Tensor, "*bs"], pixel_area: Float[Tensor, "*bs"]) -> Float[Tensor, "*bs"]:
    """Radius of a pixel's cone at ``distance`` along its ray: ``t * sqrt(pixel_area / pi)``.

    Args:
        distance: distance along the unit ray direction, scene units.
        pixel_area: solid angle of the pixel in steradians (nerfstudio's ``RayBundle.pixel_area``).
    """
    return distance * torch.sqrt(pixel_area / math.pi)


def continuous_level(footprints: Float[Tensor, "*bs"], root_gsd: float) -> Float[Tensor, "*bs"]:
    """Continuous octree level ``log2(gsd(0) / r)``; footprint 0 asks for the finest level (+inf)."""
    return torch.log2(root_gsd / footprints)


def point_footprint(
    depth: Float[Tensor, "*bs"], distance: Float[Tensor, "*bs"], focal: Float[Tensor, "*bs"] | float
) -> Float[Tensor, "*bs"]:
    """Radius of the ball around a point that covers about one pixel of a photo: ``z**2 / (f * ||p_cam||)``.

    Args:
        depth: z of the point in the camera frame (positive in front), scene units.
        distance: distance between camera centre and point, scene units.
        focal: focal length in pixels.
    """
    return depth**2 / (focal * distance)
