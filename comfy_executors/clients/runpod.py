"""The operations of a RunPod serverless endpoint, over its raw HTTP API.

`RunPodClient` is the client; what it answers is in runpod_answers.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from comfy_executors.clients.http import (
    SLOWEST_UPLOAD,
    Answer,
    DeadlineWaiter,
    Waiter,
    parse_address,
)
from comfy_executors.clients.runpod_answers import (
    FAILED,
    TIMED_OUT,
    RunPodHealth,
    RunPodJob,
    RunPodStatus,
    RunPodStream,
    parse_health,
    parse_job,
    parse_removed,
    parse_status,
    parse_stream,
    said,
)
from comfy_executors.clients.runpod_chunks import ChunkFile
from comfy_executors.clients.runpod_http import RunPodHttp, words_of
from comfy_executors.clients.runpod_limits import limiter_of
from comfy_executors.clients.runpod_payload import check_range, encode, too_large
from comfy_executors.errors import (
    ComfyExecutorsError,
    JobExpiredError,
    JobLostError,
    OutputFileError,
    ServerError,
    ServerResponseError,
    SubmitUncertainError,
    WaitTimeoutError,
)

T = TypeVar("T")

BASE_URL = "https://api.runpod.ai/v2"
STREAM_WAIT_SECONDS = (1.0, 45.0)  # RunPod takes up to 300, longer than connections stay quiet

_ENDPOINT_ID = re.compile(r"[A-Za-z0-9_-]+")
_SUBMIT_SECONDS = 30.0
# Left for the way back: an answer that comes after the deadline loses its chunks.
_ANSWER_SECONDS = 1.0
_EARLY_SECONDS = 5.0
_YOUNG_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_LARGE_BYTES = 4 * 1024 * 1024  # of an answer that is read from a file


class RunPodClient:
    """Calls to one serverless endpoint; any number of threads may use it at once.

    All clients of a process that have the same endpoint and key share one rate limiter, which
    stays below RunPod's limits. Calls are repeated while RunPod is out of reach or overloaded,
    where that is safe.

    Args:
        endpoint_id: The endpoint, such as `abc123def456`.
        api_key: The key; by default the environment's `RUNPOD_API_KEY`. It is sent to
            `base_url` only, and shown nowhere.
        base_url: Where the API is.

    Raises:
        ValueError: There is no key, or an argument cannot be what it should be.
    """

    def __init__(
        self, endpoint_id: str, api_key: str | None = None, base_url: str = BASE_URL
    ) -> None:
        if not _ENDPOINT_ID.fullmatch(endpoint_id):
            raise ValueError(f"not the id of a RunPod endpoint: {endpoint_id!r}")
        key = (api_key or os.environ.get("RUNPOD_API_KEY") or "").strip()
        if not key:
            raise ValueError("no RunPod key: pass api_key= or set RUNPOD_API_KEY")
        base, user = parse_address(base_url, 443)
        if user or "://" not in base_url:
            raise ValueError("base_url is a URL with its scheme and without user and password")
        self.endpoint_id = endpoint_id
        self.url = f"{base}/{endpoint_id}"
        # The limiter is found by it, also after a fork, without a second copy of the key.
        self._key_digest = hashlib.sha256(key.encode()).hexdigest()
        self._http = RunPodHttp(self.url, key)
        self._submitted: dict[str, float] = {}
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._limiter = limiter_of(self.url, self._key_digest)

    def reset(self) -> None:
        """Start with new connections and a new lock, in the child of a fork."""
        self._http.reset()
        self._start()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def is_crowded(self) -> bool:
        """Whether many streams are asked for at once: none of them should be held for long."""
        return self._limiter["stream"].is_crowded

    def __repr__(self) -> str:
        return f"<RunPodClient {self.url}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RunPodClient holds a key and is not pickled: make one where you need it")

    def submit(
        self,
        input: Mapping[str, Any],
        *,
        execution_timeout: float,
        ttl: float,
        waiter: Waiter,
        request_id: str | None = None,
    ) -> RunPodJob:
        """Queue a job, once.

        RunPod has no way to recognise a repeated submit. What surely never arrived is sent again;
        where nobody knows, that is an error of its own. A cancellation waits for RunPod's answer,
        30 seconds at most, because without the id nobody could stop the job.

        Args:
            input: The job's input, not empty (RunPod loses an empty one).
            execution_timeout: Seconds that it may run, from 5 to 7 days.
            ttl: Seconds after which RunPod forgets it, waiting and running together, from 10 to 7
                days.
            waiter: The deadline.
            request_id: Our own id of the job, for the error that says that its fate is unknown.

        Raises:
            ValueError: An argument is out of range, or `input` is not JSON.
            PayloadTooLargeError: It is over 10 MB (10,000,000 bytes) as JSON.
            SubmitUncertainError: It may have been queued, or not.
            EndpointNotFoundError: There is no such endpoint.
            ServerError: RunPod did not take it.
        """
        body = encode(input, execution_timeout, ttl, self.url)
        job = self._http.retry(lambda: self._submit(body, waiter, request_id), waiter)
        self._remember(job.id)
        return job

    def status(self, job_id: str, waiter: Waiter) -> RunPodStatus:
        """Ask how a job is.

        Raises:
            JobLostError: RunPod took it less than a minute ago and does not know it; in the first
                five seconds it is asked again.
            JobExpiredError: RunPod does not know it any more; results are kept for 30 minutes.
            ServerError: There is no answer.
        """
        return self._job_call("status", "GET", job_id, waiter, parse_status)

    def stream(self, job_id: str, wait: float, waiter: Waiter) -> RunPodStream:
        """Take what a job yielded since the last call; RunPod hands out each chunk once.

        An answer that is lost on the way loses its chunks, too.

        Args:
            job_id: The job.
            wait: Seconds for which RunPod may hold the answer while there is nothing, from 1 to
                45. A cancellation breaks the call off.
            waiter: The deadline; it shortens `wait`.

        Raises:
            JobLostError: As `status` says; so do the others.
            OutputFileError: It is a large answer, and there is no room for it on the disk.
        """
        low, high = STREAM_WAIT_SECONDS
        check_range("wait", wait, STREAM_WAIT_SECONDS)

        def params() -> dict[str, str]:
            left = waiter.limit(wait + _ANSWER_SECONDS) - _ANSWER_SECONDS
            return {"wait": str(int(1000 * min(high, max(low, left))))}

        path = f"/stream/{_quoted(job_id)}"

        def once() -> RunPodStream:
            body = tempfile.SpooledTemporaryFile(_LARGE_BYTES)  # noqa: SIM115  goes with its answer
            try:
                return self._stream_once(job_id, path, params(), body, waiter)
            except BaseException as error:
                body.close()
                # Some of ours are OSErrors as well.
                if isinstance(error, OSError) and not isinstance(error, ComfyExecutorsError):
                    raise OutputFileError(
                        f"an answer of {self.url} cannot be kept in {tempfile.gettempdir()}: "
                        f"{error.strerror or error}"
                    ) from error
                raise

        return self._http.retry(once, waiter)

    def cancel(self, job_id: str, waiter: Waiter) -> RunPodStatus | None:
        """Cancel a job, queued or running, and ask what became of it.

        Cancelling a job that has ended, or twice, has no effect.

        Returns:
            Its status afterwards; None when RunPod does not know the job.

        Raises:
            ServerError: RunPod does not cancel it.
        """
        try:
            self._job_call("cancel", "POST", job_id, waiter, _parse_nothing)
        except JobLostError:
            return None
        except ServerResponseError as error:
            if error.status not in (400, 409):
                raise
            # Perhaps because it has ended.
            found = self._status_if_known(job_id, waiter)
            if found is not None and not found.is_terminal:
                raise
            return found
        return self._status_if_known(job_id, waiter)

    def retry(self, job_id: str, waiter: Waiter) -> RunPodJob:
        """Begin a job anew that failed or timed out; id and input stay, the output is dropped.

        Raises:
            JobExpiredError: RunPod does not know it any more.
            ServerError: RunPod refuses, perhaps because the job has not failed.
        """
        path = f"/retry/{_quoted(job_id)}"

        def once() -> RunPodJob:
            try:
                answer = self._call("retry", "POST", path, waiter, accept=(404,))
            except ServerError as error:
                if not error.transient or not error.maybe_received:
                    raise
                found = self.status(job_id, waiter)
                if found.status in (FAILED, TIMED_OUT):
                    raise  # it did not arrive, and is sent again
                return RunPodJob(found.id, found.status)
            self._check_known(job_id, answer)
            return self._read(answer, parse_job, path)

        return self._http.retry(once, waiter)

    def purge_queue(self, waiter: Waiter) -> int:
        """Remove every job that waits, also those of other clients of the endpoint.

        Returns:
            How many were removed by the call that was answered.
        """
        return self._asked("purge-queue", "POST", waiter, parse_removed)

    def health(self, waiter: Waiter) -> RunPodHealth:
        """Ask for the endpoint's counts of jobs and workers."""
        return self._asked("health", "GET", waiter, parse_health)

    # Inside.

    def _stream_once(
        self, job_id: str, path: str, params: Mapping[str, str], body: Any, waiter: Waiter
    ) -> RunPodStream:
        answer = self._call("stream", "GET", path, waiter, accept=(404,), params=params, into=body)
        self._check_known(job_id, answer)
        if body.tell() < _LARGE_BYTES:
            with body:
                body.seek(0)
                return self._read(answer._replace(content=body.read()), parse_stream, path)
        try:
            chunks = ChunkFile(body)
        except ValueError as error:
            raise self._unreadable(answer, path, str(error)) from error
        return RunPodStream(chunks.status, chunks)

    def _asked(self, operation: str, method: str, waiter: Waiter, parse: Callable[[Any], T]) -> T:
        path = f"/{operation}"

        def once() -> T:
            return self._read(self._call(operation, method, path, waiter), parse, path)

        return self._http.retry(once, waiter)

    def _job_call(
        self,
        operation: str,
        method: str,
        job_id: str,
        waiter: Waiter,
        parse: Callable[[Any], T],
    ) -> T:
        path = f"/{operation}/{_quoted(job_id)}"

        def once() -> T:
            answer = self._call(operation, method, path, waiter, accept=(404,))
            self._check_known(job_id, answer)
            return self._read(answer, parse, path)

        return self._http.retry(once, waiter)

    def _call(
        self, operation: str, method: str, path: str, waiter: Waiter, **kwargs: Any
    ) -> Answer:
        limiter = self._limiter[operation]
        with limiter.turn(waiter):
            try:
                return self._http.call(method, path, waiter, **kwargs)
            except ServerError as error:
                if error.status == 429:
                    limiter.pause(error.retry_after or _PAUSE_SECONDS)
                raise

    def _read(self, answer: Answer, parse: Callable[[Any], T], path: str) -> T:
        try:
            body = answer.json()
        except ValueError as error:
            words = words_of(self._http.without_keys(answer))
            raise self._unreadable(answer, path, words) from error
        try:
            return parse(body)
        except ValueError as error:
            words = words_of(self._http.without_keys(answer)) if said(body) else str(error)
            raise ServerResponseError(
                f"{self.url} answers {path} with {answer.status}: {words}", self.url, answer.status
            ) from None  # whose words may show the key

    def _unreadable(self, answer: Answer, path: str, words: str) -> ServerResponseError:
        # A page of something in between, such as a proxy; it may be gone soon.
        return ServerResponseError(
            f"{self.url} answers {path} with {words}",
            self.url,
            answer.status,
            transient=True,
        )

    def _submit(self, body: bytes, waiter: Waiter, request_id: str | None) -> RunPodJob:
        limiter = self._limiter["run"]
        with limiter.turn(waiter):
            try:
                seconds = _SUBMIT_SECONDS + len(body) / SLOWEST_UPLOAD
                # What was sent whole may be queued: its answer is waited for, whatever happens.
                answer = self._http.post(
                    "/run", body, DeadlineWaiter(seconds), sender=waiter, accept=(413,)
                )
            except WaitTimeoutError as error:
                raise self._uncertain(str(error), request_id) from error
            except ServerError as error:
                if error.status == 429:
                    limiter.pause(error.retry_after or _PAUSE_SECONDS)
                elif error.transient and error.maybe_received:
                    raise self._uncertain(str(error), request_id) from error
                raise
        if answer.status == 413:
            raise too_large(len(body), self.url)
        try:
            return self._read(answer, parse_job, "/run")
        except ServerResponseError as error:
            if error.transient:
                raise self._uncertain(str(error), request_id) from error
            raise

    def _uncertain(self, reason: str, request_id: str | None) -> SubmitUncertainError:
        return SubmitUncertainError(
            f"it is not known whether RunPod queued request {request_id}: {reason}; look at the "
            "endpoint's requests before you submit it again",
            request_id=request_id,
            server=self.url,
        )

    def _remember(self, job_id: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._submitted[job_id] = now
            for old in list(self._submitted):  # in order of time
                if now - self._submitted[old] < _YOUNG_SECONDS:
                    break
                del self._submitted[old]

    def _check_known(self, job_id: str, answer: Answer) -> None:
        if answer.status != 404:
            return
        with self._lock:
            submitted = self._submitted.get(job_id)
        age = None if submitted is None else time.monotonic() - submitted
        if age is None or age >= _YOUNG_SECONDS:
            raise JobExpiredError(
                "RunPod does not know it (any more): its ttl passed, its result expired, or it was "
                "lost",
                job_id=job_id,
                server=self.url,
            )
        if age >= _EARLY_SECONDS:
            raise JobLostError(
                f"RunPod took it {age:.0f} s ago and does not know it",
                job_id=job_id,
                server=self.url,
            )
        # A queue that is spread over machines can need a moment to know a job everywhere.
        raise ServerResponseError(
            f"{self.url} does not know job {job_id} yet", self.url, 404, transient=True
        )

    def _status_if_known(self, job_id: str, waiter: Waiter) -> RunPodStatus | None:
        try:
            return self.status(job_id, waiter)
        except JobLostError:
            return None


def _quoted(job_id: str) -> str:
    if job_id.strip(".") == "":
        raise ValueError(f"not the id of a job: {job_id!r}")
    return quote(job_id, safe="")


def _parse_nothing(body: Any) -> None:
    """Take any answer to a cancel: the status afterwards is what counts."""
