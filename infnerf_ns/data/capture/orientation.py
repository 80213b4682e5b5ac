"""Which way up the photos of a capture are read: as their pixels are stored, or as their EXIF tags turn them.

Poses belong to one of the two. COLMAP and ns-process-data take the stored pixels; Metashape, RealityCapture, OpenCV and
browsers take the upright photo. Where a tag swaps width and height, the size of the photo's camera decides, photo by
photo. Where it does not (180 degrees, mirrored, square photos), all photos of the capture follow those that a size
decided; if there are none, the agreement of the photos at the points decides (:mod:`.consistency`); if that says
nothing, the pixels are taken as stored. The train photos decide, for every split and every command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infnerf_ns.data.capture.photo_files import Header
from infnerf_ns.data.capture.photos import Turn
from infnerf_ns.errors import InputError

SIZE_TOLERANCE = 1
"""Pixels by which a photo may differ from its camera (downscaled copies are rounded in different ways)."""
CLEARLY_BETTER = 0.1
"""By so much the photos must agree better upright than as stored, of 1."""
_NAMES = {
    **{2: "mirrored", 3: "180 degrees", 4: "mirrored and 180 degrees", 5: "mirrored and 90 degrees", 6: "90 degrees"},
    **{7: "mirrored and 270 degrees", 8: "270 degrees"},
}


def fits(size: tuple[int, int], camera: tuple[int, int]) -> bool:
    """Whether a photo of this width and height is of a camera with that one."""
    return all(abs(a - b) <= SIZE_TOLERANCE for a, b in zip(size, camera))


def turn_by_size(header: Header, camera: tuple[int, int]) -> Turn | None:
    """The turn of a photo if nothing but sizes is asked.

    Args:
        header: of the photo.
        camera: width and height of its camera.

    Returns:
        None where both ways fit.

    Raises:
        InputError: neither fits.
    """
    stored, upright = fits(header.stored_size, camera), fits(header.upright_size, camera)
    if not stored and not upright:
        raise _wrong_size(header, camera)
    if header.orientation == 1:
        return Turn()
    return None if stored and upright else Turn(header.orientation, upright)


def _wrong_size(header: Header, camera: tuple[int, int]) -> InputError:
    width, height = header.stored_size
    line = f"photo {header.path} has {width} x {height} pixels but its camera {camera[0]} x {camera[1]}: "
    if fits((height, width), camera):
        return InputError(
            line
            + "it is turned by 90 degrees against its pose and no EXIF tag says how: use the photos that the poses "
            "were computed for, or turn them"
        )
    return InputError(line + "use the photos that the poses were computed for, or correct w and h")


def decide(
    headers: Sequence[Header],
    cameras: Sequence[tuple[int, int]],
    agreement: Callable[[bool], float | None],
) -> tuple[bool, str]:
    """Whether the tags that sizes say nothing about are followed.

    Args:
        headers: of the train photos.
        cameras: width and height of their cameras.
        agreement: of the photos at the points, -1 to 1, without (False) and with (True) the turns in question; None
            where nothing can be said. Asked only where sizes do not decide.

    Returns:
        The decision, and what the log says of it.

    Raises:
        InputError: a photo fits its camera in no way.
    """
    turns = [turn_by_size(header, camera) for header, camera in zip(headers, cameras)]
    tagged = [header.orientation for header in headers if header.orientation != 1]
    if not tagged:
        return (
            False,
            "[yellow]photos that are held out have EXIF tags that turn them and no train photo has: where sizes "
            "do not decide they are read as stored",
        )
    kinds = " or ".join(_NAMES[tag] for tag in sorted(set(tagged)))
    what = f"{len(tagged)} of {len(headers)} photos have an EXIF tag that turns them ({kinds})"
    sized = {turn.followed for turn in turns if turn is not None and turn.tag != 1}
    if None not in turns or len(sized) == 1:
        ways = " or ".join("upright" if followed else "as stored" for followed in sorted(sized))
        return sized == {True}, f"{what}: they are read {ways}, which is the size of their cameras"
    stored, upright = agreement(False), agreement(True)
    if stored is None or upright is None or abs(upright - stored) < CLEARLY_BETTER:
        figures = (
            "there are no points to compare at"
            if stored is None or upright is None
            else (f"agreement at the points {stored:.2f} as stored, {upright:.2f} upright")
        )
        return False, (
            f"[yellow]{what}, and nothing says which way their poses are meant ({figures}): they are read as stored, "
            "as COLMAP does; for poses of upright photos write the photos upright"
        )
    followed = upright > stored
    return followed, (
        f"{what}: they are read {'upright' if followed else 'as stored'}, as they agree better at the points so "
        f"({max(upright, stored):.2f} against {min(upright, stored):.2f})"
    )
