"""infnerf-inspect: what it says of a tree, of page files and of a view is so; its one-line errors; its picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from commands import STEPS, Finished, Trained, run_all
from nerfstudio.cameras.cameras import Cameras, CameraType
from results import picture
from rich.console import Console
from tiny_model import tiny_camera
from tiny_packed import TinyPacked, tiny_packed, tiny_run

from infnerf_ns.cli import inspect_run
from infnerf_ns.cli.inspect_run import Inspect
from infnerf_ns.cli.inspect_tree import StoredTree, read_tree
from infnerf_ns.cli.inspect_view import View, load_model, look
from infnerf_ns.cli.pack import pack_run
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.training import checkpoints

UNITS = {"KiB": 2**10, "MiB": 2**20}


def counted_run(folder: Path, active: int | None = None) -> Path:
    """A tiny run that has counted its training samples: none in the last node, and the more the higher the number."""
    run = tiny_run(folder)
    (path,) = checkpoints.whole_checkpoints(run / "nerfstudio_models")
    state = checkpoints.read_checkpoint(path)
    samples = 100 * (1 + torch.arange(len(state["pipeline"]["_model.field.tree_level"])) ** 2)
    samples[-1] = 0
    state["pipeline"]["_model.field.node_samples"] = samples
    if active is not None:
        state["pipeline"]["_model.field.active_level"] = torch.tensor(active)
    assert checkpoints.write_checkpoint(state, path, keep=None) is None
    return run


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of a printed table, by the first cell of their row and the name of their column."""
    lines = text[text.index(title) :].splitlines()
    header = next(line for line in lines if line.startswith("┃"))
    names = [cell.strip() for cell in header.strip("┃").split("┃")]
    body = lines[: next(n for n, line in enumerate(lines) if line.startswith("└"))]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in body if line.startswith("│")]
    return {row[0]: dict(zip(names, row)) for row in rows}


def size(text: str) -> float:
    """Bytes that a printed size stands for, to the tenth of its unit."""
    number, unit = text.split()
    return float(number.replace(",", "")) * UNITS[unit]


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%"))


def is_size(text: str, expected: float) -> bool:
    return size(text) == pytest.approx(expected, abs=0.051 * UNITS[text.split()[1]])


def packed_run(run: Path, half: bool = False) -> Path:
    return pack_run(run, half=half, overwrite=False, progress=iter).folder


# -- the tree


def test_a_run_is_told_as_its_checkpoint_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = counted_run(tmp_path)
    capsys.readouterr()  # the table of the training
    Inspect(run).main()
    text = capsys.readouterr().out
    rows, counts, tree = table(text, "Octree of"), table(text, "Training samples per node"), read_tree(run)
    (path,) = checkpoints.whole_checkpoints(run / "nerfstudio_models")
    state = checkpoints.read_checkpoint(path)["pipeline"]
    level, total = state["_model.field.tree_level"], 0
    assert list(rows) == list(counts) == ["0", "1", "2", "3", "total"]
    for each in range(4):
        row, here = rows[str(each)], state["_model.field.node_samples"][level == each]
        banks = [state[f"_model.field.{kind}.{each}"] for kind in ("grids", "decoders", "proposals")]
        total += 4 * sum(bank.numel() for bank in banks)
        assert is_size(row["memory"], 4 * sum(bank.numel() for bank in banks))
        assert number(row["nodes"]) == len(here)
        assert number(row["GSD"]) == pytest.approx(tree.octree.cube.side / (2**each * 2 * 16), rel=1e-3)
        assert number(row["pruned"]) == pytest.approx(100 * (1 - len(here) / 8**each), abs=0.051)
        counted = [number(cell) for cell in counts[str(each)].values()]
        assert counted == [each, here.min(), int(np.median(here)), here.max(), here.sum(), each == 3]
    assert is_size(rows["total"]["memory"], total) and number(rows["total"]["nodes"]) == len(level)
    assert number(counts["total"]["never trained"]) == 1 and "on disk" not in rows["total"]
    assert number(counts["total"]["all nodes"]) == state["_model.field.node_samples"].sum()
    full = 1 + 8 + 64 + 512
    assert number(rows["total"]["pruned"]) == pytest.approx(100 * (1 - len(level) / full), abs=0.051)
    assert str(path) in text and "step 7" in text and "residual children, a decoder per node" in text
    assert "have not started" not in text and "--plot" in text


def test_no_number_is_cut_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: "4,9…"."""
    run = counted_run(tmp_path)
    monkeypatch.setattr(inspect_run, "Console", lambda **_: Console(width=40))
    capsys.readouterr()
    Inspect(run).main()
    text = capsys.readouterr().out
    assert "…" not in text and max(len(line) for line in text.splitlines() if line.startswith("│")) <= 40


def test_levels_that_have_not_started_and_samples_that_were_not_counted_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = counted_run(tmp_path / "new", active=1)
    Inspect(run / "config.yml").main()
    assert "levels deeper than 1 have not started" in capsys.readouterr().out
    Inspect(tiny_run(tmp_path / "old")).main()
    assert "training samples per node: not counted, the run was trained with an earlier" in capsys.readouterr().out


@pytest.mark.parametrize("sharing", ["node", "level", "tree"])
def test_bytes_of_a_view_are_those_of_the_cache(sharing: str, tmp_path: Path) -> None:
    """Shared decoders are always in memory, whatever nodes a view uses."""
    packed = tiny_packed(tmp_path, field={"decoder_sharing": sharing})
    streamed, field = packed.load(), packed.model.field
    view = look(streamed, tiny_camera(CameraType.PERSPECTIVE, 60.0), "view")
    tree = StoredTree(tmp_path, None, tmp_path, 0, field.octree, field.pages, 3, None, None)
    assert tree.bytes_of(view.used) == streamed.views.last_frame.bytes_used < sum(tree.memory_bytes)
    assert tree.bytes_of(torch.ones_like(view.used)) == sum(tree.memory_bytes) == streamed.views.cache.model_bytes


# -- page files


@pytest.mark.parametrize("half", [False, True])
def test_a_packed_run_tells_the_sizes_of_its_files(
    half: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_run(counted_run(tmp_path), half)
    capsys.readouterr()
    Inspect(folder, verify=True).main()
    text = capsys.readouterr().out
    rows = table(text, "Octree of")
    for level in (1, 2, 3):
        files = (folder / "pages" / f"level-{level}").iterdir()
        assert is_size(rows[str(level)]["on disk"], sum(file.stat().st_size for file in files))
        ratio = size(rows[str(level)]["memory"]) / size(rows[str(level)]["on disk"])
        assert 0.85 < ratio / (2 if half else 1) < 1.01
    assert rows["0"]["on disk"] == "-"
    assert number(table(text, "Training samples per node")["0"]["most"]) == 100, "counts are packed, too"
    assert {(row["missing"], row["damaged"]) for row in rows.values()} == {("0", "0")}


def test_verify_finds_every_bad_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed_run(counted_run(tmp_path))
    capsys.readouterr()
    first, second = sorted((folder / "pages" / "level-2").iterdir())[:2]
    third = next((folder / "pages" / "level-3").iterdir())
    first.unlink()
    content = bytearray(second.read_bytes())
    content[-5] ^= 1
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:-100])

    Inspect(folder).main()
    text = capsys.readouterr().out
    assert "damaged" not in text and "1 page files are missing; --verify also reads them" in text
    with pytest.raises(InputError) as caught:
        Inspect(folder, verify=True).main()
    assert "3 of" in str(caught.value) and "infnerf-pack with --overwrite" in str(caught.value)
    assert any(str(page) in str(caught.value) for page in (first, second))
    rows = table(capsys.readouterr().out, "Octree of")
    assert [(row["missing"], row["damaged"]) for row in rows.values()] == [
        *[("0", "0")] * 2,
        ("1", "1"),
        ("0", "1"),
        ("1", "2"),
    ]


# -- a view


@pytest.fixture
def models(tmp_path: Path) -> TinyPacked:
    return tiny_packed(tmp_path)


def is_sound(view: View) -> None:
    assert float(view.picture_share.sum()) == pytest.approx(1) and float(view.sample_share.sum()) == pytest.approx(1)
    assert bool(view.used[0]) and bool((view.in_view | ~view.used).all()), "used nodes are in view"


def test_packed_and_unpacked_models_use_the_same(models: TinyPacked) -> None:
    used = []
    for focal in (30.0, 3000.0):
        camera = tiny_camera(CameraType.PERSPECTIVE, focal, 48, 32)
        plain, streamed = look(models.model, camera, "plain"), look(models.load(), camera, "streamed")
        for view in (plain, streamed):
            is_sound(view)
            assert view.rgb.shape == view.level_color.shape == (32, 48, 3) and view.footprint_scale == 1
        assert torch.equal(plain.used, streamed.used) and torch.equal(plain.in_view, streamed.in_view)
        assert torch.allclose(plain.picture_share, streamed.picture_share, atol=1e-4)
        assert torch.allclose(plain.sample_share, streamed.sample_share, atol=1e-4)
        used.append(int(plain.used.sum()))
    assert min(used) > 1 and len(set(used)) == 2
    assert models.model.on_evaluated is None and "route" not in vars(models.model.field.octree)


def test_the_mean_of_the_histogram_is_that_of_the_level_picture(models: TinyPacked) -> None:
    """The picture's colours are looked up in the colour map; its pixels count by their accumulation."""
    camera = tiny_camera(CameraType.PERSPECTIVE, 200.0, 48, 32)
    view = look(models.model, camera, "view")
    outputs = models.model.get_outputs_for_camera(camera)
    colors = matplotlib.colormaps["turbo"](np.arange(256))[:, :3]
    index = np.abs(outputs["level"].numpy()[:, :, None] - colors).sum(-1).argmin(-1)
    accumulation = outputs["accumulation"].numpy()[..., 0]
    mean = (3 * index / 255 * accumulation).sum() / accumulation.sum()
    assert np.ptp(index) > 20
    assert float((view.picture_share * torch.arange(4)).sum()) == pytest.approx(mean, abs=0.01)


def test_a_cut_of_the_tree_uses_no_finer_level(models: TinyPacked) -> None:
    camera = tiny_camera(CameraType.PERSPECTIVE, 3000.0)
    whole = look(models.model, camera, "whole")
    models.model.field.level_cap = 1
    cut = look(models.model, camera, "cut")
    assert float(whole.sample_share[2:].sum()) > 0.1 and float(cut.sample_share[2:].sum()) == 0
    assert float(cut.picture_share[2:].sum()) == 0 and int(models.model.field.octree.level[cut.used].max()) == 1
    is_sound(cut)


def test_too_small_a_budget_is_told(models: TinyPacked) -> None:
    streamed = models.load()
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + 3 * cache.page_bytes)
    view = look(streamed, tiny_camera(CameraType.PERSPECTIVE, 3000.0), "view")
    assert view.footprint_scale > 1 and int(view.used.sum()) <= 4 < int(view.in_view.sum())


def test_the_rays_that_try_out_a_budget_do_not_count(models: TinyPacked) -> None:
    """Regression: the histogram also held the few thousand rays that say which nodes an image needs."""
    streamed = models.load()
    cache, camera = streamed.views.cache, tiny_camera(CameraType.PERSPECTIVE, 3000.0)
    cache.set_budget(cache.root_bytes + 3 * cache.page_bytes)
    streamed.get_outputs_for_camera(camera)
    scale = streamed.views.last_frame.footprint_scale
    tried = look(streamed, camera, "tried out")
    assert tried.footprint_scale == scale > 1
    models.model.footprint_scale = scale
    asked = look(models.model, camera, "asked for")
    models.model.footprint_scale = 1.0
    assert torch.allclose(tried.sample_share, asked.sample_share, atol=1e-4)


@pytest.fixture
def in_place(models: TinyPacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder whose model needs no data: its held-out photos are two cameras."""
    run = counted_run(tmp_path / "place")
    near, far = (tiny_camera(CameraType.PERSPECTIVE, focal) for focal in (3000.0, 30.0))
    both = [torch.cat([getattr(near, name), getattr(far, name)]) for name in ("camera_to_worlds", "fx", "fy")]
    cameras = Cameras(*both, near.cx[0], near.cy[0], near.width[0], near.height[0])

    def load(folder: Path) -> tuple[InfNeRFModel, Cameras]:
        assert folder == run
        return models.model, cameras

    monkeypatch.setattr(inspect_run, "load_model", load)
    return run


def test_views_are_printed_and_drawn(
    in_place: Path, models: TinyPacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "new" / "tree.png"
    Inspect(in_place, photo=(1, 0), plot=plot).main()
    text, octree = capsys.readouterr().out, models.model.field.octree
    for focal, photo in ((3000.0, 0), (30.0, 1)):
        view = look(models.model, tiny_camera(CameraType.PERSPECTIVE, focal), "view")
        rows = table(text, f"held-out photo {photo}, 12 x 8 pixels")
        for level in range(4):
            row, at = rows[str(level)], octree.level == level
            assert number(row["share of picture"]) == pytest.approx(100 * float(view.picture_share[level]), abs=0.06)
            assert number(row["share of samples"]) == pytest.approx(100 * float(view.sample_share[level]), abs=0.06)
            assert number(row["in view"]) == view.in_view[at].sum() and number(row["used"]) == view.used[at].sum()
        assert rows["total"]["share of picture"] == rows["total"]["share of samples"] == "100.0 %"
        assert f"the view uses {int(view.used.sum())} of {octree.num_nodes} nodes" in text
    assert f"infnerf: wrote {plot}" in text
    with_views = picture(plot)
    Inspect(in_place, plot=plot).main()
    without = picture(plot)
    assert with_views.shape[1] == without.shape[1] and len(with_views) > 1.5 * len(without)
    assert without.std() > 0.1


@pytest.mark.parametrize("name", ["tree.svg", "tree.pdf"])
def test_vector_pictures(name: str, in_place: Path, tmp_path: Path) -> None:
    Inspect(in_place, plot=tmp_path / name).main()
    start = (tmp_path / name).read_bytes()[:200]
    assert (b"<?xml" if name.endswith("svg") else b"%PDF") in start


def test_cameras_of_a_path(in_place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pose = torch.eye(4)
    pose[:3] = tiny_camera(CameraType.PERSPECTIVE, 1.0).camera_to_worlds[0]
    stop = {"camera_to_world": pose.flatten().tolist(), "fov": 50.0, "aspect": 1.5}
    path = tmp_path / "path.json"
    path.write_text(json.dumps({"render_height": 10, "render_width": 15, "camera_path": [stop] * 3}))
    Inspect(in_place, photo=(2,), camera_path=path).main()
    rows = table(capsys.readouterr().out, "camera 2, 15 x 10 pixels")
    assert rows["total"]["share of picture"] == "100.0 %"
    with pytest.raises(InputError, match="--photo 3: the camera path has 3 cameras, numbered from 0"):
        Inspect(in_place, photo=(3,), camera_path=path).main()
    with pytest.raises(InputError, match="say with --photo which of its cameras"):
        Inspect(in_place, camera_path=path).main()
    path.write_text("{}")
    with pytest.raises(InputError, match="path.json: cannot be read as a camera path"):
        Inspect(in_place, photo=(0,), camera_path=path).main()


# -- wrong input


def test_wrong_input_is_one_line(in_place: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yml").write_text(yaml.dump({"method_name": "nerfacto"}))
    for arguments, message in (
        ({"run": tmp_path / "nowhere"}, "nowhere: there is no config.yml"),
        ({"run": tmp_path / "other"}, "this is not a run of infnerf"),
        ({"run": in_place, "photo": (2,)}, "--photo 2: the run has 2 held-out photos, numbered from 0"),
        ({"run": in_place, "photo": (0, -1)}, "--photo -1: the run has 2"),
        ({"run": in_place, "plot": tmp_path / "tree.txt"}, "tree.txt: the name must end in .png, .svg or .pdf"),
        ({"run": in_place, "plot": tmp_path / "a file" / "tree.png"}, "a file cannot be made"),
        ({"run": in_place, "verify": True}, "--verify: .* is not packed"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Inspect(**arguments).main()
        assert "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_written(in_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree.png").mkdir()
    with pytest.raises(InputError, match="tree.png: cannot be written"):
        Inspect(in_place, plot=tmp_path / "tree.png").main()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot be written to; choose another folder"):
        Inspect(in_place, plot=tmp_path / "other.png").main()


def test_without_a_whole_checkpoint_of_infnerf(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (path,) = checkpoints.whole_checkpoints(run / "nerfstudio_models")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="there is no whole checkpoint"):
        Inspect(run).main()
    torch.save({"step": 7, "pipeline": {"_model.weight": torch.ones(1)}, "optimizers": {}}, path)
    with pytest.raises(InputError, match="step-000000007.ckpt holds no octree"):
        Inspect(run).main()


# -- a real run


@pytest.fixture(scope="module")
def answers(trained: Trained, packed: Path) -> dict[str, Finished]:
    place = trained.workplace
    return run_all(
        {
            name: ["infnerf-inspect", run, "--photo", 8, "--plot", place.folder / f"{name}.png", *more]
            for name, run, more in (("inspect", trained.folder, []), ("inspect_packed", packed, ["--verify"]))
        },
        place.logs,
    )


@pytest.mark.slow
def test_a_trained_run_and_its_packed_one_use_the_same(
    answers: dict[str, Finished], trained: Trained, packed: Path
) -> None:
    plain, streamed = (answers[name].succeeded().out for name in ("inspect", "inspect_packed"))
    title = "held-out photo 8, 64 x 48 pixels"
    rows = table(plain, title)
    assert rows == table(streamed, title)
    shares = [number(row["share of picture"]) for level, row in rows.items() if level != "total"]
    assert sum(shares) == pytest.approx(100, abs=0.2) and max(shares) < 100
    trees = [table(text, "Octree of") for text in (plain, streamed)]
    for level, row in trees[0].items():
        assert row.items() <= trees[1][level].items() and trees[1][level]["damaged"] == "0"
    assert "infnerf: wrote" in plain and "infnerf: wrote" in streamed
    for name in answers:
        assert picture(trained.workplace.folder / f"{name}.png").std() > 0.1


@pytest.mark.slow
def test_training_samples_are_counted_by_level(trained: Trained, packed: Path) -> None:
    """Every sample of every ray of every step counts once, whichever levels have started."""
    tree, same = read_tree(trained.folder), read_tree(packed)
    rays = STEPS * tree.config.pipeline.datamanager.train_num_rays_per_batch
    assert int(tree.node_samples.sum()) == rays * tree.config.pipeline.model.sampler.samples
    assert torch.equal(tree.node_samples, same.node_samples)
    assert all(int(tree.node_samples[tree.octree.level == level].sum()) > 0 for level in range(3))


@pytest.mark.slow
def test_nodes_that_a_real_view_uses_are_in_view(trained: Trained, packed: Path) -> None:
    for folder in (trained.folder, packed):
        model, cameras = load_model(folder)
        assert (model.views is not None) == (folder == packed)
        is_sound(look(model, cameras[3:4], "held-out photo 3"))


@pytest.mark.slow
def test_a_run_that_was_moved_and_renamed_is_the_one_that_is_rendered(packed: Path, tmp_path: Path) -> None:
    """Regression: nerfstudio loads what lies where the run was."""
    moved = shutil.copytree(packed, tmp_path / "another" / "name" / "moved")
    model, cameras = load_model(moved)
    model.get_outputs_for_camera(cameras[3:4])
    assert model.views is not None and model.views.cache.counters.pages_read > 0
    assert moved in model.views.cache.files.path(1).parents
