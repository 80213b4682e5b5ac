"""How many threads compute on the CPU: as many as ``--threads`` or ``INFNERF_THREADS`` says, or as are fastest.

Both pools are set, that of the kernels (numba) and torch's. numba's number belongs to the thread that calls a kernel,
and the viewer renders in threads of its own, so it is set where work is done and put back after it. What the kernels
compute does not depend on it, to the last bit (`tests/test_threads.py`); torch's functions round differently where a
thread's share of a tensor ends (seen: exp and log of more than 32,768 numbers), so a training is the same to rounding.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import numba
import torch

from infnerf_ns.errors import InputError
from infnerf_ns.thread_choice import Change, ThreadChoice

THREADS_VARIABLE = "INFNERF_THREADS"
_QUIET_SECONDS = 60.0
"""After a line about a change, further changes are not said for so long."""
_fixed: Optional[int] = None
"""Of the process, as its cores are."""


def most_threads() -> int:
    """Threads that this process can compute with: its cores, or NUMBA_NUM_THREADS where that is set."""
    return numba.config.NUMBA_NUM_THREADS


def thread_problems(threads: int, flag: str = "--threads") -> list[str]:
    """What is wrong with a number of threads; 0 stands for measured."""
    if 0 <= threads <= most_threads():
        return []
    return [f"{flag} {threads}: allowed is 1 to {most_threads()} on this machine, or 0 for as many as are fastest"]


def fix_threads(threads: int) -> None:
    """From now on this process computes with so many threads, measured if 0 and if INFNERF_THREADS is not set.

    Raises:
        InputError: there are not so many.
    """
    global _fixed
    for problem in thread_problems(threads):
        raise InputError(problem)
    _fixed = threads or _asked_for() or None
    if _fixed is not None:
        numba.set_num_threads(_fixed)
        torch.set_num_threads(_fixed)


def fixed_threads() -> Optional[int]:
    """The number of threads that is fixed; None: it is measured."""
    return _fixed or _asked_for() or None


def _asked_for() -> int:
    """What INFNERF_THREADS says; 0: nothing."""
    value = os.environ.get(THREADS_VARIABLE, "").strip()
    if not value:
        return 0
    if not value.isdecimal():
        raise InputError(f"{THREADS_VARIABLE}={value}: give a whole number, or unset it")
    for problem in thread_problems(int(value), THREADS_VARIABLE):
        raise InputError(problem)
    return int(value)


class MeasuredThreads:
    """Computes pieces of one kind of work on the number of threads that is fixed, or fastest.

    Args:
        doing: the work, as in "trains".
        piece: what a piece of it is called.
        remedy: what fixes the number of threads, as in "--threads N".
    """

    def __init__(self, doing: str, piece: str, remedy: str) -> None:
        self._doing, self._piece, self._remedy = doing, piece, remedy
        self._lock = threading.Lock()
        self._choice: Optional[ThreadChoice] = None
        self._quiet_until = -float("inf")

    @contextmanager
    def piece(self, work: float = 1.0) -> Iterator[None]:
        """While it lasts, this thread computes with the chosen number of threads. It is timed unless it fails.

        Args:
            work: how much it is, in any unit.
        """
        kernels, torchs = numba.get_num_threads(), torch.get_num_threads()
        threads = self._next(kernels)
        numba.set_num_threads(threads)
        torch.set_num_threads(min(threads, torchs))  # OMP_NUM_THREADS may hold torch back
        start = time.perf_counter()
        try:
            yield
        finally:
            numba.set_num_threads(kernels)
            torch.set_num_threads(torchs)
        self._record(threads, time.perf_counter() - start, work)

    def _next(self, most: int) -> int:
        fixed = fixed_threads()
        if fixed is not None:
            return fixed
        with self._lock:
            if self._choice is None or self._choice.most != most:  # a program of one's own has called numba's
                self._choice = ThreadChoice(most)
            return self._choice.next()

    def _record(self, threads: int, seconds: float, work: float) -> None:
        with self._lock:
            change = None if self._choice is None else self._choice.record(threads, seconds, work)
            now = time.monotonic()
            if change is None or now < self._quiet_until:
                return
            self._quiet_until = now + _QUIET_SECONDS
        print(f"infnerf: {self._told(change)}", flush=True)

    def _told(self, change: Change) -> str:
        before, after = (f"{1000 * seconds:.0f}" for seconds in (change.seconds_before, change.seconds_after))
        why = " (do other programs use the processor?)" if change.after < change.before else ""
        return (
            f"{self._doing} with {change.after} of {most_threads()} threads from now on: {self._piece} takes"
            f" {after} ms, with {change.before} it takes {before} ms{why}; {self._remedy} fixes the number"
        )
