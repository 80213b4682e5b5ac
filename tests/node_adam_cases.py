"""Banks and gradients for the tests of NodeAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from infnerf_ns.kernels import bank_gradient, enable_bank_gradient
from infnerf_ns.training.optimizer import NodeAdam, _dense_step

ROWS, PAGE = 5, 37  # the last block of a page is not full
MOMENTS = ("exp_avg", "exp_avg_sq", "row_steps")


def adam_bank(rows: int = ROWS, page: int = PAGE, device: str = "cpu") -> Parameter:
    """A bank with a gradient in place."""
    bank = Parameter(torch.randn(rows, page, generator=torch.Generator().manual_seed(1)).to(device))
    enable_bank_gradient(bank)
    return bank


def give(bank: Parameter, gradient: Tensor) -> None:
    """What the backward kernels do: add the gradient in place and flag what was touched."""
    held, gradient = bank_gradient(bank), gradient.to(bank.device)
    held.grad.add_(gradient)
    padded = torch.nn.functional.pad(gradient, (0, held.touched.shape[1] * 16 - gradient.shape[1]))
    held.touched |= padded.reshape(len(gradient), -1, 16).any(dim=2).to(torch.uint8)
    held.rows |= gradient.any(dim=1).to(torch.uint8)


def adam_gradients(seed: int, steps: int, density: float = 1.0, rows: int = ROWS, page: int = PAGE) -> list[Tensor]:
    """Random gradients; a share of ``density`` of the entries is touched, and of the rows half if not all are."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(steps):
        gradient = torch.randn(rows, page, generator=generator)
        if density < 1:
            gradient[torch.rand(rows, page, generator=generator) > density] = 0
            gradient[torch.rand(rows, generator=generator) < 0.5] = 0
        gradients.append(gradient)
    return gradients


def dense_step(bank: Parameter, optimizer: NodeAdam, gradient: Tensor) -> None:
    """A step of the readable twin."""
    bank.grad = gradient.clone()
    with torch.no_grad():
        enabled, bank.infnerf_in_place_gradient = bank.infnerf_in_place_gradient, False
        _dense_step(bank, optimizer._moments(bank), optimizer.param_groups[0], optimizer._clipping())
        bank.infnerf_in_place_gradient = enabled
    bank.grad = None
