"""Why a RunPod queue does not move, asked of the endpoint now and then."""

from __future__ import annotations

import logging
import threading
import time

from comfy_executors.clients.http import Waiter
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import RunPodHealth
from comfy_executors.errors import ServerError

logger = logging.getLogger(__name__)

_FRESH_SECONDS = 15.0


class QueueWatch:
    """Explains a queue that does not move, for all jobs of an executor together.

    Args:
        client: The endpoint.
    """

    def __init__(self, client: RunPodClient) -> None:
        self._client = client
        self.reset()

    def reset(self) -> None:
        """Start with a new lock, in the child of a fork."""
        self._lock = threading.Lock()
        self._asked = -_FRESH_SECONDS
        self._words = ""

    def explain(self, waiter: Waiter) -> str:
        """Return a sentence on the endpoint's workers, not older than 15 seconds.

        It is empty until somebody got an answer. Raises what the waiter does.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._asked < _FRESH_SECONDS:
                return self._words
            self._asked = now  # one asks, the others go on with what is known
        try:
            words = describe(self._client.health(waiter))
        except ServerError as error:
            logger.debug("the state of %s is not known: %s", self._client.url, error)
            return self._words
        with self._lock:
            self._words = words
        return words


def describe(health: RunPodHealth) -> str:
    """Put the state of an endpoint into a sentence, with what to do about it."""
    workers, waiting = health.workers, health.jobs.in_queue
    if workers.unhealthy:
        why = f"{_workers(workers.unhealthy)} unhealthy: look at their logs on RunPod"
    elif workers.running:
        why = f"{_workers(workers.running)} busy: raise the endpoint's max workers, or wait"
    elif workers.initializing:
        why = f"{_workers(workers.initializing)} starting: a cold start loads the image first"
    elif workers.throttled:
        why = (
            f"{_workers(workers.throttled)} throttled: RunPod has no free GPU of this kind, "
            "allow other kinds or data centres"
        )
    elif workers.idle or workers.ready:
        why = f"{_workers(max(workers.idle, workers.ready))} idle and should take one soon"
    else:
        why = "there are no workers: is the endpoint's max workers above 0?"
    return f"{waiting} {'job waits' if waiting == 1 else 'jobs wait'}, and {why}"


def _workers(count: int) -> str:
    return f"{count} {'worker is' if count == 1 else 'workers are'}"
