"""``grouped_mlp`` in readable PyTorch: the reference and test oracle of the other backends."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def grouped_mlp_torch(
    inputs: Float[Tensor, "P in"],
    starts: Int[Tensor, "G1"],
    rows: Int[Tensor, "G"],
    bank: Float[Tensor, "N page"],
    offset: int,
    widths: tuple[int, ...],
) -> Float[Tensor, "P out"]:
    """See :func:`infnerf_ns.kernels.grouped_mlp`."""
    outputs = []
    for group in range(len(rows)):
        hidden = inputs[int(starts[group]) : int(starts[group + 1])]
        used = offset
        for layer, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:])):
            weight = bank[rows[group], used : used + fan_in * fan_out].reshape(fan_in, fan_out)
            used += fan_in * fan_out
            hidden = hidden @ weight
            if layer < len(widths) - 2:
                hidden = hidden.relu()
        outputs.append(hidden)
    return torch.cat(outputs) if outputs else inputs.new_zeros(0, widths[-1])
