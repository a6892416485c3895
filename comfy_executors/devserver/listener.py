"""The thread of the event loop, and the listening socket."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from comfy_executors.devserver.transports import reset_transport

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKLOG = 128


class Listener:
    """Serves an aiohttp application from a thread of its own.

    It accepts connections itself: an asyncio server that is closed while it accepts one leaves
    that connection neither served nor closed, and whoever made it waiting.

    Args:
        host: The address to listen on.
        port: The TCP port; 0 takes a free one.
        ssl_context: Serve TLS with this.

    Raises:
        OSError: The port is taken, or the address is not one of this machine.
    """

    def __init__(self, host: str, port: int, ssl_context: ssl.SSLContext | None) -> None:
        self._host = host
        self._ssl_context = ssl_context
        self._socket = _bind(host, port)
        self._is_open = False
        self._greeting: set[asyncio.Task[None]] = set()
        self.port: int = self._socket.getsockname()[1]
        # Not the default one, which on Windows cannot watch a listening socket.
        self.loop = asyncio.SelectorEventLoop()
        self._runner: web.AppRunner | None = None
        # A daemon: a server that nobody stopped must not keep the interpreter from ending.
        self._thread = threading.Thread(
            target=self._run_loop, name="comfy-devserver-loop", daemon=True
        )

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def _server(self) -> web.Server:
        assert self._runner is not None
        assert self._runner.server is not None
        return self._runner.server

    def start(self, app: web.Application) -> None:
        """Start the thread; the application is ready, but nothing is accepted yet."""
        self._thread.start()
        self._runner = web.AppRunner(app, access_log=None)
        self.call(self._runner.setup())

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop's thread and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def open(self) -> None:
        """Accept connections; without effect when that is so already."""
        self.call(self._open())

    async def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._socket.listen(_BACKLOG)
            self.loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        connection.setblocking(False)
        task = self.loop.create_task(self._greet(connection))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)
        # Even a task that is cancelled before its first step comes here.
        task.add_done_callback(lambda ended: connection.close() if ended.cancelled() else None)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(self._server, connection, ssl=self._ssl_context)
        except OSError as error:
            logger.debug("a connection ended before its first request: %s", error)
            connection.close()

    def shut(self) -> None:
        """Refuse connections, but keep the port; without effect when that is so already."""
        self.call(self._shut())

    async def _shut(self) -> None:
        if self._is_open:
            self._stop_accepting()
            # Bound and not listening, a socket keeps others from taking the port meanwhile.
            self._socket = _bind(self._host, self.port)

    def _stop_accepting(self) -> None:
        if self._is_open:
            self._is_open = False
            self.loop.remove_reader(self._socket)
        self._socket.close()

    def close_idle_connections(self, is_idle: Callable[[asyncio.BaseTransport], bool]) -> None:
        """Close, in good order, the open connections for which this holds."""
        self.call(self._close_connections(is_idle))

    async def _close_connections(self, is_chosen: Callable[[asyncio.BaseTransport], bool]) -> None:
        for transport in self._transports():
            if is_chosen(transport):
                transport.close()

    def _transports(self) -> list[asyncio.Transport]:
        transports = [connection.transport for connection in list(self._server.connections)]
        return [transport for transport in transports if transport is not None]

    def reset_connections(self) -> None:
        """Reset every open connection, those included that are only just being made."""
        self.call(self._reset_connections())

    async def _reset_connections(self) -> None:
        await self._cancel(set(self._greeting))
        for transport in self._transports():
            reset_transport(transport)

    async def _cancel(self, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Close every socket and end the thread."""
        self.call(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _close(self) -> None:
        self._stop_accepting()
        # Handlers that wait for something would hold up the end, so all tasks are cancelled.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await self._cancel(tasks)
            for transport in self._transports():
                transport.abort()
            # That takes effect, and may start tasks, in the next round of the loop.
            await asyncio.sleep(0)
        assert self._runner is not None
        await self._runner.cleanup()
        await self.loop.shutdown_default_executor()


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # Connections of a server before, still winding down, would block the port otherwise.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        message = (
            f"the dev server cannot listen on {host}:{port}: {reason}; port 0 takes a free one"
        )
        raise OSError(error.errno, message) from error
    return bound
