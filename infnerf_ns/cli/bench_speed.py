"""``infnerf-bench speed``: training steps, rendering, and the CPU kernels against what this machine can do, measured in
the same run.

The hash grids are compared with a probe of the same access pattern: it reads, and for the backward pass adds to, the
entries that the kernel visits, whose numbers it is given; what the kernel takes longer is arithmetic and bookkeeping.
The decoders are compared with torch's matrix product. Sizes are those of a training step of the default model on 1,024
rays. The rays of the whole step and of the rendering are random and so is the field, which gives every sample a colour:
what a capture does is told by ``infnerf-bench quality``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import numba as nb
import numpy as np
import torch

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_trainer import StepTrainer, full_tree, random_rays
from infnerf_ns.cli.command import Command
from infnerf_ns.field import FieldConfig
from infnerf_ns.kernels import (
    Groups,
    HashLayout,
    TreePaths,
    enable_bank_gradient,
    grouped_mlp,
    mlp_page_size,
    path_features,
    path_sum,
)
from infnerf_ns.kernels.corners_numba import AHEAD, CHUNK, prefetch
from infnerf_ns.octree import Octree, RootCube, build_octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.sampler import SamplerConfig
from infnerf_ns.validation import Range, require_valid


@dataclass
class Speed(Command):
    """Rays per second of training and rendering; samples per second of the CPU kernels, and their share of the
    machine's matrix product and memory access."""

    rays: Annotated[int, Range(1, 1 << 20)] = 1024
    """Rays per step."""
    repeats: Annotated[int, Range(1, 1_000_000)] = 20
    """Runs of each kernel; the median counts."""

    def main(self) -> None:
        """Prints a row for training, rendering and each kernel."""
        require_valid(self)
        torch.manual_seed(0)
        trainer = full_tree(1)
        print(describe_machine())
        peak = self._matmul_peak()
        print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; copy: {self._copy_bandwidth() / 1e9:.1f} GB/s")
        print(f"{'':38s} {'ms (10 % to 90 %)':>22s} {'per second':>12s}   of the machine")
        self._whole(trainer)
        self._grids()
        self._decoders(peak)

    def _times(self, run: Callable[[], object]) -> np.ndarray:
        run()  # compiles
        times = []
        for _ in range(self.repeats):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        return np.array(times)

    def _row(self, name: str, times: np.ndarray, samples: int, share: str) -> None:
        low, middle, high = 1e3 * np.percentile(times, [10, 50, 90])
        print(f"{name:38s} {middle:8.2f} ({low:.2f} to {high:.2f}) {1e3 * samples / middle:12,.0f}   {share}")

    def _matmul_peak(self) -> float:
        a = torch.randn(1024, 1024)
        return 2 * 1024**3 / float(np.median(self._times(lambda: a @ a)))

    def _copy_bandwidth(self) -> float:
        source = torch.zeros(1 << 26)
        target = torch.zeros_like(source)
        return 2 * 4 * len(source) / float(np.median(self._times(lambda: target.copy_(source))))

    def _whole(self, trainer: StepTrainer) -> None:
        """A training step with and without an update of the proposals, and the rendering of an image's chunk."""
        model, config = trainer.model, trainer.model.config
        every, settled = config.sampler.proposal_update_every, config.sampler.proposal_warmup
        for name, step in (("training step, proposals too", settled * every), ("training step", settled * every + 1)):
            rays, batch = random_rays(step, self.rays)
            times = self._times(lambda step=step, rays=rays, batch=batch: trainer.step(step, rays, batch))
            self._row(name, times, self.rays, "rays")
        model.eval()
        rays, _ = random_rays(0, config.eval_num_rays_per_chunk)
        with torch.no_grad():
            self._row("rendering, with normals", self._times(lambda: model(rays)), len(rays), "rays")
            config.render_normals = False
            self._row("rendering", self._times(lambda: model(rays)), len(rays), "rays")

    def _grids(self) -> None:
        config, sampler = FieldConfig(), SamplerConfig()
        cube = RootCube(torch.zeros(3), 2.0, torch.eye(3))
        points = torch.rand(4000, 3) * 2 - 1
        tree = build_octree(points, torch.zeros(4000), cube, max_level=1, min_points=32, node_resolution=256)
        layouts = PageLayout(config, tree.node_resolution, 1)
        width = sum(layout.num_outputs for layout in layouts.grids)
        samples, proposals = self.rays * sampler.samples, self.rays * sum(sampler.proposal_samples)
        radii = torch.full((samples,), cube.side / (4 * tree.node_resolution))
        intervals = cube.side / 50 * 2 ** (4 * torch.rand(proposals) - 2)
        cells, cells_of_proposals = (
            [(cube.side / layout.scales).astype(np.float32) for layout in kind]
            for kind in (layouts.grids, layouts.proposals)
        )
        self._grid_rows(
            "grids of the field",
            tree,
            layouts.grids,
            samples,
            lambda paths, banks: path_features(paths, [0, 0], radii, cells, banks, layouts.grids, width),
        )
        self._grid_rows(
            "grids of the proposals",
            tree,
            layouts.proposals,
            proposals,
            lambda paths, banks: path_sum(paths, intervals, cells_of_proposals, banks, layouts.proposals),
        )

    def _grid_rows(
        self, name: str, tree: Octree, grids: list[HashLayout], count: int, encode: Callable[..., torch.Tensor]
    ) -> None:
        unit = torch.rand(count, 3)
        path = tree.route(unit, None)
        order = torch.argsort(path.max(dim=1).values)
        paths = TreePaths(unit[order], path[order], tree.coords, tree.first_of_level.tolist())
        sizes = zip(tree.nodes_per_level, grids)
        banks = [torch.nn.Parameter(torch.randn(nodes, layout.page_size)) for nodes, layout in sizes]
        for bank in banks:
            enable_bank_gradient(bank)

        def both() -> None:
            out = encode(paths, banks)
            out.backward(torch.ones_like(out))

        probe_forward, probe_both = self._probe(count, banks, grids)
        with torch.no_grad():
            times = self._times(lambda: encode(paths, banks))
        self._row(f"{name}, forward", times, count, _of_probe(probe_forward, times))
        times = self._times(both)
        self._row(f"{name}, forward and backward", times, count, _of_probe(probe_both, times))

    def _probe(
        self, count: int, banks: list[torch.nn.Parameter], grids: list[HashLayout]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Times of the accesses alone: reads; reads and additions. Of a cell's corners two and two lie side by side."""
        parts = []
        for bank, layout in zip(banks, grids):
            first = [np.random.randint(0, size - 1, (count, 4)) + at for size, at in zip(layout.sizes, layout.offsets)]
            entries = np.stack(first)[..., None] + np.arange(2)
            page = np.random.randint(0, len(bank), (1, count, 1)) * layout.page_size
            index = entries.reshape(len(first), count, 8) * layout.features + page
            values = bank.detach().numpy().reshape(1, -1)
            gradients = np.zeros_like(values)
            parts.append((values, gradients, index, (0,) * layout.features))
        out = np.zeros(count, np.float32)

        def read() -> None:
            for values, _, index, features in parts:
                _probe_read(values, index, out, features)

        def both() -> None:
            read()
            for _, gradients, index, features in parts:
                _probe_add(gradients, index, features)

        return self._times(read), self._times(both)

    def _decoders(self, peak: float) -> None:
        layouts = PageLayout(FieldConfig(), 256, 1)
        self._decoder_rows("density decoders", layouts.density_widths, peak)
        self._decoder_rows("colour decoders", layouts.color_widths, peak)

    def _decoder_rows(self, name: str, widths: tuple[int, ...], peak: float) -> None:
        count, nodes = self.rays * SamplerConfig().samples, 9
        starts, rows = torch.linspace(0, count, nodes + 1).long(), torch.arange(nodes)
        groups = Groups(starts, torch.zeros_like(rows), rows, torch.full_like(rows, widths[0]))
        bank = torch.nn.Parameter(0.1 * torch.randn(nodes, mlp_page_size(widths)))
        enable_bank_gradient(bank)
        inputs = torch.randn(count, widths[0], requires_grad=True)

        def both() -> None:
            out = grouped_mlp(inputs, groups, [bank], 0, widths)
            out.backward(torch.ones_like(out))

        operations = 2 * count * mlp_page_size(widths)
        with torch.no_grad():
            times = self._times(lambda: grouped_mlp(inputs, groups, [bank], 0, widths))
        self._row(f"{name}, forward", times, count, _of_peak(operations, times, peak))
        times = self._times(both)  # backward: the hidden activations again, and two products per layer
        operations = 4 * operations - 2 * count * widths[-2] * widths[-1]
        self._row(f"{name}, forward and backward", times, count, _of_peak(operations, times, peak))


def _of_probe(probe: np.ndarray, times: np.ndarray) -> str:
    return f"{100 * np.median(probe) / np.median(times):.0f} % of the accesses alone"


def _of_peak(operations: int, times: np.ndarray, peak: float) -> str:
    rate = operations / np.median(times)
    return f"{rate / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} % of the matrix product"


@nb.njit(inline="always")
def _request(values, entries):
    """The probe asks ahead as the kernels do."""
    for corner in range(8):
        prefetch(values, np.uintp(0), np.uintp(entries[corner]))


@nb.njit(parallel=True, fastmath=True, boundscheck=False)
def _probe_read(values, index, out, feature_axis):
    count = index.shape[1]
    for chunk in nb.prange((count + CHUNK - 1) // CHUNK):
        stop = min(count, (chunk + 1) * CHUNK)
        for level in range(index.shape[0]):
            for p in range(chunk * CHUNK, stop):
                if p + AHEAD < stop:
                    _request(values, index[level, p + AHEAD])
                total = np.float32(0)
                for corner in range(8):
                    entry = np.uintp(index[level, p, corner])
                    for f in range(len(feature_axis)):
                        total += values[0, entry + np.uintp(f)]
                out[p] = total


@nb.njit(parallel=True, fastmath=True, boundscheck=False)
def _probe_add(gradients, index, feature_axis):
    for level in nb.prange(index.shape[0]):
        for p in range(index.shape[1]):
            if p + AHEAD < index.shape[1]:
                _request(gradients, index[level, p + AHEAD])
            for corner in range(8):
                entry = np.uintp(index[level, p, corner])
                for f in range(len(feature_axis)):
                    gradients[0, entry + np.uintp(f)] += np.float32(1)
