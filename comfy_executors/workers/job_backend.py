"""What the routes of an app ask: jobs that are submitted once, followed by many, and cancelled.

The logic is here, once; `modal_backend.py` and `modal_local.py` add where calls run and things are
kept.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.errors import ComfyExecutorsError, JobExpiredError, WorkflowCancelledError
from comfy_executors.wire import JobDocument, decode_document, encode_error
from comfy_executors.workers.job_records import (
    Outcome,
    call_key,
    cancel_key,
    job_key,
    job_record,
    submit_key,
)
from comfy_executors.workers.job_watch import FINAL, FIRST_LOOK_SECONDS, Cursor, JobWatch

logger = logging.getLogger(__name__)

GATHER_SECONDS = 0.1
PROGRESS_SECONDS = 2.0
_ORPHAN_SECONDS = 60.0  # after which a submit that never told its call was ended by a crash
_SUBMIT_SECONDS = 10.0  # that a second submit waits for the first
_SUBMIT_PAUSE = 0.25
_OUTPUT_SECONDS = 5.0
# Half of the time for which files are kept: an older input is put again, since it could be cleaned
# away while a job waits, and nothing but writing makes a file on a Volume younger.
_INPUT_SECONDS = 4 * 24 * 3600.0


class RefusalError(Exception):
    """Raised when a call is answered with an error; see the table in `modal_web.py`.

    Args:
        status: The HTTP status.
        kind: The kind of error.
        message: What is wrong.
        failure: The exception of ours that the client is to raise, if any.
        retry_after: Seconds after which the call may work.
        facts: What else the answer tells.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        failure: ComfyExecutorsError | None = None,
        retry_after: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body: dict[str, Any] = {"kind": kind, "message": message, **facts}
        if failure is not None:
            self.body["failure"] = encode_error(failure)


@dataclass(frozen=True)
class OutputFile:
    """An output on its way to the client.

    Args:
        name: Its name in its URL.
        size: Its bytes.
        sha256: Their digest.
        content: The bytes, in pieces.
    """

    name: str
    size: int
    sha256: str
    content: AsyncIterator[bytes] = field(repr=False)


class JobBackend(abc.ABC):
    """The jobs of an app.

    Args:
        orphan_seconds: After how long a submit that never told its call is taken over.
    """

    name: str

    def __init__(self, *, orphan_seconds: float = _ORPHAN_SECONDS) -> None:
        self._orphan_seconds = orphan_seconds
        self._watches: dict[str, JobWatch] = {}

    # The calls of the routes.

    async def submit(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Start a job, or find the one that was started under its request id.

        Raises:
            RefusalError: The document is wrong, input images are missing, the request was
                cancelled, or another call is about to start it.
        """
        try:
            document = await asyncio.to_thread(decode_document, raw)
        except ComfyExecutorsError as error:
            raise RefusalError(422, "refused", str(error), failure=error) from error
        request_id = document.request_id
        call_id = await self.get_record(call_key(request_id))
        if call_id is None:
            await self._refuse_cancelled(request_id)
            digests = sorted({f.sha256 for f in document.input_images if f.sha256 is not None})
            there = await asyncio.gather(*(self.has_input(digest) for digest in digests))
            missing = [digest for digest, is_there in zip(digests, there) if not is_there]
            if missing:
                message = f"{len(missing)} input images are not there"
                raise RefusalError(409, "missing_inputs", message, inputs=missing)
            call_id, is_repeated = await self._start(raw, document)
        else:
            is_repeated = True
        return {
            "id": call_id,
            "request_id": request_id,
            "state": "queued",
            "repeated": is_repeated,
        }

    async def poll(self, cursors: Mapping[str, Cursor], wait: float) -> dict[str, dict[str, Any]]:
        """Tell where jobs stand and what is new, as soon as there is something to tell.

        Args:
            cursors: How much of each job the client knows.
            wait: For how many seconds it may be waited.
        """
        found = await asyncio.gather(*(self._watch(call_id) for call_id in cursors))
        watches = {watch.call_id: watch for watch in found if watch is not None}
        if len(watches) == len(cursors):
            await self._wait_for_news(watches, cursors, wait)
        return {
            call_id: watches[call_id].tell(cursor) if call_id in watches else _unknown(call_id)
            for call_id, cursor in cursors.items()
        }

    async def job(self, call_id: str, cursor: Cursor, wait: float) -> dict[str, Any]:
        """Tell of one job, and what it consists of.

        Raises:
            RefusalError: There is no such job, or no more.
        """
        watch = await self._known(call_id)
        await self._wait_for_news({call_id: watch}, {call_id: cursor}, wait)
        if watch.state == "expired":
            assert watch.error is not None
            raise RefusalError(410, "expired", str(watch.error), failure=watch.error)
        return {**watch.tell(cursor), "batches": watch.record["batches"]}

    async def cancel(self, call_id: str | None, request_id: str | None) -> dict[str, Any]:
        """Cancel a job by either id; one that has ended stays as it is.

        Raises:
            RefusalError: There is no such job.
        """
        if call_id is not None:
            request_id = (await self._known(call_id)).record["request_id"]
        assert request_id is not None
        await self.claim_record(cancel_key(request_id), time.time())
        call_id = call_id or await self.get_record(call_key(request_id))
        if call_id is None:
            return {"id": None, "request_id": request_id, "state": "cancelled"}
        watch = await self._known(call_id)
        await self._wait_for_news({call_id: watch}, {call_id: Cursor()}, 0.0)
        if watch.state not in FINAL - {"cancelled"}:
            # That of one which has not begun follows from the record alone.
            await self.cancel_call(call_id)
        return {"id": call_id, "request_id": request_id, "state": watch.state}

    async def output(self, call_id: str, name: str) -> OutputFile:
        """Open an output that an event of the job told of; no other file is ever looked at.

        Raises:
            RefusalError: There is no such job or output.
        """
        watch = await self._known(call_id)
        url = f"/v1/jobs/{call_id}/outputs/{name}"
        event = await watch.output(url, _OUTPUT_SECONDS)
        content = await self.read_file(f"outputs/{call_id}/{name}") if event else None
        if event is None or content is None:
            raise RefusalError(404, "unknown_output", f"job {call_id} has no such output")
        return OutputFile(name, event["size"], event["sha256"], content)

    async def has_input(self, sha256: str) -> bool:
        """Tell whether an input image is there, and will be while a job waits for it."""
        written = await self.written_at(f"inputs/{sha256}")
        return written is not None and time.time() - written < _INPUT_SECONDS

    async def put_input(self, sha256: str, data: bytes) -> bool:
        """Keep an input image; tell whether it is new, or was old enough to be written again.

        Raises:
            RefusalError: It has another digest.
        """
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if not hmac.compare_digest(digest, sha256):
            message = f"these bytes have the digest {digest}, not {sha256}"
            raise RefusalError(400, "wrong_hash", message)
        if await self.has_input(sha256):
            return False
        await self.write_file(f"inputs/{sha256}", data)
        return True

    async def aclose(self) -> None:
        """End what follows the jobs; the jobs go on."""
        watches, self._watches = list(self._watches.values()), {}
        await asyncio.gather(*(watch.close() for watch in watches))

    # Submitting.

    async def _start(self, raw: Mapping[str, Any], document: JobDocument) -> tuple[str, bool]:
        """Start a job unless another call is about to; return its id, and whether that was so."""
        request_id = document.request_id
        number = 0
        while not await self.claim_record(submit_key(request_id, number), time.time()):
            call_id = await self._await_call(request_id)
            if call_id is not None:
                return call_id, True
            begun = await self.get_record(submit_key(request_id, number))
            if begun is not None and time.time() - begun < self._orphan_seconds:
                message = "this request is just being submitted by another call"
                raise RefusalError(503, "submitting", message, retry_after=2)
            number += 1
        try:
            call_id = await self.spawn(raw)
        except BaseException:
            # Should it have begun all the same, it writes itself down, and the next one yields.
            await self.drop_record(submit_key(request_id, number))
            raise
        await self.claim_record(job_key(call_id), job_record(document))
        if not await self.claim_record(call_key(request_id), call_id):
            # It may be its own doing: a job writes itself down when it begins.
            first = await self.get_record(call_key(request_id))
            if first != call_id:
                await self.cancel_call(call_id)
                return str(first), True
        if await self.get_record(cancel_key(request_id)):
            await self.cancel_call(call_id)
        logger.info("request %s is job %s", request_id, call_id)
        return call_id, False

    async def _await_call(self, request_id: str) -> str | None:
        """Wait for the call of a request that is being submitted."""
        deadline = time.monotonic() + min(_SUBMIT_SECONDS, self._orphan_seconds)
        while True:
            call_id: str | None = await self.get_record(call_key(request_id))
            if call_id is not None or time.monotonic() >= deadline:
                return call_id
            # There is nothing on Modal that would tell.
            await asyncio.sleep(_SUBMIT_PAUSE)

    async def _refuse_cancelled(self, request_id: str) -> None:
        if await self.get_record(cancel_key(request_id)):
            error = WorkflowCancelledError("the request was cancelled before it was submitted")
            raise RefusalError(409, "cancelled", str(error), failure=error)

    # Following.

    async def _watch(self, call_id: str) -> JobWatch | None:
        """Return the watch of a job, which is begun if there is none; None for no job of ours."""
        watch = self._watches.get(call_id)
        if watch is None:
            record = await self.get_record(job_key(call_id))
            if record is None:
                return None
            watch = self._watches.get(call_id)  # another call may have begun it meanwhile
            if watch is None:
                watch = self._watches[call_id] = JobWatch(self, call_id, record)
                watch.start()
        watch.touch()
        for old in [w for w in self._watches.values() if w.is_idle]:
            self._watches.pop(old.call_id, None)
            await old.close()
        return watch

    async def _known(self, call_id: str) -> JobWatch:
        watch = await self._watch(call_id)
        if watch is None:
            unknown = JobExpiredError(f"no job {call_id} is known", job_id=call_id)
            raise RefusalError(404, "unknown_job", str(unknown), failure=unknown)
        return watch

    async def _wait_for_news(
        self, watches: Mapping[str, JobWatch], cursors: Mapping[str, Cursor], wait: float
    ) -> None:
        news = asyncio.Event()
        for watch in watches.values():
            watch.listeners.add(news)
        try:
            is_fresh = any(watch.is_fresh for watch in watches.values())
            deadline = time.monotonic() + max(wait, FIRST_LOOK_SECONDS if is_fresh else 0.0)
            progress_due = time.monotonic() + PROGRESS_SECONDS
            while not any(watch.state in FINAL for watch in watches.values()):
                news.clear()
                if any(watch.is_urgent(cursors[call_id]) for call_id, watch in watches.items()):
                    await asyncio.sleep(GATHER_SECONDS)
                    return
                now = time.monotonic()
                if now >= progress_due and any(
                    watch.has_progress(cursors[call_id]) for call_id, watch in watches.items()
                ):
                    return
                if now >= deadline:
                    return
                until = min(deadline, progress_due) if now < progress_due else deadline
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), until - now)
        finally:
            for watch in watches.values():
                watch.listeners.discard(news)
                watch.touch()

    # Where calls run and things are kept.

    @abc.abstractmethod
    async def get_record(self, key: str) -> Any:
        """Return the record under a key, or None."""

    @abc.abstractmethod
    async def claim_record(self, key: str, value: Any) -> bool:
        """Write a record where there is none; tell whether it was written."""

    @abc.abstractmethod
    async def drop_record(self, key: str) -> None:
        """Remove a record, if it is there."""

    @abc.abstractmethod
    async def spawn(self, document: Mapping[str, Any]) -> str:
        """Start a call of the job function and return its id.

        Raises:
            RefusalError: No more calls are taken for the moment.
        """

    @abc.abstractmethod
    async def outcome(self, call_id: str, wait: float) -> Outcome | None:
        """Wait for the end of a call; None where it has not come within so many seconds."""

    @abc.abstractmethod
    async def cancel_call(self, call_id: str) -> None:
        """Ask for the end of a call."""

    @abc.abstractmethod
    def feed(self, call_id: str) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Yield what a job has told, from the beginning, and go on as it tells more."""

    @abc.abstractmethod
    async def read_file(self, path: str) -> AsyncIterator[bytes] | None:
        """Open a file; None where there is none."""

    @abc.abstractmethod
    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file, whole or not at all, over the one that is there."""

    @abc.abstractmethod
    async def written_at(self, path: str) -> float | None:
        """Tell when a file was written, in seconds since the epoch; None where there is none."""

    @abc.abstractmethod
    async def counts(self) -> dict[str, int | None]:
        """Return the counts `queued`, `running` and `containers`."""


def _unknown(call_id: str) -> dict[str, Any]:
    error = JobExpiredError(f"no job {call_id} is known", job_id=call_id)
    return {
        "id": call_id,
        "request_id": None,
        "state": "unknown",
        "cursor": "",
        "events": [],
        "error": encode_error(error),
    }
