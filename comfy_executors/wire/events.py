"""The events of a job: what a worker answers, numbered and whole or in parts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union

from comfy_executors.errors import ComfyExecutorsError, ServerResponseError
from comfy_executors.wire.failures import decode_error, encode_error, plain

# RunPod takes at most 1 MB of JSON a chunk; in base64 these are 0.7 MB.
PART_BYTES = 512 * 1024
_MAX_OUTPUTS = 100_000  # of a batch; whoever says more would have us list them as missing


@dataclass(frozen=True)
class Started:
    """The worker took the job.

    Args:
        seq: The event's number in this attempt, from 0 without gaps.
        attempt: How often the worker has started this job, from 1; the same in all events.
        request_id: The job's own id.
        worker: `comfy-executors`.
        version: The version of comfy-executors there.
        graphs: How many graphs it counted.
    """

    seq: int
    attempt: int
    request_id: str
    worker: str
    version: str
    graphs: int


@dataclass(frozen=True)
class ProgressStep:
    """A `ProgressEvent` of a batch; see there."""

    kind: str
    node: str | None = None
    title: str | None = None
    step: int | None = None
    max: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class Progress:
    """Something of a batch moved; some of these are left out when they come too fast."""

    seq: int
    attempt: int
    batch: int
    event: ProgressStep


@dataclass(frozen=True)
class OutputPart:
    """One part of one output of a batch.

    It comes as soon as its node reports, so that nobody knows yet how many there will be. The
    numbers of a batch's outputs follow from their nodes' places in the graph, and have gaps: a
    second attempt, on another worker too, numbers them alike.

    Args:
        seq: See `Started`.
        attempt: See `Started`.
        batch: The batch.
        output: The output's number in its batch.
        part: The part's number in its output, from 0.
        parts: How many parts the output has; all but the last are equally long.
        node: The node that reported it.
        name: The file's name as ComfyUI gave it.
        subfolder: Its folder below ComfyUI's output folder.
        type: ComfyUI's word for where it lies.
        cached: Whether ComfyUI answered from its cache.
        size: The bytes of the whole output.
        sha256: The digest of the whole output.
        data: The part's bytes; or
        url: where the whole output can be got. Neither of them in the summary that a job's final
            result is, where that would be too large: then it only tells what there was.
    """

    seq: int
    attempt: int
    batch: int
    output: int
    part: int
    parts: int
    node: str | None
    name: str
    subfolder: str
    type: str
    cached: bool
    size: int
    sha256: str
    data: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class BatchEnded:
    """A batch is complete: so many outputs belong to it.

    Args:
        seq: See `Started`.
        attempt: See `Started`.
        batch: The batch.
        outputs: How many outputs it has.
        prompt_id: Its prompt on the worker's ComfyUI.
        seconds: How long it took there.
        numbers: Their numbers, in the order of their nodes; None stands for 0, 1, 2 and so on.
    """

    seq: int
    attempt: int
    batch: int
    outputs: int
    prompt_id: str | None
    seconds: float
    numbers: tuple[int, ...] | None = None

    @property
    def order(self) -> Sequence[int]:
        """The numbers of its outputs."""
        return range(self.outputs) if self.numbers is None else self.numbers


@dataclass(frozen=True)
class Failed:
    """A batch failed, or with `batch` None the whole job."""

    seq: int
    attempt: int
    batch: int | None
    error: ComfyExecutorsError


@dataclass(frozen=True)
class End:
    """The last event: how many batches were completed, outputs sent, and errors told."""

    seq: int
    attempt: int
    batches: int
    outputs: int
    errors: int


Event = Union[Started, Progress, OutputPart, BatchEnded, Failed, End]
_KINDS: dict[str, type[Any]] = {
    "started": Started,
    "progress": Progress,
    "output": OutputPart,
    "batch": BatchEnded,
    "error": Failed,
    "end": End,
}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


def split(data: bytes, part_bytes: int = PART_BYTES) -> Iterator[bytes]:
    """Divide the bytes of an output into its parts; nothing is one empty part."""
    for start in range(0, max(len(data), 1), part_bytes):
        yield data[start : start + part_bytes]


def encode_event(event: Event) -> dict[str, Any]:
    """Make JSON of an event."""
    raw: dict[str, Any] = {"kind": _KIND_OF[type(event)]}
    for item in fields(event):
        value = getattr(event, item.name)
        if isinstance(value, bytes):
            raw[item.name] = base64.b64encode(value).decode()
        elif isinstance(value, ComfyExecutorsError):
            # Not under "error": RunPod's SDK ends a job as failed that yields such a key.
            raw["failure"] = encode_error(value)
        elif isinstance(value, tuple):
            raw[item.name] = list(value)
        elif isinstance(value, ProgressStep):
            raw[item.name] = {k: plain(v) for k, v in vars(value).items() if v is not None}
        elif value is not None or item.name not in ("data", "url", "numbers"):
            raw[item.name] = plain(value)
    return raw


def is_of_unknown_kind(raw: Any) -> bool:
    """Tell whether JSON is an event of a kind that only newer versions know."""
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    return isinstance(kind, str) and kind not in _KINDS


def decode_event(raw: Any) -> Event:
    """Read an event from JSON.

    Raises:
        ServerResponseError: It is none.
    """
    cls = _KINDS.get(str(raw.get("kind"))) if isinstance(raw, Mapping) else None
    if cls is None:
        raise _no_event(f"{str(raw)[:80]!r}")
    values: dict[str, Any] = {}
    for item in fields(cls):
        if cls is Failed and item.name == "error":
            values["error"] = decode_error(raw.get("failure"))
            continue
        read, value = _READERS[str(item.type)], raw.get(item.name)
        try:
            values[item.name] = read(value)
        except (TypeError, ValueError) as error:
            raise _no_event(f"{raw['kind']} with {item.name} {str(value)[:80]!r}") from error
    event: Event = cls(**values)
    if isinstance(event, OutputPart) and not event.part < event.parts <= max(1, event.size):
        raise _no_event(f"part {event.part} of {event.parts} of {event.size} bytes")
    if isinstance(event, BatchEnded) and event.outputs > _MAX_OUTPUTS:
        raise _no_event(f"{event.outputs} outputs of one batch")
    if isinstance(event, BatchEnded) and len(set(event.order)) != event.outputs:
        raise _no_event(f"{event.outputs} outputs with the numbers {str(event.numbers)[:80]}")
    return event


def _no_event(what: str) -> ServerResponseError:
    return ServerResponseError(f"the worker sent what is no event of a job: {what}")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _counts(value: Any) -> tuple[int, ...] | None:
    if value is not None and not isinstance(value, list):
        raise TypeError
    return None if value is None else tuple(map(_count, value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _bytes(value: Any) -> bytes | None:
    try:
        return None if value is None else base64.b64decode(_text(value), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _step(value: Any) -> ProgressStep:
    if not isinstance(value, Mapping):
        raise TypeError
    counts = {name: _optional(_count)(value.get(name)) for name in ("step", "max")}
    texts = {name: _optional(_text)(value.get(name)) for name in ("node", "title", "message")}
    return ProgressStep(_text(value.get("kind")), **texts, **counts)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


# By the annotations of the classes above, which are strings.
_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _count,
    "int | None": _optional(_count),
    "str": _text,
    "str | None": _optional(_text),
    "bool": _flag,
    "float": _seconds,
    "tuple[int, ...] | None": _counts,
    "bytes | None": _bytes,
    "ProgressStep": _step,
}
