"""What own commands that compute have in common: ``--threads``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from infnerf_ns.threads import THREADS_VARIABLE, fix_threads, fixed_threads, most_threads


@dataclass
class Command:
    """A command with ``--threads``."""

    threads: int = field(default=0, kw_only=True)
    """Threads that compute on the CPU; 0: as many as are fastest, measured. (Benchmarks: all.)"""

    def main(self) -> None:
        """Does it."""
        raise NotImplementedError


def run_command(command: Command, *, measured: bool = True) -> None:
    """Runs a command on the threads that it asks for.

    Args:
        command: as parsed.
        measured: without ``--threads`` as many as are fastest; else all of them. The choice holds for processes that it
            starts, too.
    """
    fix_threads(command.threads)
    if not measured and fixed_threads() is None:
        fix_threads(most_threads())
    if fixed_threads() is not None:
        os.environ[THREADS_VARIABLE] = str(fixed_threads())
    command.main()
