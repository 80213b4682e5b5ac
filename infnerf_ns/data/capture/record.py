"""What a run keeps of its capture, so that rendering needs neither the photos nor the folder that they were in.

A training writes it once, beside config.yml: one safetensors file with the cameras of every split in full precision
and, as JSON in its header, the names of the photos and masks, what the dataparser was asked for, and a summary of the
SfM points. A run that is loaded takes its cameras and the number of its photos (one appearance code each) from there,
whatever has happened to the capture since. Photos are looked for when somebody asks for their pixels.

The file of a stranger's run is as harmless as numbers and names are: nothing in it is executed, and what does not fit
together is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from infnerf_ns.data.capture.reading import METADATA_KEY, CapturePhotos
from infnerf_ns.data.capture.recorded_photos import RecordedOutputs
from infnerf_ns.data.sfm import SfMScene
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import require_regular_file, write_whole_file
from infnerf_ns.validation import shortened, warn

RECORD = "capture.safetensors"
"""Name of the file in a run's folder."""
_VERSION = 1
_HEADER = "infnerf_capture"
_CAMERA_FIELDS = [
    *("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height"),
    *("distortion_params", "camera_type", "times"),
]
_MAX_SIDE = 1 << 17


@dataclass
class CaptureRecord:
    """The capture of a run."""

    data: Path
    """folder (or transforms.json) of the capture when it was trained on; absolute"""
    dataparser: dict[str, Any]
    """``class`` and ``options`` of the dataparser's configuration; what was held out follows from them"""
    downscale_factor: float | None
    """of the photos' copies that were trained on, as nerfstudio's dataparser has it"""
    held_out: str
    """the split that was held out in training, ``val`` or ``test``"""
    scene: dict[str, Any]
    """SfM summary: ``points`` kept, ``source``, ``near`` plane in scene units"""
    reading: dict[str, Any]
    """how the photos were read, :meth:`~infnerf_ns.data.capture.reading.CapturePhotos.decisions`"""
    splits: dict[str, DataparserOutputs]
    """``train``, ``val`` and ``test``, with names as recorded: relative to the capture where they are in it"""
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """bytes of the photos' files of each split, 0 where there was none"""

    # -- writing

    @staticmethod
    def of_capture(
        config: DataParserConfig,
        splits: dict[str, DataparserOutputs],
        held_out: str,
        scene: SfMScene,
        reading: dict[str, Any],
        downscale_factor: float | None,
    ) -> CaptureRecord:
        """The record of a training.

        Args:
            config: of the dataparser, with the capture's folder.
            splits: what it has said of ``train``, ``val`` and ``test``.
            held_out: which of them is held out.
            scene: of the train split.
            reading: the decisions on how the photos are read.
            downscale_factor: of the dataparser.
        """
        data = Path(config.data).absolute()
        return CaptureRecord(
            data=data,
            dataparser=_fingerprint(config),
            downscale_factor=downscale_factor,
            held_out=held_out,
            scene={"points": len(scene.points), "source": scene.source, "near": float(scene.near)},
            reading=reading,
            splits={
                name: dataclasses.replace(
                    outputs,
                    image_filenames=[_recorded_name(path, data) for path in outputs.image_filenames],
                    mask_filenames=_all_recorded(outputs.mask_filenames, data),
                )
                for name, outputs in splits.items()
            },
            sizes={name: [_size(path) for path in outputs.image_filenames] for name, outputs in splits.items()},
        )

    def write(self, file: Path) -> None:
        """Writes it so that there is never half a file.

        Raises:
            InputError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        stored: list[dict[str, Any]] = []
        names: dict[str, int] = {}
        for name, outputs in self.splits.items():
            same = next((names[other] for other in names if _same_split(self.splits[other], outputs)), None)
            if same is None:
                same = len(stored)
                stored.append(_pack(outputs, self.sizes.get(name, []), f"{same}.", tensors))
            names[name] = same
        header = {
            "version": _VERSION,
            "data": str(self.data),
            "dataparser": self.dataparser,
            "downscale_factor": self.downscale_factor,
            "held_out": self.held_out,
            "scene": self.scene,
            "reading": self.reading,
            "splits": names,
            "stored": stored,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole_file(file, save(tensors, {_HEADER: json.dumps(header)}))
        except OSError as error:
            raise InputError(
                f"{file} cannot be written ({error.strerror}): free disk space, or choose another --output-dir"
            ) from error

    # -- reading

    @staticmethod
    def read(file: Path) -> CaptureRecord:
        """Reads a record.

        Raises:
            InputError: it is damaged, or of a later version.
        """
        require_regular_file(file, "the run's record of its capture,")
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})[_HEADER])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            if header["version"] > _VERSION:
                raise InputError(f"{file} was written by a later version of infnerf: update infnerf_ns")
            stored = [_unpack(content, f"{number}.", tensors) for number, content in enumerate(header["stored"])]
            splits = {name: stored[int(header["splits"][name])][0] for name in ("train", "val", "test")}
            scale = header["downscale_factor"]
            return CaptureRecord(
                data=Path(header["data"]),
                dataparser={
                    "class": str(header["dataparser"]["class"]),
                    "options": dict(header["dataparser"]["options"]),
                },
                downscale_factor=None if scale is None else _positive(scale),
                held_out=str(header["held_out"]),
                scene=dict(header["scene"]),
                reading=dict(header["reading"]),
                splits=splits,
                sizes={name: stored[int(header["splits"][name])][1] for name in splits},
            )
        except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file} is damaged ({type(error).__name__}: {shortened(str(error))}): copy it from where the run was"
                " trained, or delete it to have the capture read instead"
            ) from error

    def stands_for(self, config: DataParserConfig) -> bool:
        """Whether a dataparser's configuration asks for what was recorded; where the capture is does not matter."""
        now, then = _fingerprint(config), self.dataparser
        return now["class"] == then["class"] and all(
            now["options"][name] == value for name, value in then["options"].items() if name in now["options"]
        )

    def outputs(
        self, split: str, data: Path | None, parse_again: Callable[[], DataparserOutputs] | None = None
    ) -> RecordedOutputs:
        """A split; its photos are where they are found: in the capture as the configuration names it now, or where
        they were.

        Args:
            split: ``train``, ``val`` or ``test``.
            data: the capture as the configuration names it now.
            parse_again: reads the split from the capture as it is now.
        """
        recorded = self.splits[split]
        roots = list(dict.fromkeys([_root(Path(place).absolute()) for place in (data or self.data, self.data)]))
        outside = sorted({name.parent for name in recorded.image_filenames if name.is_absolute()})
        all_outside = all(name.is_absolute() for name in recorded.image_filenames)
        values = {each.name: getattr(recorded, each.name) for each in dataclasses.fields(DataparserOutputs)}
        values["image_filenames"] = [_found(name, roots) for name in recorded.image_filenames]
        if recorded.mask_filenames is not None:
            values["mask_filenames"] = [_found(name, roots) for name in recorded.mask_filenames]
        outputs = RecordedOutputs(
            **values,
            split="train" if split == "train" else "held-out",
            places=tuple(outside if outside and all_outside else roots + outside),
            sizes=self.sizes.get(split, []),
            parse_again=parse_again,
        )
        photos = CapturePhotos(outputs)
        try:
            photos.decide_as(self.reading)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{RECORD} of the run is damaged ({error}): copy it from where the run was trained"
            ) from error
        outputs.metadata = {**outputs.metadata, METADATA_KEY: photos}
        return outputs


def same_photos(record: CaptureRecord, outputs: DataparserOutputs, run: Path) -> None:
    """Compares the photos of a training that goes on with those that it began with: each has an appearance code.

    Args:
        record: of the run that is loaded.
        outputs: of the train split now.
        run: folder of the run that is loaded.

    Raises:
        InputError: photos have come or gone.
    """
    then = [PurePath(name).name for name in record.splits["train"].image_filenames]
    now = [PurePath(name).name for name in outputs.image_filenames]
    if then == now:
        return
    gone, added = (list(dict.fromkeys(x for x in a if x not in b)) for a, b in ((then, now), (now, then)))
    what = [f"{len(names)} {verb} ({names[0]} ...)" for names, verb in ((added, "added"), (gone, "gone")) if names]
    changes = f"{' and '.join(what)}" if what else "in another order"
    line = f"--load-dir {run}: it was trained on {len(then)} photos, and now there are {len(now)}: {changes}"
    if len(then) != len(now):
        raise InputError(f"{line}; train on with the same photos and the same held-out ones, or train anew")
    warn(f"{line}; what it has learnt of each photo's exposure is given to the photo in the same place")


def _recorded_name(path: Path, data: Path) -> Path:
    """Relative to the capture where it is in it, else absolute."""
    path = Path(path).absolute()
    root = _root(data)
    return path.relative_to(root) if path.is_relative_to(root) else path


def _all_recorded(paths: list[Path] | None, data: Path) -> list[Path] | None:
    return None if paths is None else [_recorded_name(path, data) for path in paths]


def _root(data: Path) -> Path:
    """The folder of a capture that may be named by its transforms.json."""
    return data.parent if data.suffix == ".json" else data


def _found(name: Path, places: list[Path]) -> Path:
    """Where a photo is, or would be."""
    candidates = [place / name for place in places]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _size(path: Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _fingerprint(config: DataParserConfig) -> dict[str, Any]:
    """What a dataparser was asked for, without where the capture is and without what only training needs."""
    options = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if isinstance(value, Path):
            value = None if value.is_absolute() else str(value)
        plain = value is None or isinstance(value, (bool, int, float, str, list, tuple))
        if plain and not each.name.startswith(("_", "load_3D", "max_2D")) and each.name not in ("data", "cache_dir"):
            options[each.name] = value
    return {"class": type(config).__name__, "options": json.loads(json.dumps(options))}  # tuples become lists, as read


def _same_split(one: DataparserOutputs, other: DataparserOutputs) -> bool:
    if one is other:
        return True
    poses = [outputs.cameras.camera_to_worlds for outputs in (one, other)]
    return (
        one.image_filenames == other.image_filenames
        and one.mask_filenames == other.mask_filenames
        and poses[0].shape == poses[1].shape
        and torch.equal(*poses)
    )


def _pack(outputs: DataparserOutputs, sizes: list[int], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Puts a split's tensors into ``tensors`` and returns the rest."""
    cameras = outputs.cameras
    for name in _CAMERA_FIELDS:
        value = getattr(cameras, name)
        if value is not None:
            tensors[f"{prefix}{name}"] = value.detach().cpu().clone().contiguous()
    plain = {}
    for name, value in (cameras.metadata or {}).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}metadata.{name}"] = value.detach().cpu().clone().contiguous()
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[name] = value
    tensors[f"{prefix}scene_box"] = outputs.scene_box.aabb.detach().cpu().clone().contiguous()
    tensors[f"{prefix}transform"] = outputs.dataparser_transform.detach().cpu().clone().contiguous()
    if outputs.alpha_color is not None:
        tensors[f"{prefix}alpha_color"] = torch.as_tensor(outputs.alpha_color).detach().cpu().clone().contiguous()
    mask_color = outputs.metadata.get("mask_color")
    return {
        "photos": [path.as_posix() for path in outputs.image_filenames],
        "sizes": sizes,
        "masks": None if outputs.mask_filenames is None else [path.as_posix() for path in outputs.mask_filenames],
        "scale": float(outputs.dataparser_scale),
        "mask_color": None if mask_color is None else list(mask_color),
        "camera_metadata": None if cameras.metadata is None else plain,
    }


def _unpack(content: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> tuple[DataparserOutputs, list[int]]:
    """A split from what :func:`_pack` has made of it, and the sizes of its photos' files. Raises ValueError if the
    parts do not fit together."""
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    photos = [Path(name) for name in content["photos"]]
    masks = None if content["masks"] is None else [Path(name) for name in content["masks"]]
    count = len(photos)
    sizes = [int(size) for size in content["sizes"]]
    lens = own["distortion_params"].shape[-1:] if "distortion_params" in own else (6,)
    if tuple(lens) not in ((6,), (12,)):  # the latter of FISHEYE624
        raise ValueError("a lens has another number of distortion parameters")
    shapes = {"camera_to_worlds": (3, 4), "distortion_params": tuple(lens), "times": (1,)}
    for name in _CAMERA_FIELDS:
        optional = name in ("distortion_params", "times")
        if not (optional and name not in own) and own[name].shape != (count, *shapes.get(name, (1,))):
            raise ValueError(f"{name} is {tuple(own[name].shape)} for {count} photos")
    if (masks is not None and len(masks) != count) or len(sizes) not in (0, count):
        raise ValueError(f"there are {count} photos, but not as many masks or sizes")
    finite = all(bool(torch.isfinite(value).all()) for value in own.values() if value.is_floating_point())
    sizes_fit = all(bool(((own[name] > 0) & (own[name] <= _MAX_SIDE)).all()) for name in ("width", "height"))
    if (
        not finite
        or not sizes_fit
        or not set(own["camera_type"].flatten().tolist()) <= {kind.value for kind in CameraType}
    ):
        raise ValueError("a camera holds NaN, infinity, no pixel, or a kind that there is not")
    if own["scene_box"].shape != (2, 3) or own["transform"].shape[-2:] not in ((3, 4), (4, 4)):
        raise ValueError("the scene box or the transform has another shape")
    metadata = None
    if content["camera_metadata"] is not None:
        metadata = dict(content["camera_metadata"])
        metadata |= {
            name.removeprefix("metadata."): value for name, value in own.items() if name.startswith("metadata.")
        }
    cameras = Cameras(**{name: own.get(name) for name in _CAMERA_FIELDS}, metadata=metadata)
    mask_color = content["mask_color"]
    outputs = DataparserOutputs(
        image_filenames=photos,
        cameras=cameras,
        alpha_color=own.get("alpha_color"),
        scene_box=SceneBox(aabb=own["scene_box"]),
        mask_filenames=masks,
        metadata={} if mask_color is None else {"mask_color": tuple(float(value) for value in mask_color)},
        dataparser_transform=own["transform"],
        dataparser_scale=_positive(content["scale"]),
    )
    return outputs, sizes


def _positive(value: Any) -> float:
    """Raises ValueError if it is not a finite number above 0."""
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value} is no scale")
    return int(value) if isinstance(value, int) else number
