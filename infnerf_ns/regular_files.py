"""Files that a user or a stranger names, looked at before they are opened.

Opening a FIFO waits for ever, and a device never ends; a folder, a link to itself or a file that may not be read end in
a traceback. Nothing of nerfstudio or torch is imported.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from infnerf_ns.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ERRORS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.ELOOP: "it is a link that leads back to itself",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EACCES: "its folder may not be entered: allow reading it",
}


def file_problem(path: Path) -> str | None:
    """Why a path is not a file that can be read, as half a sentence; None if it is one. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL in the name
        return "there is no such file"
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            return f"it is a link to {os.readlink(path)}, which is not there"
        return _ERRORS.get(error.errno or 0, error.strerror or str(error))
    if not stat.S_ISREG(mode):
        return f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"
    if not os.access(path, os.R_OK):
        return "it may not be read: allow reading it"
    return None


def require_regular_file(path: Path, what: str) -> None:
    """Ends with one line if a path is not a file that can be read; FIFOs and devices, on which a program would wait,
    are none.

    Args:
        path: of the file.
        what: it is, for the line: ``the settings file``, ``--load-checkpoint``.

    Raises:
        InputError: it is missing, unreadable, a folder, a FIFO, a device, a socket, or a link to nothing or to itself.
    """
    problem = file_problem(path)
    if problem is not None:
        raise InputError(f"{what} {path}: {problem}")
