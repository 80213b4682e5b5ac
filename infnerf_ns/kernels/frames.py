"""A change of frame of many points; fused on the CPU, where torch's product is slow for three columns."""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from infnerf_ns.kernels.numba_lock import KEEPS_NAN, flat, numba_lock, on_cpu


@nb.njit(parallel=True, cache=True, fastmath=KEEPS_NAN, error_model="numpy", boundscheck=False)
def _affine(points, center, matrix, offset, out):
    """out [M, 3] = (points [M, 3] - center [3]) @ matrix [3, 3] + offset."""
    for m in nb.prange(len(points)):
        x, y, z = points[m, 0] - center[0], points[m, 1] - center[1], points[m, 2] - center[2]
        for axis in range(3):
            out[m, axis] = x * matrix[0, axis] + y * matrix[1, axis] + z * matrix[2, axis] + np.float32(offset)


def affine(
    points: Float[Tensor, "M 3"], center: Float[Tensor, "3"], matrix: Float[Tensor, "3 3"], offset: float
) -> Float[Tensor, "M 3"]:
    """``(points - center) @ matrix + offset``: a change of frame, in one pass.

    Autocast does not apply: half precision would move samples by more than a cell.
    """
    needs_gradient = torch.is_grad_enabled() and points.requires_grad
    if not needs_gradient and points.ndim == 2 and on_cpu(points, center, matrix):
        out = torch.empty(points.shape)
        with numba_lock:
            _affine(flat(points), flat(center), flat(matrix), offset, out.numpy())
        return out
    with torch.autocast(points.device.type, enabled=False):
        return (points - center) @ matrix + offset
