"""The calls of our app on Modal, over raw HTTP.

`ModalClient` is the client; what the app answers is in modal_answers.py, what refusals mean in
modal_refusals.py. The interface itself stands in the docstring of `workers/modal_web.py`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

from comfy_executors.clients.http import SLOWEST_UPLOAD, Answer, Waiter, parse_address
from comfy_executors.clients.modal_answers import (
    ModalHealth,
    ModalJob,
    parse_health,
    parse_job,
    parse_jobs,
)
from comfy_executors.clients.modal_http import ModalHttp
from comfy_executors.clients.modal_refusals import refuse_account_token
from comfy_executors.errors import (
    PayloadTooLargeError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
)
from comfy_executors.wire import InputFile, JobDocument, encode_document

T = TypeVar("T")

# Of the interface, whose other end has the same numbers.
PROTOCOL = 1
MAX_WAIT = 25.0
MAX_JOBS = 100
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
MAX_INPUT_BYTES = 200 * 1024 * 1024

COLD_START_SECONDS = 300.0
_OUTPUT_SECONDS = 60.0  # for which one output is asked for again
_ATTEMPTS = 500  # the time is what ends them
# How often a call is made that is answered so, where the answer may not pass.
_FEW = {404: 3}
_FEW_SUBMITS = {404: 3, 500: 5}


class ModalClient:
    """Calls to one app; any number of threads may use it at once.

    All of them may be made again when an answer is lost: the app does nothing twice. So they are
    repeated while Modal is out of reach, overloaded, or starts a container.

    Args:
        url: The app's address, as `modal deploy` tells it: `https://….modal.run`.
        key: The proxy token's id, `wk-…`; by default the environment's `MODAL_KEY`. It is sent to
            this address only, and shown nowhere.
        secret: The proxy token's secret, `ws-…`; by default the environment's `MODAL_SECRET`.
        cold_start_timeout: Seconds within which the app must answer a call, its container's start
            included.

    Raises:
        ValueError: The address cannot be used, or the token is half a token or none of a proxy's.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        secret: str | None = None,
        *,
        cold_start_timeout: float = COLD_START_SECONDS,
    ) -> None:
        self.url = _checked_url(url)
        self._cold_start = cold_start_timeout
        self._http = ModalHttp(self.url, _token_headers(key, secret), cold_start_timeout)

    def reset(self) -> None:
        """Start with new connections, in the child of a fork."""
        self._http.reset()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __repr__(self) -> str:
        return f"<ModalClient {self.url}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ModalClient holds a key and is not pickled: make one where you need it")

    def submit(self, document: JobDocument, waiter: Waiter) -> ModalJob:
        """Submit a job, whose input images are named by their digests.

        The document's request id is the idempotency key: a job that was submitted before is
        returned as it is, and nothing runs twice.

        Raises:
            MissingInputsError: The app does not have some of the images; `put_input` them first.
            PayloadTooLargeError: The document is larger than the app takes.
            WorkflowRejectedError, InputImageError: The app refuses the document.
            WorkflowCancelledError: This request id was cancelled before.
            ServerError: The app did not take it; `maybe_received` tells whether it still may have.
        """
        files = tuple(map(_by_digest, document.input_images))
        body = _encode(encode_document(replace(document, input_images=files)), self.url)

        def once(patience: Waiter) -> ModalJob:
            return self._ask("POST", "/v1/jobs", patience, parse_job, body=body)

        return self._repeat(once, waiter, few=_FEW_SUBMITS)

    def put_input(self, data: bytes, waiter: Waiter) -> None:
        """Put an input image where jobs find it by its digest; twice has no effect.

        Raises:
            ServerError: The app did not take it.
        """
        path = f"/v1/inputs/{digest_of(data)}"

        def once(patience: Waiter) -> Answer:
            kind = "application/octet-stream"
            return self._http.send("PUT", path, patience, body=data, content_type=kind)

        # The edge itself cuts a call at 150 s.
        self._repeat(once, waiter, held=min(150.0, len(data) / SLOWEST_UPLOAD))

    def job(self, job_id: str, waiter: Waiter, *, cursor: str = "", wait: float = 0.0) -> ModalJob:
        """Ask for one job, with its batches and its events after a cursor.

        Args:
            job_id: The job.
            waiter: The deadline; it shortens `wait`.
            cursor: Where the events begin; all of them by default.
            wait: Seconds for which the app may hold the answer while there is no news.

        Raises:
            JobLostError: The app does not know it.
            JobExpiredError: It ended more than a week ago.
            ServerError: There is no answer.
        """
        path = f"/v1/jobs/{quote(job_id, safe='')}"

        def once(patience: Waiter) -> ModalJob:
            params = {"after": cursor, "wait": f"{waiter.limit(min(wait, MAX_WAIT)):.3f}"}
            return self._ask("GET", path, patience, parse_job, params=params)

        return self._repeat(once, waiter, held=wait)

    def poll(self, cursors: Mapping[str, str], wait: float, waiter: Waiter) -> dict[str, ModalJob]:
        """Ask for many jobs at once, and wait until there is news of one.

        Args:
            cursors: For each job, where its events begin; at most `MAX_JOBS`.
            wait: Seconds for which the app may hold the answer while there is no news.
            waiter: The deadline; a cancellation breaks the call off.

        Returns:
            The jobs by id; ones that are gone have a state that says so.

        Raises:
            ServerError: There is no answer.
        """
        body = _encode({"jobs": dict(cursors), "wait": min(wait, MAX_WAIT)}, self.url)

        def once(patience: Waiter) -> dict[str, ModalJob]:
            return self._ask("POST", "/v1/jobs/poll", patience, parse_jobs, body=body)

        return self._repeat(once, waiter, held=wait)

    def cancel(
        self, waiter: Waiter, *, job_id: str | None = None, request_id: str | None = None
    ) -> str | None:
        """Ask for a job to be cancelled; it has ended once its state is final.

        Args:
            waiter: The deadline.
            job_id: The job; or
            request_id: our own id of it, where nobody knows whether it was submitted. It is not
                started any more then.

        Returns:
            The job's id; None when there is no such job.

        Raises:
            JobLostError: The app does not know the job.
            ServerError: There is no answer.
        """
        asked = {"request_id": request_id} if job_id is None else {"id": job_id}
        body = _encode(asked, self.url)

        def once(patience: Waiter) -> str | None:
            return self._ask("POST", "/v1/jobs/cancel", patience, _parse_id, body=body)

        return self._repeat(once, waiter)

    def output(self, path: str, waiter: Waiter) -> bytes:
        """Fetch an output; a call that fails is repeated for a minute.

        Args:
            path: Where its event says that it is, from the app's root.
            waiter: The deadline.

        Raises:
            ServerResponseError: It is not there, with `status` 404; or the path leads elsewhere.
            ServerError: There is no answer.
        """
        if not path.startswith("/") or path.startswith("//"):
            raise ServerResponseError(f"{self.url}: an output is said to be elsewhere", self.url)
        answer = self._repeat(
            lambda patience: self._http.send("GET", path, patience),
            waiter,
            held=_OUTPUT_SECONDS,  # so that the call itself has its full time after failures
            outage_timeout=_OUTPUT_SECONDS,
        )
        return answer.content

    def health(self, waiter: Waiter) -> ModalHealth:
        """Ask whether the app is there, and how busy it is.

        Raises:
            ServerError: There is no answer, or none of an app of ours.
        """
        return self._repeat(
            lambda patience: self._ask("GET", "/v1/health", patience, parse_health), waiter
        )

    # Inside.

    def _ask(
        self, method: str, path: str, waiter: Waiter, parse: Callable[[Any], T], **kwargs: Any
    ) -> T:
        answer = self._http.send(method, path, waiter, **kwargs)
        try:
            return parse(answer.json())
        except ValueError as error:
            raise ServerResponseError(
                f"{self.url} answers {method} {path}, and not as an app of ours: {error}",
                self.url,
                answer.status,
            ) from error

    def _repeat(
        self,
        call: Callable[[Waiter], T],
        waiter: Waiter,
        *,
        held: float = 0.0,
        few: Mapping[int, int] = _FEW,
        outage_timeout: float | None = None,
    ) -> T:
        """Make a call until it is answered, as often as its refusals are worth it.

        Args:
            call: Makes it, once.
            waiter: The caller's deadline.
            held: Seconds for which the app itself may hold the answer.
            few: How often a status is borne that may not pass.
            outage_timeout: Seconds for which it is repeated, if not those of a cold start.
        """
        patience = _Patience(waiter, self.url, self._cold_start + held)
        seen: Counter[int] = Counter()
        received: list[bool] = []

        def attempt() -> T:
            try:
                return call(patience)
            except ServerError as error:
                received.append(error.maybe_received)
                error.maybe_received = any(received)
                status = error.status or 0
                seen[status] += 1
                error.transient = error.transient and seen[status] < few.get(status, _ATTEMPTS)
                raise

        return self._http.retry(
            attempt, patience, attempts=_ATTEMPTS, outage_timeout=outage_timeout
        )


class _Patience:
    """The waiter of one call and its repetitions: the caller's, and the time for a cold start."""

    def __init__(self, waiter: Waiter, server: str, seconds: float) -> None:
        self._waiter = waiter
        self._server = server
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def limit(self, seconds: float) -> float:
        limited = self._waiter.limit(seconds)
        left = self._until - time.monotonic()
        if left <= 0:
            raise ServerNotReadyError(
                f"{self._server} did not answer within {self._seconds:g} s", self._server
            )
        return min(limited, left)

    def sleep(self, seconds: float) -> None:
        self._waiter.sleep(self.limit(seconds))

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        return self._waiter.interrupting(interrupt)


def input_too_large(size: int, server: str) -> PayloadTooLargeError:
    """Make the error for an input image of so many bytes."""
    return PayloadTooLargeError(
        f"an input image is {size:,} bytes, and the app takes {MAX_INPUT_BYTES:,}: pass it as an "
        "https URL, or make it smaller",
        size=size,
        limit=MAX_INPUT_BYTES,
        server=server,
    )


def _checked_url(url: str) -> str:
    base, user = parse_address(url, 443)
    if user or "://" not in url:
        raise ValueError("url is the app's https:// address, without user and password")
    parts = urlsplit(base)
    if parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise ValueError(f"{base} is no https:// address, and the key would be sent in the open")
    return base


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token_headers(key: str | None, secret: str | None) -> dict[str, str]:
    key = (os.environ.get("MODAL_KEY", "") if key is None else key).strip()
    secret = (os.environ.get("MODAL_SECRET", "") if secret is None else secret).strip()
    if bool(key) != bool(secret):
        missing = "secret= or MODAL_SECRET" if key else "key= or MODAL_KEY"
        raise ValueError(f"half a proxy token: {missing} is missing")
    if not key:
        return {}  # some apps let everybody in
    refuse_account_token(key, secret)
    return {"Modal-Key": key, "Modal-Secret": secret}


def _encode(value: Any, server: str) -> bytes:
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_DOCUMENT_BYTES:
        raise PayloadTooLargeError(
            f"the job is {len(body):,} bytes as JSON, and the app takes {MAX_DOCUMENT_BYTES:,}",
            size=len(body),
            limit=MAX_DOCUMENT_BYTES,
            server=server,
        )
    return body


def digest_of(data: bytes) -> str:
    """Return what an input image is known by."""
    return hashlib.sha256(data).hexdigest()


def _by_digest(file: InputFile) -> InputFile:
    return file if file.data is None else InputFile(file.name, sha256=digest_of(file.data))


def _parse_id(body: Any) -> str | None:
    job_id = body.get("id") if isinstance(body, dict) else None
    if job_id is not None and not isinstance(job_id, str):
        raise ValueError("the answer's id is none")
    return job_id
