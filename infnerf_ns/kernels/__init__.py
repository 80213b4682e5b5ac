"""The kernels of the octree field: one contract each, several interchangeable backends.

- :func:`hash_encode`: features of (local position, node) pairs from a bank of multi-resolution hash grids;
- :func:`path_features`, :func:`path_sum`: the same along the samples' paths down the tree, fused with what stands
  around it in the field (CPU);
- :func:`grouped_mlp`: small MLPs, one per node, applied to samples that are sorted by node.

Backends: ``torch`` (readable reference and test oracle, any device) and ``numba`` (CPU). ``auto`` takes numba for CPU
tensors.
"""

from infnerf_ns.kernels._dispatch import (
    TreePaths,
    grouped_mlp,
    hash_encode,
    mlp_page_size,
    path_features,
    path_sum,
    route_on_cpu,
    use_numba,
)
from infnerf_ns.kernels.gradients import bank_gradient, enable_bank_gradient
from infnerf_ns.kernels.layout import HashLayout

__all__ = [
    "HashLayout",
    "TreePaths",
    "bank_gradient",
    "enable_bank_gradient",
    "grouped_mlp",
    "hash_encode",
    "mlp_page_size",
    "path_features",
    "path_sum",
    "route_on_cpu",
    "use_numba",
]
