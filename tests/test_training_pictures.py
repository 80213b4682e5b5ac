"""Pictures of a training: there for every tree, and the model is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from tiny_model import CONE_ALONE, scrambled, tiny_camera, tiny_config, tiny_model

from infnerf_ns.training_pictures import training_pictures

NAMES = {"error", "levels", "octree", "sampling"}


@pytest.mark.parametrize("max_level", [0, 2])
def test_pictures_of_a_training(max_level: int) -> None:
    config = tiny_config(sampler=CONE_ALONE, max_level=max_level)
    model = scrambled(tiny_model(config, active=max_level), 0.5).eval()
    model.field.level_cap = 1
    camera = tiny_camera(CameraType.PERSPECTIVE, 60.0, 48, 32)
    rendered = model.get_outputs_for_camera(camera)["rgb"]
    photo = torch.rand(32, 48, 3)
    pictures = training_pictures(model, camera, photo, rendered)
    assert set(pictures) == NAMES
    assert model.field.level_cap == 1 and model.on_evaluated is None
    for name, picture in pictures.items():
        assert picture.ndim == 3 and picture.shape[2] == 3 and bool(torch.isfinite(picture).all()), name
        assert float(picture.min()) >= 0 and float(picture.max()) <= 1 and float(picture.std()) > 0.01, name
    assert pictures["error"].shape == photo.shape
    model.field.level_cap = None
    other = training_pictures(model, camera, rendered, rendered)
    spread = [float(each["error"].std(dim=(0, 1)).max()) for each in (other, pictures)]
    assert spread[0] < 1e-6 < spread[1], "no error where both agree"
    model.growth.history = torch.ones(3, 4, model.config.octree.max_level + 1, dtype=torch.long)
    assert set(training_pictures(model, camera, photo, rendered)) == NAMES | {"tree_history"}
