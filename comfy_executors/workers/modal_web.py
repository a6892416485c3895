"""The HTTP interface of an app on Modal: what its client and its web function say to each other.

All of it stands below the app's address, without a prefix of its own. Every answer of the app is
JSON, but for outputs; what begins with `modal-http:` in plain text is from Modal's edge instead.
A job is the wire's job document, and what comes of it are the wire's events (see
`comfy_executors.wire`). Each route may be called again after a lost answer: none of them does
anything twice.

=======  ================================  =================================================
method   path                              does
=======  ================================  =================================================
GET      `/v1/health`                      tell that the app is there, and how busy
POST     `/v1/jobs`                        submit a job
GET      `/v1/jobs/{id}?after=&wait=`      one job: its state and its new events
POST     `/v1/jobs/poll`                   the same for many jobs, in one call that waits
POST     `/v1/jobs/cancel`                 cancel a job, by its id or its request id
GET      `/v1/jobs/{id}/outputs/{name}`    the bytes of one output
HEAD     `/v1/inputs/{sha256}`             tell whether an input image is there
PUT      `/v1/inputs/{sha256}`             put it there
=======  ================================  =================================================

**Errors.** Whatever is refused is answered with `{"error": {"kind", "message"}}` and, where the
client is to raise an exception of ours, `"failure"` in `error`: the wire's form of it, for
`decode_error`.

======  =====================  ====================================================================
status  kind                   meaning
======  =====================  ====================================================================
400     `bad_request`          no JSON, or not of the form that the route takes
400     `wrong_hash`           what was put does not have the digest in its path
404     `unknown_job`          no job of this app has this id; `failure` says so
404     `unknown_output`       the job has no such output (yet)
404     `unknown_route`        there is nothing at this path
405     `wrong_method`         the path is right and the method is not
409     `missing_inputs`       put these input images first, and submit again: `"inputs": […]`
409     `cancelled`            the request id was cancelled before; `failure` is the error
410     `expired`              the job ended more than a week ago; `failure` says so
413     `too_large`            more than `MAX_DOCUMENT_BYTES` or `MAX_INPUT_BYTES`
422     `refused`              the job document is wrong; `failure` is the error to raise
503     `submitting`           another call is just submitting this request id; try again after
                               `Retry-After` seconds, for up to 90 s in all
503     `overloaded`           Modal takes no more for the moment; try again after `Retry-After`
500     `internal`             an error of the app itself
======  =====================  ====================================================================

**Submit**, `POST /v1/jobs`. The body is the job document. Its input images carry their bytes in
base64 (`data`), a public address (`url`), or the digest of what was put to `/v1/inputs` before
(`sha256`). `request_id` is the idempotency key: the same one again returns the first job,
whatever else is in the document, and starts nothing. Answer 202, with a `Location`::

    {"id": "fc-…", "request_id": "…", "state": "queued", "repeated": false}

**One job**, `GET /v1/jobs/{id}`. `wait` is for how many seconds the answer may be held, 0 by
default and `MAX_WAIT` at the most. `after` is the `cursor` of an earlier answer, nothing at first.
Answer 200 with a job object::

    {"id": "fc-…", "request_id": "…", "state": "running",
     "cursor": "1.12/1.15", "events": [{"seq": 12, "attempt": 1, "kind": "output", …}, …],
     "error": null,
     "batches": [{"batch": 0, "size": 8, "seed": 7}, …]}

- `state` is `queued`, `running`, `done`, `failed` or `cancelled`; the last three are final. `done`
  says that the job told all by its events, failures included, the last of which is `end`.
- `events` are those since `after`, in order. A cursor is opaque, stays good as long as the job, and
  holds across web containers. A job that was started anew on another container begins with a
  `started` event of a higher `attempt`; what an earlier attempt told is not told again.
- Of `progress` events that follow each other fast, `node` and `step`, only the newest of each batch
  is told; all other events are, each once. So numbers are missing where progress was left out.
- `output` events carry a `url`: a path from the app's root, percent-encoded, such as
  `/v1/jobs/fc-…/outputs/1_00000_00000.png`. Should the app's storage fail, they carry `data` in
  parts instead, as the wire allows.
- `error` is the wire's form of an exception where `state` is `failed` or `cancelled` (the container
  was killed, Modal's own time limit passed, …), else null.
- `batches` are those of the document, without their graphs: what an executor needs that takes up a
  job of another process. Only this route tells them.

**Many jobs**, `POST /v1/jobs/poll`::

    {"jobs": {"fc-1": "1.12/1.15", "fc-2": ""}, "wait": 20}

Up to `MAX_JOBS` ids with their cursors. Answer 200 with an object for each of them, without
`batches`: `{"jobs": {"fc-1": {job object}, …}}`. Here `state` may also be `unknown` or `expired`,
with their `error`; they are final, and no reason to refuse the call. It is held until, for any of
the jobs,

- an event other than progress is new (the answer then waits another `GATHER_SECONDS` for more), or
- its state is final, or
- progress is new and `PROGRESS_SECONDS` have passed since the call began, or
- `wait` seconds have passed, `MAX_WAIT` at the most.

So a job that only waits or only makes progress takes at most one call in `PROGRESS_SECONDS`,
and many jobs share it, while an output is told as soon as it exists. A job whose state is final
ends every call at once: leave it out once that was seen.

**Cancel**, `POST /v1/jobs/cancel` with `{"id": "fc-…"}` or `{"request_id": "…"}`; the latter for
who never learned whether a submit arrived. Answer 202 with `{"id": "fc-…" or null, "request_id",
"state"}`. It is a request: the job has ended once its state is final. What has ended stays as it
is. A request id that was cancelled is never started afterwards: a later submit is answered 409.

**Outputs**, `GET /v1/jobs/{id}/outputs/{name}`. Answer 200 with the bytes, `Content-Length` and a
`Content-Type` after the name's suffix. Their size and sha256 are in the event. They are kept for a
week.

**Inputs**, `HEAD` and `PUT /v1/inputs/{sha256}`, 64 hexadecimal digits in lower case. HEAD
answers 200 or 404. PUT takes the bytes as its body, checks them, and answers 201, or 200 where they
were there: `{"sha256", "size"}`. Kept for a week. Who only submits learns what is missing from 409.

**Health**, `GET /v1/health`. Answer 200; the counts are null where they are not known::

    {"ok": true, "worker": "comfy-executors", "version": "0.2.0", "protocol": 1,
     "backend": "modal" or "local", "queued": 2, "running": 1, "containers": 1}
"""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Optional

import comfy_executors
from comfy_executors.errors import MissingExtraError
from comfy_executors.wire import SHA256
from comfy_executors.workers.engine import WORKER
from comfy_executors.workers.job_backend import (
    GATHER_SECONDS,
    PROGRESS_SECONDS,
    JobBackend,
    RefusalError,
)
from comfy_executors.workers.job_watch import Cursor

try:
    from fastapi import Body, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("fastapi", "modal-worker") from error

__all__ = [
    "GATHER_SECONDS",
    "MAX_DOCUMENT_BYTES",
    "MAX_INPUT_BYTES",
    "MAX_JOBS",
    "MAX_WAIT",
    "PROGRESS_SECONDS",
    "PROTOCOL",
    "create_web",
]

PROTOCOL = 1
MAX_WAIT = 25.0  # seconds; Modal's edge cuts a call at 150
MAX_JOBS = 100  # of one poll
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_INPUT_BYTES = 200 * 1024 * 1024


class _Poll(BaseModel):
    """The body of `/v1/jobs/poll`."""

    jobs: dict[str, str] = Field(min_length=1, max_length=MAX_JOBS)
    wait: float = Field(default=0.0, ge=0.0)


class _Cancel(BaseModel):
    """The body of `/v1/jobs/cancel`."""

    model_config = ConfigDict(extra="forbid")
    # FastAPI evaluates these, and before Python 3.10 has no `|` for types.
    id: Optional[str] = None
    request_id: Optional[str] = None


def create_web(backend: JobBackend) -> FastAPI:
    """Make the web application of an app.

    Args:
        backend: Where its jobs run; it is closed when the application ends.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.aclose()

    # Without the pages that describe it: nobody needs them who has no key.
    web = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    web.add_exception_handler(RefusalError, _answer_refusal)
    web.add_exception_handler(RequestValidationError, _answer_bad_request)
    web.add_exception_handler(HTTPException, _answer_http_error)
    web.add_exception_handler(Exception, _answer_internal_error)
    web.add_middleware(_BodyLimit)
    routes = _Routes(backend)
    web.add_api_route("/v1/health", routes.health, methods=["GET"])
    web.add_api_route("/v1/jobs", routes.submit, methods=["POST"], status_code=202)
    web.add_api_route("/v1/jobs/poll", routes.poll, methods=["POST"])
    web.add_api_route("/v1/jobs/cancel", routes.cancel, methods=["POST"], status_code=202)
    web.add_api_route("/v1/jobs/{job_id}", routes.job, methods=["GET"])
    web.add_api_route("/v1/jobs/{job_id}/outputs/{name}", routes.output, methods=["GET"])
    web.add_api_route("/v1/inputs/{sha256}", routes.has_input, methods=["HEAD"])
    web.add_api_route("/v1/inputs/{sha256}", routes.put_input, methods=["PUT"])
    return web


class _Routes:
    def __init__(self, backend: JobBackend) -> None:
        self._backend = backend

    async def health(self) -> dict[str, Any]:
        about = {
            "ok": True,
            "worker": WORKER,
            "version": comfy_executors.__version__,
            "protocol": PROTOCOL,
            "backend": self._backend.name,
        }
        return {**about, **await self._backend.counts()}

    # Each route that changes something takes a body: where that never arrives, nothing was done.

    async def submit(self, response: Response, document: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        answer = await self._backend.submit(document)
        response.headers["Location"] = f"/v1/jobs/{answer['id']}"
        return answer

    async def job(
        self,
        job_id: str,
        after: str = "",
        wait: float = Query(default=0.0, ge=0.0),
    ) -> dict[str, Any]:
        return await self._backend.job(job_id, _cursor(after), min(wait, MAX_WAIT))

    async def poll(self, body: _Poll) -> dict[str, Any]:
        cursors = {job_id: _cursor(after) for job_id, after in body.jobs.items()}
        return {"jobs": await self._backend.poll(cursors, min(body.wait, MAX_WAIT))}

    async def cancel(self, body: _Cancel) -> dict[str, Any]:
        if (body.id is None) == (body.request_id is None):
            raise RefusalError(400, "bad_request", "give an id or a request_id")
        return await self._backend.cancel(body.id, body.request_id)

    async def output(self, job_id: str, name: str) -> Response:
        output = await self._backend.output(job_id, name)
        kind = mimetypes.guess_type(output.name)[0] or "application/octet-stream"
        headers = {
            "Content-Length": str(output.size),
            "ETag": f'"{output.sha256}"',
            # What a workflow made is shown by no browser as a page of this app.
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": "attachment",
        }
        return StreamingResponse(output.content, media_type=kind, headers=headers)

    async def has_input(self, sha256: str) -> Response:
        is_there = SHA256.fullmatch(sha256) and await self._backend.has_input(sha256)
        return Response(status_code=200 if is_there else 404)

    async def put_input(self, sha256: str, request: Request) -> Response:
        if not SHA256.fullmatch(sha256):
            raise RefusalError(400, "bad_request", "a digest is 64 hexadecimal digits")
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_INPUT_BYTES:
                raise _too_large(MAX_INPUT_BYTES)
        is_new = await self._backend.put_input(sha256, bytes(data))
        about = {"sha256": sha256, "size": len(data)}
        return JSONResponse(about, status_code=201 if is_new else 200)


def _cursor(text: str) -> Cursor:
    try:
        return Cursor.parse(text)
    except ValueError:
        raise RefusalError(400, "bad_request", f"{text[:60]!r} is no cursor") from None


class _BodyLimit:
    """Refuses a body that is too large before any of it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "0")
            limit = MAX_INPUT_BYTES if scope["method"] == "PUT" else MAX_DOCUMENT_BYTES
            if not length.isdecimal() or int(length) > limit:
                await _answer(_too_large(limit))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _too_large(limit: int) -> RefusalError:
    return RefusalError(413, "too_large", f"a body has at most {limit} bytes here")


def _answer(refusal: RefusalError) -> Response:
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return JSONResponse({"error": refusal.body}, status_code=refusal.status, headers=headers)


async def _answer_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return _answer(error)


async def _answer_bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return _answer(RefusalError(400, "bad_request", f"{place}: {first['msg']}"))


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {404: "unknown_route", 405: "wrong_method"}
    kind = kinds.get(error.status_code, "bad_request")
    return _answer(RefusalError(error.status_code, kind, str(error.detail)))


async def _answer_internal_error(_: Request, error: Exception) -> Response:
    # The server logs the traceback; it is nothing for the other side.
    return _answer(RefusalError(500, "internal", f"the app failed: {type(error).__name__}"))
