"""What a worker remembers of the jobs that it has done, for those that come a second time.

RunPod begins a job anew when its worker seemed dead, and may hand it to the same one again. Jobs
of an app that keeps their files are recalled from these instead; see `engine.JobFiles`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.images import WorkflowOutput
from comfy_executors.wire import JobGraph, JobOptions

_MAX_JOBS = 32
# Of these ComfyUI can be asked again; texts and images of its websocket are gone.
_KEPT_TYPES = {"output", "temp", "input"}


@dataclass(frozen=True)
class MadeOutput:
    """An output that was delivered, by name; its bytes are in ComfyUI's folder."""

    number: int
    node: str | None
    name: str
    subfolder: str
    type: str
    cached: bool
    sha256: str

    @classmethod
    def of(cls, number: int, output: WorkflowOutput) -> MadeOutput:
        """Take down an output that is delivered."""
        return cls(
            number,
            output.node_id,
            output.name,
            output.subfolder,
            output.type,
            output.cached,
            hashlib.sha256(output.data).hexdigest(),
        )

    @property
    def can_be_fetched(self) -> bool:
        """Whether ComfyUI still has it, as far as we know."""
        return self.type in _KEPT_TYPES


@dataclass(frozen=True)
class MadeBatch:
    """A batch that was delivered, its outputs in the order of their nodes."""

    fingerprint: str
    outputs: tuple[MadeOutput, ...]
    prompt_id: str | None
    seconds: float

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of its outputs."""
        return tuple(output.number for output in self.outputs)


@dataclass
class _Record:
    attempts: int = 0
    under_way: bool = False
    batches: dict[int, MadeBatch] = field(default_factory=dict)


def fingerprint(item: JobGraph, options: JobOptions) -> str:
    """Tell apart what a batch of the same number in the same job may be asked to do."""
    asked = [item.graph, options.include_previews, options.allow_partial]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Ledger:
    """The newest jobs of this process, by request id."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def claim(self, request_id: str, is_cancelled: Callable[[], bool]) -> int:
        """Begin a job, after the same one that may still be under way; return the attempt, from 1.

        Raises:
            WorkflowCancelledError: `is_cancelled` became true; `wake` makes it be looked at.
        """
        with self._changed:
            while True:
                if is_cancelled():
                    raise WorkflowCancelledError("the job was cancelled")
                record = self._records.setdefault(request_id, _Record())
                if not record.under_way:
                    break
                self._changed.wait()
            record.under_way = True
            record.attempts += 1
            self._records.move_to_end(request_id)
            self._forget_oldest()
            return record.attempts

    def release(self, request_id: str) -> None:
        """Say that a claimed job has ended, one way or the other."""
        with self._changed:
            self._records[request_id].under_way = False
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those that wait in `claim` look whether they were cancelled."""
        with self._changed:
            self._changed.notify_all()

    def remember(self, request_id: str, batch: int, made: MadeBatch) -> None:
        """Take down what a batch made, if all of it can be fetched again."""
        if all(output.can_be_fetched for output in made.outputs):
            with self._changed:
                self._records.setdefault(request_id, _Record()).batches[batch] = made

    def recall(self, request_id: str, batch: int, fingerprint: str) -> MadeBatch | None:
        """Return what a batch made in an earlier attempt, if it was asked the same then."""
        with self._changed:
            record = self._records.get(request_id)
            made = record.batches.get(batch) if record else None
        return made if made is not None and made.fingerprint == fingerprint else None

    def _forget_oldest(self) -> None:
        done = [key for key, record in self._records.items() if not record.under_way]
        for key in done[: max(0, len(self._records) - _MAX_JOBS)]:
            del self._records[key]
