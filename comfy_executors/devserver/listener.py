"""The thread of the event loop, and the listening socket."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from comfy_executors.devserver.transports import reset_transport

T = TypeVar("T")


class Listener:
    """Serves an aiohttp application from a thread of its own.

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
        self._bound: socket.socket | None = _bind(host, port)
        self.port: int = self._bound.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._server: asyncio.AbstractServer | None = None
        # A daemon: a server that nobody stopped must not keep the interpreter from ending.
        self._thread = threading.Thread(
            target=self._run_loop, name="comfy-devserver-loop", daemon=True
        )

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

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
        if self._server is None:
            assert self._bound is not None
            assert self._runner is not None
            assert self._runner.server is not None
            self._server = await self.loop.create_server(
                self._runner.server, sock=self._bound, ssl=self._ssl_context
            )
            self._bound = None

    def shut(self) -> None:
        """Refuse connections, but keep the port; without effect when that is so already."""
        self.call(self._shut())

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            # Bound and not listening, a socket keeps others from taking the port meanwhile.
            self._bound = _bind(self._host, self.port)

    def close_connections(
        self, *, reset: bool, only: Callable[[asyncio.BaseTransport], bool] | None = None
    ) -> None:
        """Close open connections.

        Args:
            reset: Close them with a TCP reset.
            only: Close those for which this holds; None for all.
        """
        self.call(self._close_connections(reset, only))

    async def _close_connections(
        self, reset: bool, only: Callable[[asyncio.BaseTransport], bool] | None
    ) -> None:
        assert self._runner is not None
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            transport = connection.transport
            if transport is not None and (only is None or only(transport)):
                reset_transport(transport) if reset else transport.close()

    def close(self) -> None:
        """Close every socket and end the thread."""
        self.call(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _close(self) -> None:
        await self._shut()
        assert self._bound is not None
        assert self._runner is not None
        self._bound.close()
        # Handlers that wait would hold the end up; and ending the first tasks lets connections
        # come in that the kernel had accepted before.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close_connections(False, None)
            await asyncio.sleep(0)
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
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        message = (
            f"the dev server cannot listen on {host}:{port}: {reason}; port 0 takes a free one"
        )
        raise OSError(error.errno, message) from error
    return bound
