"""InfNeRF for nerfstudio: an octree of NeRFs whose rendering touches O(log n) of the model.

Nothing of nerfstudio is imported here: nerfstudio imports this package while it collects its plugins, and an import of
its configuration modules at that moment would be circular.
"""

__version__ = "0.1.0"
