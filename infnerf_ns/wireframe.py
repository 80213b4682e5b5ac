"""The cubes of an octree as lines: glTF files of one LINES primitive, for viewers that know no line segments.

Format: glTF 2.0, sections 3.7.2 (primitives) and 4 (binary glTF); https://registry.khronos.org/glTF/specs/2.0
"""

from __future__ import annotations

import json
import struct

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from infnerf_ns.octree import Octree

_EDGES = torch.tensor(
    [[*corner, axis] for axis in range(3) for corner in np.ndindex(2, 2, 2) if corner[axis] == 0], dtype=torch.long
)
"""[12, 4]: of the unit cube; corner at which an edge starts, and the axis along which it runs."""
_FLOAT, _LINES, _VERTICES = 5126, 1, 34962


def cube_edges(octree: Octree, nodes: Int[Tensor, "n"]) -> Float[Tensor, "E 2 3"]:
    """Start and end of the edges of nodes' cubes, world; an edge that cubes share is named once.

    Args:
        octree: the tree.
        nodes: all of one level.
    """
    level, coords = int(octree.level[nodes[0]]), octree.coords[nodes].cpu()
    cells = torch.cat([coords, torch.zeros_like(coords[:, :1])], dim=1)
    edges = torch.unique((cells[:, None] + _EDGES).flatten(0, 1), dim=0)
    start = edges[:, :3]
    end = start + torch.eye(3, dtype=torch.long)[edges[:, 3]]
    return octree.cube.to_world(torch.stack([start, end], dim=1).double() / 2**level).float()


def lines_gltf(lines: Float[np.ndarray, "E 2 3"], color: Float[np.ndarray, "3"]) -> bytes:
    """A binary glTF file of line segments in one colour.

    Args:
        lines: at least one segment.
        color: red, green, blue as on a screen (sRGB), 0..1.
    """
    vertices = np.ascontiguousarray(lines.reshape(-1, 3), dtype="<f4")
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": _LINES, "material": 0}]}],
        "materials": [
            {
                "pbrMetallicRoughness": {"baseColorFactor": [*map(float, linear), 1.0]},
                "extensions": {"KHR_materials_unlit": {}},
            }
        ],
        "extensionsUsed": ["KHR_materials_unlit"],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": _FLOAT,
                "count": len(vertices),
                "type": "VEC3",
                "min": vertices.min(axis=0).tolist(),
                "max": vertices.max(axis=0).tolist(),
            }
        ],
        "bufferViews": [{"buffer": 0, "byteLength": vertices.nbytes, "target": _VERTICES}],
        "buffers": [{"byteLength": vertices.nbytes}],
    }
    text = json.dumps(scene).encode()
    chunks = b""
    for kind, data in ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", vertices.tobytes())):
        chunks += struct.pack("<I", len(data)) + kind + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
