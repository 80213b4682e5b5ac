"""Which backend evaluates the kernels: the one asked for, or the fastest that is present."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from infnerf_ns.errors import InputError

Backend = Literal["auto", "torch", "numba", "triton", "tcnn"]
Chosen = Literal["torch", "numba", "triton", "tcnn"]

_FLAG = "--pipeline.model.field.backend"


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> Chosen:
    """The backend for tensors like these.

    Args:
        backend: as configured; ``auto`` takes numba for float32 on the CPU, and on CUDA the first of triton, tcnn and
            torch that is installed.
        device: of the samples.
        dtype: of the samples; the fast kernels work in float32.

    Raises:
        InputError: a named backend cannot run there.
    """
    if backend == "auto":
        if dtype != torch.float32:
            return "torch"
        if device.type == "cpu":
            return "numba"
        if device.type == "cuda" and _installed("triton"):
            return "triton"
        return "tcnn" if device.type == "cuda" and _installed("tinycudann") else "torch"
    if backend == "numba" and device.type != "cpu":
        raise InputError(f"{_FLAG} numba runs on the CPU, but the model is on {device}: use auto")
    if backend == "numba" and dtype != torch.float32:
        return "torch"
    if backend in ("triton", "tcnn") and device.type != "cuda" and not (backend == "triton" and _interprets()):
        raise InputError(f"{_FLAG} {backend} runs on CUDA, but the model is on {device}: use auto")
    if backend == "triton" and not _installed("triton"):
        raise InputError(f"{_FLAG} triton: the package triton is not installed; use auto")
    if backend == "tcnn" and not _installed("tinycudann"):
        raise InputError(f"{_FLAG} tcnn: the package tinycudann is not installed; use auto")
    return backend


def choose_for(backend: Backend, samples: Tensor) -> Chosen:
    """:func:`choose` for a tensor of samples."""
    return choose(backend, samples.device, samples.dtype)


def explain(backend: Backend, device: torch.device) -> str:
    """One line for the log: which backend is used and why."""
    chosen = choose(backend, device)
    if backend != "auto":
        return f"kernels: {chosen}, as configured"
    if device.type == "cpu":
        return "kernels: numba, the fastest on a CPU"
    reasons = {
        "triton": "the fastest on CUDA",
        "tcnn": "as triton is not installed",
        "torch": "slow: neither triton nor tinycudann is installed",
    }
    return f"kernels: {chosen}, {reasons[chosen]}"
