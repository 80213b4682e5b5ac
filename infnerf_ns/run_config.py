"""A run's config.yml: read without executing anything that it asks for, and its paths.

nerfstudio writes config.yml with YAML tags that name Python classes and functions, and reads it by importing and
calling whatever a tag names: a file from a stranger executes a stranger's code. Here only what a run of this package
can hold is constructed: the configuration dataclasses that the package's own configuration holds or may hold by its
type annotations (dataparsers of plugins among them), enumerations, paths, tuples and plain values. A name of a class or
function (``_target``, ``collate_fn``) stands only where it is the default of its field, and nothing is called or
imported for it. No constructor, ``__setstate__`` or ``__reduce__`` is run.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import read_small_file
from infnerf_ns.training.run_folder import inner_folder_problems
from infnerf_ns.validation import UniqueKeyLoader, describe, matches, type_hints, type_name, validate_config, warn

if TYPE_CHECKING:
    from infnerf_ns.training.trainer import InfNeRFTrainerConfig

_TAG = "tag:yaml.org,2002:"
_OBJECT, _APPLY, _NAME = (f"{_TAG}python/{kind}:" for kind in ("object", "object/apply", "name"))
_PLAIN = [f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]
_PATHS = ("Path", "PosixPath", "WindowsPath")
_MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
"""With every alias counted as often as it is used; a run's configuration has about 600."""
_MAX_INT = 1 << 63
_UNPICKLES = "nerfstudio.data.dataparsers.minimal_dataparser.MinimalDataParserConfig"
"""nerfstudio's dataparser for captures in NumPy files with pickled objects: reading one executes what is in it."""
_PLACES = ("data", "data_dir", "cache_dir", "output_dir", "load_dir", "load_config", "load_checkpoint")
"""Fields whose relative paths start from where a command is given; others, such as COLMAP's `images_path`, may start
from the capture."""


def read_run_config(path: Path) -> InfNeRFTrainerConfig:
    """The configuration in a run's config.yml.

    What runs of earlier versions lack has its default. Settings that this version does not know are left out, with a
    warning.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, asks for anything but configuration classes and plain values, is not of this
            package, or holds a value of a wrong type or out of range.
    """
    content = read_small_file(path, "", _MAX_BYTES)
    try:
        loader = _RunLoader(content.decode("utf-8"))
        try:
            root = loader.get_single_node()
            if root is None:
                raise ValueError("it is empty")
            _count(root, {}, set())
            config = loader.construct_document(root)
        finally:
            loader.dispose()
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as the configuration of a run ({_reason(error)})") from error
    if type(config) is not _main_class():
        raise InputError(f"{path}: this is not a run of infnerf")
    problems = list(_wrong_types(config, ""))
    if not problems:
        problems = validate_config(config, "", combinations=False).problems + inner_folder_problems(config, "")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {problems[0]}{more}")
    for name in sorted(loader.unknown):
        warn(f"{path}: this version knows no setting '{name}'; it is left out")
    return config


def make_paths_absolute(config: Any) -> None:
    """Makes the paths of a run's configuration, in place, lead to the same files from everywhere.

    A relative path that a dataparser takes from its capture (``colmap_path``, ``images_path`` ...) stays as it is.

    Args:
        config: of the trainer, before anything is loaded.
    """
    _absolute_places(config)
    manager = getattr(getattr(config, "pipeline", None), "datamanager", None)
    if manager is None or not dataclasses.is_dataclass(manager):
        return
    parser = getattr(manager, "dataparser", None)
    data = getattr(config, "data", None) or getattr(manager, "data", None) or getattr(parser, "data", None)
    if data is not None and manager.data is not None:
        manager.data = _absolute(Path(data))
    _absolute_places(manager)
    if parser is None or not dataclasses.is_dataclass(parser):
        return
    if manager.data is not None:
        parser.data = manager.data  # as the data manager is going to do
    _absolute_places(parser)
    for field in dataclasses.fields(parser):
        value = getattr(parser, field.name)
        if isinstance(value, Path) and not value.is_absolute() and value.exists():
            if not (Path(parser.data) / value).exists():
                setattr(parser, field.name, _absolute(value))


def _absolute(path: Path) -> Path:
    """The same file from everywhere; links stay, unless '..' behind one would lead to another folder."""
    return path.resolve() if ".." in path.parts else path.absolute()


def _absolute_places(section: Any) -> None:
    for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
        value = getattr(section, field.name)
        if field.name in _PLACES and isinstance(value, Path):
            setattr(section, field.name, _absolute(value))


class _RunLoader(UniqueKeyLoader):
    """Constructs what a run's configuration can hold, and nothing else."""

    yaml_constructors: typing.ClassVar[dict] = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN}
    yaml_multi_constructors: typing.ClassVar[dict] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.unknown: set[str] = set()
        """settings that no class has"""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A number that fits into 64 bits."""
        if len(node.value) > 100 or not -_MAX_INT <= (value := super().construct_yaml_int(node)) < _MAX_INT:
            raise _refusal("a number is too large", node)
        return value

    def construct_tuple(self, node: yaml.Node) -> tuple:
        """``!!python/tuple``."""
        return tuple(self.construct_sequence(node, deep=True))

    def construct_config(self, name: str, node: yaml.Node) -> Any:
        """``!!python/object:``: a configuration dataclass; what the file lacks has its default."""
        found = _allowed().get(name)
        if name == _UNPICKLES:
            raise _refusal("its capture is one of minimal-parser, whose files can execute code", node)
        if found is None or not dataclasses.is_dataclass(found):
            raise _refusal(f"it asks for an object of {name}, which is no part of a run's configuration", node)
        if not isinstance(node, yaml.MappingNode):
            raise _refusal(f"the settings of {found.__name__} are no 'key: value' lines", node)
        fields = {field.name: field for field in dataclasses.fields(found)}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in values:
                raise _refusal(f"the key {describe(key)} is no name or given twice", key_node)
            if key not in fields:
                self.unknown.add(f"{found.__name__}.{key}")
            elif value_node.tag.startswith(_NAME):
                values[key] = _named_default(fields[key], value_node)
            else:
                values[key] = self.construct_object(value_node, deep=True)
                if _is_code(_default(fields[key])):
                    raise _refusal(f"'{key}' must be {_full_name(_default(fields[key]))}", value_node)
        config = object.__new__(found)
        for key, field in fields.items():
            value = values[key] if key in values else _default(field)
            if value is dataclasses.MISSING:
                raise _refusal(f"'{key}' of {found.__name__} is missing", node)
            config.__dict__[key] = value
        return config

    def construct_call(self, name: str, node: yaml.Node) -> Any:
        """``!!python/object/apply:``: a path of parts, or a member of an enumeration."""
        parts = self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else [None]
        module, _, kind = name.rpartition(".")
        if kind in _PATHS and module.partition(".")[0] == "pathlib" and all(isinstance(part, str) for part in parts):
            return Path(*parts)
        found = _allowed().get(name)
        if found is None or not issubclass(found, enum.Enum) or len(parts) != 1:
            raise _refusal(f"it asks for a call of {name}, which is no part of a run's configuration", node)
        return found(parts[0])


_RunLoader.add_constructor(f"{_TAG}int", _RunLoader.construct_yaml_int)
_RunLoader.add_constructor(f"{_TAG}python/tuple", _RunLoader.construct_tuple)
_RunLoader.add_constructor(None, yaml.SafeLoader.construct_undefined)
_RunLoader.add_multi_constructor(_OBJECT, _RunLoader.construct_config)
_RunLoader.add_multi_constructor(_APPLY, _RunLoader.construct_call)


def _main_class() -> type:
    from infnerf_ns.training.trainer import InfNeRFTrainerConfig  # which uses this module

    return InfNeRFTrainerConfig


@functools.cache
def _allowed() -> dict[str, type]:
    """The classes that a run's configuration can hold, by their full names.

    They are found from the package's own configuration: the classes of the values in it, those in the type annotations
    of its fields (for the dataparser nerfstudio's union, which holds what plugins have registered), the optimizers and
    schedulers of nerfstudio, and all that these hold in turn.
    """
    from nerfstudio.engine import optimizers, schedulers

    from infnerf_ns.presets import base_config

    found: dict[str, type] = {}
    waiting: list[Any] = [base_config("cpu")]
    for module, kind in ((optimizers, optimizers.OptimizerConfig), (schedulers, schedulers.SchedulerConfig)):
        waiting += [member for _, member in inspect.getmembers(module, inspect.isclass) if issubclass(member, kind)]
    seen: set[int] = set()
    kept = []  # so that no id in `seen` is given to another object
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        kept.append(item)
        if isinstance(item, type):
            if issubclass(item, enum.Enum) or dataclasses.is_dataclass(item):
                found[_full_name(item)] = item
            if dataclasses.is_dataclass(item):
                defaults = map(_default, dataclasses.fields(item))
                waiting += [*type_hints(item).values(), *(value for value in defaults if not _is_code(value))]
        elif dataclasses.is_dataclass(item):
            waiting += [type(item), *(value for value in vars(item).values() if not _is_code(value))]
        elif isinstance(item, enum.Enum):
            waiting.append(type(item))
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        else:
            # An annotation: Optional[X], dict[str, X], Annotated[X, ...] (what is behind X is tyro's).
            parts = typing.get_args(item)
            waiting += parts[:1] if typing.get_origin(item) is typing.Annotated else parts
    return found


def _default(field: dataclasses.Field) -> Any:
    """Default of a field, MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_code(value: Any) -> bool:
    return isinstance(value, type) or inspect.isroutine(value)


def _named_default(field: dataclasses.Field, node: yaml.Node) -> Any:
    """The class or function that a field has as its default, where the file names that one."""
    default, name = _default(field), node.tag.removeprefix(_NAME)
    if not _is_code(default) or _full_name(default) != name:
        raise _refusal(f"'{field.name}' names {name}, which is not what this setting has", node)
    return default


def _full_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _count(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """Values below a node, aliases counted as often as they are used: what walking over the result will take."""
    if id(node) in open_nodes:
        raise _refusal("a value is part of itself", node)
    if id(node) not in known:
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(child, known, open_nodes) for child in children)
        open_nodes.remove(id(node))
    if known[id(node)] > _MAX_VALUES:
        raise _refusal(f"it has more than {_MAX_VALUES} values", node)
    return known[id(node)]


def _refusal(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f"line {mark.line + 1}: "
    return f"{place}{getattr(error, 'problem', None) or error}"


def _wrong_types(config: Any, prefix: str) -> Iterator[str]:
    """A line for each value of a wrong type in a dataclass and all those within it; texts that should be paths become
    paths."""
    hints = type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, key = getattr(config, field.name), hints.get(field.name, Any), f"{prefix}{field.name}"
        if _is_code(value):
            continue
        if not matches(value, hint):
            yield f"{key} must be {type_name(hint)}, found {_short(value)}"
            continue
        if isinstance(value, str) and _is_path(hint):
            setattr(config, field.name, Path(value))
        if field.name == "optimizers":
            yield from _wrong_groups(value, key)
        for name, part in _sections(value, key):
            yield from _wrong_types(part, f"{name}.")


def _is_path(hint: Any) -> bool:
    """Whether an annotation is that of a path, or of one that may be missing."""
    arguments = typing.get_args(hint)
    return hint is Path or (str not in arguments and any(_is_path(argument) for argument in arguments))


def _wrong_groups(groups: dict[str, Any], key: str) -> Iterator[str]:
    """What nerfstudio's annotation ``Dict[str, Any]`` leaves open: an optimizer and perhaps a scheduler per group."""
    from nerfstudio.engine.optimizers import OptimizerConfig
    from nerfstudio.engine.schedulers import SchedulerConfig

    for name, group in groups.items():
        whole = isinstance(group, dict) and set(group) <= {"optimizer", "scheduler"}
        if not whole or not isinstance(group.get("optimizer"), OptimizerConfig):
            yield f"{key}.{name} must hold an optimizer, found {_short(group)}"
        elif not isinstance(group.get("scheduler"), (SchedulerConfig, type(None))):
            yield f"{key}.{name}.scheduler must be a scheduler or empty, found {_short(group['scheduler'])}"


def _sections(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The dataclasses in a value, with their keys."""
    if dataclasses.is_dataclass(value):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _sections(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _sections(item, key)


def _short(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    text = describe(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
