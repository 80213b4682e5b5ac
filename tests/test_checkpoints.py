"""Checkpoint files: atomic writing, a full disk, detection of damage, what --load-dir may name."""

import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from infnerf_ns.errors import InputError
from infnerf_ns.torch_compat import allow_numpy_scalars
from infnerf_ns.training import checkpoints

MODELS = Path("nerfstudio_models")


def state_of(step: int) -> dict:
    return {"step": step, "pipeline": {"weight": torch.full((1000,), float(step))}, "optimizers": {}}


def write(folder: Path, *steps: int, keep: int | None = None) -> None:
    for step in steps:
        assert checkpoints.write_checkpoint(state_of(step), checkpoints.checkpoint_path(folder, step), keep) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def steps_in(folder: Path) -> list[int]:
    return [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(folder)]


def test_written_file_is_named_and_read_as_nerfstudio_does(tmp_path):
    write(tmp_path / MODELS, 12)
    assert [path.name for path in (tmp_path / MODELS).iterdir()] == ["step-000000012.ckpt"]
    assert torch.load(tmp_path / MODELS / "step-000000012.ckpt")["step"] == 12


def test_the_newest_two_are_kept_and_no_temporary_file_stays(tmp_path):
    (tmp_path / ".step-000000001.ckpt.tmp").write_text("left by a killed process")
    write(tmp_path / MODELS, 10, 20, 30, keep=2)
    assert steps_in(tmp_path / MODELS) == [30, 20]
    assert [path.name for path in tmp_path.iterdir()] == [MODELS.name]


def test_keep_none_keeps_all(tmp_path):
    write(tmp_path / MODELS, 10, 20, 30, keep=None)
    assert steps_in(tmp_path / MODELS) == [30, 20, 10]


@pytest.mark.parametrize(
    "error, said",
    [(OSError(28, "No space left on device"), "the disk is full"), (RuntimeError("write failed"), "write failed")],
)
def test_a_failed_write_reports_and_leaves_the_older_ones(tmp_path, monkeypatch, error, said):
    folder = tmp_path / MODELS
    write(folder, 10, keep=1)

    def half_written(state, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half_written)
    failure = checkpoints.write_checkpoint(state_of(20), checkpoints.checkpoint_path(folder, 20), 1)
    assert said in failure
    assert steps_in(folder) == [10] and checkpoints.is_whole(folder / "step-000000010.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == [MODELS.name]


def test_truncated_empty_and_foreign_files_are_not_whole(tmp_path):
    write(tmp_path, 1)
    good = tmp_path / "step-000000001.ckpt"
    assert checkpoints.is_whole(good)
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    truncate(good)
    for path in (good, tmp_path / "empty.ckpt", tmp_path / "text.ckpt", tmp_path / "missing.ckpt"):
        assert not checkpoints.is_whole(path) and checkpoints.read_checkpoint(path) is None


def test_a_flipped_byte_in_the_numbers_is_found_on_reading(tmp_path):
    write(tmp_path, 1)
    path = tmp_path / "step-000000001.ckpt"
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(1).tobytes() * 100) + 200] ^= 0xFF
    path.write_bytes(content)
    assert checkpoints.is_whole(path), "the cheap test reads no numbers"
    assert checkpoints.read_checkpoint(path) is None


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys):
    write(tmp_path, 10, 20)
    truncate(tmp_path / "step-000000020.ckpt")
    assert checkpoints.whole_checkpoints(tmp_path) == [tmp_path / "step-000000010.ckpt"]
    assert "step-000000020.ckpt is damaged (truncated?); step-000000010.ckpt is used instead" in capsys.readouterr().err


@pytest.mark.parametrize("named", [".", "nerfstudio_models", "config.yml", "nerfstudio_models/step-000000020.ckpt"])
def test_load_dir_may_name_the_run_its_checkpoints_its_config_or_a_file(tmp_path, named):
    write(tmp_path / MODELS, 10, 20)
    (tmp_path / "config.yml").touch()
    found = checkpoints.resume_candidates(tmp_path / named, MODELS, None)
    assert found[0] == tmp_path / MODELS / "step-000000020.ckpt"


def test_load_step_selects_exactly_that_checkpoint(tmp_path):
    write(tmp_path / MODELS, 10, 20)
    assert checkpoints.resume_candidates(tmp_path, MODELS, 10) == [tmp_path / MODELS / "step-000000010.ckpt"]
    with pytest.raises(InputError, match="--load-step 15: .* is not there; steps that can be loaded: 20, 10"):
        checkpoints.resume_candidates(tmp_path, MODELS, 15)
    truncate(tmp_path / MODELS / "step-000000010.ckpt")
    with pytest.raises(InputError, match=r"step 10: .* is damaged \(truncated\?\); steps that can be loaded: 20"):
        checkpoints.resume_candidates(tmp_path, MODELS, 10)


def test_nothing_to_resume_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--load-dir .*/nowhere: there is no such folder"):
        checkpoints.resume_candidates(tmp_path / "nowhere", MODELS, None)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.resume_candidates(tmp_path, MODELS, None)
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match="expected a run's folder"):
        checkpoints.resume_candidates(tmp_path / "photo.png", MODELS, None)


def test_only_damaged_checkpoints_is_one_line(tmp_path):
    write(tmp_path / MODELS, 10)
    truncate(tmp_path / MODELS / "step-000000010.ckpt")
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        checkpoints.resume_candidates(tmp_path, MODELS, None)


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="parameters are without b and with c"):
        checkpoints.check_fits({"a": 0, "c": 0}, {"a": 0, "b": 0}, "parameters", tmp_path)
    checkpoints.check_fits({"a": 0}, {"a": 1}, "parameters", tmp_path)


def test_a_file_that_is_no_training_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "step-000000001.ckpt")
    with pytest.raises(InputError, match="is not a checkpoint of ns-train"):
        checkpoints.read_checkpoint(tmp_path / "step-000000001.ckpt")


def test_a_file_with_code_in_it_is_refused_and_the_object_named(tmp_path):
    torch.save(state_of(1) | {"hook": os.system}, tmp_path / "step-000000001.ckpt")
    with pytest.raises(InputError, match=r"objects that are not safe to load \(posix.system\)") as raised:
        checkpoints.read_checkpoint(tmp_path / "step-000000001.ckpt")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_random_sequences_continue_after_saving_and_loading(tmp_path):
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)

    draw()
    torch.save(checkpoints.random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    checkpoints.restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_checkpoints_with_numpy_scalars_load(tmp_path, module):
    """Regression: nerfstudio's schedulers store np.float64, which torch >= 2.6 refuses without the allow-list."""
    allow_numpy_scalars()
    torch.save({"lr": np.float64(0.5), "n": np.int64(3)}, tmp_path / "here.pt")
    with (
        zipfile.ZipFile(tmp_path / "here.pt") as here,
        zipfile.ZipFile(tmp_path / "there.pt", "w") as there,
    ):
        for name in here.namelist():
            there.writestr(name, re.sub(rb"numpy\._?core\.multiarray", module, here.read(name)))
    assert torch.load(tmp_path / "there.pt", weights_only=True) == {"lr": 0.5, "n": 3}


def test_a_new_run_in_an_old_runs_folder_keeps_what_it_writes(tmp_path):
    """Regression: the highest steps were kept, so that a file of the new run was deleted as soon as it was written."""
    write(tmp_path, 6000, 7999)
    for step, kept in ((2000, [2000]), (4000, [4000, 2000]), (6000, [6000, 4000])):
        path = checkpoints.checkpoint_path(tmp_path, step)
        assert checkpoints.write_checkpoint(state_of(step), path, 2) is None
        assert steps_in(tmp_path) == kept


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "folders cannot be opened here")

    monkeypatch.setattr(os, "open", refuse)
    assert checkpoints.write_checkpoint(state_of(3), checkpoints.checkpoint_path(tmp_path, 3), 2) is None
    assert steps_in(tmp_path) == [3]
