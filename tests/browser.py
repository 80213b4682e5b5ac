"""A real page of ns-viewer in headless Chromium.

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Running
from PIL import Image
from websockets.sync.client import ClientConnection, connect

WIDTH, HEIGHT = 900, 600
SCENE = np.s_[100:500, 30:480]
"""Rows and columns of the page that show the scene and no controls."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--use-angle=swiftshader"),
    *("--enable-unsafe-swiftshader", "--remote-debugging-port=0", f"--window-size={WIDTH},{HEIGHT}", "about:blank"),
]


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

    def text(self) -> str:
        """What can be read on the page."""
        return self.evaluate("document.body ? document.body.innerText : ''") or ""

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

    def drag(self, start: tuple[int, int], end: tuple[int, int], steps: int = 8) -> None:
        """Moves the pressed mouse over the scene, as one turns the camera; pixels of the page."""
        press = {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **press)
        for step in range(1, steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end))
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
            time.sleep(0.03)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **press)

    def control(self, label: str) -> str:
        """JavaScript expression for the input with that label; waits until it is there."""
        found = f"[...document.querySelectorAll('label')].find(e => e.textContent.trim() === {label!r})"
        self.wait_for(label, lambda: self.evaluate(f"!!({found})"))
        return f"document.getElementById(({found}).htmlFor)"

    def choose(self, label: str, entry: str) -> list[str]:
        """Chooses an entry of a dropdown and returns all entries."""
        self.click(self.control(label))
        entries = "[...document.querySelectorAll('[role=option]')].filter(e => e.offsetParent !== null)"
        listed = self.wait_for("the entries", lambda: self.evaluate(f"{entries}.map(e => e.textContent.trim())"))
        self.click(f"{entries}.find(e => e.textContent.trim() === {entry!r})")
        return listed

    def set_slider(self, label: str, value: float) -> None:
        """Types a value into the box beside a slider."""
        box = f"{self.control(label)}.parentElement.querySelector('input[type=text]')"
        self.click(box)
        self.evaluate(f"({box}).select()")
        self.call("Input.insertText", text=str(value))
        self.evaluate(f"({box}).blur()")

    def wait_for(self, what: str, ready: Callable[[], Any], timeout: float = 120) -> Any:
        """The first true value of ``ready()``; fails after the timeout."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if value := ready():
                return value
            time.sleep(0.3)
        self.screenshot("failed")
        pytest.fail(f"{what}: not within {timeout:.0f} s; the page says\n{self.text()}")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A headless browser with one empty page; ``profile`` is a new folder."""
    with open(profile.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([CHROMIUM, f"--user-data-dir={profile}", *_FLAGS], stdout=log, stderr=log)
    try:
        port_file = profile / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{CHROMIUM} did not start:\n{profile.with_suffix('.log').read_text()[-2000:]}")
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def viewer_page(config: Path, folder: Path, log: Path) -> Iterator[Page]:
    """A page of ns-viewer that is about to show a run.

    Args:
        config: of the run.
        folder: for the browser's files.
        log: of the viewer.
    """
    port = free_port()
    command = ["ns-viewer", "--load-config", config, "--viewer.websocket-port", port]
    command += ["--viewer.websocket-host", "127.0.0.1", "--viewer.max-num-display-images", 0]
    viewer = Running(command, log)
    try:
        viewer.wait_until(lambda: _answers(port))
        with browser(folder / "profile") as page:
            page.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
            yield page
    finally:
        viewer.kill()


def changed(picture: np.ndarray, before: np.ndarray) -> float:
    """Share of the scene's area whose colour has changed visibly."""
    return float((np.abs(picture[SCENE] - before[SCENE]).max(axis=-1) > 8).mean())


def resolution(page: Page) -> int:
    """Width in pixels of the render on the page, as the panel states it."""
    found = re.search(r"Resolution: (\d+)x\d+px", page.text())
    return int(found[1]) if found else 0


def steady(page: Page, name: str) -> np.ndarray:
    """The page when the large picture is there and stays as it is."""
    latest, same = page.screenshot(name), 0

    def stays() -> bool:
        nonlocal latest, same
        before, latest = latest, page.screenshot(name)
        same = same + 1 if resolution(page) >= 400 and np.array_equal(before[SCENE], latest[SCENE]) else 0
        return same >= 4

    page.wait_for(f"{name}: a steady picture", stays)
    return latest
