"""What a command finds around it: outputs that cannot print every character, warnings that no user can act on.

Only the standard library is imported: the package prepares an ns-* command as soon as nerfstudio imports it, which is
early enough for most of what is to come.
"""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path
from types import TracebackType

from infnerf_ns.training.stopping import end_on_signals

_SILENCED = (
    (FutureWarning, "`torch.jit.script` is deprecated", r"torch\.jit\._script"),
    (FutureWarning, r"`torch\.cuda\.amp\.custom_(fwd|bwd)", r"nerfstudio\.field_components\.activations"),
    (FutureWarning, r"`torch\.cuda\.amp\.GradScaler", r"nerfstudio\.engine\.trainer"),
    (UserWarning, "Using a non-tuple sequence for multidimensional indexing", r"nerfstudio\.cameras\.cameras"),
    (UserWarning, "Converting a tensor with requires_grad=True to a scalar", r"nerfstudio\.utils\.writer"),
)
"""Category, beginning of the message and module of what nerfstudio 1.1.5 makes newer versions of torch say: spellings
that only nerfstudio can change."""
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing ends in."""


def prepare_process() -> None:
    """Of a command: makes its outputs take every character, and silences what no user can act on."""
    for stream in (sys.stdout, sys.stderr):
        _print_everything(stream)
    for category, message, module in _SILENCED:
        warnings.filterwarnings("ignore", message, category, module)


def prepare_nerfstudio() -> None:
    """The same, if this process is an ns-* command that imports its plugins. The method is not known yet; for others of
    nerfstudio's, too, what would have been an error, a tada in ASCII, becomes a question mark.

    ``ns-train`` of one of our methods also ends with one line when a signal comes before the trainer takes them over.
    """
    program = Path(sys.argv[0]) if sys.argv else Path()
    if not is_nerfstudio(program):
        return
    prepare_process()
    if program.stem in ("ns-train", "train") and sys.argv[1:2] and sys.argv[1].startswith("infnerf"):
        end_on_signals("stopped before training began; nothing to save")


def is_nerfstudio(program: Path) -> bool:
    """Whether a program (``sys.argv[0]``) is one of nerfstudio's commands."""
    return program.name.startswith("ns-") or program.parts[-3:-1] == ("nerfstudio", "scripts")


def say_disk_errors() -> None:
    """From now on, ends this process with one line where nothing can be written: nerfstudio's commands write their
    results at the end, where a plugin has no hook but this one."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_disk_error


def _say_disk_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, OSError) or error.errno not in _NOT_WRITTEN:
        sys.__excepthook__(kind, error, trace)
        return
    what = error.filename or "what was computed"
    print(
        f"infnerf: {what} cannot be written ({error.strerror}): free disk space, or choose another place for it",
        file=sys.stderr,
    )


def _print_everything(stream) -> None:  # noqa: ANN001
    """nerfstudio prints emoji and rich draws boxes; an ASCII or cp1252 output shows them as question marks."""
    try:
        "🎉─".encode(stream.encoding)
    except UnicodeEncodeError:
        stream.reconfigure(errors="replace")
    except (AttributeError, LookupError, TypeError):  # not a text file: a notebook's, a test's, or none at all
        pass
