"""A backend of one method that does what a test tells it, batch by batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from comfy_executors import (
    BaseWorkflowExecutor,
    Batch,
    BatchResult,
    WorkflowOutputImage,
    WorkflowTemplate,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import Job

DEADLINE = 30.0  # seconds; generous, since nothing is meant to come near it

TEMPLATE = WorkflowTemplate(
    '{"1": {"class_type": "Sampler", "inputs": {"seed": 0, "text": "{{ tag }}"}},'
    ' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}'
)

Behaviour = Callable[["GatedExecutor", str, Batch, JobControl], None]


def run_freely(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
    """Let every batch succeed at once."""


def wait_at_gate(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
    """Let a batch end as, and when, the test says."""
    gate = executor.gate(batch.index, tag)
    control.wait_for(gate)
    gate.result()


class GatedExecutor(BaseWorkflowExecutor):
    """Batches begin, wait at their gate, and end; the journal says in which order."""

    def __init__(
        self, behave: Behaviour = wait_at_gate, *, max_workers: int = 2, batch_size: int = 1
    ) -> None:
        super().__init__(batch_size, max_workers=max_workers)
        self.behave = behave
        self.journal: list[tuple[str, str, int]] = []
        self.backend_closed = 0
        self.backend_reset = 0
        self._gates: dict[tuple[str, int], Future[None]] = {}
        self._news = threading.Condition()

    def submit(self, num_samples: int, tag: str = "a", **options: Any) -> Any:
        """Submit the template; the run is typed Any to keep the tests' own lines short."""
        return self.submit_workflow(TEMPLATE, num_samples=num_samples, tag=tag, **options)

    def gate(self, index: int, tag: str = "a") -> Future[None]:
        """The future at which a batch waits: its result or exception is the batch's."""
        with self._news:
            return self._gates.setdefault((tag, index), Future())

    def open_gates(self, count: int, tag: str = "a") -> None:
        for index in range(count):
            gate = self.gate(index, tag)
            if not gate.done():
                gate.set_result(None)

    def note(self, kind: str, tag: str, index: int) -> None:
        with self._news:
            self.journal.append((kind, tag, index))
            self._news.notify_all()

    def count(self, kind: str, tag: str | None = None) -> int:
        with self._news:
            return sum(entry[0] == kind and tag in (None, entry[1]) for entry in self.journal)

    def wait_until(self, kind: str, count: int, tag: str | None = None) -> None:
        """Wait until so many entries of a kind are in the journal."""
        with self._news:
            reached = self._news.wait_for(lambda: self.count(kind, tag) >= count, DEADLINE)
        assert reached, f"{self.count(kind, tag)} of {count} {kind}; journal: {self.journal}"

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        (batch,) = job.batches
        tag = str(batch.render(batch)["1"]["inputs"]["text"])
        control.begin(batch)
        self.note("begin", tag, batch.index)
        try:
            self.behave(self, tag, batch, control)
        finally:
            self.note("end", tag, batch.index)
        yield BatchResult(batch.index, [picture(batch)], seed=batch.seed)

    def _close_backend(self) -> None:
        self.backend_closed += 1

    def _reset_backend(self) -> None:
        self.backend_reset += 1


def picture(batch: Batch) -> WorkflowOutputImage:
    return WorkflowOutputImage(
        b"picture %d" % batch.index, name=f"{batch.index}.png", batch_index=batch.index
    )


def indexes(images: Any) -> list[int]:
    return [image.batch_index for image in images]


def threads_of(executor: BaseWorkflowExecutor) -> list[threading.Thread]:
    name = type(executor).__name__
    return [thread for thread in threading.enumerate() if thread.name == name]


def call_in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call a function in a thread of its own; the future has what came of it."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="test-caller", daemon=True).start()
    return future


def helpers() -> list[str]:
    """The threads that make calls side by side at present."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.endswith("helper")]
