"""Whole outputs and complete batches out of events, however these arrive."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Union

from comfy_executors.errors import ComfyExecutorsError
from comfy_executors.wire.events import (
    BatchEnded,
    End,
    Event,
    Failed,
    OutputPart,
    Progress,
    Started,
    decode_event,
)


@dataclass(frozen=True)
class WholeOutput:
    """One output, checked against its size and sha256; of one behind a URL these are promises.

    Args:
        batch: The batch.
        output: Its number in the batch.
        node: The node that reported it.
        name: The file's name as ComfyUI gave it.
        subfolder: Its folder below ComfyUI's output folder.
        type: ComfyUI's word for where it lies.
        cached: Whether ComfyUI answered from its cache.
        size: Its bytes.
        sha256: Its digest.
        data: Its content; or
        url: where to get it.
    """

    batch: int
    output: int
    node: str | None
    name: str
    subfolder: str
    type: str
    cached: bool
    size: int
    sha256: str
    data: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)

    def matches(self, data: bytes) -> bool:
        """Tell whether bytes, such as those from its URL, are this output."""
        digest = hashlib.sha256(data).hexdigest()
        return len(data) == self.size and hmac.compare_digest(digest, self.sha256)


@dataclass(frozen=True)
class CompleteBatch:
    """A batch with all its outputs, in order."""

    batch: int
    outputs: tuple[WholeOutput, ...] = field(repr=False)
    prompt_id: str | None
    seconds: float
    attempt: int


@dataclass(frozen=True)
class Missing:
    """Something that has not come.

    Args:
        batch: The batch it belongs to.
        output: The output, or None where nobody told how many there are.
        parts: The parts of it that have not come; empty where the whole of it has not.
    """

    batch: int
    output: int | None = None
    parts: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.output is None:
            return f"the end of batch {self.batch}"
        text = f"output {self.output} of batch {self.batch}"
        return f"parts {', '.join(map(str, self.parts))} of {text}" if self.parts else text


News = Union[Started, Progress, WholeOutput, CompleteBatch, Failed, End]


@dataclass
class _Partial:
    """The parts of one version of an output; two attempts may make two that differ."""

    parts: int
    size: int
    received: dict[int, bytes] = field(default_factory=dict)

    def missing(self) -> tuple[int, ...]:
        return tuple(part for part in range(self.parts) if part not in self.received)


@dataclass
class _Batch:
    partials: dict[int, dict[tuple[str, int, int, float], _Partial]] = field(default_factory=dict)
    whole: dict[int, WholeOutput] = field(default_factory=dict)
    ended: BatchEnded | None = None


class Assembler:
    """Takes events in any order, repeated, of several attempts, with some lost.

    Each output is handed out once, as soon as it is whole, and each batch once it is complete;
    parts are never mixed with those of another version of the same output.

    Args:
        batches: The numbers of the batches that the job has.
        keeps_data: Whether a complete batch comes with the bytes of its outputs; otherwise they
            are in the news of each single output only, and no memory is taken by them here.

    Attributes:
        job_error: The error of the whole job, if one was told.
        end: The last event of the highest attempt, once it has come.
    """

    def __init__(self, batches: Iterable[int], *, keeps_data: bool = True) -> None:
        self._keeps_data = keeps_data
        self._open = {batch: _Batch() for batch in batches}
        self._newest = (-1, -1)  # attempt and number of the newest progress that was passed on
        self._started: set[int] = set()
        self.job_error: ComfyExecutorsError | None = None
        self.end: End | None = None

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The batches that are neither complete nor failed."""
        return tuple(self._open)

    def add(self, raw: Any) -> list[News]:
        """Take an event, as JSON or decoded, and return what is new by it.

        Raises:
            ServerResponseError: It is no event.
        """
        if isinstance(raw, dict) and not raw:
            return []  # what a worker leaves of an event that a job's final result has no room for
        event: Event = decode_event(raw) if isinstance(raw, dict) else raw
        if isinstance(event, OutputPart):
            return self._add_part(event)
        if isinstance(event, BatchEnded):
            return self._add_end_of_batch(event)
        if isinstance(event, Failed):
            return self._add_failure(event)
        if isinstance(event, Progress):
            number = (event.attempt, event.seq)
            is_new = number > self._newest and event.batch in self._open
            self._newest = max(number, self._newest)
            return [event] if is_new else []
        if isinstance(event, Started):
            is_new = event.attempt not in self._started
            self._started.add(event.attempt)
            return [event] if is_new else []
        if self.end is not None and self.end.attempt >= event.attempt:
            return []
        self.end = event
        return [event]

    def missing(self) -> list[Missing]:
        """Name what has not come of the batches that are neither complete nor failed."""
        missing: list[Missing] = []
        for number, batch in self._open.items():
            if batch.ended is None:
                missing.append(Missing(number))
            expected = batch.ended.order if batch.ended else sorted(batch.partials)
            for output in expected:
                if output not in batch.whole:
                    versions = batch.partials.get(output, {}).values()
                    best = min((version.missing() for version in versions), key=len, default=())
                    missing.append(Missing(number, output, best))
        return missing

    def _add_part(self, event: OutputPart) -> list[News]:
        batch = self._open.get(event.batch)
        if batch is None or event.output in batch.whole:
            return []
        versions = batch.partials.setdefault(event.output, {})
        if event.url is not None:
            return self._add_whole(batch, event, None)
        if event.data is None:
            return []
        version = (event.sha256, event.size, event.parts, _length_of_parts(event, event.data))
        partial = versions.setdefault(version, _Partial(event.parts, event.size))
        partial.received.setdefault(event.part, event.data)
        if len(partial.received) < partial.parts:
            return []
        data = b"".join(partial.received[part] for part in range(partial.parts))
        del versions[version]  # whether it is right or broken
        return self._add_whole(batch, event, data)

    def _add_whole(self, batch: _Batch, event: OutputPart, data: bytes | None) -> list[News]:
        whole = WholeOutput(
            event.batch,
            event.output,
            event.node,
            event.name,
            event.subfolder,
            event.type,
            event.cached,
            event.size,
            event.sha256,
            data,
            None if data is not None else event.url,
        )
        if data is not None and not whole.matches(data):
            return []
        batch.whole[event.output] = whole if self._keeps_data else replace(whole, data=None)
        batch.partials.pop(event.output, None)
        return [whole, *self._complete(event.batch, batch)]

    def _add_end_of_batch(self, event: BatchEnded) -> list[News]:
        batch = self._open.get(event.batch)
        if batch is None or (batch.ended and batch.ended.attempt > event.attempt):
            return []
        batch.ended = event
        return self._complete(event.batch, batch)

    def _complete(self, number: int, batch: _Batch) -> list[News]:
        ended = batch.ended
        if ended is None or any(output not in batch.whole for output in ended.order):
            return []
        del self._open[number]
        outputs = tuple(batch.whole[output] for output in ended.order)
        return [CompleteBatch(number, outputs, ended.prompt_id, ended.seconds, ended.attempt)]

    def _add_failure(self, event: Failed) -> list[News]:
        if event.batch is None:
            is_new = self.job_error is None
            self.job_error = self.job_error or event.error
            return [event] if is_new else []
        return [event] if self._open.pop(event.batch, None) is not None else []


def _length_of_parts(event: OutputPart, data: bytes) -> float:
    """Tell how long the parts of an output are, all but the last; workers may cut differently."""
    if event.part < event.parts - 1:
        return len(data)
    return (event.size - len(data)) / max(1, event.parts - 1)
