"""The ways in which the dev server can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_BAD_GATEWAY = (
    "<html><head><title>502 Bad Gateway</title></head><body>502 Bad Gateway</body></html>"
)


@dataclass
class Rule:
    """What happens to matching requests.

    Args:
        kind: `fail`, `fail_after`, `delay`, `reset_before`, `reset_after` or `truncate`.
        method: The HTTP method.
        path: A glob for the path, without the server's prefix and without `/api`.
        left: How many more requests it applies to; None for all.
        status: The HTTP status of a `fail` or `fail_after`.
        body: The body of a `fail` or `fail_after`.
        headers: The headers of a `fail` or `fail_after`.
        seconds: The time of a `delay`.
    """

    kind: str
    method: str
    path: str
    left: int | None
    status: int = 502
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        """Tell whether it applies to a request, and is not used up."""
        return self.left != 0 and self.method == method and fnmatchcase(path, self.path)


class Faults:
    """Misbehaviour that can be switched on and off at any time, from any thread.

    Paths are globs (`/prompt`, `/view`, `/history/*`) without the server's prefix; they reach a
    route in both of its forms, `/prompt` and `/api/prompt`. `times` is how many requests a fault
    hits, None meaning all until `clear`. A request meets every delay that matches, then the oldest
    of the other faults that match.

    Attributes:
        silence_websockets: Websockets stay open, but no message is sent; messages are lost.
        refuse_websockets: A websocket upgrade is answered with status 503.
        deaf_reconnect: A websocket that reconnects under the client id of one that closes later
            hears nothing from then on, as seen on real servers.
        drop_websocket_after: A message type, such as `executed`: the connection is reset right
            after such a message, once. `before:executed` resets it instead of sending. Binary
            frames are called `preview`.
        history_delay: How long in seconds the history entry of a prompt comes after its
            `execution_success`, `execution_error` or `execution_interrupted`.
    """

    def __init__(self, on_refuse: Callable[[bool], None]) -> None:
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._on_refuse = on_refuse
        self._refuse_connections = False
        self.silence_websockets = False
        self.refuse_websockets = False
        self.deaf_reconnect = False
        self.drop_websocket_after: str | None = None
        self.history_delay = 0.0

    @property
    def refuse_connections(self) -> bool:
        """Whether new connections are refused; idle ones are closed when this becomes True.

        Open websockets and requests that are being answered go on. When the setter returns, the
        change has been made; the port stays reserved and is the same afterwards.
        """
        return self._refuse_connections

    @refuse_connections.setter
    def refuse_connections(self, value: bool) -> None:
        if value != self._refuse_connections:
            self._refuse_connections = value
            self._on_refuse(value)

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int = 502,
        body: str = _BAD_GATEWAY,
        headers: Mapping[str, str] | None = None,
        times: int | None = 1,
    ) -> None:
        """Answer matching requests with this instead; an HTML page unless the headers say so."""
        self._add(_failing("fail", method, path, times, status, body, headers))

    def fail_after(
        self,
        method: str,
        path: str,
        *,
        status: int = 502,
        body: str = _BAD_GATEWAY,
        headers: Mapping[str, str] | None = None,
        times: int | None = 1,
    ) -> None:
        """Process the request, then answer with this instead, as a proxy does that lost it."""
        self._add(_failing("fail_after", method, path, times, status, body, headers))

    def delay(self, method: str, path: str, seconds: float, times: int | None = None) -> None:
        """Let matching requests wait before they are looked at."""
        self._add(Rule("delay", method, path, times, seconds=seconds))

    def reset_before(self, method: str, path: str, times: int | None = 1) -> None:
        """Reset the connection before the request is looked at: nothing has happened."""
        self._add(Rule("reset_before", method, path, times))

    def reset_after(self, method: str, path: str, times: int | None = 1) -> None:
        """Process the request, then reset the connection instead of answering."""
        self._add(Rule("reset_after", method, path, times))

    def truncate(self, method: str, path: str, times: int | None = 1) -> None:
        """Announce the whole length, send half of the body, then close the connection."""
        self._add(Rule("truncate", method, path, times))

    def clear(self) -> None:
        """Switch every fault off."""
        with self._lock:
            self._rules.clear()
        self.silence_websockets = False
        self.refuse_websockets = False
        self.deaf_reconnect = False
        self.drop_websocket_after = None
        self.history_delay = 0.0
        self.refuse_connections = False

    def _add(self, rule: Rule) -> None:
        rule.method = rule.method.upper()
        rule.path = plain_path(rule.path)
        with self._lock:
            self._rules.append(rule)

    def take(self, method: str, path: str) -> list[Rule]:
        """Return what is to happen to a request, counting each rule as used once."""
        if not self._rules:
            return []
        with self._lock:
            matching = [rule for rule in self._rules if rule.matches(method, path)]
            delays = [rule for rule in matching if rule.kind == "delay"]
            others = [rule for rule in matching if rule.kind != "delay"]
            taken = delays + others[:1]
            for rule in taken:
                rule.left = None if rule.left is None else rule.left - 1
            self._rules = [rule for rule in self._rules if rule.left != 0]
            return taken

    def take_drop(self, moment: str) -> bool:
        """Return whether the websocket is to be dropped at this moment, once."""
        if self.drop_websocket_after is None:
            return False
        with self._lock:
            if self.drop_websocket_after != moment:
                return False
            self.drop_websocket_after = None
            return True


def _failing(
    kind: str,
    method: str,
    path: str,
    times: int | None,
    status: int,
    body: str,
    headers: Mapping[str, str] | None,
) -> Rule:
    fields = {"Content-Type": "text/html; charset=utf-8", **(headers or {})}
    return Rule(kind, method, path, times, status=status, body=body, headers=fields)


def plain_path(path: str) -> str:
    """Return a route's path without the `/api` in front that every route also has."""
    return path[4:] if path.startswith("/api/") else path
