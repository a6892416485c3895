"""The queue of prompts and the history of those that ran."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.devserver.records import Journal, PromptRecord

_HISTORY_LIMIT = 10_000


@dataclass(eq=False)
class Prompt:
    """A graph that was accepted.

    Args:
        number: Its place in the queue; lower runs earlier.
        prompt_id: Its id; the server never refuses one that was used before.
        graph: The nodes by id.
        extra_data: What the client sent along, with `client_id` and `create_time`.
        outputs: The ids of the output nodes to run.
    """

    number: float
    prompt_id: str
    graph: dict[str, Any]
    extra_data: dict[str, Any]
    outputs: list[str]
    key: int = -1
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def client_id(self) -> str | None:
        """Whose websocket hears of it."""
        return self.extra_data.get("client_id")

    def describe(self) -> list[Any]:
        """Return it as the queue and the history list it."""
        return [self.number, self.prompt_id, self.graph, self.extra_data, self.outputs]


class PromptQueue:
    """What waits, what runs and what ran.

    Every change of state is one locked step, and the `status` event about it is put on its way in
    that same step, so that clients see the numbers in the right order.

    Args:
        journal: Where the records of the prompts are kept.
        send_status: Called with the number of prompts that wait or run; it must not block.
    """

    def __init__(self, journal: Journal, send_status: Callable[[int], None]) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._journal = journal
        self._send_status = send_status
        self._pending: list[tuple[float, int, Prompt]] = []
        self._arrivals = itertools.count()
        self._running: Prompt | None = None
        self._history: dict[str, dict[str, Any]] = {}
        self._closed = False

    @property
    def remaining(self) -> int:
        """How many prompts wait or run."""
        return len(self._pending) + (self._running is not None)

    def put(self, prompt: Prompt) -> None:
        """Add a prompt; one that comes after the close is dropped."""
        with self._changed:
            if self._closed:
                return
            prompt.key = self._journal.add_prompt(
                PromptRecord(prompt.prompt_id, prompt.number, prompt.client_id, prompt.graph)
            )
            heapq.heappush(self._pending, (prompt.number, next(self._arrivals), prompt))
            self._send_status(self.remaining)
            self._changed.notify()

    def get(self) -> Prompt | None:
        """Wait for the next prompt, which is then the running one; None once the queue closed."""
        with self._changed:
            while not self._pending and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._running = heapq.heappop(self._pending)[2]
            self._send_status(self.remaining)
            return self._running

    def finish(self, prompt: Prompt, entry: dict[str, Any]) -> bool:
        """Move the running prompt to the history; False if the queue was closed meanwhile."""
        with self._changed:
            if self._closed:
                return False
            self._running = None
            self._history[prompt.prompt_id] = entry
            if len(self._history) > _HISTORY_LIMIT:
                del self._history[next(iter(self._history))]
            self._send_status(self.remaining)
            return True

    def delete(self, prompt_id: str) -> bool:
        """Remove a pending prompt; False when none has this id."""
        with self._changed:
            for entry in self._pending:
                if entry[2].prompt_id == prompt_id:
                    self._pending.remove(entry)
                    heapq.heapify(self._pending)
                    self._send_deletion_status()
                    self._mark([entry[2]], "deleted")
                    return True
            return False

    def _send_deletion_status(self) -> None:
        # The real server announces the removal of the last pending prompt twice (recording 07).
        self._send_status(self.remaining)
        if not self._pending:
            self._send_status(self.remaining)

    def clear(self) -> None:
        """Remove every pending prompt."""
        with self._changed:
            deleted = [entry[2] for entry in self._pending]
            self._pending.clear()
            self._send_status(self.remaining)
            self._mark(deleted, "deleted")

    def interrupt(self, prompt_id: str | None) -> bool:
        """Stop the running prompt; with an id only if it has this id."""
        with self._changed:
            if self._running is None or prompt_id not in (None, self._running.prompt_id):
                return False
            stopped_now = not self._running.stop.is_set()
            self._running.stop.set()
            return stopped_now

    def cancel(self, prompt_id: str) -> bool:
        """Remove a pending prompt or stop the running one, in one step."""
        with self._changed:
            return self.delete(prompt_id) or self.interrupt(prompt_id)

    def close(self) -> None:
        """Drop everything; what had not ended is lost."""
        with self._changed:
            self._closed = True
            lost = [entry[2] for entry in self._pending]
            if self._running is not None:
                lost.append(self._running)
                self._running.stop.set()
            self._pending.clear()
            self._running = None
            self._mark(lost, "lost")
            self._changed.notify_all()

    def _mark(self, prompts: Iterable[Prompt], status: str) -> None:
        now = time.monotonic()
        for prompt in prompts:
            self._journal.change_prompt(prompt.key, status=status, ended=now)

    def snapshot(self) -> tuple[list[Prompt], list[Prompt]]:
        """Return what runs and what waits, in the order in which it will run."""
        with self._changed:
            running = [] if self._running is None else [self._running]
            return running, [entry[2] for entry in sorted(self._pending)]

    def find(self, prompt_id: str) -> tuple[Prompt | dict[str, Any] | None, bool]:
        """Return a prompt that waits or runs, or the history entry of one, and whether it runs."""
        with self._changed:
            running, pending = self.snapshot()
            for prompt in running + pending:
                if prompt.prompt_id == prompt_id:
                    return prompt, prompt in running
            return self._history.get(prompt_id), False

    def history(self, max_items: int | None = None, offset: int = -1) -> dict[str, Any]:
        """Return history entries, the newest last.

        Args:
            max_items: How many at most; None for all.
            offset: The first one's index; below 0 the newest `max_items` are returned.
        """
        with self._changed:
            items = list(self._history.items())
        if max_items is None:
            return dict(items[max(offset, 0) :])
        start = offset if offset >= 0 else max(len(items) - max_items, 0)
        return dict(items[start : start + max_items])

    def history_of(self, prompt_id: str) -> dict[str, Any]:
        """Return the history of one prompt, by its id; empty while there is none."""
        with self._changed:
            entry = self._history.get(prompt_id)
        return {} if entry is None else {prompt_id: entry}

    def forget(self, prompt_ids: Iterable[str] | None) -> None:
        """Remove entries from the history; None for all."""
        with self._changed:
            for prompt_id in list(self._history) if prompt_ids is None else prompt_ids:
                self._history.pop(prompt_id, None)
