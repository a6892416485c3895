"""The routes of the RunPod stub: the API for clients, and the one that workers speak."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_executors.testing.runpod_jobs import StubJob
from comfy_executors.testing.runpod_platform import Platform
from comfy_executors.testing.runpod_records import Limits

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 64 * 1024 * 1024
_WORKER_OPERATIONS = {
    "job-take", "job-take-batch", "job-done", "job-stream", "job-stop", "ping"
}  # fmt: skip
_WINDOW_SECONDS = 10.0
_STREAM_WAIT = 10_000
_RUNSYNC_WAIT = 90_000


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


class Doorman:
    """The middleware that asks for a key and counts calls.

    Args:
        prefix: What is in front of every path.
        api_key: The clients' key.
        limits: How many calls there may be.
    """

    def __init__(self, prefix: str, api_key: str, limits: Limits) -> None:
        self._prefix = prefix
        self._api_key = api_key
        self._limits = limits
        self._running: Counter[str] = Counter()
        self._starts: defaultdict[str, deque[float]] = defaultdict(deque)

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith(f"{self._prefix}/"):
            return _refusal(404, "endpoint not found")
        operation = request.path[len(self._prefix) :].split("/")[1]
        sent = request.headers.get("Authorization", "")
        if operation in _WORKER_OPERATIONS:
            # Any key will do: the SDK prefers one that it finds in the user's home.
            return await handler(request) if sent else web.Response(status=401)
        if sent not in (f"Bearer {self._api_key}", self._api_key):
            return web.Response(status=401)
        if not self._admits(operation, asyncio.get_running_loop().time()):
            return _refusal(429, "too many requests")
        self._running[operation] += 1
        try:
            return await handler(request)
        finally:
            self._running[operation] -= 1

    def _admits(self, operation: str, now: float) -> bool:
        if operation not in self._limits.calls:
            return True
        calls, concurrent = self._limits.calls[operation]
        starts = self._starts[operation]
        while starts and starts[0] <= now - _WINDOW_SECONDS:
            starts.popleft()
        if len(starts) >= calls or self._running[operation] >= concurrent:
            return False
        starts.append(now)
        return True


class Routes:
    """What is answered to whom.

    Args:
        platform: The jobs.
        limits: The limits.
    """

    def __init__(self, platform: Platform, limits: Limits) -> None:
        self._platform = platform
        self._limits = limits

    def table(self, prefix: str) -> list[web.RouteDef]:
        client = [
            ("POST", "/run", self._run),
            ("POST", "/runsync", self._runsync),
            ("*", "/status/{job}", self._of_job(self._status)),
            ("*", "/stream/{job}", self._of_job(self._stream)),
            ("POST", "/cancel/{job}", self._of_job(self._cancel)),
            ("POST", "/retry/{job}", self._of_job(self._retry)),
            ("POST", "/purge-queue", self._purge),
            ("GET", "/health", self._health),
        ]
        worker = [
            ("GET", "/job-take/{worker}", self._take),
            ("GET", "/job-take-batch/{worker}", self._take_batch),
            ("POST", "/job-done/{worker}/{job}", self._done),
            ("POST", "/job-stream/{worker}/{job}", self._chunk),
            ("GET", "/job-stop/{worker}", self._stop),
            ("GET", "/ping/{worker}", self._ping),
        ]
        return [
            web.RouteDef(method, prefix + path, handler, {})
            for method, path, handler in client + worker
        ]

    # For clients.

    async def _run(self, request: web.Request) -> web.Response:
        job = await self._submitted(request, sync=False)
        if isinstance(job, web.Response):
            return job
        return web.json_response({"id": job.id, "status": job.status})

    async def _runsync(self, request: web.Request) -> web.Response:
        job = await self._submitted(request, sync=True)
        if isinstance(job, web.Response):
            return job
        ended = await self._platform.until(
            lambda: True if job.is_terminal else None, _wait_of(request, _RUNSYNC_WAIT)
        )
        if ended:
            return web.json_response(job.status_object())
        return web.json_response({"id": job.id, "status": job.status})

    async def _submitted(self, request: web.Request, *, sync: bool) -> StubJob | web.Response:
        text = await request.read()
        limit = self._limits.runsync_bytes if sync else self._limits.run_bytes
        if len(text) > limit:
            return _refusal(413, f"the body is larger than {limit} bytes")
        body = _parsed(text)
        if body is None or not isinstance(body.get("input"), dict):
            return _refusal(400, "input must be an object")
        return self._platform.submit(body, sync=sync)

    def _of_job(self, answer: Callable[[web.Request, StubJob], Awaitable[web.Response]]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            job = self._platform.find(request.match_info["job"])
            if job is None:
                return _refusal(404, "job not found")
            return await answer(request, job)

        return handle

    async def _status(self, request: web.Request, job: StubJob) -> web.Response:
        return web.json_response(job.status_object())

    async def _stream(self, request: web.Request, job: StubJob) -> web.Response:
        def look() -> list[Any] | None:
            # Nobody is given what nobody would get.
            return self._platform.drain(job) if _is_there(request) else []

        chunks = await self._platform.until(look, _wait_of(request, _STREAM_WAIT))
        items = [{"output": chunk} for chunk in chunks or []]
        return web.json_response({"status": job.status, "stream": items})

    async def _cancel(self, request: web.Request, job: StubJob) -> web.Response:
        self._platform.cancel(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def _retry(self, request: web.Request, job: StubJob) -> web.Response:
        if not self._platform.retry(job):
            return _refusal(400, f"a job that is {job.status} is not retried")
        return web.json_response({"id": job.id, "status": job.status})

    async def _purge(self, request: web.Request) -> web.Response:
        return web.json_response({"removed": self._platform.purge(), "status": "completed"})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response(self._platform.health())

    # For workers.

    async def _take(self, request: web.Request) -> web.Response:
        jobs = await self._taken(request, 1)
        return web.json_response(jobs[0]) if jobs else web.Response(status=204)

    async def _take_batch(self, request: web.Request) -> web.Response:
        size = request.query.get("batch_size", "1")
        jobs = await self._taken(request, int(size) if size.isdigit() else 1)
        return web.json_response(jobs) if jobs else web.Response(status=204)

    async def _taken(self, request: web.Request, count: int) -> list[dict[str, Any]] | None:
        worker_id = request.match_info["worker"]

        def look() -> list[dict[str, Any]] | None:
            # A worker that was killed while it asked must not get a job.
            return self._platform.take(worker_id, count) if _is_there(request) else []

        return await self._platform.until(look, self._limits.worker_poll)

    async def _done(self, request: web.Request) -> web.Response:
        text = await request.read()
        body = _parsed(text)
        worker_id, job_id = request.match_info["worker"], request.match_info["job"]
        if body is None or not self._platform.done(worker_id, job_id, body, len(text)):
            return _refusal(400, "the result is refused")
        return web.json_response({})

    async def _chunk(self, request: web.Request) -> web.Response:
        text = await request.read()
        body = _parsed(text)
        worker_id, job_id = request.match_info["worker"], request.match_info["job"]
        if body is None or "output" not in body:
            return _refusal(400, "a chunk has an output")
        if not self._platform.chunk(worker_id, job_id, body["output"], len(text)):
            return _refusal(400, "the chunk is refused")
        return web.json_response({})

    async def _stop(self, request: web.Request) -> web.Response:
        worker_id = request.match_info["worker"]

        def look() -> list[str] | None:
            return self._platform.stops(worker_id) if _is_there(request) else []

        job_ids = await self._platform.until(look, self._limits.worker_poll)
        return web.json_response({"jobsToStop": job_ids}) if job_ids else web.Response(status=204)

    async def _ping(self, request: web.Request) -> web.Response:
        job_ids = request.query.get("job_id", "")
        self._platform.ping(request.match_info["worker"], job_ids.split(",") if job_ids else [])
        return web.json_response({})


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _wait_of(request: web.Request, default: int) -> float:
    text = request.query.get("wait", "")
    milliseconds = int(text) if text.isdigit() else default
    return min(max(milliseconds, 1000), 300_000) / 1000


def _is_there(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()
