"""When a job on RunPod is asked for: how long polls wait, how far apart they are.

RunPod holds a poll of the stream until there is something, so that waiting costs little and news
come at once. What a worker sends comes in bursts, chunk by chunk: after the first one the next poll
is left a moment, to bring the rest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from comfy_executors.clients.http import Waiter

LEAST_WAIT = 1.0  # the shortest that RunPod holds an answer
_FIRST_WAIT = 2.0
_LONGEST_WAIT = 5.0
_FIRST_PAUSE = 0.5
_GROWTH = 1.5
_HELD_SECONDS = 0.9 * LEAST_WAIT
_POLLS_PER_SECOND = 2.5  # while images come
_SAVED_POLLS = 2.0  # how many may follow each other at once after a quiet time
_GATHER_SECONDS = 0.03  # from news to the next poll


class Pace:
    """How long the polls of a job wait, and how far apart they are.

    Args:
        is_crowded: Tells whether so many jobs are followed that none may hold a poll for long.
    """

    def __init__(self, is_crowded: Callable[[], bool]) -> None:
        self._is_crowded = is_crowded
        self._wait = _FIRST_WAIT
        self._pause = _FIRST_PAUSE
        self._begun = time.monotonic()
        self._saved = _SAVED_POLLS
        self._next = self._begun

    def begin(self, waiter: Waiter) -> float:
        """Wait for the next poll's turn; return the seconds that RunPod may hold it."""
        self._save()
        left = max(self._next - self._begun, (1.0 - self._saved) / _POLLS_PER_SECOND)
        if left > 0:
            waiter.sleep(left)
            self._save()
        self._saved -= 1.0
        return LEAST_WAIT if self._is_crowded() else self._wait

    def _save(self) -> None:
        """Go on to the present time; what was not polled meanwhile may be polled later."""
        now = time.monotonic()
        more = (now - self._begun) * _POLLS_PER_SECOND
        self._saved = min(_SAVED_POLLS, self._saved + more)
        self._begun = now

    def end(self, is_news: bool, waiter: Waiter) -> None:
        """Take down what a poll brought; after an answer that was not held, wait here."""
        now = time.monotonic()
        if is_news:
            self._wait, self._pause = _FIRST_WAIT, _FIRST_PAUSE
            self._next = now + _GATHER_SECONDS
            return
        if now - self._begun < _HELD_SECONDS or self._is_crowded():
            self.rest(waiter)
        self._wait = min(_LONGEST_WAIT, _GROWTH * self._wait)

    def rest(self, waiter: Waiter) -> None:
        """Wait longer from time to time, and not in step with others."""
        waiter.sleep(self._pause * random.uniform(0.8, 1.2))
        self._pause = min(_LONGEST_WAIT, _GROWTH * self._pause)
