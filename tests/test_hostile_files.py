"""Files that only look like checkpoints or pages: compressed, cut, with other sizes inside, or no files at all. Nothing
waits, nothing is inflated, nothing is read beyond its record, and no damage goes unsaid.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_packed import tiny_run

from infnerf_ns import checkpoint_archive
from infnerf_ns.checkpoint_archive import damage, quick_damage
from infnerf_ns.cli.pack import pack_run
from infnerf_ns.cli.runs import newest_checkpoint
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import file_problem, require_regular_file
from infnerf_ns.streaming.page_files import PageError, PageFiles, checksum
from infnerf_ns.training import checkpoints
from infnerf_ns.validation import read_yaml


def write(folder: Path, *steps: int) -> Path:
    """Checkpoints of these steps; the last one's file."""
    for step in steps:
        path = checkpoints.checkpoint_path(folder, step)
        state = {
            "step": step,
            "pipeline": {"a": torch.full((1000,), float(step)), "b": torch.ones(10)},
            "optimizers": {},
        }
        assert checkpoints.write_checkpoint(state, path, None) is None
    return path


def odd_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is no file, or none that can be read, and what is said of it."""
    found = {name: folder / f"{name}.ckpt" for name in ("fifo", "folder", "loop", "dangling", "socket", "missing")}
    os.mkfifo(found["fifo"])
    found["folder"].mkdir()
    found["loop"].symlink_to(found["loop"].name)
    found["dangling"].symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket must be short
        opened.bind(found["socket"].name)
        os.chdir(here)
    said = {
        "fifo": "it is a named pipe (FIFO), not a file",
        "folder": "it is a folder, not a file",
        "loop": "it is a link that leads back to itself",
        "dangling": "it is a link to nowhere, which is not there",
        "socket": "it is a socket, not a file",
        "missing": "there is no such file",
    }
    return {name: (path, said[name]) for name, path in found.items()} | {
        "device": (Path("/dev/zero"), "it is a device, not a file"),
        "nul": (folder / "a\0b", "there is no such file"),
        "long": (folder / ("x" * 300), "the name is too long"),
        "within a file": (Path(__file__) / "x", "there is no such file"),
    }


def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path) -> None:
    for path, said in odd_files(tmp_path).values():
        assert file_problem(path) == said
        assert quick_damage(path) == said and damage(path) == said and not checkpoints.is_whole(path)
        assert checkpoints.read_checkpoint(path) is None
        with pytest.raises(InputError, match=re.escape(f"--load-checkpoint {path}: {said}")):
            require_regular_file(path, "--load-checkpoint")
        with pytest.raises(InputError, match=re.escape(f"cannot read the settings file {path}: {said}")):
            read_yaml(path)
    regular = tmp_path / "file"
    regular.touch()
    (tmp_path / "link").symlink_to("file")
    assert file_problem(regular) is None and file_problem(tmp_path / "link") is None


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    path.chmod(0)
    assert file_problem(path) == "it may not be read: allow reading it"


def test_a_fifo_among_the_checkpoints_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 10)
    os.mkfifo(checkpoints.checkpoint_path(tmp_path, 20))
    assert checkpoints.whole_checkpoints(tmp_path) == [checkpoints.checkpoint_path(tmp_path, 10)]
    said = "step-000000020.ckpt is damaged (it is a named pipe (FIFO), not a file); step-000000010.ckpt is used instead"
    assert said in capsys.readouterr().err


def test_a_zip_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-000000001.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("step/data.pkl", b"\0" * (1 << 24))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("inflated"))
    assert path.stat().st_size < 1 << 16
    assert quick_damage(path) == "its entries are compressed, which those of torch.save are not"


def test_entries_that_lie_on_each_other_are_refused(tmp_path: Path) -> None:
    """A bomb without compression: many entries of the table of contents share the same bytes."""
    path = tmp_path / "step-000000001.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("step/data.pkl", b"\0" * 1000)
        for number in range(20):
            archive.filelist.append(zipfile.ZipInfo(f"step/data/{number}"))
            archive.filelist[-1].header_offset = 0
            archive.filelist[-1].file_size = archive.filelist[-1].compress_size = 1000
            archive.filelist[-1].CRC = archive.filelist[0].CRC
        archive._didModify = True
    assert path.stat().st_size < 5000 and quick_damage(path) == "its entries are larger than the file"


def test_checksums_are_compared_once_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write(tmp_path, 1), []
    original = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: calls.append(1) or original(archive))
    assert checkpoints.whole_checkpoints(tmp_path) == [path] and checkpoints.read_checkpoint(path) is not None
    assert len(calls) == 1
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(1).tobytes() * 100) + 200] ^= 1
    path.write_bytes(content)
    assert damage(path) == "its checksums do not match" and len(calls) == 2, "another content is another file"


def _with_pickle(path: Path, change) -> None:  # noqa: ANN001
    """The same file with another pickle, its checksums right."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_a_tensor_longer_than_its_record_is_refused(tmp_path: Path) -> None:
    """Regression: torch takes the length from the pickle and reads what lies behind the record."""
    path = write(tmp_path, 1)
    number = pickle.BININT2 + (1000).to_bytes(2, "little")
    _with_pickle(path, lambda content: content.replace(number, pickle.BININT2 + (1200).to_bytes(2, "little")))
    assert damage(path) is None, "all checksums are right"
    with pytest.raises(InputError, match="is not a checkpoint of ns-train .*: name another checkpoint"):
        checkpoints.read_checkpoint(path)


def test_a_tensor_that_repeats_itself_is_refused(tmp_path: Path) -> None:
    """A stride of 0 makes terabytes of four bytes."""
    path = tmp_path / "step-000000001.ckpt"
    torch.save({"step": 1, "pipeline": {"a": torch.ones(1).expand(1 << 40)}, "optimizers": {}}, path)
    with pytest.raises(InputError, match="pipeline.a is larger than what the file holds of it"):
        checkpoints.read_checkpoint(path)


@pytest.mark.parametrize(
    "state, said",
    [
        ({"step": "x"}, "its step is x"),
        ({"step": -1}, "its step is -1"),
        ({"step": True}, "its step is True"),
        ({"pipeline": [1]}, "its entry 'pipeline' holds no names"),
        ({"optimizers": {1: 2}}, "its entry 'optimizers' holds no names"),
        ({"pipeline": {"a": torch.ones(3).to_sparse()}}, "pipeline.a is not a plain tensor"),
        ({"pipeline": {"a": torch.ones(3, device="meta")}}, "is not a"),
    ],
)
def test_other_contents_are_refused(state: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.ckpt"
    torch.save({"step": 1, "pipeline": {}, "optimizers": {}, **state}, path)
    with pytest.raises(InputError, match=re.escape(said)):
        checkpoints.read_checkpoint(path)


def test_no_changed_byte_of_a_pickle_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every byte of it in turn, with the right checksum, so that the loader meets it."""
    good = write(tmp_path, 1).read_bytes()
    with zipfile.ZipFile(tmp_path / "step-000000001.ckpt") as archive:
        length = len(archive.read(archive.infolist()[0]))
    path = tmp_path / "other" / "step-000000002.ckpt"
    path.parent.mkdir()
    for place in range(0, length, 3):
        path.write_bytes(good)
        _with_pickle(path, lambda content: content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])  # noqa: B023
        try:
            state = checkpoints.read_checkpoint(path, mapped=True)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert state is not None and set(state) == {"step", "pipeline", "optimizers"}


# -- packed runs


def _packed(tmp_path: Path) -> Path:
    return pack_run(tiny_run(tmp_path), half=False, overwrite=False, progress=iter).folder


def test_no_damaged_block_of_a_packed_checkpoint_goes_unsaid(tmp_path: Path) -> None:
    """Regression: of 40 damaged blocks of 4 KiB three were rendered, as only the table of contents was looked at."""
    folder = _packed(tmp_path)
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.Loader)
    (path,) = (folder / "nerfstudio_models").iterdir()
    good, first = path.read_bytes(), newest_checkpoint(path.parent)[0]["pipeline"]
    first = {name: value.clone() for name, value in first.items()}
    config.get_checkpoint_dir()
    refused = 0
    for start in range(0, len(good), 4096):
        block = bytes(byte ^ 0x55 for byte in good[start : start + 4096])
        path.write_bytes(good[:start] + block + good[start + 4096 :])
        try:
            config.get_checkpoint_dir()  # what ns-eval, ns-render, ns-export and ns-viewer ask
        except InputError as error:
            assert "there is no whole checkpoint" in str(error)
            refused += 1
        else:
            now = newest_checkpoint(path.parent)[0]["pipeline"]
            assert all(torch.equal(value, now[name]) for name, value in first.items()), "padding alone"
    assert refused > 0.9 * len(good) / 4096 - 1


def test_one_flipped_bit_makes_every_command_take_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: ns-eval and infnerf-ortho rendered it, infnerf-pack said nothing."""
    run = tiny_run(tmp_path)
    state, path = newest_checkpoint(run / "nerfstudio_models")
    newer = checkpoints.checkpoint_path(path.parent, 9)
    assert checkpoints.write_checkpoint({**state, "step": 9}, newer, None) is None
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    said = f"the checkpoint {newer} is damaged (its checksums do not match); {path.name} is used instead"
    config = yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)
    config.get_checkpoint_dir()
    assert config.load_step == 7 and said in capsys.readouterr().err
    pack_run(run, half=False, overwrite=False, progress=iter)
    assert said in capsys.readouterr().err


def _pages(folder: Path) -> tuple[PageFiles, Path, dict[str, np.ndarray], torch.Tensor]:
    from tiny_packed import tiny_packed

    packed = tiny_packed(folder)
    field, checksums = packed.model.field, packed.state["field.page_checksums"].clone()
    files = PageFiles(packed.pages, field.octree, field.pages, checksums)
    return files, files.path(1), files.read(1), checksums


@pytest.mark.parametrize("dtype", ["int32", "uint32", "bfloat16", "float64"])
def test_a_page_of_another_type_is_refused(dtype: str, tmp_path: Path) -> None:
    """Regression: a type of the same size passed the checksum, and its bits were taken for other numbers."""
    files, path, _, _ = _pages(tmp_path)
    name = {"int32": b"I32", "uint32": b"U32", "bfloat16": b"BF16", "float64": b"F64"}[dtype]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"F32"', b'"' + name + b'"', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(PageError, match=f"the page {path} is damaged"):
        files.read(1)


def test_a_page_covers_names_types_and_shapes() -> None:
    numbers = np.arange(8, dtype=np.float32)
    sums = [
        checksum({"a": numbers}),
        checksum({"b": numbers}),
        checksum({"a": numbers.view(np.int32)}),
        checksum({"a": numbers.reshape(2, 4)}),
    ]
    assert len(set(sums)) == 4 and len({checksum({"a": each}, described=False) for each in (numbers, numbers + 0)}) == 1


def test_pages_of_earlier_versions_are_read(tmp_path: Path) -> None:
    files, _, page, checksums = _pages(tmp_path)
    checksums[1] = checksum(page, described=False)
    earlier = PageFiles(files.folder, files._octree, _Layout(files), checksums)
    assert all(np.array_equal(value, page[name]) for name, value in earlier.read(1).items())
    checksums[1] += 1
    with pytest.raises(PageError, match="its checksum is not the one"):
        PageFiles(files.folder, files._octree, _Layout(files), checksums).read(1)


class _Layout:
    """The layout of files that were opened before."""

    def __init__(self, files: PageFiles) -> None:
        self.node_page = lambda level: files._sizes[level]


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_a_page_that_is_no_file_is_damaged(kind: str, tmp_path: Path) -> None:
    files, path, _, _ = _pages(tmp_path)
    (tmp_path / "odd").mkdir()
    odd, said = odd_files(tmp_path / "odd")[kind]
    path.unlink()
    path.symlink_to(odd)
    with pytest.raises(PageError, match=re.escape(said) if kind != "loop" else "missing|leads back"):
        files.read(1)


def test_the_archive_of_torch_is_what_is_expected(tmp_path: Path) -> None:
    """Should torch write another format one day, this says so."""
    path = write(tmp_path, 1)
    state = torch.load(path, weights_only=True, mmap=True)
    assert checkpoint_archive.record_problem(path, state) is None
