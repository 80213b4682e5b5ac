"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): one line, the conventional exit code, and what can be saved is saved.

A training takes them as a request (:class:`StopSignals`); everything else ends where it is (:func:`end_on_signals`).
Nothing but the standard library is imported here, so that a command can be stopped while it imports the rest.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, Optional

_PATIENCE = 5.0
"""Seconds that an ending process has to clean up. Python drops an exception that a signal raises within a callback (of
the import system, for instance), and the process would run on."""
_is_command = False
"""This process is a command, which nothing goes on in once it ends."""
_code: Optional[int] = None
"""that it ends with, once that is known"""


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is handed to ``on_request``; a second one exits at once.

    Handlers are installed in the main thread only (Python allows no other) and put back on leaving. Entering twice is
    fine.

    Attributes:
        received: the signal's number once one came, else None.
    """

    def __init__(self, on_request: Callable[[int], None]) -> None:
        self.received: Optional[int] = None
        self._on_request = on_request
        self._previous: list[dict] = []
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            self._terminals = _terminals()
            for number in _stop_signals():
                replaced[number] = signal.signal(number, self._handle)
        self._previous.append(replaced)
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._previous.pop().items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is None:
            self.received = number
            try:
                self._on_request(number)
            finally:
                if number == _hang_up():
                    _leave(self._terminals)
        elif number != _hang_up():  # a terminal that closes is told by the kernel and by the shell
            say("stopped at once; what was saved before is intact")
            leave(exit_code(number))


def leave(code: int) -> NoReturn:
    """Ends the process after its cleaning up. Python would then end the threads that are left (a viewer's) wherever
    they are, which aborts the process in the middle of compiled code; so it ends before that.

    Args:
        code: of the exit.
    """
    global _code
    _code = code
    raise SystemExit(code)


@atexit.register
def _end_before_the_threads() -> None:
    """The last of the functions at exit: it is the first that this package registers."""
    if _is_command and _code is not None:
        # What was registered before it does not run any more; of that, these two are not nothing.
        for module, end in (("logging", "shutdown"), ("multiprocessing.util", "_exit_function")):
            with suppress(Exception):
                getattr(sys.modules[module], end)()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(_code)


def exit_code(number: int) -> int:
    """The shell's convention for a process that a signal ended: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def say(line: str, *, error: bool = False) -> None:
    """Prints a line of ours from a signal handler, where printing can fail: the terminal may be gone, or it was in the
    middle of another line."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(f"infnerf: {line}", file=stream, flush=True)
    except (OSError, ValueError):
        pass
    except RuntimeError:  # the handler has interrupted a print
        os.write(2 if error else 1, f"\ninfnerf: {line}\n".encode())


_kept: list[str] = []


@contextmanager
def kept(line: str) -> Iterator[None]:
    """While it lasts, a command that is stopped says this, too: what is not lost, and how to go on."""
    _kept.append(line)
    try:
        yield
    finally:
        _kept.pop()


def end_on_signals(line: str = "stopped") -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end this process: with that line, after cleaning up, with the conventional
    exit code; at once if a second one comes. For commands alone: a process that goes on is killed. Only in the main
    thread, and only where nobody else handles them."""
    if threading.current_thread() is not threading.main_thread():
        return
    global _is_command
    terminals, ending, _is_command = _terminals(), False, True

    def end(number: int, frame: Optional[FrameType]) -> None:
        nonlocal ending
        if ending:
            if number != _hang_up():
                os._exit(exit_code(number))
            return
        ending = True
        say("; ".join([line, *_kept[-1:]]), error=True)
        if number == _hang_up():
            _leave(terminals)
        _end_soon(number)
        leave(exit_code(number))

    # A shell's script starts what it puts into the background with SIGINT ignored; one that comes was meant even so.
    nobodys = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
    for number in _stop_signals():
        if signal.getsignal(number) in nobodys:
            signal.signal(number, end)


def _end_soon(number: int) -> None:
    """Ends this process in some seconds, should it not end by itself."""

    def end() -> None:
        time.sleep(_PATIENCE)
        os._exit(exit_code(number))

    threading.Thread(target=end, name="infnerf-end", daemon=True).start()


def _hang_up() -> Optional[int]:
    return getattr(signal, "SIGHUP", None)  # Windows has none


def _stop_signals() -> list[int]:
    """All three; without SIGHUP where it is ignored, as ``nohup`` asks for."""
    hang_up = _hang_up()
    closes = hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([hang_up] if closes else [])


def _terminals() -> list[int]:
    """Outputs that go to a terminal. Once it is closed it cannot be told from a file."""
    return [number for number in (1, 2) if os.isatty(number)]


def _leave(terminals: list[int]) -> None:
    """What goes to a closed terminal goes nowhere: every later line would fail, and end what is still to be saved."""
    if terminals:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)
