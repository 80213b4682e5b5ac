"""The octree field: routes samples through the tree and evaluates the nodes' hash grids and decoders.

Parameters live in one bank per octree level and kind, ``[nodes_at_level, page]``: ``grids`` (multi-resolution hash
grid), ``decoders`` (density and colour MLP) and ``proposals`` (a small grid of log density for the sampler). The number
of Parameters is fixed by ``max_level``; a tree of other size replaces the tensors inside of them.

- ``children="independent"`` (InfNeRF): every node is a complete NeRF that knows nothing of its parent.
- ``children="residual"`` (RING-NeRF's idea on the octree): a child holds only the finer hash levels; a sample reads
  the features of its node and of all ancestors, finer ones are zero. A child whose features are zero and whose decoder
  is its parent's *is* its parent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.field_components.activations import trunc_exp
from torch import Tensor, nn

from infnerf_ns.field_config import FieldConfig
from infnerf_ns.kernels import (
    Backend,
    Groups,
    HashLayout,
    TreePaths,
    choose,
    enable_bank_gradient,
    follows_paths,
    grouped_mlp,
    hash_encode,
    path_features,
    path_sum,
    shading,
)
from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.tree_state import tree_buffers


class Routed(NamedTuple):
    """M samples in the order in which the banks are visited (by node), with the way back."""

    unit: Float[Tensor, "M 3"]
    path: Int[Tensor, "M K"]
    node: Int[Tensor, "M"]
    order: Int[Tensor, "M"]
    """place of each routed sample in the caller's order"""
    footprints: Float[Tensor, "M"] | None
    """radii in scene units"""


class StreamedNodes(Protocol):
    """Where a field's nodes come from if they are not all in memory (:class:`infnerf_ns.streaming.node_cache.NodeCache`
    explains it)."""

    octree: Octree
    """the whole tree"""
    slot_tree: Octree
    """a node per level and slot of the pool"""
    pool: dict[str, Tensor]
    """[slots, page] by kind: the banks of all levels below the root"""
    on_pool_change: Callable[[], None] | None

    def walk(
        self, unit: Float[Tensor, "M 3"], footprints: Float[Tensor, "M"] | None, max_level: int, backend: Backend
    ) -> Int[Tensor, "M K"]:
        """:meth:`Octree.route` in the slot tree."""


def _uniform(*shape: int, bound: float) -> Tensor:
    return torch.empty(*shape).uniform_(-bound, bound)


class OctreeField(nn.Module):
    """Density and colour of an octree of NeRFs.

    Args:
        octree: the tree.
        config: sizes.
        max_level: deepest level that the tree may ever have; fixes the number of Parameters.
        num_photos: number of appearance codes.
    """

    def __init__(self, octree: Octree, config: FieldConfig, max_level: int, num_photos: int) -> None:
        super().__init__()
        self.config, self.max_level = config, max_level
        self.pages = PageLayout(config, octree.node_resolution, max_level)
        self.layouts, self.proposal_layouts = self.pages.grids, self.pages.proposals
        self.density_widths, self.color_widths = self.pages.density_widths, self.pages.color_widths
        self._columns = [layout.num_outputs for layout in self.layouts]
        self.appearance = nn.Embedding(num_photos, config.appearance_dim) if config.appearance_dim else None
        self.grids, self.decoders, self.proposals = (nn.ParameterList() for _ in range(3))
        for _ in range(max_level + 1):
            for banks in (self.grids, self.decoders, self.proposals):
                banks.append(nn.Parameter(torch.empty(0, 0)))
        for name, value in tree_buffers(octree).items():
            self.register_buffer(name, value)
        self.register_buffer("active_level", torch.tensor(0))
        self.register_buffer("node_samples", torch.zeros(0, dtype=torch.long))
        self.register_buffer("maturity", torch.ones(0))
        self.cache: StreamedNodes | None = None
        self.young = False
        """some :attr:`maturity` is below 1, the share of a node against its parent while it takes over from it"""
        self.level_cap: int | None = None
        """in evaluation no sample goes deeper (the viewer's choice)"""
        self.set_octree(octree)
        self.reset_parameters()

    # -- the tree

    @property
    def whole_tree(self) -> Octree:
        """The tree, whatever of it is in memory."""
        return self.octree if self.cache is None else self.cache.octree

    def stream(self, cache: StreamedNodes) -> None:
        """From now on nodes below the root come from a cache: its pool is the bank of every level, and
        :attr:`octree` its tree of slots. Nothing can be trained then."""
        self.cache = cache
        for name, value in tree_buffers(cache.octree).items():
            setattr(self, name, value)
        self.node_samples = torch.zeros_like(cache.octree.level)
        self.maturity, self.young = torch.ones_like(cache.octree.level, dtype=torch.float32), False
        cache.on_pool_change = self._bind_pool
        self._bind_pool()

    def _bind_pool(self) -> None:
        assert self.cache is not None
        self.octree = self.cache.slot_tree
        for level, shapes in enumerate(self.pages.bank_shapes(self.cache.octree)):
            for kind, shape in shapes.items():
                bank = getattr(self, kind)[level].requires_grad_(False)
                if 0 < level <= self.octree.depth and kind in self.cache.pool:
                    bank.data = self.cache.pool[kind]
                elif bank.shape != shape:  # the root's page, and decoders that nodes share
                    bank.data = torch.empty(shape, device=self.cache.slot_tree.level.device)

    def _walk(
        self,
        unit: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"] | None,
        max_level: int | None,
        routing_scale: float,
    ) -> Int[Tensor, "M K"]:
        """Paths of samples in :attr:`octree`, down to levels that have started."""
        if footprints is not None and routing_scale != 1:
            footprints = routing_scale * footprints
        caps = (int(self.active_level), max_level, None if self.training else self.level_cap)
        cap = min(each for each in caps if each is not None)
        if self.cache is not None:
            return self.cache.walk(unit, footprints, cap, self.config.backend)
        return self.octree.route(unit, footprints, cap, self.config.backend)

    def set_octree(self, octree: Octree) -> None:
        """Make the banks fit a tree, with uninitialised pages: the tensors inside the Parameters are replaced."""
        self.octree = octree
        for name, value in tree_buffers(octree).items():
            setattr(self, name, value)
        self.node_samples = torch.zeros(octree.num_nodes, dtype=torch.long, device=octree.level.device)
        self.maturity = torch.ones(octree.num_nodes, device=octree.level.device)
        self.young = False
        for level, shapes in enumerate(self.pages.bank_shapes(octree)):
            for kind, shape in shapes.items():
                bank = getattr(self, kind)[level]
                if bank.shape != shape:
                    bank.data = torch.empty(shape, device=octree.level.device)

    def reset_parameters(self) -> None:
        """Grids near zero (Instant-NGP), one and the same decoder in every node (Kaiming uniform)."""
        weights = []
        for widths in (self.density_widths, self.color_widths):
            for fan_in, fan_out in zip(widths[:-1], widths[1:]):
                weights.append(_uniform(fan_in * fan_out, bound=(3.0 / fan_in) ** 0.5))
        page = torch.cat(weights)
        for grids, proposals, decoders in zip(self.grids, self.proposals, self.decoders):
            grids.data.uniform_(-1e-4, 1e-4)
            proposals.data.zero_()
            decoders.data.copy_(page.to(decoders.device).expand_as(decoders))
        if self.appearance is not None:
            nn.init.normal_(self.appearance.weight, std=0.05)

    @torch.no_grad()
    def activate_level(self, level: int) -> None:
        """Let the nodes of a level take part from now on; each starts with the decoder that its parent has learnt."""
        for new in range(int(self.active_level) + 1, min(level, self.octree.depth) + 1):
            self.inherit_decoders(torch.nonzero(self.octree.level == new)[:, 0])
            self.active_level.fill_(new)

    @torch.no_grad()
    def inherit_decoders(self, nodes: Int[Tensor, "B"]) -> None:
        """Nodes of one level take over what their parents' decoders have learnt. The weights of the features that only
        exist from this level on have their first value there, too, as no sample of the parents has used them. A decoder
        that a whole level shares changes only if all nodes of the level are among these."""
        octree, level = self.octree, int(self.octree.level[nodes[0]])
        bank, above = self.decoders[level].data, self.decoders[level - 1].data
        if self.config.decoder_sharing == "node":
            bank[octree.row[nodes]] = above[octree.row[octree.parent[nodes]]]
        elif len(bank) and len(nodes) == octree.nodes_per_level[level]:
            bank.copy_(above)

    def grow_up(self, by: float) -> None:
        """Young nodes take over a further share from their parents."""
        if self.young:
            self.maturity.add_(by).clamp_(max=1)
            self.young = bool((self.maturity < 1).any())

    @torch.no_grad()
    def count_samples(self, routed: Routed) -> None:
        """Adds training samples to :attr:`node_samples`, the number that each node has evaluated."""
        self.node_samples += torch.bincount(routed.node, minlength=len(self.node_samples))

    # -- evaluation

    def route(
        self,
        positions: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"] | None,
        max_level: int | None = None,
        routing_scale: float = 1.0,
    ) -> Routed:
        """Find the nodes of all samples and sort them by node.

        Args:
            positions: world positions.
            footprints: radii in scene units; None asks for the finest nodes.
            max_level: a cut of the tree; levels that have not started are cut anyway.
            routing_scale: the nodes are those of footprints this much larger.
        """
        unit = self.octree.cube.to_unit(positions)
        path = self._walk(unit, footprints, max_level, routing_scale)
        node = path.max(dim=1).values
        order = torch.argsort(node)
        radii = None if footprints is None else footprints.index_select(0, order)
        return Routed(
            unit.index_select(0, order), path.index_select(0, order), node.index_select(0, order), order, radii
        )

    def with_parents(self, routed: Routed, weight: Float[Tensor, "M"]) -> tuple[Routed, Float[Tensor, "M2"]]:
        """Adds the parent's evaluation where a node's weight against it is below 1 (the blend between adjacent levels).

        Args:
            routed: samples.
            weight: weight of each routed sample's own node (:meth:`Octree.fraction`).

        Returns:
            The enlarged routed samples and their weights.
        """
        mixed = torch.nonzero(weight < 1)[:, 0]
        if len(mixed) == 0:  # from close by, where leaves answer
            return routed, weight
        path = torch.cat([routed.path, routed.path[mixed]])
        level = self.octree.level[routed.node[mixed]]
        path[torch.arange(len(routed.node), len(path), device=path.device), level] = -1
        node = path.max(dim=1).values
        owner = torch.cat([torch.arange(len(weight), device=path.device), mixed])
        weight = torch.cat([weight, 1 - weight[mixed]])
        order = torch.argsort(node)
        owner = owner[order]
        footprints = None if routed.footprints is None else routed.footprints[owner]
        unit = routed.unit.index_select(0, owner)
        path, node = path.index_select(0, order), node.index_select(0, order)
        return Routed(unit, path, node, routed.order[owner], footprints), weight[order]

    def _slices(self, node: Int[Tensor, "M"]) -> list[tuple[int, int]]:
        """Per level: the range of the sorted samples whose node is of that level."""
        edges = torch.searchsorted(node, self.octree.first_of_level).tolist()
        return list(zip(edges[:-1], edges[1:]))

    def _groups(self, node: Int[Tensor, "M"], inputs: int, residual: bool) -> Groups:
        """Runs of sorted samples that share a decoder; a residual node's features end at its own level's."""
        sharing = self.config.decoder_sharing
        if sharing == "node":
            nodes, counts = torch.unique_consecutive(node, return_counts=True)
            level = self.octree.level[nodes]
            row = nodes - self.octree.first_of_level[level]
        else:
            levels = self.octree.level[node] if sharing == "level" else torch.zeros_like(node)
            level, counts = torch.unique_consecutive(levels, return_counts=True)
            row = torch.zeros_like(level)
        used = torch.full_like(row, inputs)
        if residual and sharing != "tree":
            used = torch.tensor(self._columns, device=node.device).cumsum(0)[level]
        return Groups(nn.functional.pad(counts.cumsum(0), (1, 0)), level, row, used)

    def _decode(self, inputs: Tensor, node: Tensor, offset: int, widths: tuple[int, ...], frozen: bool) -> Tensor:
        residual = offset == 0 and self.config.children == "residual"
        banks = [bank.detach() if frozen else bank for bank in self.decoders]
        return grouped_mlp(inputs, self._groups(node, widths[0], residual), banks, offset, widths, self.config.backend)

    def _features(self, routed: Routed, slices: list[tuple[int, int]], frozen: bool) -> Tensor:
        octree, residual = self.octree, self.config.children == "residual"
        total = len(routed.node)
        if total == 0:
            return routed.unit.new_zeros(0, self.density_widths[0])
        weighted = self.config.downweight and routed.footprints is not None
        cells = self._cells(self.layouts[: len(slices)], self.config.downweight)
        if residual and self._fused(routed.unit, routed.footprints):
            banks = [bank.detach() if frozen else bank for bank in _first(self.grids, len(slices))]
            return path_features(
                self._paths(routed.unit, routed.path),
                [a for a, _ in slices],
                routed.footprints if weighted else None,
                cells,
                banks,
                self.layouts[: len(slices)],
                self.density_widths[0],
                self.config.backend,
            )
        pieces = []
        for level, (a, b) in enumerate(slices):
            b = total if residual else b  # deeper samples come after, and read this level's features too
            if a == b:
                continue
            node = routed.path[a:b, level]
            local = octree.local(routed.unit[a:b], node, level)
            row = node - octree.first_of_level[level]
            bank = self.grids[level].detach() if frozen else self.grids[level]
            features = hash_encode(local, row, bank, self.layouts[level], self.config.backend)
            if weighted:
                features = features * self.grid_fading(level, routed.footprints[a:b], routed.unit[a:b])
            if not residual:
                pieces.append(features)
                continue
            pieces.append(nn.functional.pad(features, (0, 0, a, 0)) if a else features)
        if not residual:
            return torch.cat(pieces)
        features = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
        return nn.functional.pad(features, (0, self.density_widths[0] - features.shape[1]))

    def _hash_level_weights(
        self,
        level: int,
        cells: np.ndarray,
        footprints: Float[Tensor, "S"],
        unit: Float[Tensor, "S 3"],
        along: bool = False,
    ) -> Float[Tensor, "S L"]:
        """Weight of each hash level: how much of a cell's detail is left in the mean over the footprint (Zip-NeRF,
        eq. 9).

        Outside of the cube the contraction shrinks a pixel's footprint, which lies across the ray, as it shrinks
        distances around the centre; a length ``along`` the ray shrinks as distances from the centre do.
        """
        if level == 0:
            norm = (2 * unit.detach() - 1).abs().amax(dim=-1).clamp(min=1)
            footprints = footprints * (1 / norm if along else 2 - 1 / norm) / norm
        return torch.erf(torch.from_numpy(cells).to(footprints) / footprints[:, None].clamp(min=1e-12))

    def grid_fading(
        self, level: int, footprints: Float[Tensor, "S"], unit: Float[Tensor, "S 3"]
    ) -> Float[Tensor, "S LF"]:
        """What the features of the grids of a level are multiplied with, for samples of these footprints (scene units)
        at these unit coordinates."""
        if not self.config.downweight:
            return footprints.new_ones(len(footprints), self.layouts[level].num_outputs)
        cells = self._cells(self.layouts[: level + 1], self.config.downweight)[level]
        weights = self._hash_level_weights(level, cells, footprints, unit)
        return weights.repeat_interleave(self.layouts[level].features, dim=1)

    def _cells(self, layouts: list[HashLayout], strength: float) -> list[np.ndarray]:
        """Per octree level [L] of its hash levels: what the footprint is compared with, scene units."""
        root = 2.0 * self.octree.cube.side  # its grid covers the contracted space
        sides = [root, *(root / 2.0 ** (level + 1) for level in range(1, len(layouts)))]
        return [
            (strength / 8**0.5 * side / layout.scales.astype(np.float64)).astype(np.float32)
            for side, layout in zip(sides, layouts)
        ]

    def _fused(self, unit: Tensor, footprints: Tensor | None) -> bool:
        """Whether the kernels that follow the paths can be used: they give gradients to the banks alone."""
        needs_gradient = unit.requires_grad or (footprints is not None and footprints.requires_grad)
        return not (needs_gradient and torch.is_grad_enabled()) and follows_paths(self.config.backend, unit)

    def _paths(self, unit: Tensor, path: Tensor) -> TreePaths:
        return TreePaths(unit, path, self.octree.coords, self.octree.first_of_level.tolist())

    def density(self, routed: Routed, frozen: bool = False) -> tuple[Float[Tensor, "M"], Float[Tensor, "M geo"]]:
        """Density per scene unit and geometry features of routed samples (in routed order).

        ``frozen`` keeps gradients from the banks, for derivatives with respect to the positions alone.
        """
        slices = self._slices(routed.node)
        features = self._features(routed, slices, frozen)
        hidden = self._decode(features, routed.node, 0, self.density_widths, frozen)
        return shading.activate(hidden, 2.0 / self.octree.cube.side)

    def color(self, node: Int[Tensor, "S"], inputs: Float[Tensor, "S GCA"]) -> Float[Tensor, "S 3"]:
        """Colour in 0..1 of samples sorted by node.

        Args:
            node: of the samples.
            inputs: geometry features, direction code [16] and appearance code side by side.
        """
        return torch.sigmoid(self._decode(inputs, node, self.pages.color_offset, self.color_widths, False))

    def normals(
        self, positions: Float[Tensor, "M 3"], footprints: Float[Tensor, "M"] | None, routing_scale: float = 1.0
    ) -> Float[Tensor, "M 3"]:
        """Unit normals: the direction in which the density falls fastest, world frame."""
        if len(positions) == 0:  # a chunk of rays into empty space
            return torch.zeros_like(positions)
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            routed = self.route(positions, footprints, None, routing_scale)
            density, _ = self.density(routed, frozen=True)
            (gradient,) = torch.autograd.grad(density.clamp(min=1e-10).log().sum(), positions)
        return -nn.functional.normalize(gradient, dim=-1)

    def proposal_density(
        self, positions: Float[Tensor, "M 3"], footprints: Float[Tensor, "M"] | None, routing_scale: float = 1.0
    ) -> Float[Tensor, "M"]:
        """Density of the proposal grids per scene unit: exp of the weighted sum over the sample's node and its
        ancestors (``exp(-1) 2 / side`` where all of it is faded).

        Args:
            positions: world positions.
            footprints: at least half of the intervals' lengths, scene units: they choose the nodes and fade the hash
                levels. None: the finest nodes, nothing is faded.
            routing_scale: the nodes are those of footprints this much larger.
        """
        octree = self.octree
        unit = octree.cube.to_unit(positions)
        path = self._walk(unit, footprints, None, routing_scale)
        banks, layouts = _first(self.proposals, path.shape[1]), self.proposal_layouts[: path.shape[1]]
        cells = self._cells(layouts, self.config.proposal_downweight)
        weighted = self.config.proposal_downweight and footprints is not None
        if self._fused(unit, footprints):
            radii = footprints if weighted else None
            log_density = path_sum(self._paths(unit, path), radii, cells, banks, layouts, self.config.backend)
            return trunc_exp(log_density - 1.0) * (2.0 / octree.cube.side)
        log_density = 0.0
        for level in range(path.shape[1]):
            node = path[:, level]
            at = torch.nonzero(node >= 0)[:, 0] if level else slice(None)
            if level and len(at) == 0:
                break
            row = node[at] - octree.first_of_level[level]
            local = octree.local(unit[at], node[at], level)
            features = hash_encode(local, row, banks[level], layouts[level], self.config.backend)
            if weighted:
                weights = self._hash_level_weights(level, cells[level], footprints[at], unit[at], along=True)
                features = features * weights
            part = features.sum(-1)
            log_density = log_density.index_add(0, at, part) if level else part
        return trunc_exp(log_density - 1.0) * (2.0 / octree.cube.side)

    def density_at(
        self,
        positions: Float[Tensor, "M 3"],
        footprints: Float[Tensor, "M"] | None = None,
        max_level: int | None = None,
    ) -> Float[Tensor, "M"]:
        """Density per scene unit at world positions, in the caller's order."""
        routed = self.route(positions, footprints, max_level)
        density, _ = self.density(routed)
        return torch.empty_like(density).index_put((routed.order,), density)


def _first(banks: nn.ParameterList, count: int) -> list[Tensor]:
    """The first banks; a slice of a ParameterList builds a new module, a quarter of a millisecond."""
    return [bank for bank, _ in zip(banks, range(count))]


def in_place_gradients(field: OctreeField, device: torch.device | str = "cpu") -> None:
    """Let the kernels write bank gradients in place (for training with NodeAdam), if the backend on that device can."""
    if choose(field.config.backend, torch.device(device)) not in ("numba", "triton"):
        return
    for banks in (field.grids, field.decoders, field.proposals):
        for bank in banks:
            enable_bank_gradient(bank)
