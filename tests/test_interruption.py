"""A picture that the viewer gives up ends between two chunks of rays, with nothing held, and the next one is whole.

Regression: nerfstudio raises from a trace function, at any line; on the one between a numba kernel and the release of
its lock, and in the node cache likewise, the viewer froze for good.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException, SetTrace
from tiny_model import tiny_camera
from tiny_packed import tiny_packed

from infnerf_ns import interruption
from infnerf_ns.kernels.numba_lock import numba_lock
from infnerf_ns.model import InfNeRFModel

_CHUNK = 256


class Machine(RenderStateMachine):
    """The viewer's render thread, without viewer and thread; notes the files whose lines it could raise at."""

    def __init__(self) -> None:
        self.interrupt_render_flag = False
        self.running = True
        self.files: set[str] = set()

    def trace(self, frame: FrameType, event: str, argument: object) -> Callable:
        self.files.add(Path(frame.f_code.co_filename).stem)
        return self.check_interrupt(frame, event, argument)

    trace.__qualname__ = RenderStateMachine.check_interrupt.__qualname__


@pytest.fixture(params=["whole", "packed"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> InfNeRFModel:
    packed = tiny_packed(tmp_path)
    model = packed.model if request.param == "whole" else packed.load()
    model.config.eval_num_rays_per_chunk = _CHUNK
    return model


def test_the_viewers_trace_function_is_known_by_its_name() -> None:
    assert RenderStateMachine.check_interrupt.__qualname__ == "RenderStateMachine.check_interrupt"


def test_a_picture_is_given_up_between_two_chunks(model: InfNeRFModel) -> None:
    camera, machine = tiny_camera(CameraType.PERSPECTIVE, 60.0, 48, 32), Machine()
    whole = model.get_outputs_for_camera(camera)["rgb"]
    chunks = 0

    def move_the_camera_in_the_second(_: object) -> None:
        nonlocal chunks
        chunks += 1
        machine.interrupt_render_flag = chunks == 2

    model.on_evaluated = move_the_camera_in_the_second
    with pytest.raises(IOChangeException), SetTrace(machine.trace):
        model.get_outputs_for_camera(camera)
    assert chunks == 2 < 48 * 32 / _CHUNK and sys.gettrace() is None
    assert numba_lock.acquire(blocking=False), "no lock is held"
    numba_lock.release()
    model.on_evaluated, machine.interrupt_render_flag = None, False
    with SetTrace(machine.trace):
        again = model.get_outputs_for_camera(camera)["rgb"]
    assert torch.equal(again, whole)
    assert "model" in machine.files, "the trace function was there"
    traced = machine.files & {"node_cache", "views", "rays", "numba_ops", "numba_lock", "shading", "field", "threading"}
    assert not traced, "nothing that holds a lock is interrupted"


def test_a_picture_of_a_closed_page_is_given_up(model: InfNeRFModel) -> None:
    """Regression: it was drawn to its end, a minute or more, and nobody else's could be meanwhile."""
    camera, machine = tiny_camera(CameraType.PERSPECTIVE, 60.0, 48, 32), Machine()
    chunks = 0

    def close_the_page_in_the_second(_: object) -> None:
        nonlocal chunks
        chunks += 1
        machine.running = chunks < 2

    model.on_evaluated = close_the_page_in_the_second
    with pytest.raises(IOChangeException), SetTrace(machine.trace):
        model.get_outputs_for_camera(camera)
    assert chunks == 2
    with pytest.raises(IOChangeException), SetTrace(machine.trace):
        model.get_outputs_for_camera(camera)
    assert chunks == 2, "none is begun"


def test_pictures_are_given_up_before_python_ends_their_threads(
    model: InfNeRFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "_leaving", threading.Event())
    begun, ended, machine = threading.Event(), [], Machine()
    model.on_evaluated = lambda _: begun.set()

    def page() -> None:
        while not ended:  # as nerfstudio's: the next one at once
            try:
                with SetTrace(machine.trace):
                    model.get_outputs_for_camera(tiny_camera(CameraType.PERSPECTIVE, 60.0, 480, 320))
            except IOChangeException as error:
                ended.append(error)

    thread = threading.Thread(target=page, daemon=True)
    thread.start()
    assert begun.wait(60)
    interruption._give_pictures_up()
    assert not interruption._pictures
    thread.join(10)
    assert ended and not thread.is_alive()


def test_other_trace_functions_stay(model: InfNeRFModel) -> None:
    seen = set()

    def coverage(frame: FrameType, event: str, argument: object) -> None:
        seen.add(Path(frame.f_code.co_filename).stem)

    before = sys.gettrace()
    sys.settrace(coverage)
    try:
        model.get_outputs_for_camera(tiny_camera(CameraType.PERSPECTIVE, 60.0, 12, 8))
        assert sys.gettrace() is coverage
    finally:
        sys.settrace(before)
    assert {"field", "sampler"} <= seen


def test_an_interrupted_thread_leaves_the_others_alone(model: InfNeRFModel) -> None:
    camera, machine = tiny_camera(CameraType.PERSPECTIVE, 60.0, 24, 16), Machine()
    machine.interrupt_render_flag = True
    ended: list[type] = []

    def page() -> None:
        try:
            with SetTrace(machine.trace):
                model.get_outputs_for_camera(camera)
        except IOChangeException as error:
            ended.append(type(error))

    thread = threading.Thread(target=page)
    thread.start()
    picture = model.get_outputs_for_camera(camera)["rgb"]
    thread.join()
    assert ended == [IOChangeException] and torch.isfinite(picture).all()
