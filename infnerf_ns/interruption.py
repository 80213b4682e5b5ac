"""Where the viewer may interrupt a picture: between two chunks of rays; and what becomes of one that fails.

nerfstudio's viewer gives up a picture that the moving camera has outdated by raising from a trace function
(``sys.settrace``), so at any line of the thread that renders: also between the last line under a lock and the lock's
release, after which nobody gets it again. As Python runs nothing else while a numba kernel does, the signal often
arrives just there, and the viewer froze after a few moves of the camera. So the trace function is taken off the thread
while a picture is made, and asked where nothing is held. (Untraced lines are faster, too.)

A picture is also given up when its page has been closed, and when the process ends: Python ends such a thread wherever
it is, and in the middle of a kernel that aborts the process.

An error would end the viewer's thread, and the page would show nothing any more. So a picture that cannot be made is
given up, too, and its error is said.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

from infnerf_ns.validation import warn

_INTERRUPTER = "RenderStateMachine.check_interrupt"
"""The viewer's trace function. Others (debuggers, coverage) stay where they are."""
_PATIENCE = 3.0
"""Seconds that the end of the process waits for the pictures that it gives up."""
_thread = threading.local()
_leaving = threading.Event()
_pictures: set[int] = set()
"""threads that are making one"""


@contextmanager
def interrupted_between_chunks() -> Iterator[None]:
    """While it lasts, the viewer ends this thread's picture in :func:`may_be_interrupted` and nowhere else.

    Raises:
        IOChangeException: nerfstudio's, in place of any error in a thread of the viewer; elsewhere errors stay.
    """
    trace = sys.gettrace()
    if getattr(trace, "__qualname__", None) != _INTERRUPTER:
        yield
        return
    sys.settrace(None)
    _thread.interrupter = trace
    _pictures.add(threading.get_ident())
    try:
        may_be_interrupted()
        yield
    except IOChangeException:
        raise
    except (Exception, SystemExit) as error:
        _say(str(error) if isinstance(error, SystemExit) else repr(error))
        raise IOChangeException from error
    finally:
        _pictures.discard(threading.get_ident())
        _thread.interrupter = None
        sys.settrace(trace)


def _say(error: str) -> None:
    """Once while it stays the same: the viewer tries again and again."""
    if getattr(_thread, "said", None) != error:
        _thread.said = error
        warn(f"a picture of the viewer could not be made ({error.removeprefix('infnerf: ')})")


def may_be_interrupted() -> None:
    """A place where a picture may be given up.

    Raises:
        IOChangeException: nerfstudio's; the viewer wants another picture, or nobody wants this one any more.
    """
    interrupter = getattr(_thread, "interrupter", None)
    if interrupter is not None:
        if _leaving.is_set() or not getattr(getattr(interrupter, "__self__", None), "running", True):
            raise IOChangeException
        interrupter(sys._getframe(), "line", None)


@atexit.register
def _give_pictures_up() -> None:
    """Before Python ends its threads."""
    _leaving.set()
    end = time.monotonic() + _PATIENCE
    while _pictures and time.monotonic() < end:
        time.sleep(0.01)
