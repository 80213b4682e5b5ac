"""InfNeRF for nerfstudio: an octree of NeRFs whose rendering touches O(log n) of the model.

Nothing of nerfstudio is imported here: nerfstudio imports this package while it collects its plugins, and an import of
its configuration modules at that moment would be circular.
"""

from infnerf_ns.surroundings import prepare_nerfstudio

__version__ = "0.1.0"

prepare_nerfstudio()  # the first that nerfstudio imports of us; what it imports and prints after it is prepared for
