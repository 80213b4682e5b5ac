"""infnerf-pack: packed and unpacked models render the same, and no failure harms the run."""

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
from nerfstudio.cameras.cameras import CameraType
from tiny_model import CONE_ALONE, ray_batch, scrambled, tiny_camera, tiny_config, tiny_model
from tiny_packed import MANY_SAMPLES, TinyPacked, tiny_packed, tiny_run

from infnerf_ns.cli.pack import Packed, pack_run
from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel
from infnerf_ns.streaming.packing import CHECKSUMS, small_state, write_pages
from infnerf_ns.training import checkpoints

CAMERAS = {
    "perspective": (CameraType.PERSPECTIVE, 60.0),
    "close": (CameraType.PERSPECTIVE, 3000.0),
    "fisheye": (CameraType.FISHEYE, 20.0),
    "equirectangular": (CameraType.EQUIRECTANGULAR, 12.0),
    "orthographic": (CameraType.ORTHOPHOTO, 200.0),
}
FIELDS = {
    "residual": {},
    "independent": {"children": "independent"},
    "decoder per level": {"decoder_sharing": "level"},
    "one decoder": {"decoder_sharing": "tree"},
}


every_sampler = pytest.mark.parametrize("sampler", [CONE_ALONE, MANY_SAMPLES], ids=["cone", "interval"])


def camera(kind: str):  # noqa: ANN201
    return tiny_camera(*CAMERAS[kind], width=48, height=32)


def differences(one: InfNeRFModel, other: InfNeRFModel, kind: str) -> dict[str, float]:
    """Largest difference of each output."""
    a, b = one.get_outputs_for_camera(camera(kind)), other.get_outputs_for_camera(camera(kind))
    assert a.keys() == b.keys() and a["rgb"].std() > 0.01
    return {name: float((a[name] - b[name]).abs().max()) for name in a}


@pytest.mark.parametrize(("field", "sampler"), [*((field, CONE_ALONE) for field in FIELDS), ("residual", MANY_SAMPLES)])
def test_packed_and_unpacked_models_render_the_same(field: str, sampler: dict, tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path, field=FIELDS[field], sampler=sampler)
    streamed = packed.load()
    used = []
    for kind in CAMERAS:
        assert max(differences(packed.model, streamed, kind).values()) < 1e-4, kind
        used.append(streamed.views.last_frame.nodes_used)
        assert streamed.views.last_frame.footprint_scale == 1
        assert bool((streamed.views.in_view | ~streamed.views.used).all()), "used nodes are in view"
    assert max(used) > 10 and min(used) < max(used)
    assert streamed.views.cache.counters.pages_read < packed.model.field.octree.num_nodes
    rays, _ = ray_batch()
    for name, value in packed.model(rays).items():
        assert torch.allclose(streamed(ray_batch()[0])[name], value, atol=1e-4), name
    densities = [model.field.density_at(rays.origins / 3) for model in (packed.model, streamed)]
    assert torch.allclose(*densities, rtol=1e-5)


def test_half_precision_pages_are_nearly_as_good(tmp_path: Path) -> None:
    whole, half = tiny_packed(tmp_path / "whole"), tiny_packed(tmp_path / "half", half=True)
    size = [sum(file.stat().st_size for file in each.pages.rglob("*.safetensors")) for each in (whole, half)]
    assert size[1] < 0.6 * size[0]
    assert 1e-5 < half.rounding < 1e-3
    off = differences(half.model, half.load(), "perspective")
    assert 0 < off["rgb"] < 0.02


def test_the_memory_of_a_loaded_model_is_that_of_its_cache(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    streamed, field = packed.load(), packed.model.field
    cache = streamed.views.cache
    banks = [bank for kind in ("grids", "decoders", "proposals") for bank in getattr(field, kind)]
    assert cache.model_bytes == sum(4 * bank.numel() for bank in banks)
    assert cache.resident_bytes == cache.root_bytes == sum(4 * bank[0].numel() for bank in banks if len(bank) == 1)
    own = {bank.untyped_storage().data_ptr(): bank.untyped_storage().nbytes() for bank in streamed.field.parameters()}
    assert sum(own.values()) <= cache.model_bytes + 4 * streamed.field.appearance.weight.numel()


@every_sampler
def test_a_small_budget_draws_coarser_and_never_more(
    sampler: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    packed = tiny_packed(tmp_path, sampler=sampler)
    streamed = packed.load()
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + 6 * cache.page_bytes)
    coarse = differences(packed.model, streamed, "close")
    report = streamed.views.last_frame
    assert report.footprint_scale > 1 and report.nodes_used <= 7 and coarse["rgb"] > 1e-3
    assert cache.counters.peak_bytes <= cache.budget_bytes and cache.counters.evictions == 0
    assert "views are drawn coarser" in capsys.readouterr().err
    packed.model.footprint_scale = report.footprint_scale
    assert max(differences(packed.model, streamed, "close").values()) < 1e-4, "it is the picture of larger footprints"


def test_levels_that_are_cut_are_not_in_view(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    streamed = packed.load()
    streamed.field.level_cap = packed.model.field.level_cap = 1
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + 8 * cache.page_bytes)
    assert max(differences(packed.model, streamed, "close").values()) < 1e-4
    assert streamed.views.last_frame.nodes_in_view <= 9 and not streamed.views.last_frame.coarsened


@every_sampler
def test_what_is_hidden_takes_no_room(sampler: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rays end at the first surface: the nodes behind it can be touched, but are not."""
    packed = tiny_packed(tmp_path, sampler=sampler)
    solid = packed.load()
    cache = solid.views.cache
    cache.set_budget(cache.root_bytes + 20 * cache.page_bytes)
    solid.get_outputs_for_camera(camera("perspective"))
    probed = solid.views.last_frame
    monkeypatch.setattr("infnerf_ns.streaming.views._PROBE_MARGIN", 1.0)  # the probe's answer is never used
    solid.get_outputs_for_camera(camera("perspective"))
    certain = solid.views.last_frame
    assert 1 < probed.footprint_scale < certain.footprint_scale
    assert certain.nodes_used < probed.nodes_used <= 21
    assert cache.counters.peak_bytes <= cache.budget_bytes


@every_sampler
def test_nothing_pops_and_nothing_is_missing_on_a_flight(sampler: dict, tmp_path: Path) -> None:
    """Down to the scene under a budget, whose footprint scale goes up and down on the way: a still camera sees no
    change, a ten-thousandth of the distance next to none, and no part is missing of what the whole model shows."""
    packed = tiny_packed(tmp_path, sampler=sampler)
    streamed = packed.load()
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + 40 * cache.page_bytes)

    def picture(distance: float, model: InfNeRFModel = streamed) -> dict[str, torch.Tensor]:
        at = tiny_camera(CameraType.PERSPECTIVE, 300.0, 48, 32)
        at.camera_to_worlds[0, :, 3] *= distance
        return model.get_outputs_for_camera_ray_bundle(model.camera_rays(at))

    scales, levels, changes = [], set(), []
    for distance in (0.35 * 1.3**step for step in range(18)):
        first, again, whole = picture(distance), picture(distance), picture(distance, packed.model)
        assert torch.equal(first["rgb"], again["rgb"]), "a still camera"
        covered = whole["accumulation"] > 0.9
        assert bool((first["accumulation"][covered] > 0.5).all())
        scales.append(streamed.views.last_frame.footprint_scale)
        levels |= set(cache.octree.level[streamed.views.used].tolist())
        changes.append(float((picture(1.0001 * distance)["rgb"] - first["rgb"]).abs().mean()))
    assert max(scales) > 1.5 and min(scales) == 1.0 and levels == {0, 1, 2, 3}
    jumps = []
    for distance in (1.0, 3.0):
        streamed.footprint_scale = 1.0
        before = picture(distance)
        streamed.footprint_scale = 2 * streamed.views.last_frame.footprint_scale
        jumps.append(float((picture(distance)["rgb"] - before["rgb"]).abs().mean()))
    assert max(changes) < 2e-4 and min(jumps) > 50 * max(changes), "a level that switches at once would be seen"
    assert cache.counters.peak_bytes <= cache.budget_bytes


def test_a_budget_below_the_root_still_draws_the_root(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    streamed = packed.load()
    streamed.views.cache.set_budget(1)
    packed.model.field.level_cap = 0
    assert max(differences(packed.model, streamed, "perspective").values()) < 1e-4
    assert streamed.views.last_frame.nodes_used == 1


def test_rays_from_everywhere_are_drawn_region_by_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tiny_packed(tmp_path)
    streamed = packed.load()
    monkeypatch.setattr("infnerf_ns.streaming.views._REGION_RAYS", 16)
    rays, _ = ray_batch(100)
    rays.pixel_area[:] = 1e-4
    cache = streamed.views.cache
    batches = []
    route = streamed.field.route
    streamed.field.route = lambda positions, *rest: batches.append(len(positions)) or route(positions, *rest)
    expected, found = packed.model(rays), streamed(rays)
    assert len(batches) >= 2 * 7, "rendering and normals of seven parts"
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-4), name
    assert cache.counters.evictions == 0


def test_the_next_camera_of_a_path_finds_its_nodes_loaded(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    streamed = packed.load()
    cache = streamed.views.cache
    for step in range(3):
        moved = camera("close")
        moved.camera_to_worlds[0, 0, 3] += 0.15 * step
        cache.settle()
        before = cache.counters.misses
        streamed.get_outputs_for_camera(moved)
    assert cache.counters.prefetched > 0
    still = packed.load()
    still.config.streaming.prefetch = False
    for step in range(3):
        moved = camera("close")
        moved.camera_to_worlds[0, 0, 3] += 0.15 * step
        alone = still.views.cache.counters.misses
        still.get_outputs_for_camera(moved)
    assert cache.counters.misses - before < still.views.cache.counters.misses - alone
    assert still.views.cache.counters.prefetched == 0


def test_a_picture_of_one_row_is_one(tmp_path: Path) -> None:
    """Regression: neither the rays that stand for the next camera nor those that try out a budget were any."""
    packed = tiny_packed(tmp_path)
    streamed = packed.load()
    cache = streamed.views.cache
    cache.set_budget(cache.root_bytes + 3 * cache.page_bytes)
    row = tiny_camera(CameraType.PERSPECTIVE, 3000.0, width=12_000, height=1)
    for _ in range(2):
        assert streamed.get_outputs_for_camera(row)["rgb"].shape == (1, 12_000, 3)
        row.camera_to_worlds[..., 3] += 1e-3
    assert streamed.views.last_frame.coarsened


def test_a_packed_model_says_what_does_not_fit(tmp_path: Path) -> None:
    packed = tiny_packed(tmp_path)
    broken = TinyPacked(packed.model, tmp_path / "nowhere", packed.state, 0.0)
    with pytest.raises(InputError, match="its folder of pages, .*nowhere, is not there"):
        broken.load()
    other = TinyPacked(packed.model, packed.pages, {**packed.state, "field.more": torch.ones(1)}, 0.0)
    with pytest.raises(InputError, match="field.more is in one of them only"):
        other.load()
    with pytest.raises(InputError, match="stays on the device"):
        packed.load().to("meta")


# -- the command


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
