"""The kernels as numba compiles them for another processor than this one: an undefined conversion or a comparison that
was optimised away may do no harm here and end the process there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_ray_that_is_no_number_is_harmless_on_any_processor(tmp_path: Path) -> None:
    """With vector instructions of this machine's processor the same test passed while it crashed on others."""
    test = Path(__file__).with_name("test_model.py")
    processor = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
    run = subprocess.run(
        [*command, "-k", "test_a_ray_that_is_no_number_spoils_itself_alone"],
        env={**os.environ, **processor},
        capture_output=True,
        text=True,
        cwd=test.parent.parent,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert list(tmp_path.rglob("tree_numba*.nbi")), "nothing was compiled: the environment did not reach numba"
