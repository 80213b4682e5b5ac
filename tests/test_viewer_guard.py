"""What the viewer's port gives away and lets happen: requests and messages on real sockets to nerfstudio's own viewer.

Regression: viser sent any file of its user to anybody (``GET /../../etc/passwd``), answered the websockets of any
site's page, and let a page set controls to values that ended the viewer's threads or wrote files elsewhere.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import viser
from browser import free_port
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.viewer.viewer import Viewer
from test_viewer import Page
from tiny_model import CONE_ALONE, DEPTH, scrambled, tiny_config, tiny_model
from torch import nn
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from infnerf_ns import viewer_guard
from infnerf_ns.viewer import OctreeViewer
from infnerf_ns.viewer_guard import HOSTS_VARIABLE, ViewerGuard
from infnerf_ns.viewer_input import PageMessages

CAMERA = {
    "type": "ViewerCameraMessage",
    "wxyz": [0.0, 1.0, 0.0, 0.0],
    "position": [3.0, -15.0, 8.0],
    "fov": 0.8,
    "aspect": 1.5,
    "look_at": [0.0, 0.0, 0.0],
    "up_direction": [0.0, 0.0, 1.0],
}


class Pipeline(nn.Module):
    """As much of one as the viewer needs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval()
        self.datamanager = SimpleNamespace(includes_time=False, get_datapath=lambda: folder)
        self.octree_viewer = OctreeViewer(self.model)


class Open:
    """nerfstudio's viewer, opened as ns-train and ns-viewer do."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        config = ViewerConfig(**{"websocket_host": "127.0.0.1", "websocket_port": free_port(), **settings})
        with viewer_guard.armed(config.websocket_host, config.make_share_url):
            self.viewer = Viewer(config, folder / "run" / "log.txt", folder / "run", Pipeline(folder))
        self.port = self.viewer.viser_server.get_port()

    def get(self, request_line: str, *headers: str) -> tuple[int, bytes]:
        """Status and body of a request that no library has made sense of."""
        headers = headers or (f"Host: 127.0.0.1:{self.port}",)
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall("\r\n".join([request_line, *headers, "", ""]).encode("latin-1"))
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def page(self, **headers: str | None) -> ClientConnection:
        """A page's websocket."""
        name = headers.pop("host", None) or f"127.0.0.1:{self.port}"
        uri, origin = f"ws://{name}/", headers.pop("origin", f"http://{name}")
        plug = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return connect(uri, sock=plug, origin=origin, proxy=None, max_size=None, open_timeout=30)

    def control(self, label: str) -> Any:
        handles = self.viewer.viser_server.gui._gui_input_handle_from_id.values()
        return next(each for each in handles if each._impl.label == label)

    def machines(self) -> list[Any]:
        return list(self.viewer.render_statemachines.values())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "run").mkdir()
    (folder / "secret.json").write_text('"mine"')
    opened = Open(folder)
    yield opened
    opened.viewer.viser_server.stop()


def wait_for(ready: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 60
    while not (value := ready()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return value


def send(page: ClientConnection, message: object) -> None:
    page.send(msgspec.msgpack.encode(message))


def set_control(opened: Open, page: ClientConnection, name: str, value: object, **more: object) -> None:
    number = opened.control(name)._impl.id
    send(page, {"type": "GuiUpdateMessage", "id": number, "updates": {"value": value, **more}})


# -- requests ----------------------------------------------------------------------------------------------------------


ESCAPES: dict[str, Callable[[Path], str]] = {
    "dots": lambda file: f"/..{'/..' * 20}{file}",
    "dots behind a folder": lambda file: f"/assets/..{'/..' * 20}{file}",
    "encoded dots": lambda file: f"/%2e%2e{'/%2e%2e' * 20}{file}",
    "encoded slashes": lambda file: f"/..%2f{'..%2f' * 20}{str(file)[1:]}",
    "backslashes": lambda file: f"/..\\{'..' + chr(92)}..{str(file).replace('/', chr(92))}",
    "absolute": str,
    "absolute behind a slash": lambda file: f"/{file}",
    "absolute behind two": lambda file: f"//{file}",
    "null byte": lambda file: f"/index.html\0{file}",
    "no slash": lambda file: str(file)[1:],
    "address": lambda file: f"http://127.0.0.1{file}",
    "file address": lambda file: f"file://{file}",
    "a folder": lambda file: "/assets",
    "the package": lambda file: "/../../__init__.py",
    "through a file": lambda file: "/index.html/../index.html",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_file_but_the_clients(opened: Open, escape: str) -> None:
    status, body = opened.get(f"GET {ESCAPES[escape](opened.folder / 'secret.json')} HTTP/1.1")
    assert status == 404 and b"mine" not in body


def test_the_unguarded_server_sends_it(tmp_path: Path) -> None:
    """So that the test above would fail without the guard."""
    (tmp_path / "secret.json").write_text('"mine"')
    server = viser.ViserServer("127.0.0.1", free_port(), verbose=False)
    try:
        request = f"GET {ESCAPES['dots'](tmp_path / 'secret.json')} HTTP/1.1"
        status, body = Open.get(SimpleNamespace(port=server.get_port()), request)  # type: ignore[arg-type]
        assert (status, body) == (200, b'"mine"')
    finally:
        server.stop()


def test_a_link_out_of_the_client_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tmp_path / "viser" / "client" / "build"
    build.mkdir(parents=True)
    for name in ("index.html", "real.js"):
        (build / name).write_text(name)
    (tmp_path / "secret.json").write_text("mine")
    (build / "link.json").symlink_to(tmp_path / "secret.json")
    monkeypatch.setattr(viser, "__file__", str(tmp_path / "viser" / "__init__.py"))
    assert viewer_guard._client_files() == {"/index.html", "/real.js"}
    (build / "index.html").unlink()
    (build / "index.html").symlink_to(build / "real.js")  # an installation of links
    assert viewer_guard._client_files() == {"/index.html", "/real.js", "/link.json"}


def test_the_clients_files_are_served(opened: Open) -> None:
    root = Path(viser.__file__).parent / "client" / "build"
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        assert opened.get(f"GET /{file.relative_to(root).as_posix()} HTTP/1.1") == (200, file.read_bytes())
    assert opened.get("GET / HTTP/1.1") == (200, (root / "index.html").read_bytes())
    assert opened.get("GET /?websocket=ws://x HTTP/1.1")[0] == 200


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:7007", 200),
        ("localhost:7007", 200),
        ("LOCALHOST", 200),
        ("viewer.localhost", 200),
        ("[::1]:7007", 200),
        ("192.168.1.5:80", 200),
        ("evil.example:7007", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("evil.example#localhost", 403),
        ("", 403),
    ],
)
def test_names_that_others_own_are_refused(opened: Open, host: str, status: int) -> None:
    assert opened.get("GET / HTTP/1.1", f"Host: {host}")[0] == status


def test_a_request_has_one_host(opened: Open) -> None:
    assert opened.get("GET / HTTP/1.1", "Host: 127.0.0.1", "Host: evil.example")[0] == 403
    assert opened.get("GET / HTTP/1.1", "Accept: */*")[0] == 403


def test_a_name_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from websockets.datastructures import Headers

    def answer(guard: ViewerGuard, host: str, origin: str) -> object:
        return guard.refusal("/", Headers({"Host": host, "Origin": origin, "Upgrade": "websocket"}))

    assert answer(ViewerGuard("127.0.0.1"), "hub.example", "https://hub.example") is not None
    monkeypatch.setenv(HOSTS_VARIABLE, "Hub.example, other.example")
    guard = ViewerGuard("127.0.0.1")
    assert answer(guard, "hub.example", "https://hub.example") is None
    assert answer(guard, "localhost:7007", "https://hub.example") is None  # a proxy that asks with its own name
    assert answer(guard, "hub.example", "https://evil.example") is not None


def test_the_machines_name_is_allowed_where_it_listens_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer_guard.socket, "gethostname", lambda: "Workstation")
    assert ViewerGuard("0.0.0.0")._knows("workstation") and ViewerGuard("0.0.0.0")._knows("workstation.local")
    assert not ViewerGuard("127.0.0.1")._knows("workstation")


def test_the_public_address_is_known_only_if_asked_for() -> None:
    assert not ViewerGuard("127.0.0.1")._knows("abc.share.viser.studio")
    assert ViewerGuard("127.0.0.1", share=True)._knows("abc.share.viser.studio")


# -- websocket ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://127.0.0.1", "http://127.0.0.1:1", "null", "file://", "http://localhost", "x"],
)
def test_pages_of_other_sites_are_refused(opened: Open, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused, opened.page(origin=origin):
        pass
    assert refused.value.response.status_code == 403


def test_a_name_pointed_at_this_machine_is_refused(opened: Open) -> None:
    """DNS rebinding: to the browser, page and viewer are one site."""
    with pytest.raises(InvalidStatus) as refused, opened.page(host=f"evil.example:{opened.port}"):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_viewers_own_page_is_served(opened: Open, name: str) -> None:
    with opened.page(host=f"{name}:{opened.port}") as page:
        sent = msgspec.msgpack.decode(page.recv(timeout=60))
        assert any(message["type"].startswith("Gui") for message in sent)


def test_programs_without_an_origin_are_served(opened: Open) -> None:
    with opened.page(origin=None) as page:
        assert page.recv(timeout=60)


def test_the_guard_is_there_before_the_server_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while the viewer is being set up gets no more than later."""
    (tmp_path / "run").mkdir()
    (tmp_path / "secret.json").write_text('"mine"')
    answers = []
    setup = OctreeViewer._setup

    def watched(self: OctreeViewer, viewer: Viewer) -> None:
        early = SimpleNamespace(port=viewer.viser_server.get_port())
        answers.append(Open.get(early, f"GET {ESCAPES['dots'](tmp_path / 'secret.json')} HTTP/1.1"))  # type: ignore
        setup(self, viewer)

    monkeypatch.setattr(OctreeViewer, "_setup", watched)
    Open(tmp_path).viewer.viser_server.stop()
    assert answers == [(404, b"404")]


def test_other_servers_of_the_process_are_left_alone() -> None:
    import websockets
    from viser.infra import _infra

    with viewer_guard.armed("127.0.0.1"):
        assert _infra.websockets is not websockets
    assert _infra.websockets is websockets


def test_a_viewer_without_a_guard_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = viser.ViserServer("127.0.0.1", free_port(), verbose=False)
    try:
        assert not viewer_guard.take_over(server)
        assert "is not guarded" in capsys.readouterr().err
    finally:
        server.stop()


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(opened: Open) -> Iterator[ClientConnection]:
    """A page that shows the scene."""
    with opened.page() as page:
        send(page, CAMERA)
        (machine,) = wait_for(opened.machines, "a thread that renders")
        yield page
    wait_for(lambda: not machine.is_alive() and not opened.machines(), "the page's end")


def test_a_page_says_where_its_camera_is_first(opened: Open) -> None:
    """Regression: viser knows no page before; each other message of it was a traceback in the log."""
    messages = PageMessages()
    messages.server = opened.viewer.viser_server
    update = {"type": "GuiUpdateMessage", "id": opened.control("Maximum level")._impl.id, "updates": {"value": 1}}
    for message, placed, passes in [(update, False, False), (CAMERA, False, True), (update, True, True)]:
        assert (messages.cleaned(msgspec.msgpack.encode(message), placed=placed) is not None) == passes
    before = opened.control("Maximum level").value
    with opened.page() as page:
        set_control(opened, page, "Maximum level", 0 if before else 1)
        send(page, CAMERA)
        wait_for(opened.machines, "a thread that renders")
        assert opened.control("Maximum level").value == before
    wait_for(lambda: not opened.machines(), "the page's end")


CLAMPED = [
    ("Maximum level", -5, 0),
    ("Maximum level", 10**9, DEPTH),
    ("Level-of-detail bias", 1e9, 4.0),
    ("Level-of-detail bias", -math.inf, -2.0),
    ("Max res", 0, 64),
    ("Max res", 10**9, 2048),
    ("Split percentage", -3, 0.0),
    ("Background color", [-1, 1000, 3], (0, 255, 3)),
    ("Min", 1e300, 1e9),
]
LEFT_OUT = [
    ("Maximum level", math.nan),
    ("Maximum level", "2"),
    ("Maximum level", None),
    ("Maximum level", [1]),
    ("Maximum level", True),
    ("Level-of-detail bias", math.nan),
    ("Octree level", "no such level"),
    ("Octree nodes", 3),
    ("Show octree", "yes"),
    ("Output type", "nothing"),
    ("Crop center", [0.0, math.nan, 0.0]),
    ("Crop center", [0.0, 0.0]),
    ("Render name", "../../../secret"),
    ("Render name", "/tmp/a"),
    ("Render name", ".hidden"),
    ("Render name", "a\\b"),
    ("Render name", "x" * 1000),
    ("Output Directory", "$(touch gotcha)"),
    ("Output Directory", "a; rm b"),
]


@pytest.mark.parametrize("label, value, wanted", CLAMPED)
def test_numbers_end_where_their_sliders_do(
    opened: Open, page: ClientConnection, label: str, value: object, wanted: object
) -> None:
    before = opened.control(label).value
    set_control(opened, page, label, value)
    wait_for(lambda: opened.control(label).value == wanted, f"{label} = {value}")
    opened.control(label).value = before


@pytest.mark.parametrize("label, value", LEFT_OUT)
def test_what_makes_no_sense_is_left_out(opened: Open, page: ClientConnection, label: str, value: object) -> None:
    control, answered = opened.control(label), opened.control("Invert")
    before, on = control.value, not answered.value
    set_control(opened, page, label, value)
    set_control(opened, page, "Invert", on)
    wait_for(lambda: answered.value is on, "the message behind it")
    assert control.value == before


@pytest.mark.parametrize("attribute, value", [("update_cb", []), ("gui_api", 1), ("label", "x"), ("disabled", True)])
def test_pages_set_values_alone(opened: Open, page: ClientConnection, attribute: str, value: object) -> None:
    before = getattr(opened.control("Max res")._impl, attribute)
    set_control(opened, page, "Max res", 700, **{attribute: value})
    set_control(opened, page, "Max res", 600)
    wait_for(lambda: opened.control("Max res").value == 600, "the message behind it")
    assert getattr(opened.control("Max res")._impl, attribute) == before
    opened.control("Max res").value = 512


ODD = [
    b"",
    b"\xc1",
    "text",
    msgspec.msgpack.encode(3),
    msgspec.msgpack.encode({}),
    msgspec.msgpack.encode({"type": ["a"]}),
    msgspec.msgpack.encode({"type": "NoSuchMessage"}),
    msgspec.msgpack.encode({"type": "ShareUrlRequest"}),
    msgspec.msgpack.encode({"type": "ResetSceneMessage"}),
    msgspec.msgpack.encode({"type": "GuiUpdateMessage", "id": "none", "updates": {"value": 1}}),
    msgspec.msgpack.encode({"type": "GuiUpdateMessage"}),
    msgspec.msgpack.encode({"type": "FileTransferStart", "source_component_id": "a", "size_bytes": 2**60}),
    msgspec.msgpack.encode({"type": "TransformControlsUpdateMessage", "name": "/Crop", "wxyz": [0] * 4}),
    b"\x91" * 100_000,
]
ODD_CAMERAS = [
    {"fov": math.nan},
    {"fov": "wide"},
    {"aspect": math.nan},
    {"aspect": math.inf},
    {"position": [math.inf, 0, 0]},
    {"position": [1e300, 0, 0]},
    {"position": [0, 0]},
    {"wxyz": [0, 0, 0, 0]},
    {"wxyz": [math.nan, 0, 0, 0]},
    {"look_at": None},
]


@pytest.mark.parametrize("raw", ODD, ids=range(len(ODD)))
def test_a_page_that_sends_odd_things_goes_on(opened: Open, page: ClientConnection, raw: bytes | str) -> None:
    page.send(raw)
    _still_renders(opened, page)


@pytest.mark.parametrize("change", ODD_CAMERAS, ids=str)
def test_cameras_that_are_none_are_left_out(opened: Open, page: ClientConnection, change: dict) -> None:
    send(page, {**CAMERA, **change})
    _still_renders(opened, page)
    (client,) = opened.viewer.viser_server.get_clients().values()
    assert client.camera.fov == 0.8 and client.camera.aspect == 1.5


@pytest.mark.parametrize("key, value, wanted", [("aspect", 0, 1 / 16), ("aspect", 1e9, 16), ("fov", -1, 0.01)])
def test_cameras_are_clamped(opened: Open, page: ClientConnection, key: str, value: float, wanted: float) -> None:
    (client,) = wait_for(opened.viewer.viser_server.get_clients().values, "the page")
    send(page, {**CAMERA, key: value})
    wait_for(lambda: getattr(client.camera, key) == wanted, key)
    _still_renders(opened, page)


def _still_renders(opened: Open, page: ClientConnection) -> None:
    """A camera that comes next leads to a picture."""
    (machine,) = opened.machines()
    (client,) = opened.viewer.viser_server.get_clients().values()
    pictures = []
    client.scene.set_background_image = lambda picture, **_: pictures.append(picture.shape)
    send(page, {**CAMERA, "position": [3.1, -15.0, 8.0]})
    wait_for(lambda: pictures, "a picture")
    assert machine.is_alive() and min(pictures[0]) > 0


def test_camera_paths_are_written_to_their_folder_alone(opened: Open, page: ClientConnection) -> None:
    """The panel's "Generate Command", which wrote to whatever path a page had named."""
    for label, value in (("Add Keyframe", True), ("Render name", "../../secret"), ("Generate Command", True)):
        set_control(opened, page, label, value)
    folder = opened.folder / "run" / "camera_paths"
    (first,) = wait_for(lambda: list(folder.glob("*.json")) if folder.exists() else [], "the camera path")
    set_control(opened, page, "Render name", "fly in")
    wait_for(lambda: opened.control("Render name").value == "fly in", "the name")
    set_control(opened, page, "Generate Command", True)
    wait_for((folder / "fly in.json").exists, "the second camera path")
    assert {path.name for path in opened.folder.rglob("*.json")} == {first.name, "fly in.json", "secret.json"}
    assert (opened.folder / "secret.json").read_text() == '"mine"'


def test_a_picture_that_fails_does_not_end_the_page(
    opened: Open, page: ClientConnection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = opened.viewer.pipeline.model
    monkeypatch.setattr(model, "camera_rays", lambda *_: 1 / 0)
    send(page, {**CAMERA, "position": [4.0, -15.0, 8.0]})
    said = ""

    def told() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "could not be made (ZeroDivisionError" in said

    wait_for(told, "the error")
    monkeypatch.undo()
    _still_renders(opened, page)


# -- the panel on its own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, scale", [(1e9, 2.0**4), (-1e9, 2.0**-2), (math.nan, 1.0), (math.inf, 2.0**4)])
def test_the_panel_reads_its_sliders_within_their_ends(value: float, scale: float) -> None:
    server = viser.ViserServer("127.0.0.1", free_port(), verbose=False)
    try:
        shown = Page(scrambled(tiny_model(tiny_config(sampler=CONE_ALONE))).eval(), server)
        shown.choose("Level-of-detail bias", value, lambda: shown.model.footprint_scale == scale)
        shown.choose("Maximum level", -5, lambda: shown.model.field.level_cap == 0)
        shown.choose("Maximum level", 50, lambda: shown.model.field.level_cap is None)
        shown.control("Octree level").value = "nonsense"
        shown.octree.refresh()
        assert json.dumps(sorted(shown.drawn())) == "[]"
    finally:
        server.stop()
