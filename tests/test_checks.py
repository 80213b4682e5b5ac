"""Checks of what a dataparser hands over; captures on disk are in test_bad_input.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from infnerf_ns.data.checks import check_outputs
from infnerf_ns.errors import InputError


def _outputs(cameras: int = 2, masks: int | None = None, focal: float = 20.0) -> DataparserOutputs:
    """Two photos, which do not exist."""
    poses = torch.eye(4)[:3].repeat(cameras, 1, 1)
    names = [Path("a.png"), Path("b.png")]
    mask_names = None if masks is None else names[:masks]
    return DataparserOutputs(names, Cameras(poses, focal, focal, 16.0, 12.0, 32, 24), mask_filenames=mask_names)


def _refusal(outputs: DataparserOutputs, *, photos: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        check_outputs(outputs, "test", photos=photos)
    return str(caught.value)


def test_what_is_right_passes() -> None:
    check_outputs(_outputs(masks=2), "train", photos=False)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_pose_that_is_not_finite(number: float) -> None:
    outputs = _outputs()
    outputs.cameras.camera_to_worlds[1, 0, 3] = number
    assert _refusal(outputs) == (
        "infnerf: test split: the pose of photo b.png holds NaN or infinite numbers: remove the photo from the capture"
    )


def test_lists_of_different_lengths() -> None:
    assert _refusal(_outputs(cameras=3)) == (
        "infnerf: the test split has 2 photos but 3 cameras: list every photo with its pose"
    )
    assert _refusal(_outputs(masks=1)) == (
        "infnerf: the test split has 2 photos but 1 masks: give every photo a mask or none"
    )


def test_a_focal_length_of_zero_and_missing_photos() -> None:
    assert "the focal length of photo a.png is [0.0, 0.0]" in _refusal(_outputs(focal=0.0))
    assert "photo a.png does not exist (2 of 2 missing in the test split)" in _refusal(_outputs(), photos=True)
