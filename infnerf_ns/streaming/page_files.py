"""The pages of a packed run: one safetensors file per node below the root, each with a checksum.

A page holds what :class:`infnerf_ns.pages.PageLayout` says a node owns: ``grids``, ``proposals`` and, where every node
has a decoder of its own, ``decoders``; as float32 or float16. The checksums (CRC-32) stand in the packed checkpoint, so
a page of another packing is noticed, too. Files are memory-mapped when they are read; safetensors holds no code.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from infnerf_ns.octree import Octree
from infnerf_ns.pages import PageLayout

PAGES = "pages"
"""Name of the folder of the pages in the folder of a packed run."""


class PageError(Exception):
    """A page is missing or damaged; the message is one line that names the file."""


def page_path(folder: Path, level: int, coords: Int[Tensor, "3"]) -> Path:
    """File of the node of that level and integer cell."""
    return folder / f"level-{level}" / f"{'-'.join(str(int(each)) for each in coords)}.safetensors"


def write_page(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes a page and returns its checksum.

    Args:
        path: of the file; its folder is there.
        tensors: the node's rows, on the CPU, float32 or float16.

    Raises:
        OSError: it cannot be written.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(whole))  # safetensors' own save_file lets nobody but the owner read the file
    return checksum({name: tensor.numpy() for name, tensor in whole.items()})


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of a page's numbers, in the order of their names."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), total)
    return total


class PageFiles:
    """Reads the pages of one packed run.

    Args:
        folder: with the pages.
        octree: the whole tree.
        layout: of its pages.
        checksums: of the nodes; the root's is not looked at.
    """

    def __init__(self, folder: Path, octree: Octree, layout: PageLayout, checksums: Int[Tensor, "N"]) -> None:
        self.folder, self._octree, self._checksums = folder, octree.to("cpu"), checksums.tolist()
        self._sizes = [layout.node_page(level) for level in range(octree.depth + 1)]

    def path(self, node: int) -> Path:
        """File of a node."""
        return page_path(self.folder, int(self._octree.level[node]), self._octree.coords[node])

    def sizes(self, node: int) -> dict[str, int]:
        """Floats in each tensor of a node's page."""
        return self._sizes[int(self._octree.level[node])]

    def read(self, node: int) -> dict[str, np.ndarray]:
        """The numbers of a node's page, each [page], float32 or float16.

        Raises:
            PageError: the file is missing, damaged, or of another run.
        """
        path = self.path(node)
        try:
            path.stat()
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in self.sizes(node)}
        except FileNotFoundError as error:
            raise PageError(f"the page {path} is missing") from error
        except PermissionError as error:
            raise PageError(f"the page {path} cannot be read ({error.strerror}): allow reading it") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise PageError(f"the page {path} is damaged ({error})") from error
        fits = all(arrays[name].shape == (size,) for name, size in self.sizes(node).items())
        if not fits or checksum(arrays) != self._checksums[node]:
            raise PageError(f"the page {path} is damaged (its checksum is not the one that infnerf-pack wrote down)")
        return arrays


def to_float(array: np.ndarray) -> Tensor:
    """A tensor of a page, as the kernels want it."""
    return torch.from_numpy(array).float()
