"""A checkpoint in which one thing was changed is refused in one line, wherever it is loaded, or trained with as it is.

Regression: infnerf-ortho ended in SIGSEGV by indices of a tree, a resumed training in SIGABRT by a level-2 node under
the root and in SIGSEGV by moments of another shape; a level of 2**31 took 15 GB.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_config, tiny_model
from tiny_packed import tiny_run
from torch import Tensor

from infnerf_ns.cli.pack import pack_run
from infnerf_ns.cli.runs import newest_checkpoint
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.state_validation import octree_from_state, require_optimizer_state, require_plain
from infnerf_ns.training.optimizer import NodeAdam

State = dict[str, Any]


def _set(name: str, index: Any, value: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name].clone()
        state[name][index] = value

    return change


def _put(name: str, make: Callable[[Tensor], Any]) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = make(state[name])

    return change


def _swap_levels(state: State) -> None:
    for name in ("tree_level", "tree_coords", "tree_parent"):
        state[f"field.{name}"] = state[f"field.{name}"].flip(0)


def _cycle(state: State) -> None:
    """Two nodes of level 1 are each other's parents."""
    state["field.tree_parent"] = state["field.tree_parent"].clone()
    state["field.tree_parent"][1:3] = torch.tensor([2, 1])


def _twins(state: State) -> None:
    for name in ("tree_coords", "tree_parent"):
        state[f"field.{name}"] = state[f"field.{name}"].clone()
        state[f"field.{name}"][2] = state[f"field.{name}"][1]


CHANGES: dict[str, tuple[Callable[[State], None], str]] = {
    "no level": (lambda state: state.pop("field.tree_level"), "field.tree_level is missing"),
    "a huge level": (_set("field.tree_level", -1, 2**31), "a node of level 2147483648"),
    "a negative level": (_set("field.tree_level", -1, -3), "a node of level 3"),
    "not sorted": (_swap_levels, "no root"),
    "level 2 under the root": (_set("field.tree_parent", -1, 0), "whose parent is not of the level above"),
    "a parent that is not there": (_set("field.tree_parent", 1, 10**9), "whose parent does not exist"),
    "a negative parent": (_set("field.tree_parent", 1, -1), "whose parent does not exist"),
    "a cycle": (_cycle, "whose parent is not of the level above"),
    "two roots": (_set("field.tree_level", 1, 0), "more than one root"),
    "the root has a parent": (_set("field.tree_parent", 0, 0), "a root with a parent"),
    "coordinates beyond the cube": (_set("field.tree_coords", (1, 0), 2), "outside of the root cube"),
    "negative coordinates": (_set("field.tree_coords", (1, 0), -(2**40)), "outside of the root cube"),
    "outside of its parent": (_set("field.tree_coords", (-1, 0), 0), "outside of its parent"),
    "two nodes at one place": (_twins, "outside of its parent|two nodes at one place"),
    "coordinates of another type": (_put("field.tree_coords", Tensor.int), "is of type int32, not int64"),
    "a level as a number": (_put("field.tree_level", lambda value: 3), "is not a tensor"),
    "a sparse tensor": (_put("field.grids.0", Tensor.to_sparse), "field.grids.0 is not a tensor"),
    "fewer parents": (_put("field.tree_parent", lambda value: value[:-1]), "field.tree_parent is "),
    "no nodes": (_put("field.tree_level", lambda value: value[:0]), "field.tree_coords is "),
    "a cube of no size": (_put("field.cube_side", torch.zeros_like), "a root cube with a side of 0"),
    "a cube of NaN": (_put("field.cube_side", lambda value: value * math.nan), "a root cube with a side of nan"),
    "a centre of NaN": (_set("field.cube_center", 1, math.nan), "whose centre is not finite"),
    "a mirrored cube": (_put("field.cube_rotation", torch.neg), "whose axes are not a rotation"),
    "a sheared cube": (_set("field.cube_rotation", (0, 1), 0.5), "whose axes are not a rotation"),
    "no cells": (_set("field.tree_resolution", 0, 0), "nodes of 0 cells"),
    "too many cells": (_set("field.tree_resolution", 0, 1e12), "nodes of 1e\\+12 cells"),
    "other cells": (_set("field.tree_resolution", 0, 32), "nodes have 32 cells per edge, .*node-resolution is 16"),
    "half a cell": (_set("field.tree_resolution", 0, 16.5), "nodes of 16.5 cells"),
    "sharpness of NaN": (_set("field.tree_resolution", 1, math.nan), "a GSD sharpness of nan"),
    "a short page": (_put("field.grids.1", lambda value: value[:, :-8]), "field.grids.1 is "),
    "a missing row": (_put("field.decoders.1", lambda value: value[:-1]), "field.decoders.1 is "),
    "half precision": (_put("field.grids.1", Tensor.half), "field.grids.1 is of type float16"),
    "a missing bank": (lambda state: state.pop("field.proposals.2"), "field.proposals.2 is in one of them only"),
    "NaN in the root": (
        _set("field.grids.0", (0, 7), math.nan),
        "1 of .* of field.grids.0 are NaN or infinite",
    ),
    "infinity in a leaf": (_set("field.decoders.2", (0, 0), math.inf), "numbers of field.decoders.2 are NaN"),
    "NaN in the appearance": (_set("field.appearance.weight", (0, 0), math.nan), "numbers of field.appearance.weight"),
    "a negative started level": (_put("field.active_level", lambda value: value - 99), "active_level is not within"),
    "a high started level": (_put("field.active_level", lambda value: value + 99), "active_level is not within"),
    "negative counts": (_put("field.node_samples", lambda value: value - 1), "node_samples is not within 0"),
    "fewer counts": (_put("field.node_samples", lambda value: value[1:]), "field.node_samples is "),
    "too mature": (_put("field.maturity", lambda value: value + 1), "maturity is not within 0 to 1"),
    "points of two coordinates": (_put("near_planes.points", lambda value: value[:, :2]), "are no points"),
    "points of NaN": (_set("near_planes.points", (0, 0), math.nan), "numbers of near_planes.points"),
    "a table of another type": (_put("growth.table", Tensor.float), "growth.table is not what infnerf writes"),
}


@pytest.fixture(scope="module")
def model() -> InfNeRFModel:
    """One for all refusals, which leave it as it is."""
    torch.manual_seed(0)
    return tiny_model()


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_line(name: str, model: InfNeRFModel) -> None:
    change, said = CHANGES[name]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert int(state["field.tree_level"].max()) == 2 and int((state["field.tree_level"] == 1).sum()) > 2
    change(state)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=said) as caught:
        model.load_state_dict(state)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()), "the model is as it was"


def test_an_unchanged_state_is_taken_over() -> None:
    saved, model = tiny_model(), tiny_model(tiny_config())
    model.load_state_dict({key: value.clone() for key, value in saved.state_dict().items()})
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())


def test_a_name_too_many_and_one_too_few_are_named() -> None:
    """Regression: nerfstudio dropped them and said nothing."""
    state = dict(tiny_model().state_dict())
    with pytest.raises(InputError, match="sampler.range is in one of them only"):
        tiny_model().load_state_dict({name: value for name, value in state.items() if name != "sampler.range"})
    with pytest.raises(InputError, match="objective.extra is in one of them only"):
        tiny_model().load_state_dict({**state, "objective.extra": torch.zeros(1)})


def test_a_tree_deeper_than_the_configuration_is_refused() -> None:
    with pytest.raises(InputError, match="2 levels deep, and --pipeline.model.octree.max-level is 1"):
        tiny_model(tiny_config(max_level=1), active=1).load_state_dict(dict(tiny_model().state_dict()))


def test_a_tree_is_read_back_as_it_was() -> None:
    octree = tiny_model().field.octree
    read = octree_from_state(tiny_model().state_dict(), "field.")
    for name in ("level", "coords", "parent", "children", "first_of_level"):
        assert torch.equal(getattr(octree, name), getattr(read, name)), name
    assert (octree.node_resolution, octree.gsd_sharpness, octree.cube.side) == (16, 2.0, read.cube.side)


# -- the state of optimizers


def _stepped() -> tuple[torch.nn.Parameter, NodeAdam, State]:
    bank = torch.nn.Parameter(torch.zeros(4, 10))
    optimizer = NodeAdam([bank], lr=0.01)
    bank.grad = torch.ones_like(bank)
    optimizer.step()
    return bank, optimizer, copy.deepcopy(optimizer.state_dict())


MOMENTS: dict[str, tuple[Callable[[State], None], str]] = {
    "moments of another shape": (_put("exp_avg", lambda value: value[:2]), "exp_avg of grids_1 is "),
    "second moments of another shape": (_put("exp_avg_sq", lambda value: value[:, :2]), "exp_avg_sq of grids_1 is "),
    "counters of another shape": (_put("row_steps", lambda value: value[:1]), "row_steps of grids_1 is "),
    "counters of another type": (_put("row_steps", Tensor.float), "row_steps of grids_1 is of type float32"),
    "negative counters": (_put("row_steps", torch.neg), "row_steps of grids_1 is below 0"),
    "moments in double": (_put("exp_avg", Tensor.double), "exp_avg of grids_1 is of type float64"),
    "NaN": (_set("exp_avg", (0, 0), math.nan), "numbers of optimizer state exp_avg of grids_1"),
    "negative squares": (_put("exp_avg_sq", torch.neg), "exp_avg_sq of grids_1 is below 0"),
    "no second moments": (lambda state: state.pop("exp_avg_sq"), "lacks its moments"),
    "a moment as text": (_put("exp_avg", lambda value: "x"), "is not a tensor"),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_of_the_parameter(name: str) -> None:
    change, said = MOMENTS[name]
    bank, optimizer, state = _stepped()
    require_optimizer_state(state, optimizer, "grids_1")
    change(state["state"][0])
    with pytest.raises(InputError, match=said):
        require_optimizer_state(state, optimizer, "grids_1")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lr": math.nan}, "has another lr"),
        ({"lr": -1.0}, "has lr -1"),
        ({"lr": "x"}, "has another lr"),
        ({"betas": (0.9, 1.5)}, "has betas"),
        ({"betas": (0.9,)}, "has another betas"),
        ({"eps": 0.0}, "has eps 0"),
        ({"params": [1]}, "has other parameters"),
    ],
)
def test_settings_of_a_group_are_numbers_within_bounds(settings: dict, said: str) -> None:
    _, optimizer, state = _stepped()
    state["param_groups"][0].update(settings)
    with pytest.raises(InputError, match=said):
        require_optimizer_state(state, optimizer, "grids_1")


@pytest.mark.parametrize("state", [None, [], {"state": {}}, {"state": {}, "param_groups": []}, {"param_groups": [3]}])
def test_something_else_than_a_state_is_refused(state: Any) -> None:
    with pytest.raises(InputError, match="the optimizer of grids_1 has"):
        require_optimizer_state(state, _stepped()[1], "grids_1")


def test_a_schedule_takes_over_numbers_and_nothing_else() -> None:
    """Regression: torch makes an attribute of every entry, of methods too."""
    current = {"base_lrs": [0.1], "last_epoch": 3, "lr_lambdas": [None], "_is_initial": False}
    saved = {"base_lrs": [0.2], "last_epoch": 7, "lr_lambdas": [None], "step": 5}
    assert require_plain(saved, current, "schedule") == {"base_lrs": [0.2], "last_epoch": 7, "lr_lambdas": [None]}
    for wrong in (
        {"base_lrs": [0.1, 0.2]},
        {"base_lrs": 1},
        {"last_epoch": math.nan},
        {"lr_lambdas": [3]},
        {"last_epoch": "x"},
    ):
        with pytest.raises(InputError, match=f"schedule has another {next(iter(wrong))}"):
            require_plain(wrong, current, "schedule")


# -- a run on the disk


@pytest.mark.parametrize("name", ["NaN in the root", "a cycle", "a huge level"])
def test_packing_and_opening_a_run_name_the_file(name: str, tmp_path: Path) -> None:
    """Regression: NaN in the root was packed and rendered, and nobody said so."""
    run = tiny_run(tmp_path)
    state, path = newest_checkpoint(run / "nerfstudio_models")
    state = {**state, "pipeline": dict(state["pipeline"])}
    model = {key.removeprefix("_model."): value for key, value in state["pipeline"].items()}
    CHANGES[name][0](model)
    state["pipeline"] = {f"_model.{key}": value.clone() for key, value in model.items()}
    path.unlink()
    torch.save(state, path)
    with pytest.raises(InputError, match=CHANGES[name][1]) as caught:
        pack_run(run, half=False, overwrite=False, progress=iter)
    assert str(path) in str(caught.value) and not run.with_name("run-packed").exists()
