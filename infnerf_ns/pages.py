"""What stands in a node's pages, and how large the banks of a tree are, without allocating anything."""

from __future__ import annotations

from infnerf_ns.field_config import FieldConfig
from infnerf_ns.kernels import HashLayout, mlp_page_size
from infnerf_ns.octree import Octree


class PageLayout:
    """Layouts of the pages of all octree levels.

    Args:
        config: sizes.
        node_resolution: finest grid resolution of a node.
        max_level: deepest level that the tree may ever have.
    """

    def __init__(self, config: FieldConfig, node_resolution: int, max_level: int) -> None:
        self.node_resolution = node_resolution
        residual = config.children == "residual"
        table = (config.log2_table_size, config.features_per_level)
        # The root's grid covers the contracted space, in which the root cube is the middle half: twice the cells.
        root = HashLayout(config.hash_levels, 2 * config.base_resolution, 2 * node_resolution, *table)
        complete = HashLayout(config.hash_levels, config.base_resolution, node_resolution, *table)
        added = config.child_hash_levels
        finer = HashLayout(added, round(node_resolution / 2 ** ((added - 1) / added)), node_resolution, *table)
        self.grids = [root] + [finer if residual else complete] * max_level
        proposal_table, fine = (config.proposal_log2_table_size, 1), config.proposal_resolution
        self.proposals = [HashLayout(4, min(16, fine), fine, *proposal_table)]
        self.proposals += [HashLayout(2, fine // 2, fine, *proposal_table)] * max_level

        inputs = sum(layout.num_outputs for layout in self.grids) if residual else root.num_outputs
        self.density_widths = (inputs, config.hidden_width, 1 + config.geo_features)
        color_inputs = config.geo_features + 16 + config.appearance_dim
        self.color_widths = (color_inputs, *[config.color_hidden_width] * config.color_hidden_layers, 3)
        self.color_offset = mlp_page_size(self.density_widths)
        self._decoder_page = self.color_offset + mlp_page_size(self.color_widths)
        self._sharing, self._max_level = config.decoder_sharing, max_level

    def bank_shapes(self, octree: Octree) -> list[dict[str, tuple[int, int]]]:
        """Per octree level, existing or not: (nodes, page) of the bank of each kind."""
        shapes = []
        for level, count in enumerate(octree.nodes_per_level + [0] * (self._max_level - octree.depth)):
            decoders = {"node": count, "level": min(count, 1), "tree": int(level == 0)}[self._sharing]
            grids, proposals = self.grids[level].page_size, self.proposals[level].page_size
            shapes.append(
                {"grids": (count, grids), "decoders": (decoders, self._decoder_page), "proposals": (count, proposals)}
            )
        return shapes

    def node_page(self, level: int) -> dict[str, int]:
        """Floats that a node of a level owns, by kind; decoders only where every node has its own."""
        sizes = {"grids": self.grids[level].page_size, "proposals": self.proposals[level].page_size}
        return {**sizes, "decoders": self._decoder_page} if self._sharing == "node" else sizes

    def page_bytes(self, level: int, training: bool = True) -> int:
        """Bytes of what a node of a level owns; in training as for :meth:`memory_bytes`."""
        return _bytes(sum(self.node_page(level).values()), training)

    def memory_bytes(self, octree: Octree, training: bool = True) -> list[int]:
        """Bytes per level of the parameters; in training also of the gradient and the two moments."""
        shapes = self.bank_shapes(octree)[: octree.depth + 1]
        return [_bytes(sum(rows * page for rows, page in level.values()), training) for level in shapes]


def _bytes(numbers: int, training: bool) -> int:
    return numbers * 4 * (4 if training else 1)
