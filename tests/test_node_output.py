"""The output `node`: a colour per node, of the one that evaluates the middle of a ray's weight."""

from __future__ import annotations

import torch
from nerfstudio.cameras.cameras import CameraType
from tiny_model import DEPTH, scrambled, tiny_camera, tiny_model
from torch import Tensor

from infnerf_ns.field import Routed
from infnerf_ns.ray_nodes import Evaluated, node_image
from infnerf_ns.tree_colors import node_colors


def colors_of(model, nodes: list[int]) -> Tensor:  # noqa: ANN001
    octree = model.field.octree
    return node_colors(octree.level[nodes], octree.coords[nodes])


def routed_to(nodes: list[int], order: list[int]) -> Routed:
    """Samples that these nodes evaluate; only who evaluates which one matters."""
    count = len(nodes)
    node, order = torch.tensor(nodes), torch.tensor(order)
    return Routed(torch.zeros(count, 3), torch.zeros(count, DEPTH + 1).long(), node, order, None)


def test_it_is_the_node_with_more_than_half_of_the_weight() -> None:
    model = tiny_model()
    weights = torch.tensor([[0.4, 0.3, 0.3], [0.1, 0.5, 0.3], [0.0, 0.0, 0.0]])[..., None]
    routed = routed_to([2, 3, 3, 5, 6, 5, 1, 1, 1], list(range(9)))
    found = node_image(model.field.octree, Evaluated(routed, torch.ones(9), weights))
    assert torch.allclose(found, torch.cat([colors_of(model, [3, 6]), torch.zeros(1, 3)]))


def test_of_a_sample_between_two_levels_it_is_the_node_with_the_larger_share() -> None:
    model = tiny_model()
    # samples 0 and 1 are blended, 2 is not; sorted by node, as routing leaves them
    routed = routed_to([1, 1, 7, 12, 20], [0, 1, 2, 0, 1])
    share = torch.tensor([0.3, 0.6, 1.0, 0.7, 0.4])
    for heaviest, node in enumerate((12, 1, 7)):
        weights = torch.full((1, 3, 1), 0.2)
        weights[0, heaviest] = 0.6
        found = node_image(model.field.octree, Evaluated(routed, share, weights))
        assert torch.allclose(found, colors_of(model, [node]))


def test_renders_show_the_nodes_that_they_use() -> None:
    model = scrambled(tiny_model()).eval()
    octree = model.field.octree
    camera = tiny_camera(CameraType.PERSPECTIVE, 100.0, 96, 64)
    camera.camera_to_worlds[..., 3] = 0.1  # with the far plane below: rays within the root cube
    for footprint_scale, deepest in ((1.0, DEPTH), (1e6, 0)):
        model.footprint_scale = footprint_scale
        rays = model.camera_rays(camera)
        rays.fars = torch.full_like(rays.pixel_area, 0.4)
        shown = model.get_outputs_for_camera_ray_bundle(rays)["node"].reshape(-1, 3)
        off = (shown[:, None] - node_colors(octree.level, octree.coords)).abs().amax(dim=-1)
        assert off.min(dim=1).values.max() < 1e-5
        nodes = off.argmin(dim=1).unique()
        assert int(octree.level[nodes].max()) == deepest
        assert (len(nodes) > 3) == (deepest > 0)
