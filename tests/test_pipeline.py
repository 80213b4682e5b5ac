"""The evaluation of one held-out photo, on renders whose error is known at every pyramid level."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from tiny_model import tiny_camera
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.image_metrics import image_metrics
from infnerf_ns.model import APPEARANCE
from infnerf_ns.pipeline import InfNeRFPipeline

ERRORS = (0.1, 0.01)
"""Of the renders at pyramid levels 0 and 1: 20 and 40 dB."""
WIDTH, HEIGHT = 48, 32
CODE = torch.tensor([1.0, -2.0, 3.0])


class _Pipeline(SimpleNamespace):
    """What `evaluate_photo` asks of a pipeline.

    Args:
        protocol: of the evaluation.
        wrong: where the renders are wrong altogether, as an index of the image at full size; levels have the half.
        masked: whether these pixels are masked.
    """

    def __init__(self, protocol: str, wrong: tuple[slice, slice] | None = None, masked: bool = False) -> None:
        super().__init__(config=SimpleNamespace(eval_protocol=protocol), device=torch.device("cpu"))
        self.datamanager = SimpleNamespace(eval_pyramid=lambda camera, batch: self.levels)
        self.model = SimpleNamespace(
            camera_rays=lambda camera: camera.generate_rays(camera_indices=0, keep_shape=True),
            get_outputs_for_camera_ray_bundle=self.render,
            get_image_metrics_and_images=lambda outputs, photo: (
                image_metrics(outputs["rgb"], photo["image"], photo.get("mask")),
                {"img": outputs["rgb"]},
            ),
        )
        self.levels: list[tuple[int, Cameras, Tensor, Tensor | None]] = []
        self.rendered: list[Tensor] = []
        for level, error in enumerate(ERRORS):
            width, height = WIDTH >> level, HEIGHT >> level
            image = 0.3 + 0.4 * torch.rand(height, width, 3)
            render, mask = image + error, torch.ones(height, width, 1, dtype=torch.bool)
            if wrong is not None:
                where = tuple(slice(each.start >> level, each.stop >> level) for each in wrong)
                render[where], mask[where] = 1 - image[where].round(), False
            self.levels.append((level, tiny_camera(CameraType.PERSPECTIVE, 20.0, width, height), image, mask))
            self.rendered.append(render)
        if not masked:
            self.levels = [(level, camera, image, None) for level, camera, image, _ in self.levels]
        self.codes: list[Tensor | None] = []

    def render(self, rays: RayBundle) -> dict[str, Tensor]:
        """The render of the level that has as many rays."""
        self.codes.append(rays.metadata.get(APPEARANCE))
        (render,) = (render for render in self.rendered if render.shape[:2] == rays.shape)
        return {"rgb": render}

    def _fit_appearance(self, camera: Cameras, batch: dict) -> Tensor:
        return CODE

    def _without_normals(self) -> nullcontext:
        return nullcontext()

    def evaluate(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics and images of the photo."""
        return InfNeRFPipeline.evaluate_photo(self, self.levels[0][1], {"image": self.levels[0][2]})


LEFT = (slice(0, HEIGHT), slice(0, WIDTH // 2))
IN_THE_RIGHT = (slice(0, HEIGHT // 2), slice(WIDTH // 2, WIDTH - 8))


@pytest.mark.parametrize(
    "protocol, wrong, masked",
    [("full", None, False), ("full", LEFT, True), ("half", LEFT, False), ("half", IN_THE_RIGHT, True)],
)
def test_each_level_has_its_own_error(protocol: str, wrong: tuple | None, masked: bool) -> None:
    metrics, images = _Pipeline(protocol, wrong, masked).evaluate()
    assert metrics["psnr_1"] == pytest.approx(20, abs=1e-3)
    assert metrics["psnr_1/2"] == pytest.approx(40, abs=1e-2)
    assert metrics["psnr"] == pytest.approx(30, abs=1e-2)
    assert metrics["ssim"] == pytest.approx((metrics["ssim_1"] + metrics["ssim_1/2"]) / 2)
    assert metrics["num_rays"] == WIDTH * HEIGHT * 1.25 and metrics["num_rays_per_sec"] > 0
    names = {f"{name}{scale}" for name in ("psnr", "ssim") for scale in ("", "_1", "_1/2")}
    assert set(metrics) == {*names, "num_rays", "num_rays_per_sec"}
    width = WIDTH if protocol == "full" else WIDTH // 2
    assert {name: tuple(image.shape) for name, image in images.items()} == {
        "img": (HEIGHT, width, 3),
        "img_2": (HEIGHT // 2, width // 2, 3),
    }


@pytest.mark.parametrize("protocol, wrong", [("full", LEFT), ("half", IN_THE_RIGHT)])
def test_wrong_pixels_that_nothing_hides_count(protocol: str, wrong: tuple) -> None:
    metrics, _ = _Pipeline(protocol, wrong).evaluate()
    assert max(metrics["psnr_1"], metrics["psnr_1/2"]) < 15


def test_a_level_whose_pixels_are_all_masked_does_not_enter_the_mean() -> None:
    pipeline = _Pipeline("full", LEFT, masked=True)
    pipeline.levels[1][3][:] = False
    metrics, _ = pipeline.evaluate()
    assert "psnr_1/2" not in metrics and metrics["psnr"] == metrics["psnr_1"] == pytest.approx(20, abs=1e-3)


def test_the_code_of_the_photo_is_fitted_for_its_half_only() -> None:
    for protocol, expected in (("full", None), ("half", CODE)):
        pipeline = _Pipeline(protocol)
        pipeline.evaluate()
        for level, code in enumerate(pipeline.codes):
            assert (code is None) == (expected is None)
            if expected is not None:
                assert torch.equal(code, expected.expand(HEIGHT >> level, WIDTH >> level, 3))
        assert len(pipeline.codes) == len(ERRORS)


class _Evaluated(_Pipeline):
    """As ns-eval runs it, on that photo alone."""

    octree_viewer = SimpleNamespace(measuring=nullcontext)

    def eval(self) -> None:
        pass

    train = eval

    def evaluate_photo(self, camera: Cameras, batch: dict) -> tuple[dict[str, float], dict[str, Tensor]]:
        return InfNeRFPipeline.evaluate_photo(self, camera, batch)


def test_renders_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a full disk was a traceback."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    pipeline = _Evaluated("full")
    photos = [(pipeline.levels[0][1], {"image": pipeline.levels[0][2]})]
    InfNeRFPipeline.get_average_image_metrics(pipeline, photos, "eval", output_path=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval_img_0000.png", "eval_img_2_0000.png"]
    monkeypatch.setattr(torchvision.utils, "save_image", full)
    with pytest.raises(
        InputError, match="eval_img_0000.png cannot be written .No space left on device.: free disk space"
    ):
        InfNeRFPipeline.get_average_image_metrics(pipeline, photos, "eval", output_path=tmp_path)
