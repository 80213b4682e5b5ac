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
from jaxtyping import Int
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from torch import Tensor

from infnerf_ns.kernels import adam_numba, bank_gradient
from infnerf_ns.kernels.gradients import lazy_zeros, moved_rows
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
    """

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
        warmup: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "warmup": warmup})

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
        for group in self.param_groups:
            for bank in group["params"]:
                if bank.grad is None or bank.numel() == 0:
                    continue
                state = self._moments(bank)
                held = bank_gradient(bank)
                if held is None:
                    _dense_step(bank, state, group)
                    continue
                kernels = _device_kernels(bank)
                if kernels is not None:
                    kernels.step(bank.detach(), held, state, group)
                    continue
                rows = np.flatnonzero(held.rows.numpy())
                state["row_steps"][torch.from_numpy(rows)] += 1
                gradient = held.grad.numpy(), held.touched.numpy(), rows
                moments = (state[name].numpy() for name in ("row_steps", "exp_avg", "exp_avg_sq"))
                rates = group["lr"], *group["betas"], group["eps"], group["warmup"]
                with numba_lock:
                    adam_numba.touched_step(bank.detach().numpy(), *gradient, *moments, *rates)
                held.rows.zero_()

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


def _dense_step(bank: Tensor, state: dict, group: dict) -> None:
    """The same update in torch, for devices without an in-place gradient."""
    touched = bank.grad != 0
    rows = touched.any(dim=1)
    state["row_steps"] += rows
    beta1, beta2 = group["betas"]
    steps = state["row_steps"].clamp(min=1).double()[:, None]
    for name, beta, power in (("exp_avg", beta1, 1), ("exp_avg_sq", beta2, 2)):
        moment = state[name]
        moment.copy_(torch.where(touched, beta * moment + (1 - beta) * bank.grad**power, moment))
    rate = (group["lr"] * (steps / max(group["warmup"], 1)).clamp(max=1) / (1 - beta1**steps)).float()
    root = (state["exp_avg_sq"] / (1 - beta2**steps).float()).sqrt() + group["eps"]
    bank.sub_(torch.where(touched, rate * state["exp_avg"] / root, torch.zeros_like(bank)))


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
        return NodeAdam(params, lr=self.lr, betas=self.betas, eps=self.eps, warmup=self.warmup)
