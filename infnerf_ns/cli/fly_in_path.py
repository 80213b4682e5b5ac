"""A camera path from orbit height down to one photo, in powers of ten: every frame is closer by the same factor.

So every frame moves through the same share of an octree level. The format of the file is nerfstudio's, for ``ns-render
camera-path``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def fly_in(
    end: Float[Tensor, "3 4"], distance: float, up: Float[Tensor, "3"], orbit: float, frames: int
) -> Float[Tensor, "F 3 4"]:
    """Poses (camera to world, OpenGL axes) that end in a given one and start straight above what that one looks at;
    of a photo that was taken on its side, above in the photo.

    Args:
        end: last pose.
        distance: from the last pose to what it looks at, scene units.
        up: of the scene, unit length.
        orbit: distance of the first pose from the same place, scene units.
        frames: F, at least 2.
    """
    right, backward = end[:, 0], end[:, 2]
    target = end[:, 3] - distance * backward
    if float((up @ right).abs()) > 0.9:  # a photo on its side: it is flown to as it lies
        up = end[:, 1]
    above = torch.nn.functional.normalize(up - (up @ right) * right, dim=0)
    angle = torch.atan2(torch.linalg.cross(above, backward) @ right, above @ backward)
    poses = []
    for frame in range(frames):
        share = frame / (frames - 1)
        turned = angle * share**2 * (3 - 2 * share)
        back = torch.cos(turned) * above + torch.sin(turned) * torch.linalg.cross(right, above)
        away = orbit ** (1 - share) * distance**share
        poses.append(torch.stack([right, torch.linalg.cross(back, right), back, target + away * back], dim=1))
    return torch.stack(poses)


def between(one: Float[Tensor, "3 4"], other: Float[Tensor, "3 4"], share: float) -> Float[Tensor, "3 4"]:
    """A pose on the way from one to another close to it: turned and moved by that share of the difference."""
    left, _, right = torch.linalg.svd(one[:, :3] + share * (other[:, :3] - one[:, :3]))
    return torch.cat([left @ right, one[:, 3:] + share * (other[:, 3:] - one[:, 3:])], dim=1)


def camera_path(
    poses: Float[Tensor, "F 3 4"], width: int, height: int, focal: float, frames_per_second: int
) -> dict[str, Any]:
    """What nerfstudio's ``--camera-path-filename`` holds.

    Args:
        poses: camera to world.
        width: pixels.
        height: pixels.
        focal: pixels.
        frames_per_second: of the video.
    """
    field_of_view = math.degrees(2 * math.atan(height / 2 / focal))
    bottom = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    return {
        "camera_type": "perspective",
        "render_width": width,
        "render_height": height,
        "fps": frames_per_second,
        "seconds": len(poses) / frames_per_second,
        "camera_path": [
            {
                "camera_to_world": torch.cat([pose.float().cpu(), bottom]).reshape(-1).tolist(),
                "fov": field_of_view,
                "aspect": width / height,
            }
            for pose in poses
        ],
    }
