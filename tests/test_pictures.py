"""Pictures of a training: their size and range, known colours at known places, and trees and rays at the limits."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infnerf_ns.octree import Octree, RootCube
from infnerf_ns.training.image_pictures import ERROR_SCALE, error_map, side_by_side
from infnerf_ns.training.pictures import octree_picture, sampling_picture, tree_history_picture
from infnerf_ns.tree_colors import level_colors

CUBE = RootCube(torch.tensor([0.5, 0.0, -1.0]), 2.0, torch.eye(3))


def _is_picture(picture: Tensor) -> bool:
    """As nerfstudio's writer takes it, with something on it."""
    assert picture.dtype == torch.float32 and picture.device.type == "cpu" and not picture.requires_grad
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.shape[1] <= 1600
    assert 0 <= picture.min() < picture.max() <= 1
    return True


def _share(picture: Tensor, color: Tensor) -> float:
    """Of the pixels that have a colour."""
    return float(((picture - color).abs().amax(dim=-1) < 1.5 / 255).float().mean())


def _level_color(level: int, depth: int, pale: bool = False) -> Tensor:
    color = level_colors(torch.tensor(float(level)), depth)
    return 0.5 + 0.5 * color if pale else color


# -- the tree over time


def _history(depth: int, events: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every level grows in turn and loses a few nodes later."""
    births = torch.zeros(events, depth + 1, dtype=torch.long)
    deaths = births.clone()
    births[0, 0] = 1
    for level in range(1, depth + 1):
        births[level, level] = 5 * 2**level
        deaths[level + 4, level] = 2**level
    return 100 * torch.arange(events), (births - deaths).cumsum(dim=0), births, deaths


@pytest.mark.parametrize("depth", [0, 1, 6])
def test_histories_of_any_depth(depth: int) -> None:
    picture = tree_history_picture(*_history(depth))
    assert _is_picture(picture)
    for level in range(depth + 1):
        assert _share(picture, _level_color(level, depth)) > 1e-4, f"level {level}"


def test_births_stand_above_deaths() -> None:
    """Births of level 2 at 2/11 of the training, deaths at 6/11."""
    steps, nodes, births, _ = _history(2)
    deaths = torch.zeros_like(births)
    deaths[6, 2] = 20

    def places(births: Tensor, deaths: Tensor) -> Tensor:
        bars = tree_history_picture(steps, nodes, births, deaths)[430:, :1000]  # neither lines nor legend
        return torch.nonzero((bars - _level_color(2, 2)).abs().amax(dim=-1) < 1.5 / 255)

    seen = places(births, deaths)
    born, died = seen[seen[:, 1] < 400], seen[seen[:, 1] >= 400]
    assert len(born) and len(died) and born[:, 0].max() < died[:, 0].min()
    assert len(places(births, 0 * deaths)) and len(places(0 * births, deaths))
    assert not len(places(0 * births, 0 * deaths))


def test_a_history_of_one_step_and_a_tree_that_never_changes() -> None:
    one = torch.ones(1, 1, dtype=torch.long)
    assert _is_picture(tree_history_picture(torch.tensor([0]), one, one, 0 * one))
    many = torch.tensor([[1, 8, 20]]).expand(1000, 3)
    assert _is_picture(tree_history_picture(torch.arange(1000), many, 0 * many, 0 * many))


def test_a_history_changes_with_each_of_its_inputs() -> None:
    history = _history(3)
    before = tree_history_picture(*history)
    assert torch.equal(before, tree_history_picture(*history))
    for changed in range(1, 4):
        other = [each.clone() for each in history]
        other[changed][7, 2] += 3
        assert not torch.equal(before, tree_history_picture(*other))


# -- the tree in space


def _tree(children: list[list[int]]) -> Octree:
    """A root with children in the given cells."""
    coords = torch.tensor([[0, 0, 0], *children])
    level = torch.tensor([0] + [1] * len(children))
    return Octree(CUBE, level, coords, level - 1, node_resolution=8)


def test_one_node_is_one_square() -> None:
    picture = octree_picture(_tree([]))
    assert _is_picture(picture)
    height, width, _ = picture.shape
    color = _level_color(0, 0, pale=True)
    for share in (0.25, 0.75):
        assert torch.allclose(picture[height // 2, int(share * width)], color, atol=1 / 255)
    assert _share(picture, color) > 0.4


def test_a_child_lies_in_its_quarter() -> None:
    """At low x, high y and low z: above left in the view from above, below left in the one from the side."""
    picture = octree_picture(_tree([[0, 1, 0]]))
    height, width, _ = picture.shape
    left, right = [int(share * width) for share in (0.17, 0.67)], [int(share * width) for share in (0.4, 0.9)]
    above, below = height // 4, 3 * height // 4
    for row, column, level in [
        *((above, left[0], 1), (above, right[0], 0), (below, left[0], 0), (below, right[0], 0)),
        *((above, left[1], 0), (above, right[1], 0), (below, left[1], 1), (below, right[1], 0)),
    ]:
        assert torch.allclose(picture[row, column], _level_color(level, 1, pale=True), atol=1 / 255), (row, column)


def test_thousands_of_nodes() -> None:
    cells = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    levels = [cells[(cells < 2**level).all(dim=1)] for level in range(5)]
    level = torch.cat([torch.full((len(each),), number) for number, each in enumerate(levels)])
    tree = Octree(CUBE, level, torch.cat(levels), level - 1, node_resolution=8)
    assert tree.num_nodes == 4681
    assert _share(octree_picture(tree), _level_color(4, 4, pale=True)) > 0.2


# -- the samples of a ray


def _ray(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Edges, weights and levels of two proposal rounds and the field's samples."""
    generator = torch.Generator().manual_seed(seed)
    edges = [torch.logspace(-1, 2, 49), torch.logspace(-0.5, 1, 25), torch.linspace(1, 3, 17)]
    weights = [torch.softmax(5 * torch.rand(len(each) - 1, generator=generator), dim=0) for each in edges]
    return edges, weights, torch.arange(16) // 6


def test_samples_have_their_levels_colour() -> None:
    edges, weights, level = _ray()
    picture = sampling_picture(edges, weights, level, depth=3)
    assert _is_picture(picture)
    rows = picture[: int(0.85 * len(picture))]  # without the legend
    assert [_share(rows, _level_color(each, 3)) > 0 for each in range(4)] == [True, True, True, False]


def test_a_rays_picture_changes_with_each_of_its_inputs() -> None:
    edges, weights, level = _ray()
    before = sampling_picture(edges, weights, level, 3)
    others = [
        sampling_picture([1.3 * edges[0], *edges[1:]], weights, level, 3),
        sampling_picture(edges, [weights[0], 0.5 * weights[1], weights[2]], level, 3),
        sampling_picture(edges, weights, level.flip(0), 3),
        sampling_picture(edges, weights, level.float() + 0.3, 3),
    ]
    assert not any(torch.equal(before, other) for other in others)


def test_rays_without_weight_or_proposals() -> None:
    edges, weights, level = _ray()
    assert _is_picture(sampling_picture(edges, [0 * each for each in weights], level, 2))
    assert _is_picture(sampling_picture(edges, [each / 0 * 0 for each in weights], level, 2)), "NaN"
    assert _is_picture(sampling_picture(edges[-1:], [weights[-1].requires_grad_()], 0 * level, 0))
    opaque = torch.zeros(16).index_fill(0, torch.tensor([15]), 1.0)
    assert _is_picture(sampling_picture(edges, [*weights[:2], opaque], level, 2))


# -- renders


def test_error_map_by_hand() -> None:
    colors = torch.tensor(matplotlib.colormaps["inferno"].colors)
    target = torch.full((2, 3, 3), 0.5)
    predicted = target.clone()
    predicted[0, 1] += torch.tensor([0.3, -0.075, 0.0])  # mean 1/8, half of the scale
    predicted[0, 2] += ERROR_SCALE
    predicted[1, 0] -= 0.5
    predicted[1, 1, 0] = torch.nan
    picture = error_map(predicted.requires_grad_(), target)
    assert _is_picture(picture) and picture.shape == target.shape
    for (row, column), index in {(0, 0): 0, (0, 1): 127, (0, 2): 255, (1, 0): 255, (1, 1): 255, (1, 2): 0}.items():
        assert torch.allclose(picture[row, column], colors[index].float(), atol=0.02), (row, column)


def test_images_lie_side_by_side_below_their_labels() -> None:
    images = {name: torch.tensor(color).expand(100, 300, 3) for name, color in (("a", [1.0, 0, 0]), ("b", [0, 0, 1.0]))}
    picture = side_by_side(images)
    assert _is_picture(picture)
    assert picture.shape == (8 + 34 + 100, 8 + 2 * 308, 3)
    assert torch.equal(picture[34:134, 8:308], images["a"]) and torch.equal(picture[34:134, 316:616], images["b"])
    labels = picture[:34]
    assert labels[:, 8:40].min() < 0.3 and labels[:, 316:350].min() < 0.3 and labels[:, 60:300].min() == 1
    assert not torch.equal(picture, side_by_side({"c": images["a"], "b": images["b"]}))


def test_large_images_are_averaged_and_small_ones_enlarged() -> None:
    checkerboard = ((torch.arange(2000)[:, None] + torch.arange(3200)) % 2).float()[..., None].expand(-1, -1, 3)
    large = side_by_side({"large": checkerboard})
    assert large.shape[1] == 1600 and large[100:900, 100:1500].sub(0.5).abs().max() < 0.05
    small = side_by_side({"small": torch.tensor([[[0.0] * 3, [0.5] * 3]])})
    assert small.shape[1] == 256 and small[34:154, 8:128].eq(0).all() and small[34:154, 128:248].eq(0.5).all()


@given(st.integers(1, 11), st.integers(1, 900), st.integers(1, 600))
@settings(max_examples=25)
def test_strips_of_any_number_and_size(count: int, width: int, height: int) -> None:
    picture = side_by_side({f"level {each}": torch.full((height, width, 3), each / 20) for each in range(count)})
    assert _is_picture(picture)
    for each in range(count):
        assert _share(picture, torch.full((3,), each / 20)) > 0


def test_images_of_different_sizes() -> None:
    wide, tall = torch.full((50, 400, 3), 0.25), torch.full((800, 400, 3), 0.75)
    picture = side_by_side({"wide": wide, "tall": tall, "out of range": 3 * wide / 0.5, "nan": tall * torch.nan})
    assert _is_picture(picture)
    assert torch.equal(picture[-9, -200], torch.zeros(3)), "what is not a number is black"
