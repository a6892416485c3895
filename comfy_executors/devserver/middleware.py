"""What every request passes: required headers, faults, and the record of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from comfy_executors.devserver.faults import Faults, Rule, plain_path
from comfy_executors.devserver.records import Journal, record_of
from comfy_executors.devserver.transports import reset_transport

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _ConnectionCutError(Exception):
    """Raised to leave a handler whose connection was reset."""


class Gate:
    """The middleware of the server.

    Args:
        prefix: What is in front of every path.
        headers: The headers without which the answer is 401.
        faults: The faults that are switched on.
        journal: Where the requests are recorded.
    """

    def __init__(
        self, prefix: str, headers: Mapping[str, str], faults: Faults, journal: Journal
    ) -> None:
        self._prefix = prefix
        self._headers = dict(headers)
        self._faults = faults
        self._journal = journal
        self._busy: set[asyncio.BaseTransport] = set()
        self._restarts = 0

    def restart(self) -> None:
        """Let requests that are still delayed come to nothing."""
        self._restarts += 1

    def is_idle(self, transport: asyncio.BaseTransport) -> bool:
        """Return whether a connection has neither a request under way nor a websocket."""
        return transport not in self._busy

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._busy.add(transport)
        try:
            return await self._record(request, handler)
        finally:
            self._busy.discard(transport)

    async def _record(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = plain_path(request.path[len(self._prefix) :])
        try:
            response = await self._answer(request, handler, path)
        except _ConnectionCutError:
            self._add_record(request, path, None)
            # The connection is gone: this answer reaches nobody.
            return web.Response(status=499)
        except web.HTTPException as error:
            self._add_record(request, path, error.status)
            raise
        except Exception:
            self._add_record(request, path, 500)
            raise
        # A websocket was recorded when it opened.
        if not isinstance(response, web.WebSocketResponse):
            self._add_record(request, path, response.status)
        return response

    def _add_record(self, request: web.Request, path: str, status: int | None) -> None:
        self._journal.add_request(record_of(request, path, status))

    async def _answer(
        self, request: web.Request, handler: Handler, path: str
    ) -> web.StreamResponse:
        for name, value in self._headers.items():
            if request.headers.get(name) != value:
                return web.Response(status=401, text="401: Unauthorized")
        cut: Rule | None = None
        restarts = self._restarts
        for rule in self._faults.take(request.method, path):
            if rule.kind == "delay":
                await asyncio.sleep(rule.seconds)
            else:
                cut = rule
        if restarts != self._restarts:
            raise _ConnectionCutError
        if cut is None:
            return await handler(request)
        return await _cut_short(cut, request, handler)


async def drop_type_of_nothing(request: web.Request, response: web.StreamResponse) -> None:
    """Leave an empty answer without a content type, as newer versions of aiohttp do."""
    if isinstance(response, web.Response) and response.body is None:
        response.headers.popall("Content-Type", None)


async def _cut_short(rule: Rule, request: web.Request, handler: Handler) -> web.StreamResponse:
    if rule.kind == "fail":
        return _failed(rule)
    if rule.kind == "reset_before":
        reset_transport(request.transport)
        raise _ConnectionCutError
    response = await handler(request)
    if rule.kind == "fail_after":
        return _failed(rule)
    if rule.kind == "reset_after":
        reset_transport(request.transport)
        raise _ConnectionCutError
    if not isinstance(response, web.Response):
        return response
    return await _truncated(request, response)


def _failed(rule: Rule) -> web.Response:
    return web.Response(status=rule.status, text=rule.body, headers=rule.headers)


async def _truncated(request: web.Request, response: web.Response) -> web.StreamResponse:
    body = response.body if isinstance(response.body, bytes) else b""
    half = web.StreamResponse(status=response.status, headers=response.headers)
    half.content_length = len(body)
    await half.prepare(request)
    await half.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return half
