"""Services that training reports to (``--vis wandb``, ``--vis comet``): asked before anything is loaded whether they
will take it, as nerfstudio finds out only after that."""

from __future__ import annotations

import importlib.util
import sys

from nerfstudio.configs.experiment_config import ExperimentConfig

from infnerf_ns.errors import InputError


def require_services(config: ExperimentConfig) -> None:
    """Ends with one line if the configuration asks for a service that this user is not logged in to.

    Raises:
        InputError: or whose package is not installed.
    """
    if config.is_comet_enabled():
        _require_package("comet_ml", config.vis)
        from comet_ml.config import get_config  # slow to import

        if not get_config()["comet.api_key"]:
            raise InputError(
                f"--vis {config.vis}: comet has no key; set the environment variable COMET_API_KEY, or use --vis"
                " tensorboard"
            )
    if config.is_wandb_enabled():
        _require_package("wandb", config.vis)
        import wandb  # slow to import

        # On a terminal, wandb asks for the key.
        if wandb.setup().settings.mode == "online" and not wandb.api.api_key and not sys.stdin.isatty():
            raise InputError(
                f"--vis {config.vis}: you are not logged in to wandb; run 'wandb login', set the environment variable"
                " WANDB_MODE=offline, or use --vis tensorboard"
            )


def _require_package(name: str, vis: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise InputError(f"--vis {vis}: the package {name} is not installed; pip install it, or use --vis tensorboard")
