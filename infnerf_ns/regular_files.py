"""Files that a user or a stranger names, looked at before they are opened, and files written without following links.

Opening a FIFO waits for ever, and a device never ends; a folder, a link to itself or a file that may not be read end in
a traceback. Where a stranger's folder has a link in the place of a file that is going to be written, writing would
change a file elsewhere. Nothing of nerfstudio or torch is imported.
"""

from __future__ import annotations

import errno
import os
import secrets
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

_LONGEST_NAME = 255
"""Bytes of one name, in all usual file systems."""


def file_problem(path: Path) -> str | None:
    """Why a path is not a file that can be read, as half a sentence; None if it is one. Opens nothing but what
    is one."""
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
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return "it may not be read: allow reading it" if error.errno == errno.EACCES else error.strerror or str(error)
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


def read_small_file(path: Path, what: str, most: int = 1 << 24) -> bytes:
    """The content of a file that is known to be small.

    Args:
        path: of the file.
        what: it is, for the line; may be empty.
        most: bytes.

    Raises:
        InputError: as `require_regular_file`, it is larger, or it cannot be read.
    """
    require_regular_file(path, what)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read ({error.strerror or error})") from error
    if len(content) > most:
        raise InputError(f"{what} {path}: it is larger than {most >> 20} MiB, which it cannot be")
    return content


def write_whole_file(path: Path, content: bytes) -> None:
    """Writes a file so that there is never half of it. A link in its place is replaced, not followed, and the
    draft has a name that nobody can have put a link at.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")  # a name that is long already must not become longer
    try:
        with draft.open("xb") as file:
            file.write(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def require_writable(flag: str, place: Path) -> None:
    """Ends with one line if a file or folder cannot be made, with the folders above it, before the work that it is for.

    Args:
        flag: that names it.
        place: of it; what is there already can be written anew.

    Raises:
        InputError: a name is too long, something above it is no folder, or it may not be written.
    """
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in place.parts):
        raise InputError(f"{flag} {str(place)[:200]}: {_ERRORS[errno.ENAMETOOLONG]}")
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if there != place and not there.is_dir():
        raise InputError(f"{flag} {place}: {there} is a file, nothing can be put into it: choose another place")
    if not os.access(there, os.W_OK):
        raise InputError(f"{flag} {place}: {there} may not be written to: allow it, or choose another place")
