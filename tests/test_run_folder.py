"""A training's folder is its own, and a full or read-only disk is said, in a small file system of its own."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_trainer import STEPS, TinyPipeline, run, steps_saved, tiny_config

from infnerf_ns.errors import InputError
from infnerf_ns.training import checkpoints, run_folder
from infnerf_ns.training.event_files import SparingWriter
from infnerf_ns.training.run_folder import LOCK, FolderLock

pytestmark = pytest.mark.usefixtures("quiet_writers")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_is_not_trained_over(tmp_path):
    """Regression: with a fixed --timestamp and no --load-dir the second training deleted the first one's files."""
    config = tiny_config(tmp_path)
    config.save_config()
    done, _ = run(config)
    before = content(done.checkpoint_dir), (done.base_dir / "config.yml").read_bytes()
    for start in (lambda config: config.save_config(), lambda config: config.setup()):
        with pytest.raises(
            InputError, match="run holds a run already .step-000000011.ckpt., .*--timestamp .*--load-dir"
        ):
            start(tiny_config(tmp_path, steps_per_save=7))
    assert (content(done.checkpoint_dir), (done.base_dir / "config.yml").read_bytes()) == before
    with pytest.raises(InputError, match="holds a run already"):
        tiny_config(tmp_path, load_dir=run(tiny_config(tmp_path / "other"))[0].base_dir).setup()
    assert content(done.checkpoint_dir) == before[0]


@pytest.mark.parametrize("start", ["load_dir", "load_checkpoint", "checkpoints"])
def test_a_run_is_trained_on_in_its_own_folder(tmp_path, start):
    done, _ = run(tiny_config(tmp_path))
    newest = checkpoints.checkpoint_path(done.checkpoint_dir, STEPS - 1)
    flag = {
        "load_dir": {"load_dir": done.base_dir},
        "load_checkpoint": {"load_checkpoint": newest},
        "checkpoints": {"load_dir": done.checkpoint_dir},
    }[start]
    config = tiny_config(tmp_path, max_num_iterations=STEPS + 3, **flag)
    config.save_config()
    longer, code = run(config)
    assert code == 0 and steps_saved(longer) == [STEPS + 2, STEPS - 1]


def test_two_trainings_do_not_share_a_folder(tmp_path):
    """The second one is another process, as with two terminals; the lock goes with the first one's end."""
    folder = tmp_path / "run"
    folder.mkdir()
    held = FolderLock(folder)
    held.acquire()
    held.acquire()
    script = (
        "import sys; from pathlib import Path; from infnerf_ns.training.run_folder import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    refused = subprocess.run(
        [sys.executable, "-c", script, folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"another training is writing into {folder}: wait for its end" in refused.stderr
    held.release()
    other = subprocess.Popen([sys.executable, "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="another training is writing into"):
        FolderLock(folder).acquire()
    other.kill()
    other.wait()
    FolderLock(folder).acquire()


def test_a_training_holds_its_folder_until_its_end(tmp_path):
    trainer = tiny_config(tmp_path).setup()
    trainer.setup()
    for start in (lambda: tiny_config(tmp_path).save_config(), lambda: tiny_config(tmp_path).setup().setup()):
        with pytest.raises(InputError, match="another training is writing into"):
            start()
    trainer.train()
    FolderLock(trainer.base_dir).acquire()


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "fcntl", None)
    trainer, code = run(tiny_config(tmp_path))
    assert code == 0 and capsys.readouterr().err.count("cannot be locked") == 1


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "test").write_text("a file where a folder should be")
    for start in (lambda config: config.save_config(), lambda config: config.setup()):
        with pytest.raises(
            InputError, match="the folder of the run, .*/test/tiny/run, cannot be written .*--output-dir"
        ):
            start(tiny_config(tmp_path))


# -- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2,400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2400k", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def state(step: int, kib: int = 900) -> dict:
    return {"step": step, "pipeline": {"numbers": torch.full((kib * 256,), float(step))}, "optimizers": {}}


def write(folder: Path, step: int, keep: int | None = 2, kib: int = 900) -> str | None:
    return checkpoints.write_checkpoint(state(step, kib), checkpoints.checkpoint_path(folder, step), keep)


def steps_in(folder: Path) -> list[int]:
    return [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(folder)]


def test_on_a_full_disk_the_older_checkpoint_makes_room(small_disk, capsys):
    """Room for two and a half: the third one needs that of the first, and the second one stays whole all the time."""
    folder = small_disk / "models"
    assert write(folder, 1) is None and write(folder, 2) is None and write(folder, 3) is None
    assert steps_in(folder) == [3, 2] and "older checkpoints than" in capsys.readouterr().err
    assert all(checkpoints.read_checkpoint(path) is not None for path in checkpoints.list_checkpoints(folder))


def test_the_last_whole_checkpoint_is_never_given_up(small_disk):
    folder = small_disk / "models"
    assert write(folder, 1) is None and write(folder, 2) is None
    failure = write(folder, 3, kib=1900)
    assert "the disk is full: a checkpoint needs 1.9 MiB, and 1.5 MiB are free" in failure
    assert steps_in(folder) == [2] and checkpoints.read_checkpoint(folder / "step-000000002.ckpt") is not None
    assert [path.name for path in small_disk.iterdir()] == ["models"]


def test_who_keeps_all_checkpoints_loses_none(small_disk):
    folder = small_disk / "models"
    assert write(folder, 1, None) is None and write(folder, 2, None) is None
    assert "the disk is full" in write(folder, 3, None) and steps_in(folder) == [2, 1]


@pytest.mark.parametrize(("free", "refused"), [(2.9, True), (3.1, False), (5.9, False)])
def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_first_step(
    tmp_path, monkeypatch, capsys, free, refused
):
    """Regression: it was said when the training had ended, and all of it was lost."""
    numbers = torch.nn.Parameter(torch.zeros(1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=int(free * numbers.nbytes)))
    if refused:
        with pytest.raises(InputError, match=f"12 MiB are free in {tmp_path}, and a checkpoint needs 12 MiB"):
            checkpoints.require_space(tmp_path, tmp_path / "models", [numbers])
        with pytest.raises(InputError, match="MiB are free in .*--output-dir"):
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=0))
            tiny_config(tmp_path).setup().setup()
    else:
        checkpoints.require_space(tmp_path, tmp_path / "models", [numbers])
        assert "a second may not find room" in capsys.readouterr().err


def test_room_that_older_checkpoints_make_and_disks_that_say_nothing(tmp_path, monkeypatch):
    numbers = torch.nn.Parameter(torch.zeros(1 << 10))
    folder = tmp_path / "models"
    for step in (1, 2):
        assert write(folder, step, kib=20) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=0))
    checkpoints.require_space(tmp_path, folder, [numbers])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    checkpoints.require_space(tmp_path, tmp_path / "none", [numbers])


def test_last_weights_that_are_not_written_are_a_failure(tmp_path, monkeypatch):
    """Regression: exit code 0."""
    save = torch.save

    def fills_up(content, file):
        if content["step"] > 5:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", fills_up)
    trainer, code = run(tiny_config(tmp_path))
    assert "its last weights could not be written" in str(code) and "the disk is full" in str(code)
    assert "step-000000005.ckpt is kept: train on from it with --load-dir" in str(code)
    assert steps_saved(trainer) == [5]


def test_a_training_on_a_full_disk_ends_with_one_line_and_keeps_its_last_checkpoint(small_disk, capsys):
    class Heavy(TinyPipeline):
        def __init__(self, config, **kwargs):
            super().__init__(config, **kwargs)
            self.register_buffer("bulk", torch.zeros(200_000))

        def get_train_loss_dict(self, step):
            if step == 6:
                (small_disk / "of somebody else").write_bytes(b"0" * (1 << 19))
                with open(small_disk / "the rest", "wb", buffering=0) as file:
                    try:
                        while file.write(b"0" * 4096):
                            pass
                    except OSError:
                        pass
            return super().get_train_loss_dict(step)

    config = tiny_config(small_disk)
    config.pipeline._target, config.logging.steps_per_log = Heavy, 1
    trainer, code = run(config)
    assert "its last weights could not be written" in str(code) and "the disk is full" in str(code)
    assert steps_saved(trainer) == [5]


def test_a_log_that_cannot_be_written_does_not_end_a_training(monkeypatch, capsys):
    class Full:
        def write_scalar(self, name, scalar, step):
            raise OSError(28, "No space left on device")

    sparing = SparingWriter(Full())
    for step in range(3):
        sparing.write_scalar("loss", 0.0, step)
    assert capsys.readouterr().err.count("the log of the training cannot be written (No space left on device)") == 1


def test_a_training_spares_its_log(tmp_path):
    trainer = tiny_config(tmp_path).setup()
    trainer.setup()
    from nerfstudio.utils import writer  # cannot be the first that is imported of nerfstudio

    assert [type(each) for each in writer.EVENT_WRITERS] == [SparingWriter]
    trainer.train()
    assert any("events.out" in file.name for file in trainer.base_dir.iterdir())
    assert (trainer.base_dir / LOCK).is_file()
