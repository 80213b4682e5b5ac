"""tiny-cuda-nn's grid encoding by its published rule in plain Python, independent of this package, and a stand-in for
its Python bindings that computes by it.

The stand-in has the interface of ``bindings/torch/tinycudann/modules.py`` and ``bindings.cpp``, as read in its
repository.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infnerf_ns.kernels import HashLayout

# -- the published rule, independent of the package --------------------------------------------------------------------


class Level(NamedTuple):
    """One hash level: scale, vertices per axis, entries, first entry."""

    scale: float
    resolution: int
    size: int
    offset: int


class Vertex(NamedTuple):
    """A vertex of a sample's cell: its entry in the level, its weight, the weight's derivative by the position."""

    entry: int
    weight: float
    slope: list[float]


def vertices(position: list[float], level: Level) -> list[Vertex]:
    """The 8 vertices around a local position (Instant-NGP, section 3)."""
    grid = [level.scale * coordinate + 0.5 for coordinate in position]
    cell = [math.floor(coordinate) for coordinate in grid]
    fraction = [coordinate - low for coordinate, low in zip(grid, cell)]
    around = []
    for corner in itertools.product((0, 1), repeat=3):
        x, y, z = (low + up for low, up in zip(cell, corner))
        if level.resolution**3 <= level.size:
            entry = x + level.resolution * y + level.resolution**2 * z
        else:
            entry = x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)
        factors = [part if up else 1 - part for part, up in zip(fraction, corner)]
        slope = [
            level.scale * (1 if corner[axis] else -1) * math.prod(factors[:axis] + factors[axis + 1 :])
            for axis in range(3)
        ]
        around.append(Vertex(entry % level.size, math.prod(factors), slope))
    return around


def level_table(scales: list[float], resolutions: list[int], log2_table_size: int) -> list[Level]:
    """Levels one after the other; sizes are multiples of 8 and at most that of the table."""
    levels, offset = [], 0
    for scale, resolution in zip(scales, resolutions):
        size = min(-(-(resolution**3) // 8) * 8, 2**log2_table_size)
        levels.append(Level(scale, resolution, size, offset))
        offset += size
    return levels


def exact_levels(layout: HashLayout) -> list[Level]:
    """Of a layout; scales that are whole but for rounding count as whole."""
    steps = max(layout.num_levels - 1, 1)
    start = layout.base_resolution if layout.num_levels > 1 else layout.finest_resolution
    growth = (layout.finest_resolution / start) ** (1 / steps)
    scales = [start * growth**level - 1 for level in range(layout.num_levels)]
    scales = [round(scale) if abs(scale - round(scale)) < 1e-9 else scale for scale in scales]
    return level_table(scales, [math.ceil(scale) + 1 for scale in scales], layout.log2_table_size)


def float32_levels(count: int, base: int, growth: float, log2_table_size: int) -> list[Level]:
    """As tiny-cuda-nn computes them, in float32 (``grid_scale`` and ``grid_resolution`` in its headers)."""
    log2_growth = np.log2(np.float32(growth))
    scales = [np.exp2(np.float32(level) * log2_growth) * np.float32(base) - np.float32(1) for level in range(count)]
    assert all(scale.dtype == np.float32 for scale in scales)
    return level_table([float(s) for s in scales], [math.ceil(scale) + 1 for scale in scales], log2_table_size)


# -- a stand-in for tinycudann -----------------------------------------------------------------------------------------

FP32, FP16 = "Precision.Fp32", "Precision.Fp16"
GRANULARITY = 8


class StandInContext(NamedTuple):
    """What a forward pass leaves for the backward pass; ``slopes`` where the input's gradient was prepared."""

    entries: np.ndarray
    weights: np.ndarray
    slopes: np.ndarray | None


class StandInNative:
    """``Module`` of ``bindings.cpp`` for a grid encoding, with its checks of the arguments."""

    def __init__(self, n_input_dims: int, encoding: dict[str, Any], precision: str) -> None:
        assert n_input_dims == 3 and precision == FP32
        expected = {"otype": "Grid", "type": "Hash", "hash": "CoherentPrime", "interpolation": "Linear"}
        assert {key: encoding[key] for key in expected} == expected
        self.features = encoding["n_features_per_level"]
        sizes = (encoding["n_levels"], encoding["base_resolution"], encoding["per_level_scale"])
        self.levels = float32_levels(*sizes, encoding["log2_hashmap_size"])
        self.calls: list[tuple[int, bool]] = []
        """address of the parameters, and whether it was inference"""

    def n_params(self) -> int:
        return (self.levels[-1].offset + self.levels[-1].size) * self.features

    def n_output_dims(self) -> int:
        return len(self.levels) * self.features

    def param_precision(self) -> str:
        return FP32

    def _check(self, batch: int, *tensors: Tensor) -> None:
        assert batch % GRANULARITY == 0
        assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)

    def fwd(self, input: Tensor, params: Tensor) -> tuple[StandInContext | None, Tensor]:
        self._check(len(input), input, params)
        assert input.shape[1] == 3 and params.shape == (self.n_params(),)
        inference = not (input.requires_grad or params.requires_grad)
        self.calls.append((params.data_ptr(), inference))
        around = [
            [[v._replace(entry=v.entry + level.offset) for v in vertices(p, level)] for level in self.levels]
            for p in input.tolist()
        ]
        entries = np.array([[[v.entry for v in level] for level in sample] for sample in around])
        weights = np.array([[[v.weight for v in level] for level in sample] for sample in around])
        table = params.detach().numpy().reshape(-1, self.features)
        out = np.einsum("plc,plcf->plf", weights, table[entries]).reshape(len(input), -1)
        if inference:
            return None, torch.from_numpy(out.astype(np.float32))
        slopes = np.array([[[v.slope for v in level] for level in sample] for sample in around])
        context = StandInContext(entries, weights, slopes if input.requires_grad else None)
        return context, torch.from_numpy(out.astype(np.float32))

    def bwd(
        self, ctx: StandInContext, input: Tensor, params: Tensor, output: Tensor, dL_doutput: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(ctx, StandInContext), "fwd ran in inference mode"
        self._check(len(input), input, params, output, dL_doutput)
        assert output.shape == dL_doutput.shape == (len(input), self.n_output_dims())
        upstream = dL_doutput.detach().numpy().reshape(len(input), len(self.levels), self.features)
        table = params.detach().numpy().reshape(-1, self.features)
        to_input = to_params = None
        if input.requires_grad:
            assert ctx.slopes is not None, "fwd did not prepare the gradient of the input"
            moved = np.einsum("plcd,plcf,plf->pd", ctx.slopes, table[ctx.entries], upstream)
            to_input = torch.from_numpy(moved.astype(np.float32))
        if params.requires_grad:
            total = np.zeros(table.shape)
            np.add.at(total, ctx.entries, ctx.weights[..., None] * upstream[:, :, None])
            to_params = torch.from_numpy(total.astype(np.float32).reshape(-1))
        return to_input, to_params


def stand_in(native: type[StandInNative] = StandInNative) -> ModuleType:
    """A package like tinycudann; ``made`` lists its native encodings."""
    package, modules = ModuleType("tinycudann"), ModuleType("tinycudann.modules")
    made: list[StandInNative] = []

    def create_encoding(n_input_dims: int, encoding: dict[str, Any], requested_precision: str) -> StandInNative:
        made.append(native(n_input_dims, encoding, requested_precision))
        return made[-1]

    class Encoding(torch.nn.Module):
        def __init__(self, n_input_dims: int, encoding_config: dict, seed: int = 1337, dtype: Any = None) -> None:
            super().__init__()
            precision = {torch.float32: FP32, torch.float16: FP16, None: FP16}[dtype]
            self.native_tcnn_module = modules._C.create_encoding(n_input_dims, encoding_config, precision)
            self.params = torch.nn.Parameter(torch.zeros(self.native_tcnn_module.n_params()))
            self.loss_scale = 128.0 if precision == FP16 else 1.0

    modules._C = SimpleNamespace(batch_size_granularity=lambda: GRANULARITY, create_encoding=create_encoding)
    package.modules, package.Encoding, package.made = modules, Encoding, made
    return package
