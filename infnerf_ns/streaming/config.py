"""The options of loading a packed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from infnerf_ns.validation import Range


@dataclass
class StreamingConfig:
    """How a packed run (infnerf-pack) is loaded; of no effect in training."""

    budget_mib: Annotated[int, Range(1)] = 1024
    """Memory for nodes. Views that need more are drawn coarser. INFNERF_BUDGET_MIB in the environment goes before."""
    prefetch: bool = True
    """Load what the next camera of a path will need, if it moves on as it does."""
    pages: Annotated[Path | None, tyro.conf.Suppress] = None
    """Folder of the pages; set when the checkpoint is looked up."""
