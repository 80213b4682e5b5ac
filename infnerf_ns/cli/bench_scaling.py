"""``infnerf-bench scaling``: step time and memory while the demo town grows.

Every town has its own cameras, SfM points and the tree that the preset builds from them; a step trains on the same
number of rays in all of them. A town is measured beside the first one: two fresh processes take turns of a few dozen
steps, only one at a time, so that a machine that gets faster and slower over minutes does so for both, and the ratio is
the median of the ratios of neighbouring turns. A step is the drawing of its rays, forward, losses, backward and
optimizers; a turn holds every 4th step that trains the proposals and every 32nd that has the tree losses, as training
does. Before the clock runs all octree levels have started, the schedules of the first thousand steps are over, and the
samples lie on the surfaces of the town (:func:`.bench_training.depth_loss`): a town that is not learnt yet is fog, in
which samples stay in coarse nodes and steps are cheaper than they will be, the more so the larger the town. And every
page of memory has been written once, which a long training has behind it.

Memory of the tree: *parameters*; *training state*: the same with gradient and two moments, as an address range;
*resident*: what of it the warm-up has written; *peak*: of the whole process, with Python and torch. The photos, which
training holds in memory, are not made here (:mod:`.bench_town`); what they would take is in the table. Memory touched
by a step: :mod:`.bench_touched`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from infnerf_ns.cli.bench_machine import describe_machine
from infnerf_ns.cli.bench_output import table_and_plot, write_table
from infnerf_ns.cli.bench_town import Town, survey_town
from infnerf_ns.cli.bench_training import Training, TrainingProcess, in_process
from infnerf_ns.cli.command import Command
from infnerf_ns.data.demo_dataparser import MAX_SIZE
from infnerf_ns.errors import InputError
from infnerf_ns.pages import PageLayout
from infnerf_ns.presets import load_preset
from infnerf_ns.training.trainer import InfNeRFTrainerConfig
from infnerf_ns.tree_building import build_tree
from infnerf_ns.validation import Range, require_valid

_TURN = 32
"""Steps per turn: one round of all schedules."""
_PROCESS_BYTES = 1 << 30
"""What a process needs beside the tree."""
_MIB = 2**20


@dataclass
class Scaling(Command):
    """Step time, memory and nodes while the demo town grows."""

    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Blocks per side of the towns; the first is what the others are compared with."""
    rays: Annotated[int, Range(high=1 << 20)] = 1024
    """Rays per step, the same for all towns."""
    steps: Annotated[int, Range(high=10_000_000)] = 320
    """Timed steps per town, in turns of at most 32."""
    warm_up: Annotated[int, Range(high=10_000_000)] = 450
    """Untimed steps before, in which the levels start and the samples are taught where the surfaces are."""
    preset: str = "infnerf-big"
    """A preset, or a YAML file. The tree of a large town is deep: infnerf-big alone allows for 8 levels."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of the towns."""
    output: Path = Path("scaling")
    """Table and plot: this name with .csv and .png."""

    def main(self) -> None:
        """Builds the towns, trains in each, prints two tables, writes them and a plot."""
        self._check()
        require_valid(self)
        config = load_preset(self.preset, "cpu")
        print(describe_machine())
        print(f"{self.preset}, {self.rays} rays per step, {self.steps} steps after {self.warm_up}", flush=True)
        table, plot = table_and_plot(self.output)
        towns: list[Town] = []
        for size in self.sizes:
            batches = self.warm_up + self.steps
            towns.append(survey_town(size, self.seed, config.pipeline.datamanager, self.rays, batches))
            self._require_memory(config, towns)
        rows: list[dict] = []
        for town in towns[1:]:
            first, other = self._measure(towns[0], town)
            rows += [other] if rows else [first, other]
            print(_line(rows[-1]), flush=True)
            write_table(rows, table)
        _print_tables(rows, self.rays)
        _plot(rows, plot, f"{self.preset}, {self.rays} rays per step")
        print(f"infnerf: wrote {table} and {plot}")

    def _check(self) -> None:
        sizes = self.sizes
        if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > MAX_SIZE:
            raise InputError(f"--sizes {' '.join(map(str, sizes))}: give two or more rising numbers, 1 to {MAX_SIZE}")
        for name, least in (("rays", 1), ("steps", 1), ("warm_up", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {least} or more")

    def _require_memory(self, config: InfNeRFTrainerConfig, towns: list[Town]) -> None:
        """One line if the newest town and the first one cannot be trained beside each other."""
        pair = towns[:1] + towns[1:][-1:]
        needed = sum(sum(tree_bytes(config, town)) + _PROCESS_BYTES for town in pair) / 2**30
        free = psutil.virtual_memory().available / 2**30
        if needed > free:
            raise InputError(
                f"--sizes {' '.join(map(str, self.sizes))}: the towns of {' and '.join(str(t.size) for t in pair)}"
                f" blocks per side need {needed:.1f} GiB at once, but only {free:.1f} GiB of memory are free: leave out"
                " the largest, or give a preset whose tables are smaller (--preset infnerf-small)"
            )

    def _measure(self, first: Town, other: Town) -> tuple[dict, dict]:
        """A row for each of two towns that take turns."""
        turns = -(-self.steps // _TURN)
        length = self.steps // turns
        title = f"towns of {first.size} and {other.size} blocks per side"
        processes = (in_process(town, self.preset, self.warm_up) for town in (first, other))
        with next(processes) as a, next(processes) as b:
            for training in (a, b):
                training.warm_up()
            times: dict[TrainingProcess, list[float]] = {a: [], b: []}
            for turn in track(range(turns), title, transient=True):
                for training in (a, b) if turn % 2 else (b, a):
                    times[training].append(float(np.mean(training.train(length))))
            ratios = np.array(times[b]) / np.array(times[a])
            return (
                _row(first, a, times[a], times[a], np.ones(turns), first),
                _row(other, b, times[b], times[a], ratios, first),
            )


def tree_bytes(config: InfNeRFTrainerConfig, town: Town) -> list[int]:
    """Bytes per level that training keeps of a town's tree."""
    model = config.pipeline.model
    octree = build_tree(town.scene, model.octree)
    return PageLayout(model.field, octree.node_resolution, model.octree.max_level).memory_bytes(octree)


def _row(
    town: Town, training: Training, times: list[float], first_times: list[float], ratios: np.ndarray, first: Town
) -> dict:
    """What is known about a town after its turns; times are mean seconds per step of each turn."""
    memory, touched = training.memory(), training.touched()
    low, middle, high = 1e3 * np.percentile(times, [10, 50, 90])
    ratio_low, ratio, ratio_high = np.percentile(ratios, [10, 50, 90])
    return {
        "size": town.size,
        "area": (town.size / first.size) ** 2,
        "photos": len(town.cameras),
        "points": len(town.scene.points),
        "nodes": memory.nodes,
        "nodes_per_level": "/".join(map(str, memory.nodes_per_level)),
        "parameters_mib": round(memory.parameters / _MIB, 3),
        "training_state_mib": round(memory.state / _MIB, 3),
        "resident_mib": round(memory.resident / _MIB, 3),
        "peak_mib": round(memory.peak / _MIB, 3),
        "photos_mib": round(memory.photos / _MIB, 3),
        "touched_nodes": round(float(np.mean([each.nodes for each in touched])), 1),
        "levels_per_sample": round(float(np.mean([each.levels_per_sample for each in touched])), 2),
        "touched_mib": round(float(np.mean([each.bytes for each in touched])) / _MIB, 3),
        "ms": round(middle, 2),
        "ms_10": round(low, 2),
        "ms_90": round(high, 2),
        "first_ms": round(1e3 * float(np.median(first_times)), 2),
        "ratio": round(ratio, 3),
        "ratio_10": round(ratio_low, 3),
        "ratio_90": round(ratio_high, 3),
    }


def _line(row: dict) -> str:
    return (
        f"area x{row['area']:g}: {row['nodes']} nodes, {row['ms']} ms per step beside {row['first_ms']} ms of the"
        f" first town, ratio {row['ratio']}"
    )


def _print_tables(rows: list[dict], rays: int) -> None:
    town = Table(title="towns, and the memory of their trees, peak of the process, and photos (not loaded) in MiB")
    for name in ("area", "photos", "points", "nodes", "per level", "parameters", "state", "resident", "peak",
                 "photos"):  # fmt: skip
        town.add_column(name, justify="right", overflow="fold")
    step = Table(title=f"touched by a training step of {rays} rays, and its time (10 % to 90 % of the turns)")
    for name in ("area", "nodes", "levels/sample", "MiB", "ms", "ms of the first", "ratio"):
        step.add_column(name, justify="right", overflow="fold")
    for row in rows:
        area = f"x{row['area']:g}"
        town.add_row(area, *(f"{row[name]:,}" for name in ("photos", "points", "nodes")), row["nodes_per_level"],
                     *(f"{row[name + '_mib']:,.0f}" for name in ("parameters", "training_state", "resident", "peak",
                                                                 "photos")))  # fmt: skip
        step.add_row(
            area,
            f"{row['touched_nodes']:g}",
            f"{row['levels_per_sample']:g}",
            f"{row['touched_mib']:g}",
            f"{row['ms']:.1f} ({row['ms_10']:.1f} to {row['ms_90']:.1f})",
            f"{row['first_ms']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_10']:.2f} to {row['ratio_90']:.2f})",
        )
    for table in (town, step):
        Console(width=120).print(table)


def _plot(rows: list[dict], path: Path, title: str) -> None:
    """Step time relative to the first town's, and memory, both over the area."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    area = [row["area"] for row in rows]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    ratio = np.array([[row["ratio"], row["ratio_10"], row["ratio_90"]] for row in rows]).T
    time.errorbar(area, ratio[0], np.abs(ratio[1:] - ratio[0]), fmt="o-", capsize=3, label="step time")
    time.set(ylabel=f"relative to the first town ({rows[0]['ms']:.0f} ms)", ylim=(0, 1.25 * max(1.2, ratio[2].max())))
    for name, label in (
        ("training_state_mib", "training state of the tree"),
        ("resident_mib", "of that written in the warm-up"),
        ("touched_mib", "touched by a step"),
    ):
        memory.plot(area, [row[name] for row in rows], "o-", label=label)
    memory.set(ylabel="MiB", yscale="log")
    for axis in (time, memory):
        axis.set(xscale="log", xlabel="area of the town, relative")
        axis.set_xticks(area, [f"x{each:g}\n{row['nodes']} nodes" for each, row in zip(area, rows)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
