"""What the commands left behind, for the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from commands import TOWN, Trained
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from PIL import Image
from scipy.spatial import cKDTree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infnerf_ns.data.demo_dataparser import InfNeRFDemoDataParserConfig

WIDTH, HEIGHT = TOWN["image_width"], TOWN["image_height"]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("Train Loss")}


def picture(path: Path) -> np.ndarray:
    """An image file [H, W, 3], 0..1."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255


def town(trained: Trained, split: str) -> DataparserOutputs:
    """What the trainings see."""
    config = InfNeRFDemoDataParserConfig(**TOWN, cache_dir=trained.workplace.town_cache)
    return config.setup().get_dataparser_outputs(split=split)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def share_on_surface(points: np.ndarray, trained: Trained) -> float:
    """Share of the points above the town's block that lie within 2 m of a surface point of the town."""
    core = points[(np.abs(points[:, :2]) < 0.8).all(axis=1)]
    assert len(core) > 300
    surface = cKDTree(town(trained, "train").metadata["points3D_xyz"].numpy())
    return float((surface.query(core)[0] < 0.05).mean())
