"""A tree that starts from its root and grows, with the real commands: also when it is killed in the middle of a round,
packed, and evaluated; and a training with every loss there is."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import Running, Trained, run_all
from results import losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infnerf_ns.objective import NAMES
from infnerf_ns.torch_compat import allow_numpy_scalars
from infnerf_ns.training.checkpoints import list_checkpoints, read_checkpoint

allow_numpy_scalars()
pytestmark = pytest.mark.slow

STEPS, EVERY = 400, 60
GROWTH = {
    "max-num-iterations": STEPS,
    "pipeline.model.octree.start": "root",
    "pipeline.model.growth.every": EVERY,
    "pipeline.model.growth.start-step": EVERY,
    "pipeline.model.growth.min-rays": 1.0,
    "pipeline.model.growth.prune-rays": 0.3,
    "pipeline.model.growth.grace-rounds": 1,
    "pipeline.model.growth.max-nodes": 40,
    "pipeline.model.losses.multi-scale": 0.1,
}
KILLED_IN_ROUND = """
import os, signal, sys
from infnerf_ns.training import growth
start, rounds = growth.start_children, []
def start_children(*arguments):
    rounds.append(1)
    if len(rounds) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start(*arguments)
growth.start_children = start_children
from nerfstudio.scripts.train import entrypoint
sys.argv[0] = "ns-train"
entrypoint()
"""
"""ns-train that is killed in its second round with births: banks and optimizers have changed, pages are not filled."""


@dataclass
class Grown:
    whole: Path
    killed: Path
    resumed: Path
    printed: str
    trained: Trained


@pytest.fixture(scope="module")
def grown(trained: Trained) -> Grown:
    place = trained.workplace
    flags = [part for key, value in GROWTH.items() for part in (f"--{key}", value)]
    whole = Running(place.train("grown", *flags), place.logs / "grown")
    killed = Running(
        ["python", "-c", KILLED_IN_ROUND, *place.train("grown-killed", *flags)[1:]], place.logs / "grown-killed"
    )
    assert killed.wait().code == -signal.SIGKILL
    folders = {name: place.run_folder(name) for name in ("grown", "grown-killed", "grown-resumed")}
    again = place.train("grown-resumed", *flags, "--load-dir", folders["grown-killed"])
    Running(again, place.logs / "grown-resumed").wait().succeeded()
    return Grown(*folders.values(), whole.wait().succeeded().out, trained)


def _model(run: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(list_checkpoints(run / "nerfstudio_models")[0])
    assert state is not None
    return {name.removeprefix("_model."): value for name, value in state["pipeline"].items()}


def test_the_tree_has_grown_within_its_budget(grown: Grown) -> None:
    model = _model(grown.whole)
    nodes = len(model["field.tree_level"])
    assert 8 < nodes <= 40 and int(model["field.tree_level"].max()) == 2
    steps, counts, births, deaths = model["growth.history"].unbind(dim=1)
    assert steps[:, 0].tolist() == [EVERY * number - 1 for number in range(1, 5)], "none after 0.7 of the training"
    assert torch.equal(counts, 1 * (torch.arange(counts.shape[1]) == 0) + (births - deaths).cumsum(0))
    assert int(counts[-1].sum()) == nodes
    assert grown.printed.count("nodes were born and") == 4


def test_a_run_killed_in_a_round_goes_on_as_if_it_had_not_been(grown: Grown) -> None:
    whole, resumed = losses(grown.whole), losses(grown.resumed)
    first = min(resumed)
    assert 2 * EVERY < first < 3 * EVERY and sorted(resumed) == list(range(first, STEPS))
    assert resumed == {step: whole[step] for step in resumed}
    theirs, mine = _model(grown.whole), _model(grown.resumed)
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)


def test_pictures_and_counts_reach_tensorboard(grown: Grown) -> None:
    (file,) = grown.whole.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    images = {name.rpartition("/")[2] for name in events.Tags()["images"]}
    assert {"error", "levels", "octree", "sampling", "tree_history"} <= images
    scalars = {name.rpartition("/")[2] for name in events.Tags()["scalars"]}
    assert {"nodes_level_0", "nodes_level_2", "weight_multi_scale", "multi_scale_loss"} <= scalars


def test_a_grown_run_is_packed_and_evaluated(grown: Grown) -> None:
    place = grown.trained.workplace
    Running(["infnerf-pack", grown.whole], place.logs / "grown-pack").wait().succeeded()
    packed = grown.whole.with_name(grown.whole.name + "-packed")
    files = {name: place.folder / f"grown-{name}.json" for name in ("whole", "packed")}
    configs = {"whole": grown.whole / "config.yml", "packed": packed / "config.yml"}
    evaluations = {
        name: ["ns-eval", "--load-config", configs[name], "--output-path", file] for name, file in files.items()
    }
    for command in run_all(evaluations, place.logs).values():
        command.succeeded()
    results = [json.loads(file.read_text())["results"] for file in files.values()]
    assert results[0]["psnr"] > 12
    for name in ("psnr", "ssim", "psnr_1", "psnr_1/4"):
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-4), name


def test_every_loss_from_the_command_line(trained: Trained) -> None:
    place = trained.workplace
    names = [name for name in NAMES if name != "lpips"]  # its network's weights are not on a test machine
    weights = [part for name in names for part in (f"--pipeline.model.losses.{name.replace('_', '-')}", "0.001")]
    constant = [
        part for name in names for part in (f"--pipeline.model.losses.schedules.{name.replace('_', '-')}", "constant")
    ]
    patches = ["--pipeline.datamanager.patch-size", 8, "--pipeline.datamanager.patch-share", 0.5]
    short = [
        "--max-num-iterations",
        70,
        "--pipeline.model.losses.tree-every",
        8,
        "--pipeline.model.losses.cut-every",
        8,
    ]
    command = place.train("losses", *weights, *constant, *patches, *short, "--pipeline.model.losses.balance", "True")
    Running([*command, "--depth", "True"], place.logs / "losses").wait().succeeded()
    (file,) = place.run_folder("losses").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    for name in [*names, "rgb", "discriminator"]:
        values = [event.value for event in events.Scalars(f"Train Loss Dict/{name}_loss")]
        assert values and all(math.isfinite(value) for value in values), name
    assert len(events.Scalars("Train Metrics Dict/weight_ssim")) > 50
