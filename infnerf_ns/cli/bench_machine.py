"""What every benchmark prints first: the machine, the versions and the command."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numba
import torch


def describe_machine() -> str:
    """Processor, cores and threads, GPU if there is one, versions, and the command line; two lines."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch and {numba.get_num_threads()} numba"
        f" threads{device}; python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}\n"
        f"$ {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
