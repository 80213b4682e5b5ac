"""The model on a hand-made SfM scene: all kinds of camera, the losses, checkpoints of other trees, a short training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox, SceneBox
from nerfstudio.utils import colormaps
from tiny_capture import look_at_origin
from torch import Tensor

from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.field import FieldConfig, OctreeField
from infnerf_ns.model import APPEARANCE, InfNeRFModel, InfNeRFModelConfig, LossConfig
from infnerf_ns.octree import RootCube, build_octree
from infnerf_ns.sampler import SamplerConfig
from infnerf_ns.training.optimizer import NodeAdam
from infnerf_ns.tree_building import OctreeConfig

PHOTOS, DEPTH = 3, 2


def _scene(seed: int = 0, count: int = 600) -> SfMScene:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator) - 0.5
    footprints = 0.05 * torch.rand(count, generator=generator) ** 3
    return SfMScene(points, footprints, torch.full((count,), 3), near=0.2 + 0.01 * seed, source="tracks")


def _config(
    field: dict | None = None, sampler: dict | None = None, losses: dict | None = None, **octree
) -> InfNeRFModelConfig:
    """A model of a few kilobytes."""
    sizes = {
        **{"hash_levels": 3, "base_resolution": 4, "log2_table_size": 10, "hidden_width": 16, "color_hidden_width": 16},
        **{"color_hidden_layers": 1, "geo_features": 7, "appearance_dim": 4},
        **{"proposal_resolution": 16, "proposal_log2_table_size": 10},
    }
    return InfNeRFModelConfig(
        octree=OctreeConfig(**{"max_level": DEPTH, "node_resolution": 16, "min_points": 4, **octree}),
        field=FieldConfig(**{**sizes, **(field or {})}),
        sampler=SamplerConfig(**{"proposal_samples": (24, 12), "samples": 8, **(sampler or {})}),
        losses=LossConfig(**{"tree_points": 64, "tree_every": 8, **(losses or {})}),
    )


def _model(
    config: InfNeRFModelConfig | None = None, scene: SfMScene | None = None, active: int = DEPTH
) -> InfNeRFModel:
    box = SceneBox(torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))
    model = (config or _config()).setup(
        scene_box=box, num_train_data=PHOTOS, metadata={"sfm_scene": scene or _scene()}, device="cpu", grad_scaler=None
    )
    model.field.activate_level(active)
    return model


def _scrambled(model: InfNeRFModel) -> InfNeRFModel:
    """The same model, as if it had learnt something: every page is another."""
    generator = torch.Generator().manual_seed(9)
    for bank in (*model.field.grids, *model.field.decoders, *model.field.proposals):
        bank.data.add_(0.2 * torch.randn(bank.shape, generator=generator))
    return model


def _camera(kind: CameraType, focal: float, width: int = 12, height: int = 8) -> Cameras:
    pose = torch.from_numpy(look_at_origin(np.array([0.3, -1.5, 0.8]))[None, :3]).float()
    return Cameras(pose, focal, focal, width / 2, height / 2, width, height, camera_type=kind)


def _batch(count: int = 64, seed: int = 0) -> tuple[RayBundle, dict[str, Tensor]]:
    """Training rays from random places around the scene towards it, and photo colours."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1) * 1.5
    targets = 0.4 * torch.randn(count, 3, generator=generator)
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    photos = torch.randint(PHOTOS, (count, 1), generator=generator)
    rays = RayBundle(origins, directions, torch.full((count, 1), 1e-5), camera_indices=photos)
    return rays, {"image": torch.rand(count, 3, generator=generator)}


def test_a_rendered_camera_has_the_near_plane_of_what_it_shows() -> None:
    """The camera is 1.73 from the middle of points in a cube of edge 1."""
    model = _model().eval()
    camera = _camera(*CAMERAS["perspective"])
    near = model.camera_rays(camera).nears
    assert 0.4 < near.min() == near.max() < 0.75
    assert model.camera_rays(_camera(*CAMERAS["orthographic"])).nears.max() == pytest.approx(0.2)
    box = OrientedBox(torch.eye(3), torch.zeros(3), torch.full((3,), 2.0))
    cropped = model.camera_rays(camera, box).nears
    assert cropped.min() >= near.min() and cropped.max() > near.max()
    fixed = _model(_config(sampler={"near_plane": 0.3})).eval()
    assert fixed.near_planes is None and fixed.camera_rays(camera).nears is None


def test_made_up_points_set_no_near_plane_and_older_checkpoints_have_one_for_all() -> None:
    scene = _scene()
    scene.source = "frusta"
    camera = _camera(*CAMERAS["perspective"])
    assert _model(scene=scene).camera_rays(camera).nears.max() == pytest.approx(0.2)
    state = {name: value for name, value in _model().state_dict().items() if not name.startswith("near_planes")}
    model = _model()
    model.load_state_dict(state)
    assert model.camera_rays(camera).nears is None


def test_loading_the_tree_that_is_there_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    model.load_state_dict(state)


def test_an_image_of_rays_without_a_camera_gets_a_near_plane() -> None:
    model = _model().eval()
    rays = _camera(*CAMERAS["perspective"]).generate_rays(camera_indices=0, keep_shape=True)
    model.get_outputs_for_camera_ray_bundle(rays)
    assert 0.4 < rays.nears.min() == rays.nears.max() < 0.75


def test_rays_start_at_their_near_planes() -> None:
    model = _model().train()
    rays, _ = _batch()
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
    model = _scrambled(_model()).eval()
    model.config.blend_levels = blend
    model.config.eval_num_rays_per_chunk = 50  # two chunks
    camera = _camera(*CAMERAS[kind])
    outputs = model.get_outputs_for_camera(camera)
    channels = {"rgb": 3, "accumulation": 1, "depth": 1, "expected_depth": 1, "level": 3, "normals": 3}
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
    model = _model().eval()
    model.config.render_normals = False
    assert "normals" not in model.get_outputs_for_camera(_camera(*CAMERAS["perspective"]))


def test_an_empty_view_is_rendered() -> None:
    """No sample of these rays has a weight: there is no colour, no normal and no node to ask."""
    model = _model(_config({"downweight": 0.0})).eval()
    inputs, hidden, _ = model.field.density_widths
    for grids, decoders in zip(model.field.grids, model.field.decoders):
        grids.data.fill_(1.0)
        decoders.data.fill_(-1.0)
        decoders.data[:, : inputs * hidden] = 1.0
    outputs = model.get_outputs_for_camera(_camera(*CAMERAS["perspective"]))
    assert outputs["accumulation"].max() < 1e-3
    assert bool(torch.isfinite(outputs["rgb"]).all()) and bool(torch.isfinite(outputs["normals"]).all())


def test_the_level_of_an_orthographic_view_follows_its_ground_pixel() -> None:
    model = _scrambled(_model()).eval()
    gsd = model.field.octree.gsd
    root = colormaps.apply_colormap(torch.zeros(1, 1))[0]
    coarse = model.get_outputs_for_camera(_camera(CameraType.ORTHOPHOTO, 1 / (2 * 2 * gsd(0))))["level"]
    fine = model.get_outputs_for_camera(_camera(CameraType.ORTHOPHOTO, 1 / (2 * gsd(DEPTH) / 2)))["level"]
    assert torch.allclose(coarse, root.expand_as(coarse)), "a pixel of twice the root's resolution needs the root alone"
    assert (fine - root).abs().amax(dim=-1).max() > 0.2


def test_a_camera_far_away_needs_the_root_alone() -> None:
    model = _scrambled(_model()).eval()
    rays, _ = _batch()
    rays.pixel_area[:] = 1e-1
    root = colormaps.apply_colormap(torch.zeros(1, 1))[0]
    before = model(rays)
    assert torch.allclose(before["level"], root.expand(len(rays), 3))
    for bank in (*model.field.grids[1:], *model.field.decoders[1:]):
        bank.data.fill_(float("nan"))
    assert torch.equal(model(rays)["rgb"], before["rgb"]), "not one deeper page was read"


def test_appearance_codes() -> None:
    model = _scrambled(_model())
    torch.nn.init.normal_(model.field.appearance.weight)
    rays, _ = _batch()
    model.eval()
    mean = model(rays)["rgb"]
    rays.metadata[APPEARANCE] = model.field.appearance.weight.mean(dim=0).expand(len(rays), -1)
    assert torch.allclose(model(rays)["rgb"], mean, atol=1e-6)
    rays.metadata[APPEARANCE] = model.field.appearance.weight[0].expand(len(rays), -1)
    assert not torch.allclose(model(rays)["rgb"], mean, atol=1e-3)
    assert _model(_config({"appearance_dim": 0})).eval()(_batch()[0])["rgb"].shape == (64, 3)


# -- losses ------------------------------------------------------------------------------------------------------------


def _losses(model: InfNeRFModel, step: int = 0) -> dict[str, Tensor]:
    model.train()
    model.step = step
    rays, batch = _batch()
    outputs = model(rays)
    metrics = model.get_metrics_dict(outputs, batch)
    assert {"psnr", "distortion"} <= set(metrics)
    return model.get_loss_dict(outputs, batch, metrics)


@pytest.mark.parametrize("children", ["residual", "independent"])
def test_all_losses_reach_all_parameters(children: str) -> None:
    # Short intervals, so that the proposal grids of all levels are asked.
    model = _scrambled(_model(_config({"children": children}, {"proposal_samples": (64, 160)})))
    losses = _losses(model)
    names = ("rgb", "distortion", "proposal", "inter_level", "transparency")
    assert set(losses) == {f"{name}_loss" for name in names}
    assert all(loss.shape == () and bool(torch.isfinite(loss)) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.field.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(torch.isfinite(parameter.grad).all()), name


def test_losses_follow_their_schedules_and_switches() -> None:
    model = _model(_config(sampler={"proposal_warmup": 4, "proposal_update_every": 4}))
    assert set(_losses(model, 3)) == {"rgb_loss", "distortion_loss", "proposal_loss"}, "tree losses come every 8 steps"
    assert set(_losses(model, 5)) == {"rgb_loss", "distortion_loss"}
    off = {"distortion": 0.0, "proposal": 0.0, "inter_level": 0.0, "transparency": 0.0, "rgb": "charbonnier"}
    assert set(_losses(_model(_config(losses=off)))) == {"rgb_loss"}
    assert "inter_level_loss" not in _losses(_model(active=0)), "a root alone has no levels to tie together"
    rays, batch = _batch()
    model.eval()
    assert set(model.get_loss_dict(model(rays), batch)) == {"rgb_loss"}


def test_the_weights_of_the_losses_are_factors() -> None:
    names = ("distortion", "proposal", "inter_level", "transparency")

    def weighted(factor: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return _losses(_scrambled(_model(_config(losses={name: factor for name in names}))))

    plain, heavy = weighted(0.5), weighted(1.0)
    assert plain["rgb_loss"].item() == heavy["rgb_loss"].item()
    for name in names:
        assert 2 * plain[f"{name}_loss"].item() == pytest.approx(heavy[f"{name}_loss"].item(), rel=1e-6), name


def test_images_and_metrics_of_a_photo() -> None:
    model = _model().eval()
    outputs = model.get_outputs_for_camera(_camera(CameraType.PERSPECTIVE, 20.0, 24, 16))
    metrics, images = model.get_image_metrics_and_images(outputs, {"image": outputs["rgb"] + 0.1})
    assert metrics["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert set(images) == {"img", "accumulation", "depth", "level", "normals"}
    assert images["img"].shape == (16, 48, 3)


# -- parameters and checkpoints ----------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group() -> None:
    model = _model()
    groups = model.get_param_groups()
    kinds = [f"{kind}_{level}" for kind in ("grids", "decoders", "proposals") for level in range(DEPTH + 1)]
    assert set(groups) == {*kinds, "appearance"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.field.parameters())


def test_levels_start_on_schedule() -> None:
    model = _model(_config(level_start_steps=10), active=0)
    (callback,) = model.get_training_callbacks(SimpleNamespace())
    levels = []
    for step in (0, 9, 10, 19, 20, 500):
        callback.run_callback(step)
        levels.append(int(model.field.active_level))
        assert model.step == step
    assert levels == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("sharing", ["node", "level", "tree"])
def test_a_checkpoint_of_another_tree_is_loaded_in_place(sharing: str) -> None:
    config = _config({"decoder_sharing": sharing})
    saved = _scrambled(_model(config, _scene(seed=1, count=400)))
    model = _model(config, _scene(seed=2, count=150), active=0)
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
    rays, _ = _batch()
    assert torch.equal(model.eval()(rays)["rgb"], saved.eval()(_batch()[0])["rgb"]), "near plane and spacing come along"
    optimizer = NodeAdam(list(model.field.grids), lr=0.01)
    _losses(model)["rgb_loss"].backward()
    optimizer.step()
    assert not torch.equal(model.field.grids[0], saved.field.grids[0]), "and it trains on"


def _refusal(state: dict[str, Tensor], config: InfNeRFModelConfig | None = None) -> str:
    with pytest.raises(InputError) as caught:
        _model(config).load_state_dict(state)
    message = str(caught.value)
    assert message.startswith("infnerf: ") and "\n" not in message
    return message


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    state = _model().state_dict()
    assert "holds no octree" in _refusal({"field.weight": torch.zeros(1)})
    message = _refusal(state, _config(max_level=DEPTH + 1))
    assert "field.decoders.3 is in one of them only" in message and "config.yml" in message
    message = _refusal(state, _config({"log2_table_size": 9}))
    assert "field.grids.0 is (1, " in message and "--pipeline.model.field" in message
    assert "field.appearance.weight" in _refusal(state, _config({"appearance_dim": 0}))
    del state["field.proposals.1"]
    assert "field.proposals.1" in _refusal(state)


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    field = _model().field
    needed = sum(field.pages.memory_bytes(field.octree))
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(InputError, match="GiB, but only .* lower --pipeline.model.octree.max-level"):
        _model()
    monkeypatch.setattr("infnerf_ns.tree_building.psutil.virtual_memory", lambda: SimpleNamespace(available=needed))
    _model()


def test_unusable_scenes_are_refused() -> None:
    scene = _scene()
    scene.points[:] = 0.25
    with pytest.raises(InputError, match="all SfM points lie at one place"):
        _model(scene=scene)
    with pytest.raises(InputError, match="PyramidDataManager"):
        _config().setup(scene_box=None, num_train_data=PHOTOS, metadata={})


# -- training ----------------------------------------------------------------------------------------------------------


def _train(config: InfNeRFModelConfig, steps: int, seed: int = 0) -> list[float]:
    """Losses of a short training on a scene of one colour."""
    torch.manual_seed(seed)
    model = _model(config, active=0).train()
    groups = model.get_param_groups()
    banks = [parameter for name, group in groups.items() if name != "appearance" for parameter in group]
    optimizers = [NodeAdam(banks, lr=1e-2), torch.optim.Adam(groups["appearance"], lr=1e-2)]
    (callback,) = model.get_training_callbacks(SimpleNamespace())
    curve = []
    for step in range(steps):
        callback.run_callback(step)
        rays, batch = _batch(128, seed=step)
        batch["image"] = torch.tensor([0.9, 0.2, 0.4]).expand(len(rays), 3)
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = model(rays)
        losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
        sum(losses.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
        curve.append(losses["rgb_loss"].item())
    return curve


@pytest.mark.parametrize("children", ["residual", "independent"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_training_learns_a_colour(children: str, backend: str) -> None:
    curve = _train(_config({"children": children, "backend": backend}, level_start_steps=10), 30)
    assert all(math.isfinite(loss) for loss in curve)
    assert np.mean(curve[-5:]) < 0.1 * curve[0]


def test_the_same_seed_gives_the_same_curve() -> None:
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        config = _config(level_start_steps=4)
        first, second, other = _train(config, 12), _train(config, 12), _train(config, 12, seed=1)
    finally:
        numba.set_num_threads(threads)
    assert first == second
    assert first != other


def test_a_tree_of_one_level_has_nothing_to_blend() -> None:
    model = _scrambled(_model(_config(max_level=0), active=0)).eval()
    rays, _ = _batch()
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
        _model()
    assert not filled
