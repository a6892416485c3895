"""What RunPod answers, typed, and what the end of a job means."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.clients.runpod_chunks import ChunkFile
from comfy_executors.errors import (
    JobError,
    JobInterruptedError,
    JobResultLostError,
    JobTimeoutError,
    RunPodJobFailedError,
    WorkerLostError,
)

IN_QUEUE = "IN_QUEUE"
IN_PROGRESS = "IN_PROGRESS"
COMPLETED = "COMPLETED"
FAILED = "FAILED"
CANCELLED = "CANCELLED"
TIMED_OUT = "TIMED_OUT"
TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})

_EXECUTION_TIMEOUT = re.compile(r"execution\s*timeout\s+exceeded", re.IGNORECASE)
_GIVEN_UP = re.compile(r"job timed out after (\d+) retr", re.IGNORECASE)
_GENERATOR_ERROR = re.compile(r"handler: (.*?)\s*\ntraceback: (.*)", re.DOTALL)
_CLASS = re.compile(r"<class '(?:.*\.)?([^'.]+)'>")


@dataclass(frozen=True)
class RunPodJob:
    """A job that RunPod took.

    Args:
        id: Its id, which says nothing.
        status: Its status then, such as `IN_QUEUE`.
    """

    id: str
    status: str


@dataclass(frozen=True)
class RunPodStatus:
    """What RunPod says of a job; what it does not say is None.

    Args:
        id: The job's id.
        status: `IN_QUEUE`, `IN_PROGRESS`, `COMPLETED`, `FAILED`, `CANCELLED`, `TIMED_OUT`, or a
            new word of RunPod's, which stands for a job that goes on.
        output: The result, as any JSON; while the job runs the latest progress that it told.
        error: Why it failed: a sentence, or an exception as JSON text; see `failure`.
        queue_seconds: How long it waited for a worker, in seconds.
        execution_seconds: How long it ran, in seconds.
        worker_id: The worker that has or had it.
        retries: How often it was begun anew.
    """

    id: str
    status: str
    # Not shown: it can be megabytes, and other people's pictures.
    output: Any = field(default=None, repr=False)
    error: str | None = None
    queue_seconds: float | None = None
    execution_seconds: float | None = None
    worker_id: str | None = None
    retries: int | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.status in TERMINAL

    def failure(self, server: str | None = None) -> JobError | None:
        """Make an error of a job's end.

        Timeouts are told apart by RunPod's words, because an exceeded limit has been seen as
        `FAILED` as well as `TIMED_OUT`.

        Args:
            server: The address of the endpoint, for the error.

        Returns:
            The error; None while the job goes on, and when it completed with a result.
        """
        if not self.is_terminal or (self.status == COMPLETED and self.output is not None):
            return None
        if self.status == COMPLETED:
            return JobResultLostError(
                "completed without a result, probably because it is over RunPod's limit of "
                "10 MB: let the worker upload to S3 (BUCKET_ENDPOINT_URL), give a job fewer or "
                "smaller images, or use the worker of comfy-executors, which streams them",
                job_id=self.id,
                server=server,
            )
        if self.status == CANCELLED:
            return JobInterruptedError("was cancelled on RunPod", job_id=self.id, server=server)
        return self._timeout(server) or self._reported(server)

    def _timeout(self, server: str | None) -> JobError | None:
        text = self.error or ""
        # A handler may have the same words in its own error, but then its output is there as well.
        if self.output is None and _EXECUTION_TIMEOUT.search(text):
            return JobTimeoutError(
                "ran longer than its execution timeout: give it more with execution_timeout=, or "
                "less to do with batches_per_job=",
                started=True,
                job_id=self.id,
                server=server,
            )
        given_up = _GIVEN_UP.search(text)
        if self.output is None and given_up:
            return WorkerLostError(
                f"its worker died or fell silent ({text}); look at the worker's logs on RunPod",
                retries=int(given_up[1]),
                job_id=self.id,
                worker_id=self.worker_id,
                server=server,
            )
        if self.status != TIMED_OUT:
            return None
        started = bool(self.worker_id or self.execution_seconds)
        what = "its worker never reported back" if started else "no worker took it in time"
        message = f"timed out: {what}" + (f" ({text})" if text else "")
        return JobTimeoutError(message, started=started, job_id=self.id, server=server)

    def _reported(self, server: str | None) -> RunPodJobFailedError:
        facts = _parse_error(self.error)
        details = self.output.get("details") if isinstance(self.output, dict) else None
        details = details if isinstance(details, list) else [] if details is None else [details]
        return RunPodJobFailedError(
            facts["reason"] or "RunPod gives no reason",
            job_id=self.id,
            exception_type=facts.get("exception_type"),
            traceback=facts.get("traceback", ""),
            details=[str(detail) for detail in details],
            worker_id=self.worker_id or facts.get("worker_id"),
            server=server,
        )


def _parse_error(text: str | None) -> dict[str, Any]:
    """Take an error apart: an exception is JSON text, one of a generator is a text of two parts."""
    text = text or ""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict) and "error_message" in parsed:
        kind = str(parsed.get("error_type") or "")
        found = _CLASS.fullmatch(kind)
        return {
            "reason": str(parsed["error_message"]),
            "exception_type": (found[1] if found else kind) or None,
            "traceback": str(parsed.get("error_traceback") or ""),
            "worker_id": parsed.get("worker_id"),
        }
    parts = _GENERATOR_ERROR.fullmatch(text)
    if parts:
        return {"reason": parts[1], "traceback": parts[2]}
    return {"reason": text}


@dataclass(frozen=True)
class RunPodStream:
    """What a job yielded since it was asked last; RunPod forgets it with this answer.

    Args:
        status: The job's status then; empty when RunPod did not say.
        chunks: What the worker yielded, as any JSON, in the order that RunPod gives. Many are read
            from a file as they are iterated over, until the answer is closed.
    """

    status: str
    chunks: tuple[Any, ...] | ChunkFile = field(repr=False)

    @property
    def is_drained(self) -> bool:
        """Whether nothing more can come: the job has ended and there was nothing left."""
        return self.status in TERMINAL and not self.chunks

    def close(self) -> None:
        """Give the file back that a large answer has."""
        if isinstance(self.chunks, ChunkFile):
            self.chunks.close()


@dataclass(frozen=True)
class JobCounts:
    """How many jobs of an endpoint are in which state."""

    completed: int = 0
    failed: int = 0
    in_progress: int = 0
    in_queue: int = 0
    retried: int = 0


@dataclass(frozen=True)
class WorkerCounts:
    """How many workers of an endpoint are in which state.

    `throttled` means that RunPod has no free machine for them, `unhealthy` that they crash.
    """

    idle: int = 0
    initializing: int = 0
    ready: int = 0
    running: int = 0
    throttled: int = 0
    unhealthy: int = 0


@dataclass(frozen=True)
class RunPodHealth:
    """The state of an endpoint."""

    jobs: JobCounts
    workers: WorkerCounts


def parse_job(body: Any) -> RunPodJob:
    """Read the answer to a submit or retry; ValueError when it is none."""
    fields = _object(body)
    if not fields.get("id"):
        raise ValueError(said(fields) or "the answer has no id")
    return RunPodJob(str(fields["id"]), str(fields.get("status") or IN_QUEUE))


def parse_status(body: Any) -> RunPodStatus:
    """Read a status object; ValueError when it is none."""
    fields = _object(body)
    if not fields.get("id") or not fields.get("status"):
        raise ValueError(said(fields) or "the answer has no id and status")
    worker_id = fields.get("workerId")
    retries = fields.get("retries")
    return RunPodStatus(
        str(fields["id"]),
        str(fields["status"]),
        output=fields.get("output"),
        error=_text(fields.get("error")),
        queue_seconds=_seconds(fields.get("delayTime")),
        execution_seconds=_seconds(fields.get("executionTime")),
        worker_id=str(worker_id) if worker_id else None,
        retries=retries if isinstance(retries, int) else None,
    )


def parse_stream(body: Any) -> RunPodStream:
    """Read an answer of /stream, also in the form of a bare list; ValueError when it is none."""
    fields: Mapping[str, Any] = {"stream": body} if isinstance(body, list) else _object(body)
    items = fields.get("stream")
    if items is None and fields.get("status"):
        items = []
    if not isinstance(items, list):
        raise ValueError(said(fields) or "the answer has no stream")
    # An item may carry metrics, and nothing else.
    chunks = (item["output"] for item in items if isinstance(item, dict) and "output" in item)
    return RunPodStream(str(fields.get("status") or ""), tuple(chunks))


def parse_health(body: Any) -> RunPodHealth:
    """Read an answer of /health; counts that are missing are 0. ValueError when it is none."""
    fields = _object(body)
    jobs, workers = fields.get("jobs"), fields.get("workers")
    if not isinstance(jobs, dict) or not isinstance(workers, dict):
        raise ValueError(said(fields) or "the answer has no jobs and workers")
    return RunPodHealth(
        JobCounts(
            completed=_count(jobs.get("completed")),
            failed=_count(jobs.get("failed")),
            in_progress=_count(jobs.get("inProgress")),
            in_queue=_count(jobs.get("inQueue")),
            retried=_count(jobs.get("retried")),
        ),
        WorkerCounts(
            idle=_count(workers.get("idle")),
            initializing=_count(workers.get("initializing")),
            ready=_count(workers.get("ready")),
            running=_count(workers.get("running")),
            throttled=_count(workers.get("throttled")),
            unhealthy=_count(workers.get("unhealthy")),
        ),
    )


def parse_removed(body: Any) -> int:
    """Read the answer to a purge; ValueError when it is none."""
    fields = _object(body)
    removed = fields.get("removed")
    if not isinstance(removed, int):
        raise ValueError(said(fields) or "the answer does not say how many were removed")
    return removed


def said(body: Any) -> str | None:
    """Return RunPod's own words for what is wrong, or None."""
    if not isinstance(body, Mapping):
        return None
    return _text(body.get("error") or body.get("message") or body.get("detail"))


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise ValueError("the answer is no JSON object")
    return body


def _text(value: Any) -> str | None:
    # Handlers may return any JSON as their error.
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _seconds(value: Any) -> float | None:
    return value / 1000 if isinstance(value, (int, float)) else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
