"""The built-in demo scene: a procedural town, photographed by a virtual drone, cached on disk.

Lengths are metres, z is up, the middle of the town is the origin. Nothing here imports nerfstudio's models or configs:

- ``noise``: integer hashes and value noise, the only source of randomness of the textures
- ``mesh``: triangles that know the flat surface they lie on
- ``houses``, ``greenery``, ``town``: the geometry
- ``facade``, ``ground``, ``materials``: what colour a point of a surface has
- ``raycaster``, ``photographer``: rays, light, photos
- ``flight``: where the drone goes
- ``points``: surface points and which photos see them
- ``survey``: all that there is before the first photo is taken
- ``cache``: all of it on disk, written atomically
- ``depths``: on demand, depth images beside the photos
"""

from infnerf_ns.data.demo_scene.cache import DemoScene, DemoSceneOptions, load_or_generate
from infnerf_ns.data.demo_scene.depths import load_or_generate_depths

__all__ = ["DemoScene", "DemoSceneOptions", "load_or_generate", "load_or_generate_depths"]
