"""Every Triton kernel compiles, and needs no more than a GPU has: no GPU is needed to see that, and the compiler finds
what the interpreter forgives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90)
SHARED_BYTES = 99 * 1024
"""the least that a block may have on GPUs from compute capability 8.0 on"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    """In a process of its own, as the interpreter may be switched on in this one."""
    script = Path(__file__).with_name("triton_aot.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, script, "--capability", *map(str, CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for kernel in kernels:
        print(kernel)  # shown with -rP
        assert kernel["shared"] <= SHARED_BYTES, kernel
        # Only the widest layers that are taken at all may spill, and little.
        assert kernel["stack"] + kernel["local"] <= (256 if kernel["kernel"].startswith("widest") else 0), kernel
    names = {kernel["kernel"].split(": ")[1] for kernel in kernels}
    assert names == {
        *("route", "forward", "backward_bank", "backward_positions", "encode", "encode_backward", "add_sum"),
        *("backward", "step", "square", "clear"),
    }
    assert {(kernel["capability"]) for kernel in kernels} == set(CAPABILITIES)
