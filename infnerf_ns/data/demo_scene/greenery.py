"""Trees and hedges: cheap shapes whose leaves are a texture."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt32

from infnerf_ns.data.demo_scene.mesh import Material, MeshBuilder
from infnerf_ns.data.demo_scene.noise import hash01

TRUNK_SIDES = 6
BARK_COLOUR = np.float32([0.14, 0.09, 0.055])


def _unit_sphere() -> Float32[np.ndarray, "80 3 3"]:
    """The triangles of an icosahedron, each split in four, on the unit sphere."""
    g = (1 + 5**0.5) / 2
    v = np.array([[-1, g, 0], [1, g, 0], [-1, -g, 0], [1, -g, 0], [0, -1, g], [0, 1, g],
                  [0, -1, -g], [0, 1, -g], [g, 0, -1], [g, 0, 1], [-g, 0, -1], [-g, 0, 1]])  # fmt: skip
    gaps = np.linalg.norm(v[:, None] - v[None], axis=-1)
    near = np.isclose(gaps, 2.0)
    faces = [
        (i, j, k) for i in range(12) for j in range(i) for k in range(j) if near[i, j] and near[j, k] and near[i, k]
    ]
    triangles = []
    for face in faces:
        a, b, c = v[list(face)]
        if np.dot(np.cross(b - a, c - a), a) < 0:
            b, c = c, b
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        triangles += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    corners = np.array(triangles)
    return (corners / np.linalg.norm(corners, axis=-1, keepdims=True)).astype(np.float32)


def add_trees(
    builder: MeshBuilder,
    foot: Float32[np.ndarray, "n 3"],
    radius: Float32[np.ndarray, "n"],
    colour: Float32[np.ndarray, "n 3"],
    seed: UInt32[np.ndarray, "n"],
) -> None:
    """n trees: a six-sided trunk and two lumpy balls of leaves, the lower of the given radius (metres)."""
    sphere = _unit_sphere()
    directions, which = np.unique(np.round(sphere.reshape(-1, 3), 5), axis=0, return_inverse=True)
    corner_ids = np.arange(len(directions), dtype=np.int32)
    trunk_height = radius * 1.3
    for ball, (lift, share) in enumerate(((1.9, 1.0), (2.8, 0.68))):
        ball_seed = seed + np.uint32(77 * ball)
        lumps = hash01(
            np.tile(corner_ids, len(seed)), np.zeros(len(seed) * len(corner_ids), np.int32),
            np.repeat(ball_seed, len(corner_ids)),
        ).reshape(len(seed), len(corner_ids))  # fmt: skip
        length = (radius * share)[:, None] * (0.82 + 0.36 * lumps)
        shell = directions[None].astype(np.float32) * length[..., None]
        centre = foot + np.stack([np.zeros_like(radius), np.zeros_like(radius), radius * lift], -1)
        corners = (centre[:, None] + shell)[:, which.reshape(-1)].reshape(len(seed), len(sphere), 3, 3)
        builder.add(
            corners, Material.LEAVES, centre, np.float32([1, 0, 0]), np.float32([0, 1, 0]), np.float32([0, 0]),
            colour, colour, ball_seed,
        )  # fmt: skip
    angle = np.arange(TRUNK_SIDES) * (2 * np.pi / TRUNK_SIDES)
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(TRUNK_SIDES)], -1).astype(np.float32)
    for k in range(TRUNK_SIDES):
        a, b = ring[k], ring[(k + 1) % TRUNK_SIDES]
        thickness = (radius * 0.1)[:, None]
        origin, end = foot + a * thickness, foot + b * thickness
        up = np.zeros_like(foot)
        up[:, 2] = trunk_height
        builder.add_rectangles(Material.BARK, origin, end - origin, up, BARK_COLOUR, BARK_COLOUR, seed)


def add_hedges(
    builder: MeshBuilder,
    centre: Float32[np.ndarray, "n 3"],
    length_axis: Float32[np.ndarray, "n 3"],
    length: Float32[np.ndarray, "n"],
    seed: UInt32[np.ndarray, "n"],
) -> None:
    """n hedges, 0.6 m wide and 1.1 m high."""
    size = np.stack([length, np.full_like(length, 0.6), np.full_like(length, 1.1)], -1)
    green = np.float32([0.06, 0.13, 0.035])
    builder.add_boxes(Material.LEAVES, centre, length_axis, size, green, green, seed, flags=0)
