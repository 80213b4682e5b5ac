"""``hash_encode`` in readable PyTorch: the reference and test oracle of the other backends, differentiable by
autograd."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.kernels.layout import PRIMES, HashLayout


def hash_encode_torch(
    positions: Float[Tensor, "P 3"], row: Int[Tensor, "P"], bank: Float[Tensor, "N page"], layout: HashLayout
) -> Float[Tensor, "P LF"]:
    """See :func:`infnerf_ns.kernels.hash_encode`. Gradients reach the bank and the positions."""
    entries = bank.reshape(-1, layout.features)
    page = int(layout.offsets[-1])
    outputs = []
    for level in range(layout.num_levels):
        size, resolution = int(layout.sizes[level]), int(layout.resolutions[level])
        grid = positions * float(layout.scales[level]) + 0.5
        cell = grid.detach().floor()
        fraction, cell = grid - cell, cell.long()
        total = 0.0
        for corner in range(8):
            bits = torch.tensor([(corner >> axis) & 1 for axis in range(3)], device=cell.device)
            vertex = cell + bits
            weight = torch.where(bits.bool(), fraction, 1 - fraction).prod(dim=-1, keepdim=True)
            if layout.hashed[level]:
                mixed = [(vertex[:, axis] * PRIMES[axis]) & 0xFFFFFFFF for axis in range(3)]
                index = (mixed[0] ^ mixed[1] ^ mixed[2]) % size
            else:
                index = (vertex[:, 0] + resolution * (vertex[:, 1] + resolution * vertex[:, 2])) % size
            total = total + weight * entries[row * page + int(layout.offsets[level]) + index]
        outputs.append(total)
    return torch.cat(outputs, dim=-1)
