"""``grouped_mlp`` in readable PyTorch: the reference and test oracle of the other backends."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from infnerf_ns.kernels.batches import Groups


def grouped_mlp_torch(
    inputs: Float[Tensor, "P in"], groups: Groups, banks: list[Tensor], offset: int, widths: tuple[int, ...]
) -> Float[Tensor, "P out"]:
    """See :func:`infnerf_ns.kernels.grouped_mlp`."""
    outputs = []
    starts = groups.starts.tolist()
    for start, stop, level, row in zip(starts[:-1], starts[1:], groups.level.tolist(), groups.row.tolist()):
        hidden = inputs[start:stop]
        used = offset
        for layer, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:])):
            weight = banks[level][row, used : used + fan_in * fan_out].reshape(fan_in, fan_out)
            used += fan_in * fan_out
            hidden = hidden @ weight
            if layer < len(widths) - 2:
                hidden = hidden.relu()
        outputs.append(hidden)
    return torch.cat(outputs) if outputs else inputs.new_zeros(0, widths[-1])
