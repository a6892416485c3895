"""Modal's edge as its users see it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from comfy_executors.devserver.listener import Listener
from comfy_executors.devserver.middleware import Gate
from comfy_executors.devserver.records import RequestRecord
from comfy_executors.errors import MissingExtraError
from comfy_executors.testing.modal_faults import ModalFaults
from comfy_executors.testing.stand_in import StandIn
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.modal_job import JobRunner
from comfy_executors.workers.modal_local import LocalBackend

try:
    import uvicorn
except ImportError as error:
    raise MissingExtraError("uvicorn", extra="modal-worker") from error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SECRET = "ws-edge"  # noqa: S105  it opens nothing but itself
_CALL = "__modal_function_call_id"
# Of one connection, or of the edge's own business.
_NOT_PASSED_ON = {
    "connection",
    "content-encoding",
    "content-length",
    "host",
    "keep-alive",
    "modal-key",
    "modal-secret",
    "transfer-encoding",
}


@dataclass
class EdgeLimits:
    """The limits of the edge; a test may change them at any time.

    Args:
        redirect_after: Seconds after which a request is answered 303; 0 does so at once.
        body_bytes: The largest body; what Modal answers to a larger one is a guess.
        cold_start: Seconds that the first container of the app takes to start.
    """

    redirect_after: float = 150.0
    body_bytes: int = 4 * 1024**3
    cold_start: float = 0.0


class ModalEdge(StandIn):
    """The edge in front of a deployed app, on loopback, with the app under uvicorn behind it.

    It asks for a proxy token, answers 303 to what takes long, and misbehaves as it is told. ::

        with DevServer() as server, ModalEdge.in_front_of(server.address) as edge:
            executor = ModalWorkflowExecutor(edge.url, edge.key, edge.secret)

    Args:
        app: The app, such as `create_web` makes one; its lifespan ends with the edge.
        port: The TCP port; 0 takes a free one.
        key: The proxy token's id; None lets everybody in.
        secret: The proxy token's secret.
        backend: The app's backend, to be found again in a test.

    Attributes:
        faults: The misbehaviour that is switched on.
        limits: The limits of the edge.
    """

    def __init__(
        self,
        app: Any,
        port: int = 0,
        *,
        key: str | None = "wk-edge",
        secret: str = _SECRET,
        backend: LocalBackend | None = None,
    ) -> None:
        super().__init__(port)
        self.key = key
        self.secret = secret
        self.limits = EdgeLimits()
        self.faults = ModalFaults(self._refuse_connections)
        self._app = app
        self._backend = backend
        self._proxy: _Proxy | None = None

    @classmethod
    def in_front_of(cls, comfyui_address: str, *, containers: int = 1, **options: Any) -> ModalEdge:
        """Make an edge with our own app behind it, whose jobs run on this ComfyUI.

        Args:
            comfyui_address: The ComfyUI, such as a dev server.
            containers: How many jobs run at once.
            options: Further arguments of the edge.

        Raises:
            MissingExtraError: FastAPI is not installed.
        """
        from comfy_executors.workers.modal_web import create_web

        backend = LocalBackend(JobRunner(Engine(comfyui_address)), containers=containers)
        return cls(create_web(backend), backend=backend, **options)

    @property
    def backend(self) -> LocalBackend:
        """The app's backend."""
        if self._backend is None:
            raise RuntimeError("this edge was not told its app's backend")
        return self._backend

    def _serve(self, listener: Listener) -> None:
        self._server = _AppServer(self._app)
        self._gate = Gate("", {}, self.faults, self._journal)
        self._proxy = _Proxy(self)
        app = web.Application(
            middlewares=[self._gate.handle, self._proxy.admit], client_max_size=1024**4
        )
        app.router.add_route("*", "/{path:.*}", self._proxy.handle)
        app.on_cleanup.append(self._proxy.close)
        listener.start(app)

    @property
    def _refuses(self) -> bool:
        return self.faults.refuse_connections

    def stop(self) -> None:
        """Stop the edge and the app; their threads have ended when this returns.

        The records stay. An edge is started once.
        """
        with self._lifecycle:
            was_running = self._listener is not None
            super().stop()
            if was_running:
                self._server.close()

    @property
    def url(self) -> str:
        """The address of the app: `http://127.0.0.1:1234`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def calls(self) -> Counter[str]:
        """How often each route was called: `submit`, `poll`, `job`, `cancel`, `output`, `input`,
        `health`, and `result` for the result URLs of 303."""
        return Counter(map(_name_of, self.requests))

    @property
    def runs(self) -> Counter[str]:
        """How often the app itself was given a request for each route."""
        return Counter() if self._proxy is None else Counter(self._proxy.runs)

    def scale_to_zero(self) -> None:
        """Let the next request wait for a container, for `limits.cold_start` seconds."""
        if self._proxy is not None:
            self._proxy.is_warm = False

    def wait_for(self, predicate: Callable[[ModalEdge], bool], timeout: float = 10.0) -> None:
        """Wait until something holds; it is looked at whenever a request was answered.

        Args:
            predicate: Called with the edge.
            timeout: How long to wait at most, in seconds.

        Raises:
            TimeoutError: It did not come to hold in time.
        """
        if not self._journal.wait_for(lambda: predicate(self), timeout):
            raise TimeoutError(f"waited {timeout:g} s in vain; calls: {dict(self.calls)}")

    def clear(self) -> None:
        """Forget the records, switch every fault off, and set the documented limits."""
        self.faults.clear()
        vars(self.limits).update(vars(EdgeLimits()))
        self._journal.clear()
        if self._proxy is not None:
            self._proxy.runs.clear()


class _AppServer:
    """The app under uvicorn, in a thread of its own."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        # Who connects before uvicorn is there waits.
        self._socket.listen(128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="comfy-modal-app"
        )
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


class _Proxy:
    """Hands requests to the app, and keeps the answers that come late."""

    def __init__(self, edge: ModalEdge) -> None:
        self._edge = edge
        self._session: aiohttp.ClientSession | None = None
        self._calls: dict[str, asyncio.Task[web.Response]] = {}
        self._numbers = itertools.count(1)
        self.is_warm = False
        self.runs: Counter[str] = Counter()
        self._starting: asyncio.Lock | None = None

    async def close(self, _: web.Application) -> None:
        for call in self._calls.values():
            call.cancel()
        await asyncio.gather(*self._calls.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        key, secret = self._edge.key, self._edge.secret
        if key is None:
            return await handler(request)
        given = [request.headers.get(name) for name in ("Modal-Key", "Modal-Secret")]
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer" and "." in bearer and given == [None, None]:
            given = list(bearer.split(".", 1))
        if None in given:
            return _plain(401, "missing credentials for proxy authorization")
        wanted = f"{key}.{secret}".encode()
        if not hmac.compare_digest(".".join(map(str, given)).encode(), wanted):
            return _plain(401, "invalid credentials for proxy authorization")
        return await handler(request)

    async def handle(self, request: web.Request) -> web.Response:
        call_id = request.query.get(_CALL)
        limit = self._edge.limits.redirect_after
        if call_id is None:
            body = await request.read()
            if len(body) > self._edge.limits.body_bytes:
                return _plain(413, "request body too large")
            call_id = f"fc-edge-{next(self._numbers)}"
            self._calls[call_id] = asyncio.ensure_future(self._run(request, body))
            if self._edge.faults.redirects(request.method, request.path):
                limit = 0.0
        elif request.method != "GET":
            return _plain(400, "bad redirect method")
        elif call_id not in self._calls:
            # Whether a result can be read twice is not known; here it cannot.
            return _plain(404, "invalid function call")
        call = self._calls[call_id]
        done, _ = await asyncio.wait([call], timeout=limit)
        if not done:
            url = request.url.update_query({_CALL: call_id})
            return web.Response(status=303, headers={"Location": str(url)})
        del self._calls[call_id]
        return call.result()

    async def _run(self, request: web.Request, body: bytes) -> web.Response:
        await self._warm_up()
        times = 2 if self._edge.faults.runs_twice(request.method, request.path) else 1
        for _ in range(times):
            answer = await self._pass_on(request, body)
        return answer

    async def _warm_up(self) -> None:
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if not self.is_warm:
                await asyncio.sleep(self._edge.limits.cold_start)
                self.is_warm = True

    async def _pass_on(self, request: web.Request, body: bytes) -> web.Response:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)
            )
        self.runs[_route_of(request.method, request.path)] += 1
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _NOT_PASSED_ON}
        # As it came: a client would tidy up what is hostile in it.
        url = URL(self._edge._server.url + request.raw_path, encoded=True)
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.request(
                request.method,
                url,
                data=io.BytesIO(body) if body else None,
                headers=headers,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
                fields = {
                    k: v for k, v in answer.headers.items() if k.lower() not in _NOT_PASSED_ON
                }
                return web.Response(status=answer.status, body=content, headers=fields)
        return _plain(500, "internal error: status Failure: the app did not answer")


def _plain(status: int, words: str) -> web.Response:
    return web.Response(status=status, text=f"modal-http: {words}")


def _name_of(record: RequestRecord) -> str:
    return "result" if _CALL in record.query else _route_of(record.method, record.path)


def _route_of(method: str, path: str) -> str:
    parts = path.strip("/").split("/")[1:]
    if parts == ["jobs"]:
        return "submit"
    if "outputs" in parts:
        return "output"
    if parts[:1] == ["inputs"]:
        return "input"
    if parts in (["jobs", "poll"], ["jobs", "cancel"], ["health"]):
        return parts[-1]
    return "job" if parts[:1] == ["jobs"] else f"{method} {path}"
