"""``infnerf-picture``: held-out photos of a trained run beside what the model renders, as one picture to look at.

A row per photo: the photo, the render, the octree level that each pixel used (blue = root), depth, normals.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro

from infnerf_ns.cli.command import Command, run_command
from infnerf_ns.cli.runs import open_run
from infnerf_ns.errors import InputError
from infnerf_ns.pipeline import InfNeRFPipeline
from infnerf_ns.regular_files import require_writable
from infnerf_ns.validation import Range, require_valid

_SUFFIXES = (".png", ".jpg")


@dataclass
class Picture(Command):
    """Held-out photos, renders, octree levels, depth and normals of a trained run, side by side."""

    load_config: Path
    """config.yml of the run."""
    output: Path
    """Picture to write, .png or .jpg."""
    photos: Annotated[tuple[int, ...], Range(0)] = (0,)
    """Numbers of the held-out photos, one row each."""
    level: Annotated[int, Range(0, 30)] = 0
    """Pyramid level to show: 0 full size, 1 half ..."""
    width: Annotated[int, Range(1, 65_535)] = 1500
    """Largest width of the picture in pixels."""

    def main(self) -> None:
        """Renders and writes the picture."""
        require_valid(self)
        if not self.photos:
            raise InputError("--photos: give the number of at least one held-out photo")
        if not self.load_config.is_file():
            raise InputError(f"--load-config {self.load_config}: there is no such file; give a run's config.yml")
        if self.output.suffix.lower() not in _SUFFIXES:
            raise InputError(f"--output {self.output}: the name must end in {' or '.join(_SUFFIXES)}")
        require_writable("--output", self.output)
        pipeline = open_run(self.load_config).pipeline
        held_out = pipeline.datamanager.fixed_indices_eval_dataloader
        rows = []
        for number in self.photos:
            if not 0 <= number < len(held_out):
                raise InputError(f"--photos {number}: the run has {len(held_out)} held-out photos, numbered from 0")
            rows.append(self._row(pipeline, *held_out.get_camera(number)))
        narrowest = min(row.shape[1] for row in rows + [np.empty((1, self.width))])
        scaled = [
            cv2.resize(
                row, (narrowest, max(1, round(len(row) * narrowest / row.shape[1]))), interpolation=cv2.INTER_AREA
            )
            for row in rows
        ]
        picture = np.rint(np.concatenate(scaled).clip(0, 1) * 255).astype(np.uint8)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(self.output), picture[..., ::-1]):
            raise InputError(f"--output {self.output}: could not be written; choose another folder")
        print(f"infnerf: wrote {self.output} ({picture.shape[1]} x {picture.shape[0]})")

    def _row(self, pipeline: InfNeRFPipeline, camera, batch) -> np.ndarray:  # noqa: ANN001
        levels = list(pipeline.datamanager.eval_pyramid(camera, batch))
        if not 0 <= self.level < len(levels):
            raise InputError(f"--level {self.level}: the photos have the pyramid levels 0 to {len(levels) - 1}")
        _, camera_at_level, image, _ = levels[self.level]
        outputs = pipeline.model.get_outputs_for_camera(camera_at_level.to(pipeline.device))
        _, images = pipeline.model.get_image_metrics_and_images(outputs, {"image": image})
        panels = [images[name] for name in ("img", "level", "depth", "normals") if name in images]
        return torch.cat([panel.cpu() for panel in panels], dim=1).numpy()


def entrypoint() -> None:
    """The console script."""
    run_command(tyro.cli(Picture))
