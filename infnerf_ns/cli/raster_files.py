"""Raster files that are written strip by strip, so that they may be larger than memory: GeoTIFF, and PNG with a world
file.

GeoTIFF is written by rasterio (the optional extra ``geo``). No library in use writes a PNG row by row (Pillow wants the
whole picture), so its few chunks are written here: PNG specification, third edition, sections 5 and 9.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

from infnerf_ns.cli.raster_grid import RasterGrid
from infnerf_ns.errors import InputError

NO_HEIGHT = -9999.0
"""Height of pixels where there is nothing."""
_CACHE_MIB = 64
"""Memory for GDAL's blocks; it takes a share of the machine's otherwise."""
_BLOCK = 256
_SMALLEST_OVERVIEW = 256

Content = Literal["rgb", "height"]


class StripWriter(Protocol):
    """Takes a raster from the north to the south."""

    def write(self, row: int, strip: UInt8[np.ndarray, "h w 4"] | Float32[np.ndarray, "h w"]) -> None:
        """The next rows.

        Args:
            row: the first of them.
            strip: colour and opacity, or heights.
        """
        ...


def require_writable_kind(path: Path, content: Content, crs: str | None, flag: str) -> None:
    """Checks what can be known before anything is rendered.

    Args:
        path: of the file.
        content: of its pixels.
        crs: coordinate reference system that is asked for.
        flag: option that named the file, for messages.

    Raises:
        InputError: this kind of file cannot be written, or not so.
    """
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        try:
            import rasterio
            from rasterio.crs import CRS
        except ImportError:
            remedy = (
                " or write a .png: the file and its world file are as good for most uses" if content == "rgb" else ""
            )
            raise InputError(f'{flag} {path}: GeoTIFF needs rasterio: pip install "infnerf-ns[geo]"{remedy}') from None
        if crs is not None:
            try:
                system = CRS.from_user_input(crs)
            except (rasterio.errors.CRSError, ValueError) as error:
                raise InputError(f"--crs {crs}: {error}; give a code such as EPSG:32614") from error
            if not system.is_projected:
                raise InputError(f"--crs {crs} is not a projected system: give that of the capture, e.g. its UTM zone")
    elif suffix == ".png" and content == "rgb":
        if crs is not None:
            raise InputError(f"--crs {crs}: a PNG's world file has no place for it; write a .tif")
    else:
        kinds = ".tif (GeoTIFF) or .png (with a world file)" if content == "rgb" else ".tif (GeoTIFF)"
        raise InputError(f"{flag} {path}: the name must end in {kinds}")


@contextmanager
def raster_writer(
    path: Path, final: Path, content: Content, grid: RasterGrid, crs: str | None
) -> Iterator[StripWriter]:
    """Opens a raster file for writing.

    Args:
        path: to write to; complete when the context ends without an error.
        final: the name that it will have, whose ending says what kind of file it is.
        content: of its pixels.
        grid: where they lie.
        crs: coordinate reference system, or None for a local frame.
    """
    if final.suffix.lower() == ".png":
        with open(path, "wb") as file:
            png = _Png(file, grid.width, grid.height)
            yield png
            png.finish()
            file.flush()
            os.fsync(file.fileno())
    else:
        with _geotiff(path, content, grid, crs) as tiff:
            yield tiff


def world_file_path(png: Path) -> Path:
    """Of the world file that lies beside a PNG."""
    return png.with_suffix(".pgw")


def world_file(grid: RasterGrid) -> str:
    """Content of the world file: pixel size and turn, then where the middle of the first pixel lies."""
    numbers = grid.gsd, 0.0, 0.0, -grid.gsd, grid.west + grid.gsd / 2, grid.north - grid.gsd / 2
    return "".join(f"{number!r}\n" for number in map(float, numbers))


class _Png:
    """Eight bits per channel, with opacity."""

    def __init__(self, file: Any, width: int, height: int) -> None:
        self._file = file
        self._pack = zlib.compressobj(6)
        self._above = np.zeros((1, width, 4), np.uint8)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))

    def write(self, row: int, strip: UInt8[np.ndarray, "h w 4"]) -> None:
        """The next rows, each as its difference to the one above (filter type 2)."""
        del row
        difference = (strip - np.concatenate([self._above, strip[:-1]])).reshape(len(strip), -1)
        self._above = strip[-1:].copy()
        filtered = np.concatenate([np.full((len(strip), 1), 2, np.uint8), difference], axis=1)
        self._chunk(b"IDAT", self._pack.compress(filtered.tobytes()))

    def finish(self) -> None:
        """The end of the file."""
        self._chunk(b"IDAT", self._pack.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, data: bytes) -> None:
        check = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check))


class _GeoTiff:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def write(self, row: int, strip: UInt8[np.ndarray, "h w 4"] | Float32[np.ndarray, "h w"]) -> None:
        """The next rows."""
        from rasterio.windows import Window

        bands = np.moveaxis(strip, -1, 0) if strip.ndim == 3 else strip[None]
        self._dataset.write(bands, window=Window(0, row, strip.shape[1], len(strip)))


@contextmanager
def _geotiff(path: Path, content: Content, grid: RasterGrid, crs: str | None) -> Iterator[_GeoTiff]:
    """Tiled, compressed, larger than 4 GiB where it must be, with overviews."""
    import rasterio
    from rasterio._err import CPLE_BaseError  # what GDAL's own errors are; there is no public name for it
    from rasterio.enums import ColorInterp, Resampling
    from rasterio.errors import RasterioError
    from rasterio.transform import from_origin

    profile: dict[str, Any] = (
        {"count": 4, "dtype": "uint8", "photometric": "RGB", "predictor": 2}
        if content == "rgb"
        else {"count": 1, "dtype": "float32", "nodata": NO_HEIGHT, "predictor": 3}
    )
    layout = {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "interleave": "pixel"}
    try:
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_MIB, GDAL_TIFF_OVR_BLOCKSIZE=_BLOCK, GDAL_NUM_THREADS="ALL_CPUS"):
            with rasterio.open(
                path,
                "w",
                driver="GTiff",
                width=grid.width,
                height=grid.height,
                transform=from_origin(grid.west, grid.north, grid.gsd, grid.gsd),
                crs=crs,
                compress="deflate",
                BIGTIFF="IF_SAFER",
                **profile,
                **layout,
            ) as dataset:
                if content == "rgb":
                    dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
                yield _GeoTiff(dataset)
            factors = []
            while max(grid.width, grid.height) >> len(factors) > _SMALLEST_OVERVIEW:
                factors.append(2 ** (len(factors) + 1))
            if factors:
                with rasterio.open(path, "r+") as dataset:
                    dataset.build_overviews(factors, Resampling.average)
            _require_whole(path)
    except (RasterioError, CPLE_BaseError) as error:
        raise OSError(f"GDAL: {error}") from error


def _require_whole(path: Path) -> None:
    """Reads every block of the file and of its overviews, as GDAL does not always say that the disk is full.

    Raises:
        OSError: a block is missing.
        RasterioError: a block cannot be read.
    """
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(path) as dataset:
        overviews = len(dataset.overviews(1))
    for level in range(-1, overviews):
        number = {} if level < 0 else {"ovr": level}
        with rasterio.open(path) as dataset, rasterio.open(path, **_overview(level)) as image:
            for row in range(0, image.height, _BLOCK):
                for column in range(0, image.width, _BLOCK):
                    # A missing block would be read as empty.
                    block = f"BLOCK_OFFSET_{column // _BLOCK}_{row // _BLOCK}"
                    if dataset.get_tag_item(block, "TIFF", bidx=1, **number) is None:
                        raise OSError(f"{path.name} is not whole; is the disk full?")
                image.read(1, window=Window(0, row, image.width, min(_BLOCK, image.height - row)))


def _overview(level: int) -> dict[str, int]:
    return {} if level < 0 else {"overview_level": level}
