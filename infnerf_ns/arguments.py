"""The command line of the program that this plugin runs in."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def flag_values(flag: str, arguments: Sequence[str] | None = None) -> list[str] | None:
    """What stands behind a flag, as tyro reads it: ``--a-flag x y`` or ``--a_flag=x``.

    Args:
        flag: without the dashes in front.
        arguments: of the command; by default this program's.

    Returns:
        None if the flag is not given; of several, the last counts.
    """
    found: list[str] | None = None
    inside = False
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, joint, value = argument.partition("=")
        if name.startswith("--"):
            inside = name[2:].replace("_", "-") == flag
            if inside:
                found = [value] if joint else []
                inside = not joint
        elif inside and found is not None:
            found.append(argument)
    return found
