"""What happened on the dev server, for tests to count and to wait for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(frozen=True)
class PromptRecord:
    """One accepted prompt.

    Args:
        prompt_id: Its id.
        number: Its place in the queue; lower runs earlier.
        client_id: Whose websocket hears of it.
        graph: The posted graph, values converted as the node classes want them.
        status: `pending`, `running`, `success`, `error`, `interrupted`, `deleted`, or `lost` in
            a restart.
        started: When it began to run (`time.monotonic()`), or None.
        ended: When it stopped running or waiting (`time.monotonic()`), or None.
        executed_nodes: The ids of the nodes that really ran, in order.
        cached_nodes: The ids of the nodes whose results were known from the prompt before.
    """

    prompt_id: str
    number: float
    client_id: str | None
    graph: Mapping[str, Any]
    status: str = "pending"
    started: float | None = None
    ended: float | None = None
    executed_nodes: list[str] = field(default_factory=list)
    cached_nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RequestRecord:
    """One request that was answered, or cut off on purpose.

    Args:
        method: The HTTP method.
        path: The path without the server's prefix and without `/api`.
        status: The HTTP status; None when the connection was reset instead.
        query: The query parameters; of a repeated one the last.
        headers: The request headers.
    """

    method: str
    path: str
    status: int | None
    query: dict[str, str]
    # Not shown: there may be a key among them.
    headers: dict[str, str] = field(repr=False)


def record_of(request: web.Request, path: str, status: int | None) -> RequestRecord:
    """Return the record of a request; see `RequestRecord`."""
    query = dict(request.query)
    return RequestRecord(request.method, path, status, query, dict(request.headers))


class Journal:
    """Keeps the records, and wakes those who wait for something to happen.

    The records are immutable, and a change replaces one: a list handed out stays as it was.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._prompts: list[PromptRecord] = []
        self._requests: list[RequestRecord] = []
        self._node_runs: Counter[str] = Counter()
        self._websockets = 0
        self._events = 0

    @property
    def prompts(self) -> list[PromptRecord]:
        """The accepted prompts, in the order of their arrival."""
        with self._changed:
            return list(self._prompts)

    @property
    def requests(self) -> list[RequestRecord]:
        """The requests, in the order in which they were answered."""
        with self._changed:
            return list(self._requests)

    @property
    def node_runs(self) -> Counter[str]:
        """How often nodes of each class really ran."""
        with self._changed:
            return Counter(self._node_runs)

    @property
    def open_websockets(self) -> int:
        """How many websockets are open."""
        with self._changed:
            return self._websockets

    def add_prompt(self, record: PromptRecord) -> int:
        """Add a prompt and return the key to change it by."""
        with self._changed:
            self._prompts.append(record)
            self._notify()
            return len(self._prompts) - 1

    def change_prompt(self, key: int, **changes: Any) -> None:
        """Replace fields of a prompt; one that `clear` has forgotten is left alone."""
        with self._changed:
            if key < len(self._prompts):
                self._prompts[key] = replace(self._prompts[key], **changes)
            self._notify()

    def node_ran(self, key: int, node_id: str, class_type: str) -> None:
        """Take note that a node of a prompt really ran."""
        with self._changed:
            self._node_runs[class_type] += 1
            self.change_prompt(key, executed_nodes=[*self._executed(key), node_id])

    def _executed(self, key: int) -> list[str]:
        return self._prompts[key].executed_nodes if key < len(self._prompts) else []

    def add_request(self, record: RequestRecord) -> None:
        """Add a request that was answered or cut off."""
        with self._changed:
            self._requests.append(record)
            self._notify()

    def count_websockets(self, number: int) -> None:
        """Take note of how many websockets are open."""
        with self._changed:
            self._websockets = number
            self._notify()

    def happened(self) -> None:
        """Say that something changed which is not kept here."""
        with self._changed:
            self._notify()

    def clear(self) -> None:
        """Forget all records; open websockets still count."""
        with self._changed:
            self._prompts.clear()
            self._requests.clear()
            self._node_runs.clear()
            self._notify()

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Return True once the predicate holds, or False after `timeout` seconds.

        The predicate runs outside the lock: a slow one must not stop the server.
        """
        deadline = time.monotonic() + timeout
        while True:
            seen = self._events
            if predicate():
                return True
            if not self._wait_for_event_after(seen, deadline):
                return False

    def _wait_for_event_after(self, seen: int, deadline: float) -> bool:
        with self._changed:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self._events != seen:
                    return True
                self._changed.wait(left)

    def _notify(self) -> None:
        self._events += 1
        self._changed.notify_all()
