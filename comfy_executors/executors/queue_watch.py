"""Whether the queue of a serverless backend moves, and why it does not.

That it moves is seen by our own jobs; why it does not is asked of the backend now and then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.errors import ServerError, WaitTimeoutError

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 15.0


class QueueWatch:
    """Knows when a queue last moved, and explains one that does not, for all jobs of an executor.

    Args:
        ask: Asks the backend for its state, and puts that into a sentence.
    """

    def __init__(self, ask: Callable[[Waiter], str]) -> None:
        self._ask = ask
        self.reset()

    def reset(self) -> None:
        """Start with a new lock, in the child of a fork."""
        self._lock = threading.Lock()
        self._asked = -_FRESH_SECONDS
        self._words = ""
        self._moved_at = float("-inf")

    def note_move(self) -> None:
        """Take down that a job has left the queue for a worker, or a worker for good."""
        with self._lock:
            self._moved_at = time.monotonic()

    @property
    def moved_at(self) -> float:
        """When the queue moved last, as `time.monotonic` tells it."""
        with self._lock:
            return self._moved_at

    @property
    def words(self) -> str:
        """What was last known, or empty; nobody is asked."""
        with self._lock:
            return self._words

    def explain(self, waiter: Waiter, seconds: float) -> str:
        """Return a sentence on the backend's workers, not older than 15 seconds.

        It is empty until somebody got an answer.

        Args:
            waiter: Ends the call when the job is cancelled, or its deadline passes.
            seconds: How long the backend may take for it, all repetitions together: the job
                is not looked after meanwhile.

        Raises:
            WorkflowCancelledError, WorkflowTimeoutError: As the waiter says.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._asked < _FRESH_SECONDS:
                return self._words
            self._asked = now  # one asks, the others go on with what is known
        try:
            words = self._ask(_BriefWaiter(waiter, seconds))
        except (ServerError, WaitTimeoutError) as error:
            logger.debug("the state of the queue is not known: %s", error)
            return self.words
        with self._lock:
            self._words = words
        return words


class _BriefWaiter(DeadlineWaiter):
    """A waiter for so many seconds, which another one may end before."""

    def __init__(self, waiter: Waiter, seconds: float) -> None:
        super().__init__(seconds)
        self._waiter = waiter

    def sleep(self, seconds: float) -> None:
        self._waiter.sleep(self.limit(seconds))

    def limit(self, seconds: float) -> float:
        return super().limit(self._waiter.limit(seconds))

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        return self._waiter.interrupting(interrupt)
