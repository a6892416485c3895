"""What all stand-ins for a service have in common: a listener on loopback, records, a life."""

from __future__ import annotations

import abc
import threading
from types import TracebackType
from typing import TypeVar

from comfy_executors.devserver.listener import Listener
from comfy_executors.devserver.middleware import Gate
from comfy_executors.devserver.records import Journal, RequestRecord

S = TypeVar("S", bound="StandIn")


class StandIn(abc.ABC):
    """A service on loopback, in a thread of its own.

    Args:
        port: The TCP port; 0 takes a free one.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._journal = Journal()
        self._lifecycle = threading.RLock()
        self._listener: Listener | None = None
        self._gate: Gate | None = None

    @property
    @abc.abstractmethod
    def url(self) -> str:
        """Where it is."""

    def start(self: S) -> S:
        """Start it and return it; it accepts connections then.

        Raises:
            OSError: The port is taken.
            RuntimeError: It runs already.
        """
        with self._lifecycle:
            if self._listener is not None:
                raise RuntimeError(f"it already runs at {self.url}")
            listener = Listener("127.0.0.1", self._port, None)
            self._port = listener.port
            self._serve(listener)
            self._listener = listener
            self._refuse_connections(self._refuses)
        return self

    @abc.abstractmethod
    def _serve(self, listener: Listener) -> None:
        """Have the listener serve it, through `_gate`."""

    @property
    @abc.abstractmethod
    def _refuses(self) -> bool:
        """Whether it was told to refuse connections."""

    def stop(self) -> None:
        """Stop it; its threads have ended and its sockets are closed when this returns.

        The records stay. Stopping what does not run has no effect.
        """
        with self._lifecycle:
            listener, self._listener = self._listener, None
            if listener is not None:
                listener.close()

    def __enter__(self: S) -> S:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self._listener is not None else "stopped"
        return f"<{type(self).__name__} {self.url} {state}>"

    @property
    def requests(self) -> list[RequestRecord]:
        """Every request that was answered or cut off on purpose, in order."""
        return self._journal.requests

    def _refuse_connections(self, refuse: bool) -> None:
        with self._lifecycle:
            if self._listener is None or self._gate is None:
                return
            if refuse:
                self._listener.shut()
                self._listener.close_idle_connections(self._gate.is_idle)
            else:
                self._listener.open()
