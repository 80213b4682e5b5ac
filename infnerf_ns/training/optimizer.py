"""NodeAdam: exact Adam on the bank entries that a step touched, at a cost that does not grow with the tree.

Adam over a whole bank reads and writes four arrays of the size of the model per step. NodeAdam visits the rows (nodes)
and, in them, the blocks that the kernels flagged (:mod:`infnerf_ns.kernels.gradients`), and updates the entries whose
gradient is not zero. Moments of untouched entries stay as they are, as in ``torch.optim.SparseAdam``; the bias
correction counts the steps of each node's own, so a node that starts late starts like a new one. Why own code: torch's
SparseAdam wants sparse gradient tensors, which cost a sort per step.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from torch import Tensor
from torch.amp import GradScaler

from infnerf_ns.kernels import adam_numba, bank_gradient
from infnerf_ns.kernels.gradients import BankGradient, lazy_zeros, moved_rows
from infnerf_ns.kernels.numba_lock import numba_lock
from infnerf_ns.validation import Range


class NodeAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) on the touched entries of banks ``[nodes, page]``.

    Args:
        params: bank Parameters.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        warmup: steps of a node's own over which its learning rate rises to ``lr``. A node that starts from what its
            parent knows has no moments yet, and Adam's first steps would move every weight by the whole rate.
        max_norm: gradients whose norm, over the touched entries of all banks, is larger are scaled down to it.

    Gradients that are NaN, infinite or 2**60 and more (a square must be finite) change nothing; `left_out` counts them.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
        warmup: int = 0,
        max_norm: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "warmup": warmup})
        self.max_norm = max_norm
        device = self.param_groups[0]["params"][0].device
        self._left_out = torch.zeros((), dtype=torch.int64, device=device)
        self._left_out_seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._left_out_said = 0

    def left_out(self) -> int:
        """How many gradients of single entries have been left out since it was last asked. On CUDA those of the last
        step may still be missing, and come next time: nothing waits for the device."""
        self._left_out_seen.copy_(self._left_out, non_blocking=True)
        total = int(self._left_out_seen)
        new, self._left_out_said = total - self._left_out_said, total
        return new

    def load_state_dict(self, state_dict: dict) -> None:
        """Torch casts a state to the type of its Parameter: the counters become whole numbers again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["row_steps"] = state["row_steps"].long()

    def _moments(self, bank: Tensor) -> dict:
        state = self.state[bank]
        if "exp_avg" not in state or state["exp_avg"].shape != bank.shape:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = lazy_zeros(bank.device, torch.float32, *bank.shape)
            state["row_steps"] = torch.zeros(len(bank), dtype=torch.int64, device=bank.device)
        return state

    @torch.no_grad()
    def move_rows(self, bank: Tensor, rows: Int[Tensor, "n"]) -> None:
        """The state of a bank follows its rows.

        Args:
            bank: one of the Parameters; others are ignored.
            rows: that the bank is going to have: numbers of its present ones, or -1 for a new node, which starts clean.
        """
        state = self.state.get(bank)
        if state and state["exp_avg"].shape == bank.shape:
            trained = state["row_steps"]
            for name in ("exp_avg", "exp_avg_sq", "row_steps"):
                state[name] = moved_rows(state[name], rows, trained)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # noqa: ANN001
        """One update of what the last backward passes touched; its gradients are cleared on the way."""
        del closure
        factor = self._clipping()
        for group in self.param_groups:
            for bank in group["params"]:
                if bank.grad is None or bank.numel() == 0:
                    continue
                state = self._moments(bank)
                held = bank_gradient(bank)
                if held is None:
                    self._left_out += _dense_step(bank, state, group, factor)
                    continue
                kernels = _device_kernels(bank)
                if kernels is not None:
                    kernels.step(bank.detach(), held, state, group, factor, self._left_out)
                    continue
                gradient = _touched(held)
                rows = gradient[-1]
                state["row_steps"][torch.from_numpy(rows)] += 1
                moments = (state[name].numpy() for name in ("row_steps", "exp_avg", "exp_avg_sq"))
                rates = group["lr"], *group["betas"], group["eps"], group["warmup"]
                with numba_lock:
                    left_out = adam_numba.touched_step(
                        bank.detach().numpy(), *gradient, *moments, *rates, float(factor)
                    )
                self._left_out += left_out
                held.rows.zero_()

    def _clipping(self) -> Float[Tensor, ""]:
        """What all gradients are multiplied with (as ``torch.nn.utils.clip_grad_norm_`` does, which visits whole banks,
        and makes all of them NaN where one entry is)."""
        banks = [bank for group in self.param_groups for bank in group["params"] if bank.grad is not None]
        one = torch.ones((), device=self._left_out.device)
        if self.max_norm is None or not banks:
            return one
        norm = torch.stack([_square(bank) for bank in banks]).sum().sqrt()
        return (self.max_norm / (norm + 1e-6)).float().clamp(max=1)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears what was touched since the last step (nothing, normally: :meth:`step` clears as it goes)."""
        for group in self.param_groups:
            for bank in group["params"]:
                held = bank_gradient(bank)
                if held is None:
                    bank.grad = None if set_to_none or bank.grad is None else bank.grad.zero_()
                    continue
                kernels = _device_kernels(bank)
                if kernels is not None:
                    kernels.clear(held)
                    continue
                rows = np.flatnonzero(held.rows.numpy())
                if len(rows):
                    with numba_lock:
                        adam_numba.clear(held.grad.numpy(), held.touched.numpy(), rows)
                    held.rows.zero_()


def _device_kernels(bank: Tensor) -> ModuleType | None:
    """The kernels for a bank on CUDA, imported when first needed, as Triton is not on every platform; None on a CPU."""
    return importlib.import_module("infnerf_ns.kernels.adam_triton") if bank.device.type == "cuda" else None


def _touched(held: BankGradient) -> tuple[np.ndarray, ...]:
    """What the CPU's kernels want of a gradient: the gradient, the flags and the touched rows."""
    grad = held.grad.numpy()
    return grad, held.touched.numpy(), np.flatnonzero(held.rows.numpy())


def _square(bank: Tensor) -> Float[Tensor, ""]:
    """Sum of the squares of the gradients that a step takes, float64."""
    held = bank_gradient(bank)
    if held is None:
        return torch.where(_usable(bank.grad), bank.grad, 0.0).double().square().sum()
    kernels = _device_kernels(bank)
    if kernels is not None:
        return kernels.square(held)
    with numba_lock:
        return torch.tensor(adam_numba.touched_square(*_touched(held)), dtype=torch.float64)


def _usable(gradient: Tensor) -> Tensor:
    """Where a gradient and its square are finite."""
    return gradient.abs() < 2.0**60


def _dense_step(bank: Tensor, state: dict, group: dict, factor: Tensor) -> Int[Tensor, ""]:
    """The same update in torch, for devices without an in-place gradient; gives the number of gradients left out."""
    usable, gradient = _usable(bank.grad), factor * bank.grad
    touched = usable & (bank.grad != 0)
    rows = (bank.grad != 0).any(dim=1)
    state["row_steps"] += rows
    beta1, beta2 = group["betas"]
    steps = state["row_steps"].clamp(min=1).double()[:, None]
    for name, beta, power in (("exp_avg", beta1, 1), ("exp_avg_sq", beta2, 2)):
        moment = state[name]
        moment.copy_(torch.where(touched, beta * moment + (1 - beta) * gradient**power, moment))
    rate = (group["lr"] * (steps / max(group["warmup"], 1)).clamp(max=1) / (1 - beta1**steps)).float()
    root = (state["exp_avg_sq"] / (1 - beta2**steps).float()).sqrt() + group["eps"]
    bank.sub_(torch.where(touched, rate * state["exp_avg"] / root, torch.zeros_like(bank)))
    return (~usable).sum()


@dataclass
class NodeAdamOptimizerConfig(AdamOptimizerConfig):
    """Adam on the touched entries of the node banks."""

    _target: type = field(default_factory=lambda: NodeAdam)
    lr: float = 1e-2
    """Learning rate."""
    eps: float = 1e-15
    """Added to the root of the second moment."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two moments."""
    warmup: Annotated[int, Range(0)] = 100
    """Steps of a node's own over which its learning rate rises."""

    def setup(self, params) -> torch.optim.Optimizer:
        """The optimizer; nerfstudio's ``weight_decay`` is refused elsewhere, as it would visit every entry."""
        return NodeAdam(params, lr=self.lr, betas=self.betas, eps=self.eps, warmup=self.warmup, max_norm=self.max_norm)


class LevelOptimizers(Optimizers):
    """nerfstudio's optimizers, where clipping by ``max_norm`` is `NodeAdam`'s own business."""

    def optimizer_scaler_step_some(self, grad_scaler: GradScaler, param_groups: list[str]) -> None:
        """One step of some groups. See nerfstudio."""
        for name in param_groups:
            optimizer, max_norm = self.optimizers[name], self.config[name]["optimizer"].max_norm
            if max_norm is not None and not isinstance(optimizer, NodeAdam):
                grad_scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.parameters[name], max_norm)
            if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
                grad_scaler.step(optimizer)
