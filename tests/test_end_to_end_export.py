"""ns-export of a real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from commands import TOWN, Trained, run_all
from nerfstudio.cameras.rays import RayBundle
from results import picture, share_on_surface, town

from infnerf_ns.sampler import LoDSampler, SamplerConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(trained: Trained) -> Path:
    """A folder with everything that ns-export exports, by kind, in small."""
    attempt = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True)
    if attempt.returncode != 0:
        pytest.skip(f"ns-export needs open3d, which does not load: {attempt.stderr.strip().splitlines()[-1]}")
    folder = trained.workplace.folder / "exports"
    texture = ["--num-pixels-per-side", 128, "--target-num-faces", 300]
    points = ["--num-points", 3000, "--num-rays-per-batch", 2048]
    kinds = {"pointcloud": points, "tsdf": ["--resolution", 32, *texture], "poisson": [*points, *texture]}
    kinds["cameras"] = []
    commands = {
        f"export_{kind}": ["ns-export", kind, "--load-config", trained.config, "--output-dir", folder / kind, *flags]
        for kind, flags in kinds.items()
    }
    for finished in run_all(commands, trained.workplace.logs).values():
        finished.succeeded()
    return folder


def test_exported_points_lie_on_the_town(exports: Path, trained: Trained) -> None:
    file = exports / "pointcloud" / "point_cloud.ply"
    assert b" nx\n" in file.read_bytes()[:500]
    cloud = trimesh.load(file)
    assert len(cloud.vertices) > 1000 and np.isfinite(cloud.vertices).all()
    assert np.asarray(cloud.colors)[:, :3].std(axis=0).min() > 10
    mesh = trimesh.load(exports / "poisson" / "poisson_mesh.ply")  # the voxels of the small tsdf are coarser than 2 m
    for vertices in (cloud.vertices, mesh.vertices):
        assert share_on_surface(vertices, trained) > 0.35
        assert share_on_surface(vertices + (0, 0, 0.2), trained) < 0.25, "a shifted one would be noticed"


@pytest.mark.parametrize("kind, mesh_file", [("tsdf", "tsdf_mesh.ply"), ("poisson", "poisson_mesh.ply")])
def test_exported_mesh_has_a_texture(exports: Path, kind: str, mesh_file: str) -> None:
    mesh = trimesh.load(exports / kind / mesh_file)
    assert len(mesh.faces) > 100 and np.isfinite(mesh.vertices).all()
    assert len(trimesh.load(exports / kind / "mesh.obj").faces) > 50
    assert picture(exports / kind / "material_0.png").std(axis=(0, 1)).max() > 0.03


def test_texture_rays_are_rendered_where_they_are() -> None:
    """Texture export renders rays shorter than the near plane, which must not push them through the mesh."""
    sampler = LoDSampler(SamplerConfig(), near=0.3, bend=5.0).eval()
    ones = torch.ones(4, 1)
    rays = RayBundle(torch.zeros(4, 3), torch.eye(3)[[0, 1, 2, 0]], ones, nears=0 * ones, fars=0.02 * ones)
    samples, _, _ = sampler(rays, lambda positions, footprints: torch.ones(len(positions)), step=0)
    assert samples.frustums.ends.max() <= 0.02 + 1e-6
    assert ((samples.frustums.starts < 0.01) & (samples.frustums.ends > 0.01)).any(dim=1).all()


def test_exported_cameras_are_those_of_the_capture(exports: Path, trained: Trained) -> None:
    frames = {
        split: json.loads((exports / "cameras" / f"transforms_{split}.json").read_text()) for split in ("train", "eval")
    }
    assert len(frames["train"]) + len(frames["eval"]) == TOWN["num_photos"]
    poses = np.array([frame["transform"] for frame in frames["eval"]])
    np.testing.assert_allclose(poses[:, :3], town(trained, "test").cameras.camera_to_worlds.numpy(), atol=1e-5)
