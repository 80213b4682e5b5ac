"""ns-viewer in a real browser: headless Chromium opens the page and the rendered village appears.

The browser is driven through its DevTools protocol (https://chromedevtools.github.io/devtools-protocol). Set
``INFNERF_TEST_SCREENSHOTS`` to a folder to keep the pictures.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Running, Trained, trained_run
from nerfstudio.utils import colormaps
from PIL import Image
from websockets.sync.client import ClientConnection, connect

pytestmark = pytest.mark.slow
WIDTH, HEIGHT = 900, 600
SCENE = np.s_[100:500, 30:480]
"""Rows and columns of the page that show the scene and no controls."""
_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--remote-debugging-port=0", f"--window-size={WIDTH},{HEIGHT}", "about:blank"),
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if _BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    return trained_run(tmp_path_factory.getbasetemp())


class Page:
    """A browser page, driven over its DevTools websocket."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._count = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self._count += 1
        self._connection.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            answer = json.loads(self._connection.recv(timeout=60))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, name: str) -> np.ndarray:
        """The page [H, W, 3], 0..255."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        folder = os.environ.get("INFNERF_TEST_SCREENSHOTS")
        if folder:
            (Path(folder) / f"{name}.png").write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)

    def click(self, script: str) -> None:
        """Click the middle of the element that a JavaScript expression gives."""
        self.evaluate(f"({script}).scrollIntoView({{block: 'center'}})")
        time.sleep(0.3)
        box = self.evaluate(f"({script}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        where = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **where)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def wait_for(self, what: str, ready: Callable[[], Any], timeout: float = 120) -> Any:
        """The first true value of ``ready()``; fails after the timeout."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if value := ready():
                return value
            time.sleep(0.3)
        self.screenshot("failed")
        pytest.fail(f"{what}: not within {timeout:.0f} s; the page says\n{self.evaluate('document.body.innerText')}")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A headless browser with one empty page; ``profile`` is a new folder."""
    with open(profile.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([_BROWSER, f"--user-data-dir={profile}", *_FLAGS], stdout=log, stderr=log)
    try:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{_BROWSER} did not start:\n{profile.with_suffix('.log').read_text()[-2000:]}")
            time.sleep(0.1)
        port = int(port_file.read_text().splitlines()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
            target = next(entry for entry in json.load(answer) if entry["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Seen:
    """What a visitor of the viewer sees."""

    rendered: np.ndarray
    depth: np.ndarray
    outputs: list[str]


@pytest.fixture(scope="module")
def seen(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    port = _free_port()
    command = ["ns-viewer", "--load-config", trained.config, "--viewer.websocket-port", port]
    command += ["--viewer.websocket-host", "127.0.0.1", "--viewer.max-num-display-images", 0]
    viewer = Running(command, trained.workplace.logs / "viewer")
    try:
        viewer.wait_until(lambda: _answers(port))
        with browser(tmp_path_factory.mktemp("browser") / "profile") as page:
            empty = page.screenshot("empty")
            page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
            page.wait_for("the final render", lambda: _resolution(page) >= 400)
            page.wait_for("the picture", lambda: _changed(page.screenshot("rgb"), empty) > 0.5)
            rendered = page.screenshot("rgb")
            outputs = _choose_output(page, "depth")
            page.wait_for("the depth", lambda: _in_depth_colors(page.screenshot("depth")) > 0.5)
            yield Seen(rendered, page.screenshot("depth"), outputs)
    finally:
        viewer.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _changed(picture: np.ndarray, before: np.ndarray) -> float:
    """Share of the scene's area whose colour has changed visibly."""
    return float((np.abs(picture[SCENE] - before[SCENE]).max(axis=-1) > 8).mean())


def _in_depth_colors(picture: np.ndarray) -> float:
    """Share of the scene's area in colours of nerfstudio's map for depths."""
    colors = 255 * colormaps.apply_float_colormap(torch.linspace(0, 1, 256)[:, None], "turbo").numpy()
    off = np.abs(picture[SCENE][::4, ::4, None] - colors).max(axis=-1).min(axis=-1)
    return float((off < 32).mean())


def _resolution(page: Page) -> int:
    """Width in pixels of the render on the page, as the panel states it."""
    found = re.search(r"Resolution: (\d+)x\d+px", page.evaluate("document.body ? document.body.innerText : ''") or "")
    return int(found[1]) if found else 0


def _choose_output(page: Page, name: str) -> list[str]:
    """Chooses an entry of the dropdown "Output type" and returns all entries."""
    label = "[...document.querySelectorAll('label')].find(e => e.textContent.trim() === 'Output type')"
    page.wait_for("the dropdown", lambda: page.evaluate(f"!!({label})"))
    page.click(f"document.getElementById(({label}).htmlFor)")
    entries = "[...document.querySelectorAll('[role=option]')].filter(e => e.offsetParent !== null)"
    listed = page.wait_for("the outputs", lambda: page.evaluate(f"{entries}.map(e => e.textContent.trim())"))
    page.screenshot("dropdown")
    page.click(f"{entries}.find(e => e.textContent.trim() === {name!r})")
    return listed


def test_the_page_shows_the_scene(seen: Seen) -> None:
    rendered = seen.rendered[SCENE]
    assert rendered.std(axis=(0, 1)).max() > 15  # not one colour
    assert len(np.unique(rendered.astype(int).reshape(-1, 3), axis=0)) > 500
    # Red roofs and green meadows are colours of that map, too, but most of the scene is not.
    assert _in_depth_colors(seen.rendered) < 0.5 * _in_depth_colors(seen.depth)


def test_the_dropdown_lists_the_outputs(seen: Seen) -> None:
    assert {"rgb", "depth", "expected_depth", "accumulation", "level", "normals"} <= set(seen.outputs)


def test_another_output_is_shown_when_chosen(seen: Seen) -> None:
    assert np.abs(seen.depth[SCENE] - seen.rendered[SCENE]).mean() > 10
    assert seen.depth[SCENE].std(axis=(0, 1)).max() > 5
