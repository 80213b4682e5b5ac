"""The pages of a packed run: one safetensors file per node below the root, each with a checksum.

A page holds what :class:`infnerf_ns.pages.PageLayout` says a node owns: ``grids``, ``proposals`` and, where every node
has a decoder of its own, ``decoders``; as float32 or float16. The checksums (CRC-32) stand in the packed checkpoint, so
a page of another packing is noticed, too; they cover names, types and shapes of the tensors. Files are memory-mapped
when they are read; safetensors holds no code.
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
from infnerf_ns.regular_files import file_problem

PAGES = "pages"
"""Name of the folder of the pages in the folder of a packed run."""


_DESCRIBED = 1 << 32
"""Set in a checksum that covers names, types and shapes; those of earlier versions, of the numbers alone, lack it."""
_TYPES = ("float32", "float16")


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


def checksum(arrays: Mapping[str, np.ndarray], described: bool = True) -> int:
    """CRC-32 of a page's tensors in the order of their names: name, type and shape of each, and its numbers.

    Args:
        arrays: by name.
        described: bit 32 is set; else the checksum of earlier versions, of the numbers alone.
    """
    total = 0
    for name in sorted(arrays):
        if described:
            total = zlib.crc32(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), total)
    return total | _DESCRIBED if described else total


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
        path, sizes = self.path(node), self.sizes(node)
        problem = file_problem(path)
        if problem is not None:
            raise PageError(f"the page {path} is missing" if not path.exists() else f"the page {path}: {problem}")
        try:
            with safe_open(path, framework="numpy") as file:
                if set(file.keys()) != set(sizes):
                    raise ValueError(f"it holds {', '.join(sorted(file.keys())) or 'nothing'}")
                for name, size in sizes.items():  # before anything is read
                    if file.get_slice(name).get_shape() != [size]:
                        raise ValueError(f"its {name} are {file.get_slice(name).get_shape()}, not {[size]}")
                arrays = {name: file.get_tensor(name) for name in sizes}
        except PermissionError as error:
            raise PageError(f"the page {path} cannot be read ({error.strerror}): allow reading it") from error
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PageError(f"the page {path} is damaged ({error})") from error
        wanted = self._checksums[node]
        fits = all(str(array.dtype) in _TYPES for array in arrays.values())
        if not fits or checksum(arrays, bool(wanted & _DESCRIBED)) != wanted:
            raise PageError(f"the page {path} is damaged (its checksum is not the one that infnerf-pack wrote down)")
        return arrays


def to_float(array: np.ndarray) -> Tensor:
    """A tensor of a page, as the kernels want it."""
    return torch.from_numpy(array).float()
