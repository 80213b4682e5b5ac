"""How a batch of samples lies in the tree, as the kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Groups(NamedTuple):
    """Runs of samples that share an MLP, coarse octree levels first."""

    starts: Int[Tensor, "G1"]
    """group g owns the samples ``starts[g] : starts[g + 1]``"""
    level: Int[Tensor, "G"]
    """octree level, not falling: which bank holds the group's weights"""
    row: Int[Tensor, "G"]
    """row in that bank; no two groups of a level share one"""
    used_inputs: Int[Tensor, "G"]
    """leading inputs that can differ from zero (a promise that saves work)"""


class TreePaths(NamedTuple):
    """Where samples stand in the tree, for the kernels that follow their paths."""

    unit: Float[Tensor, "M 3"]
    """unit coordinates"""
    path: Int[Tensor, "M K"]
    """node per level, -1 below the sample's own"""
    coords: Int[Tensor, "N 3"]
    """integer coordinates of all nodes"""
    first: list[int]
    """first node of each level"""
