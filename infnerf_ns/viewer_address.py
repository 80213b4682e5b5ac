"""Where the viewer listens: checked before anything is loaded, as viser waits for ever for a port that does not exist
and takes another one in silence where the wanted one is taken."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from nerfstudio.configs.base_config import ViewerConfig

from infnerf_ns import viewer_guard
from infnerf_ns.arguments import flag_values
from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer

HOST = "127.0.0.1"
"""Programs of this machine alone can connect. nerfstudio's default is every network that the machine is in."""
_EVERYWHERE = ("0.0.0.0", "::", "")
_LAST_PORT = 65535


def port_problems(settings: ViewerConfig) -> list[str]:
    """Ports that do not exist, one line each."""
    ports = {"websocket-port": settings.websocket_port, "websocket-port-default": settings.websocket_port_default}
    problems = [port_problem(name, port) for name, port in ports.items() if port is not None]
    return [problem for problem in problems if problem is not None]


def port_problem(name: str, port: int) -> str | None:
    """One line if there is no such port.

    Args:
        name: of the setting.
        port: its value.
    """
    if 0 <= port <= _LAST_PORT:
        return None
    return f"--viewer.{name} {port}: allowed is 0 to {_LAST_PORT} (0: any that is free)"


def require_address(settings: ViewerConfig) -> None:
    """Ends with one line if the viewer could not listen where it is told to.

    Raises:
        InputError: the port does not exist, is taken or reserved; the host is no address of this machine.
    """
    for problem in port_problems(settings):
        raise InputError(problem)
    host, port = settings.websocket_host, settings.websocket_port or 0
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(
            f"--viewer.websocket-host {host}: there is no such name; give 127.0.0.1, which this machine alone reaches"
        ) from None
    errors = [_bind_error(*place[:3], place[4]) for place in places]
    taken = [error for error in errors if error is not None and error.errno == errno.EADDRINUSE]
    if taken or None not in errors:  # localhost may have two addresses, of which a machine without IPv6 lacks one
        raise InputError(_bind_problem((taken or errors)[0], host, port))


def _bind_error(family: int, kind: int, protocol: int, address: tuple) -> OSError | None:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _bind_problem(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"--viewer.websocket-port {port}: the port is taken by another program; give another one, or leave the"
            " flag out, then a free one is found"
        )
    if error.errno == errno.EACCES:
        return f"--viewer.websocket-port {port}: the system reserves this port; give one from 1024 to {_LAST_PORT}"
    return f"--viewer.websocket-host {host}: the viewer cannot listen there ({error.strerror or error})"


def for_ns_viewer(settings: ViewerConfig, vis: str) -> ViewerConfig:
    """The settings with which ns-viewer opens a run, made safe; the viewer that follows is guarded.

    ns-viewer has settings of its own in place of the run's, whose host is nerfstudio's default. Only the command line
    tells whether its user has asked for it.

    Args:
        settings: of ns-viewer; changed in place.
        vis: which viewer.

    Raises:
        InputError: see `require_address` and `require_guarded`.
    """
    require_guarded(vis)
    if settings.websocket_host == ViewerConfig.websocket_host and flag_values("viewer.websocket-host") is None:
        settings.websocket_host = HOST
    require_address(settings)
    viewer_guard.arm(settings.websocket_host, settings.make_share_url)
    return settings


def require_guarded(vis: str) -> None:
    """Ends with one line for a viewer that cannot be guarded.

    Raises:
        InputError: it is nerfstudio's old one.
    """
    if vis == "viewer_legacy":
        raise InputError(
            "--vis viewer_legacy: nerfstudio's old viewer lets any web page that you have open write files; use"
            " --vis viewer"
        )


def say_address(viewer: Viewer) -> None:
    """Tells where the viewer is to be found if that is not where it should be, and who can reach it."""
    settings = viewer.config
    port = listening_port(viewer)
    wanted = settings.websocket_port or settings.websocket_port_default
    if port != wanted:
        host = "localhost" if settings.websocket_host in _EVERYWHERE else settings.websocket_host
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        taken = "" if settings.websocket_port == 0 else f"port {wanted} is taken by another program; "
        print(f"infnerf: {taken}the viewer is at {address}", flush=True)
        viewer.viewer_info = [f"Viewer running locally at: {address}"]
    if settings.websocket_host in _EVERYWHERE:
        warn(
            f"the viewer listens on every network of this machine: whoever reaches port {port} sees the scene and can"
            f" use the panel; an ssh tunnel needs no more than --viewer.websocket-host {HOST}"
        )


def listening_port(viewer: Viewer) -> int:
    """The port on which a viewer's server really listens; viser itself knows only where it has tried to."""
    server = viewer.viser_server._websock_server._ws_server
    assert server is not None
    return server.sockets[0].getsockname()[1]
