"""The guarded viewer in a real browser: its page loads whole, a page of another site cannot reach it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from test_viewer_guard import Open

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]

_OPENED_SOCKET = """new Promise(done => {
    const socket = new WebSocket('ws://127.0.0.1:%d/');
    socket.onopen = () => done('open');
    socket.onerror = () => done('refused');
})"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "run").mkdir()
    opened = Open(folder)
    yield opened
    opened.viewer.viser_server.stop()


@pytest.fixture(scope="module")
def other_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page that somebody else has written."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<p>other</p>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_page_loads_whole_and_other_sites_are_refused(opened: Open, other_site: str, tmp_path: Path) -> None:
    def socket_opens() -> str:
        script = _OPENED_SOCKET % opened.port
        answer = page.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"]["value"]

    with browser(tmp_path / "profile") as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{opened.port}/")
        page.wait_for("the panel", lambda: "Octree" in page.text() and "Resolution" in page.text())
        page.wait_for("a picture", lambda: "Resolution: 0x0px" not in page.text())
        files = page.wait_for("the font and the texture", lambda: _loaded(page))
        assert all(status == 200 for _, status in files), files
        assert socket_opens() == "open"
        page.call("Page.navigate", url=other_site)
        page.wait_for("the other page", lambda: page.text() == "other")
        assert socket_opens() == "refused"


def _loaded(page: Page) -> list[tuple[str, int]]:
    """Path and status of every file of the page; none until font and texture have come."""
    entries = "performance.getEntriesByType('resource').filter(e => e.name.startsWith(location.origin))"
    files = page.evaluate(f"{entries}.map(e => [new URL(e.name).pathname, e.responseStatus])")
    complete = all(any(name.endswith(suffix) for name, _ in files) for suffix in (".ttf", ".hdr"))
    return files if complete else []
