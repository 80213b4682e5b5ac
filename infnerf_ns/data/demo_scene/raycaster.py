"""Rays against triangles with Embree, through ``embreex`` or, where that has no wheel, through Open3D.

Both come with nerfstudio (``embreex`` as a dependency of viser's yourdfpy, except on Linux on ARM). ``embreex`` is
asked first because it needs no system library; importing Open3D needs libusb.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int32

from infnerf_ns.errors import InputError


class EmbreexRays:
    """Rays by ``embreex``. Calls release the GIL, so photos can be rendered in threads."""

    def __init__(self, triangles: Float32[np.ndarray, "t 3 3"]) -> None:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self._scene = EmbreeScene()
        self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(triangles, np.float32))

    def cast(
        self, origins: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"]
    ) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
        """First triangle on each ray (none: -1) and how far along it (none: inf), in units of the direction."""
        hits = self._scene.run(_contiguous(origins), _contiguous(directions), output=True)
        return hits["primID"], np.where(hits["primID"] < 0, np.float32(np.inf), hits["tfar"])

    def blocked(
        self,
        origins: Float32[np.ndarray, "n 3"],
        directions: Float32[np.ndarray, "n 3"],
        until: Float32[np.ndarray, "n"],
    ) -> Bool[np.ndarray, "n"]:
        """Does anything lie on each ray before ``until``, in units of the direction's length?"""
        hits = self._scene.run(
            _contiguous(origins), _contiguous(directions), dists=_contiguous(until), query="OCCLUDED"
        )
        return hits >= 0


class Open3DRays:
    """The same by Open3D."""

    def __init__(self, triangles: Float32[np.ndarray, "t 3 3"]) -> None:
        import open3d

        self._tensor = open3d.core.Tensor
        self._scene = open3d.t.geometry.RaycastingScene()
        corners = np.ascontiguousarray(triangles.reshape(-1, 3), np.float32)
        faces = np.arange(len(corners), dtype=np.uint32).reshape(-1, 3)
        self._scene.add_triangles(self._tensor(corners), self._tensor(faces))

    def cast(
        self, origins: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"]
    ) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
        """As :meth:`EmbreexRays.cast`."""
        hits = self._scene.cast_rays(self._rays(origins, directions), nthreads=1)
        return hits["primitive_ids"].numpy().view(np.int32), hits["t_hit"].numpy()

    def blocked(
        self,
        origins: Float32[np.ndarray, "n 3"],
        directions: Float32[np.ndarray, "n 3"],
        until: Float32[np.ndarray, "n"],
    ) -> Bool[np.ndarray, "n"]:
        """As :meth:`EmbreexRays.blocked`."""
        ends = np.asarray(until, np.float32)[:, None]
        rays = self._rays(origins, directions * ends)
        return self._scene.test_occlusions(rays, tnear=0.0, tfar=1.0, nthreads=1).numpy()

    def _rays(self, origins, directions):
        return self._tensor(np.concatenate([origins, directions], -1).astype(np.float32))


RayCaster: TypeAlias = EmbreexRays | Open3DRays
"""Either of the two; they have the same methods."""


def make_raycaster(triangles: Float32[np.ndarray, "t 3 3"]) -> RayCaster:
    """The ray caster that is installed. Raises :class:`InputError` if none can be imported."""
    reasons = []
    for engine in (EmbreexRays, Open3DRays):
        try:
            return engine(triangles)
        except ImportError as error:
            reasons.append(str(error))
    raise InputError(
        f"the demo scene needs a ray caster and none can be imported ({'; '.join(reasons)}): "
        "run `pip install embreex`, or install Open3D's system libraries (`apt-get install libusb-1.0-0`)"
    )


def _contiguous(x: np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.ascontiguousarray(x, dtype=np.float32)
