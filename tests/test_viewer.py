"""The viewer's controls, on a real viser server without a browser: a test sets a control as the page does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import viser
from browser import free_port
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.viewer.utils import CameraState
from test_wireframe import read_gltf
from tiny_capture import look_at_origin
from tiny_model import CONE_ALONE, DEPTH, scrambled, tiny_camera, tiny_config, tiny_model, tiny_scene
from tiny_packed import TinyPacked, tiny_packed

from infnerf_ns.model import InfNeRFModel
from infnerf_ns.viewer import OctreeViewer, StillCameras
from infnerf_ns.wireframe import cube_edges


class Page:
    """A model in a viewer, and what its page would show.

    Args:
        model: to be shown.
        server: of the page.
        look: from where the one visitor looks at the scene.
    """

    def __init__(self, model: InfNeRFModel, server: viser.ViserServer, look: tuple = (0.3, -1.5, 0.8)) -> None:
        self.model, self.server = model, server
        self.rendered_again, self.actions, self.files = 0, [], {}
        self.look = look
        add_glb = server.scene.add_glb
        server.scene.add_glb = lambda name, data: self.files.update({name: data}) or add_glb(name, data)
        machine = SimpleNamespace(action=lambda action: self.actions.append(action.action), ident=threading.get_ident())
        server.get_clients = lambda: {5: SimpleNamespace()}
        viewer = SimpleNamespace(
            viser_server=server,
            stats_markdown=server.gui.add_markdown(""),
            control_panel=SimpleNamespace(max_res=48),
            render_statemachines={5: machine},
            get_camera_state=lambda client: self.camera_state(),
            _trigger_rerender=self._count,
            ready=True,
        )
        self.octree = OctreeViewer(model)
        self.octree._setup(viewer)

    def _count(self) -> None:
        self.rendered_again += 1

    def camera_state(self) -> CameraState:
        pose = torch.from_numpy(look_at_origin(torch.tensor(self.look).numpy()))[:3]
        return CameraState(0.8, 1.5, pose, CameraType.PERSPECTIVE)

    def control(self, label: str) -> Any:
        """The control with that label; there is one."""
        (found,) = [each for each in self.server.gui._gui_input_handle_from_id.values() if each._impl.label == label]
        return found

    def labels(self) -> set[str]:
        """Of all controls that can be seen."""
        return {each._impl.label for each in self.server.gui._gui_input_handle_from_id.values() if each.visible}

    def choose(self, label: str, value: Any, until: Callable[[], bool]) -> None:
        """Sets a control and waits for the consequence."""
        self.control(label).value = value
        end = time.monotonic() + 60
        while not until():
            assert time.monotonic() < end, f"{label} = {value} is without consequence"
            time.sleep(0.01)

    def lines(self, level: int) -> torch.Tensor:
        """The wireframe [E, 2, 3] of a level, in the page's coordinates."""
        return torch.from_numpy(read_gltf(self.files[f"/octree/level_{level}"])[1].copy()).reshape(-1, 2, 3)

    def drawn(self) -> set[int]:
        """Levels whose wireframe can be seen."""
        handles = list(self.server.scene._handle_from_node_name.items())
        return {int(name[-1]) for name, handle in handles if name.startswith("/octree/") and handle.visible}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[viser.ViserServer]:
    """A page's server; nothing looks at the model but the tests."""
    monkeypatch.setattr(OctreeViewer, "_keep_looking", lambda self: None)
    server = viser.ViserServer("127.0.0.1", free_port(), verbose=False)
    yield server
    server.stop()


@pytest.fixture
def page(server: viser.ViserServer) -> Page:
    return Page(scrambled(tiny_model(tiny_config(sampler=CONE_ALONE), active=1)).eval(), server)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> TinyPacked:
    return tiny_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def streamed(packed: TinyPacked, server: viser.ViserServer) -> Page:
    return Page(packed.load(), server)


def picture(page: Page, focal: float = 60.0) -> torch.Tensor:
    camera = tiny_camera(CameraType.PERSPECTIVE, focal, width=24, height=16)
    return page.model.get_outputs_for_camera(camera)["rgb"]


# -- wireframe ---------------------------------------------------------------------------------------------------------


def test_the_wireframe_is_that_of_the_levels_that_have_started(page: Page) -> None:
    assert not page.files, "off at first"
    page.choose("Show octree", True, lambda: page.drawn() == {0, 1})
    octree = page.model.field.octree
    for level in (0, 1):
        nodes = torch.nonzero(octree.level == level)[:, 0]
        assert torch.allclose(page.lines(level), 10 * cube_edges(octree, nodes), atol=1e-5)
    page.model.field.activate_level(DEPTH)
    page.octree.refresh()
    assert page.drawn() == {0, 1, DEPTH}
    page.choose("Show octree", False, lambda: not page.drawn())


def test_one_level_can_be_shown_alone(page: Page) -> None:
    page.choose("Show octree", True, lambda: page.drawn() == {0, 1})
    options = page.control("Octree level").options
    assert [option.split()[0] for option in options] == ["all", *map(str, range(DEPTH + 1))]
    assert options[1:3] == ("0 (1 node)", "1 (8 nodes)")
    page.choose("Octree level", options[2], lambda: page.drawn() == {1})
    page.choose("Octree level", "all", lambda: page.drawn() == {0, 1})


def test_another_tree_gets_other_controls(page: Page) -> None:
    page.choose("Show octree", True, lambda: page.drawn() == {0, 1})
    page.choose("Level-of-detail bias", 2.0, lambda: page.model.footprint_scale == 4)
    before = page.lines(1)
    page.model.load_state_dict(tiny_model(scene=tiny_scene(3, 200), active=1).state_dict())
    page.octree.refresh()
    octree = page.model.field.octree
    counts = [int(option.split("(")[1].split()[0]) for option in page.control("Octree level").options[1:]]
    assert counts == octree.nodes_per_level
    assert page.model.footprint_scale == 4 == 2 ** page.control("Level-of-detail bias").value
    expected = 10 * cube_edges(octree, torch.nonzero(octree.level == 1)[:, 0])
    assert page.lines(1).shape != before.shape or not torch.equal(page.lines(1), before)
    assert torch.allclose(page.lines(1), expected, atol=1e-5)


def test_the_nodes_of_the_last_view_can_be_shown(streamed: Page) -> None:
    picture(streamed, focal=3000.0)
    streamed.model.views.cache.settle()
    picture(streamed, focal=3000.0)
    views, octree = streamed.model.views, streamed.model.field.whole_tree
    streamed.choose("Show octree", True, lambda: 3 in streamed.drawn())
    shown = {"used": views.used, "in view": views.in_view, "resident": views.cache.resident}
    for name, nodes in shown.items():
        of_level = torch.nonzero(nodes & (octree.level == 3))[:, 0]
        assert 0 < len(of_level) < octree.nodes_per_level[3]
        expected = 10 * cube_edges(octree, of_level)
        streamed.choose("Octree nodes", name, lambda expected=expected: streamed.lines(3).shape == expected.shape)
        assert torch.allclose(streamed.lines(3), expected, atol=1e-5), name


# -- level of detail ---------------------------------------------------------------------------------------------------


def test_the_bias_makes_pictures_coarser(page: Page) -> None:
    page.model.field.activate_level(DEPTH)
    fine = picture(page)
    page.choose("Level-of-detail bias", 3.0, lambda: page.rendered_again == 1)
    assert page.model.footprint_scale == 8
    assert (picture(page) - fine).abs().max() > 1e-3
    page.choose("Level-of-detail bias", 0.0, lambda: page.rendered_again == 2)
    assert torch.equal(picture(page), fine)


def test_the_maximum_level_cuts_the_tree(page: Page) -> None:
    page.model.field.activate_level(DEPTH)
    assert page.model.field.level_cap is None
    fine = picture(page, focal=3000.0)
    page.choose("Maximum level", 0, lambda: page.rendered_again == 1)
    assert page.model.field.level_cap == 0
    assert (picture(page, focal=3000.0) - fine).abs().max() > 1e-3
    page.choose("Maximum level", DEPTH, lambda: page.rendered_again == 2)
    assert page.model.field.level_cap is None


def test_training_and_metrics_do_not_see_what_the_viewer_has_chosen(page: Page) -> None:
    page.choose("Level-of-detail bias", 3.0, lambda: page.rendered_again == 1)
    page.choose("Maximum level", 0, lambda: page.rendered_again == 2)
    field = page.model.field
    positions = tiny_scene().points
    with page.octree.measuring():
        assert page.model.footprint_scale == 1 and field.level_cap is None
    assert page.model.footprint_scale == 8 and field.level_cap == 0
    assert int(field.route(positions, None).node.max()) == 0
    assert int(field.train().route(positions, None).node.max()) > 0


def test_a_model_without_a_viewer_keeps_its_level_of_detail() -> None:
    model = tiny_model().eval()
    model.footprint_scale = 2.0
    with OctreeViewer(model).measuring():
        assert model.footprint_scale == 2


def test_a_root_alone_has_no_levels_to_choose(server: viser.ViserServer) -> None:
    page = Page(tiny_model(scene=tiny_scene(count=3)), server)
    assert page.model.field.octree.depth == 0
    assert page.labels() == {"Show octree", "Octree level", "Level-of-detail bias"}


# -- memory ------------------------------------------------------------------------------------------------------------


def test_only_a_packed_model_has_controls_of_memory(page: Page) -> None:
    assert page.labels() == {"Show octree", "Octree level", "Level-of-detail bias", "Maximum level"}
    assert f"nodes: {page.model.field.octree.num_nodes}; 2 of 3 levels" in page.octree.status()


def test_the_status_of_a_packed_model(streamed: Page) -> None:
    assert {"Octree nodes", "Memory budget (MiB)", "Freeze selection"} <= streamed.labels()
    assert "- used, - in view" in streamed.octree.status()
    picture(streamed)
    cache, views = streamed.model.views.cache, streamed.model.views
    cache.settle()
    status = streamed.octree.status()
    assert f"memory: {cache.resident_bytes / 2**20:.1f} of {cache.model_bytes / 2**20:.1f} MiB" in status
    report = views.last_frame
    nodes = f"{report.nodes_used} used, {report.nodes_in_view} in view, {cache.octree.num_nodes} in all"
    assert nodes in status and "coarser" not in status
    cache.set_budget(cache.root_bytes + 2 * cache.page_bytes)
    picture(streamed, focal=3000.0)
    assert "drawn coarser" in streamed.octree.status()


def test_the_budget_slider_sets_the_budget(streamed: Page) -> None:
    cache = streamed.model.views.cache
    streamed.choose("Memory budget (MiB)", 1, lambda: streamed.rendered_again == 1)
    picture(streamed)
    assert cache.budget_bytes == 1 << 20


def test_a_frozen_selection_stays_when_the_camera_moves(streamed: Page) -> None:
    cache, views = streamed.model.views.cache, streamed.model.views
    for _ in range(2):
        picture(streamed, focal=3000.0)
        cache.settle()
    used, free = views.used.clone(), picture(streamed, focal=3000.0)
    streamed.choose("Freeze selection", True, lambda: streamed.rendered_again == 1)
    assert "selection frozen" in streamed.octree.status()
    assert torch.equal(picture(streamed, focal=3000.0), free), "the frozen view is as it was"
    pages = cache.counters.pages_read
    wide = picture(streamed, focal=60.0)
    streamed.octree.look_ahead()
    streamed.octree.look_ahead()
    cache.settle()
    assert cache.counters.pages_read == pages, "nothing is loaded"
    assert f"{int(used.sum())} used" in streamed.octree.status()
    streamed.choose("Freeze selection", False, lambda: streamed.rendered_again == 2)
    for _ in range(2):
        picture(streamed, focal=60.0)
        cache.settle()
    assert (picture(streamed, focal=60.0) - wide).abs().max() > 1e-3
    assert "frozen" not in streamed.octree.status()


# -- pictures that sharpen ---------------------------------------------------------------------------------------------


def test_the_first_picture_is_the_roots_and_sharpens_until_all_is_there(streamed: Page, packed: TinyPacked) -> None:
    cache = streamed.model.views.cache
    read, slow = cache.files.read, threading.Event()
    cache.files.read = lambda node: slow.wait() and read(node)
    first = picture(streamed)
    assert streamed.model.views.last_frame.nodes_used == 1
    slow.set()
    cache.settle()
    assert streamed.actions and set(streamed.actions) == {"step"}, "in full resolution, without flicker"
    final = packed.model.get_outputs_for_camera(tiny_camera(CameraType.PERSPECTIVE, 60.0, width=24, height=16))["rgb"]
    assert (first - final).abs().max() > 1e-3
    rounds = 0
    while streamed.actions:
        streamed.actions.clear()
        latest = picture(streamed)
        cache.settle()
        rounds += 1
        assert rounds < 10, "pictures are drawn again and again"
    assert torch.allclose(latest, final, atol=1e-4)


def test_what_is_fetched_ahead_of_a_picture_under_way_is_drawn_too(streamed: Page) -> None:
    """Regression: pages that came before the loader looked at the list of missed ones were never announced."""
    cache = streamed.model.views.cache
    busy = threading.Event()
    cache._loader.submit(busy.wait)
    cache.prefetch(torch.arange(cache.octree.num_nodes))
    path = cache.walk(cache.octree.cube.to_unit(tiny_scene().points), None, cache.octree.depth, "auto")
    assert int(path.max()) == 0, "the root is drawn"
    busy.set()
    cache.settle()
    assert streamed.actions == ["step"]


def test_only_the_page_that_missed_nodes_is_drawn_again(streamed: Page) -> None:
    """Regression: two pages whose views do not fit beside each other took turns for ever."""
    another = threading.Thread(target=picture, args=(streamed,))
    another.start()
    another.join()
    streamed.model.views.cache.settle()
    assert streamed.model.views.cache.counters.pages_read > 0 and streamed.actions == []
    streamed.model.views.cache.on_arrival({threading.get_ident()})
    assert streamed.actions == ["step"]


def test_the_nodes_of_a_large_picture_are_fetched_when_the_camera_stops(streamed: Page) -> None:
    cache = streamed.model.views.cache
    streamed.octree.look_ahead()
    streamed.look = (0.31, -1.5, 0.8)
    streamed.octree.look_ahead()
    cache.settle()
    assert cache.counters.pages_read == 0, "it moves"
    streamed.octree.look_ahead()
    cache.settle()
    fetched = cache.counters.pages_read
    assert fetched > 0 and not streamed.actions
    state = streamed.camera_state()
    camera = tiny_camera(CameraType.PERSPECTIVE, 16 / torch.tan(torch.tensor(0.4)).item(), width=48, height=32)
    camera.camera_to_worlds = state.c2w[None].float()
    streamed.model.get_outputs_for_camera(camera)
    cache.settle()
    assert not streamed.actions and streamed.model.views.last_frame.nodes_used > 1, "nothing was missing"


def test_a_camera_stops_once() -> None:
    still = StillCameras()
    seen = [still.just_stopped(1, view) for view in "aabbbca"]
    assert seen == [False, True, False, True, False, False, False]
    assert not still.just_stopped(2, "a"), "another camera"
