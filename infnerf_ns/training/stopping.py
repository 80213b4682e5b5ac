"""Ctrl-C and SIGTERM as a request: finish the step, save, exit with the conventional code."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Optional


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is handed to ``on_request``; a second one exits at once.

    Handlers are installed in the main thread only (Python allows no other) and put back on leaving. Entering twice is
    fine.

    Attributes:
        received: the signal's number once one came, else None.
    """

    def __init__(self, on_request: Callable[[int], None]) -> None:
        self.received: Optional[int] = None
        self._on_request = on_request
        self._previous: list[dict] = []

    def __enter__(self) -> "StopSignals":
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                replaced[number] = signal.signal(number, self._handle)
        self._previous.append(replaced)
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._previous.pop().items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received is not None:
            print("infnerf: stopped at once; what was saved before is intact", flush=True)
            raise SystemExit(exit_code(number))
        self.received = number
        self._on_request(number)


def exit_code(number: int) -> int:
    """The shell's convention for a process that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number
