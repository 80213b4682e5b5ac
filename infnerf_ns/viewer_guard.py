"""Who may ask nerfstudio's viewer for what.

viser 0.2.7, which nerfstudio 1.1.5 pins, sends any file of its user that a request's path leads to
(``GET /../../../etc/passwd``), and its websocket answers the pages of any site, which so could move the camera and
write files through nerfstudio's panel. The guard stands in front of both, from before the server listens:

- HTTP: only the files of viser's client, by the names that they have there; else 404.
- Origin: a page of another site gets 403 (cross-site websocket hijacking; RFC 6454, RFC 6455 section 10.2).
- Host: the name by which the viewer was asked for must be an address, ``localhost``, this machine's or one that its
  user has named; else 403. Otherwise a site whose name is pointed at this machine after its page has been loaded (DNS
  rebinding) would count as the same origin.
- Messages: see `viewer_input`.

viser offers no place for this: the server, its request handler and its websocket are made in one constructor call of
nerfstudio's. So from `arm` until the viewer has been set up, viser's server module, and no other, gets a ``serve`` that
makes connections of the guarded kind (a subclass, as websockets provides for it).
"""

from __future__ import annotations

import functools
import http
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import viser
import websockets
import websockets.exceptions
from viser.infra import _infra
from websockets.datastructures import Headers
from websockets.legacy.server import Serve, WebSocketServerProtocol

from infnerf_ns.validation import warn
from infnerf_ns.viewer_input import PageMessages

HOSTS_VARIABLE = "INFNERF_VIEWER_HOSTS"
"""Environment variable: further names, with commas between, by which the viewer may be asked for (a proxy's, ...)."""
_SHARE_DOMAIN = ".share.viser.studio"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_Response = tuple[http.HTTPStatus, Any, bytes]


class ViewerGuard:
    """Decides about requests and messages of one viewer.

    Args:
        host: on which the viewer listens.
        share: the user has asked for viser's public address (``--viewer.make-share-url``).
    """

    def __init__(self, host: str, share: bool = False) -> None:
        self._named = {name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",")} - {""}
        self._own = {host.lower(), "localhost"}
        if not _is_loopback(host):
            name = socket.gethostname().lower()
            self._own |= {name, f"{name}.local"}
        self._share = share
        self._files = _client_files()
        self.messages = PageMessages(share)

    def refusal(self, path: str, headers: Headers) -> _Response | None:
        """The answer to a request that must not be served, None to one that may.

        Args:
            path: of the request line, as it came.
            headers: of the request.
        """
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        host = _host_and_port(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._knows(host[0]):
            asked = ", ".join(hosts)[:100]
            return _refuse(
                f"this viewer is not to be asked for as '{asked}'. If that is right, start it with the environment"
                f" variable {HOSTS_VARIABLE} set to that name."
            )
        if len(origins) > 1 or (origins and not self._same_site(origins[0], host)):
            return _refuse("pages of other sites may not use this viewer.")
        if headers.get_all("Upgrade") == ["websocket"]:
            return None
        name = path.partition("?")[0]
        if name == "/" or name in self._files:
            return None
        return http.HTTPStatus.NOT_FOUND, {}, b"404"

    def _knows(self, host: str) -> bool:
        if host in self._own or host in self._named or host.endswith(".localhost"):
            return True
        if self._share and host.endswith(_SHARE_DOMAIN):
            return True
        return _is_address(host)

    def _same_site(self, origin: str, host: tuple[str, int | None]) -> bool:
        scheme = urlsplit(origin).scheme
        site = _host_and_port(origin.partition("://")[2])
        if scheme not in _DEFAULT_PORTS or site is None:
            return False
        if site[0] in self._named:  # behind a proxy that asks with a name of its own
            return True
        default = _DEFAULT_PORTS[scheme]
        return site[0] == host[0] and (site[1] or default) == (host[1] or default)


class _GuardedConnection(WebSocketServerProtocol):
    """A connection of the viewer's server that the guard watches."""

    def __init__(self, guard: ViewerGuard, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self._placed = False
        """the page has said where its camera is"""

    async def process_request(self, path: str, request_headers: Headers) -> Any:
        refusal = self._guard.refusal(path, request_headers)
        return refusal if refusal is not None else await super().process_request(path, request_headers)

    async def recv(self) -> bytes:
        while True:
            message = self._guard.messages.cleaned(await super().recv(), placed=self._placed)
            if message is not None:
                self._placed = True  # the first that is let through is of the camera
                return message


class _Websockets:
    """The package ``websockets`` as viser's server module sees it while a guard is armed."""

    def __init__(self, guard: ViewerGuard) -> None:
        self.guard = guard
        self.server = SimpleNamespace(serve=self._serve)

    def __getattr__(self, name: str) -> Any:
        return getattr(websockets, name)

    def _serve(self, handler: Any, host: str, port: int, **options: Any) -> Serve:
        # Beyond the last port, to which viser would count up from taken ones, its thread would die, and whoever waits
        # for the server would wait for ever.
        connection = functools.partial(_GuardedConnection, self.guard)
        return Serve(handler, host, port if port <= 65535 else 0, create_protocol=connection, **options)


def arm(host: str, share: bool = False) -> None:
    """The next viewer of this process is guarded; see `ViewerGuard`."""
    _infra.websockets = _Websockets(ViewerGuard(host, share))


def disarm() -> ViewerGuard | None:
    """Ends what `arm` has begun, and returns its guard; None where there is none."""
    seen = _infra.websockets
    _infra.websockets = websockets
    return seen.guard if isinstance(seen, _Websockets) else None


@contextmanager
def armed(host: str, share: bool = False) -> Iterator[None]:
    """Viewers that are opened while it lasts are guarded."""
    arm(host, share)
    try:
        yield
    finally:
        disarm()


def take_over(server: viser.ViserServer) -> bool:
    """To be called once the controls of a viewer are there: from now on its guard knows what they allow.

    Returns:
        Whether there is one.
    """
    guard = disarm()
    if guard is None:
        warn(
            "this viewer was opened neither by ns-train nor by ns-viewer, and is not guarded: whoever reaches its port"
            " can read your files; call infnerf_ns.viewer_guard.arm before you open it"
        )
        return False
    guard.messages.server = server
    return True


def _refuse(reason: str) -> _Response:
    return http.HTTPStatus.FORBIDDEN, {"Content-Type": "text/plain; charset=utf-8"}, f"infnerf: {reason}\n".encode()


def _client_files() -> frozenset[str]:
    """Paths of the files of viser's client, each as a request names it. Links are left out, as they may lead away; but
    where the package itself was installed as links, they are its files."""
    root = Path(viser.__file__).absolute().parent / "client" / "build"
    linked = (root / "index.html").is_symlink()
    paths = (path for path in root.rglob("*") if path.is_file() and (linked or not path.is_symlink()))
    return frozenset("/" + path.relative_to(root).as_posix() for path in paths)


def _host_and_port(text: str) -> tuple[str, int | None] | None:
    """Parts of ``name``, ``name:port``, ``[address]:port``, the name in lower case; None if it is neither."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or parts.path or parts.query or parts.fragment or "@" in parts.netloc or "?" in text or "#" in text:
        return None
    return host, port


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
