"""What stands between the density decoder and the colour decoder: activations, which samples are seen, inputs of the
colour.

As torch operations each of these reads and writes the samples several times, on one core; with everything around them
fused they were a fifth of a step on two cores. The torch forms are the reference and what runs on CUDA.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.activations import trunc_exp
from torch import Tensor
from torch.autograd.function import once_differentiable

from infnerf_ns.kernels import shading_numba
from infnerf_ns.kernels.numba_lock import flat, numba_lock, on_cpu


def activate(hidden: Float[Tensor, "M G1"], scale: float) -> tuple[Float[Tensor, "M"], Float[Tensor, "M G"]]:
    """Density and geometry features of the density decoder's outputs.

    Args:
        hidden: outputs; the first is the logarithm of the density.
        scale: unit of the density, per scene unit.

    Returns:
        ``scale * exp(h - 1)``, whose gradient is bounded as in nerfstudio's ``trunc_exp``, and the others as they are.
        The official code bounds those by a sigmoid; it cost 1.5 dB on fox after three minutes (README).
    """
    if on_cpu(hidden):
        return _Activate.apply(hidden, scale)
    return trunc_exp(hidden[:, 0] - 1.0) * scale, hidden[:, 1:]


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        density, geo = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden), hidden.shape[1] - 1)
        with numba_lock:
            shading_numba.activate(flat(hidden), scale, density.numpy(), geo.numpy())
        ctx.scale = scale
        ctx.save_for_backward(hidden)
        return density, geo

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_density: Tensor, grad_geo: Tensor):
        (hidden,) = ctx.saved_tensors
        grad_hidden = torch.empty(hidden.shape)
        with numba_lock:
            shading_numba.activate_backward(
                flat(hidden), ctx.scale, flat(grad_density), flat(grad_geo), grad_hidden.numpy()
            )
        return grad_hidden, None


@torch.no_grad()
def visible(weights: Float[Tensor, "R S"], order: Int[Tensor, "M"], threshold: float) -> Int[Tensor, "K"]:
    """Which routed samples are given a colour: those that weigh more than the threshold, and the last of a ray through
    which light passes, whose colour is the background's.

    Args:
        weights: rendering weights.
        order: number of each routed sample in the R * S samples of the rays.
        threshold: of the weight.
    """
    if on_cpu(weights):
        kept = torch.empty_like(order)
        with numba_lock:
            count = shading_numba.visible(flat(weights), flat(order), threshold, kept.numpy())
        return kept[:count]
    seen = weights > threshold
    seen[:, -1] |= weights.sum(dim=1) < 1 - threshold
    return torch.nonzero(seen.reshape(-1)[order])[:, 0]


def color_inputs(
    geo: Float[Tensor, "M G"],
    code: Float[Tensor, "R C"],
    appearance: Float[Tensor, "R A"] | None,
    kept: Int[Tensor, "K"],
    ray: Int[Tensor, "K"],
) -> Float[Tensor, "K GCA"]:
    """Inputs of the colour decoder: geometry features, direction code and appearance code of the kept samples.

    Args:
        geo: geometry features of all routed samples.
        code: of the rays' directions.
        appearance: of the rays; None: there is none.
        kept: which routed samples (each once).
        ray: of the kept samples.
    """
    if on_cpu(geo, code, appearance) and not (code.requires_grad and torch.is_grad_enabled()):
        return _ColorInputs.apply(geo, code, code[:, :0] if appearance is None else appearance, kept, ray)
    # index_select: its gradient is faster than that of indexing.
    parts = [geo.index_select(0, kept), code.index_select(0, ray)]
    return torch.cat(parts if appearance is None else [*parts, appearance.index_select(0, ray)], dim=1)


class _ColorInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geo: Tensor, code: Tensor, appearance: Tensor, kept: Tensor, ray: Tensor) -> Tensor:
        out = torch.empty(len(kept), geo.shape[1] + code.shape[1] + appearance.shape[1])
        ctx.arrays, ctx.shapes = (flat(kept), flat(ray)), (geo.shape, appearance.shape)
        with numba_lock:
            shading_numba.color_inputs(flat(geo), flat(code), flat(appearance), *ctx.arrays, out.numpy())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_geo, grad_appearance = (torch.zeros(shape) for shape in ctx.shapes)
        with numba_lock:
            shading_numba.color_inputs_backward(flat(grad), *ctx.arrays, grad_geo.numpy(), grad_appearance.numpy())
        return grad_geo, None, grad_appearance, None, None
