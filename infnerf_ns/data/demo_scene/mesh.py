"""Triangles that know the flat surface they lie on, so that textures are evaluated and never stored."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from jaxtyping import Float32, Int32, UInt8, UInt32


class Material(IntEnum):
    """What a surface is made of; ``materials`` has one texture for each."""

    GROUND = 0
    BRICK = 1
    PLASTER = 2
    ROOF_TILES = 3
    GRAVEL = 4
    PAVING = 5
    LEAVES = 6
    BARK = 7
    CAR = 8


WINDOWS = 1
"""Flag of a facade or a car: it has windows."""
DOOR = 2
"""Flag of a facade: it has the front door."""


@dataclass
class Surfaces:
    """A table of surfaces. ``u_axis``, ``v_axis`` and ``normal`` are unit vectors, u x v = normal, and a point's
    texture coordinates are its distances from ``origin`` along u and v in metres. A crown of leaves has extent 0, its
    origin is its centre and its axes are unused.
    """

    material: UInt8[np.ndarray, "s"]
    origin: Float32[np.ndarray, "s 3"]
    u_axis: Float32[np.ndarray, "s 3"]
    v_axis: Float32[np.ndarray, "s 3"]
    normal: Float32[np.ndarray, "s 3"]
    extent: Float32[np.ndarray, "s 2"]
    """Width and height of what the texture lays out; of a facade up to the eaves."""
    colour: Float32[np.ndarray, "s 3"]
    """Main reflectance, linear."""
    accent: Float32[np.ndarray, "s 3"]
    """Second reflectance: doors and shutters."""
    seed: UInt32[np.ndarray, "s"]
    flags: UInt8[np.ndarray, "s"]

    def __len__(self) -> int:
        return len(self.material)


@dataclass
class Mesh:
    """``corners[t]`` are the three corners of triangle t, which lies on surface ``surface[t]``."""

    corners: Float32[np.ndarray, "t 3 3"]
    surface: Int32[np.ndarray, "t"]
    surfaces: Surfaces


class MeshBuilder:
    """Collects surfaces many at a time."""

    def __init__(self) -> None:
        self._corners: list[np.ndarray] = []
        self._surface: list[np.ndarray] = []
        self._tables: list[Surfaces] = []
        self._count = 0

    def add(
        self,
        corners: Float32[np.ndarray, "n k 3 3"],
        material: Material,
        origin: Float32[np.ndarray, "n 3"],
        u_axis: Float32[np.ndarray, "n 3"],
        v_axis: Float32[np.ndarray, "n 3"],
        extent: Float32[np.ndarray, "n 2"],
        colour: Float32[np.ndarray, "n 3"],
        accent: Float32[np.ndarray, "n 3"],
        seed: UInt32[np.ndarray, "n"],
        flags: int = 0,
    ) -> None:
        """n surfaces of k triangles each. All but ``corners`` and ``origin`` may be given once for all."""
        count, per_surface = corners.shape[:2]
        u_axis = np.broadcast_to(np.asarray(u_axis, np.float32), (count, 3))
        v_axis = np.broadcast_to(np.asarray(v_axis, np.float32), (count, 3))
        self._corners.append(np.asarray(corners, np.float32).reshape(-1, 3, 3))
        self._surface.append(np.repeat(np.arange(self._count, self._count + count, dtype=np.int32), per_surface))
        self._count += count
        self._tables.append(
            Surfaces(
                material=np.full(count, int(material), np.uint8),
                origin=np.asarray(origin, np.float32),
                u_axis=u_axis,
                v_axis=v_axis,
                normal=np.cross(u_axis, v_axis).astype(np.float32),
                extent=np.broadcast_to(np.asarray(extent, np.float32), (count, 2)),
                colour=np.broadcast_to(np.asarray(colour, np.float32), (count, 3)),
                accent=np.broadcast_to(np.asarray(accent, np.float32), (count, 3)),
                seed=np.broadcast_to(np.asarray(seed, np.uint32), (count,)),
                flags=np.full(count, flags, np.uint8),
            )
        )

    def add_rectangles(
        self,
        material: Material,
        origin: Float32[np.ndarray, "n 3"],
        u_edge: Float32[np.ndarray, "n 3"],
        v_edge: Float32[np.ndarray, "n 3"],
        colour: Float32[np.ndarray, "n 3"],
        accent: Float32[np.ndarray, "n 3"],
        seed: UInt32[np.ndarray, "n"],
        flags: int = 0,
        extent: Float32[np.ndarray, "n 2"] | None = None,
    ) -> None:
        """n rectangles: a corner each and the two edges that leave it, whose cross product points outwards. The texture
        is laid out over the ``extent``, by default the whole rectangle."""
        origin, u_edge, v_edge = (np.asarray(x, np.float32) for x in (origin, u_edge, v_edge))
        b, c, d = origin + u_edge, origin + u_edge + v_edge, origin + v_edge
        corners = np.stack([np.stack([origin, b, c], 1), np.stack([origin, c, d], 1)], 1)
        width = np.linalg.norm(u_edge, axis=-1, keepdims=True)
        height = np.linalg.norm(v_edge, axis=-1, keepdims=True)
        if extent is None:
            extent = np.concatenate([width, height], -1)
        self.add(corners, material, origin, u_edge / width, v_edge / height, extent, colour, accent, seed, flags)

    def add_boxes(
        self,
        material: Material,
        centre: Float32[np.ndarray, "n 3"],
        length_axis: Float32[np.ndarray, "n 3"],
        size: Float32[np.ndarray, "n 3"],
        colour: Float32[np.ndarray, "n 3"],
        accent: Float32[np.ndarray, "n 3"],
        seed: UInt32[np.ndarray, "n"],
        flags: int = 0,
    ) -> None:
        """n upright boxes without a bottom: centre of the bottom, a horizontal unit axis, (length, width, height)."""
        up = np.zeros_like(length_axis)
        up[:, 2] = 1
        side = np.cross(up, length_axis)
        half = size * 0.5
        for forward, forward_half, across_half in (
            (length_axis, half[:, :1], half[:, 1:2]),
            (-length_axis, half[:, :1], half[:, 1:2]),
            (side, half[:, 1:2], half[:, :1]),
            (-side, half[:, 1:2], half[:, :1]),
        ):
            u = np.cross(up, forward)
            origin = centre + forward * forward_half - u * across_half
            self.add_rectangles(material, origin, u * (2 * across_half), up * size[:, 2:], colour, accent, seed, flags)
        top = centre - length_axis * half[:, :1] - side * half[:, 1:2] + up * size[:, 2:]
        self.add_rectangles(material, top, length_axis * size[:, :1], side * size[:, 1:2], colour, accent, seed)

    def build(self) -> Mesh:
        """All that was added, as one mesh."""
        table = {f.name: np.concatenate([getattr(t, f.name) for t in self._tables]) for f in fields(Surfaces)}
        return Mesh(np.concatenate(self._corners), np.concatenate(self._surface), Surfaces(**table))
