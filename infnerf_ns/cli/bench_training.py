"""A training on a town that waits for orders, alone in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import pickle
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infnerf_ns.cli.bench_touched import Touched, touched_by_step
from infnerf_ns.cli.bench_town import Town, TownRays
from infnerf_ns.cli.bench_trainer import StepTrainer
from infnerf_ns.errors import InputError
from infnerf_ns.kernels import bank_gradient
from infnerf_ns.presets import load_preset

_COUNTED_STEPS = 8
_DEPTH_TOLERANCE = 0.03
_DEPTH_WEIGHT = 0.1


@dataclass
class Memory:
    """Nodes, and sizes in bytes."""

    nodes: int
    """in the tree"""
    nodes_per_level: list[int]
    """root first"""
    parameters: int
    """of the tree"""
    state: int
    """parameters, gradients, both moments and the flags of what was touched"""
    resident: int
    """of the state, after the warm-up; -1 where the system does not tell"""
    peak: int
    """largest resident size of the process"""
    photos: int
    """of the pyramids of the photos, which are not there"""


class Training:
    """A town's tree and its training.

    Args:
        town: what to train on.
        preset: name of a preset, or a YAML file.
        warm_up: steps over which the octree levels start one after the other, as in a training, only faster, and in
            which the density is told where the town is (:func:`depth_loss`).
    """

    def __init__(self, town: Town, preset: str, warm_up: int) -> None:
        config = load_preset(preset, "cpu")
        octree = config.pipeline.model.octree
        octree.level_start_steps = warm_up // (octree.max_level + 1)
        self._town, self._rays = town, TownRays(town.cameras, config.pipeline.datamanager)
        self._trainer = StepTrainer(config.pipeline.model, town.scene, len(town.cameras), config.optimizers)
        self._warm_up, self._batch = warm_up, 0
        sampler, losses = config.pipeline.model.sampler, config.pipeline.model.losses
        cycle = int(np.lcm(sampler.proposal_update_every, losses.tree_every))
        settled = max(sampler.proposal_warmup, sampler.anneal_steps, warm_up)
        self._step = -(-settled // cycle) * cycle
        self._updates_proposals = self._trainer.model.sampler.updates_proposals
        self._tree_every = losses.tree_every
        self._resident = -1

    def warm_up(self) -> None:
        """Steps from the beginning of the schedules until all levels have started and the samples lie where those of a
        long training lie; then every page of the state is written once.

        The system fills a page when it is first written. A long training writes each once; of a large town most would
        be written for the first time in the few steps that are timed.
        """
        for step in range(self._warm_up):
            self._trainer.step(step, *self._next_batch(), depth_loss)
        state = self._state()
        self._resident = resident_bytes(state)
        for tensor in state:
            tensor.view(-1)[:: resource.getpagesize() // tensor.element_size()].add_(0)

    def train(self, count: int) -> list[float]:
        """Seconds of each of ``count`` steps after the schedules of the beginning, drawing of the rays included."""
        times = []
        for _ in range(count):
            start = perf_counter()
            self._trainer.step(self._step, *self._next_batch())
            times.append(perf_counter() - start)
            self._step += 1
        return times

    def touched(self) -> list[Touched]:
        """What a few steps that train the proposals touch."""
        steps = (step for step in range(self._step, sys.maxsize) if self._updates_proposals(step))
        plain = (step for step in steps if step % self._tree_every)
        return [
            touched_by_step(self._trainer, step, *self._next_batch()) for step, _ in zip(plain, range(_COUNTED_STEPS))
        ]

    def memory(self) -> Memory:
        """Of the tree and of this process, as it is now."""
        tree = self._trainer.model.field
        return Memory(
            tree.octree.num_nodes,
            tree.octree.nodes_per_level,
            sum(map(_bytes, self._parameters())),
            sum(map(_bytes, self._state())),
            self._resident,
            peak_bytes(),
            _bytes(self._rays.pyramid.pixels),
        )

    def _parameters(self) -> list[Tensor]:
        tree = self._trainer.model.field
        return [bank for bank in (*tree.grids, *tree.decoders, *tree.proposals) if len(bank)]

    def _state(self) -> list[Tensor]:
        """Parameters, gradients with their flags, and moments, as far as there are any."""
        parameters = self._parameters()
        state: list[Tensor] = [bank.detach() for bank in parameters]
        for bank in parameters:
            held = bank_gradient(bank)
            state += [] if held is None else [held.grad, held.touched]
        for optimizer in self._trainer.optimizers:
            for bank, moments in optimizer.state.items():
                if any(bank is parameter for parameter in parameters):
                    state += [moments["exp_avg"], moments["exp_avg_sq"]]
        return state

    def _next_batch(self):  # noqa: ANN202
        self._batch += 1
        return self._rays(self._town, self._batch - 1)


def depth_loss(outputs: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    """Asks all rounds of samples to put their weight at the depth of the ray.

    What a step touches and how long it takes depends on where its samples lie. A training finds that out in tens of
    thousands of steps, and later in a larger town; after a few hundred it would be fog that is measured.
    """
    depth = batch["depth"][:, None]
    loss = torch.zeros(())
    for weights, samples in zip(outputs["weights_list"], outputs["ray_samples_list"]):
        starts, ends = samples.frustums.starts[..., 0], samples.frustums.ends[..., 0]
        there = (starts < (1 + _DEPTH_TOLERANCE) * depth) & (ends > (1 - _DEPTH_TOLERANCE) * depth)
        share = (weights[..., 0] * there).sum(dim=1)[torch.isfinite(depth[:, 0])]
        loss = loss - torch.log(share + 1e-3).mean()
    return _DEPTH_WEIGHT * loss


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident_bytes(tensors: list[Tensor]) -> int:
    """How much of these tensors is in memory: pages that were never written are not. -1 where the system (Linux) does
    not tell."""
    if not sys.platform.startswith("linux"):
        return -1
    libc, page = ctypes.CDLL(None, use_errno=True), resource.getpagesize()
    total = 0
    for tensor in tensors:
        first = tensor.data_ptr() // page * page
        length = tensor.data_ptr() + _bytes(tensor) - first
        pages = np.zeros(-(-length // page), np.uint8)
        address = (ctypes.c_void_p(first), ctypes.c_size_t(length), pages.ctypes.data_as(ctypes.c_void_p))
        if libc.mincore(*address) != 0:
            return -1
        total += min(int((pages & 1).sum()) * page, _bytes(tensor))
    return total


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin with the peak of the parent
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class TrainingProcess:
    """:class:`Training` in another process: the same methods, which wait for their answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self.answer()

    def answer(self) -> Any:
        """The next answer; raises what the other process raised."""
        try:
            good, answer = self._connection.recv()
        except EOFError as error:
            raise InputError("a training process was ended: too little memory? leave out the largest town") from error
        if good:
            return answer
        raise answer if isinstance(answer, InputError) else RuntimeError(answer)


@contextmanager
def in_process(town: Town, preset: str, warm_up: int) -> Iterator[TrainingProcess]:
    """A :class:`Training` in a fresh process, which ends with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not end the waiting
    try:
        ours.send_bytes(pickle.dumps((town, preset, warm_up)))
        training = TrainingProcess(ours)
        training.answer()
        yield training
    finally:
        ours.close()
        process.join(10)
        process.kill()
        process.join()


def _serve(connection: Connection) -> None:
    """Answers until the other end closes."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the tree's table
            training = Training(*pickle.loads(connection.recv_bytes()))
            connection.send((True, None))
            while True:
                name, arguments = connection.recv()
                connection.send((True, getattr(training, name)(*arguments)))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except InputError as error:
        connection.send((False, error))
    except Exception:
        connection.send((False, traceback.format_exc()))
