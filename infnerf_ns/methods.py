"""Entry points of ``ns-train``: one method per preset in ``configs/``.

nerfstudio imports this module for every ns-* command.
"""

from nerfstudio.plugins.types import MethodSpecification

from infnerf_ns.presets import apply_preset, load_preset, preset_description, user_settings
from infnerf_ns.torch_compat import allow_numpy_scalars

allow_numpy_scalars()


def method(preset: str) -> MethodSpecification:
    """A preset as nerfstudio wants a method, with the settings of INFNERF_SETTINGS, if any, on top."""
    config = load_preset(preset)
    settings = user_settings()
    if settings is not None:
        apply_preset(config, settings)
    return MethodSpecification(config=config, description=preset_description(preset))


infnerf = method("infnerf")
infnerf_small = method("infnerf-small")
infnerf_big = method("infnerf-big")
