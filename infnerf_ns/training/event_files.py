"""The log of a training (such as TensorBoard's files) must not end it: a full disk costs the log, not the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nerfstudio.utils import writer

from infnerf_ns.validation import warn


class SparingWriter:
    """Hands everything to one of nerfstudio's writers until that fails to write; then says so once, and drops the rest.

    Args:
        inner: the writer.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self._failed = inner, False

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._inner, name)

        def write(*arguments: Any, **more: Any) -> None:
            if self._failed:
                return
            try:
                method(*arguments, **more)
            except OSError as error:
                self._failed = True
                warn(
                    f"the log of the training cannot be written ({error.strerror or error}): from here on it lacks"
                    " everything; training goes on"
                )

        return write


def spare_the_training() -> None:
    """From now on a writer of nerfstudio's list that fails is left out; the one that prints to the terminal stays as it
    is."""
    writer.EVENT_WRITERS[:] = [
        each if isinstance(each, (writer.LocalWriter, SparingWriter)) else SparingWriter(each)
        for each in writer.EVENT_WRITERS
    ]
