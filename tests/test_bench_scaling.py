"""``infnerf-bench scaling``: rows, sizes and counts; no test looks at a time."""

from __future__ import annotations

import csv
import mmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny_model import CONE_ALONE, ray_batch, scrambled, tiny_config, tiny_scene
from torch import Tensor

from infnerf_ns.cli import bench_scaling
from infnerf_ns.cli.bench_scaling import Scaling
from infnerf_ns.cli.bench_touched import BLOCK_BYTES, touched_by_step
from infnerf_ns.cli.bench_town import Town, TownRays, survey_town
from infnerf_ns.cli.bench_trainer import StepTrainer
from infnerf_ns.cli.bench_training import depth_loss, resident_bytes
from infnerf_ns.data.demo_scene import DemoSceneOptions
from infnerf_ns.data.demo_scene.photographer import Photographer
from infnerf_ns.data.demo_scene.survey import Survey
from infnerf_ns.data.pyramid_datamanager import PyramidDataManagerConfig
from infnerf_ns.errors import InputError
from infnerf_ns.kernels import HashLayout
from infnerf_ns.kernels.layout import PRIMES

TINY = """
common:
  pipeline:
    model:
      octree: {max_level: 3, node_resolution: 64, min_points: 200}
      field: {hash_levels: 3, base_resolution: 4, log2_table_size: 10, hidden_width: 16, color_hidden_width: 16,
              proposal_resolution: 16, proposal_log2_table_size: 10}
      sampler: {proposal_samples: [12, 8], samples: 6, proposal_warmup: 8, anneal_steps: 8}
      losses: {tree_points: 16}
"""
PER_BLOCK = BLOCK_BYTES // 4


@pytest.fixture(scope="module")
def town() -> Town:
    return survey_town(1, 0, PyramidDataManagerConfig(), rays=32, batches=2)


@pytest.mark.slow
def test_scaling_measures_two_towns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset, output = tmp_path / "tiny.yaml", tmp_path / "results" / "version 0.1"
    preset.write_text(TINY)
    Scaling((1, 2), rays=32, steps=4, warm_up=8, preset=str(preset), output=output).main()
    with open(output.parent / "version 0.1.csv") as file:
        one, two = csv.DictReader(file)
    assert (one["area"], two["area"]) == ("1.0", "4.0")
    assert (one["photos"], two["photos"]) == ("140", "378"), "seven of eight photos of the demo scene train"
    for row in (one, two):
        levels = [int(nodes) for nodes in row["nodes_per_level"].split("/")]
        assert sum(levels) == int(row["nodes"]) and levels[0] == 1
        assert 1 < float(row["touched_nodes"]) <= int(row["nodes"]), "all levels have started"
        assert 1 <= float(row["levels_per_sample"]) <= len(levels)
        parameters, state = float(row["parameters_mib"]), float(row["training_state_mib"])
        assert 4 * parameters < state < 4.2 * parameters, "gradients, two moments, and a flag per block"
        assert 0 < float(row["touched_mib"]) < state
        assert parameters <= float(row["resident_mib"]) <= state < float(row["peak_mib"])
        assert float(row["ms_10"]) <= float(row["ms"]) <= float(row["ms_90"])
    for column in ("nodes", "points", "parameters_mib", "training_state_mib", "photos_mib"):
        assert float(two[column]) > 1.5 * float(one[column])
    assert one["ratio"] == "1.0" and float(two["ratio"]) > 0
    assert Image.open(output.parent / "version 0.1.png").size[0] > 300
    printed = capsys.readouterr().out
    assert "$ " in printed and "MiB" in printed and two["nodes_per_level"] in printed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": (2, 1)}, "--sizes 2 1: give two or more rising numbers, 1 to 64"),
        ({"sizes": (1, 1)}, "--sizes 1 1: give two or more rising"),
        ({"sizes": (1,)}, "--sizes 1: give two or more rising"),
        ({"sizes": (0, 1)}, "--sizes 0 1: give two or more rising numbers, 1 to 64"),
        ({"sizes": (1, 65)}, "--sizes 1 65: give two or more rising numbers, 1 to 64"),
        ({"rays": 0}, "--rays 0: give 1 or more"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"warm_up": -1}, "--warm-up -1: give 0 or more"),
        ({"preset": "huge"}, "there is no preset 'huge'"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scaling(**{"output": tmp_path / "out", **options}).main()


def test_towns_that_do_not_fit_are_refused_before_the_training(
    tmp_path: Path, town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_scaling, "survey_town", lambda *_: town)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 << 30}))
    with pytest.raises(InputError, match="--sizes 1 2: the towns of 1 and 1 .* need 3.2 GiB at once, but only 2.0 GiB"):
        Scaling((1, 2), output=tmp_path / "out").main()


def test_a_town_has_the_rays_and_colours_of_its_photos(town: Town) -> None:
    options = DemoSceneOptions(1)
    survey = Survey(1, 0, options.num_photos, options.lens)
    source = TownRays(town.cameras, PyramidDataManagerConfig())
    draw = source.draw(1, 32)
    rays, batch = source(town, 1)
    assert torch.equal(rays.directions, source(town, 3)[0].directions), "two batches go round"
    assert torch.equal(rays.nears[:, 0], town.near_planes[draw.photo]) and (rays.nears >= town.scene.near).all()
    train = np.flatnonzero(np.arange(options.num_photos) % 8 != 4)
    finest = torch.nonzero(draw.level == 0)[:3, 0].tolist()
    assert len(finest) == 3
    for ray in finest:
        pose = survey.poses[train[int(draw.photo[ray])]]
        photo = Photographer(survey.town, survey.rays, options.lens, 2).photo(pose)
        color = photo[int(draw.row[ray]), int(draw.column[ray])] / 255
        np.testing.assert_allclose(batch["image"][ray].numpy(), color, atol=1.01 / 255)
    assert batch["image"].std() > 0.05
    finite = torch.isfinite(batch["depth"])
    assert finite.float().mean() > 0.8 and (batch["depth"] > rays.nears[:, 0]).all()
    # The SfM points lie on the surfaces that the rays end at: none of the ends is far from all of them.
    ends = rays.origins[finite] + rays.directions[finite] * batch["depth"][finite, None]
    inside = ends[:, :2].abs().amax(dim=1) < 0.5
    assert inside.sum() > 5 and torch.cdist(ends[inside], town.scene.points).min(dim=1).values.max() < 0.1


def test_the_depth_loss_wants_all_weight_at_the_depth() -> None:
    starts = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1)[..., None]
    samples = SimpleNamespace(frustums=SimpleNamespace(starts=starts, ends=starts + 1))
    batch = {"depth": torch.tensor([2.5, torch.inf])}
    losses = []
    for weights in ([0.0, 1.0, 0.0], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]):
        weights = torch.tensor([weights, [1.0, 0.0, 0.0]])[..., None]
        losses.append(float(depth_loss({"weights_list": [weights], "ray_samples_list": [samples]}, batch)))
    assert losses == sorted(losses) and losses[0] == pytest.approx(0, abs=1e-3) and losses[1] > 0.01


def test_resident_bytes_are_those_that_were_written() -> None:
    megabyte = 1 << 20
    array = torch.frombuffer(mmap.mmap(-1, 64 * megabyte), dtype=torch.uint8)  # nobody has had these pages before
    if resident_bytes([array]) < 0:
        pytest.skip("this system does not tell")
    assert resident_bytes([array]) < 4 * megabyte
    array[: 16 * megabyte] = 1
    assert 16 * megabyte <= resident_bytes([array]) < 20 * megabyte


@pytest.mark.parametrize("children", ["residual", "independent"])
def test_touched_blocks_are_those_of_an_independent_count(children: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the corners of all samples' cells, found by the published indexing rule, sample by sample."""
    config = tiny_config({"children": children}, CONE_ALONE, level_start_steps=0)
    trainer = StepTrainer(config, tiny_scene(), num_photos=3)
    tree = scrambled(trainer.model).field
    tree.activate_level(2)
    octree = tree.octree
    read: dict[str, set] = {"grids": set(), "proposals": set()}
    nodes, levels = set(), []
    density, proposal_density = tree.density, tree.proposal_density

    def look_up(kind: str, layouts: list[HashLayout], unit: Tensor, path: Tensor, whole_path: bool) -> None:
        for sample, at in zip(unit.detach(), path.tolist()):
            on_path = [node for node in at if node >= 0]
            for node in on_path if whole_path else on_path[-1:]:
                level = int(octree.level[node])
                local = octree.local(sample[None], torch.tensor([node]), level)[0]
                nodes.add(node)
                read[kind] |= {(node, block) for block in _blocks(local.numpy(), layouts[level])}

    def density_of(routed, frozen=False):  # noqa: ANN001, ANN202
        if not replayed:
            look_up("grids", tree.layouts, routed.unit, routed.path, children == "residual")
            levels.extend((routed.path >= 0).sum(dim=1).tolist())
        return density(routed, frozen)

    def proposal_density_of(positions, footprints, routing_scale):  # noqa: ANN001, ANN202
        if not replayed:
            unit = octree.cube.to_unit(positions)
            look_up("proposals", tree.proposal_layouts, unit, octree.route(unit, footprints), True)
        return proposal_density(positions, footprints, routing_scale)

    # The count asks the field again for what it has asked before: that is not a second reading.
    replayed: list[bool] = []
    backward = trainer.backward
    monkeypatch.setattr(trainer, "backward", lambda *a: (backward(*a), replayed.append(True)))
    tree.density, tree.proposal_density = density_of, proposal_density_of
    rays, batch = ray_batch(16)
    before = [bank.detach().clone() for bank in trainer.model.parameters()]
    touched = touched_by_step(trainer, 1, rays, batch)
    assert octree.depth == 2 and len(nodes) > 9
    assert {kind: len(blocks) for kind, blocks in read.items()} == {kind: touched.read_blocks[kind] for kind in read}
    assert touched.nodes == len(nodes)
    assert touched.levels_per_sample == pytest.approx(np.mean(levels))
    for kind, blocks in touched.written_blocks.items():
        assert 0 < blocks <= touched.read_blocks[kind]
    blocks = sum(touched.read_blocks.values()) + 3 * sum(touched.written_blocks.values())
    assert touched.bytes == 64 * blocks + touched.flag_bytes
    for bank, value in zip(trainer.model.parameters(), before):
        assert torch.equal(bank, value) and (bank.grad is None or not bank.grad.any()), "nothing is trained"


def _blocks(local: np.ndarray, layout: HashLayout) -> set[int]:
    """Blocks of 16 floats of a node's page that hold the corners of a sample's cells."""
    found = set()
    for level in range(layout.num_levels):
        size, resolution = int(layout.sizes[level]), int(layout.resolutions[level])
        cell = np.floor(local * layout.scales[level] + np.float32(0.5)).astype(np.int64)
        for corner in range(8):
            x, y, z = (int(c) + ((corner >> axis) & 1) for axis, c in enumerate(cell))
            if layout.hashed[level]:
                entry = (x * PRIMES[0] ^ (y * PRIMES[1] & 0xFFFFFFFF) ^ (z * PRIMES[2] & 0xFFFFFFFF)) % size
            else:
                entry = (x + resolution * (y + resolution * z)) % size
            first = (int(layout.offsets[level]) + entry) * layout.features
            found |= {(first + feature) // PER_BLOCK for feature in range(layout.features)}
    return found
