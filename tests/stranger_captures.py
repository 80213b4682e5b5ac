"""Captures as strangers bring them: a small town, photographed once, and recipes that write it in the forms that public
reports describe, right ones, unusual ones and wrong ones.

Each recipe says which ordinary capture it must be read like, or which line it must end in. Lengths are metres; cameras
have OpenGL's axes, as nerfstudio's, unless a recipe says otherwise.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import struct
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from PIL import Image, ImageCms

from infnerf_ns.data.capture.intrinsics import COLMAP_MODELS
from infnerf_ns.data.demo_scene.photographer import Lens, Photographer
from infnerf_ns.data.demo_scene.survey import Survey

PHOTOS, WIDTH, HEIGHT = 48, 96, 72
POINT_STEP = 4
"""Every so manieth of the town's points, 4,444 in all."""
UTM = np.array([452300.0, 4512345.0, 312.0])
Meta = dict[str, Any]
Save = Callable[[UInt8[np.ndarray, "h w 3"], Path], None]


class AnyLens(Protocol):
    """What a photographer and a capture need of a lens."""

    width: int
    height: int
    focal: float

    def directions(self, x: Float32[np.ndarray, "..."], y: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "... 3"]:
        """Of image points, in camera space."""


@dataclass(frozen=True)
class Fisheye:
    """An equidistant lens with one coefficient, ``r = f (theta + k1 theta**3)``, as OpenCV's fisheye model."""

    width: int
    height: int
    focal: float
    k1: float

    def directions(self, x: Float32[np.ndarray, "..."], y: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "... 3"]:
        """Of image points, in camera space (x right, y up, z backwards)."""
        u, v = (x - self.width / 2) / self.focal, (self.height / 2 - y) / self.focal
        radius = np.hypot(u, v)
        theta = radius.copy()
        for _ in range(20):  # Newton
            theta -= (theta * (1 + self.k1 * theta**2) - radius) / (1 + 3 * self.k1 * theta**2)
        sideways = np.where(radius > 0, np.sin(theta) / np.maximum(radius, 1e-9), 1.0)
        return np.stack([u * sideways, v * sideways, -np.cos(theta)], axis=-1).astype(np.float32)


PINHOLE = Lens(WIDTH, HEIGHT, 83.0)
LONGER = Lens(WIDTH, HEIGHT, 104.0)
FISHEYES = (Fisheye(96, 72, 40.0, 0.02), Fisheye(88, 66, 38.0, -0.03))


@dataclass(frozen=True)
class Town:
    """What was photographed."""

    photos: list[UInt8[np.ndarray, "h w 3"]]
    lenses: list[AnyLens]
    poses: Float64[np.ndarray, "p 4 4"]
    """camera to world"""
    xyz: Float64[np.ndarray, "n 3"]
    rgb: UInt8[np.ndarray, "n 3"]
    seen_point: Int64[np.ndarray, "k"]
    seen_photo: Int64[np.ndarray, "k"]


@functools.cache
def town(lenses: tuple[AnyLens, ...] = (PINHOLE,)) -> Town:
    """The town in photos that were taken with these lenses in turn; its points are those that a pinhole sees."""
    survey = _survey()
    used = [lenses[index % len(lenses)] for index in range(PHOTOS)]
    photos = [
        Photographer(survey.town, survey.rays, lens, 2).photo(pose)  # type: ignore[arg-type]
        for lens, pose in zip(used, survey.poses)
    ]
    poses = np.tile(np.eye(4), (PHOTOS, 1, 1))
    poses[:, :3] = survey.poses
    left, _, right = np.linalg.svd(poses[:, :3, :3])
    poses[:, :3, :3] = left @ right  # rotations to the last bit of double precision, for large coordinates
    points, kept = _points(), slice(0, None, POINT_STEP)
    pairs = points.seen_point % POINT_STEP == 0
    return Town(
        photos,
        used,
        poses,
        points.xyz[kept].astype(np.float64),
        points.rgb[kept],
        points.seen_point[pairs].astype(np.int64) // POINT_STEP,
        points.seen_photo[pairs].astype(np.int64),
    )


@functools.cache
def _survey() -> Survey:
    return Survey(1, 3, PHOTOS, PINHOLE)


@functools.cache
def _points() -> Any:
    survey = _survey()
    photographer = Photographer(survey.town, survey.rays, PINHOLE, 2)
    picked = [survey.pick(photo) for photo in range(PHOTOS)]
    rgb = [photographer.photo(pose)[each.row, each.column] for pose, each in zip(survey.poses, picked)]
    with ThreadPoolExecutor(1) as pool:
        return survey.points(picked, rgb, pool)


# Cases


@dataclass(frozen=True)
class Case:
    """A capture and what must become of it."""

    name: str
    write: Callable[[Path], Any]
    """makes the capture in an empty folder"""
    parser: Literal["transforms", "colmap"]
    like: str | None = None
    """the capture with which it must share photos, cameras and points"""
    line: str | None = None
    """regular expression of the line in which it must end"""
    trains_like: str | None = None
    """its data are others than those of that capture, and a training must reach the same PSNR"""
    pixels: float = 0.51
    """mean difference of pixels, of 255, that its way of storing them makes"""
    options: dict[str, Any] = field(default_factory=dict)
    """of the dataparser"""


CASES: dict[str, Case] = {}


def case(parser: Literal["transforms", "colmap"], **expected: Any) -> Callable[[Callable], Callable]:
    """Registers a recipe."""

    def register(write: Callable[[Path], Any]) -> Callable[[Path], Any]:
        name = write.__name__.strip("_").replace("__", ": ").replace("_", " ")
        CASES[name] = Case(name, write, parser, **expected)
        return write

    return register


def transforms(**expected: Any) -> Callable[[Callable], Callable]:
    """A recipe of a capture with a ``transforms.json``."""
    return case("transforms", **expected)


def colmap(**expected: Any) -> Callable[[Callable], Callable]:
    """A recipe of a COLMAP capture."""
    return case("colmap", **expected)


# Writing transforms.json


def save_png(photo: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Without loss."""
    Image.fromarray(photo).save(path)


def grey(photo: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """The green channel, spread to the whole range that the town's photos leave unused."""
    low, high = _green_range()
    return np.rint((photo[..., 1].astype(np.float64) - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)


@functools.cache
def _green_range() -> tuple[int, int]:
    green = np.stack([photo[..., 1] for photo in town().photos])
    return int(green.min()), int(green.max())


def write_photos(folder: Path, scene: Town, save: Save = save_png, ending: str = ".png") -> list[str]:
    """Writes ``images/NNN.ending``; returns the names."""
    (folder / "images").mkdir(parents=True)
    names = [f"images/{index:03d}{ending}" for index in range(len(scene.photos))]
    for name, photo in zip(names, scene.photos):
        save(photo, folder / name)
    return names


def entries(lens: AnyLens) -> Meta:
    """A lens as a transforms.json has it."""
    centre = {"cx": lens.width / 2, "cy": lens.height / 2}
    size = {"w": lens.width, "h": lens.height, "fl_x": lens.focal, "fl_y": lens.focal}
    if isinstance(lens, Fisheye):
        return {**size, **centre, "k1": lens.k1, "k2": 0.0, "k3": 0.0, "k4": 0.0}
    return {**size, **centre}


def write_meta(folder: Path, meta: Meta, encoding: str = "utf-8") -> None:
    """Writes ``transforms.json``."""
    (folder / "transforms.json").write_text(json.dumps(meta), encoding=encoding)


def write_ply(
    path: Path, xyz: Float64[np.ndarray, "n 3"], rgb: UInt8[np.ndarray, "n 3"] | None, form: str = "ascii"
) -> None:
    """Points as float32 text (``ascii``), or as double (``binary_little_endian``, ``double``)."""
    kind = "float" if form == "ascii" else "double"
    header = ["ply", f"format {'ascii' if form == 'double' else form} 1.0", f"element vertex {len(xyz)}"]
    header += [f"property {kind} {axis}" for axis in "xyz"]
    colours = [] if rgb is None else [(name, np.uint8) for name in ("red", "green", "blue")]
    header += [f"property uchar {name}" for name, _ in colours] + ["end_header", ""]
    if form == "binary_little_endian":
        rows = np.empty(len(xyz), [("xyz", "<f8", 3), ("rgb", "u1", 0 if rgb is None else 3)])
        rows["xyz"] = xyz
        if rgb is not None:
            rows["rgb"] = rgb
        path.write_bytes("\n".join(header).encode() + rows.tobytes())
        return
    digits = "%.9g %.9g %.9g" if form == "ascii" else "%r %r %r"
    lines = [digits % tuple(point) for point in xyz.tolist()]
    if rgb is not None:
        lines = [f"{line} {' '.join(map(str, colour))}" for line, colour in zip(lines, rgb.tolist())]
    path.write_text("\n".join(header) + "\n".join(lines) + "\n")


def draft(folder: Path, scene: Town | None = None, save: Save = save_png, ending: str = ".png") -> Meta:
    """Writes photos and points; returns the content of an ordinary transforms.json: one lens at the top, if one took
    all photos."""
    scene = scene or town()
    names = write_photos(folder, scene, save, ending)
    write_ply(folder / "sparse_pc.ply", scene.xyz, scene.rgb)
    several = len(set(scene.lenses)) > 1
    frames = [
        {"file_path": name, "transform_matrix": pose.tolist(), **(entries(lens) if several else {})}
        for name, pose, lens in zip(names, scene.poses, scene.lenses)
    ]
    top = {} if several else entries(scene.lenses[0])
    return {"camera_model": "OPENCV", **top, "ply_file_path": "sparse_pc.ply", "frames": frames}


def changed(folder: Path, change: Callable[[Meta], Any], **writing: Any) -> None:
    """An ordinary capture whose transforms.json is changed."""
    meta = draft(folder, **writing)
    change(meta)
    write_meta(folder, meta)


def each_pose(meta: Meta, change: Callable[[Float64[np.ndarray, "4 4"]], np.ndarray]) -> None:
    """Changes every pose."""
    for frame in meta["frames"]:
        frame["transform_matrix"] = change(np.array(frame["transform_matrix"])).tolist()


@transforms()
def ordinary(folder: Path) -> None:
    write_meta(folder, draft(folder))


# Photos


def _jpeg(photo: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    Image.fromarray(photo).save(path, quality=98, subsampling=0)


@transforms(like="ordinary", pixels=2.5)
def photos__JPEG(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_jpeg, ending=".jpg"))


@transforms(like="ordinary", pixels=3.5)
def photos__CMYK_JPEG(folder: Path) -> None:
    def save(photo: np.ndarray, path: Path) -> None:
        Image.fromarray(photo).convert("CMYK").save(path, quality=98, subsampling=0)

    write_meta(folder, draft(folder, save=save, ending=".jpg"))


@transforms(like="ordinary")
def photos__CMYK_TIFF(folder: Path) -> None:
    write_meta(
        folder, draft(folder, save=lambda photo, path: Image.fromarray(photo).convert("CMYK").save(path), ending=".tif")
    )


@transforms(like="ordinary")
def photos__16_bit_colour_PNG(folder: Path) -> None:
    def save(photo: np.ndarray, path: Path) -> None:
        cv2.imwrite(str(path), photo[..., ::-1].astype(np.uint16) * 257)

    write_meta(folder, draft(folder, save=save))


@transforms(like="ordinary", pixels=3.0)
def photos__LAB_TIFF(folder: Path) -> None:
    way = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")

    def save(photo: np.ndarray, path: Path) -> None:
        ImageCms.applyTransform(Image.fromarray(photo), way).save(path)

    write_meta(folder, draft(folder, save=save, ending=".tif"))


@transforms(like="ordinary")
def photos__opaque_alpha(folder: Path) -> None:
    write_meta(folder, draft(folder, save=lambda photo, path: Image.fromarray(photo).convert("RGBA").save(path)))


def _grey_capture(folder: Path, save: Callable[[UInt8[np.ndarray, "h w"], Path], None], ending: str = ".png") -> None:
    write_meta(folder, draft(folder, save=lambda photo, path: save(grey(photo), path), ending=ending))


@transforms()
def photos__grey(folder: Path) -> None:
    _grey_capture(folder, lambda values, path: Image.fromarray(values).save(path))


@transforms(like="photos: grey")
def photos__grey_with_alpha(folder: Path) -> None:
    _grey_capture(folder, lambda values, path: Image.fromarray(values).convert("LA").save(path))


@transforms(like="photos: grey")
def photos__grey_palette(folder: Path) -> None:
    _grey_capture(folder, lambda values, path: Image.fromarray(values).convert("P").save(path))


@transforms(like="photos: grey")
def photos__grey_16_bit(folder: Path) -> None:
    _grey_capture(folder, lambda values, path: Image.fromarray(values.astype(np.uint16) * 257).save(path))


@transforms(like="photos: grey", pixels=1.0)
def photos__grey_14_bit_in_16(folder: Path) -> None:
    """Thermal cameras and industrial cameras use part of the range."""
    _grey_capture(folder, lambda values, path: Image.fromarray((7000 + values * 8.13).astype(np.uint16)).save(path))


@transforms(like="photos: grey")
def photos__float_TIFF(folder: Path) -> None:
    _grey_capture(
        folder, lambda values, path: Image.fromarray(values.astype(np.float32) / 255).save(path), ending=".tif"
    )


@transforms(like="photos: grey", pixels=1.0)
def photos__float_TIFF_of_temperatures(folder: Path) -> None:
    """Kelvin."""
    _grey_capture(
        folder, lambda values, path: Image.fromarray(280 + values.astype(np.float32) / 10).save(path), ending=".tif"
    )


# Orientation. What makes the upright photo of stored pixels, by EXIF tag, undone

_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def _tagged(tag: int, turn: bool = True) -> Save:
    """Saves pixels with an EXIF orientation; of upright photos if they are turned."""

    def save(photo: np.ndarray, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = tag
        image = Image.fromarray(photo)
        image = image.transpose(_STORED[tag]) if turn else image
        image.save(path, exif=exif, **({"quality": 98, "subsampling": 0} if path.suffix == ".jpg" else {}))

    return save


@transforms(like="ordinary", pixels=2.5)
def EXIF__180_degrees(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(3), ending=".jpg"))


@transforms(like="ordinary")
def EXIF__180_degrees_PNG(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(3)))


@transforms(like="ordinary")
def EXIF__180_degrees_poses_of_stored_pixels(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(3, turn=False)))


@transforms(like="ordinary")
def EXIF__mirrored(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(2)))


@transforms(like="ordinary", pixels=2.5)
def EXIF__90_degrees(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(6), ending=".jpg"))


@transforms(like="ordinary")
def EXIF__270_degrees_PNG(folder: Path) -> None:
    write_meta(folder, draft(folder, save=_tagged(8)))


@transforms(line="mirrored")
def photos__mirrored(folder: Path) -> None:
    write_meta(folder, draft(folder, save=lambda photo, path: save_png(photo[:, ::-1], path)))


@transforms(line="turned by 180 degrees")
def photos__turned_by_180_degrees(folder: Path) -> None:
    write_meta(folder, draft(folder, save=lambda photo, path: save_png(photo[::-1, ::-1], path)))


@transforms(line="turned by 90 degrees")
def photos__turned_by_90_degrees(folder: Path) -> None:
    write_meta(folder, draft(folder, save=lambda photo, path: save_png(np.rot90(photo), path)))


@transforms(line="the poses are not of these photos")
def photos__exchanged(folder: Path) -> None:
    def change(meta: Meta) -> None:
        names = [frame["file_path"] for frame in meta["frames"]]
        for frame, other in zip(meta["frames"], np.random.default_rng(0).permutation(len(names))):
            frame["file_path"] = names[other]

    changed(folder, change)


# Lenses


@transforms()
def lenses__two(folder: Path) -> None:
    write_meta(folder, draft(folder, town((PINHOLE, LONGER))))


@transforms(like="lenses: two")
def lenses__a_photos_own_beside_that_at_the_top(folder: Path) -> None:
    def change(meta: Meta) -> None:
        meta.update(entries(PINHOLE))
        for index, frame in enumerate(meta["frames"]):
            own = {name: frame.pop(name) for name in entries(PINHOLE)}
            frame.update(own if index % 2 else {})

    changed(folder, change, scene=town((PINHOLE, LONGER)))


@transforms(like="lenses: two")
def lenses__a_photos_own_angle_beside_a_length_at_the_top(folder: Path) -> None:
    def change(meta: Meta) -> None:
        meta.update(entries(PINHOLE))
        for index, frame in enumerate(meta["frames"]):
            for name in entries(PINHOLE):
                frame.pop(name)
            if index % 2:
                frame["camera_angle_x"] = 2 * np.arctan(LONGER.width / 2 / LONGER.focal)

    changed(folder, change, scene=town((PINHOLE, LONGER)))


def _fisheyes(folder: Path, change: Callable[[Meta], Any]) -> None:
    changed(folder, change, scene=town(FISHEYES))


@transforms()
def fisheye__at_the_top(folder: Path) -> None:
    _fisheyes(folder, lambda meta: meta.update(camera_model="OPENCV_FISHEYE"))


@transforms(like="fisheye: at the top")
def fisheye__frames(folder: Path) -> None:
    def change(meta: Meta) -> None:
        del meta["camera_model"]
        for frame in meta["frames"]:
            frame["camera_model"] = "OPENCV_FISHEYE"

    _fisheyes(folder, change)


@transforms(like="fisheye: at the top")
def fisheye__flag(folder: Path) -> None:
    def change(meta: Meta) -> None:
        del meta["camera_model"]
        meta["is_fisheye"] = True

    _fisheyes(folder, change)


@transforms(like="fisheye: at the top")
def fisheye__flag_per_frame(folder: Path) -> None:
    def change(meta: Meta) -> None:
        del meta["camera_model"]
        for frame in meta["frames"]:
            frame["is_fisheye"] = True

    _fisheyes(folder, change)


@transforms()
def fisheye__every_other_photo(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for frame in meta["frames"][1::2]:
            frame["camera_model"] = "OPENCV_FISHEYE"

    changed(folder, change, scene=town((PINHOLE, FISHEYES[0])))


@transforms(like="ordinary")
def lens__FULL_OPENCV_without_denominator(folder: Path) -> None:
    changed(
        folder, lambda meta: meta.update(camera_model="FULL_OPENCV", k1=0.0, k2=0.0, k3=0.0, k4=0.0, k5=0.0, k6=0.0)
    )


@transforms(line="FULL_OPENCV with k5 = 0.1.*undistort")
def lens__FULL_OPENCV_with_denominator(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(camera_model="FULL_OPENCV", k5=0.1))


@transforms(like="ordinary")
def lens__small_letters(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(camera_model="simple_pinhole"))


@transforms(line="camera_model 'FRAME', which is not known: give one of")
def lens__unknown_name(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(camera_model="FRAME"))


@transforms(like="ordinary")
def lens__angle_only(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for name in ("camera_model", *entries(PINHOLE)):
            del meta[name]
        meta.update(camera_angle_x=2 * np.arctan(WIDTH / 2 / PINHOLE.focal), aabb_scale=16)

    changed(folder, change)


@transforms(like="ordinary")
def lens__no_fl_y(folder: Path) -> None:
    changed(folder, lambda meta: meta.pop("fl_y"))


@transforms(like="ordinary")
def lens__no_sizes(folder: Path) -> None:
    changed(folder, lambda meta: (meta.pop("w"), meta.pop("h")))


@transforms(line="cx = nan: give a number")
def lens__NaN_centre(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(cx=float("nan")))


@transforms(line="shares of the photo must be multiplied by its size")
def lens__shares_of_the_photo(folder: Path) -> None:
    changed(
        folder,
        lambda meta: meta.update(fl_x=PINHOLE.focal / WIDTH, fl_y=PINHOLE.focal / HEIGHT, cx=0.5, cy=0.5),
    )


# Files


@transforms(like="ordinary")
def poses__3_x_4(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, lambda pose: pose[:3]))


@transforms(like="ordinary")
def paths__backslashes(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for frame in meta["frames"]:
            frame["file_path"] = frame["file_path"].replace("/", "\\")

    changed(folder, change)


@transforms(like="ordinary")
def paths__other_capitals(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for frame in meta["frames"]:
            frame["file_path"] = frame["file_path"].replace(".png", ".PNG")

    changed(folder, change)


@transforms(like="ordinary")
def paths__without_endings(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for frame in meta["frames"]:
            frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")

    changed(folder, change)


@transforms(like="ordinary")
def paths__folders_with_equal_names(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for index, frame in enumerate(meta["frames"]):
            flight, number = divmod(index, PHOTOS // 2)
            new = f"images/flight{flight}/{number:03d}.png"
            (folder / new).parent.mkdir(exist_ok=True)
            (folder / frame["file_path"]).rename(folder / new)
            frame["file_path"] = new

    changed(folder, change)


@transforms(like="ordinary")
def byte_order_mark(folder: Path) -> None:
    write_meta(folder, draft(folder), encoding="utf-8-sig")


def _lists(meta: Meta, *splits: str) -> None:
    names = [frame["file_path"] for frame in meta["frames"]]
    lists = {"train": [name for row, name in enumerate(names) if row % 5], "val": names[::5], "test": names[::5]}
    meta.update({f"{split}_filenames": lists[split] for split in splits})


@transforms()
def split__all_three_lists(folder: Path) -> None:
    changed(folder, lambda meta: _lists(meta, "train", "val", "test"))


@transforms(like="split: all three lists")
def split__without_test(folder: Path) -> None:
    changed(folder, lambda meta: _lists(meta, "train", "val"))


@transforms(like="split: all three lists")
def split__train_alone(folder: Path) -> None:
    changed(folder, lambda meta: _lists(meta, "train"))


@transforms(line="val_filenames lists images/nowhere.png")
def split__of_a_photo_that_is_not_there(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(val_filenames=["images/nowhere.png"]))


# Poses and points


def _cloud(folder: Path, change: Callable[[Float64[np.ndarray, "n 3"]], np.ndarray]) -> None:
    meta = draft(folder)
    xyz = change(town().xyz)
    write_ply(folder / "sparse_pc.ply", xyz, town().rgb[: len(xyz)], "double")
    write_meta(folder, meta)


@transforms(line="the points are in millimetres where the poses are in metres")
def cloud__millimetres(folder: Path) -> None:
    _cloud(folder, lambda xyz: 1000 * xyz)


@transforms(line="points.*feet")
def cloud__feet(folder: Path) -> None:
    _cloud(folder, lambda xyz: xyz / 0.3048)


@transforms(line="one probably georeferenced \\(UTM\\) and the other local: the points lie around [45]")
def cloud__UTM(folder: Path) -> None:
    _cloud(folder, lambda xyz: xyz + UTM)


@transforms(line="axes of the points")
def cloud__y_up(folder: Path) -> None:
    _cloud(folder, lambda xyz: xyz[:, [0, 2, 1]] * [1, 1, -1])


@transforms(line="in different frames or units|far")
def cloud__few_far_points(folder: Path) -> None:
    _cloud(folder, lambda xyz: np.random.default_rng(0).standard_normal((50, 3)) * 1e6)


@transforms(trains_like="ordinary")
def cloud__some_points_far_away(folder: Path) -> None:
    def change(xyz: np.ndarray) -> np.ndarray:
        xyz = xyz.copy()
        xyz[:: len(xyz) // 50] *= 1e5
        return xyz

    _cloud(folder, change)


@transforms()
def cloud__none(folder: Path) -> None:
    changed(folder, lambda meta: meta.pop("ply_file_path"))


@transforms(like="ordinary")
def cloud__binary_and_double(folder: Path) -> None:
    meta = draft(folder)
    write_ply(folder / "sparse_pc.ply", town().xyz, town().rgb, "binary_little_endian")
    write_meta(folder, meta)


@transforms(like="ordinary")
def cloud__without_colours(folder: Path) -> None:
    meta = draft(folder)
    write_ply(folder / "sparse_pc.ply", town().xyz, None)
    write_meta(folder, meta)


@transforms(line="sparse_pc.ply are damaged")
def cloud__cut(folder: Path) -> None:
    meta = draft(folder)
    path = folder / "sparse_pc.ply"
    write_ply(path, town().xyz, town().rgb, "binary_little_endian")
    path.write_bytes(path.read_bytes()[:-100])
    write_meta(folder, meta)


@transforms(line="OpenCV's axes")
def poses__OpenCV_axes(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, lambda pose: pose @ np.diag([1.0, -1, -1, 1])))


@transforms(line="world-to-camera")
def poses__world_to_camera(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, np.linalg.inv))


@transforms(line="the last row of the pose.*not 0 0 0 1")
def poses__transposed(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, np.transpose))


@transforms(line="it mirrors")
def poses__mirrored(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, lambda pose: np.diag([1.0, -1, 1, 1]) @ pose))


def _moved(pose: Float64[np.ndarray, "4 4"]) -> Float64[np.ndarray, "4 4"]:
    pose[:3, 3] += UTM
    return pose


@transforms(like="ordinary")
def UTM__poses_and_points(folder: Path) -> None:
    meta = draft(folder)
    each_pose(meta, _moved)
    write_ply(folder / "sparse_pc.ply", town().xyz + UTM, town().rgb, "double")
    write_meta(folder, meta)


@transforms(line="georeferenced \\(UTM\\) and the other local: .* the photos around [45].*: subtract .* the offset")
def UTM__poses_without_points(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, _moved))


@transforms(line="photo .*005.png is .* units from the others.*correct its pose or remove the photo")
def UTM__one_photo_at_zero(folder: Path) -> None:
    meta = draft(folder)
    each_pose(meta, _moved)
    for row in range(3):
        meta["frames"][5]["transform_matrix"][row][3] = 0.0
    write_ply(folder / "sparse_pc.ply", town().xyz + UTM, town().rgb, "double")
    write_meta(folder, meta)


# What nerfstudio would leave out, or count twice


@transforms(line="OPENCV with k5 = 0.2, which nerfstudio's cameras do not have")
def lens__of_eight_coefficients(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(k5=0.2, k6=0.1))


@transforms(line="fl_x holds for photos of different sizes, .*000.png of 96 x 72 and .*001.png of 48 x 36")
def lens__one_for_two_sizes(folder: Path) -> None:
    meta = draft(folder)
    for name in ("w", "h"):
        meta.pop(name)
    for frame in meta["frames"][1::2]:
        path = folder / frame["file_path"]
        with Image.open(path) as photo:
            photo.resize((photo.width // 2, photo.height // 2)).save(path)
    write_meta(folder, meta)


@transforms(line="photo .*images/005.png twice, with different poses")
def names__twice_in_two_spellings(folder: Path) -> None:
    def change(meta: Meta) -> None:
        meta["frames"].append({**meta["frames"][6], "file_path": "images//005.png"})

    changed(folder, change)


@transforms(like="ordinary")
def names__both_slashes(folder: Path) -> None:
    def change(meta: Meta) -> None:
        for frame in meta["frames"]:
            frame["file_path"] = "./" + frame["file_path"].replace("/", "\\")

    changed(folder, change)


@transforms(like="ordinary")
def names__decomposed_letters(folder: Path) -> None:
    """Archives from macOS: the folder has the letters taken apart, the file has them whole."""
    meta = draft(folder)
    (folder / "images").rename(folder / "photos")
    for frame in meta["frames"]:
        name = frame["file_path"].replace("images/", "photos/")
        new = name.replace("photos/", "photos/\u00f6")
        (folder / name).rename(folder / unicodedata.normalize("NFD", new))
        frame["file_path"] = new
    write_meta(folder, meta)


@transforms(like="ordinary")
def cloud__textured_mesh(folder: Path) -> None:
    changed(folder, lambda meta: None)
    path = folder / "sparse_pc.ply"
    head, _, rows = path.read_text().partition("end_header\n")
    head = head.replace("element vertex", "comment TextureFile pipe\nelement vertex")
    head = head.replace("property float z\n", "property float z\nproperty float s\nproperty float t\n")
    head += "element face 2\nproperty list uchar int vertex_indices\nproperty list uchar float texcoord\nend_header\n"
    lines = [line.split() for line in rows.splitlines()]
    text = "\n".join(" ".join([*line[:3], "0.25", "0.75", *line[3:]]) for line in lines)
    path.write_text(head + text + "\n3 0 1 2 6 0 0 0 1 1 1\n3 1 2 3 6 0 0 0 1 1 0\n")
    os.mkfifo(folder / "pipe")


@transforms(like="ordinary")
def applied_scale(folder: Path) -> None:
    changed(folder, lambda meta: meta.update(applied_scale=2.0))


# Few photos


def _some(folder: Path, count: int) -> None:
    """Photos that show the same."""

    def change(meta: Meta) -> None:
        scene = town()
        at = np.argsort(np.linalg.norm(scene.poses[:, :3, 3] - scene.poses[20, :3, 3], axis=1))[:count]
        meta["frames"] = [meta["frames"][row] for row in sorted(at)]

    changed(folder, change)


@transforms()
def few_photos__9(folder: Path) -> None:
    _some(folder, 9)


@transforms()
def few_photos__3(folder: Path) -> None:
    _some(folder, 3)


@transforms(options={"eval_mode": "all"})
def few_photos__2(folder: Path) -> None:
    _some(folder, 2)


@transforms(line="the train split has 1 photo.*add photos, or change --eval-mode")
def few_photos__2_of_which_one_is_held_out(folder: Path) -> None:
    _some(folder, 2)


@transforms(line="lists 1 photo and training needs at least 2")
def few_photos__1(folder: Path) -> None:
    _some(folder, 1)


def _standing(pose: Float64[np.ndarray, "4 4"]) -> Float64[np.ndarray, "4 4"]:
    pose[:3, 3] = (3.0, 4.0, 12.0)
    return pose


@transforms(line="all photos are taken from one place")
def one_place(folder: Path) -> None:
    changed(folder, lambda meta: each_pose(meta, _standing))


# COLMAP


@dataclass
class Photo:
    """A registered photo of a model."""

    name: str
    camera: int
    pose: Float64[np.ndarray, "4 4"]
    """world to camera, OpenCV's axes"""
    matches: Float64[np.ndarray, "m 2"]
    points: Int64[np.ndarray, "m"]
    """id of the point of each match"""


@dataclass
class Model:
    """A COLMAP model: cameras (name, width, height, parameters), photos and points by id."""

    cameras: dict[int, tuple[str | int, int, int, list[float]]]
    photos: dict[int, Photo]
    points: dict[int, tuple[Float64[np.ndarray, "3"], UInt8[np.ndarray, "3"]]]

    def tracks(self) -> dict[int, list[tuple[int, int]]]:
        """Photo and match of every point, by its id."""
        found: dict[int, list[tuple[int, int]]] = {point: [] for point in self.points}
        for number, photo in self.photos.items():
            for match, point in enumerate(photo.points.tolist()):
                if point in found:
                    found[point].append((number, match))
        return found


def colmap_camera(lens: AnyLens) -> tuple[str, int, int, list[float]]:
    """A lens as COLMAP has it."""
    centre = [lens.width / 2, lens.height / 2]
    if isinstance(lens, Fisheye):
        return "OPENCV_FISHEYE", lens.width, lens.height, [lens.focal, lens.focal, *centre, lens.k1, 0.0, 0.0, 0.0]
    return "PINHOLE", lens.width, lens.height, [lens.focal, lens.focal, *centre]


def _image_plane(local: Float64[np.ndarray, "n 3"], lens: AnyLens) -> Float64[np.ndarray, "n 2"]:
    """Where a lens of focal length 1 shows points, given with OpenCV's axes."""
    if not isinstance(lens, Fisheye):
        return local[:, :2] / local[:, 2:]
    sideways = np.linalg.norm(local[:, :2], axis=1, keepdims=True)
    theta = np.arctan2(sideways, local[:, 2:])
    return local[:, :2] / np.maximum(sideways, 1e-12) * (theta + lens.k1 * theta**3)


def colmap_model(scene: Town) -> Model:
    """What COLMAP's mapper would make of the photos, with exact matches."""
    lenses = list(dict.fromkeys(scene.lenses))
    photos = {}
    for index, (pose, lens) in enumerate(zip(scene.poses, scene.lenses)):
        world_to_camera = np.linalg.inv(pose @ np.diag([1.0, -1, -1, 1]))
        seen = scene.seen_point[scene.seen_photo == index]
        local = scene.xyz[seen] @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
        pixels = lens.focal * _image_plane(local, lens) + [lens.width / 2, lens.height / 2]
        photos[index + 1] = Photo(f"{index:03d}.png", lenses.index(lens) + 1, world_to_camera, pixels, seen + 1)
    points = {number + 1: (place, colour) for number, (place, colour) in enumerate(zip(scene.xyz, scene.rgb))}
    return Model({number + 1: colmap_camera(lens) for number, lens in enumerate(lenses)}, photos, points)


def quaternion(rotation: Float64[np.ndarray, "3 3"]) -> Float64[np.ndarray, "4"]:
    """w, x, y, z, by Shepperd's method."""
    trace = np.array([rotation.trace(), *rotation.diagonal()])
    largest = int(trace.argmax())
    if largest == 0:
        parts = np.array([1 + trace[0], *(rotation[(2, 0, 1), (1, 2, 0)] - rotation[(1, 2, 0), (2, 0, 1)])])
    else:
        i = largest - 1
        j, k = (i + 1) % 3, (i + 2) % 3
        parts = np.empty(4)
        parts[0] = rotation[k, j] - rotation[j, k]
        parts[1 + i] = 1 + 2 * trace[largest] - trace[0]
        parts[1 + j] = rotation[i, j] + rotation[j, i]
        parts[1 + k] = rotation[i, k] + rotation[k, i]
    return parts / np.linalg.norm(parts)


def write_binary(folder: Path, model: Model) -> None:
    """cameras.bin, images.bin and points3D.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, (name, _) in COLMAP_MODELS.items()}
    data = struct.pack("<Q", len(model.cameras))
    for number, (name, width, height, parameters) in model.cameras.items():
        data += struct.pack("<iiQQ", number, numbers.get(name, name), width, height)
        data += struct.pack(f"<{len(parameters)}d", *parameters)
    (folder / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(model.photos))
    for number, photo in model.photos.items():
        data += struct.pack("<i7di", number, *quaternion(photo.pose[:3, :3]), *photo.pose[:3, 3], photo.camera)
        table = np.empty(len(photo.points), [("xy", "<f8", 2), ("point", "<i8")])
        table["xy"], table["point"] = photo.matches, photo.points
        data += photo.name.encode() + b"\0" + struct.pack("<Q", len(table)) + table.tobytes()
    (folder / "images.bin").write_bytes(data)
    tracks = model.tracks()
    data = struct.pack("<Q", len(model.points))
    for number, (place, colour) in model.points.items():
        data += struct.pack("<Q3d3Bd", number, *place, *map(int, colour), 0.5)
        data += struct.pack("<Q", len(tracks[number])) + np.array(tracks[number], "<i4").tobytes()
    (folder / "points3D.bin").write_bytes(data)


def write_text(folder: Path, model: Model) -> None:
    """cameras.txt, images.txt and points3D.txt."""
    folder.mkdir(parents=True, exist_ok=True)

    def row(values: Iterable[Any]) -> str:
        return " ".join(repr(float(value)) for value in values)

    lines = [f"# Number of cameras: {len(model.cameras)}"]
    lines += [f"{number} {name} {w} {h} {row(values)}" for number, (name, w, h, values) in model.cameras.items()]
    (folder / "cameras.txt").write_text("\n".join(lines) + "\n")
    lines = [f"# Number of images: {len(model.photos)}, mean observations per image: 1"]
    for number, photo in model.photos.items():
        pose = row([*quaternion(photo.pose[:3, :3]), *photo.pose[:3, 3]])
        lines.append(f"{number} {pose} {photo.camera} {photo.name}")
        lines.append(" ".join(f"{row(at)} {point}" for at, point in zip(photo.matches, photo.points)))
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tracks = model.tracks()
    lines = [f"# Number of points: {len(model.points)}, mean track length: 1"]
    for number, (place, colour) in model.points.items():
        track = " ".join(f"{photo} {match}" for photo, match in tracks[number])
        lines.append(f"{number} {row(place)} {' '.join(map(str, colour))} 0.5 {track}".rstrip())
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")


MODEL = Path("sparse/0")


def colmap_draft(folder: Path, scene: Town | None = None) -> Model:
    """Writes the photos; returns their model."""
    scene = scene or town()
    write_photos(folder, scene)
    return colmap_model(scene)


def renamed(folder: Path, model: Model, name: Callable[[int], str]) -> Model:
    """Gives the photos names by their row, in the model and on disk."""
    for row, photo in enumerate(model.photos.values()):
        new = folder / "images" / name(row)
        new.parent.mkdir(exist_ok=True)
        (folder / "images" / photo.name).rename(new)
        photo.name = name(row)
    return model


@colmap()
def COLMAP__ordinary(folder: Path) -> None:
    write_binary(folder / MODEL, colmap_draft(folder))


@colmap(like="COLMAP: ordinary")
def COLMAP__text(folder: Path) -> None:
    write_text(folder / MODEL, colmap_draft(folder))


@colmap(like="COLMAP: ordinary")
def COLMAP__names_with_spaces_in_text(folder: Path) -> None:
    write_text(folder / MODEL, renamed(folder, colmap_draft(folder), lambda row: f"DJI 2024 wp-2 ({row:03d}).png"))


@colmap(like="COLMAP: ordinary")
def COLMAP__names_with_spaces_in_binary(folder: Path) -> None:
    write_binary(folder / MODEL, renamed(folder, colmap_draft(folder), lambda row: f"DJI 2024 wp-2 ({row:03d}).png"))


@colmap(like="COLMAP: ordinary")
def COLMAP__names_in_other_letters(folder: Path) -> None:
    write_text(folder / MODEL, renamed(folder, colmap_draft(folder), lambda row: f"вид-{row:03d}-größe.png"))


@colmap(like="COLMAP: ordinary")
def COLMAP__other_capitals(folder: Path) -> None:
    model = colmap_draft(folder)
    for photo in model.photos.values():
        photo.name = photo.name.replace(".png", ".PNG")
    write_binary(folder / MODEL, model)


@colmap(like="COLMAP: ordinary")
def COLMAP__folders_with_equal_names(folder: Path) -> None:
    model = colmap_draft(folder)
    half = PHOTOS // 2
    write_binary(folder / MODEL, renamed(folder, model, lambda row: f"flight{row // half}/{row % half:03d}.png"))


def _with_lens(folder: Path, name: str | int, extra: list[float], scene: Town | None = None) -> None:
    model = colmap_draft(folder, scene)
    for number, (_, width, height, values) in model.cameras.items():
        model.cameras[number] = (name, width, height, [*values[:4], *extra])
    write_binary(folder / MODEL, model)


@colmap(like="COLMAP: ordinary")
def COLMAP__FULL_OPENCV_of_zeros(folder: Path) -> None:
    _with_lens(folder, "FULL_OPENCV", [0.0] * 8)


@colmap(line="DIVISION with k = 0.1.*undistort")
def COLMAP__lens_of_a_newer_version(folder: Path) -> None:
    _with_lens(folder, "DIVISION", [0.1])


@colmap(line="lens model number 99, which is not known here: undistort")
def COLMAP__lens_of_a_future_version(folder: Path) -> None:
    _with_lens(folder, 99, [0.1])


@colmap()
def COLMAP__fisheye(folder: Path) -> None:
    write_binary(folder / MODEL, colmap_draft(folder, town(FISHEYES)))


@colmap(like="COLMAP: fisheye")
def COLMAP__fisheye_as_RAD_TAN_THIN_PRISM_FISHEYE(folder: Path) -> None:
    model = colmap_draft(folder, town(FISHEYES))
    for number, (_, width, height, values) in model.cameras.items():
        model.cameras[number] = ("RAD_TAN_THIN_PRISM_FISHEYE", width, height, [*values, *[0.0] * 8])
    write_binary(folder / MODEL, model)


@colmap()
def COLMAP__pinholes_and_fisheyes(folder: Path) -> None:
    write_binary(folder / MODEL, colmap_draft(folder, town((PINHOLE, FISHEYES[0]))))


def _only(model: Model, numbers: set[int]) -> Model:
    """The part of a model that some photos see."""
    photos = {number: photo for number, photo in model.photos.items() if number in numbers}
    seen = set(np.concatenate([photo.points for photo in photos.values()]).tolist())
    return replace(model, photos=photos, points={number: p for number, p in model.points.items() if number in seen})


_SMALL, _LARGE = set(range(1, 7)), set(range(7, PHOTOS + 1))


@colmap()
def COLMAP__larger_of_two_models(folder: Path) -> None:
    write_binary(folder / MODEL, _only(colmap_draft(folder), _LARGE))


@colmap(like="COLMAP: larger of two models")
def COLMAP__two_models(folder: Path) -> None:
    model = colmap_draft(folder)
    write_binary(folder / "sparse/0", _only(model, _SMALL))
    write_binary(folder / "sparse/1", _only(model, _LARGE))


@colmap(like="COLMAP: ordinary")
def COLMAP__stale_text_beside_binary(folder: Path) -> None:
    model = colmap_draft(folder)
    stale = copy.deepcopy(model)
    turn = np.eye(4)
    turn[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    turn[:3, 3] = (10, 20, 30)
    for photo in stale.photos.values():
        photo.pose = photo.pose @ turn
    write_text(folder / MODEL, stale)
    for path in (folder / MODEL).iterdir():
        os.utime(path, (1e9, 1e9))
    write_binary(folder / MODEL, model)


@colmap(trains_like="COLMAP: ordinary")
def COLMAP__dense_cloud_without_tracks(folder: Path) -> None:
    model = colmap_draft(folder)
    for photo in model.photos.values():
        photo.matches, photo.points = photo.matches[:0], photo.points[:0]
    write_binary(folder / MODEL, model)


@colmap(trains_like="COLMAP: ordinary")
def COLMAP__NaN_and_far_points(folder: Path) -> None:
    model = colmap_draft(folder)
    for row, (number, (place, colour)) in enumerate(model.points.items()):
        if row % 50 == 0:
            model.points[number] = (np.full(3, np.nan), colour)
        if row % 51 == 0:
            model.points[number] = (place * 1e9, colour)
    write_binary(folder / MODEL, model)


def _masks(folder: Path, name: Callable[[str], str]) -> None:
    model = colmap_draft(folder)
    (folder / "masks").mkdir()
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[50:] = 0
    for photo in model.photos.values():
        Image.fromarray(mask).save(folder / "masks" / name(photo.name))
    write_binary(folder / MODEL, model)


_MASKS = {"masks_path": Path("masks")}


@colmap(options=_MASKS)
def COLMAP__masks(folder: Path) -> None:
    _masks(folder, lambda name: name)


@colmap(options=_MASKS, like="COLMAP: masks")
def COLMAP__masks_as_COLMAP_names_them(folder: Path) -> None:
    _masks(folder, lambda name: f"{name}.png")


def _moved_model(model: Model) -> Model:
    shift = np.eye(4)
    shift[:3, 3] = -UTM
    for photo in model.photos.values():
        photo.pose = photo.pose @ shift
    model.points = {number: (place + UTM, colour) for number, (place, colour) in model.points.items()}
    return model


@colmap(like="COLMAP: ordinary")
def COLMAP__UTM(folder: Path) -> None:
    write_binary(folder / MODEL, _moved_model(colmap_draft(folder)))


@colmap(like="COLMAP: ordinary")
def COLMAP__UTM_in_text(folder: Path) -> None:
    write_text(folder / MODEL, _moved_model(colmap_draft(folder)))


@colmap()
def COLMAP__lists(folder: Path) -> None:
    model = colmap_draft(folder)
    names = [photo.name for photo in model.photos.values()]
    (folder / "train_list.txt").write_text("\n".join(name for row, name in enumerate(names) if row % 5) + "\n")
    for split in ("val", "test"):
        (folder / f"{split}_list.txt").write_text("\n".join(names[::5]) + "\n")
    write_binary(folder / MODEL, model)


@colmap(like="COLMAP: lists")
def COLMAP__train_list_alone(folder: Path) -> None:
    COLMAP__lists(folder)
    for split in ("val", "test"):
        (folder / f"{split}_list.txt").unlink()


@colmap(line="points3D.bin is cut")
def COLMAP__cut_points(folder: Path) -> None:
    write_binary(folder / MODEL, colmap_draft(folder))
    path = folder / MODEL / "points3D.bin"
    path.write_bytes(path.read_bytes()[:-100])


@colmap(line="has no COLMAP model")
def COLMAP__no_model(folder: Path) -> None:
    colmap_draft(folder)


@colmap(like="COLMAP: ordinary")
def COLMAP__matches_of_larger_photos(folder: Path) -> None:
    """Photos and cameras were scaled by hand, the matches were not."""
    model = colmap_draft(folder)
    for photo in model.photos.values():
        photo.matches = photo.matches * 2
    write_binary(folder / MODEL, model)


def tiny_town() -> Town:
    """The capture of tiny_capture.py, six photos without a picture."""
    from tiny_capture import FOCAL, points, ring
    from tiny_capture import HEIGHT as HIGH
    from tiny_capture import WIDTH as WIDE

    world, poses = points(), np.stack(ring(6))
    lens = Lens(WIDE, HIGH, FOCAL)
    point, photo = np.divmod(np.arange(len(world) * 6), 6)
    black = np.zeros((len(world), 3), np.uint8)
    return Town([np.zeros((HIGH, WIDE, 3), np.uint8)] * 6, [lens] * 6, poses, world, black, point, photo)
