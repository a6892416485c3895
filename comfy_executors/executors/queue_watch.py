"""Why the queue of a serverless backend does not move, asked of the backend now and then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from comfy_executors.clients.http import Waiter
from comfy_executors.errors import ServerError

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 15.0


class QueueWatch:
    """Explains a queue that does not move, for all jobs of an executor together.

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

    def explain(self, waiter: Waiter) -> str:
        """Return a sentence on the backend's workers, not older than 15 seconds.

        It is empty until somebody got an answer. Raises what the waiter does.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._asked < _FRESH_SECONDS:
                return self._words
            self._asked = now  # one asks, the others go on with what is known
        try:
            words = self._ask(waiter)
        except ServerError as error:
            logger.debug("the state of the queue is not known: %s", error)
            return self._words
        with self._lock:
            self._words = words
        return words
