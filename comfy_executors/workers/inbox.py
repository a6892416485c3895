"""What the threads of running batches have to say, for the one that hands out a job's events."""

from __future__ import annotations

import threading
import time
from collections import deque

from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import ProgressEvent
from comfy_executors.wire import ProgressStep

# Between two progress events of a batch: each is a request to RunPod, and wakes the one who follows
# the job.
_GAP_SECONDS = 0.25
_UNWATCHED_GAP_SECONDS = 5.0  # who takes up the job later sees it move all the same
_ALWAYS = {"queued", "started", "retry"}
_THINNED = {"node", "step"}


class Inbox:
    """Progress of batches, thinned, their outputs, and which of them are settled.

    Of the steps that come too fast the newest is kept and handed out a little later, so that
    memory is bounded, and what is shown at the end of a burst is where things stand.

    Args:
        is_watched: Whether somebody looks at the progress.

    Attributes:
        began: The batches that ComfyUI has begun.
    """

    def __init__(self, is_watched: bool) -> None:
        self.began: set[int] = set()
        self._is_watched = is_watched
        self._gap = _GAP_SECONDS if is_watched else _UNWATCHED_GAP_SECONDS
        self._changed = threading.Condition()
        self._first: deque[tuple[int, ProgressStep]] = deque()
        self._newest: dict[int, ProgressStep] = {}
        self._told: dict[int, float] = {}  # when a batch's newest step was handed out
        self._outputs: deque[tuple[int, WorkflowOutput]] = deque()
        self._settled: deque[int] = deque()
        self._cancelled = False

    def progress(self, batch: int, event: ProgressEvent) -> None:
        """Take a progress event of a batch; `done` and `failed` are left to `settle`."""
        step = ProgressStep(
            event.kind, event.node, event.title, event.step, event.max, event.message
        )
        with self._changed:
            if event.kind == "started":
                self.began.add(batch)
            if event.kind in _ALWAYS and self._is_watched:
                self._newest.pop(batch, None)  # it is of before
                self._first.append((batch, step))
            elif event.kind in _ALWAYS | _THINNED:
                if not self._is_watched:
                    self._told.setdefault(batch, time.monotonic())
                self._newest[batch] = step
            self._changed.notify_all()

    def output(self, batch: int, output: WorkflowOutput) -> None:
        """Take an output of a batch; one that comes after `settle` would be too late."""
        with self._changed:
            self._outputs.append((batch, output))
            self._changed.notify_all()

    def settle(self, batch: int) -> None:
        """Say that a batch has a result or an error."""
        with self._changed:
            self._settled.append(batch)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Make `get` raise from now on."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def get(self) -> tuple[int, ProgressStep | WorkflowOutput | None]:
        """Wait for news: a batch and its progress or output, or None where the batch is settled.

        Raises:
            WorkflowCancelledError: `cancel` was called.
        """
        with self._changed:
            while True:
                if self._cancelled:
                    raise WorkflowCancelledError("the job was cancelled")
                if self._first:
                    return self._first.popleft()
                if self._outputs:
                    return self._outputs.popleft()
                if self._settled:
                    batch = self._settled.popleft()
                    self._newest.pop(batch, None)
                    self._told.pop(batch, None)
                    return batch, None
                wait = self._next_due()
                if wait is not None and wait[1] <= 0:
                    batch = wait[0]
                    self._told[batch] = time.monotonic()
                    return batch, self._newest.pop(batch)
                self._changed.wait(None if wait is None else wait[1])

    def _next_due(self) -> tuple[int, float] | None:
        """Find the batch whose newest step may be told first, and in how many seconds."""
        now = time.monotonic()
        waits = [
            (self._told.get(batch, -self._gap) + self._gap - now, batch) for batch in self._newest
        ]
        if not waits:
            return None
        seconds, batch = min(waits)
        return batch, seconds
