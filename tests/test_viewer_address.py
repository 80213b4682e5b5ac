"""Where the viewer listens: checked before anything is loaded, on this machine alone unless asked for.

Regression: with a port of 70000 the training waited for ever; with one that was taken the viewer was somewhere else
than said; ns-viewer and ns-train listened on every network.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import free_port
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.scripts.viewer.run_viewer import ViewerConfigWithoutNumRays
from test_viewer_guard import Open
from tiny_trainer import tiny_config

from infnerf_ns import viewer_guard
from infnerf_ns.errors import InputError
from infnerf_ns.presets import load_preset, preset_names
from infnerf_ns.training.trainer import InfNeRFTrainerConfig
from infnerf_ns.viewer_address import require_address


@pytest.fixture(autouse=True)
def no_guard_is_left() -> Iterator[None]:
    yield
    viewer_guard.disarm()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def settings(**changes: object) -> ViewerConfig:
    return ViewerConfig(**{"websocket_host": "127.0.0.1", **changes})


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_listens_to_this_machine_alone(name: str) -> None:
    assert load_preset(name).viewer.websocket_host == "127.0.0.1"


@pytest.mark.parametrize("port", [70000, 65536, -1])
@pytest.mark.parametrize("flag", ["websocket_port", "websocket_port_default"])
def test_ports_that_do_not_exist(tmp_path: Path, flag: str, port: int) -> None:
    config = tiny_config(tmp_path, viewer=settings(**{flag: port}))
    with pytest.raises(InputError, match=rf"--viewer.{flag.replace('_', '-')} {port}: allowed is 0 to 65535"):
        config.setup(local_rank=0, world_size=1)


def test_a_taken_port_is_refused_before_training(tmp_path: Path, taken: int) -> None:
    config = tiny_config(tmp_path, vis="viewer+tensorboard", viewer=settings(websocket_port=taken))
    with pytest.raises(InputError, match=f"websocket-port {taken}: the port is taken by another program"):
        config.setup(local_rank=0, world_size=1)


def test_without_a_viewer_the_port_does_not_matter(tmp_path: Path, taken: int) -> None:
    assert tiny_config(tmp_path, viewer=settings(websocket_port=taken)).setup(local_rank=0, world_size=1)


@pytest.mark.parametrize(
    "host, said",
    [("no.such.name.invalid", "there is no such name"), ("a" * 300, "no such name"), ("192.0.2.1", "cannot listen")],
)
def test_hosts_that_are_not_this_machine(host: str, said: str) -> None:
    with pytest.raises(InputError, match=f"--viewer.websocket-host {host}: .*{said}"):
        require_address(settings(websocket_host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_addresses_of_this_machine(host: str) -> None:
    require_address(settings(websocket_host=host, websocket_port=free_port()))
    require_address(settings(websocket_host=host, websocket_port=0))
    require_address(settings(websocket_host=host))


def _as_ns_viewer(monkeypatch: pytest.MonkeyPatch, *flags: str, **changes: object) -> InfNeRFTrainerConfig:
    """A run's configuration after ns-viewer has put its settings in place of the run's."""
    monkeypatch.setattr(sys, "argv", ["ns-viewer", "--load-config", "config.yml", *flags])
    config = load_preset("infnerf-small")
    config.vis = "viewer"
    config.viewer = ViewerConfigWithoutNumRays(**changes).as_viewer_config()
    return config


def test_ns_viewer_listens_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ViewerConfigWithoutNumRays().websocket_host == "0.0.0.0"
    assert _as_ns_viewer(monkeypatch).viewer.websocket_host == "127.0.0.1"
    guard = viewer_guard.disarm()
    assert guard is not None and not guard._knows("evil.example")


@pytest.mark.parametrize("flag", ["--viewer.websocket-host", "--viewer.websocket_host"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_ns_viewer_listens_to_others_when_asked_to(monkeypatch: pytest.MonkeyPatch, flag: str, joint: str) -> None:
    config = _as_ns_viewer(monkeypatch, *f"{flag}{joint}0.0.0.0".split(" "), websocket_host="0.0.0.0")
    assert config.viewer.websocket_host == "0.0.0.0"


def test_ns_viewer_refuses_ports_as_training_does(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    with pytest.raises(InputError, match="--viewer.websocket-port 70000: allowed is"):
        _as_ns_viewer(monkeypatch, websocket_port=70000)
    with pytest.raises(InputError, match=f"--viewer.websocket-port {taken}: the port is taken"):
        _as_ns_viewer(monkeypatch, websocket_port=taken)


def test_the_viewer_that_cannot_be_guarded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--vis viewer_legacy: .* use --vis viewer"):
        tiny_config(tmp_path, vis="viewer_legacy").setup(local_rank=0, world_size=1)
    config = load_preset("infnerf-small")
    config.vis = "viewer_legacy"
    with pytest.raises(InputError, match="--vis viewer_legacy"):
        config.viewer = ViewerConfig()


def _opened(folder: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[Open, str, str]:
    (folder / "run").mkdir()
    opened = Open(folder, **changes)
    opened.viewer.viser_server.stop()
    printed = capsys.readouterr()
    return opened, "\n".join(opened.viewer.viewer_info), printed.out + printed.err


def test_a_port_taken_meanwhile_is_said(tmp_path: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    """viser takes the next one; nerfstudio goes on to tell the one that was asked for."""
    opened, info, printed = _opened(tmp_path, capsys, websocket_port=taken)
    assert opened.port > taken and info == f"Viewer running locally at: http://127.0.0.1:{opened.port}"
    assert f"port {taken} is taken by another program; the viewer is at http://127.0.0.1:{opened.port}" in printed


def test_a_default_port_that_is_taken_is_said(tmp_path: Path, taken: int, capsys: pytest.CaptureFixture[str]) -> None:
    opened, info, printed = _opened(tmp_path, capsys, websocket_port=None, websocket_port_default=taken)
    assert opened.port != taken and info.endswith(f":{opened.port}")
    assert f"port {taken} is taken by another program; the viewer is at http://127.0.0.1:{opened.port}" in printed


def test_any_free_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, info, printed = _opened(tmp_path, capsys, websocket_port=0)
    assert int(info.rpartition(":")[2]) > 1023 and "is taken" not in printed and "the viewer is at http" in printed


def test_beyond_the_last_port_any_free_one_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """viser counts up from a taken port; at 65536 its thread died, and whoever waited for it waited for ever."""
    with socket.create_server(("127.0.0.1", 65535)):
        _, info, _ = _opened(tmp_path, capsys, websocket_port=65535)
    assert 1023 < int(info.rpartition(":")[2]) < 65535


def test_who_can_reach_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened, _, printed = _opened(tmp_path, capsys, websocket_host="0.0.0.0")
    assert f"whoever reaches port {opened.port} sees the scene" in printed
    assert "ssh tunnel" in printed
