"""Connections on which no call outlasts its deadline, or its cancellation.

A socket's timeout counts from byte to byte when it reads: a server that sends one now and then can
hold a thread for ever, and a thread that waits for the first one notices nothing else. So each read
asks the guard of its call for how long it may wait, and another thread can break the wait off. When
a body is sent, the timeout counts for all of it: so it goes out in pieces, that a slow line has
time for as long as it moves.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar

import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from comfy_executors.errors import ComfyExecutorsError

_BUFFER_BYTES = 65536  # each read, and each piece that is sent, costs a look at the deadline
_SLACK_SECONDS = 0.1  # by which a read may outlast its deadline

_current = threading.local()
_entering = threading.Lock()  # guards which connection is whose


class CallGuard:
    """Watches over one call, which is made within `with`, on one thread.

    Args:
        limit: Shortens a number of seconds to what the call's deadline leaves, or raises.
        read_seconds: How long one read may wait, or the sending of one piece.
        head_seconds: How long all of an answer's head may take.
        sending: Another `limit`, for as long as a large body is sent.
    """

    def __init__(
        self,
        limit: Callable[[float], float],
        read_seconds: float,
        head_seconds: float,
        sending: Callable[[float], float] | None = None,
    ) -> None:
        self._limit = limit
        self._sending = sending or limit
        self._read_seconds = read_seconds
        self._head_seconds = head_seconds
        self._connection: Any = None
        self._interrupted = False
        self._head_until: float | None = None
        self._is_cut = False

    def __enter__(self) -> CallGuard:
        _current.guard = self
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.guard = None
        with _entering:
            connection, self._connection = self._connection, None
            if connection is not None and connection.guard is self:
                connection.guard = None

    def interrupt(self) -> None:
        """Break the call off; any thread may."""
        with _entering:
            self._interrupted = True
            connection = self._connection
            # It goes back to its pool before this call has ended, and may be another call's by now.
            is_ours = connection is not None and connection.guard is self
            sock = connection.sock if is_ours else None
            if sock is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    # Not through the TLS layer, which would end under its reader's hands.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def head_is_here(self) -> None:
        """Say that the answer's head has come; its body may take longer."""
        self._head_until = None

    def enter(self, connection: Any) -> None:
        """Take note of the connection that the call uses."""
        with _entering:
            self._connection = connection
            connection.guard = self
        self._is_cut = False  # an auth may send the request again, within the same call

    def wait_for_head(self) -> None:
        """Say that the answer is read for from now on."""
        self._head_until = time.monotonic() + self._head_seconds

    def sending_failed(self) -> None:
        """Say that a large body could not be sent to its end."""
        self._is_cut = True

    @property
    def is_cut(self) -> bool:
        """Whether a body was not sent to its end, so that nobody can have understood it."""
        return self._is_cut

    def seconds_to_send(self) -> float:
        """Tell for how long the next piece may wait; TimeoutError when the call is over."""
        return self._left(self._read_seconds, self._sending)

    def seconds_to_read(self) -> float:
        """Tell for how long the next read may wait; TimeoutError when the call is over."""
        left = self._read_seconds
        if self._head_until is not None:
            left = self._head_until - time.monotonic()
        return self._left(left, self._limit)

    def _left(self, left: float, limit: Callable[[float], float]) -> float:
        try:
            left = min(left, limit(max(left, 0.0)))
        except ComfyExecutorsError as error:
            raise TimeoutError(str(error)) from error
        if self._interrupted or left <= 0:
            raise TimeoutError("the call was broken off")
        return left


def _shorten(sock: socket.socket, seconds: float) -> None:
    timeout = sock.gettimeout()
    if timeout is None or seconds < timeout - _SLACK_SECONDS:
        # Not each time: it gives way to other threads, which costs more than the read.
        sock.settimeout(seconds)


class _GuardedIO(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, guard: CallGuard) -> None:
        self._raw = raw
        self._sock = sock
        self._guard = guard

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        _shorten(self._sock, self._guard.seconds_to_read())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        guard: CallGuard | None = getattr(_current, "guard", None)
        if guard is not None:
            guard.wait_for_head()
            raw: Any = self.fp.detach()
            self.fp = io.BufferedReader(_GuardedIO(raw, sock, guard), _BUFFER_BYTES)


class _Guarded:
    guard: CallGuard | None = None
    sock: socket.socket

    def request(self, *args: Any, **kwargs: Any) -> Any:
        guard: CallGuard | None = getattr(_current, "guard", None)
        if guard is not None:
            guard.enter(self)
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def send(self, data: Any) -> None:
        guard, send = self.guard, super().send  # type: ignore[misc]
        if guard is None or not isinstance(data, bytes) or len(data) <= _BUFFER_BYTES:
            send(data)
            return
        try:
            for start in range(0, len(data), _BUFFER_BYTES):
                _shorten(self.sock, guard.seconds_to_send())
                send(memoryview(data)[start : start + _BUFFER_BYTES])
        except OSError:
            guard.sending_failed()  # which urllib3 may pass over, to look for an answer
            raise


class _HTTPConnection(_Guarded, HTTPConnection):
    response_class = _Response


class GuardedHTTPSConnection(_Guarded, HTTPSConnection):
    """A connection over TLS that heeds the `CallGuard` of its call."""

    response_class = _Response


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = GuardedHTTPSConnection


def _guarded(pools: Mapping[str, Any]) -> dict[str, Any]:
    """Guard the connections of pools that cannot be imported here: SOCKS needs PySocks."""
    guarded = {}
    for scheme, pool in pools.items():
        kinds, response = (_Guarded, pool.ConnectionCls), {"response_class": _Response}
        connection = type(f"Guarded{pool.ConnectionCls.__name__}", kinds, response)
        guarded[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection})
    return guarded


class GuardedAdapter(HTTPAdapter):
    """The adapter of requests for one server, on connections that heed their call's `CallGuard`."""

    pools: ClassVar[dict[str, type[urllib3.HTTPConnectionPool]]] = {
        "http": _HTTPPool,
        "https": _HTTPSPool,
    }

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._pool: Any = None
        self.poolmanager.pool_classes_by_scheme = self.pools

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        # All calls of a client go to one server: requests would work out for each which it is.
        if self._pool is None:
            self._pool = super().get_connection_with_tls_context(*args, **kwargs)
        return self._pool

    def close(self) -> None:
        super().close()
        self._pool = None

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy not in self.proxy_manager:
            manager = super().proxy_manager_for(proxy, **kwargs)
            is_socks = proxy.lower().startswith("socks")
            manager.pool_classes_by_scheme = (
                _guarded(manager.pool_classes_by_scheme) if is_socks else self.pools
            )
        return self.proxy_manager[proxy]
