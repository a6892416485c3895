"""The outputs of a finished batch, on their way into events; fetched again in a second attempt."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import BatchResult
from comfy_executors.workers.ledger import MadeBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedBatch:
    """What a batch made; outputs leave it one by one, so that their bytes can go.

    Args:
        outputs: By the places of their nodes in the graph, which are the same on every worker.
        prompt_id: The prompt on ComfyUI.
        seconds: How long it took.
    """

    outputs: deque[WorkflowOutput]
    prompt_id: str | None
    seconds: float

    @classmethod
    def of(cls, result: BatchResult, graph: Mapping[str, Any]) -> FinishedBatch:
        """Take over a result; its own lists may then go."""
        places = {node: place for place, node in enumerate(graph)}
        outputs: Iterable[WorkflowOutput] = (*result.images, *result.outputs)
        in_order = sorted(outputs, key=lambda o: places.get(o.node_id or "", len(places)))
        return cls(deque(in_order), result.prompt_id, result.seconds)


def fetch_again(made: MadeBatch, client: ComfyUIClient, waiter: JobWaiter) -> FinishedBatch | None:
    """Fetch what a batch made in an earlier attempt; None where that is gone or was changed."""
    outputs: deque[WorkflowOutput] = deque()
    for output in made.outputs:
        data = client.view(output.name, output.subfolder, output.type, waiter)
        if data is None or hashlib.sha256(data).hexdigest() != output.sha256:
            logger.info("a batch is run again: %s is gone or was changed", output.name)
            return None
        outputs.append(
            WorkflowOutput(
                data,
                name=output.name,
                subfolder=output.subfolder,
                type=output.type,
                node_id=output.node,
                cached=output.cached,
            )
        )
    return FinishedBatch(outputs, made.prompt_id, made.seconds)


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
