"""What the node classes share: how they are registered, what they get and what they return.

A batch of images is a list of Pillow images in mode RGB, a batch of masks one in mode L.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from comfy_executors.devserver.files import Folders

Images = list[Image.Image]


class InterruptedNodeError(Exception):
    """Raised inside a node when its prompt is to stop."""


@dataclass(frozen=True)
class NodeResult:
    """What a node returns.

    Args:
        outputs: A value for each output slot.
        ui: What an output node reports, such as `{"images": [...]}`, or None.
    """

    outputs: tuple[Any, ...] = ()
    ui: dict[str, Any] | None = None


@dataclass(frozen=True)
class NodeContext:
    """What a node may use beside its inputs.

    Args:
        node_id: Its id.
        graph: The graph that it belongs to.
        extra_data: What the client sent along with the graph.
        folders: The server's folders.
        step_seconds: How long a sampling step takes, in seconds.
        stop: Set when the prompt is to stop.
        progress: Called with the steps done, the steps there are, and a preview or None as
            (bytes of the file, MIME type).
    """

    node_id: str
    graph: Mapping[str, Any]
    extra_data: Mapping[str, Any]
    folders: Folders
    step_seconds: float
    stop: threading.Event
    progress: Callable[[int, int, tuple[bytes, str] | None], None]

    def wait_until(self, deadline: float) -> None:
        """Wait until a time of `time.monotonic()`.

        Raises:
            InterruptedNodeError: The prompt is to stop.
        """
        left = deadline - time.monotonic()
        if self.stop.wait(left) if left > 0 else self.stop.is_set():
            raise InterruptedNodeError

    def steps(self, total: int, seconds: float) -> None:
        """Take a number of steps in a given time in seconds, reporting each."""
        started = time.monotonic()
        for step in range(1, total + 1):
            self.wait_until(started + seconds * step / total)
            self.progress(step, total, None)


NodeFunction = Callable[..., NodeResult]
FingerprintFunction = Callable[[Folders, Mapping[str, Any]], str]

NODES: dict[str, NodeFunction] = {}
FINGERPRINTS: dict[str, FingerprintFunction] = {}


def node(class_type: str) -> Callable[[NodeFunction], NodeFunction]:
    """Register a function as the work of a node class."""

    def register(function: NodeFunction) -> NodeFunction:
        NODES[class_type] = function
        return function

    return register


def fingerprint(class_type: str) -> Callable[[FingerprintFunction], FingerprintFunction]:
    """Register a function that tells, for a node class, what its inputs alone do not."""

    def register(function: FingerprintFunction) -> FingerprintFunction:
        FINGERPRINTS[class_type] = function
        return function

    return register
