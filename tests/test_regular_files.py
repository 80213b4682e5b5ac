"""Files of strangers: what is no file is said before it is opened, and no link is followed in writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_packed import tiny_run

from infnerf_ns.cli.pack import pack_run
from infnerf_ns.cli.rewrite_config import BEFORE, RewriteConfig
from infnerf_ns.data.capture.record import CaptureRecord
from infnerf_ns.errors import InputError
from infnerf_ns.map_frame import TRANSFORMS, map_frame
from infnerf_ns.regular_files import read_small_file, require_writable, write_whole_file
from infnerf_ns.run_config import read_run_config
from infnerf_ns.training.run_folder import LOCK, FolderLock

UP = np.array([0.0, 0.0, 1.0])


def no_files(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "nothing").symlink_to("elsewhere")
    (folder / "folder").mkdir()
    return {name: folder / name for name in ("pipe", "endless", "nothing", "folder")}


SAID = {"pipe": "named pipe", "endless": "a device", "nothing": "a link to elsewhere", "folder": "a folder"}


@pytest.mark.parametrize("kind", SAID)
def test_what_is_no_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    path = no_files(tmp_path)[kind]
    with pytest.raises(InputError, match=SAID[kind]):
        read_small_file(path, "the file")
    with pytest.raises(InputError, match=SAID[kind]):
        CaptureRecord.read(path)
    if kind != "folder":  # the configuration of a folder is within it
        with pytest.raises(InputError, match=SAID[kind]):
            read_run_config(path)
    path.rename(tmp_path / TRANSFORMS)
    with pytest.raises(InputError, match=SAID[kind]):
        map_frame(tmp_path, UP)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert read_small_file(tmp_path / "large", "the file", 101) == b"x" * 101
    with pytest.raises(InputError, match="larger than"):
        read_small_file(tmp_path / "large", "the file", 100)


def test_writing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "file").symlink_to("theirs")
    write_whole_file(tmp_path / "file", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "theirs"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole_file(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("place", "said"),
    [("file/x.png", "file is a file"), ("x" * 300, "the name is too long"), ("a/" + "x" * 300 + "/b", "too long")],
)
def test_a_place_where_nothing_can_be_made(place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable("--output", tmp_path / "new" / "x.png")
    with pytest.raises(InputError, match=f"--output .*{said}"):
        require_writable("--output", tmp_path / place)


def test_a_run_that_links_elsewhere_changes_nothing_there(tmp_path: Path) -> None:
    """Regression: a draft of a known name was written through a link: a stranger's run could overwrite any file, and
    what it wrote was of its choice."""
    run, theirs = tiny_run(tmp_path / "run"), tmp_path / "theirs"
    theirs.write_text("theirs")
    for name in (".config.yml.tmp", BEFORE, LOCK):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(theirs)
    content = (run / "config.yml").read_text()
    RewriteConfig(run=run).main()
    (run / "config.yml").unlink()
    (tmp_path / "linked.yml").write_text(content)
    (run / "config.yml").symlink_to(tmp_path / "linked.yml")
    RewriteConfig(run=run).main()
    assert (tmp_path / "linked.yml").read_text() == content and not (run / "config.yml").is_symlink()
    with pytest.raises((InputError, OSError)):
        FolderLock(run).acquire()
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize("folder", ["{run}/nerfstudio_models", "../run/nerfstudio_models"])
def test_a_run_keeps_its_checkpoints_within_its_folder(folder: str, tmp_path: Path) -> None:
    """Regression: with another folder infnerf-pack replaced the run's own checkpoint by the packed one."""
    run = tiny_run(tmp_path)
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    config.relative_model_dir = Path(folder.format(run=run))
    (run / "config.yml").write_text(yaml.dump(config))
    before = {path: path.read_bytes() for path in (run / "nerfstudio_models").iterdir()}
    with pytest.raises(InputError, match="relative-model-dir .* within the run's"):
        pack_run(run, half=False, overwrite=False, progress=iter)
    assert {path: path.read_bytes() for path in (run / "nerfstudio_models").iterdir()} == before
    assert any("--relative-model-dir" in problem for problem in config.check())


@pytest.mark.parametrize("name", [TRANSFORMS, "capture.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "private"])
def test_a_packed_run_takes_nothing_else_along(name: str, kind: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (tmp_path / "secret").write_text("a key")
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero" if kind == "endless" else tmp_path / "secret")
    with pytest.raises(InputError, match=name):
        pack_run(run, half=False, overwrite=False, progress=iter)
    assert not run.with_name(f"{run.name}-packed").exists()


def test_the_transform_goes_along(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    content: dict[str, Any] = {"transform": np.eye(4)[:3].tolist(), "scale": 2.0}
    (run / TRANSFORMS).write_text(json.dumps(content))
    packed = pack_run(run, half=False, overwrite=False, progress=iter)
    assert json.loads((packed.folder / TRANSFORMS).read_text()) == content
