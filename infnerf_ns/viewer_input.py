"""What a page of the viewer may send: kinds of messages, and values within what its controls offer.

viser sets whatever attribute a message names to whatever value it holds, and nerfstudio computes with it: a width of
nothing, a field of view of NaN or an entry that a list does not have end the thread that renders; a text with slashes
becomes the name of a file that is written. Everything a page sends passes here first. What is a little off (a number
beyond its slider's end) is clamped, anything else is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
import viser

from infnerf_ns.validation import warn

CAMERA = "ViewerCameraMessage"
"""The kind of message by which a page says where its camera is."""
_LARGEST = 1e9
"""Of numbers without limits of their own; they stay finite in float32 whatever the viewer does with them."""
_FIELD_OF_VIEW = (0.01, 3.1)
"""Radians."""
_ASPECT = (1 / 16, 16)
"""Width / height: pictures of the least resolution of the panel still have several rows and columns."""
_LONGEST_TEXT = 200
_TEXT = re.compile(r"[\w .\-/~+=@,:]+")
"""In commands that the panel shows to be copied into a shell."""
_FILE_NAME = re.compile(r"\w[\w .\-]*")
_FILE_NAME_LABEL = "Render name"
"""nerfstudio's text box whose value becomes the name of a file (``camera_paths/NAME.json``)."""
_COLORS = {"GuiAddRgbMessage", "GuiAddRgbaMessage"}


class _Refused(Exception):
    """A message that is left out."""


class PageMessages:
    """Checks the messages of all pages of one viewer.

    Args:
        share: a page may ask for viser's public address.
    """

    def __init__(self, share: bool = False) -> None:
        self.server: viser.ViserServer | None = None
        """whose controls the messages set; until it is known, none is set"""
        self._checks: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            CAMERA: _camera,
            "GuiUpdateMessage": self._control,
            "TransformControlsUpdateMessage": _transform,
            "SceneNodeClickMessage": _node_click,
            "ScenePointerMessage": _pointer,
        }
        if share:
            self._checks |= {"ShareUrlRequest": lambda _: {}, "ShareUrlDisconnect": lambda _: {}}
        self._limits: dict[str, Any] = {}
        self._said: set[str] = set()

    def cleaned(self, raw: object, *, placed: bool = True) -> bytes | None:
        """A message that may be handed on, in MessagePack; None for one that must not.

        Args:
            raw: as it came over the websocket.
            placed: the page has said where its camera is. Before that viser knows no such page, and every other message
                of it would be an error.
        """
        kind = "unreadable"
        try:
            if not isinstance(raw, bytes):
                raise _Refused
            content = msgspec.msgpack.decode(raw)
            kind = content.get("type") if isinstance(content, dict) else None
            if not isinstance(kind, str) or kind not in self._checks or not (placed or kind == CAMERA):
                raise _Refused
            return msgspec.msgpack.encode({**self._checks[kind](content), "type": kind})
        except (_Refused, msgspec.MsgspecError, ValueError, RecursionError):
            self._say(kind if isinstance(kind, str) and kind in self._checks else "of no known kind")
            return None

    def _say(self, kind: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(f"the viewer leaves out what a page has sent, as it makes no sense ({kind}); this is said once")

    def _control(self, content: dict[str, Any]) -> dict[str, Any]:
        number, updates = content.get("id"), content.get("updates")
        if not isinstance(number, str) or not isinstance(updates, dict) or list(updates) != ["value"]:
            raise _Refused
        handle = self._find(number)
        return {"id": number, "updates": {"value": self._value(handle, updates["value"])}}

    def _find(self, number: str) -> Any:
        """The control with that number, which all pages share or one page has for itself (a dialog)."""
        if self.server is None:
            raise _Refused
        handle = self.server.gui._gui_input_handle_from_id.get(number)
        for client in () if handle is not None else self.server.get_clients().values():
            handle = handle or client.gui._gui_input_handle_from_id.get(number)
        if handle is None:
            raise _Refused
        return handle

    def _value(self, handle: Any, value: object) -> object:
        current, message = handle._impl.value, self._message(handle._impl.id)
        choices = getattr(handle, "options", None) or getattr(message, "options", None)
        if isinstance(current, bool):
            if not isinstance(value, bool):
                raise _Refused
            return value
        if choices is not None:
            if value not in choices:
                raise _Refused
            return value
        if isinstance(current, str):
            return _text(value, handle._impl.label)
        low, high = getattr(message, "min", None), getattr(message, "max", None)
        if type(message).__name__ in _COLORS:
            low, high = 0, 255
        if isinstance(current, tuple):
            if not isinstance(value, (list, tuple)) or len(value) != len(current):
                raise _Refused
            ends = [[end] * len(value) if not isinstance(end, tuple) else end for end in (low, high)]
            return [_number(*each) for each in zip(value, current, *ends)]
        if isinstance(current, (int, float)):
            return _number(value, current, low, high)
        raise _Refused

    def _message(self, number: str) -> Any:
        """The message that has put a control on the page; it states the control's limits, its handle does not."""
        assert self.server is not None
        if number not in self._limits:
            sent = list(self.server._websock_server._broadcast_buffer.message_from_id.values())
            added = (message for message in sent if type(message).__name__.startswith("GuiAdd"))
            self._limits[number] = next((message for message in added if message.id == number), None)
        return self._limits[number]


def _number(value: object, current: float, low: float | None, high: float | None) -> float:
    """A finite number within the limits, a whole one where the control's is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Refused
    bounded = clamped(value, -_LARGEST if low is None else low, _LARGEST if high is None else high)
    return round(bounded) if isinstance(current, int) else float(bounded)


def clamped(value: float, low: float, high: float) -> float:
    """A number within limits.

    Raises:
        ValueError: it is NaN.
    """
    if math.isnan(value):
        raise ValueError("not a number")
    return min(max(value, low), high)


def _text(value: object, label: str) -> str:
    pattern = _FILE_NAME if label == _FILE_NAME_LABEL else _TEXT
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not pattern.fullmatch(value):
        raise _Refused
    return value


def _vector(value: object, length: int) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise _Refused
    if not all(isinstance(each, (int, float)) and math.isfinite(each) and abs(each) <= _LARGEST for each in value):
        raise _Refused
    return [float(each) for each in value]


def _rotation(value: object) -> list[float]:
    """A quaternion of length 1."""
    quaternion = _vector(value, 4)
    length = math.hypot(*quaternion)
    if length < 1e-6:
        raise _Refused
    return quaternion if abs(length - 1) < 1e-3 else [each / length for each in quaternion]


def _within(value: object, limits: tuple[float, float]) -> float:
    return clamped(*_vector([value], 1), *limits)


def _camera(content: dict[str, Any]) -> dict[str, Any]:
    return {
        "wxyz": _rotation(content.get("wxyz")),
        "position": _vector(content.get("position"), 3),
        "fov": _within(content.get("fov"), _FIELD_OF_VIEW),
        "aspect": _within(content.get("aspect"), _ASPECT),
        "look_at": _vector(content.get("look_at"), 3),
        "up_direction": _vector(content.get("up_direction"), 3),
    }


def _name(content: dict[str, Any]) -> str:
    name = content.get("name")
    if not isinstance(name, str):
        raise _Refused
    return name


def _transform(content: dict[str, Any]) -> dict[str, Any]:
    rotation, position = _rotation(content.get("wxyz")), _vector(content.get("position"), 3)
    return {"name": _name(content), "wxyz": rotation, "position": position}


def _node_click(content: dict[str, Any]) -> dict[str, Any]:
    index = content.get("instance_index")
    if index is not None and type(index) is not int:
        raise _Refused
    return {
        "name": _name(content),
        "instance_index": index,
        "ray_origin": _vector(content.get("ray_origin"), 3),
        "ray_direction": _vector(content.get("ray_direction"), 3),
        "screen_pos": _vector(content.get("screen_pos"), 2),
    }


def _pointer(content: dict[str, Any]) -> dict[str, Any]:
    places = content.get("screen_pos")
    if content.get("event_type") not in ("click", "rect-select") or not isinstance(places, list):
        raise _Refused
    rays = {key: content.get(key) for key in ("ray_origin", "ray_direction")}
    return {
        "event_type": content["event_type"],
        **{key: None if ray is None else _vector(ray, 3) for key, ray in rays.items()},
        "screen_pos": [_vector(place, 2) for place in places],
    }
