"""infnerf-pack: what it writes, and no failure harms the run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_model import scrambled, tiny_config, tiny_model
from tiny_packed import TinyPacked, differences, tiny_packed, tiny_run

from infnerf_ns.cli.pack import Packed, pack_run
from infnerf_ns.errors import InputError
from infnerf_ns.streaming.packing import CHECKSUMS, small_state, write_pages
from infnerf_ns.training import checkpoints


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pack(run: Path, **settings: bool) -> Packed:
    return pack_run(run, **{"half": False, "overwrite": False, **settings}, progress=iter)


def test_packing_makes_a_run_beside_the_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = content(run)
    packed = pack(run / "config.yml")
    assert packed.folder == run.with_name("run-packed") and content(run) == before
    config = yaml.load((packed.folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.get_base_dir() == packed.folder
    checkpoint_dir = config.get_checkpoint_dir()
    assert config.pipeline.model.streaming.pages == packed.folder / "pages"
    state = checkpoints.read_checkpoint(checkpoints.checkpoint_path(checkpoint_dir, config.load_step))
    assert state["step"] == 7 and "datamanager.kept" in state["pipeline"]
    assert f"_model.{CHECKSUMS}" in state["pipeline"] and "_model.field.grids.1" not in state["pipeline"]
    pages = list((packed.folder / "pages").rglob("*.safetensors"))
    assert len(pages) == packed.octree.num_nodes - 1
    assert packed.page_bytes == sum(page.stat().st_size for page in pages)
    assert packed.checkpoint_bytes < packed.page_bytes
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run-packed"]


def test_a_run_is_packed_wherever_one_stands_and_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    renamed = run.rename(run.with_name("renamed"))
    monkeypatch.chdir(renamed)
    packed = pack(Path("."))
    assert packed.folder == renamed.with_name("renamed-packed")
    config = yaml.load((packed.folder / "config.yml").read_text(), Loader=yaml.Loader)
    assert config.get_base_dir() == packed.folder, "its own configuration leads to it"


def test_whoever_may_read_the_run_may_read_its_pages(tmp_path: Path) -> None:
    """Regression: safetensors' own file is for its owner alone."""
    run = tiny_run(tmp_path)
    usual = stat.S_IMODE((run / "config.yml").stat().st_mode)
    for page in (pack(run).folder / "pages").rglob("*.safetensors"):
        assert stat.S_IMODE(page.stat().st_mode) == usual


def test_a_root_alone_is_packed_and_loaded(tmp_path: Path) -> None:
    """Regression: without pages there was no folder of pages, and so no run."""
    model = scrambled(tiny_model(tiny_config(max_level=0), active=0)).eval()
    octree, layout = model.field.octree, model.field.pages
    assert octree.num_nodes == 1
    state = {name: value.detach() for name, value in model.state_dict().items()}
    checksums, _ = write_pages(state, octree, layout, tmp_path / "pages", False, iter)
    streamed = TinyPacked(model, tmp_path / "pages", small_state(state, octree, layout, checksums), 0.0).load()
    assert max(differences(model, streamed, "perspective").values()) < 1e-6


def test_a_run_of_an_earlier_version_can_be_packed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    del config.pipeline.model.streaming
    (run / "config.yml").write_text(yaml.dump(config))
    packed = yaml.load((pack(run).folder / "config.yml").read_text(), Loader=yaml.Loader)
    packed.get_checkpoint_dir()
    assert packed.pipeline.model.streaming.pages.is_dir()


def test_a_packed_run_is_not_packed_again_by_accident(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = pack(run).folder
    before = content(folder)
    with pytest.raises(InputError, match="run-packed is there already: .*--overwrite"):
        pack(run)
    with pytest.raises(InputError, match="is packed already; pack the run that it was made from"):
        pack(folder)
    assert content(folder) == before
    pack(run, overwrite=True, half=True)
    assert content(folder).keys() == before.keys() and content(folder) != before


@pytest.mark.parametrize("name, message", [("nothing", "there is no config.yml"), ("other", "not a run of infnerf")])
def test_what_is_no_run_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yml").write_text("a: 1")
    with pytest.raises(InputError, match=message):
        pack(tmp_path / name)


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (file,) = (run / "nerfstudio_models").iterdir()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="no whole checkpoint"):
        pack(run)
    assert not run.with_name("run-packed").exists()


def test_numbers_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    octree, layout = packed.model.field.octree, packed.model.field.pages
    state = {name: value.detach().clone() for name, value in packed.model.state_dict().items()}
    state["field.grids.2"][1, 5] = 1e5
    write_pages(state, octree, layout, tmp_path / "float", False, iter)
    with pytest.raises(InputError, match=r"the grids hold 100000, .* leave out --half"):
        write_pages(state, octree, layout, tmp_path / "half", True, iter)
    state["field.grids.2"][1, 5] = torch.nan
    with pytest.raises(InputError, match="the grids hold nan, .* pack an older checkpoint"):
        write_pages(state, octree, layout, tmp_path / "nan", False, iter)


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    with pytest.raises(InputError, match="needs .* GiB, but .* has 0.00 GiB free: make room, or give --half"):
        pack(run)
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("place", ["folder", "page", "rename"])
def test_what_cannot_be_written_ends_in_one_line(
    number: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    before = content(run)

    def fail(*arguments: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    if place == "folder":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif place == "page":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        replace = os.replace
        monkeypatch.setattr(
            os, "replace", lambda a, b: fail() if Path(b).name == "run-packed" else replace(a, b)
        )  # fmt: skip
    with pytest.raises(InputError, match=f"run-packed cannot be written .{os.strerror(number)}.: .*the run is as it"):
        pack(run)
    monkeypatch.undo()
    assert content(run) == before and sorted(path.name for path in run.parent.iterdir()) == ["run"]
    pack(run)


def test_an_older_packed_run_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = pack(run).folder
    before = content(folder)

    def stops(nodes):  # noqa: ANN001, ANN202
        for node in nodes:
            if node > 5:
                raise KeyboardInterrupt
            yield node

    with pytest.raises(KeyboardInterrupt):
        pack_run(run, half=False, overwrite=True, progress=stops)
    assert content(folder) == before and sorted(path.name for path in run.parent.iterdir()) == ["run", "run-packed"]


def test_an_older_packed_run_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = pack(run).folder
    before = content(folder)
    folder.rename(folder.with_name(".run-packed.older"))
    with pytest.raises(InputError, match="run-packed is there already"):
        pack(run)
    assert content(folder) == before and sorted(path.name for path in run.parent.iterdir()) == ["run", "run-packed"]


def test_what_a_killed_packing_has_left_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    left = run.with_name(".run-packed.unfinished")
    left.mkdir()
    (left / "page").write_text("")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if left.exists() else 1 << 30))
    pack(run)


def test_a_kill_while_packing_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    before = content(run)
    slow = (
        "import sys, time\nfrom pathlib import Path\nfrom infnerf_ns.cli.pack import pack_run\n"
        "def slowly(nodes):\n    for node in nodes:\n        time.sleep(0.05)\n        yield node\n"
        "pack_run(Path(sys.argv[1]), half=False, overwrite=False, progress=slowly)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(run)])
    work = run.with_name(".run-packed.unfinished")
    end = time.monotonic() + 120
    while len(list(work.rglob("*.safetensors"))) < 3 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert work.exists() and not run.with_name("run-packed").exists() and content(run) == before
    pack(run)
    assert sorted(path.name for path in run.parent.iterdir()) == ["run", "run-packed"]


def test_nodes_that_have_not_taken_over_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    pack(run)
    assert "taken over" not in capsys.readouterr().err
    (path,) = checkpoints.whole_checkpoints(run / "nerfstudio_models")
    state = checkpoints.read_checkpoint(path)
    state["pipeline"]["_model.field.maturity"] = state["pipeline"]["_model.field.maturity"].clone()
    state["pipeline"]["_model.field.maturity"][3:5] = 0.5
    assert checkpoints.write_checkpoint(state, path, None) is None
    pack(run, overwrite=True)
    assert "2 nodes have not taken over from their parents yet" in capsys.readouterr().err
