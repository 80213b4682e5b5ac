"""What a run's configuration, checkpoint and page files tell of its octree, without loading the model or the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from infnerf_ns.cli.runs import load_run_config, newest_checkpoint
from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout
from infnerf_ns.state_validation import require_model_state
from infnerf_ns.streaming.packing import CHECKSUMS
from infnerf_ns.streaming.page_files import PAGES, PageError, PageFiles
from infnerf_ns.training import checkpoints
from infnerf_ns.training.trainer import InfNeRFTrainerConfig


@dataclass
class StoredTree:
    """The octree of a run's newest whole checkpoint."""

    folder: Path
    """of the run"""
    config: InfNeRFTrainerConfig
    """of the run"""
    checkpoint: Path
    """the file"""
    step: int
    """of the training"""
    octree: Octree
    """all of its nodes"""
    layout: PageLayout
    """of its pages"""
    active_level: int
    """deepest level that has started"""
    node_samples: Int[Tensor, "N"] | None
    """training samples that each node has evaluated; None: they were not counted"""
    pages: PageFiles | None
    """of a packed run"""

    @property
    def memory_bytes(self) -> list[int]:
        """Bytes of the parameters of each level, all nodes in memory."""
        return self.layout.memory_bytes(self.octree, training=False)

    def bytes_of(self, nodes: Bool[Tensor, "N"]) -> int:
        """Bytes of the parameters of these nodes, and of what is always in memory: the root and shared decoders."""
        page = torch.tensor([self.layout.page_bytes(level, training=False) for level in range(self.octree.depth + 1)])
        below_root = page[self.octree.level[1:]]
        return sum(self.memory_bytes) - int(below_root[~nodes[1:]].sum())


def read_tree(run: Path) -> StoredTree:
    """Reads the tree of a run; the pages of its checkpoint stay in the file.

    Args:
        run: folder or config.yml of the run, packed or not.

    Raises:
        InputError: there is no such run, or no whole checkpoint with an octree in it.
    """
    config, folder = load_run_config(run)
    state, path = newest_checkpoint(folder / config.relative_model_dir)
    model = checkpoints.model_state(state)
    settings = config.pipeline.model
    sizes = settings.field, settings.octree.node_resolution, settings.octree.max_level
    octree = require_model_state(model, *sizes, source=str(path))
    layout = PageLayout(*sizes)
    samples = model.get("field.node_samples")
    counted = samples is not None and bool(samples.any())  # runs of earlier versions get zeros when they are loaded
    return StoredTree(
        folder=folder,
        config=config,
        checkpoint=path,
        step=state["step"],
        octree=octree,
        layout=layout,
        active_level=int(model["field.active_level"]),
        node_samples=samples if counted else None,
        pages=PageFiles(folder / PAGES, octree, layout, model[CHECKSUMS]) if CHECKSUMS in model else None,
    )


@dataclass
class PageCheck:
    """The page files of a packed run."""

    bytes_on_disk: Int[Tensor, "N"]
    """0 at the root, which has no file, and where a file is missing"""
    missing: Bool[Tensor, "N"]
    """nodes without their file"""
    damaged: Bool[Tensor, "N"]
    """all False where the pages were not read"""
    problems: list[str]
    """a line for each page that was found missing or damaged"""


def check_pages(
    files: PageFiles, octree: Octree, track: Callable[[Iterable[int]], Iterable[int]] | None = None
) -> PageCheck:
    """Looks at the page files of a packed run.

    Args:
        files: its pages.
        octree: its tree.
        track: reads every page and compares its checksum, and shows the progress over the nodes; None: the files are
            only looked for.
    """
    check = PageCheck(
        bytes_on_disk=torch.zeros(octree.num_nodes, dtype=torch.long),
        missing=torch.zeros(octree.num_nodes, dtype=torch.bool),
        damaged=torch.zeros(octree.num_nodes, dtype=torch.bool),
        problems=[],
    )
    nodes = range(1, octree.num_nodes)
    for node in nodes if track is None else track(nodes):
        path = files.path(node)
        if not path.is_file():
            check.missing[node] = True
            check.problems.append(f"the page {path} is missing")
            continue
        check.bytes_on_disk[node] = path.stat().st_size
        if track is not None:
            try:
                files.read(node)
            except PageError as error:
                check.damaged[node] = True
                check.problems.append(str(error))
    return check
