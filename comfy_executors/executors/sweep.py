"""One run for each row of variables: a few at a time, and none in the way of another."""

from __future__ import annotations

import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from comfy_executors.errors import ComfyExecutorsError, ExecutorClosedError, WorkflowCancelledError
from comfy_executors.images import WorkflowOutput, WorkflowOutputImage
from comfy_executors.runs import BatchResult, ProgressCallback, ProgressEvent, WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

logger = logging.getLogger(__name__)

# What a row says of these is no variable of the template but how this row is run.
ROW_ARGUMENTS = ("seed", "num_samples", "input_images")


@dataclass(frozen=True)
class RowResult:
    """What came of one row.

    Args:
        index: Which row it is, from 0.
        row: The row as it was given.
        batches: The results of the batches that succeeded, in order.
        error: Why the row failed, or None.
        seed: The seed of the row's first batch; None where it has none, or did not get so far.
        seconds: How long it took from being started to its end.
    """

    index: int
    row: Mapping[str, Any]
    batches: list[BatchResult] = field(default_factory=list, repr=False)
    error: BaseException | None = None
    seed: int | None = None
    seconds: float = 0.0

    @property
    def images(self) -> list[WorkflowOutputImage]:
        """The images of the row, in order."""
        return [image for batch in self.batches for image in batch.images]

    @property
    def outputs(self) -> list[WorkflowOutput]:
        """What the row made beside images, in order."""
        return [output for batch in self.batches for output in batch.outputs]


@dataclass(frozen=True)
class RowCall:
    """One row that is to be run.

    Args:
        index: Which row it is, from 0.
        row: The variables, and what `ROW_ARGUMENTS` names.
        options: What `submit_workflow` gets for this row beside what it gets for all.
    """

    index: int
    row: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


class Submitter(Protocol):
    """An executor, as a sweep sees it."""

    max_workers: int

    def submit_workflow(
        self, workflow_template: WorkflowTemplate, *args: Any, **options: Any
    ) -> WorkflowRun: ...


def map_rows(
    executor: Submitter,
    template: WorkflowTemplate,
    calls: Iterable[RowCall],
    *,
    ordered: bool = False,
    on_progress: ProgressCallback | None = None,
    **options: Any,
) -> Generator[RowResult, None, None]:
    """Run each row; see `BaseWorkflowExecutor.map_workflows`, which this is but for the calls.

    Raises:
        TypeError: `template` is no template, or `on_progress` cannot be called.
    """
    if not isinstance(template, WorkflowTemplate):
        raise TypeError(
            f"workflow_template must be a WorkflowTemplate, not {type(template).__name__}"
        )
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress must be callable, not {type(on_progress).__name__}")
    common = dict(options.pop("variables", None) or {})
    arguments = inspect.signature(executor.submit_workflow).parameters
    for name in template.variables & options.keys() - arguments.keys():
        common[name] = options.pop(name)
    sweep = _Sweep(executor, template, common, options, on_progress)
    return sweep.results(iter(calls), ordered)


class _Sweep:
    """The rows of one call that are in flight, and how to start one more."""

    def __init__(
        self,
        executor: Submitter,
        template: WorkflowTemplate,
        common: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: ProgressCallback | None,
    ) -> None:
        self._executor = executor
        self._template = template
        self._common = common
        self._options = options
        self._on_progress = on_progress
        self._progress_lock = threading.Lock()
        self._runs: dict[int, WorkflowRun] = {}  # by the row's place in the hand-out
        self._finished: queue.SimpleQueue[tuple[int, RowResult]] = queue.SimpleQueue()

    def results(self, calls: Iterator[RowCall], ordered: bool) -> Generator[RowResult, None, None]:
        """Yield the results; as many rows are begun ahead as keep the server busy, and no more."""
        window = self._executor.max_workers + 2
        waiting: dict[int, RowResult] = {}  # finished before one that is to come first
        started = taken = 0
        try:
            while True:
                while started - taken < window and (call := next(calls, None)) is not None:
                    self._start(started, call)
                    started += 1
                if started == taken:
                    return
                if not ordered or taken not in waiting:
                    place, result = self._finished.get()
                    self._runs.pop(place, None)
                    waiting[place if ordered else taken] = result
                if taken in waiting:
                    taken += 1
                    yield waiting.pop(taken - 1)
        finally:
            for run in self._runs.values():
                run.cancel()

    def _start(self, place: int, call: RowCall) -> None:
        began = time.monotonic()
        try:
            run = self._submit(call)
        except ExecutorClosedError:
            raise  # of all that is left, and no matter of this row
        except (ComfyExecutorsError, ValueError) as error:
            self._finished.put((place, RowResult(call.index, call.row, error=error)))
            self._report_unstarted(call, error)
            return
        self._runs[place] = run
        fail_fast = not self._options.get("ignore_errors")
        _Collector(run, fail_fast, partial(self._finish, place, call, run, began)).watch()

    def _submit(self, call: RowCall) -> WorkflowRun:
        options: dict[str, Any] = {**self._options, **call.options}
        if not isinstance(call.row, Mapping):
            raise ValueError(f"a row is a mapping of variables, not {type(call.row).__name__}")
        variables = {**self._common, **call.row}
        for name in ROW_ARGUMENTS:
            if name in variables:
                options[name] = variables.pop(name)
        number = options.get("num_samples", 1)
        if not isinstance(number, int):
            raise ValueError(f"num_samples must be a whole number from 1, not {number!r}")
        if self._on_progress is not None:
            options["on_progress"] = partial(self._report, call)
        return self._executor.submit_workflow(self._template, variables=variables, **options)

    def _report(self, call: RowCall, event: ProgressEvent) -> None:
        if self._on_progress is not None:
            with self._progress_lock:
                self._on_progress(replace(event, row=call.index))

    def _report_unstarted(self, call: RowCall, error: Exception) -> None:
        wanted = self._options.get("num_samples", 1)
        if isinstance(call.row, Mapping):
            wanted = call.row.get("num_samples", wanted)
        size = wanted if isinstance(wanted, int) else None
        try:
            self._report(call, ProgressEvent("failed", 0, max=size, message=str(error)))
        except Exception:  # as for the events of a run
            logger.exception("on_progress raised; the sweep goes on")

    def _finish(self, place: int, call: RowCall, run: WorkflowRun, began: float) -> None:
        errors = list(run.errors.values())
        # What was cancelled because of another batch is not the reason.
        errors.sort(key=lambda error: isinstance(error, WorkflowCancelledError))
        done = [future for index, future in enumerate(run.futures) if index not in run.errors]
        result = RowResult(
            call.index,
            call.row,
            [future.result() for future in done],
            errors[0] if errors else None,
            run.batches[0].seed,
            time.monotonic() - began,
        )
        self._finished.put((place, result))


class _Collector:
    """Waits, without a thread, until all batches of a run have ended."""

    def __init__(self, run: WorkflowRun, fail_fast: bool, on_end: Callable[[], None]) -> None:
        self._run: WorkflowRun | None = run
        self._fail_fast = fail_fast
        self._on_end: Callable[[], None] | None = on_end
        self._lock = threading.Lock()
        self._left = len(run.batches)

    def watch(self) -> None:
        """Begin to wait."""
        assert self._run is not None, "it has not ended yet"
        for future in self._run.futures:
            future.add_done_callback(self._count)

    def _count(self, future: Future[BatchResult]) -> None:
        run = self._run
        failed = future.cancelled() or future.exception() is not None
        if failed and self._fail_fast and run is not None:
            run.cancel()
        with self._lock:
            self._left -= 1
            if self._left:
                return
            on_end = self._on_end
            # Futures keep their callbacks for ever, and must not keep the run and its images so.
            self._run = self._on_end = None
        if on_end is not None:
            on_end()
