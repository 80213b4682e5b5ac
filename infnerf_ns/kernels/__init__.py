"""The kernels of the octree field: one contract each (:mod:`.contracts`), several interchangeable backends.

- :func:`route`: the walk of all samples down the tree;
- :func:`hash_encode`: features of (local position, node) pairs from a bank of multi-resolution hash grids;
- :func:`path_features`, :func:`path_sum`: the same along the samples' paths down the tree, fused with what stands
  around it in the field;
- :func:`grouped_mlp`: small MLPs, one per node, applied to samples that are sorted by node;
- :mod:`.rays` and :mod:`.shading`: what happens along rays and between the decoders, by numba on a CPU, else by torch.

Backends (:mod:`.backends`): ``torch`` (readable reference and test oracle, any device), ``numba`` (CPU), ``triton``
(CUDA; in Triton's interpreter also the CPU, for tests) and ``tcnn`` (tiny-cuda-nn for the hash grids, torch for the
rest; CUDA).
"""

from infnerf_ns.kernels.backends import Backend, choose, explain
from infnerf_ns.kernels.batches import Groups, TreePaths
from infnerf_ns.kernels.contracts import (
    follows_paths,
    grouped_mlp,
    hash_encode,
    mlp_page_size,
    path_features,
    path_sum,
    route,
)
from infnerf_ns.kernels.gradients import bank_gradient, enable_bank_gradient
from infnerf_ns.kernels.layout import HashLayout

__all__ = [
    "Backend",
    "Groups",
    "HashLayout",
    "TreePaths",
    "bank_gradient",
    "choose",
    "enable_bank_gradient",
    "explain",
    "follows_paths",
    "grouped_mlp",
    "hash_encode",
    "mlp_page_size",
    "path_features",
    "path_sum",
    "route",
]
