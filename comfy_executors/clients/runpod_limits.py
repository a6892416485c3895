"""Staying below RunPod's rate limits, which hold for an endpoint and key, not for a client."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from comfy_executors.clients.http import Waiter

# How often a call that waits for its turn looks whether it was cancelled, in seconds.
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Limit:
    """How many calls there may be.

    Args:
        calls: In any 10 seconds.
        concurrent: At once.
        window: The seconds that `calls` are counted in.
    """

    calls: int
    concurrent: int
    window: float = 10.0


# Four fifths of the documented numbers: another process may use the same endpoint and key. Those
# that RunPod does not publish (retry, health) are guesses on the safe side.
LIMITS = {
    "run": Limit(800, 160),
    "status": Limit(1600, 320),
    "stream": Limit(1600, 320),
    "cancel": Limit(80, 16),
    "retry": Limit(80, 16),
    "health": Limit(10, 2),
    "purge-queue": Limit(1, 1),
}


class RateLimiter:
    """Lets calls of one kind pass as a limit allows.

    Args:
        limit: The limit.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._starts: deque[float] = deque(maxlen=limit.calls)
        self._running = 0
        self._closed_until = 0.0

    @contextmanager
    def turn(self, waiter: Waiter) -> Iterator[None]:
        """Wait for a turn, and hold it while the block runs; what the waiter raises goes on."""
        self._enter(waiter)
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify()

    @property
    def is_crowded(self) -> bool:
        """Whether more than a third of the calls that may run at once do."""
        return 3 * self._running > self._limit.concurrent

    def pause(self, seconds: float) -> None:
        """Let nobody pass for so long, because the service says that there were too many calls."""
        with self._changed:
            self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def _enter(self, waiter: Waiter) -> None:
        while True:
            # Outside the lock: it is the caller's code, and raises when the caller is cancelled.
            patience = waiter.limit(_LOOK_SECONDS)
            with self._changed:
                now = time.monotonic()
                delay = self._delay(now)
                if delay <= 0:
                    self._starts.append(now)
                    self._running += 1
                    return
                self._changed.wait(min(delay, patience))

    def _delay(self, now: float) -> float:
        """Return the seconds until a call may pass: 0 for at once, infinity for nobody knows."""
        if self._running >= self._limit.concurrent:
            return float("inf")
        delay = self._closed_until - now
        if len(self._starts) == self._limit.calls:
            delay = max(delay, self._starts[0] + self._limit.window - now)
        return max(0.0, delay)


class EndpointLimiter:
    """The limiters of one endpoint and key, by operation."""

    def __init__(self) -> None:
        self._limiters = {name: RateLimiter(limit) for name, limit in LIMITS.items()}

    def __getitem__(self, operation: str) -> RateLimiter:
        return self._limiters[operation]


_lock = threading.Lock()
_shared: WeakValueDictionary[tuple[str, str], EndpointLimiter] = WeakValueDictionary()


def limiter_of(endpoint_url: str, key_digest: str) -> EndpointLimiter:
    """Return the limiter that all clients of the process share for an endpoint and key."""
    with _lock:
        return _shared.setdefault((endpoint_url, key_digest), EndpointLimiter())


def _forget_after_fork() -> None:
    # The parent's threads, which may hold the locks, do not exist here.
    global _lock, _shared
    _lock = threading.Lock()
    _shared = WeakValueDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
