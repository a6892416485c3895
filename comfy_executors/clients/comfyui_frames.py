"""What the frames of a ComfyUI websocket say; no I/O here."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, Union

logger = logging.getLogger(__name__)

# Sent at each step with the state of every node; `progress` says what is new in it.
_PROGRESS_STATE = b'{"type": "progress_state"'
_IMAGE, _IMAGE_WITH_METADATA = 1, 4
_SUFFIXES = {1: ".jpg", 2: ".png"}
# What JSON of any shape can raise; the last for brackets nested a thousand deep.
_NOT_UNDERSTOOD = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class PromptEvent(NamedTuple):
    """A message about a prompt: its type and data as the server sent them."""

    type: str
    prompt_id: str
    data: Mapping[str, Any]


class ImageEvent(NamedTuple):
    """An image that came over the websocket: a preview, or the output of a websocket node."""

    prompt_id: str
    node_id: str
    suffix: str
    data: bytes


class ConnectionLost(NamedTuple):
    """No more events come for the prompts that were posted under this client id."""

    client_id: str


Event = Union[PromptEvent, ImageEvent, ConnectionLost]


class EventParser:
    """Turns the frames of one connection into events; does no I/O.

    Images of servers without the feature flag name no prompt: they belong to the node that
    `executing` named last on the same connection.
    """

    def __init__(self) -> None:
        self._executing: tuple[str, str] | None = None

    def text(self, frame: bytes) -> PromptEvent | None:
        """Parse a text frame; None for messages about no prompt, and for what is no message."""
        if frame.startswith(_PROGRESS_STATE):
            return None
        try:
            message = json.loads(frame)
            kind, data = message["type"], message["data"]
            # After a reconnect the server repeats `executing` without a prompt id.
            prompt_id = data.get("prompt_id")
        except _NOT_UNDERSTOOD:
            return None
        if not isinstance(prompt_id, str):
            return None
        if kind == "executing":
            node = data.get("node")
            self._executing = None if node is None else (prompt_id, str(node))
        return PromptEvent(str(kind), prompt_id, data)

    def binary(self, frame: bytes) -> ImageEvent | None:
        """Parse a binary frame; None for kinds that are no images."""
        try:
            (kind,) = struct.unpack_from(">I", frame)
            if kind == _IMAGE_WITH_METADATA:
                return _image_with_metadata(frame)
            if kind == _IMAGE and self._executing is not None:
                (image_format,) = struct.unpack_from(">I", frame, 4)
                suffix = _SUFFIXES.get(image_format, ".png")
                return ImageEvent(*self._executing, suffix, frame[8:])
        except (struct.error, *_NOT_UNDERSTOOD):
            logger.warning("a binary websocket frame of %d bytes is not understood", len(frame))
        return None


def _image_with_metadata(frame: bytes) -> ImageEvent:
    (length,) = struct.unpack_from(">I", frame, 4)
    about = json.loads(frame[8 : 8 + length])
    suffix = ".jpg" if about.get("image_type") == "image/jpeg" else ".png"
    prompt_id, node_id = str(about["prompt_id"]), str(about["node_id"])
    return ImageEvent(prompt_id, node_id, suffix, frame[8 + length :])
