"""The console scripts. A command's imports take seconds; this module imports next to nothing, so that Ctrl-C ends them
with one line, too, and prepares the process before they begin."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from infnerf_ns.errors import InputError
from infnerf_ns.surroundings import prepare_process
from infnerf_ns.training.stopping import end_on_signals


def run(main: Callable[[], None]) -> None:
    """Runs a command as the process's own: signals end it with one line and the conventional exit code; so does,
    without a line, a reader of its output that has gone (``| head``). What a file system says of a name (too long, no
    permission, a file in the place of a folder) is one line, too."""
    end_on_signals()
    prepare_process()
    if "" in sys.argv[1:]:
        raise InputError("an argument is empty: is a variable of the shell not set?")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(141) from None  # 128 + SIGPIPE
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        name = str(error.filename)
        shown = name if len(name) <= 200 else f"{name[:200]}..."
        raise InputError(f"{shown}: {error.strerror}: choose another name or place") from error


def _script(module: str) -> Callable[[], None]:
    return lambda: run(lambda: importlib.import_module(f"infnerf_ns.cli.{module}").entrypoint())


bench = _script("bench")
config = _script("rewrite_config")
inspect = _script("inspect_run")
ortho = _script("ortho")
pack = _script("pack")
picture = _script("picture")
