"""The own commands: their output, and their one-line errors. On a real run: test_end_to_end_commands.py."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.model_components.renderers import RGBRenderer
from PIL import Image
from tiny_capture import write_capture

from infnerf_ns.cli import bench_nodes, bench_quality, picture, scripts
from infnerf_ns.cli.bench_flyin import Flyin
from infnerf_ns.cli.bench_growth import Growth
from infnerf_ns.cli.bench_losses import Losses
from infnerf_ns.cli.bench_memory import Memory
from infnerf_ns.cli.bench_output import table_and_plot
from infnerf_ns.cli.bench_quality import Quality, held_out_psnr
from infnerf_ns.cli.bench_scaling import Scaling
from infnerf_ns.cli.bench_speed import Speed
from infnerf_ns.cli.bench_trainer import full_tree, random_rays
from infnerf_ns.errors import InputError


def test_bench_prints_a_row_per_tree(capsys: pytest.CaptureFixture[str]) -> None:
    bench_nodes.Nodes(levels=(0, 1), rays=16, steps=2, warm_up=1).main()
    lines = capsys.readouterr().out.strip().splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("nodes"))
    assert [line.split()[0] for line in lines[header + 1 :]] == ["1", "9"]
    assert lines[header + 1].split()[-2] == "1.00"
    assert 0 < float(lines[header + 1].split()[-1]) < 100, "the ratio with statistics"
    assert "16 rays per step" in " ".join(lines)


def test_rays_of_the_benches_ask_for_the_leaves() -> None:
    """Of nothing that has learnt, too: all of its intervals are long."""
    trainer, evaluated = full_tree(2), []
    model = trainer.model.eval()
    model.field.activate_level(2)
    model.on_evaluated = evaluated.append
    model(random_rays(0, 64)[0])
    assert (model.field.octree.level[evaluated[0].routed.node] == 2).float().mean() > 0.1


def test_speed_prints_a_row_per_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    Speed(rays=8, repeats=2).main()
    output = capsys.readouterr().out
    for kernel in ("grids of the field", "grids of the proposals", "density decoders", "colour decoders"):
        for what in ("forward  ", "forward and backward"):
            (line,) = (line for line in output.splitlines() if line.startswith(f"{kernel}, {what}"))
            assert "% of the" in line and float(line.split(what)[1].split()[0]) > 0
    for whole in ("training step", "training step, proposals too", "rendering", "rendering, with normals"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"{whole}  "))
        assert line.split()[-1] == "rays" and float(line.removeprefix(whole).split()[0]) > 0
    assert "GFLOP/s; copy:" in output and "$ " in output


@pytest.mark.parametrize(
    ("main", "said"),
    [
        (lambda: Path("/" + "x" * 5000).stat(), r"/x{199}\.\.\.: File name too long: choose another name"),
        (lambda: (Path(__file__) / "x").mkdir(), "test_cli.py/x: Not a directory: choose another name"),
    ],
)
def test_what_a_file_system_says_is_one_line(main: Callable, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("end_on_signals", "prepare_process"):
        monkeypatch.setattr(scripts, name, lambda: None)
    monkeypatch.setattr(sys, "argv", ["infnerf-pack", "run"])
    with pytest.raises(InputError, match=said):
        scripts.run(main)


def test_an_empty_argument_is_not_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: infnerf-pack "$UNSET" packed the run in the current folder."""
    for name in ("end_on_signals", "prepare_process"):
        monkeypatch.setattr(scripts, name, lambda: None)
    monkeypatch.setattr(sys, "argv", ["infnerf-pack", ""])
    with pytest.raises(InputError, match="an argument is empty"):
        scripts.run(pytest.fail)


def test_picture_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a run's config.yml"):
        picture.Picture(load_config=tmp_path / "config.yml", output=tmp_path / "out.png").main()


NAN = float("nan")


@pytest.mark.parametrize(
    "command, flag, values",
    [
        (picture.Picture, "width", (0, -1, 70_000)),
        (picture.Picture, "level", (-1, 31)),
        (picture.Picture, "photos", ((-1,),)),
        (Speed, "rays", (0, -5, 2**30)),
        (Speed, "repeats", (0,)),
        (bench_nodes.Nodes, "levels", ((-1,), (1, 9))),
        (bench_nodes.Nodes, "steps", (0,)),
        (bench_nodes.Nodes, "warm_up", (-1,)),
        (Growth, "scale", (0.0, -1.0, NAN, 2.0, float("inf"))),
        (Growth, "minutes", ((NAN,), (0.0,), (1.0, float("inf")))),
        (Growth, "pixels", (0,)),
        (Growth, "seed", (-1, 2**32)),
        (Losses, "minutes", (0.0, -1.0, NAN, float("inf"))),
        (Losses, "seeds", ((-1,),)),
        (Losses, "pixels", (0,)),
        (Quality, "scale", (0.0, NAN, 2.0)),
        (Quality, "pixels", (-1,)),
        (Memory, "width", (70_000,)),
        (Memory, "steps", (10**9,)),
        (Scaling, "rays", (2**30,)),
        (Flyin, "width", (70_000,)),
        (Flyin, "budget_mib", (2**31,)),
    ],
)
def test_numbers_out_of_range_are_one_line(tmp_path: Path, command: type, flag: str, values: tuple) -> None:
    """Regression: ``infnerf-picture --width 0`` was a traceback of OpenCV, after the run had been loaded."""
    names = {field.name for field in dataclasses.fields(command)}
    paths = {"load_config": tmp_path / "config.yml", "output": tmp_path / "out.png", "run": tmp_path, "data": tmp_path}
    given = {name: value for name, value in paths.items() if name in names}
    for value in values:
        with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} ") as refused:
            command(**{**given, flag: value}).main()
        assert any(words in str(refused.value) for words in ("allowed is", "is not a number", "give "))


def test_quality_trains_ours_and_nerfacto_and_writes_table_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which a step takes three seconds."""
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr(bench_quality, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    write_capture(tmp_path / "data")
    output = tmp_path / "results" / "tiny"
    ours = "infnerf-small" + ":pipeline.model.sampler.samples=16" * 10  # longer than the name of a file may be
    Quality(tmp_path / "data", (ours, "nerfacto"), (0.05, 0.1), pixels=50, output=output).main()
    with open(output.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["minutes"]) for row in rows] == [
        (method, minutes) for method in (ours, "nerfacto") for minutes in ("0.05", "0.1")
    ]
    assert [int(row["steps"]) for row in rows] == [2, 3, 2, 3], "the first step is not timed"
    for row in rows:
        assert {"psnr_1", "psnr_1/2"} < set(row) and all(0 < float(row[name]) < 60 for name in row if "psnr" in name)
    assert Image.open(output.with_suffix(".png")).size[0] > 300
    assert "$ " in capsys.readouterr().out, "the command is printed"


class _Constant(torch.nn.Module):
    """Renders one colour, and remembers where."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.renderer_rgb = RGBRenderer(background_color="black")
        self.rays = 0

    def forward(self, rays) -> dict[str, torch.Tensor]:
        self.rays += len(rays)
        return {"rgb": torch.full((len(rays), 3), 0.5)}


def test_a_dot_in_the_name_of_a_table_stays(tmp_path: Path) -> None:
    table, plot = table_and_plot(tmp_path / "results" / "version 0.1")
    assert (table.name, plot.name) == ("version 0.1.csv", "version 0.1.png") and table.parent.is_dir()


def test_quality_applies_settings_behind_a_method(tmp_path: Path) -> None:
    write_capture(tmp_path / "data")
    quality = Quality(tmp_path / "data")
    config = quality._config("infnerf:pipeline.model.field.children=independent:pipeline.model.sampler.samples=7")
    assert (config.pipeline.model.field.children, config.pipeline.model.sampler.samples) == ("independent", 7)
    assert quality._config("root").pipeline.model.octree.max_level == 0


def test_held_out_psnr_of_a_known_error() -> None:
    """The photo is 0.6 in its left and 0.4 in its right half: the error is 0.1 everywhere, 20 dB at every level."""
    image = torch.full((32, 64, 3), 0.6)
    image[:, 32:] = 0.4
    cameras = Cameras(torch.eye(4)[None, :3], 30.0, 30.0, 32.0, 16.0, 64, 32)

    class Photos(list):
        pass

    photos = Photos([{"image": image}])
    photos.cameras = cameras
    photos_with_hole = Photos([{"image": image.clone(), "mask": torch.ones(32, 64, 1, dtype=torch.bool)}])
    photos_with_hole[0]["image"][:8], photos_with_hole[0]["mask"][:8] = 1.0, False
    photos_with_hole.cameras = cameras
    model = _Constant()
    clock = iter(range(0, 1000, 2))  # two seconds between any two looks at it
    psnr, rate = held_out_psnr(model, photos, 100, seed=0, now=lambda: next(clock))
    assert psnr == {
        "1": pytest.approx(20, abs=1e-3),
        "1/2": pytest.approx(20, abs=1e-3),
        "1/4": pytest.approx(20, abs=1e-3),
    }
    assert model.rays == 100 + 100 + 100
    assert rate == 300 / 6, "two seconds for each of the three levels"
    held_out_psnr(model, photos, 10_000, seed=0)
    assert model.rays == 300 + 64 * 32 + 32 * 16 + 16 * 8
    model.rays = 0
    psnr, _ = held_out_psnr(model, photos_with_hole, 10_000, seed=0)
    assert psnr == {name: pytest.approx(20, abs=1e-3) for name in ("1", "1/2", "1/4")}, "masked pixels do not count"
    assert model.rays == 64 * 24 + 32 * 12 + 16 * 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"methods": ("nerf",)}, "--methods nerf: there are root, nerfacto, infnerf"),
        ({"methods": ("infnerf:max_level",)}, "--methods infnerf:max_level: write 'max_level' as KEY=VALUE"),
        (
            {"methods": ("infnerf:pipeline.model.octree.max_lvel=1",)},
            "unknown key 'pipeline.model.octree.max_lvel', did you mean 'max_level'",
        ),
        ({"methods": ("infnerf:pipeline.model.octree.max_level=99",)}, "max-level 99: allowed is"),
        ({"methods": ("infnerf:pipeline.model.sampler=[",)}, "'\\[' is not a YAML value"),
        ({"methods": ()}, "--methods: name at least one"),
        ({"minutes": ()}, "--minutes .* give rising numbers above 0"),
        ({"minutes": (2.0, 1.0)}, "--minutes .* give rising numbers above 0"),
        ({"minutes": (NAN,)}, "--minutes .* give rising numbers above 0"),
        ({"data": Path("nowhere")}, "--data nowhere: there is neither a transforms.json nor a transforms_train.json"),
    ],
)
def test_quality_of_wrong_options_is_one_line(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Quality(**{"data": tmp_path, "output": tmp_path / "out", **options}).main()
