"""A checkpoint's file, looked at before anything in it is believed: torch's loader does not.

``torch.load`` compares no checksum, inflates entries that nobody has compressed, and takes the length of a tensor from
the pickle, whatever the length of its record: a changed number there reads beyond the end of the record, into other
tensors or other memory. torch writes plain zip files whose entries are stored as they are, so all of that can be seen
in the table of contents; and of a mapped file, which storage lies where.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infnerf_ns.regular_files import file_problem

_MOST_PICKLED = 1 << 30
"""Bytes of the pickle, in which names and numbers stand: a few kilobytes."""


def quick_damage(path: Path) -> str | None:
    """Half a sentence that says why a file cannot be a whole checkpoint; None if it looks like one.

    Reads a few kilobytes, whatever the file's size: torch's zip files have their table of contents at their end.
    """
    problem = file_problem(path)
    if problem is not None:
        return problem
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                return "its entries are compressed, which those of torch.save are not"
            if sum(entry.file_size for entry in entries) > size:
                return "its entries are larger than the file"
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if not pickles or sum(entry.file_size for entry in pickles) > _MOST_PICKLED:
                return "it is not a file of torch.save"
            for entry in pickles:
                archive.read(entry)  # compares the checksum
    except OSError as error:
        return error.strerror or str(error)
    except Exception:  # BadZipFile, and whatever else zipfile raises where numbers of its tables are wrong
        return "truncated?"
    return None


def damage(path: Path) -> str | None:
    """As `quick_damage`, with the checksums of all entries compared: 0.1 s for 500 MB in memory, and once for a file
    that does not change."""
    problem = quick_damage(path)
    if problem is not None:
        return problem
    status = os.stat(path)
    return _wrong_checksum(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _wrong_checksum(path: Path, inode: int, size: int, changed: int) -> str | None:
    del inode, size, changed  # they tell the file from another of the same name
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "its checksums do not match"
    except OSError as error:
        return error.strerror or str(error)
    except Exception:  # as in quick_damage
        return "its table of contents does not fit its entries"


def tensors_of(state: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries, lists and tuples, with their places (``optimizers.grids_0.state.0``)."""
    stack: list[tuple[str, Any, int]] = [("", state, 0)]
    while stack:
        place, value, depth = stack.pop()
        if isinstance(value, Tensor):
            yield place, value
        elif depth > 64:
            raise ValueError("it is nested too deeply")
        elif isinstance(value, dict):
            stack += [(f"{place}.{key}" if place else str(key), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [(f"{place}.{number}", item, depth + 1) for number, item in enumerate(value)]


def record_problem(path: Path, state: Any) -> str | None:
    """Half a sentence if a tensor of a file that was loaded with ``mmap=True`` is not what a record of the file holds.

    Args:
        path: of the file.
        state: what ``torch.load`` has made of it.
    """
    held: dict[int, int] = {}
    try:
        for place, tensor in tensors_of(state):
            if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
                return f"{place} is not a plain tensor"
            storage = tensor.untyped_storage()
            if tensor.numel() * tensor.element_size() > storage.nbytes():
                return f"{place} is larger than what the file holds of it"
            if storage.nbytes():
                held[storage.data_ptr()] = storage.nbytes()
        with zipfile.ZipFile(path) as archive:
            records = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    # The file is mapped as a whole, so what comes first in it comes first in memory.
    stored = [entry.file_size for entry in sorted(records, key=lambda entry: entry.header_offset)]
    if stored != [held[place] for place in sorted(held)]:
        return "the sizes of its tensors are not those of its records"
    return None
