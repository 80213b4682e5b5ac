"""Where numba keeps the compiled kernels: beside the package or in the user's cache folder, as it decides, or, where
neither can be written, in a temporary folder.

numba itself ends every command there with "no locator available", when the first kernel is defined.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import numba

from infnerf_ns.errors import InputError
from infnerf_ns.validation import warn


def require_cache_folder() -> None:
    """Called before the first kernel is defined.

    Raises:
        InputError: there is not even a temporary folder.
    """
    if _found():
        return
    try:
        folder = _temporary_folder()
    except OSError as error:
        raise InputError(
            f"no folder for compiled kernels can be written ({error.strerror or error}): set NUMBA_CACHE_DIR to one"
        ) from error
    numba.config.CACHE_DIR = str(folder)
    warn(
        f"compiled kernels are kept in {folder}, as neither the package's folder nor HOME can be written: when it is"
        " emptied, the next start takes a minute or two longer; NUMBA_CACHE_DIR names a lasting one"
    )


def _found() -> bool:
    """Whether numba finds a folder: it looks for one when a function is defined. The kernels lie beside this one."""
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    pass


def _temporary_folder() -> Path:
    """One that the next start finds again. What is loaded from it is executed, so it must be this user's alone."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.mkdtemp(prefix="infnerf-numba-"))
    folder = Path(tempfile.gettempdir()) / f"infnerf-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="infnerf-numba-"))
