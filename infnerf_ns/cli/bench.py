"""``infnerf-bench``: measurements of the engine."""

import tyro

from infnerf_ns.cli.bench_flyin import Flyin
from infnerf_ns.cli.bench_growth import Growth
from infnerf_ns.cli.bench_losses import Losses
from infnerf_ns.cli.bench_memory import Memory
from infnerf_ns.cli.bench_nodes import Nodes
from infnerf_ns.cli.bench_quality import Quality
from infnerf_ns.cli.bench_scaling import Scaling
from infnerf_ns.cli.bench_speed import Speed
from infnerf_ns.cli.command import run_command


def entrypoint() -> None:
    """The console script."""
    commands = {
        "quality": Quality,
        "losses": Losses,
        "growth": Growth,
        "scaling": Scaling,
        "speed": Speed,
        "nodes": Nodes,
        "memory": Memory,
        "flyin": Flyin,
    }
    run_command(tyro.extras.subcommand_cli_from_dict(commands), measured=False)
