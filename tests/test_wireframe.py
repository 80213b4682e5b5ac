"""The octree as lines: which edges, where, and what a reader of glTF finds in the file."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from tiny_field import tiny_cube, tiny_tree

from infnerf_ns.octree import Octree
from infnerf_ns.tree_colors import level_colors, node_colors
from infnerf_ns.wireframe import cube_edges, lines_gltf


def two_levels(octants: list[tuple[int, int, int]]) -> Octree:
    """A root and the given children."""
    level = torch.tensor([0] + [1] * len(octants))
    coords = torch.tensor([(0, 0, 0), *octants])
    return Octree(tiny_cube(), level, coords, level - 1, node_resolution=16)


def read_gltf(data: bytes) -> tuple[dict, np.ndarray]:
    """The description and the vertices [V, 3] of a binary glTF file."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data)) and length % 4 == 0
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    binary, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert kind == b"BIN\0" and 28 + size + binary == length
    scene = json.loads(data[20 : 20 + size])
    assert scene["buffers"][0]["byteLength"] == binary
    return scene, np.frombuffer(data[28 + size :], "<f4").reshape(-1, 3)


@pytest.mark.parametrize(
    ("octants", "edges"),
    [
        ([(0, 0, 0)], 12),
        ([(0, 0, 0), (1, 0, 0)], 20),  # they share a face
        ([(0, 0, 0), (1, 1, 0)], 23),  # an edge
        ([(0, 0, 0), (1, 1, 1)], 24),  # a corner
        ([tuple(each) for each in np.ndindex(2, 2, 2)], 54),
    ],
)
def test_edges_that_cubes_share_are_drawn_once(octants: list, edges: int) -> None:
    tree = two_levels(octants)
    lines = cube_edges(tree, torch.arange(1, tree.num_nodes))
    assert lines.shape == (edges, 2, 3)
    assert torch.allclose((lines[:, 1] - lines[:, 0]).norm(dim=-1), torch.tensor(tree.cube.side / 2))


@pytest.mark.parametrize("node", [0, 3, -1])
def test_the_edges_of_a_node_are_those_of_its_cube(node: int) -> None:
    tree = tiny_tree()
    nodes = torch.arange(tree.num_nodes)[[node]]
    unit = tree.cube.to_unit(cube_edges(tree, nodes)) * 2 ** int(tree.level[node]) - tree.coords[node]
    assert torch.allclose(unit, unit.round(), atol=1e-4)
    corners = {tuple(corner) for corner in unit.round().long().flatten(0, 1).tolist()}
    assert corners == set(np.ndindex(2, 2, 2))
    assert torch.equal((unit[:, 1] - unit[:, 0]).round().abs().sum(dim=-1), torch.ones(12))


def test_a_file_holds_the_lines_and_their_colour() -> None:
    lines = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    color = np.array([0.2, 0.02, 1.0])
    scene, vertices = read_gltf(lines_gltf(lines, color))
    assert np.array_equal(vertices.reshape(7, 2, 3), lines)
    (primitive,) = scene["meshes"][0]["primitives"]
    assert primitive["mode"] == 1, "LINES"
    accessor = scene["accessors"][primitive["attributes"]["POSITION"]]
    assert accessor["count"] == 14 and accessor["componentType"] == 5126
    assert np.allclose(accessor["min"], lines.min(axis=(0, 1))) and np.allclose(accessor["max"], lines.max(axis=(0, 1)))
    linear = scene["materials"][primitive["material"]]["pbrMetallicRoughness"]["baseColorFactor"]
    assert linear == pytest.approx([0.0331, 0.00155, 1.0, 1.0], rel=1e-2), "glTF's colours are linear"


def test_levels_have_the_colours_of_the_output_level() -> None:
    colors = level_colors(torch.arange(5.0), 4)
    blue, red = colors[1], colors[4]
    assert blue[2] > 0.9 > blue[0] and red[0] > 0.4 > red[2]
    assert torch.allclose(level_colors(torch.tensor([7.0, -1.0]), 4), colors[[4, 0]])
    assert torch.equal(level_colors(torch.zeros(1), 0), colors[:1]), "a root alone"


def test_nodes_are_told_apart_by_their_colours() -> None:
    cells = torch.tensor(list(np.ndindex(4, 4, 4)))
    level = torch.cat([torch.full((64,), 2), torch.full((64,), 3)])
    colors = node_colors(level, torch.cat([cells, cells]))
    assert colors.min() >= 0 and colors.max() <= 1 and bool((colors.amax(dim=1) >= 0.6).all())
    different = torch.cdist(colors, colors) > 0.05
    assert different.float().mean() > 0.97
    assert bool(different[range(127), range(1, 128)].float().mean() > 0.95), "neighbours"
    order = torch.randperm(128)
    assert torch.equal(node_colors(level[order], torch.cat([cells, cells])[order]), colors[order])
