"""Packed and unpacked models render the same, within a budget and on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from tiny_model import CONE_ALONE, ray_batch, tiny_camera
from tiny_packed import CAMERAS, MANY_SAMPLES, TinyPacked, camera, differences, tiny_packed

from infnerf_ns.errors import InputError
from infnerf_ns.model import InfNeRFModel

FIELDS = {
    "residual": {},
    "independent": {"children": "independent"},
    "decoder per level": {"decoder_sharing": "level"},
    "one decoder": {"decoder_sharing": "tree"},
}

every_sampler = pytest.mark.parametrize("sampler", [CONE_ALONE, MANY_SAMPLES], ids=["cone", "interval"])


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
