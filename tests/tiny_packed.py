"""A model of a few kilobytes, its pages in files, and a second model that streams them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from nerfstudio.cameras.cameras import CameraType
from tiny_model import CONE_ALONE, scrambled, tiny_camera, tiny_config, tiny_model, tiny_scene
from torch import Tensor

from infnerf_ns.model import InfNeRFModel, InfNeRFModelConfig
from infnerf_ns.presets import load_preset
from infnerf_ns.streaming.node_cache import NodeCache
from infnerf_ns.streaming.packing import small_state, write_pages
from infnerf_ns.streaming.page_files import PageFiles
from infnerf_ns.training import checkpoints

DEPTH = 3


@dataclass
class TinyPacked:
    """A model and where its pages are."""

    model: InfNeRFModel
    pages: Path
    state: dict[str, Tensor]
    """small"""
    rounding: float

    def load(self, budget_mib: int = 1024) -> InfNeRFModel:
        """The same model, streamed."""
        config = packed_config()
        config.field, config.octree, config.sampler = (
            getattr(self.model.config, part) for part in ("field", "octree", "sampler")
        )
        config.streaming.pages, config.streaming.budget_mib = self.pages, budget_mib
        streamed = tiny_model(config, active=0)
        streamed.load_state_dict(dict(self.state))
        return streamed.eval()

    def cache(self, nodes: int) -> NodeCache:
        """A cache with room for that many nodes beside the root."""
        field = self.model.field
        files = PageFiles(self.pages, field.octree, field.pages, self.state["field.page_checksums"])
        page = 4 * sum(field.pages.node_page(1).values())
        return NodeCache(field.octree, files, 1000, 1000 + nodes * page, "cpu")


MANY_SAMPLES = {"samples": 96}
"""Intervals so short that views touch much of the tree all the same."""


def packed_config(field: dict | None = None, sampler: dict | None = None) -> InfNeRFModelConfig:
    """A tree of four levels."""
    return tiny_config(field, sampler or CONE_ALONE, max_level=DEPTH)


def tiny_packed(folder: Path, half: bool = False, field: dict | None = None, sampler: dict | None = None) -> TinyPacked:
    """Writes the pages of a model that looks as if it had learnt something."""
    model = scrambled(tiny_model(packed_config(field, sampler), tiny_scene(count=4000), active=DEPTH)).eval()
    assert model.field.octree.nodes_per_level[DEPTH] > 8
    state = {name: value.detach() for name, value in model.state_dict().items()}
    pages = folder / "pages"
    checksums, rounding = write_pages(state, model.field.octree, model.field.pages, pages, half, iter)
    return TinyPacked(model, pages, small_state(state, model.field.octree, model.field.pages, checksums), rounding)


def tiny_run(folder: Path) -> Path:
    """A run's folder with config.yml and one checkpoint, as ns-train leaves it."""
    config = load_preset("infnerf", "cpu")
    config.pipeline.model = packed_config()
    config.output_dir, config.experiment_name, config.timestamp = folder, "scene", "run"
    run = config.get_base_dir()
    state = {f"_model.{name}": value.detach() for name, value in tiny_packed(folder).model.state_dict().items()}
    failure = checkpoints.write_checkpoint(
        {"step": 7, "pipeline": {**state, "datamanager.kept": torch.ones(1)}, "optimizers": {}},
        checkpoints.checkpoint_path(run / config.relative_model_dir, 7),
        keep=None,
    )
    assert failure is None
    (run / "config.yml").write_text(yaml.dump(config))
    return run


CAMERAS = {
    "perspective": (CameraType.PERSPECTIVE, 60.0),
    "close": (CameraType.PERSPECTIVE, 3000.0),
    "fisheye": (CameraType.FISHEYE, 20.0),
    "equirectangular": (CameraType.EQUIRECTANGULAR, 12.0),
    "orthographic": (CameraType.ORTHOPHOTO, 200.0),
}


def camera(kind: str):  # noqa: ANN201
    return tiny_camera(*CAMERAS[kind], width=48, height=32)


def differences(one: InfNeRFModel, other: InfNeRFModel, kind: str) -> dict[str, float]:
    """Largest difference of each output."""
    a, b = one.get_outputs_for_camera(camera(kind)), other.get_outputs_for_camera(camera(kind))
    assert a.keys() == b.keys() and a["rgb"].std() > 0.01
    return {name: float((a[name] - b[name]).abs().max()) for name in a}
