"""What calls of numba kernels need: whether they can be made, the lock, and tensors as arrays."""

from __future__ import annotations

import threading

import numba
import numpy as np
import torch
from torch import Tensor

from infnerf_ns.kernels.numba_cache import require_cache_folder

require_cache_folder()
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
"""numba asks for TBB first and warns of an old one that it then leaves alone; it was measured with OpenMP."""

numba_lock = threading.Lock()
"""numba's built-in thread pool must not be entered by two threads at once, and the viewer renders from a thread of its
own."""

KEEPS_NAN = {"contract", "nsz", "arcp", "reassoc"}
"""fastmath without the promise that there is no NaN or infinity: a density may be infinite, a NaN must reach the loss,
where it is found, and a comparison that keeps one from becoming an index must not be optimised away"""


def flat(tensor: Tensor) -> np.ndarray:
    """A tensor's values as a contiguous array, without its gradient."""
    return tensor.detach().contiguous().numpy()


def on_cpu(*tensors: Tensor | None) -> bool:
    """Whether numba can take these tensors: float32 on the CPU; None stands for one that is left out."""
    return all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)
