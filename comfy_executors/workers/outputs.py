"""The outputs of a batch on their way into events; fetched again in a second attempt."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import BatchResult
from comfy_executors.workers.ledger import MadeBatch, MadeOutput

logger = logging.getLogger(__name__)


class OutgoingBatch:
    """The outputs of a batch as they are passed on, and what becomes of them.

    Args:
        graph: The batch's graph.
    """

    def __init__(self, graph: Mapping[str, Any]) -> None:
        self._places = {node: place for place, node in enumerate(graph)}
        self._counts: Counter[str | None] = Counter()
        self._prompt_id: str | None = None
        self._sent: list[tuple[WorkflowOutput, MadeOutput]] = []

    def add(self, output: WorkflowOutput) -> MadeOutput:
        """Number an output, which follows from its node and its place among those of the node."""
        if output.prompt_id != self._prompt_id:  # the batch is run again
            self._prompt_id = output.prompt_id
            self._counts.clear()
        node = output.node_id
        number = self._counts[node] * (len(self._places) + 1) + self._place(node)
        self._counts[node] += 1
        made = MadeOutput.of(number, output)
        self._sent.append((output, made))
        return made

    def finish(self, result: BatchResult) -> tuple[MadeOutput, ...]:
        """Return what of it is in the batch's result, in the order of the nodes."""
        final = {id(output) for output in (*result.images, *result.outputs)}
        made = [item for output, item in self._sent if id(output) in final]
        return tuple(sorted(made, key=lambda item: (self._place(item.node), item.number)))

    def _place(self, node: str | None) -> int:
        return self._places.get(node or "", len(self._places))


def fetch_again(
    made: MadeBatch, client: ComfyUIClient, waiter: JobWaiter
) -> deque[tuple[MadeOutput, bytes]] | None:
    """Fetch what a batch made in an earlier attempt; None where that is gone or was changed."""
    found: deque[tuple[MadeOutput, bytes]] = deque()
    for output in made.outputs:
        data = client.view(output.name, output.subfolder, output.type, waiter)
        if data is None or hashlib.sha256(data).hexdigest() != output.sha256:
            logger.info("a batch is run again: %s is gone or was changed", output.name)
            return None
        found.append((output, data))
    return found


class JobWaiter:
    """The waiter of a job's own calls: each gets its time, and a cancellation ends them all."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Make every call end with WorkflowCancelledError, the present one soon."""
        self._cancelled.set()

    def sleep(self, seconds: float) -> None:
        """Wait, or raise WorkflowCancelledError."""
        self._cancelled.wait(seconds)
        self.limit(seconds)

    def limit(self, seconds: float) -> float:
        """Return the time limit as it is, or raise WorkflowCancelledError."""
        if self._cancelled.is_set():
            raise WorkflowCancelledError("the job was cancelled")
        return seconds

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Leave the present call to its own time limit: ComfyUI is on the same machine."""
        return contextlib.nullcontext()
