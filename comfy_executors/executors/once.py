"""Things that are done once for all threads, such as an upload."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from comfy_executors.executors.control import JobControl


class Once:
    """Remembers what was done, by a key; whoever needs it while it is being done waits.

    Args:
        most: How much is remembered; the oldest is forgotten first.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._done: dict[str, Future[None]] = {}

    def do(self, key: str, control: JobControl, action: Callable[[], object]) -> bool:
        """Do something unless it was done; tell whether it was done just now.

        Args:
            key: What it is known by.
            control: Its deadline and cancellation end the waiting for another thread.
            action: Does it; what it raises goes on, and the next one who needs it tries again.
        """
        while True:
            with self._lock:
                future = self._done.get(key)
                if future is None:
                    self._forget_oldest()
                    mine = self._done[key] = Future()
            if future is None:
                self._do_as_first(key, mine, action)
                return True
            control.wait_for(future)
            if future.exception() is None:
                return False
            # Whoever was first failed, perhaps only because its run was cancelled: our turn.

    def forget(self) -> None:
        """Have everything done again that is not being done just now."""
        with self._lock:
            self._done = {key: future for key, future in self._done.items() if not future.done()}

    def _forget_oldest(self) -> None:
        """Make room for one more; the lock is held."""
        done = [key for key, future in self._done.items() if future.done()]
        for key in done[: max(0, len(self._done) + 1 - self._most)]:
            del self._done[key]

    def _do_as_first(self, key: str, mine: Future[None], action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            with self._lock:
                self._done.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(None)
