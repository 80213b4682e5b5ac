"""The options of the octree field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from infnerf_ns.kernels import Backend
from infnerf_ns.validation import Range


@dataclass
class FieldConfig:
    """Sizes of a node and how nodes relate."""

    children: Literal["residual", "independent"] = "residual"
    """residual: a child adds finer hash levels to its ancestors' features; independent: a child is a complete NeRF
    (the paper)."""
    decoder_sharing: Literal["node", "level", "tree"] = "node"
    """Who has an own decoder: every node (the paper), every octree level, or the whole tree one."""
    hash_levels: Annotated[int, Range(1, 24)] = 8
    """Hash levels of a complete node."""
    child_hash_levels: Annotated[int, Range(1, 16)] = 1
    """Hash levels that a residual child adds; they span the one octave between its parent's finest cell and its own."""
    base_resolution: Annotated[int, Range(2, 512)] = 16
    """Coarsest hash level of a complete node, cells per axis."""
    log2_table_size: Annotated[int, Range(8, 26)] = 17
    """Most entries of a hash level, as a power of two."""
    features_per_level: Literal[1, 2, 4] = 2
    """Features per hash entry."""
    hidden_width: Annotated[int, Range(8, 256)] = 64
    """Width of the hidden layer of the density decoder."""
    color_hidden_width: Annotated[int, Range(8, 256)] = 64
    """Width of the hidden layers of the colour decoder."""
    color_hidden_layers: Annotated[int, Range(1, 4)] = 2
    """Hidden layers of the colour decoder."""
    geo_features: Annotated[int, Range(1, 63)] = 15
    """Features that the density decoder hands to the colour decoder."""
    appearance_dim: Annotated[int, Range(0, 128)] = 8
    """Size of the appearance code of a photo (0: none)."""
    proposal_resolution: Annotated[int, Range(8, 1024)] = 128
    """Finest resolution of a node's proposal grid."""
    proposal_log2_table_size: Annotated[int, Range(8, 26)] = 17
    """Most entries of a level of a node's proposal grid, as a power of two."""
    downweight: Annotated[float, Range(0.0, 16.0)] = 1.0
    """Strength of Zip-NeRF's down-weighting of hash levels finer than the sample's footprint (0: off; larger:
    sharper)."""
    proposal_downweight: Annotated[float, Range(0.0, 16.0)] = 1.0
    """Strength of that down-weighting for the hash levels of the proposals, whose footprints are at least half the
    interval: what a long interval sees then does not depend on the detail that happens to lie at its middle (0:
    off)."""
    backend: Backend = "auto"
    """Who evaluates grids and decoders; auto takes numba on a CPU, and on CUDA the first of triton, tcnn and torch that
    is installed. What happens along rays takes numba on any CPU."""
