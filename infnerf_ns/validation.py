"""Checks of configuration dataclasses, before anything expensive starts. Nothing of nerfstudio or torch is imported.

A field states its limits in its type, where tyro ignores them and a reader finds them:

    max_level: Annotated[int, Range(0, 20, warn_above=15)] = 6

A dataclass that knows of values that exclude each other has a method ``check(self) -> list[str]``; one that knows of
legal values that are rarely wanted has ``advise(self) -> list[str]``. Every finding is one line that stands alone: it
names the key as the command-line flag, the value and what is allowed.
"""

import dataclasses
import difflib
import enum
import math
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import yaml

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number, both ends included; for a tuple or list they hold for every element."""

    low: Optional[float] = None
    high: Optional[float] = None
    warn_above: Optional[float] = None
    """Legal but rarely wanted: larger values give a warning."""

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"

    def allows(self, value: float) -> bool:
        """Whether the value lies within the limits."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class Reloadable:
    """A configuration dataclass that runs of earlier versions have in their config.yml: what they lack has its default.
    (Plain defaults are attributes of the class; those that are made anew for each instance would be missing.)"""

    def __setstate__(self, state: dict[str, Any]) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name not in state and field.default_factory is not dataclasses.MISSING:
                state = {**state, field.name: field.default_factory()}
        self.__dict__.update(state)


@dataclasses.dataclass
class Report:
    """What a check found: ``problems`` stop the program, ``warnings`` do not. One line each."""

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def warn(line: str) -> None:
    """Print one warning line to stderr, never wrapped, so that it can be searched for in a log."""
    print(f"infnerf: warning: {' '.join(line.split())}", file=sys.stderr, flush=True)


def validate_config(config: Any, prefix: str = "--", *, combinations: bool = True) -> Report:
    """Check the types, ranges, choices and combinations of a dataclass and of all dataclasses within it.

    Args:
        config: a dataclass instance; dictionaries of dataclasses within it are walked too.
        prefix: what stands before the key path, ``--`` for command-line flags.
        combinations: ask the dataclasses' own ``check`` and ``advise``, too; they rely on right types.
    """
    report = Report()
    _walk(config, prefix, report, combinations)
    return report


def enforce(report: Report) -> None:
    """Raise InputError if there are problems, several are printed to stderr first, a line each; else print the
    warnings."""
    if len(report.problems) == 1:
        raise InputError(report.problems[0])
    if report.problems:
        for line in report.problems:
            print(f"infnerf: {line}", file=sys.stderr)
        raise InputError(f"{len(report.problems)} settings are wrong, see the lines above; nothing was started")
    for line in report.warnings:
        warn(line)


def require_valid(config: Any) -> None:
    """`validate_config` of a command's options, then `enforce`.

    Args:
        config: the command, a dataclass instance.

    Raises:
        InputError: an option is wrong.
    """
    enforce(validate_config(config))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; keys given twice are an error, as one of them would be lost.

    Raises:
        InputError: the file is missing, cannot be parsed (with the line) or is not a mapping.
    """
    require_regular_file(path, "cannot read the settings file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the settings file {path}: {error}") from error
    try:
        content = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise InputError(f"{path}: not YAML that can be read ({shortened(str(error))})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected 'key: value' lines at the top level, found {describe(content)}")
    return content


def apply_yaml(config: Any, mapping: dict[str, Any], source_file: Union[str, Path], key_path: str = "") -> None:
    """Set nested values of a dataclass, in place, from a mapping that was read from a YAML file.

    Args:
        config: dataclass instance, or a dictionary of dataclasses (such as nerfstudio's ``optimizers``).
        mapping: keys are field names ('-' and '_' are the same), values are scalars, lists or nested mappings.
        source_file: named in the errors.
        key_path: where ``mapping`` stands in the file, for the errors.

    Raises:
        InputError: an unknown key (with the nearest allowed one) or a value of the wrong type.
    """
    hints = {} if isinstance(config, dict) else type_hints(type(config))
    allowed = list(config) if isinstance(config, dict) else _public_fields(config)
    for key, value in mapping.items():
        name, path = str(key).replace("-", "_"), f"{key_path}{key}"
        if name not in allowed:
            raise InputError(
                f"{source_file}: unknown key '{path}'{_suggest(name, allowed)}; allowed here: {', '.join(allowed)}"
            )
        current = config[name] if isinstance(config, dict) else getattr(config, name)
        if _is_section(current):
            if not isinstance(value, dict):
                raise InputError(f"{source_file}: '{path}' is a section with keys of its own, found {describe(value)}")
            apply_yaml(current, value, source_file, f"{path}.")
            continue
        hint = Any if isinstance(config, dict) else hints.get(name, Any)
        try:
            converted = _convert(value, hint)
        except (TypeError, ValueError):
            raise InputError(f"{source_file}: '{path}' must be {type_name(hint)}, found {describe(value)}") from None
        if isinstance(config, dict):
            config[name] = converted
        else:
            setattr(config, name, converted)


def type_name(hint: Any) -> str:
    """A type as a user would say it: 'a whole number', 'one of torch, numba'."""
    hint, _ = _strip(hint)
    if hint is type(None):
        return "empty"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin in (tuple, list):
        return "a list of " + ", ".join(type_name(argument) for argument in arguments if argument is not ...)
    simple = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return simple.get(hint, getattr(hint, "__name__", str(hint)))


def _walk(value: Any, prefix: str, report: Report, combinations: bool) -> None:
    """Check one dataclass or dictionary and everything in it; ``prefix`` ends where the next key begins."""
    if isinstance(value, dict):
        for key, item in value.items():
            if _is_section(item):
                _walk(item, f"{prefix}{_flag(str(key))}.", report, combinations)
        return
    hints = type_hints(type(value))
    for name in _public_fields(value):
        flag, item = f"{prefix}{_flag(name)}", getattr(value, name)
        if _is_section(item):
            _walk(item, f"{flag}.", report, combinations)
        else:
            _check_value(flag, item, hints.get(name, Any), report)
    if combinations:
        report.problems += getattr(value, "check", list)()
        report.warnings += getattr(value, "advise", list)()


def _check_value(flag: str, value: Any, hint: Any, report: Report) -> None:
    bare, limits = _strip(hint)
    if not matches(value, bare):
        report.problems.append(f"{flag} {_show(value)}: must be {type_name(hint)}")
        return
    for number in _numbers(value):
        if math.isnan(number):
            report.problems.append(f"{flag} {_show(value)}: is not a number")
            continue
        if math.isinf(number) and limits and all(limit.allows(number) for limit in limits):
            report.problems.append(f"{flag} {_show(value)}: give a finite number")
            continue
        for limit in limits:
            if not limit.allows(number):
                report.problems.append(f"{flag} {_show(value)}: allowed is {limit}")
            elif limit.warn_above is not None and number > limit.warn_above:
                report.warnings.append(f"{flag} {_show(value)} is unusually large (above {limit.warn_above:g})")


def _strip(hint: Any) -> tuple[Any, list[Range]]:
    """Remove Annotated around a type and within Optional; returns the bare type and the ranges found."""
    if typing.get_origin(hint) is Annotated:
        inner, ranges = _strip(typing.get_args(hint)[0])
        return inner, ranges + [item for item in hint.__metadata__ if isinstance(item, Range)]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return hint, [found for argument in typing.get_args(hint) for found in _strip(argument)[1]]
    return hint, []


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; types not understood here (a callable, a foreign class, Any) match everything."""
    hint, _ = _strip(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            return False
        return not arguments or all(matches(k, arguments[0]) and matches(v, arguments[1]) for k, v in value.items())
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return False
        if origin is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(matches, value, arguments))
        return all(matches(item, arguments[0]) for item in value) if arguments else True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is Path:
        return isinstance(value, (str, Path))
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, enum.Enum)):
        return isinstance(value, hint)
    return True


def _convert(value: Any, hint: Any) -> Any:
    """A YAML value as the type of a field. Raises TypeError or ValueError if it does not fit."""
    hint, _ = _strip(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return _convert(value, argument)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin in (tuple, list) and isinstance(value, list):
        fixed = origin is tuple and arguments and arguments[-1] is not ...
        if fixed and len(value) != len(arguments):
            raise ValueError
        element = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
        return origin(_convert(item, kind) for item, kind in zip(value, element))
    if hint is float and isinstance(value, str):
        return float(value)  # YAML 1.1 reads "1e-3", without a point, as text
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not matches(value, hint):
        raise TypeError
    return float(value) if hint is float else value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def type_hints(cls: type) -> dict[str, Any]:
    """Resolved types with their metadata; none for a foreign class whose annotations cannot be resolved."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _public_fields(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if not field.name.startswith("_")]


def _is_section(value: Any) -> bool:
    """A dataclass instance, or a non-empty dictionary that holds some."""
    if isinstance(value, dict):
        return any(_is_section(item) for item in value.values())
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def describe(value: Any) -> str:
    """A value as an error shows it, with its type."""
    return f"{shortened(repr(value))} ({type(value).__name__})"


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text that may be as long as a file."""
    return text if len(text) <= most else f"{text[:most]}..."


def _suggest(name: str, allowed: list[str]) -> str:
    nearest = difflib.get_close_matches(name, allowed, n=1)
    return f", did you mean '{nearest[0]}'?" if nearest else ""


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
