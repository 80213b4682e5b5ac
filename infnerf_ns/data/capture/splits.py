"""Which photos are held out, where a capture lists them.

nerfstudio wants a list for each of ``train``, ``val`` and ``test`` as soon as there is one, and stops in the command
that first asks for the missing one, after the training. Here a missing list is what the others leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig

from infnerf_ns.data.capture.files import slashes
from infnerf_ns.errors import InputError

SPLITS = ("train", "val", "test")
_SHOWN = 8
RULE = "split_rule"
"""Key of the outputs' metadata under which a parser says, in words, by what photos are held out."""


def complete(
    lists: Mapping[str, Sequence[str]], names: Sequence[str], where: Mapping[str, str]
) -> dict[str, list[int]]:
    """The photos of all splits.

    ``val`` and ``test`` stand for each other; where neither is listed, both are what ``train`` leaves, and a missing
    ``train`` is what they leave.

    Args:
        lists: names of the photos of one or more splits.
        names: of all photos, in order.
        where: what each split's list is called, for messages.

    Returns:
        Ascending rows of ``names`` for each of the three splits.

    Raises:
        InputError: a listed photo is not in the capture.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(plain(name), []).append(row)
    found: dict[str, list[int]] = {}
    for split, listed in lists.items():
        missing = [name for name in listed if plain(name) not in rows]
        if missing:
            raise InputError(
                f"{where[split]} lists {missing[0]} ({len(missing)} of {len(listed)} like that), which the capture does"
                " not have: take it out of the list, or add the photo with its pose"
            )
        found[split] = sorted({row for name in listed for row in rows[plain(name)]})
    held_out = set(found.get("val", [])) | set(found.get("test", []))
    others = [row for row in range(len(names)) if row not in set(found.get("train", []))]
    train = found.get("train", [row for row in range(len(names)) if row not in held_out])
    val = found.get("val", found.get("test", others))
    return {"train": train, "val": val, "test": found.get("test", val)}


def rule(config: DataParserConfig) -> str:
    """By what nerfstudio's parsers hold photos out, in words."""
    mode = getattr(config, "eval_mode", None)
    words = {
        "fraction": f"--eval-mode fraction, --train-split-fraction {getattr(config, 'train_split_fraction', '')}",
        "filename": "--eval-mode filename, names with 'eval'",
        "interval": f"--eval-mode interval, --eval-interval {getattr(config, 'eval_interval', '')}",
        "all": "--eval-mode all: these are trained, too",
    }
    return words.get(str(mode), "the capture's own split")


def summary(trained: Sequence[Path], held_out: Sequence[Path], rule: str) -> str:
    """A line about which photos are held out, and by what."""
    folders = {name.parent for name in held_out}
    names = [name.name if len(folders) == 1 else f"{name.parent.name}/{name.name}" for name in held_out]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    line = f"{len(trained)} photos to train on, {len(held_out)} held out ({rule})"
    both = len(set(trained) & set(held_out))
    if both:
        shown += f"; {both} are in both, so figures say nothing about new views"
    return f"{line}: {shown}" if names else line


def plain(name: str) -> str:
    """A photo's name in one spelling: forward slashes, no ``./``."""
    return slashes(str(name)).removeprefix("./")
