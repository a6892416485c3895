"""What an app on Modal answers, read from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.errors import ComfyExecutorsError, JobExpiredError, JobLostError
from comfy_executors.wire import decode_error

QUEUED = "queued"
RUNNING = "running"
DONE = "done"
CANCELLED = "cancelled"
FINAL = {DONE, "failed", CANCELLED, "unknown", "expired"}


@dataclass(frozen=True)
class ModalBatch:
    """A batch of a job, as its document had it."""

    number: int
    size: int
    seed: int | None


@dataclass(frozen=True)
class ModalJob:
    """A job, as the app tells of it.

    Args:
        id: Modal's id of the call that runs it.
        state: `queued`, `running`, `done`, `failed`, `cancelled`, `unknown` or `expired`.
        cursor: Where the events after these begin.
        events: The events since the cursor that was asked with, as JSON.
        failure: Why it failed, or why there is nothing to be told of it.
        batches: Its batches, where they were asked for.
    """

    id: str
    state: str
    cursor: str = ""
    events: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    failure: ComfyExecutorsError | None = None
    batches: tuple[ModalBatch, ...] = ()

    @property
    def is_final(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in FINAL

    @property
    def attempt(self) -> int:
        """The highest attempt that the events are of, or 1 where there are none."""
        attempts = [event.get("attempt") for event in self.events]
        return max((attempt for attempt in attempts if isinstance(attempt, int)), default=1)


@dataclass(frozen=True)
class ModalHealth:
    """The state of an app; counts that it does not know are None.

    Args:
        version: The version of comfy-executors there.
        protocol: The version of the HTTP interface.
        backend: `modal` or `local`.
        queued: How many jobs wait.
        running: How many jobs run.
        containers: How many GPU containers there are.
    """

    version: str
    protocol: int
    backend: str
    queued: int | None = None
    running: int | None = None
    containers: int | None = None


def parse_job(body: Any) -> ModalJob:
    """Read a job object; ValueError when it is none."""
    fields = _object(body)
    job_id, state = fields.get("id"), fields.get("state")
    if not isinstance(job_id, str) or not isinstance(state, str) or not job_id:
        raise ValueError("the answer has no id and state")
    events, batches = fields.get("events") or [], fields.get("batches") or []
    if not isinstance(events, list) or not isinstance(batches, list):
        raise ValueError("its events or batches are no list")
    return ModalJob(
        job_id,
        state,
        str(fields.get("cursor") or ""),
        tuple(map(_object, events)),
        _failure(job_id, state, fields.get("error")),
        tuple(map(_batch, batches)),
    )


def parse_jobs(body: Any) -> dict[str, ModalJob]:
    """Read the answer for many jobs, by id; ValueError when it is none."""
    jobs = _object(_object(body).get("jobs"))
    return {job_id: parse_job({"id": job_id, **_object(job)}) for job_id, job in jobs.items()}


def parse_health(body: Any) -> ModalHealth:
    """Read an answer of /v1/health; ValueError when it is none."""
    fields = _object(body)
    if fields.get("worker") != "comfy-executors":
        raise ValueError("it is no app of comfy-executors")
    counts = {name: fields.get(name) for name in ("queued", "running", "containers")}
    return ModalHealth(
        str(fields.get("version") or ""),
        _whole(fields.get("protocol")),
        str(fields.get("backend") or ""),
        **{name: count if type(count) is int else None for name, count in counts.items()},
    )


def _failure(job_id: str, state: str, raw: Any) -> ComfyExecutorsError | None:
    if raw is not None:
        return decode_error(raw)
    # The app says more; these are for an answer without its words.
    if state == "unknown":
        return JobLostError("the app does not know it", job_id=job_id)
    if state == "expired":
        return JobExpiredError("it ended more than a week ago", job_id=job_id)
    return None


def _batch(raw: Any) -> ModalBatch:
    fields = _object(raw)
    seed = fields.get("seed")
    return ModalBatch(
        _whole(fields.get("batch")),
        max(1, _whole(fields.get("size"))),
        None if seed is None else _whole(seed),
    )


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise ValueError("the answer is no JSON object")
    return body


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no whole number")
    return value
