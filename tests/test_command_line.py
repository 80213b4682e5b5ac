"""What ns-render, ns-export and ns-viewer are asked to do is checked when they ask for the run's checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from test_camera_paths import PATH
from tiny_trainer import tiny_config

from infnerf_ns.arguments import flag_values
from infnerf_ns.command_line import output_names
from infnerf_ns.errors import InputError
from infnerf_ns.presets import load_preset
from infnerf_ns.training import logging_services
from infnerf_ns.training.logging_services import require_services


def ask(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Has a command ask for the checkpoint of a run, as nerfstudio's do before they load anything."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/" + command.split()[0], *command.split()[1:]])
    load_preset("infnerf-small").get_checkpoint_dir()


@pytest.mark.parametrize(
    "arguments, values",
    [
        ("", None),
        ("--a-flag x y --b z", ["x", "y"]),
        ("--a_flag x", ["x"]),
        ("--a-flag=x y", ["x"]),
        ("--a-flag x --a-flag y", ["y"]),
        ("--a-flag -1", ["-1"]),
        ("--a-flag-too x", None),
        ("--a-flag", []),
    ],
)
def test_flags_are_read_as_tyro_reads_them(arguments: str, values: list[str] | None) -> None:
    assert flag_values("a-flag", arguments.split()) == values


@pytest.mark.parametrize(
    "command, said",
    [
        ("ns-render dataset --rendered-output-names rgb colour", "--rendered-output-names colour: .* it has rgb, acc"),
        ("ns-render interpolate --rendered-output-names gt-rgb", "--rendered-output-names gt-rgb: the model has no"),
        ("ns-render dataset --rendered-output-names rgba", "rgba: only PNG .* add --image-format png"),
        ("ns-render dataset --rendered-output-names rgba --image-format jpeg", "rgba: only PNG"),
        ("ns-render spiral --rendered-output-names rgba", "add --output-format images --image-format png"),
        ("ns-render spiral --rendered-output-names rgb rgba", "rgba: it has no place beside others"),
        ("ns-render dataset --downscale-factor 0", "--downscale-factor 0: allowed is a finite number above 0"),
        ("ns-render interpolate --frame-rate -1", "--frame-rate -1: allowed is"),
        ("ns-render spiral --seconds nan", "--seconds nan: allowed is"),
        ("ns-render interpolate --interpolation-steps=0", "--interpolation-steps 0: allowed is"),
        ("ns-render camera-path --camera-path-filename /no/such.json", "/no/such.json: there is no such file"),
        ("ns-render camera-path", "--camera-path-filename camera_path.json: there is no such file"),
        ("ns-export pointcloud --rgb-output-name colour", "--rgb-output-name colour: .* it has rgb, acc"),
        ("ns-export tsdf --depth-output-name tiefe", "--depth-output-name tiefe: the model has no"),
        ("ns-export poisson --normal-output-name normal", "--normal-output-name normal: .*normals"),
        (
            "ns-eval --output-path metrics",
            "--output-path metrics: the metrics are a JSON file, write metrics/eval.json",
        ),
        ("ns-eval --output-path folder.json", "--output-path folder.json: is a folder, write folder.json/eval.json"),
        ("ns-eval --output-path file/eval.json", "--output-path file/eval.json: .*/file is a file"),
        ("ns-eval --render-output-path file/renders", "--render-output-path file/renders: .*/file is a file"),
        ("ns-render dataset --output-path file/out", "--output-path file/out: .*/file is a file"),
        ("ns-viewer --viewer.websocket-port 70000", "--viewer.websocket-port 70000: allowed is"),
        ("ns-viewer --viewer.websocket-port-default -1", "--viewer.websocket-port-default -1: allowed is"),
        ("ns-viewer --vis viewer_legacy", "--vis viewer_legacy: .* use --vis viewer"),
    ],
)
def test_what_cannot_work_is_said_before_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=said):
        ask(monkeypatch, command)


@pytest.mark.parametrize(
    "command",
    [
        "ns-render dataset --rendered-output-names rgb raw-depth gt-rgb raw-gt-rgb node normals",
        "ns-render dataset --rendered-output-names rgba rgb --image-format png --downscale-factor 2",
        "ns-render interpolate --rendered-output-names rgba --output-format images --image-format png",
        "ns-render camera-path --camera-path-filename path.json",
        "ns-export pointcloud --rgb-output-name rgb --normal-method open3d",
        "ns-viewer --viewer.websocket-port 7010 --viewer.websocket-host 0.0.0.0",
        "ns-eval --output-path new/colour.json --render-output-path new/renders",
        "infnerf-bench --rendered-output-names colour",
    ],
)
def test_what_works_is_let_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path.json").write_text(json.dumps(PATH))
    ask(monkeypatch, command)


def test_a_place_that_may_not_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    with pytest.raises(InputError, match=f"--output-dir {tmp_path}/out/more: {tmp_path} may not be written to"):
        ask(monkeypatch, f"ns-export pointcloud --output-dir {tmp_path}/out/more")


def test_a_camera_path_needs_a_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "path.json").write_text(json.dumps({key: value for key, value in PATH.items() if key != "seconds"}))
    with pytest.raises(InputError, match="lacks the entry seconds"):
        ask(monkeypatch, f"ns-render camera-path --camera-path-filename {tmp_path / 'path.json'}")


def test_the_names_are_those_of_the_outputs() -> None:
    from tiny_model import CONE_ALONE, tiny_camera, tiny_model
    from tiny_model import tiny_config as model_config

    config = load_preset("infnerf-small")
    for normals in (True, False):
        model = tiny_model(model_config(sampler=CONE_ALONE)).eval()
        model.config.render_normals = config.pipeline.model.render_normals = normals
        from nerfstudio.cameras.cameras import CameraType

        outputs = model.get_outputs_for_camera(tiny_camera(CameraType.PERSPECTIVE, 60.0, 3, 2))
        assert set(output_names(config)) == set(outputs)


# -- services ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user who is logged in nowhere, without a terminal."""
    for name in ("COMET_API_KEY", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "stdin", "w+"))


@pytest.mark.parametrize(
    "vis, said", [("comet", "comet has no key"), ("viewer+wandb", "you are not logged in to wandb")]
)
def test_services_without_a_login(nobody: None, tmp_path: Path, vis: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"--vis {vis.replace('+', '.')}: {said}; .*--vis tensorboard"):
        tiny_config(tmp_path, vis=vis).setup(local_rank=0, world_size=1)


def test_services_with_a_login(nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_API_KEY", "a" * 25)
    require_services(tiny_config(tmp_path, vis="comet"))
    require_services(tiny_config(tmp_path, vis="tensorboard"))


def test_services_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logging_services.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--vis comet: the package comet_ml is not installed"):
        require_services(tiny_config(tmp_path, vis="comet"))
    with pytest.raises(InputError, match="--vis wandb: the package wandb is not installed"):
        require_services(tiny_config(tmp_path, vis="wandb"))
