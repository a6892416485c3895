"""What the web function and the jobs of an app write down for each other, and under which names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from comfy_executors.errors import ComfyExecutorsError
from comfy_executors.wire import JobDocument, encode_error

OWNER = "comfy-executors"
# Of progress these follow each other fast, and only the newest counts.
_THINNED = {"node", "step"}


class JobChannel(Protocol):
    """What a running job has of the app around it; its calls block."""

    call_id: str

    def get(self, key: str) -> Any:
        """Return what stands under a key, or None."""

    def put(self, key: str, value: Any) -> None:
        """Write something down."""

    def claim(self, key: str, value: Any) -> bool:
        """Write something down where nothing stands; tell whether it was written."""

    def is_cancelled(self, request_id: str) -> bool:
        """Tell whether this job is not wanted any more."""

    def emit(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Tell events, in order."""

    def events(self) -> Iterable[Mapping[str, Any]]:
        """Return the events that this job has told, in all its attempts."""

    def kept_outputs(self) -> set[str]:
        """Return the names of the outputs of this job that are kept."""

    def write_output(self, name: str, data: bytes) -> None:
        """Keep an output of this job; OutputFileError where it cannot be."""

    def read_input(self, sha256: str) -> bytes | None:
        """Return what was put under a digest, or None."""


def job_key(call_id: str) -> str:
    """Name the record of a job: whose id is not among these is none of ours."""
    return f"job:{call_id}"


def call_key(request_id: str) -> str:
    """Name the record of which call is the one of a request; the first that stands there is."""
    return f"call:{request_id}"


def submit_key(request_id: str, number: int) -> str:
    """Name the record of who submits a request: its time; the next number takes over."""
    return f"submit:{request_id}:{number}"


def cancel_key(request_id: str) -> str:
    """Name the record that a request is not wanted any more."""
    return f"cancel:{request_id}"


def attempt_key(call_id: str, attempt: int) -> str:
    """Name the record of an attempt that a job has begun."""
    return f"attempt:{call_id}:{attempt}"


def progress_key(call_id: str) -> str:
    """Name the record of the newest progress of a job's batches."""
    return f"progress:{call_id}"


def is_thinned(event: Mapping[str, Any]) -> bool:
    """Tell whether only the newest of such events counts, so that it is no part of the feed."""
    return event["kind"] == "progress" and event["event"]["kind"] in _THINNED


def is_urgent(event: Mapping[str, Any]) -> bool:
    """Tell whether who waits for a job wants to know of an event at once."""
    return bool(event["kind"] != "progress")


def position(event: Mapping[str, Any]) -> tuple[int, int]:
    """Return by what a job's events are in order."""
    return event["attempt"], event["seq"]


def job_record(document: JobDocument) -> dict[str, Any]:
    """Make the record of a job: its request id and its batches without their graphs."""
    batches = [
        {"batch": item.batch, "size": item.size, "seed": item.seed} for item in document.graphs
    ]
    return {"request_id": document.request_id, "batches": batches}


@dataclass(frozen=True)
class Envelope:
    """What a job returns, however it ends: never an exception.

    Args:
        request_id: The job's own id.
        state: `done`, `failed`, `cancelled`, or `duplicate` of another call of the same request.
        attempt: Which attempt this was, from 1.
        events: All its events but thinned progress.
        failure: Why it failed where no event tells it.
    """

    request_id: str
    state: str
    attempt: int = 0
    events: tuple[dict[str, Any], ...] = ()
    failure: Mapping[str, Any] | None = None

    def encode(self) -> dict[str, Any]:
        """Make plain JSON of it: what is pickled would have to be importable by the reader."""
        return {"owner": OWNER, **vars(self), "events": list(self.events)}

    @classmethod
    def failed(cls, request_id: str, error: BaseException) -> Envelope:
        """Make the envelope of a job that fell over."""
        return cls(request_id, "failed", failure=encode_error(error))

    @classmethod
    def decode(cls, raw: Any) -> Envelope | None:
        """Read what a call returned; None where it is no envelope."""
        if not isinstance(raw, Mapping) or raw.get("owner") != OWNER:
            return None
        events = tuple(raw["events"])
        return cls(raw["request_id"], raw["state"], raw["attempt"], events, raw["failure"])


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Args:
        returned: What it returned; or
        failure: why it returned nothing; or
        is_expired: whether that is not kept any more.
    """

    returned: Any = None
    failure: ComfyExecutorsError | None = None
    is_expired: bool = False
