"""Damaged and hostile files, by the hundred: every mutation of a file is read by what reads that file, in a process of
its own, and must give the same result as the whole file, a result that its meaning explains, or one line.

    python tests/fuzz.py [KIND ...] [--count 200] [--only NUMBER] [--verbose]

``--only`` repeats one mutation and shows what it printed. Every kind of file is a :class:`Kind`; mutations come from
seeds, so number 17 of a kind is the same on every machine. The parent reads the whole files once, so that everything
is imported and compiled, and forks; nothing is started anew for a mutation.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # not for a program that only imports this: its commands and threads would inherit it
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # the one that survives fork()
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

COUNT = 200
SECONDS = 60
"""that a mutation may take"""
MEMORY = 2 << 30
"""bytes that it may take on top of what the program has before"""
ADDRESS_SPACE = 3 << 30
"""bytes of address space on top of what the program has before; more is refused, so that this machine's does not end"""
_GOOD = ("same", "line", "warned", "other")
BAD = ("traceback", "crash", "hang", "memory", "executed", "lines")
Outcome = Literal["same", "line", "warned", "other", "traceback", "crash", "hang", "memory", "executed", "lines"]


@dataclass(frozen=True)
class Mutation:
    """What becomes of a file."""

    what: str
    """in words"""
    content: bytes | None = None
    """the new content"""
    special: Callable[[Path], None] | None = None
    """puts something else than a file there"""
    may_differ: bool = True
    """another result is what the mutation means"""


@dataclass(frozen=True)
class Kind:
    """A kind of file: where one is, what reads it, and how it is changed."""

    name: str
    files: Callable[[], list[Path]]
    """one of them is changed"""
    read: Callable[[], Any]
    """nested dictionaries, lists and tuples of arrays, numbers and texts"""
    mutate: Callable[[random.Random, bytes], Mutation]


@dataclass
class Result:
    """What came of a mutation."""

    kind: str
    number: int
    what: str
    outcome: Outcome
    wrong: bool
    detail: str
    seconds: float
    megabytes: float
    """peak, on top of what the program had before"""


# What is done to any file


def _flip(rng: random.Random, data: bytes) -> Mutation:
    changed = bytearray(data)
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return Mutation(f"bits flipped at {places}", bytes(changed))


def _cut(rng: random.Random, data: bytes) -> Mutation:
    end = rng.choice((0, 1, len(data) // 2, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))))
    return Mutation(f"cut to {end} of {len(data)} bytes", data[:end], may_differ=False)


def _append(rng: random.Random, data: bytes) -> Mutation:
    size = rng.choice((1, 7, 64, 4096))
    return Mutation(f"{size} bytes appended", data + rng.randbytes(size), may_differ=False)


def _block(rng: random.Random, data: bytes) -> Mutation:
    size = min(rng.choice((16, 512, 4096)), len(data))
    start = rng.randrange(0, len(data) - size + 1)
    fill = rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size)))
    return Mutation(f"{size} bytes overwritten at {start}", data[:start] + fill + data[start + size :])


def _take_out(rng: random.Random, data: bytes) -> Mutation:
    start = rng.randrange(len(data))
    size = rng.choice((1, 4, 8, 100, 4096))
    return Mutation(f"{size} bytes taken out at {start}", data[:start] + data[start + size :])


def _double(rng: random.Random, data: bytes) -> Mutation:
    start = rng.randrange(len(data))
    size = rng.choice((1, 4, 8, 100, 4096))
    return Mutation(f"{size} bytes doubled at {start}", data[: start + size] + data[start:])


_EXTREMES = [
    *(struct.pack("<q", value) for value in (-1, 2**62, 2**63 - 1, 10**12, 0)),
    *(struct.pack("<i", value) for value in (-1, 2**31 - 1, 2**30)),
    *(struct.pack("<d", value) for value in (math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324)),
    *(struct.pack("<f", value) for value in (math.nan, math.inf, 1e38)),
]


def _extreme(rng: random.Random, data: bytes) -> Mutation:
    value = rng.choice(_EXTREMES)
    early = rng.random() < 0.4  # sizes and counts are at the beginning
    start = rng.randrange(max(1, min(64, len(data)) if early else len(data)))
    return Mutation(f"{value.hex()} at {start}", data[:start] + value + data[start + len(value) :])


def _put(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


_SPECIAL = {
    "a FIFO": lambda path: _put(path, os.mkfifo),
    "a folder": lambda path: _put(path, os.mkdir),
    "a link to /dev/zero": lambda path: _put(path, lambda place: place.symlink_to("/dev/zero")),
    "a link to nothing": lambda path: _put(path, lambda place: place.symlink_to("/nowhere/at/all")),
    "a link to itself": lambda path: _put(path, lambda place: place.symlink_to(place)),
    "nothing": lambda path: path.unlink(),
}
_MISSING = ("a link to nothing", "a link to itself", "nothing")


def _special(rng: random.Random, data: bytes) -> Mutation:
    name = rng.choice(list(_SPECIAL))
    return Mutation(f"{name} in its place", special=_SPECIAL[name], may_differ=name in _MISSING)


ANY_FILE = [*[_flip] * 6, *[_cut] * 4, _append, *[_block] * 3, *[_take_out] * 2, _double, *[_extreme] * 4, _special]


def any_file(rng: random.Random, data: bytes) -> Mutation:
    """Of any kind of file."""
    return rng.choice(ANY_FILE)(rng, data)


# What is done to the values in JSON and YAML


def hostile_values(old: Any, marker: str) -> list[Any]:
    """In place of a value."""
    values: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e300, -1e300, 1e-300, math.nan, math.inf]
    values += ["", "text", "1e999", "x" * 100_000, "a\0b", "../../../etc/passwd", "\ud800", [], {}, [[]], [None] * 5]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        values += [-old, old * 1.0001, old * 1000, str(old), [old], old + 0.5]
    if isinstance(old, str):
        values += [old.upper(), old + " ", f"$(touch {marker})", f"./{old}", old[::-1]]
    if isinstance(old, list) and old:
        values += [old[:-1], [*old, old[-1]], [*reversed(old)], {"0": old[0]}, old[0], [old] * 3]
    return values


def _places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _change_value(rng: random.Random, content: Any, marker: str) -> tuple[str, bool]:
    """Changes something in place; in words, and whether another result is what it means."""
    places = list(_places(content))
    depth = rng.randrange(1, 1 + max(map(len, places)))  # top-level keys as often as the numbers of matrices
    place = rng.choice([each for each in places if len(each) <= depth])
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    key, where = place[-1], ".".join(map(str, place))
    how = rng.random()
    if how < 0.15:
        del parent[key]
        return f"without {where}", True
    if how < 0.2 and isinstance(parent, dict):
        parent[rng.choice(("fl_x", "k1", "w", "camera_model", "unknown", ""))] = rng.choice((1, "x", None, [1]))
        return f"a key more beside {where}", True
    value = rng.choice(hostile_values(parent[key], marker))
    parent[key] = value
    infinite = isinstance(value, float) and not math.isfinite(value)
    return f"{where} = {repr(value)[:60]}", not infinite


def _deep(content: Any) -> bytes:
    text = json.dumps(content)
    return (text[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}").encode()


def json_file(marker: str) -> Callable[[random.Random, bytes], Mutation]:
    """Mutations of JSON: two thirds of its values."""

    def mutate(rng: random.Random, data: bytes) -> Mutation:
        if rng.random() < 0.33:
            return any_file(rng, data)
        content = json.loads(data)
        how = rng.random()
        if how < 0.02:
            return Mutation("100,000 brackets", _deep(content))
        if how < 0.05:
            return Mutation("in UTF-16", data.decode().encode("utf-16"), may_differ=False)
        if how < 0.08:
            key = rng.choice(list(content)) if isinstance(content, dict) else "x"
            return Mutation(f"{key} twice", data.rstrip()[:-1] + f', "{key}": 7}}'.encode())
        what, may_differ = _change_value(rng, content, marker)
        return Mutation(what, json.dumps(content).encode("utf-8", "surrogatepass"), may_differ=may_differ)

    return mutate


def yaml_file(marker: str) -> Callable[[random.Random, bytes], Mutation]:
    """Mutations of YAML: values, tags that execute, references that grow."""
    values = [
        f'!!python/object/apply:os.system ["touch {marker}"]',
        f'!!python/object/new:subprocess.Popen [["touch", "{marker}"]]',
        f'!!python/object/apply:subprocess.check_output [["touch", "{marker}"]]',
        f"!!python/object/apply:builtins.exec [\"open('{marker}', 'w')\"]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/object:collections.OrderedDict {}",
        "!!python/object/apply:numpy.zeros [[100000, 100000]]",
        "!!python/tuple [1, 2]",
        "!!binary aGVsbG8=",
        "!unknown 5",
        "&a [*a]",
        "*nothing",
        *("-1", "0", "7", "1e999", ".nan", ".inf", "1" + "0" * 5000, "0x7fffffffffffffff", "1_0", "1:30:00"),
        *("null", "true", "text", "''", "[]", "{}", "[[[]]]", "'" + "x" * 100_000 + "'", "2001-01-01", "? [a]"),
        "&x [1,1,1,1,1,1,1,1]",
    ]
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )

    def mutate(rng: random.Random, data: bytes) -> Mutation:
        how = rng.random()
        if how < 0.25:
            mutation = any_file(rng, data)
            # Settings less have a meaning.
            return replace(mutation, may_differ=mutation.special is None or mutation.may_differ)
        if how < 0.28:
            return Mutation("a billion laughs", (laughs + "b: *a11\n").encode() + data)
        if how < 0.3:
            return Mutation("100,000 brackets", data + b"\ndeep: " + b"[" * 100_000)
        lines = data.decode().split("\n")
        row = rng.choice([row for row, line in enumerate(lines) if ":" in line])
        if how < 0.38:
            return Mutation(
                f"without line {row + 1}: {lines[row].strip()}", "\n".join(lines[:row] + lines[row + 1 :]).encode()
            )
        if how < 0.42:
            return Mutation(f"line {row + 1} twice", "\n".join(lines[: row + 1] + lines[row:]).encode())
        tagged = [row for row, line in enumerate(lines) if "!!python" in line]
        if how < 0.6 and tagged:
            row = rng.choice(tagged)
            start = lines[row].index("!!python")
            value = rng.choice(values)
            lines[row] = lines[row][:start] + value.split(" ")[0]
            return Mutation(f"line {row + 1}: tag {value[:60]}", "\n".join(lines).encode())
        key = lines[row].split(":")[0]
        lines[row] = f"{key}: {rng.choice(values)}"
        return Mutation(f"line {row + 1}: {lines[row].strip()[:80]}", "\n".join(lines).encode())

    return mutate


# What is done to lines of numbers


_WORDS = ["nan", "inf", "-1", "0", "1e300", "1e-300", str(2**63), "1" * 400]
_WORDS += ["text", "", "\u0663", "1,5", "0x10", "1_0", "\0"]


def text_file(rng: random.Random, data: bytes) -> Mutation:
    """COLMAP's text files, and PLY's."""
    if rng.random() < 0.4:
        mutation = any_file(rng, data)
        # A line less, or a digit, has a meaning.
        return replace(mutation, may_differ=mutation.special is None or mutation.may_differ)
    lines = data.decode().split("\n")
    row = rng.randrange(len(lines))
    words = lines[row].split(" ")
    how = rng.random()
    if how < 0.15:
        return Mutation(f"without line {row + 1}", "\n".join(lines[:row] + lines[row + 1 :]).encode())
    if how < 0.25:
        return Mutation(f"line {row + 1} twice", "\n".join(lines[: row + 1] + lines[row:]).encode())
    column = rng.randrange(len(words))
    old, words[column] = words[column], rng.choice(_WORDS)
    lines[row] = " ".join(words)
    # A point that is not a number is no point; poses and lenses that are not must be refused, as in binary files.
    return Mutation(f"line {row + 1}: {words[column][:20]!r} for {old[:20]!r}", "\n".join(lines).encode())


# What is done to checkpoints


def _tensors(content: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield (*path, key), value
        else:
            yield from _tensors(value, (*path, key))


def _hostile_tensors(value: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """In place of a tensor."""
    one = value.reshape(-1)[:1].clone() if value.numel() else torch.zeros(1)
    shapes: dict[str, Callable[[], Any]] = {
        "with a row less": lambda: value[:-1].clone() if value.ndim and len(value) else one,
        "with a row more": lambda: torch.cat([value, value[-1:]]) if value.ndim and len(value) else one.repeat(2),
        "flat": lambda: value.reshape(-1).clone() if value.ndim != 1 else value[None].clone(),
        "transposed": lambda: value.T.clone() if value.ndim == 2 and value.shape[0] != value.shape[1] else value[None],
        "empty": lambda: value.reshape(-1)[:0].clone(),
        "a scalar": lambda: one[0],
        "of 10^12 entries": lambda: one.expand(10**12),
        "of 10^6 rows": lambda: one.reshape([1] * max(1, value.ndim)).expand(10**6, *value.shape[1:]),
        "sparse": lambda: value.float().to_sparse() if value.ndim else one,
        "None": lambda: None,
        "a number": lambda: 7,
        "a text": lambda: "tensor",
        "a list": lambda: [value],
        "complex": lambda: value.to(torch.complex64),
        "bool": lambda: value.bool(),
        "int8": lambda: value.to(torch.int8),
    }
    if value.is_floating_point():
        shapes |= {
            "NaN": lambda: torch.full_like(value, torch.nan),
            "with one NaN": lambda: _with(value, torch.nan),
            "with one infinity": lambda: _with(value, torch.inf),
            "integers": lambda: value.long(),
        }
    else:
        shapes |= {
            "negative": lambda: -1 - value.long(),
            "huge": lambda: _with(value.long(), 2**62),
            "2^31": lambda: _with(value.long(), 2**31),
            "with one -1": lambda: _with(value.long(), -1),
            "reversed": lambda: value.flip(0) if value.ndim and not torch.equal(value, value.flip(0)) else value[None],
            "floats": lambda: value.float() + 0.5,
        }
    return shapes


def _with(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    if value.numel():
        value.reshape(-1)[len(value.reshape(-1)) // 2] = number
    return value


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def checkpoint_file(rng: random.Random, data: bytes) -> Mutation:
    """Damage, which the checksums must show, and other tensors in a file whose checksums are right."""
    how = rng.random()
    if how < 0.5:
        return replace((any_file if how < 0.4 else _zip_entry)(rng, data), may_differ=False)
    state = torch.load(io.BytesIO(data), weights_only=True)
    if how < 0.6:
        parent = rng.choice([state, state["pipeline"], state["pipeline"], *state["optimizers"].values()])
        key = rng.choice(list(parent))
        # Others have written checkpoints without random states and schedulers, and of other steps.
        may_differ = key in ("infnerf", "schedulers", "scalers", "step")
        if rng.random() < 0.7:
            del parent[key]
            return Mutation(f"without {key}", _saved(state), may_differ=may_differ)
        parent[key] = rng.choice((None, 7, "text", [], {}, -1, 2**63, torch.zeros(3)))
        return Mutation(f"{key} = {parent[key]}", _saved(state), may_differ=may_differ)
    tensors = dict(_tensors(state))
    ours = [place for place in tensors if place[0] == "pipeline"]
    place = rng.choice(ours if rng.random() < 0.7 else list(tensors))
    name, make = rng.choice(list(_hostile_tensors(tensors[place]).items()))
    parent = state
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = make()
    # Integers where numbers were are other numbers, and so are node counts and random states.
    may_differ = name == "integers" or place[0] == "infnerf" or "node_samples" in str(place[-1])
    return Mutation(f"{'.'.join(map(str, place))} {name}", _saved(state), may_differ=may_differ)


def _zip_entry(rng: random.Random, data: bytes) -> Mutation:
    """A zip file with something else in it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = rng.choice(list(entries))
    how = rng.choice(("without", "empty", "half", "compressed", "a bomb for", "twice", "renamed"))
    buffer = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if how in ("compressed", "a bomb for") else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for entry, content in entries.items():
            if entry != name:
                archive.writestr(entry, content)
            elif how == "a bomb for":
                with archive.open(entry, "w", force_zip64=True) as stream:
                    for _ in range(300):
                        stream.write(bytes(1 << 20))
            elif how == "renamed":
                archive.writestr("../" + entry, content)
            elif how != "without":
                archive.writestr(entry, {"empty": b"", "half": content[: len(content) // 2]}.get(how, content))
                if how == "twice":
                    import warnings

                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        archive.writestr(entry, content[::-1])
    return Mutation(f"zip: {how} {name}", buffer.getvalue())


def page_file(rng: random.Random, data: bytes) -> Mutation:
    """As any safetensors file, and its numbers have a checksum elsewhere."""
    return replace(safetensors_file(rng, data), may_differ=False)


def safetensors_file(rng: random.Random, data: bytes) -> Mutation:
    """Damage, and other names, types and shapes in the header."""
    if rng.random() < 0.6:
        return any_file(rng, data)
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    what, _ = _change_value(rng, header, "marker")
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return Mutation(f"header: {what}", struct.pack("<Q", len(text)) + text + data[8 + size :])


def npy_file(rng: random.Random, data: bytes) -> Mutation:
    """Damage, and other shapes and types in the header."""
    if rng.random() < 0.5:
        return any_file(rng, data)
    shape = rng.choice(
        ("(1000000, 1000000)", "(24, -32)", "()", "(0, 0)", "(768,)", "(24, 32, 1000000000)", "(2**70,)")
    )
    kind = rng.choice(("<f4", "<f4", "<f4", "|O", "<U1000", ">f8", "<c16", "<i8", "?", "<M8[s]", "f4,f4"))
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return Mutation(f"{kind} {shape}", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data[128:])


# What is read


def _plain(value: Any) -> Any:
    """Without tensors, for comparing and for the pipe."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two results differ; None if they do not."""
    names: list[Any] | None = None
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        one, other, names = list(one.values()), [other[key] for key in one], list(one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = (difference(*pair, f"{place}.{name}") for name, *pair in zip(names or range(len(one)), one, other))
        return next((each for each in found if each is not None), None)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        equal = one.shape == other.shape and np.allclose(one, other, rtol=1e-6, atol=1e-7, equal_nan=True)
        return None if equal else f"{place}: {one.shape} and {other.shape} numbers"
    return None if one == other else f"{place}: {repr(one)[:50]} and {repr(other)[:50]}"


class Workshop:
    """Folders with one file of every kind, and what reads them.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "executed"
        """made by whatever a file has executed"""

    # Captures

    def _transforms(self, name: str, ending: str = ".png", **options: Any) -> Path:
        from tiny_capture import write_capture, write_json

        folder = self.folder / name
        if not folder.exists():
            meta = write_capture(folder, 6, **options)
            for frame in meta["frames"]:
                path = folder / frame["file_path"]
                rows, columns = np.mgrid[:24, :32]
                smooth = np.stack([8 * columns, 10 * rows, 4 * (rows + columns) + len(path.stem)], axis=-1)
                image = Image.fromarray((smooth % 256).astype(np.uint8))
                path.unlink()
                frame["file_path"] = str(Path(frame["file_path"]).with_suffix(ending))
                image.save(folder / frame["file_path"])
            write_json(folder, meta)
        return folder

    def capture(self, folder: Path, colmap: bool = False, depth: bool = False) -> Any:
        """What a training sees of a capture."""
        from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
        from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

        from infnerf_ns.data.pyramid_datamanager import PyramidDataManagerConfig

        parser = ColmapDataParserConfig(colmap_path=Path("sparse/0")) if colmap else NerfstudioDataParserConfig()
        parser.downscale_factor = 1
        config = PyramidDataManagerConfig(
            data=folder, dataparser=parser, use_depth=depth, train_num_rays_per_batch=512, eval_num_rays_per_batch=64
        )
        manager: Any = config.setup()
        torch.manual_seed(0)
        rays, batch = manager.next_train(0)
        scene = manager.train_dataset.metadata["sfm_scene"]
        cameras = manager.train_dataset.cameras
        return _plain(
            {
                "photos": [name.name for name in manager.train_dataset.image_filenames],
                "poses": cameras.camera_to_worlds,
                "lenses": [cameras.fx, cameras.fy, cameras.cx, cameras.cy, cameras.distortion_params],
                "kinds": cameras.camera_type,
                "points": [scene.points, scene.footprints, scene.near],
                "batch": [rays.origins, rays.directions, batch["image"], batch.get("depth", 0)],
            }
        )

    def colmap_folder(self, kind: str) -> Path:
        """A COLMAP capture, binary or text."""
        from stranger_captures import colmap_model, tiny_town, write_binary, write_text

        folder = self.folder / f"colmap-{kind}"
        if not folder.exists():
            scene = tiny_town()
            shutil.copytree(self._transforms("transforms") / "images", folder / "images")
            (write_binary if kind == "bin" else write_text)(folder / "sparse/0", colmap_model(scene))
        return folder

    def depth_folder(self) -> Path:
        """A capture with depth images."""
        from tiny_capture import write_json

        folder = self.folder / "depth"
        if not folder.exists():
            self._transforms("depth")
            meta = json.loads((folder / "transforms.json").read_text())
            for index, frame in enumerate(meta["frames"]):
                frame["depth_file_path"] = f"depth-{index}.npy"
                np.save(folder / frame["depth_file_path"], np.linspace(1, 5, 24 * 32, dtype=np.float32).reshape(24, 32))
            write_json(folder, meta)
        return folder

    # Runs

    @cached_property
    def run(self) -> Path:
        """The folder of a trained run, whose weights look as if it had learnt something."""
        from tiny_model import tiny_config

        from infnerf_ns.presets import load_preset
        from infnerf_ns.torch_compat import allow_numpy_scalars
        from infnerf_ns.training import checkpoints

        allow_numpy_scalars()
        config = load_preset("infnerf", "cpu")
        config.pipeline.model = tiny_config(
            sampler={"interval_footprint": 0.0}, start="full", full_level=1, level_start_steps=1
        )
        config.pipeline.datamanager.dataparser.downscale_factor = 1
        config.pipeline.datamanager.train_num_rays_per_batch = 64
        config.data = config.pipeline.datamanager.data = self._transforms("trained")
        config.output_dir, config.experiment_name, config.timestamp = self.folder / "outputs", "fuzz", "run"
        config.vis, config.max_num_iterations, config.steps_per_save = "tensorboard", 4, 0
        config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0
        config.save_config()
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        trainer.train()
        folder = config.get_base_dir()
        path = checkpoints.list_checkpoints(folder / config.relative_model_dir)[0]
        state = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(9)
        for name, value in state["pipeline"].items():
            if name.startswith(("_model.field.grids", "_model.field.decoders", "_model.field.proposals")):
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
        path.write_bytes(_saved(state))
        return folder

    @cached_property
    def packed(self) -> Path:
        """The same run, packed."""
        from infnerf_ns.cli.pack import pack_run

        folder = pack_run(self.run, half=False, overwrite=False, progress=iter).folder
        assert list(folder.rglob("*.safetensors")), "a tree of the root alone"
        return folder

    def render(self, run: Path) -> Any:
        """A picture by the model of a run, from where a photo was taken, with a longer lens."""
        from infnerf_ns.cli.runs import open_run

        pipeline = open_run(run, test_mode="inference").pipeline
        camera = copy.deepcopy(pipeline.datamanager.train_dataset.cameras[:1])
        camera.fx, camera.fy = 4 * camera.fx, 4 * camera.fy
        with torch.no_grad():
            outputs = pipeline.model.get_outputs_for_camera(camera)
        return _plain({name: outputs[name] for name in ("rgb", "depth", "accumulation")})

    def resume(self) -> Any:
        """A step of a training that goes on from a checkpoint."""
        from infnerf_ns.cli.runs import load_run_config

        writer = sys.modules["nerfstudio.utils.writer"]

        # nerfstudio's writers are of the process, and their threads do not survive fork().
        writer.EVENT_WRITERS, writer.EVENT_STORAGE, writer.GLOBAL_BUFFER = [], [], {}
        config, folder = load_run_config(self.run)
        config.load_dir = folder / config.relative_model_dir
        config.timestamp, config.max_num_iterations = f"resumed-{os.getpid()}", 6
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        trainer.train()
        state = {name: value.detach() for name, value in trainer.pipeline.model.state_dict().items()}
        shutil.rmtree(config.get_base_dir(), ignore_errors=True)
        return _plain({name: value for name, value in state.items() if "field" in name})

    @cached_property
    def camera_path(self) -> Path:
        """As the viewer exports it."""
        path = self.folder / "camera_path.json"
        frame = {"camera_to_world": np.eye(4).reshape(-1).tolist(), "fov": 50.0, "aspect": 1.5}
        crop = {"crop_center": [0.0, 0.0, 0.0], "crop_scale": [1.0, 1.0, 1.0], "crop_rot": [0.0, 0.0, 0.0]}
        content = {
            **{"camera_type": "perspective", "render_height": 16, "render_width": 24, "fps": 24, "seconds": 1.0},
            **{"smoothness_value": 0.5, "is_cycle": False, "keyframes": [], "camera_path": [frame, dict(frame)]},
            "crop": {**crop, "crop_bg_color": {"r": 0, "g": 0, "b": 0}},
        }
        path.write_text(json.dumps(content))
        return path

    def flown(self) -> Any:
        """The first view of a camera path, as infnerf-inspect renders it."""
        from infnerf_ns.cli.inspect_view import look, path_cameras

        cameras = path_cameras(self.camera_path)
        view = look(self._warm_model, cameras[0:1], "first")
        return _plain({"rgb": view.rgb, "pose": view.camera_to_world})

    @cached_property
    def _warm_model(self) -> Any:
        from infnerf_ns.cli.runs import open_run

        return open_run(self.run, test_mode="inference").pipeline.model

    def map(self) -> Any:
        """The frame of a map of the run."""
        from infnerf_ns.map_frame import map_frame

        frame = map_frame(self.run, np.array([0.0, 0.0, 1.0]))
        return _plain(asdict(frame))

    @cached_property
    def preset_file(self) -> Path:
        """A preset of one's own."""
        from infnerf_ns.presets import presets_folder

        return Path(shutil.copy(presets_folder() / "infnerf-small.yaml", self.folder / "preset.yaml"))

    def preset(self) -> Any:
        """Its settings."""
        from infnerf_ns.presets import load_preset

        return repr(load_preset(self.preset_file, "cpu"))

    def kinds(self) -> dict[str, Callable[[str], Kind]]:
        """What makes each kind of file, by its name."""
        marker = str(self.marker)

        def photo(ending: str) -> Kind:
            folder = self._transforms(f"photos{ending}", ending)
            return Kind(
                f"photo {ending}",
                lambda: sorted(folder.glob(f"images/*{ending}")),
                lambda: self.capture(folder),
                any_file,
            )

        def colmap(kind: str, name: str) -> Kind:
            folder = self.colmap_folder(kind)
            return Kind(
                f"{name}.{kind}",
                lambda: [folder / f"sparse/0/{name}.{kind}"],
                lambda: self.capture(folder, colmap=True),
                any_file if kind == "bin" else text_file,
            )

        def ply(form: str, mutate: Callable[[random.Random, bytes], Mutation]) -> Kind:
            from stranger_captures import write_ply
            from tiny_capture import points

            folder = self._transforms(f"ply-{form}")
            write_ply(folder / "sparse_pc.ply", points(), np.full((60, 3), 128, np.uint8), form)
            return Kind(
                f"ply {form.split('_')[0]}", lambda: [folder / "sparse_pc.ply"], lambda: self.capture(folder), mutate
            )

        def checkpoint(name: str, run: Callable[[], Path], read: Callable[[], Any]) -> Kind:
            return Kind(name, lambda: sorted((run() / "nerfstudio_models").iterdir()), read, checkpoint_file)

        def one(path: Callable[[], Path], read: Callable[[], Any], mutate: Callable) -> Callable[[str], Kind]:
            return lambda name: Kind(name, lambda: [path()], read, mutate)

        def of_run(name: str) -> Callable[[], Path]:
            return lambda: self.run / name

        def rendered() -> Any:
            return self.render(self.run)

        def packed() -> Any:
            return self.render(self.packed)

        plain, masks = self._transforms("transforms"), self._transforms("masks", masks=True)
        return {
            "transforms.json": one(lambda: plain / "transforms.json", lambda: self.capture(plain), json_file(marker)),
            **{
                f"{name}.{kind}": lambda _, kind=kind, name=name: colmap(kind, name)
                for kind in ("bin", "txt")
                for name in ("cameras", "images", "points3D")
            },
            "ply ascii": lambda _: ply("ascii", text_file),
            "ply binary": lambda _: ply("binary_little_endian", any_file),
            **{f"photo {ending}": lambda _, ending=ending: photo(ending) for ending in (".png", ".jpg", ".tif")},
            "mask": lambda name: Kind(
                name, lambda: sorted(masks.glob("masks/*")), lambda: self.capture(masks), any_file
            ),
            "depth .npy": lambda name: Kind(
                name,
                lambda: sorted(self.depth_folder().glob("*.npy")),
                lambda: self.capture(self.depth_folder(), depth=True),
                npy_file,
            ),
            "checkpoint": lambda name: checkpoint(name, lambda: self.run, rendered),
            "checkpoint, resumed": lambda name: checkpoint(name, lambda: self.run, self.resume),
            "packed checkpoint": lambda name: checkpoint(name, lambda: self.packed, packed),
            "page": lambda name: Kind(
                name, lambda: sorted((self.packed / "pages").rglob("*.safetensors")), packed, page_file
            ),
            "capture.safetensors": one(of_run("capture.safetensors"), rendered, safetensors_file),
            "config.yml": one(of_run("config.yml"), rendered, yaml_file(marker)),
            "dataparser_transforms.json": one(of_run("dataparser_transforms.json"), self.map, json_file(marker)),
            "preset": one(lambda: self.preset_file, self.preset, yaml_file(marker)),
            "camera path": one(lambda: self.camera_path, self.flown, json_file(marker)),
        }


# Running


@contextmanager
def _silence(log: Path) -> Iterator[None]:
    """stdout and stderr of this process and its threads go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, number in zip(saved, (1, 2)):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_child(kind: Kind, expected: Any) -> tuple[Outcome, str]:
    from infnerf_ns.errors import InputError

    try:
        found = difference(expected, kind.read())
        return ("same", "") if found is None else ("other", found)
    except InputError as error:
        message = str(error)
        good = message.startswith("infnerf: ") and "\n" not in message and len(message) < 3000
        return ("line" if good else "lines"), message[:2000]
    except MemoryError:
        return "memory", traceback.format_exc()[-1500:]
    except BaseException as error:
        refused = "allocate memory" in str(error)
        return ("memory" if refused else "traceback"), traceback.format_exc()[-1500:]


def run_mutation(kind: Kind, number: int, expected: Any, workshop: Workshop, verbose: bool = False) -> Result:
    """Reads a mutated file in a child process."""
    rng = random.Random(f"{kind.name} {number}")
    path = rng.choice(kind.files())
    original, status = path.read_bytes(), path.stat()
    mutation = kind.mutate(rng, original)
    log = workshop.folder / "log"
    try:
        if mutation.special is not None:
            mutation.special(path)
        else:
            assert mutation.content is not None
            path.write_bytes(mutation.content)
        start = time.monotonic()
        outcome, detail, peak = _fork(kind, expected, log)
        seconds = time.monotonic() - start
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.exists() or path.is_symlink():
            path.unlink()
        path.write_bytes(original)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    if workshop.marker.exists():
        workshop.marker.unlink()
        outcome, detail = "executed", "the file has executed a command"
    if outcome not in BAD and peak > MEMORY:
        outcome, detail = "memory", f"{peak >> 20} MiB; {detail}"
    if outcome not in ("same",) and b"Traceback (most recent call last)" in log.read_bytes():
        outcome, detail = "traceback", log.read_text(errors="replace")[-1500:]
    warnings = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("infnerf: warning: ")]
    if outcome == "other" and any(path.name in line for line in warnings):
        outcome = "warned"
    if verbose:
        print(log.read_text(errors="replace")[-6000:])
    wrong = outcome in BAD or (outcome == "other" and not mutation.may_differ)
    return Result(kind.name, number, f"{path.name}: {mutation.what}", outcome, wrong, detail, seconds, peak / 2**20)


def _fork(kind: Kind, expected: Any, log: Path) -> tuple[Outcome, str, int]:
    """Outcome, what is known of it, and bytes at the peak on top of those before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (space + ADDRESS_SPACE, space + ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(writing, struct.pack("<q", _resident()))
            with _silence(log):
                answer = _in_child(kind, expected)
            os.write(writing, json.dumps(answer).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        before, answer = struct.unpack("<q", pipe.read(8))[0], pipe.read()
    _, status, usage = os.wait4(child, 0)
    peak = max(0, usage.ru_maxrss * 1024 - before)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGALRM:
            return "hang", f"longer than {SECONDS} s", peak
        return "crash", signal.Signals(number).name, peak
    if not answer:
        return "crash", "ended without a word", peak
    outcome, detail = json.loads(answer)
    return outcome, detail, peak


def run(
    workshop: Workshop, names: list[str], count: int, only: int | None, told: Callable[[Result], None], verbose: bool
) -> list[Result]:
    """All mutations of the kinds with these names (none: of all)."""
    results = []
    makers = workshop.kinds()
    for name in names or makers:
        with _silence(workshop.folder / "log-whole"):
            kind = makers[name](name)
            expected = kind.read()
            again = difference(expected, kind.read())
        assert again is None, f"{kind.name}: the whole file gives two results: {again}"
        for number in [only] if only is not None else range(count):
            results.append(run_mutation(kind, number, expected, workshop, verbose))
            told(results[-1])
        print("  ".join(table([each for each in results if each.kind == name])[1]), flush=True)
    return results


def table(results: list[Result]) -> list[tuple[str, ...]]:
    """Rows of outcomes by kind, with a head: the same result as the whole file's, one line, another result and a
    warning that names the file, another result that the changed file means; and how many are wrong."""
    rows = [("kind of file", "mutations", *_GOOD, "wrong", "seconds", "slowest", "peak MiB")]
    for name in dict.fromkeys(result.kind for result in results):
        mine = [result for result in results if result.kind == name]
        counts = Counter(result.outcome for result in mine)
        seconds = [result.seconds for result in mine]
        numbers = [len(mine), *(counts[outcome] for outcome in _GOOD), sum(result.wrong for result in mine)]
        peak = max(result.megabytes for result in mine)
        rows.append((name, *map(str, numbers), f"{sum(seconds):.0f}", f"{max(seconds):.1f}", f"{peak:.0f}"))
    return rows


def main() -> None:
    """From the command line; ends with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="kinds of files; default: all")
    parser.add_argument("--count", type=int, default=COUNT, help="mutations of each kind")
    parser.add_argument("--only", type=int, help="this mutation alone")
    parser.add_argument("--verbose", action="store_true", help="show what was printed")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))

    def told(result: Result) -> None:
        if result.wrong or given.only is not None:
            detail = result.detail if given.only is not None else result.detail[-300:]
            print(f"{result.kind} {result.number}: {result.outcome}: {result.what}\n    {detail}", flush=True)

    with tempfile.TemporaryDirectory(prefix="infnerf-fuzz-") as folder:
        results = run(Workshop(Path(folder)), given.kinds, given.count, given.only, told, given.verbose)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results]))
    for row in table(results):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, (28, 9, 5, 5, 6, 5, 5, 7, 7, 8))))
    sys.exit(any(result.wrong for result in results))


if __name__ == "__main__":
    main()
