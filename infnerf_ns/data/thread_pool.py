"""Threads that read or make photos, one per processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A thread per processor; an error or Ctrl-C drops what has not begun, which ``ThreadPoolExecutor`` would finish.

    Args:
        most: threads, where each needs much memory.
    """
    count = os.cpu_count() or 1
    with ThreadPoolExecutor(count if most is None else min(most, count)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
