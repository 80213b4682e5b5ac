"""Layout of one node's multi-resolution hash grid inside its page, shared by every backend.

The indexing rule is the published one of Instant-NGP (Mueller et al. 2022, section 3) as tiny-cuda-nn implements it,
so that a checkpoint runs on every backend: scale ``N_l - 1``, sample shifted by half a cell, dense levels row-major
with x fastest, hashed levels XOR of ``coordinate * prime`` with primes 1, 2654435761, 805459861, level sizes a multiple
of 8 entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class HashLayout:
    """Sizes of the hash levels of one node (L levels, F features per entry)."""

    num_levels: int
    """hash levels L"""
    base_resolution: int
    """resolution of the coarsest hash level"""
    finest_resolution: int
    """resolution of the finest hash level"""
    log2_table_size: int
    """largest number of entries of one hash level, as a power of two"""
    features: int = 2
    """features per entry F (1, 2 or 4)"""

    @cached_property
    def scales(self) -> np.ndarray:
        """[L] float32, grid coordinate per unit of local coordinate."""
        if self.num_levels == 1:
            return np.array([self.finest_resolution - 1.0], dtype=np.float32)
        growth = math.log(self.finest_resolution / self.base_resolution) / (self.num_levels - 1)
        exact = [self.base_resolution * math.exp(growth * level) - 1.0 for level in range(self.num_levels)]
        return np.array(exact, dtype=np.float32)

    @cached_property
    def resolutions(self) -> np.ndarray:
        """[L] int64, vertices per axis."""
        return np.ceil(self.scales.astype(np.float64) - 1e-4).astype(np.int64) + 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """[L] int64, entries of each level."""
        dense = (self.resolutions**3 + 7) // 8 * 8
        return np.minimum(dense, 1 << self.log2_table_size)

    @cached_property
    def hashed(self) -> np.ndarray:
        """[L] bool, whether a level is hashed (else dense)."""
        return self.resolutions**3 > self.sizes

    @cached_property
    def offsets(self) -> np.ndarray:
        """[L + 1] int64, first entry of each level."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def page_size(self) -> int:
        """Number of float parameters of one node."""
        return int(self.offsets[-1]) * self.features

    @property
    def num_outputs(self) -> int:
        """Features per sample, L * F."""
        return self.num_levels * self.features
