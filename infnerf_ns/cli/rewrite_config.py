"""``infnerf-config``: writes a run's config.yml anew, for where the run is now.

nerfstudio's commands look for a run where its config.yml says that it is, and execute what a stranger may have written
into that file. The new one names the folder in which it stands and holds configuration classes and plain values only.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import tyro
import yaml

from infnerf_ns.cli.runs import load_run_config, place_config
from infnerf_ns.errors import InputError
from infnerf_ns.regular_files import read_small_file, write_whole_file
from infnerf_ns.run_config import make_paths_absolute

BEFORE = "config.before.yml"
"""Name of the file as it was when it was first written anew."""


@dataclass
class RewriteConfig:
    """Makes a run that was moved, copied or given to you known to nerfstudio's commands, where it is now."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or its config.yml."""
    data: Optional[Path] = None
    """Where the capture is now: ns-eval and ns-render dataset look for its photos there."""

    def main(self) -> None:
        """Reads the file safely, and writes it."""
        config, folder = load_run_config(self.run)
        place_config(config, folder)
        if self.data is not None:
            if not self.data.exists():
                raise InputError(f"--data {self.data}: there is no such folder")
            config.data = config.pipeline.datamanager.data = self.data.resolve()
        manager = config.pipeline.datamanager
        capture = manager.data or manager.dataparser.data
        if capture.exists():  # else nobody knows what a relative path starts from
            make_paths_absolute(config)
        file, before = folder / "config.yml", folder / BEFORE
        content = yaml.dump(config).encode()
        try:
            if file.exists() and not os.path.lexists(before):
                write_whole_file(before, read_small_file(file, "the configuration"))
            write_whole_file(file, content)
        except OSError as error:
            raise InputError(
                f"{file} cannot be written ({error.strerror}): allow writing there, or copy the run elsewhere"
            ) from error
        print(f"infnerf: wrote {file}; the first one is kept as {BEFORE}")
        if not capture.exists():
            print(
                f"infnerf: the capture {capture} is not there; ns-eval will ask for its photos: --data FOLDER names it"
            )
        print(f"  ns-viewer --load-config {shlex.quote(str(file))}")


def entrypoint() -> None:
    """The console script."""
    tyro.cli(RewriteConfig).main()
