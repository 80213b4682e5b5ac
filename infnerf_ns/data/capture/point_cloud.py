"""Point clouds in PLY files, complete or not at all.

open3d, with which nerfstudio reads them, needs system libraries and fills in 0, 0, 0 for points that a cut file lacks.
trimesh reads them in double precision. What the header promises is compared with the file's size before there is memory
for it, and with what was read after. trimesh is given the vertices alone: of a textured mesh it would open the picture
that the file names, whatever that is, and make several vertices of those that several parts of the picture share.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file

_LARGEST_HEADER = 1 << 16
_BYTES = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "int32", "uint32", "float", "float32"), 4),
    **dict.fromkeys(("double", "float64", "int64", "uint64"), 8),
}
_TEXTURE = ("s", "t", "u", "v", "texture_u", "texture_v", "texcoord", "texnumber")
"""Properties of places in a picture."""


class Cloud(NamedTuple):
    """N points."""

    xyz: Float64[np.ndarray, "n 3"]
    rgb: UInt8[np.ndarray, "n 3"] | None
    """None where the file has no colours"""


def read_ply(path: Path) -> Cloud:
    """The vertices of a PLY file.

    Raises:
        InputError: it cannot be read, or holds less than its header says.
    """
    import trimesh  # takes a second

    promised = _vertices(path)
    if promised == 0:
        return Cloud(np.empty((0, 3)), None)
    try:
        content = trimesh.load(io.BytesIO(_vertices_alone(path.read_bytes())), file_type="ply", process=False)
        xyz = np.asarray(content.vertices, dtype=np.float64)
    except Exception as error:  # trimesh raises what its parsing stumbles over
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if xyz.shape != (promised, 3):
        raise _damaged(path, f"its header promises {promised} points and {len(xyz)} are there")
    colours = getattr(content, "colors", None)  # of a cloud
    if colours is None and hasattr(content, "visual"):  # of a mesh
        colours = getattr(content.visual, "vertex_colors", None) if content.visual.kind == "vertex" else None
    if colours is None or len(colours) != promised:
        return Cloud(xyz, None)
    return Cloud(xyz, np.array(colours, dtype=np.uint8)[:, :3])


def _vertices(path: Path) -> int:
    """The number of points that the header promises, if the file is large enough for them."""
    require_regular_file(path, "the points")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_LARGEST_HEADER)
    except OSError as error:
        raise InputError(f"the points {path} cannot be read ({error}): restore the file") from error
    end = re.search(rb"end_header[ \t]*\r?\n", head)
    if not head.startswith(b"ply") or end is None:
        raise _damaged(path, "it has no PLY header")
    elements = re.split(r"(?m)^element\s+", head[: end.start()].decode("latin-1"))
    least, promised = 0, None
    binary = "binary" in elements[0]
    for element in elements[1:]:
        name, count = (element.split() + ["", ""])[:2]
        if not count.isdigit():
            raise _damaged(path, f"its header has {count[:40]!r} for the number of its {name[:40]}")
        kinds = re.findall(r"(?m)^property\s+(\S+)", element)
        # A number in text takes a digit and a blank; a list at least its length.
        row = sum(_BYTES.get(kind, 1) for kind in kinds) if binary else 2 * len(kinds)
        least += int(count) * row
        if name == "vertex":
            promised = int(count)
    if promised is None:
        raise _damaged(path, "its header names no vertices")
    if least > size - end.end() + 1:  # the last line of a text may have no end
        raise _damaged(path, f"its header promises {promised} points, which need more than its {size} bytes")
    return promised


def _vertices_alone(content: bytes) -> bytes:
    """A PLY file without comments, texture coordinates and what comes behind its vertices, where these come first."""
    end = re.search(rb"end_header[ \t]*\r?\n", content)
    assert end is not None
    lines = [line.split() for line in content[: end.start()].decode("latin-1").splitlines()]
    lines = [line for line in lines if line and line[0] not in ("comment", "obj_info")]
    elements = [number for number, line in enumerate(lines) if line[0] == "element"]
    own = lines[elements[0] :][: elements[1] - elements[0]] if len(elements) > 1 else lines[elements[0] :]
    data = content[end.end() :]
    if own[0][1] == "vertex" and all(line[1] != "list" for line in own[1:]):
        lines, count = [*lines[: elements[0]], *own], int(own[0][2])
        if ["format", "ascii", "1.0"] in lines:
            data = b"\n".join(data.split(b"\n", count)[:count]) + b"\n"
        else:
            data = data[: count * sum(_BYTES[line[1]] for line in own[1:])]
    for number, line in enumerate(lines):
        if line[0] == "property" and line[-1] in _TEXTURE:
            lines[number] = [*line[:-1], f"unused_{line[-1]}"]
    head = "".join(f"{' '.join(line)}\n" for line in [*lines, ["end_header"]])
    return head.encode("latin-1") + data


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"the points {path} are damaged ({why}): copy the file again, or take ply_file_path out to build the tree from"
        " the cameras"
    )
