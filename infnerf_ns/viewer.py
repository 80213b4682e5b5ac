"""What nerfstudio's viewer shows of an octree: its wireframe, controls of the level of detail and of a packed model's
memory, and pictures that sharpen as nodes arrive."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from nerfstudio.viewer.render_state_machine import RenderAction
from nerfstudio.viewer.utils import get_camera
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl
from torch import Tensor
from viser import GlbHandle, GuiDropdownHandle, GuiFolderHandle, GuiInputHandle, GuiMarkdownHandle

from infnerf_ns.model import InfNeRFModel
from infnerf_ns.octree import Octree
from infnerf_ns.streaming.node_cache import NodeCache
from infnerf_ns.tree_colors import level_colors
from infnerf_ns.validation import warn
from infnerf_ns.viewer_address import say_address
from infnerf_ns.viewer_guard import take_over
from infnerf_ns.viewer_input import clamped
from infnerf_ns.wireframe import cube_edges, lines_gltf

_LOOK_EVERY = 0.2
"""Seconds between two looks at what there is to show."""
_FINEST_BIAS, _COARSEST_BIAS = -2.0, 4.0
_MIB = 2**20
ALL, IN_VIEW, USED, RESIDENT = "all", "in view", "used", "resident"
"""Which nodes the wireframe shows."""


class Selection(NamedTuple):
    """Nodes of one image of a packed model."""

    used: Bool[Tensor, "N"]
    """that its samples have touched"""
    in_view: Bool[Tensor, "N"]
    """that its rays can touch at full detail"""


@dataclass
class _Panel:
    """The controls on the page."""

    folder: GuiFolderHandle
    status: GuiMarkdownHandle
    wireframe: GuiInputHandle[bool]
    levels: GuiDropdownHandle[str]
    nodes: GuiDropdownHandle[str]
    bias: GuiInputHandle[float]
    max_level: GuiInputHandle[int] | None = None
    budget: GuiInputHandle[int] | None = None
    freeze: GuiInputHandle[bool] | None = None
    depth: int = 0
    """of the tree"""
    budgets: tuple[int, int] = (0, 0)
    """MiB, the slider's ends"""

    # What is read of a control is within its limits, wherever its value has come from.

    @property
    def footprint_scale(self) -> float:
        return 2.0 ** _read(self.bias, _FINEST_BIAS, _COARSEST_BIAS, 0.0)

    @property
    def level_cap(self) -> int:
        return self.depth if self.max_level is None else int(_read(self.max_level, 0, self.depth, self.depth))

    @property
    def budget_bytes(self) -> int:
        assert self.budget is not None
        return int(_read(self.budget, *self.budgets, self.budgets[1])) * _MIB

    @property
    def level_shown(self) -> int | None:
        """None: all"""
        names = self.levels.options[1:]
        return names.index(self.levels.value) if self.levels.value in names else None


def _read(control: GuiInputHandle[Any], low: float, high: float, otherwise: float) -> float:
    try:
        return clamped(float(control.value), low, high)
    except (TypeError, ValueError):
        return otherwise


@dataclass
class _Drawn:
    """The wireframe of one level on the page."""

    nodes: list[int] = field(default_factory=list)
    handle: GlbHandle | None = None


class StillCameras:
    """Notices when cameras stop moving."""

    def __init__(self) -> None:
        self._looks: dict[int, tuple[object, int]] = {}

    def just_stopped(self, number: int, view: object) -> bool:
        """Whether this is the second look in a row, and no later one, at which camera ``number`` shows ``view``."""
        before, looks = self._looks.get(number, (None, 0))
        self._looks[number] = view, looks + 1 if view == before else 1
        return self._looks[number][1] == 2


class PhotosInViewer(ViewerControl):
    """Tells the data manager when a viewer has been opened, which wants a picture for each photo, also of a run whose
    photos are not at hand; does nothing until a viewer has found it in the pipeline.

    Args:
        show_missing_photos: called then.
    """

    def __init__(self, show_missing_photos: Callable[[], None]) -> None:
        self._show_missing_photos = show_missing_photos

    def _setup(self, viewer: Viewer) -> None:
        """Called once by nerfstudio's viewer, before it draws the photos."""
        super()._setup(viewer)
        self._show_missing_photos()


class OctreeViewer(ViewerControl):
    """The controls "Octree" of the viewer; does nothing until a viewer has found it in the pipeline.

    Args:
        model: which is shown.
    """

    def __init__(self, model: InfNeRFModel) -> None:
        self._model = model
        self._panel: _Panel | None = None
        self._tree: Octree | None = None
        self._drawn: dict[int, _Drawn] = {}
        self._frozen: Selection | None = None
        self._measuring = False
        self._still = StillCameras()
        self._page = threading.RLock()

    def _setup(self, viewer: Viewer) -> None:
        """Called once by nerfstudio's viewer: puts the controls on the page."""
        super()._setup(viewer)
        if take_over(self.viser_server):
            say_address(viewer)
        if self._cache is not None:
            self._cache.waits = False
            self._cache.on_arrival = self._render_again_sharply
        self.refresh()
        threading.Thread(target=self._keep_looking, name="octree-viewer", daemon=True).start()

    @property
    def _cache(self) -> NodeCache | None:
        return None if self._model.views is None else self._model.views.cache

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While it lasts, images are rendered as without a viewer: what its user has chosen must not reach metrics."""
        self._measuring = True
        self._apply()
        try:
            yield
        finally:
            self._measuring = False
            self._apply()

    def _apply(self) -> None:
        """Hands the level of detail to the model."""
        with self._page:
            panel = self._panel
            if panel is None:
                return
            whole = self._measuring or panel.level_cap >= self._model.field.whole_tree.depth
            self._model.footprint_scale = 1.0 if self._measuring else panel.footprint_scale
            self._model.field.level_cap = None if whole else panel.level_cap

    # -- pictures

    def _render_again(self, *_: Any) -> None:
        self._apply()
        self.viewer._trigger_rerender()

    def _render_again_sharply(self, threads: set[int]) -> None:
        """In full resolution, and not before the picture under way is finished, so that nothing flickers.

        Args:
            threads: those that render the pictures; of several pages, only theirs are drawn again.
        """
        if not self.viewer.ready:
            return
        for number, client in self.viser_server.get_clients().items():
            machine = self.viewer.render_statemachines.get(number)
            if machine is not None and machine.ident in threads:
                machine.action(RenderAction("step", self.viewer.get_camera_state(client)))

    def look_ahead(self) -> None:
        """Has the nodes loaded that a large picture needs where a camera has stopped; the small ones that are drawn
        while it moves need few. So the first large picture need not be drawn again when they have come."""
        if self._cache is None or self._frozen is not None:
            return
        longest, scale = int(self.viewer.control_panel.max_res), self._model.footprint_scale
        for number, client in self.viser_server.get_clients().items():
            state = self.viewer.get_camera_state(client)
            view = (state.c2w.tolist(), state.fov, state.aspect, longest, scale, self._cache.budget_bytes)
            if self._still.just_stopped(number, view):
                width, height = min(longest, longest * state.aspect), min(longest, longest / state.aspect)
                camera = get_camera(state, int(height), int(width)).to(self._model.device)
                self._model.views.prefetch(camera, self._model.camera_rays, scale)

    def _freeze(self, *_: Any) -> None:
        views, panel = self._model.views, self._panel
        assert views is not None and panel is not None and panel.freeze is not None
        frozen = panel.freeze.value and views.used is not None and views.in_view is not None
        self._frozen = Selection(views.used.clone(), views.in_view.clone()) if frozen else None
        views.cache.freeze(None if self._frozen is None else self._frozen.used)
        self._render_again()

    def _set_budget(self, *_: Any) -> None:
        assert self._cache is not None and self._panel is not None and self._panel.budget is not None
        self._cache.set_budget(self._panel.budget_bytes)
        self._render_again()

    # -- the page

    def _keep_looking(self) -> None:
        wait = threading.Event()
        said = ""
        while not wait.wait(_LOOK_EVERY):
            try:
                self.look_ahead()
                self.refresh()
            except Exception as error:  # a page that is being closed, for instance; the panel must live on
                if repr(error) != said:
                    said = repr(error)
                    warn(f"the viewer's octree panel could not be brought up to date ({said})")

    def refresh(self, *_: Any) -> None:
        """Brings the page up to date with the tree and the nodes of the last image."""
        with self._page:
            tree = self._model.field.whole_tree
            if self._panel is None or tree is not self._tree:
                self._tree = tree
                self._build_panel(tree)
            status = self.status()
            if self._panel.status.content != status:
                self._panel.status.content = status
            self._draw_wireframe(tree)

    def _build_panel(self, tree: Octree) -> None:
        """The controls for a tree; in training, a checkpoint may bring another one after the page has been made."""
        shown, bias, level, deepest = False, 0.0, ALL, tree.depth
        if self._panel is not None:
            shown, bias = bool(self._panel.wireframe.value), math.log2(self._panel.footprint_scale)
            level = self._panel.levels.value
            capped = self._panel.level_cap < self._panel.depth
            deepest = min(self._panel.level_cap, tree.depth) if capped else tree.depth
            self._panel.folder.remove()
        for drawn in self._drawn.values():
            if drawn.handle is not None:
                drawn.handle.remove()
        self._drawn = {level: _Drawn() for level in range(tree.depth + 1)}
        gui = self.viser_server.gui
        folder = gui.add_folder("Octree", order=self.viewer.stats_markdown.order + 0.5)
        with folder:
            status = gui.add_markdown("")
            wireframe = gui.add_checkbox("Show octree", shown, hint="The cubes of the nodes, coloured by level")
            names = [ALL, *_level_names(tree)]
            levels = gui.add_dropdown("Octree level", names, level if level in names else ALL)
            nodes = gui.add_dropdown(
                "Octree nodes",
                [ALL, IN_VIEW, USED, RESIDENT],
                visible=self._cache is not None,
                hint="in view: can be touched at full detail; used: have been touched; resident: are in memory",
            )
            detail = gui.add_slider(
                "Level-of-detail bias",
                *(_FINEST_BIAS, _COARSEST_BIAS, 0.25, bias),
                hint="In octree levels; above 0 coarser, below 0 finer than a pixel asks for",
            )
            self._panel = _Panel(folder, status, wireframe, levels, nodes, detail, depth=tree.depth)
            if tree.depth > 0:
                self._panel.max_level = gui.add_slider(
                    "Maximum level", 0, tree.depth, 1, deepest, hint="Nothing is drawn by finer nodes"
                )
                self._panel.max_level.on_update(self._render_again)
                if self._cache is not None:
                    self._add_memory_controls(self._cache)
        for control in (wireframe, levels, nodes):
            control.on_update(self.refresh)
        detail.on_update(self._render_again)
        self._apply()

    def _add_memory_controls(self, cache: NodeCache) -> None:
        assert self._panel is not None
        least = math.ceil((cache.root_bytes + cache.page_bytes) / _MIB)
        most = max(least + 1, math.ceil(cache.model_bytes / _MIB))
        self._panel.budgets = least, most
        self._panel.budget = self.viser_server.gui.add_slider(
            "Memory budget (MiB)",
            *(least, most, 1, min(max(cache.budget_bytes // _MIB, least), most)),
            hint="For nodes; views that need more are drawn coarser",
        )
        self._panel.budget.on_update(self._set_budget)
        self._panel.freeze = self.viser_server.gui.add_checkbox(
            "Freeze selection",
            False,
            hint="Only the nodes that the last view has used are drawn, and none is loaded: fly around and look at what"
            " a view loads",
        )
        self._panel.freeze.on_update(self._freeze)

    def status(self) -> str:
        """What is in memory and what the last image took of it, as Markdown."""
        octree, cache = self._model.field.whole_tree, self._cache
        if cache is None:
            size = sum(self._model.field.pages.memory_bytes(octree, training=False)) / _MIB
            started = min(int(self._model.field.active_level), octree.depth) + 1
            return (
                f"memory: {size:.1f} MiB  \nnodes: {octree.num_nodes}; {started} of {octree.depth + 1} levels started"
            )
        selection, frame = self._selection(), self._model.views.last_frame
        used, seen = ("-", "-") if selection is None else (int(nodes.sum()) for nodes in selection)
        budget = min(cache.budget_bytes, cache.model_bytes)
        lines = [
            f"memory: {cache.resident_bytes / _MIB:.1f} of {budget / _MIB:.1f} MiB",
            f"whole model: {cache.model_bytes / _MIB:.1f} MiB",
            f"nodes: {used} used, {seen} in view, {octree.num_nodes} in all",
        ]
        if self._frozen is not None:
            lines.append("**selection frozen**")
        elif frame is not None and frame.coarsened:
            lines.append(f"**drawn coarser** to fit: bias {math.log2(frame.footprint_scale):+.1f}")
        return "  \n".join(lines)

    def _selection(self) -> Selection | None:
        """Of the view that was frozen, else of the last image."""
        views = self._model.views
        if self._frozen is not None or views is None or views.used is None or views.in_view is None:
            return self._frozen
        return Selection(views.used, views.in_view)

    def _shown(self, tree: Octree) -> Bool[Tensor, "N"]:
        """Which nodes the wireframe shows, as far as their level has started."""
        assert self._panel is not None
        shown = tree.level.cpu() <= int(self._model.field.active_level)
        choice, selection = self._panel.nodes.value, self._selection()
        if choice == RESIDENT and self._cache is not None:
            return shown & self._cache.resident
        if choice in (IN_VIEW, USED) and selection is not None:
            return shown & (selection.used if choice == USED else selection.in_view)
        return shown

    def _draw_wireframe(self, tree: Octree) -> None:
        assert self._panel is not None
        chosen = self._panel.level_shown
        on = bool(self._panel.wireframe.value)
        shown = self._shown(tree) if on else None
        edges = tree.first_of_level.tolist()
        for level, drawn in self._drawn.items():
            visible = on and chosen in (None, level)
            if visible:
                nodes = torch.nonzero(shown[edges[level] : edges[level + 1]])[:, 0] + edges[level]
                visible = len(nodes) > 0
                if visible and drawn.nodes != nodes.tolist():
                    drawn.nodes, drawn.handle = nodes.tolist(), self._add_lines(tree, level, nodes)
            if drawn.handle is not None:
                drawn.handle.visible = visible

    def _add_lines(self, tree: Octree, level: int, nodes: Tensor) -> GlbHandle:
        lines = VISER_NERFSTUDIO_SCALE_RATIO * cube_edges(tree, nodes.to(tree.level.device)).numpy()
        color = level_colors(torch.tensor([float(level)]), tree.depth)[0].numpy().astype(np.float64)
        return self.viser_server.scene.add_glb(f"/octree/level_{level}", lines_gltf(lines, color))


def _level_names(tree: Octree) -> list[str]:
    return [f"{level} ({count} node{'s' if count > 1 else ''})" for level, count in enumerate(tree.nodes_per_level)]
