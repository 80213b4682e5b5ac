"""Which number of threads is the fastest at the moment: measured while the work is done.

A parallel region ends when its slowest thread has ended. Where another program keeps a core busy, the thread on that
core is waited for, hundreds of times in a training step, and fewer threads are faster. Which number that is differs
from machine to machine and from minute to minute, so the work itself is timed: pieces of it (training steps, chunks of
rays) are done with each number in turn, and what was fastest is kept until it is measured again.

Nothing here starts or counts threads; see :mod:`infnerf_ns.threads`.
"""

from __future__ import annotations

from statistics import median
from typing import NamedTuple, Optional

WARM_UP = 3
"""Pieces that are not looked at: in the first ones kernels are compiled and buffers touched for the first time."""
ROUNDS = 5
"""Times that each number has its turn in a measurement."""
_HOPELESS = 1.5
"""A number that takes this many times as long as the best after two rounds is not measured on."""
WINDOW = 20
"""Pieces between two looks at whether work has become slow."""
SLOW = 1.3
"""Work is slow if it takes this many times as long as it did when its number of threads was chosen."""
_BETTER = 0.92
"""Another number is taken if it needs at most this share of the time: no change for a difference that is noise."""
BUDGET = 0.02
"""Share of the time that measurements may cost (what their pieces took longer than with the number that won)."""
_REST = 5.0
"""Seconds of work between two measurements, at least."""


class Change(NamedTuple):
    """Another number of threads has turned out to be faster."""

    before: int
    after: int
    seconds_before: float
    """per piece, with the number of threads before"""
    seconds_after: float
    """the same with the number now"""


class ThreadChoice:
    """A number of threads for one kind of work.

    Args:
        most: threads there are; the numbers tried are this, half of it, a quarter ... and 1.
    """

    def __init__(self, most: int) -> None:
        self.most = self.current = most
        self._numbers = [max(1, most >> halvings) for halvings in range(most.bit_length())]
        self._skip = WARM_UP
        self._turns: list[int] = []
        self._rates: dict[int, list[float]] = {}
        self._spent: list[tuple[float, float]] = []
        self._largest = 0.0
        self._window: list[float] = []
        self._reference = 0.0
        self._since = self._rest = 0.0
        if most > 1:
            self._measure()

    def next(self) -> int:
        """Threads for the next piece of work."""
        return self._turns[0] if self._turns and not self._skip else self.current

    def record(self, threads: int, seconds: float, work: float = 1.0) -> Optional[Change]:
        """Takes note of a piece of work.

        Args:
            threads: that did it; other than :meth:`next` asked for, it is left out.
            seconds: that it took.
            work: how much it was (rays, for instance). A piece of less than half of the largest says more about what a
                piece costs as such, and is left out.

        Returns:
            the change, if another number of threads is taken from now on.
        """
        if self.most == 1 or threads != self.next():
            return None
        if self._skip:
            self._skip -= 1
            return None
        if work < self._largest / 2:
            return None
        self._largest = max(self._largest, work)
        if self._turns:
            return self._took_turn(threads, seconds, work)
        self._window.append(seconds / work)
        self._since += seconds
        if len(self._window) == WINDOW:
            rate = median(self._window)
            self._window.clear()
            # With fewer threads nothing becomes slow when the other program ends: then it is time that decides.
            if self._since >= self._rest and (self.current < self.most or rate > SLOW * self._reference):
                self._measure()
            self._reference = min(self._reference, rate)
        return None

    def _measure(self) -> None:
        self._turns, self._rates, self._spent = list(self._numbers), {}, []

    def _took_turn(self, threads: int, seconds: float, work: float) -> Optional[Change]:
        self._rates.setdefault(threads, []).append(seconds / work)
        self._spent.append((seconds, work))
        self._turns.pop(0)
        if self._turns:
            return None
        medians = {number: median(rates) for number, rates in self._rates.items()}
        best = min(medians, key=lambda number: medians[number])
        rounds = len(self._rates[best])
        if rounds < ROUNDS:
            hopeless = _HOPELESS * medians[best] if rounds > 1 else float("inf")
            self._turns = [
                number for number in self._numbers if len(self._rates[number]) == rounds and medians[number] <= hopeless
            ]
            return None
        return self._decide(medians, best)

    def _decide(self, medians: dict[int, float], best: int) -> Optional[Change]:
        before = self.current
        if medians[best] <= _BETTER * medians[before]:
            self.current = best
        rate = self._reference = medians[self.current]
        self._rest = max(_REST, sum(max(0.0, seconds - rate * work) for seconds, work in self._spent) / BUDGET)
        self._since = 0.0
        if self.current == before:
            return None
        return Change(before, self.current, medians[before] * self._largest, rate * self._largest)
