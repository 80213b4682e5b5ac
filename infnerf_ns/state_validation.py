"""What a state that is loaded must be before any of its numbers reaches an index, an allocation or a kernel.

A checkpoint may be damaged, of other settings, or made by somebody who wants harm: torch's safe loading keeps code out,
but not a tree whose nodes are their own parents. The kernels compare no index, so everything that they index with is
checked here: the tree, the shape and type of every tensor, the moments of the optimizers, and that all numbers are
finite (a NaN in the root is everywhere in the picture, and nobody says so). Nothing is allocated before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.field_config import FieldConfig
from infnerf_ns.octree import Octree, RootCube
from infnerf_ns.pages import PageLayout
from infnerf_ns.streaming.packing import CHECKSUMS

MAX_LEVEL = 20
"""Deepest octree level there can be (:class:`infnerf_ns.tree_building.OctreeConfig`)."""
_PARAMETERS = ("field.grids.", "field.decoders.", "field.proposals.", "field.appearance.")
_MOST_CELLS = 8192
_SHARPNESS = (0.25, 8.0)
_LARGEST = 1e18
"""Of the root cube, scene units: its products stay within float32."""
_TREE = ("tree_level", "tree_coords", "tree_parent", "cube_center", "cube_side", "cube_rotation", "tree_resolution")


def octree_from_state(state: Mapping[str, Any], prefix: str, source: str = "the checkpoint") -> Octree:
    """The tree that a state holds, if it is one.

    Args:
        state: of a model or a field.
        prefix: before the names of the tree's tensors.
        source: of the state, named in the errors.

    Raises:
        InputError: something is missing, of the wrong type or shape, or this is no octree.
    """
    for name in _TREE:
        if prefix + name not in state:
            raise InputError(
                f"{source} holds no octree ({prefix}{name} is missing): it was not written by infnerf; check --load-dir"
                " or --load-config"
            )
    count = len(state[prefix + "tree_level"]) if _is_table(state[prefix + "tree_level"], 1) else 0
    shapes: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "tree_level": ((count,), (torch.int64,)),
        "tree_coords": ((count, 3), (torch.int64,)),
        "tree_parent": ((count,), (torch.int64,)),
        "cube_center": ((3,), (torch.float32, torch.float64)),
        "cube_side": ((), (torch.float64, torch.float32)),
        "cube_rotation": ((3, 3), (torch.float32, torch.float64)),
        "tree_resolution": ((2,), (torch.float64,)),
    }
    for name, (shape, types) in shapes.items():
        require_tensor(prefix + name, state[prefix + name], shape, types, source)
    level, coords, parent, center, side, rotation, resolution = (state[prefix + name].cpu() for name in _TREE)
    problem = _tree_problem(level, coords, parent) or _cube_problem(center, float(side), rotation)
    cells, sharpness = resolution.tolist()
    if problem is None and not (2 <= cells <= _MOST_CELLS and cells == int(cells)):
        problem = f"nodes of {cells:g} cells per edge"
    if problem is None and not _SHARPNESS[0] <= sharpness <= _SHARPNESS[1]:
        problem = f"a GSD sharpness of {sharpness:g}"
    if problem is not None:
        refuse(source, f"its octree has {problem}")
    place = [state[prefix + name] for name in _TREE]
    return Octree(
        RootCube(place[3], float(side), place[5]),
        *place[:3],
        node_resolution=int(cells),
        gsd_sharpness=sharpness,
    )


def _tree_problem(level: Tensor, coords: Tensor, parent: Tensor) -> str | None:
    """What is wrong with N nodes, as the object of a sentence."""
    if len(level) == 0 or int(level[0]) != 0:
        return "no root"
    if bool((level < 0).any()) or bool((level > MAX_LEVEL).any()):
        return f"a node of level {int(level.abs().max())}"
    if bool((level[1:] < level[:-1]).any()):
        return "nodes that are not sorted by level"
    if int((level == 0).sum()) != 1:
        return "more than one root"
    if int(parent[0]) != -1:
        return "a root with a parent"
    below = parent[1:]
    if bool((below < 0).any()) or bool((below >= len(level)).any()):
        return "a node whose parent does not exist"
    if bool((level[below] != level[1:] - 1).any()):
        return "a node whose parent is not of the level above"
    if bool((coords < 0).any()) or bool((coords >= (1 << level)[:, None]).any()):
        return "a node outside of the root cube"
    if bool((coords[1:] >> 1 != coords[below]).any()):
        return "a node outside of its parent"
    octant = ((coords[1:] & 1) * torch.tensor([1, 2, 4])).sum(-1)
    if len((below * 8 + octant).unique()) < len(below):
        return "two nodes at one place"
    return None


def _cube_problem(center: Tensor, side: float, rotation: Tensor) -> str | None:
    if not 1 / _LARGEST <= side <= _LARGEST:
        return f"a root cube with a side of {side:g}"
    if not bool((center.abs() <= _LARGEST).all()):
        return "a root cube whose centre is not finite"
    turn = rotation.double()
    proper = bool(torch.isfinite(turn).all()) and bool((turn @ turn.T - torch.eye(3).double()).abs().max() < 1e-3)
    if not proper or float(torch.linalg.det(turn)) < 0:
        return "a root cube whose axes are not a rotation"
    return None


def require_model_state(
    state: Mapping[str, Any],
    config: FieldConfig,
    node_resolution: int,
    max_level: int,
    source: str = "the checkpoint",
) -> Octree:
    """The tree of a model's state, if all of the state is sound as far as it does not depend on the photos.

    Args:
        state: of a model, packed or not.
        config, node_resolution, max_level: of the configuration that is going to load it.
        source: of the state, named in the errors.

    Raises:
        InputError: it is not sound, or does not fit the configuration.
    """
    octree = octree_from_state(state, "field.", source)
    remedy = "use the config.yml that was written beside it, or the same --pipeline.model.octree options"
    if octree.depth > max_level:
        raise InputError(
            f"{source} does not fit the configuration: its octree is {octree.depth} levels deep, and"
            f" --pipeline.model.octree.max-level is {max_level}; {remedy}"
        )
    if octree.node_resolution != node_resolution:
        raise InputError(
            f"{source} does not fit the configuration: its nodes have {octree.node_resolution} cells per edge, and"
            f" --pipeline.model.octree.node-resolution is {node_resolution}; {remedy}"
        )
    layout = PageLayout(config, octree.node_resolution, max_level)
    shapes = {
        f"field.{kind}.{level}": shape
        for level, kinds in enumerate(layout.bank_shapes(octree))
        for kind, shape in kinds.items()
        if not (CHECKSUMS in state and 0 < level <= octree.depth and kind in layout.node_page(level))  # in the pages
    }
    expected = set(shapes) | ({"field.appearance.weight"} if config.appearance_dim else set())
    differing = expected ^ {name for name in state if name.startswith(_PARAMETERS)}
    if differing:
        raise InputError(
            f"{source} does not fit the configuration ({sorted(differing)[0]} is in one of them only): use the"
            " config.yml that was written beside it, or the same --pipeline.model.octree and --pipeline.model.field"
            " options"
        )
    for name, shape in shapes.items():
        require_tensor(name, state[name], shape, (torch.float32,), source)
    _require_about_nodes(state, octree, max_level, source)
    require_finite(state, source)
    return octree


def _require_about_nodes(state: Mapping[str, Any], octree: Octree, max_level: int, source: str) -> None:
    """The tensors that say something of each node; a growing tree's own statistics begin anew where they do not fit
    (:meth:`infnerf_ns.training.growth.Growth.fit`), but not as other types."""
    nodes, whole, real = octree.num_nodes, (torch.int64,), (torch.float32,)
    for name, shape, types, low, high in (
        ("field.active_level", (), whole, 0, max_level),
        ("field.node_samples", (nodes,), whole, 0, math.inf),
        ("field.maturity", (nodes,), real, 0, 1),
        (CHECKSUMS, (nodes,), whole, 0, 2**33),
        ("near_planes.floor", (), (torch.float64, torch.float32), 0, math.inf),
    ):
        if name in state:
            require_tensor(name, state[name], shape, types, source)
            if bool((state[name] < low).any()) or bool((state[name] > high).any()):
                refuse(source, f"its {name} is not within {low} to {high:g}")
    if "field.active_level" not in state:
        refuse(source, "field.active_level is missing")
    if "near_planes.points" in state and not (
        _is_table(state["near_planes.points"], 2) and state["near_planes.points"].shape[1] == 3
    ):
        refuse(source, "its near_planes.points are no points")
    for name in ("table", "watched", "age", "rest", "history"):
        value = state.get(f"growth.{name}")
        wanted = torch.float64 if name in ("table", "watched") else torch.int64
        if value is not None and not (isinstance(value, Tensor) and value.dtype == wanted and value.dim() > 0):
            refuse(source, f"its growth.{name} is not what infnerf writes")


def require_tensor(
    name: str, value: Any, shape: tuple[int, ...], types: tuple[torch.dtype, ...], source: str = "the checkpoint"
) -> None:
    """Ends with one line if a value is not a plain tensor of this shape and one of these types.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        refuse(source, f"its {name} is not a tensor")
    if tuple(value.shape) != shape:
        raise InputError(
            f"{source}'s {name} is {tuple(value.shape)}, but the configuration asks for {shape}: use the same"
            " --pipeline.model.field options and photos as the checkpoint"
        )
    if value.dtype not in types:
        refuse(source, f"its {name} is of type {str(value.dtype).removeprefix('torch.')}, not {_names(types)}")


def require_finite(state: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Ends with one line if a number of a state is NaN or infinite; reads each of them once (0.02 s for 500 MB in
    memory).

    Raises:
        InputError: names the first tensor that has one.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not all_finite(value):
            bad = int((~torch.isfinite(value)).sum())
            raise InputError(
                f"{source}: {bad} of {value.numel()} numbers of {name} are NaN or infinite, so what it shows would be"
                " wrong: use an older checkpoint"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a floating tensor are finite."""
    # The sum is quick and needs no memory; only of finite numbers can it be finite. Huge ones may overflow it.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def require_optimizer_state(
    saved: Any, optimizer: torch.optim.Optimizer, name: str, source: str = "the checkpoint"
) -> None:
    """Ends with one line if an optimizer's state is not one of these Parameters: moments of their shape and type.

    Args:
        saved: the state.
        optimizer: that is going to load it; its Parameters have the shapes of the checkpoint's tree.
        name: of the parameter group.
        source: of the state, named in the errors.

    Raises:
        InputError: it is not.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or [_numbers(group) for group in groups] != [group["params"] for group in own]:
        refuse(source, f"the optimizer of {name} has other parameters")
    for group, current in zip(groups, own):
        _require_settings(group, current, name, source)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = saved.get("state")
    if not isinstance(entries, dict) or not set(entries) <= set(range(len(parameters))):
        refuse(source, f"the optimizer of {name} has state of other parameters")
    for number, entry in entries.items():
        if not isinstance(entry, dict):
            refuse(source, f"the optimizer of {name} has no moments")
        parameter = parameters[number]
        if entry and not {"exp_avg", "exp_avg_sq"} <= set(entry):
            refuse(source, f"the optimizer of {name} lacks its moments")
        for key, value in entry.items():
            place = f"optimizer state {key} of {name}"
            if key == "row_steps":
                require_tensor(place, value, (len(parameter),), (torch.int64,), source)
            elif key == "step":
                require_tensor(place, torch.as_tensor(value), (), (torch.float32, torch.int64), source)
            else:
                require_tensor(place, value, tuple(parameter.shape), (parameter.dtype,), source)
            positive = key in ("row_steps", "step", "exp_avg_sq")
            if isinstance(value, Tensor) and value.numel() and positive and not float(value.min()) >= 0:
                refuse(source, f"the {place} is below 0 or not a number")
        require_finite({f"optimizer state {key} of {name}": value for key, value in entry.items()}, source)


_SETTINGS = {
    "lr": lambda number: 0 <= number < 1e3,
    "initial_lr": lambda number: 0 <= number < 1e3,
    "eps": lambda number: number > 0,
    "betas": lambda number: 0 <= number < 1,
    "warmup": lambda number: number >= 0,
}
"""Bounds of the numbers of an optimizer's group."""


def _require_settings(group: Mapping[str, Any], current: Mapping[str, Any], name: str, source: str) -> None:
    for key, value in group.items():
        if key == "params":
            continue
        known = current.get(key, value)
        if not _same_kind(value, list(known) if isinstance(known, tuple) and isinstance(value, list) else known):
            refuse(source, f"the optimizer of {name} has another {key}")
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if key in _SETTINGS and not all(_SETTINGS[key](number) for number in numbers):
            refuse(source, f"the optimizer of {name} has {key} {value}")


def require_plain(saved: Any, current: Mapping[str, Any], what: str, source: str = "the checkpoint") -> dict[str, Any]:
    """The entries of a scheduler's or grad scaler's state that the current one has, too: a few plain numbers. (Versions
    of torch differ in what they save, and torch would make attributes of what it does not know.)

    Args:
        saved: the state.
        current: the state of what is going to load it.
        what: it is, for the line.
        source: of the state, named in the errors.

    Raises:
        InputError: a value is not of the current one's kind, or not finite.
    """
    if not isinstance(saved, dict):
        refuse(source, f"the state of the {what} is no mapping")
    kept = {key: saved[key] for key in current if key in saved}
    for key, value in kept.items():
        if not _same_kind(value, current[key]):
            refuse(source, f"the state of the {what} has another {key}")
    return kept


def _same_kind(value: Any, current: Any) -> bool:
    """Whether a value is a finite number where the other one is a number, a list as long as the other one ..."""
    if isinstance(current, (list, tuple)):
        same = type(value) is type(current) and len(value) == len(current)
        return same and all(_same_kind(item, other) for item, other in zip(value, current))
    if isinstance(current, dict):
        return isinstance(value, dict) and all(_finite_number(item) for item in value.values())
    if isinstance(current, bool) or not _finite_number(current):
        return type(value) is type(current) and not isinstance(value, Tensor)
    return not isinstance(value, bool) and _finite_number(value)


def refuse(source: str, what: str) -> NoReturn:
    """Ends with one line about a checkpoint that no infnerf has written."""
    raise InputError(f"{source} cannot be used: {what}; it is damaged or was not written by infnerf: use another one")


def _finite_number(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_table(value: Any, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dim() == dimensions


def _numbers(group: Any) -> Any:
    return group.get("params") if isinstance(group, dict) else None


def _names(types: Iterable[torch.dtype]) -> str:
    return " or ".join(str(each).removeprefix("torch.") for each in types)
