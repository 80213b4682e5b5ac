"""The model on a hand-made SfM scene: all kinds of camera, checkpoints of other trees."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.utils import colormaps
from tiny_model import (
    CONE_ALONE,
    DEPTH,
    PHOTOS,
    ray_batch,
    scrambled,
    tiny_camera,
    tiny_config,
    tiny_model,
    tiny_scene,
    training_losses,
)
from torch import Tensor

from infnerf_ns.errors import InputError
from infnerf_ns.field import FieldConfig, OctreeField
from infnerf_ns.model import APPEARANCE, InfNeRFModelConfig
from infnerf_ns.octree import RootCube, build_octree
from infnerf_ns.ray_nodes import Evaluated
from infnerf_ns.training.optimizer import NodeAdam


def test_a_rendered_camera_has_the_near_plane_of_what_it_shows() -> None:
    """The camera is 1.73 from the middle of points in a cube of edge 1."""
    model = tiny_model().eval()
    camera = tiny_camera(*CAMERAS["perspective"])
    near = model.camera_rays(camera).nears
    assert 0.4 < near.min() == near.max() < 0.75
    assert model.camera_rays(tiny_camera(*CAMERAS["orthographic"])).nears.max() == pytest.approx(0.2)
    box = OrientedBox(torch.eye(3), torch.zeros(3), torch.full((3,), 2.0))
    cropped = model.camera_rays(camera, box).nears
    assert cropped.min() >= near.min() and cropped.max() > near.max()
    fixed = tiny_model(tiny_config(sampler={"near_plane": 0.3})).eval()
    assert fixed.near_planes is None and fixed.camera_rays(camera).nears is None


def test_made_up_points_set_no_near_plane() -> None:
    scene = tiny_scene()
    scene.source = "frusta"
    camera = tiny_camera(*CAMERAS["perspective"])
    assert tiny_model(scene=scene).camera_rays(camera).nears.max() == pytest.approx(0.2)


def test_loading_the_tree_that_is_there_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    model.load_state_dict(state)


def test_an_image_of_rays_without_a_camera_gets_a_near_plane() -> None:
    model = tiny_model().eval()
    rays = tiny_camera(*CAMERAS["perspective"]).generate_rays(camera_indices=0, keep_shape=True)
    model.get_outputs_for_camera_ray_bundle(rays)
    assert 0.4 < rays.nears.min() == rays.nears.max() < 0.75


def test_rays_start_at_their_near_planes() -> None:
    model = tiny_model().train()
    rays, _ = ray_batch()
    rays.nears = torch.linspace(0.05, 1.0, len(rays))[:, None]
    with torch.no_grad():
        starts = model(rays)["ray_samples_list"][0].frustums.starts[:, 0, 0]
    floored = rays.nears[:, 0]
    assert bool((starts >= floored * 0.999).all()) and bool((starts <= floored * 1.4).all())


# -- rendering ---------------------------------------------------------------------------------------------------------

CAMERAS = {
    "perspective": (CameraType.PERSPECTIVE, 10.0),
    "fisheye": (CameraType.FISHEYE, 6.0),
    "equirectangular": (CameraType.EQUIRECTANGULAR, 6.0),
    "orthographic": (CameraType.ORTHOPHOTO, 8.0),
}


@pytest.mark.parametrize("kind", CAMERAS)
@pytest.mark.parametrize("blend", [True, False])
def test_every_camera_is_rendered(kind: str, blend: bool) -> None:
    model = scrambled(tiny_model()).eval()
    model.config.blend_levels = blend
    model.config.eval_num_rays_per_chunk = 50  # two chunks
    camera = tiny_camera(*CAMERAS[kind])
    outputs = model.get_outputs_for_camera(camera)
    channels = {"rgb": 3, "accumulation": 1, "depth": 1, "expected_depth": 1, "level": 3, "node": 3, "normals": 3}
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        name: (8, 12, count) for name, count in channels.items()
    }
    for name, value in outputs.items():
        assert bool(torch.isfinite(value).all()) and not value.requires_grad, name
        if "depth" in name:
            assert value.min() >= model.sampler.near * 0.999 and value.max() <= 100.1 * model.field.octree.cube.side, (
                name
            )
        else:
            assert value.min() >= 0 and value.max() <= 1 + 1e-5, name
    assert outputs["rgb"].std() > 0 and outputs["accumulation"].max() > 0.5
    again = model.get_outputs_for_camera(camera)
    assert all(torch.equal(value, again[name]) for name, value in outputs.items()), "evaluation draws nothing"


def test_normals_can_be_left_out() -> None:
    model = tiny_model().eval()
    model.config.render_normals = False
    assert "normals" not in model.get_outputs_for_camera(tiny_camera(*CAMERAS["perspective"]))


def test_an_empty_view_is_rendered() -> None:
    """No sample of these rays has a weight: there is no colour, no normal and no node to ask."""
    model = tiny_model(tiny_config({"downweight": 0.0})).eval()
    inputs, hidden, _ = model.field.density_widths
    for grids, decoders in zip(model.field.grids, model.field.decoders):
        grids.data.fill_(1.0)
        decoders.data.fill_(-1.0)
        decoders.data[:, : inputs * hidden] = 1.0
    outputs = model.get_outputs_for_camera(tiny_camera(*CAMERAS["perspective"]))
    assert outputs["accumulation"].max() < 1e-3
    assert bool(torch.isfinite(outputs["rgb"]).all()) and bool(torch.isfinite(outputs["normals"]).all())


def test_the_level_of_an_orthographic_view_follows_its_ground_pixel() -> None:
    model = scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval()
    gsd = model.field.octree.gsd
    root = colormaps.apply_colormap(torch.zeros(1, 1))[0]
    coarse = model.get_outputs_for_camera(tiny_camera(CameraType.ORTHOPHOTO, 1 / (2 * 2 * gsd(0))))["level"]
    fine = model.get_outputs_for_camera(tiny_camera(CameraType.ORTHOPHOTO, 1 / (2 * gsd(DEPTH) / 2)))["level"]
    assert torch.allclose(coarse, root.expand_as(coarse)), "a pixel of twice the root's resolution needs the root alone"
    assert (fine - root).abs().amax(dim=-1).max() > 0.2


def test_a_camera_far_away_needs_the_root_alone() -> None:
    model = scrambled(tiny_model()).eval()
    rays, _ = ray_batch()
    rays.pixel_area[:] = 1e-1
    root = colormaps.apply_colormap(torch.zeros(1, 1))[0]
    before = model(rays)
    assert torch.allclose(before["level"], root.expand(len(rays), 3))
    for bank in (*model.field.grids[1:], *model.field.decoders[1:]):
        bank.data.fill_(float("nan"))
    assert torch.equal(model(rays)["rgb"], before["rgb"]), "not one deeper page was read"


def test_long_intervals_have_coarser_nodes_answer() -> None:
    model = scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval()
    rays, _ = ray_batch()
    rays.pixel_area[:] = 1e-9
    evaluated: list[Evaluated] = []
    model.on_evaluated = evaluated.append
    levels = []
    for share in (0.0, 0.25, 1.0):
        model.config.sampler.interval_footprint = share
        model(rays)
        levels.append(model.field.octree.level[evaluated[-1].routed.node].double().mean())
    assert levels[0] > levels[1] + 0.1 and levels[1] > levels[2]


def test_nothing_pops_in_a_colour_while_the_pixel_shrinks() -> None:
    model = scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval()
    for bank in model.field.proposals:
        bank.data.zero_()  # the samples stand still
    rays = ray_batch(1)[0][torch.zeros(1201, dtype=torch.long)]
    rays.pixel_area = torch.logspace(-1, -7, 1201)[:, None]
    jump = {}
    for blend in (True, False):
        model.config.blend_levels = blend
        jump[blend] = model(rays)["rgb"].diff(dim=0).abs().max()
    assert jump[False] > 0.01, "the blend has something to hide"
    assert jump[True] < 0.1 * jump[False]


def test_samples_without_weight_get_no_colour() -> None:
    model = scrambled(tiny_model(), by=1.0).eval()
    rays, _ = ray_batch(256)
    colors = {}
    for threshold in (0.0, 1e-3, 0.1):
        model.config.color_weight_threshold = threshold
        colors[threshold] = model(rays)["rgb"]
    samples = model.config.sampler.samples
    assert 0 < (colors[1e-3] - colors[0.0]).abs().max() < 1e-3 * samples
    assert (colors[0.1] - colors[0.0]).abs().max() > 0.05


def test_appearance_codes() -> None:
    model = scrambled(tiny_model())
    torch.nn.init.normal_(model.field.appearance.weight)
    rays, _ = ray_batch()
    model.eval()
    mean = model(rays)["rgb"]
    rays.metadata[APPEARANCE] = model.field.appearance.weight.mean(dim=0).expand(len(rays), -1)
    assert torch.allclose(model(rays)["rgb"], mean, atol=1e-6)
    rays.metadata[APPEARANCE] = model.field.appearance.weight[0].expand(len(rays), -1)
    assert not torch.allclose(model(rays)["rgb"], mean, atol=1e-3)
    assert tiny_model(tiny_config({"appearance_dim": 0})).eval()(ray_batch()[0])["rgb"].shape == (64, 3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_training_rays_has_the_mean_appearance(share: float) -> None:
    torch.manual_seed(0)
    config = tiny_config()
    config.mean_appearance_share = share
    model = tiny_model(config).train()
    table = model.field.appearance.weight
    torch.nn.init.normal_(table)
    rays, _ = ray_batch(2000)
    photo = rays.camera_indices[:, 0]
    codes = model._appearance(rays)
    of_mean = (codes == table.mean(dim=0)).all(dim=1)
    assert torch.equal(codes[~of_mean], table[photo[~of_mean]])
    assert float(of_mean.float().mean()) == pytest.approx(share, abs=0.05 if share == 0.5 else 0.0)
    (gradient,) = torch.autograd.grad(codes.sum(), table)  # the mean teaches nobody's code
    assert torch.equal(gradient[:, 0], torch.bincount(photo[~of_mean], minlength=PHOTOS).float())


def test_images_and_metrics_of_a_photo() -> None:
    model = tiny_model().eval()
    outputs = model.get_outputs_for_camera(tiny_camera(CameraType.PERSPECTIVE, 20.0, 24, 16))
    metrics, images = model.get_image_metrics_and_images(outputs, {"image": outputs["rgb"] + 0.1})
    assert metrics["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert set(images) == {"img", "accumulation", "depth", "level", "node", "normals"}
    assert images["img"].shape == (16, 48, 3)


# -- parameters and checkpoints ----------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group() -> None:
    model = tiny_model()
    groups = model.get_param_groups()
    kinds = [f"{kind}_{level}" for kind in ("grids", "decoders", "proposals") for level in range(DEPTH + 1)]
    assert set(groups) == {*kinds, "appearance"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.field.parameters())


def test_levels_start_on_schedule() -> None:
    model = tiny_model(tiny_config(level_start_steps=10), active=0)
    callback, _ = model.get_training_callbacks(SimpleNamespace(trainer=None, optimizers=None))
    levels = []
    for step in (0, 9, 10, 19, 20, 500):
        callback.run_callback(step)
        levels.append(int(model.field.active_level))
        assert model.step == step
    assert levels == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("sharing", ["node", "level", "tree"])
def test_a_checkpoint_of_another_tree_is_loaded_in_place(sharing: str) -> None:
    config = tiny_config({"decoder_sharing": sharing})
    saved = scrambled(tiny_model(config, tiny_scene(seed=1, count=400)))
    model = tiny_model(config, tiny_scene(seed=2, count=150), active=0)
    assert model.field.octree.nodes_per_level != saved.field.octree.nodes_per_level
    before = dict(model.named_parameters())
    model.load_state_dict({name: value.clone() for name, value in saved.state_dict().items()})
    for name, parameter in model.named_parameters():
        assert parameter is before[name], "the optimizers hold on to this object"
        assert torch.equal(parameter, saved.get_parameter(name)), name
    assert torch.equal(model.field.octree.coords, saved.field.octree.coords)
    assert int(model.field.active_level) == DEPTH
    positions = torch.rand(200, 3) - 0.5
    footprints = torch.full((200,), 1e-4)
    assert torch.equal(model.field.density_at(positions, footprints), saved.field.density_at(positions, footprints))
    rays, _ = ray_batch()
    assert torch.equal(model.eval()(rays)["rgb"], saved.eval()(ray_batch()[0])["rgb"]), (
        "near plane and spacing come along"
    )
    optimizer = NodeAdam(list(model.field.grids), lr=0.01)
    training_losses(model)["rgb_loss"].backward()
    optimizer.step()
    assert not torch.equal(model.field.grids[0], saved.field.grids[0]), "and it trains on"


def _refusal(state: dict[str, Tensor], config: InfNeRFModelConfig | None = None) -> str:
    with pytest.raises(InputError) as caught:
        tiny_model(config).load_state_dict(state)
    message = str(caught.value)
    assert message.startswith("infnerf: ") and "\n" not in message
    return message


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    state = tiny_model().state_dict()
    assert "holds no octree" in _refusal({"field.weight": torch.zeros(1)})
    message = _refusal(state, tiny_config(max_level=DEPTH + 1))
    assert "field.decoders.3 is in one of them only" in message and "config.yml" in message
    message = _refusal(state, tiny_config({"log2_table_size": 9}))
    assert "field.grids.0 is (1, " in message and "--pipeline.model.field" in message
    assert "field.appearance.weight" in _refusal(state, tiny_config({"appearance_dim": 0}))
    more = {**state, "field.appearance.weight": torch.zeros(PHOTOS + 3, state["field.appearance.weight"].shape[1])}
    assert f"was trained on {PHOTOS + 3} photos, but the capture has {PHOTOS} to train on now" in _refusal(more)
    del state["field.proposals.1"]
    assert "field.proposals.1" in _refusal(state)


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = tiny_model().field
    needed = sum(field.pages.memory_bytes(field.octree))
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(InputError, match="GiB, but only .* lower --pipeline.model.octree.max-level"):
        tiny_model()
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=needed))
    tiny_model()


def test_unusable_scenes_are_refused() -> None:
    scene = tiny_scene()
    scene.points[:] = 0.25
    with pytest.raises(InputError, match="all SfM points lie at one place"):
        tiny_model(scene=scene)
    with pytest.raises(InputError, match="PyramidDataManager"):
        tiny_config().setup(scene_box=None, num_train_data=PHOTOS, metadata={})


def test_a_tree_of_one_level_has_nothing_to_blend() -> None:
    model = scrambled(tiny_model(tiny_config(max_level=0), active=0)).eval()
    rays, _ = ray_batch()
    rays.pixel_area[:] = 1e-3
    blended = model(rays)["rgb"]
    model.config.blend_levels = False
    assert torch.allclose(model(rays)["rgb"], blended, atol=1e-6)


def test_background_detail_that_the_pixel_resolves_is_kept() -> None:
    """A pixel of 1/500 rad, 50 cube edges away: the contracted cell there is several pixels wide."""
    cube = RootCube(torch.zeros(3), 1.0, torch.eye(3))
    tree = build_octree(torch.zeros(1, 3), torch.ones(1), cube, max_level=0, min_points=1, node_resolution=256)
    field = OctreeField(tree, FieldConfig(), 0, num_photos=1)
    field.grids[0].data.normal_()
    directions = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    far = 50.0
    footprint = torch.full((200,), far / 500 / math.sqrt(math.pi))
    sharp = field.density_at(directions * far).log()
    seen = field.density_at(directions * far, footprint).log()
    assert seen.std() > 0.5 * sharp.std()


def test_memory_is_checked_before_pages_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(OctreeField, "reset_parameters", lambda self: filled.append(1))
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InputError):
        tiny_model()
    assert not filled


def test_a_ray_that_is_no_number_spoils_itself_alone() -> None:
    """A broken pose in a camera path must not end the viewer or the render."""
    model = tiny_model().eval()
    rays, _ = ray_batch()
    with torch.no_grad():
        expected = model(rays)["rgb"]
        rays, _ = ray_batch()
        rays.directions[3] = math.nan
        got = model(rays)["rgb"]
    others = torch.arange(len(rays)) != 3
    assert torch.allclose(got[others], expected[others], atol=1e-5)
