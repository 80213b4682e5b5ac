"""Allow-list the NumPy scalars that nerfstudio's checkpoints hold, for ``torch.load`` with ``weights_only=True``.

Since torch 2.6, which this package requires, that is the default, and nerfstudio's schedulers store ``np.float64``
learning rates: without this, ns-eval, ns-render, ns-export, ns-viewer and a resumed ns-train end in "Unsupported
global". The allow-list is torch's own public mechanism. ``methods.py`` calls this; nerfstudio imports every plugin
before it loads any checkpoint.
"""

import importlib

import numpy as np
import torch


def allow_numpy_scalars() -> None:
    """Register NumPy's scalar constructor and the float and integer dtypes as safe to unpickle. Idempotent."""
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    torch.serialization.add_safe_globals([np.dtype, *dtypes, *_scalar_constructors()])


def _scalar_constructors() -> list:
    """``multiarray.scalar`` under both module names: a checkpoint may have been written by NumPy 1 or by NumPy 2."""
    core = "numpy._core" if int(np.__version__.split(".")[0]) >= 2 else "numpy.core"
    scalar = importlib.import_module(f"{core}.multiarray").scalar
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
