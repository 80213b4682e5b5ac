"""ns-viewer in a real browser: headless Chromium opens the page and the rendered village appears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from browser import CHROMIUM, SCENE, resolution, steady, viewer_page
from commands import Trained, trained_run
from nerfstudio.utils import colormaps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return trained_run(tmp_path_factory.getbasetemp())


@dataclass
class Seen:
    """What a visitor of the viewer sees."""

    rendered: np.ndarray
    depth: np.ndarray
    outputs: list[str]


@pytest.fixture(scope="module")
def seen(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    with viewer_page(trained.config, tmp_path_factory.mktemp("browser"), trained.workplace.logs / "viewer") as page:
        page.wait_for("the final render", lambda: resolution(page) >= 400)
        rendered = steady(page, "rgb")
        outputs = page.choose("Output type", "depth")
        page.wait_for("the depth", lambda: _in_depth_colors(page.screenshot("depth")) > 0.5)
        yield Seen(rendered, page.screenshot("depth"), outputs)


def _in_depth_colors(picture: np.ndarray) -> float:
    """Share of the scene's area in colours of nerfstudio's map for depths."""
    colors = 255 * colormaps.apply_float_colormap(torch.linspace(0, 1, 256)[:, None], "turbo").numpy()
    off = np.abs(picture[SCENE][::4, ::4, None] - colors).max(axis=-1).min(axis=-1)
    return float((off < 32).mean())


def test_the_page_shows_the_scene(seen: Seen) -> None:
    rendered = seen.rendered[SCENE]
    assert rendered.std(axis=(0, 1)).max() > 15  # not one colour
    assert len(np.unique(rendered.astype(int).reshape(-1, 3), axis=0)) > 500
    # Red roofs and green meadows are colours of that map, too, but most of the scene is not.
    assert _in_depth_colors(seen.rendered) < 0.5 * _in_depth_colors(seen.depth)


def test_the_dropdown_lists_the_outputs(seen: Seen) -> None:
    assert {"rgb", "depth", "expected_depth", "accumulation", "level", "node", "normals"} <= set(seen.outputs)


def test_another_output_is_shown_when_chosen(seen: Seen) -> None:
    assert np.abs(seen.depth[SCENE] - seen.rendered[SCENE]).mean() > 10
    assert seen.depth[SCENE].std(axis=(0, 1)).max() > 5
