"""What the commands answer: help, wrong input, pictures of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import STEPS, Finished, Trained, run_all
from results import HEIGHT, correlation, picture

from infnerf_ns.cli.picture import Picture
from infnerf_ns.errors import InputError
from infnerf_ns.training.checkpoints import checkpoint_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(trained: Trained) -> dict[str, Finished]:
    """What short commands answer."""
    place = trained.workplace
    picture_of = ["--load-config", trained.config]
    quiet = ["--vis", "tensorboard", "--output-dir", place.folder / "refused"]
    return run_all(
        {
            "help": ["ns-train", "infnerf", "-h"],
            "bench_help": ["infnerf-bench", "quality", "-h"],
            "picture": ["infnerf-picture", *picture_of, "--output", place.folder / "by_hand.jpg", "--photos", 0, 2],
            "picture_type": ["infnerf-picture", *picture_of, "--output", place.folder / "by_hand.txt"],
            "level": place.train("refused", "--pipeline.model.octree.max-level", 99),
            "data": ["ns-train", "infnerf-small", *quiet, "--data", place.folder / "nowhere"],
        },
        place.logs,
    )


def test_help_explains_the_options(answers: dict[str, Finished]) -> None:
    text = answers["help"].succeeded().out
    for option in ("octree.max-level", "field.log2-table-size", "losses.transparency", "sampler.samples"):
        assert f"--pipeline.model.{option}" in text
    assert "--pipeline.eval-protocol {full,half}" in text
    assert "Learning rate of the parameters of octree level L" in text
    assert "the paper's protocol" in text
    assert "Deepest octree level (0: the root alone)." in text


def test_own_commands_answer(answers: dict[str, Finished], trained: Trained) -> None:
    assert "--methods" in answers["bench_help"].succeeded().out
    assert "infnerf: wrote" in answers["picture"].succeeded().out
    assert picture(trained.workplace.folder / "by_hand.jpg").shape[0] == 2 * HEIGHT
    assert "the name must end in .png or .jpg" in answers["picture_type"].refusal()


def test_impossible_setting_is_one_line(answers: dict[str, Finished]) -> None:
    line = answers["level"].refusal()
    assert "--pipeline.model.octree.max-level 99" in line and "allowed is" in line


def test_missing_capture_is_one_line(answers: dict[str, Finished], trained: Trained) -> None:
    assert f"{trained.workplace.folder / 'nowhere'} does not exist: check --data" in answers["data"].refusal()


def test_checkpoint_names_are_nerfstudios(trained: Trained) -> None:
    assert checkpoint_path(trained.folder / "nerfstudio_models", STEPS - 1).is_file()


def test_picture_shows_held_out_photos(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "held_out.png"
    Picture(load_config=trained.config, output=output, photos=(0, 2), width=480).main()
    shown = picture(output)
    assert shown.shape[1] == 320, "five panels of 64 pixels are not enlarged"
    assert shown.shape[0] == 2 * 48
    for number in (0, 1):
        row = shown[48 * number : 48 * (number + 1)]
        assert correlation(row[:, :64], row[:, 64:128]) > 0.5, "the render resembles the photo beside it"
    with pytest.raises(InputError, match="--photos 99: the run has 20 held-out photos"):
        Picture(load_config=trained.config, output=output, photos=(99,)).main()
