"""What a caller holds while its images are made: a run, its batches, their results, progress.

A run shares one lock with the executor that works on it; its condition is notified at each change.
How a batch gets from here to a server and back stands in `executors/base.py`.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol

from comfy_executors.errors import (
    ResultsTakenError,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
)
from comfy_executors.images import InputImageSet, WorkflowOutput, WorkflowOutputImage
from comfy_executors.workflows import Graph

logger = logging.getLogger(__name__)

_FAILED = "cancelled because another batch failed"


@dataclass(frozen=True)
class Batch:
    """One execution of the graph: the unit of futures, retries and errors.

    Args:
        index: Its place in the run, from 0.
        size: How many images it makes at the most.
        seed: The seed of its graph, or None where the graph's own seeds stay.
        render: Makes the graph; called when the batch is handed to a backend.
    """

    index: int
    size: int
    seed: int | None
    render: Callable[[Batch], Graph] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Job:
    """What a backend is handed at once: one batch or several, and what they share.

    Args:
        batches: The batches, in order.
        input_images: The images that their graphs refer to, or None.
        include_previews: Whether outputs of type `temp` are wanted too.
        allow_partial: Whether a graph of which the server refuses some outputs may run.
        output_dir: Where a backend may save an output as soon as it has it, so that only one is
            in memory; what it does not save, the base saves when the batch is complete.
        on_output: Called by a ComfyUI server's backend with each output once it was fetched, while
            the rest of its graph still runs.
        extra_data: What a ComfyUI server is sent along with each graph; keys may be in it.
    """

    batches: Sequence[Batch]
    input_images: InputImageSet | None = None
    include_previews: bool = False
    allow_partial: bool = False
    output_dir: Path | None = None
    on_output: Callable[[WorkflowOutput], object] | None = None
    extra_data: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class BatchResult:
    """What one batch made.

    Args:
        index: The batch's place in the run, from 0.
        images: Its images, in the order in which the server reported them.
        outputs: Everything else that its nodes reported: videos, audio, text, files.
        seed: The seed that was used, or None where the graph's own seeds stayed.
        prompt_id: The prompt on the server, where there is one.
        server: The address of the server, without keys.
        seconds: How long it took from being handed out to its last byte.
        attempts: How often it was started; more than 1 after a retry.
        job_id: The job of a serverless backend that made it.
    """

    index: int
    images: list[WorkflowOutputImage] = field(repr=False)
    outputs: list[WorkflowOutput] = field(default_factory=list, repr=False)
    seed: int | None = None
    prompt_id: str | None = None
    server: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    job_id: str | None = None


@dataclass(frozen=True)
class BatchFailure:
    """What a backend yields for one batch of a job that failed while others go on.

    Args:
        index: The batch's place in the run, from 0.
        error: Why it failed; it is not run again.
    """

    index: int
    error: BaseException


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a run, as `on_progress` is told.

    Args:
        kind: `queued` (handed to the server), `started` (the server began), `node` (a node
            began), `step` (a node's progress), `waiting` (a serverless queue does not move),
            `retry`, `done`, `failed` or `cancelled` (of the batch).
        batch: The batch's index, from 0.
        node: The node's id, for `node` and `step`.
        title: The node's title, or its class where it has no title.
        step: The step reached, for `step`; the images made, for `done`.
        max: The number of steps, for `step`; the batch's size, for `done`, `failed` and
            `cancelled`.
        message: A sentence, for `retry`, `waiting`, `failed` and `cancelled`.
        job_id: The job of a serverless backend, from `queued` on.
        row: The row's index, from 0, in a sweep; see `BaseWorkflowExecutor.map_workflows`.
    """

    kind: str
    batch: int
    node: str | None = None
    title: str | None = None
    step: int | None = None
    max: int | None = None
    message: str | None = None
    job_id: str | None = None
    row: int | None = None


ProgressCallback = Callable[[ProgressEvent], object]


class Cancellable(Protocol):
    """The running job as its run sees it."""

    def cancel(self, reason: str) -> None: ...


class RunOptions(NamedTuple):
    """How a run is worked on and handed out; see `BaseWorkflowExecutor.submit_workflow`."""

    ordered: bool = False
    ignore_errors: bool = False
    timeout: float | None = None
    batch_timeout: float | None = None
    on_progress: ProgressCallback | None = None
    output_dir: Path | None = None


class WorkflowRun:
    """The images of one `submit_workflow` call, while they are made and afterwards.

    Iterating yields each image once, as batches complete, or in order with `ordered=True`; several
    threads may share one iteration. Batches are handed to the server as results are taken, so that
    a slow consumer does not fill the memory; asking for `futures`, `result()` or `outputs()`, and
    `output_dir=`, lift that bound. In `with`, leaving cancels what is left. A run that nobody holds
    any more after its first images were taken is cancelled, too: nobody could take the others (an
    `on_progress` that knows the run holds it: leave `with`, or cancel it yourself).

    A run belongs to the process that started it: in a forked child it raises `WorkflowError`.
    """

    _on_forsaken: Callable[[WorkflowRun], None]

    def __init__(
        self,
        batches: Sequence[Batch],
        job: Job,
        options: RunOptions,
        *,
        lock: threading.RLock,
        window: int,
        on_room: Callable[[], None],
        job_size: int = 1,
    ) -> None:
        self._objects = 1  # that share this state; see _for_caller
        self._held_by_executor: Callable[[], WorkflowRun | None] = _nobody
        self.batches = tuple(batches)
        self.job = job
        self.options = options
        timeout = options.timeout
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._changed = threading.Condition(lock)
        self._window = window
        self._job_size = job_size
        self._on_room = on_room
        self._progress_lock = threading.Lock()

        self._next = 0  # the first batch that was not handed out
        self._end = len(self.batches)  # where handing out ends; stopping brings it forward
        self._active: dict[int, Cancellable] = {}
        self._settled = 0
        self._results: dict[int, BatchResult] = {}  # until iteration takes them
        self._errors: dict[int, BaseException] = {}
        self._arrived: deque[int] = deque()  # what iteration takes next, unless it is ordered
        self._taken = 0  # batches that iteration took
        self._current: deque[WorkflowOutputImage] = deque()  # of the batch taken last
        self._futures: dict[int, Future[BatchResult]] = {}  # once they were asked for
        self._keep = False
        self._forsaken = False  # by its caller, and nobody has seen to it yet
        self._discards = False
        self._unbounded = options.output_dir is not None
        self._cancelled = False
        self._raised: BaseException | None = None
        self._abandoned: WorkflowError | None = None
        self._others: dict[int, list[WorkflowOutput]] = {}
        self._images_made = 0
        self._warned = False
        self._errors_seen = False
        self._progress_failed = False

    # What a caller does with it.

    def __enter__(self) -> WorkflowRun:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[WorkflowOutputImage]:
        return self

    def __next__(self) -> WorkflowOutputImage:
        """Return the next image, waiting for it.

        Raises:
            StopIteration: All images were handed out.
            WorkflowError: A batch failed and `ignore_errors` is off; the rest of the run is
                cancelled. Timeouts and cancellation are kinds of it.
        """
        while True:
            with self._changed:
                if self._current:
                    return self._current.popleft()
                if self._raised is not None:
                    self._errors_seen = True
                    raise self._raised
                if self._taken == len(self.batches):
                    raise StopIteration
                # Jobs of several batches wait for each result to be taken, too.
                wanted = self._room() <= 0 or self._job_size > 1
                if not self._take():
                    self._changed.wait()
                    continue
                failed = self._raised is not None
            if wanted:
                # Otherwise no thread waits for room, and waking them all the same is dear.
                self._on_room()
            if failed:
                self._stop(WorkflowCancelledError, _FAILED)
            self._warn_if_no_images()

    @property
    def futures(self) -> list[Future[BatchResult]]:
        """One `concurrent.futures.Future` for each batch, in order; each gives a `BatchResult`.

        They are the standard library's: `wait`, `as_completed`, `add_done_callback` and
        `asyncio.wrap_future` take them. As there, `cancel()` of a future whose batch was handed
        out does nothing; `WorkflowRun.cancel` interrupts it.

        Raises:
            ResultsTakenError: Iteration has handed out images already, which are not kept.
        """
        with self._changed:
            self._want_everything("futures")
            self._errors_seen = True  # each future tells its own
            if not self._futures:
                every = range(len(self.batches))
                self._futures = {index: self._new_future(index) for index in every}
            futures = list(self._futures.values())
        self._on_room()
        return futures

    def result(self, timeout: float | None = None) -> list[WorkflowOutputImage]:
        """Wait for the whole run and return every image, in order.

        Args:
            timeout: Seconds to wait; None waits as long as it takes.

        Returns:
            The images of all batches; with `ignore_errors=True`, of those that succeeded.

        Raises:
            WaitTimeoutError: It took longer than `timeout`; the run goes on.
            WorkflowError: A batch failed and `ignore_errors` is off; the rest of the run is
                cancelled. Timeouts and cancellation are kinds of it.
            ResultsTakenError: Iteration has handed out images already, which are not kept.
        """
        with self._changed:
            self._want_everything("result()")
        self._on_room()
        self._wait_settled(timeout)
        with self._changed:
            results = [result for _, result in sorted(self._results.items())]
        return [image for result in results for image in result.images]

    def outputs(self, timeout: float | None = None) -> list[WorkflowOutput]:
        """Wait for the whole run and return what it made beside images, in order.

        Videos, audio, text and other files stay in memory (or on disk, with `output_dir=`) until
        the run is dropped, also while its images are iterated over.

        Args:
            timeout: Seconds to wait; None waits as long as it takes.

        Raises:
            WaitTimeoutError: It took longer than `timeout`; the run goes on.
            WorkflowError: A batch failed and `ignore_errors` is off; the rest is cancelled.
        """
        with self._changed:
            self._check_owner()
            self._unbounded = True
        self._on_room()
        self._wait_settled(timeout)
        with self._changed:
            return [output for index in sorted(self._others) for output in self._others[index]]

    def cancel(self) -> bool:
        """Cancel what is queued and interrupt what runs, only of this run.

        It returns at once; the worker threads see to the server. Batches that were handed out
        fail with `WorkflowCancelledError`, the futures of the others are cancelled.

        Returns:
            Whether there was anything left to cancel.
        """
        return self._stop(WorkflowCancelledError, "the run was cancelled")

    def cancelled(self) -> bool:
        """Tell whether the run was cancelled before it was done."""
        with self._changed:
            return self._cancelled

    def done(self) -> bool:
        """Tell whether every batch has succeeded, failed or been cancelled."""
        with self._changed:
            return self._is_done()

    @property
    def errors(self) -> dict[int, BaseException]:
        """The errors of the batches that failed, by batch index."""
        with self._changed:
            self._errors_seen = True
            return dict(sorted(self._errors.items()))

    def __repr__(self) -> str:
        with self._changed:
            return (
                f"<WorkflowRun batches={len(self.batches)} running={len(self._active)} "
                f"done={self._settled - len(self._errors)} failed={len(self._errors)}>"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a run cannot be copied or pickled: it belongs to its executor's threads")

    def __del__(self) -> None:
        self._objects -= 1
        held = self._held_by_executor()
        if not self._objects:
            self._warn_of_unseen_errors()
        elif held is not None and held is not self:
            self._on_forsaken(held)

    # Inside, for the caller's side.

    def _warn_of_unseen_errors(self) -> None:
        """Log that batches failed when nobody asked and nobody can ask any more."""
        # What was cancelled was meant to be. Without the lock: the garbage collector calls, too.
        failed = {
            index: error
            for index, error in self._errors.items()
            if not isinstance(error, WorkflowCancelledError)
        }
        if failed and not self._errors_seen and self._abandoned is None:
            self._errors_seen = True
            index, error = min(failed.items())
            logger.warning(
                "%d of %d batches failed, and nobody looked at the run; batch %d: %s",
                len(failed),
                len(self.batches),
                index,
                error,
            )

    def _check_owner(self) -> None:
        if self._abandoned is not None:
            raise self._abandoned

    def _want_everything(self, what: str) -> None:
        self._check_owner()
        if self._taken and not self._keep:
            raise ResultsTakenError(
                f"{self._taken} batches were handed out by iteration and are not kept: "
                f"ask for {what} before iterating, or keep the images yourself"
            )
        self._keep = self._unbounded = True

    def _new_future(self, index: int) -> Future[BatchResult]:
        future: Future[BatchResult] = Future()
        if index in self._results:
            future.set_result(self._results[index])
        elif index in self._errors:
            _fail_future(future, self._errors[index], started=index < self._end)
        elif index < self._next:
            future.set_running_or_notify_cancel()
        return future

    def _take(self) -> bool:
        """Take the next settled batch out of the buffer, if there is one. The lock is held."""
        index = self._next_settled()
        if index is None:
            return False
        self._taken += 1
        if index in self._results:
            result = self._results[index] if self._keep else self._results.pop(index)
            self._current.extend(result.images)
        elif not self.options.ignore_errors:
            self._raised = self._errors[index]
        # Threads that share this iteration go on with the images, or end.
        self._changed.notify_all()
        return True

    def _next_settled(self) -> int | None:
        if self.options.ordered:
            index = self._taken
            return index if index in self._results or index in self._errors else None
        if self._arrived:
            return self._arrived.popleft()
        if self.options.ignore_errors:
            return None
        # Only now, so that an error does not hide images that are there.
        return next(iter(self._errors), None)

    def _fail(self, error: BaseException) -> NoReturn:
        with self._changed:
            self._raised = error
            self._errors_seen = True
            self._changed.notify_all()
        self._stop(WorkflowCancelledError, _FAILED)
        raise error

    def _wait_settled(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._settled < len(self.batches):
                if self._errors and not self.options.ignore_errors:
                    break
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise WaitTimeoutError(
                        f"{self._settled} of {len(self.batches)} batches were done after "
                        f"{timeout:g} s; the run goes on"
                    )
                self._changed.wait(None if left is None else min(left, threading.TIMEOUT_MAX))
            first = next(iter(self._errors.values()), None)
        if first is not None and not self.options.ignore_errors:
            self._fail(first)
        self._warn_if_no_images()

    def _warn_if_no_images(self) -> None:
        with self._changed:
            if self._warned or not self._is_done() or self._images_made or not self._others:
                return
            self._warned = True
            others = sum(len(outputs) for outputs in self._others.values())
        logger.warning(
            "the run made no image but %d other outputs; they are on run.outputs()", others
        )

    def _stop(self, error_class: type[WorkflowError], reason: str) -> bool:
        """Settle what was not handed out, and tell the running jobs to stop."""
        with self._changed:
            if self._is_done():
                return False
            cancels = error_class is WorkflowCancelledError
            self._cancelled = self._cancelled or cancels
            unstarted = range(self._next, self._end)
            self._end = self._next
            for index in unstarted:
                self._note(index, error_class(reason))
            futures = [(self._futures[i], self._errors[i]) for i in unstarted if i in self._futures]
            # At a timeout those that run see the deadline themselves.
            active = list(self._active.values()) if cancels else []
        for control in active:
            control.cancel(reason)
        for future, error in futures:
            _fail_future(future, error, started=False)
        self._on_room()
        return True

    def _note(self, index: int, error: BaseException | None) -> None:
        """Take down that a batch has ended. The lock is held."""
        if error is not None:
            if isinstance(error, WorkflowError):
                error.batch_index = index
            self._errors[index] = error
        self._settled += 1
        if not self.options.ordered and (error is None or self.options.ignore_errors):
            self._arrived.append(index)
        self._changed.notify_all()

    # Inside, for the executor's side.

    def _for_caller(self, on_forsaken: Callable[[WorkflowRun], None]) -> WorkflowRun:
        """Make the object that the caller holds: a twin that shares all state with this one.

        The executor holds this one, so that the end of the other tells that nobody can take any
        results any more; a web server would pile up what its views left.

        Args:
            on_forsaken: Called then, by whoever drops it or by the garbage collector.
        """
        self._on_forsaken = on_forsaken
        self._held_by_executor = weakref.ref(self)
        twin = object.__new__(type(self))
        twin.__dict__ = self.__dict__
        self._objects += 1
        return twin

    def _see_to_forsaken(self) -> None:
        """Stop making what nobody can take, or at least keeping it."""
        with self._changed:
            self._forsaken = False
            if self._unbounded:  # somebody holds its futures, or wants its files
                return
            gives_up = self._taken > 0
            self._discards = self._unbounded = not gives_up
            if self._discards:
                self._results.clear()
                self._others.clear()
        if gives_up:
            if self._stop(WorkflowCancelledError, "nobody holds the run any more"):
                logger.info("%r is cancelled: nobody holds it, or could take its images", self)
        else:
            self._on_room()

    def _running(self) -> list[Cancellable]:
        """Return what works on the run's batches at present."""
        with self._changed:
            return list(self._active.values())

    def _is_done(self) -> bool:
        """Tell whether every batch has ended; the lock is held."""
        return self._settled == len(self.batches)

    def _has_unstarted(self) -> bool:
        """Tell whether some batch waits to be handed out; the lock is held."""
        return self._next < self._end

    def _room(self) -> int:
        """Tell how many jobs may be handed out now; the lock is held."""
        left = -(-(self._end - self._next) // self._job_size)
        if self._unbounded:
            return left
        free = self._window * self._job_size - (self._next - self._taken)
        return max(0, min(left, free // self._job_size))

    def _wants_more(self, pending: Container[int]) -> bool:
        """Tell whether a job of several batches shall go on; the lock is held."""
        if self._unbounded or self._forsaken or len(self._results) < self._window:
            return True
        # Nobody will take anything before that one.
        return self.options.ordered and self._taken in pending

    def _expire(self) -> None:
        """Fail what was not handed out by the run's deadline."""
        self._stop(WorkflowTimeoutError, f"the run's timeout of {self.options.timeout} s passed")

    def _abandon(self, lock: threading.RLock) -> None:
        """In a forked child: the batches go on in the parent, where nobody can tell us of them."""
        self._changed = threading.Condition(lock)
        self._progress_lock = threading.Lock()
        self._raised = self._abandoned = WorkflowError(
            "this run belongs to the process that started it, not to its forked child"
        )
        self._errors = dict.fromkeys(range(len(self.batches)), self._abandoned)
        self._settled = len(self.batches)
        self._end = self._next
        self._active = {}
        self._current.clear()

    def _hand_out(self, control: Cancellable) -> list[Batch]:
        """Mark the batches of the next job as running, but for those whose futures were cancelled.

        The lock is held.
        """
        batches: list[Batch] = []
        while self._next < self._end and len(batches) < self._job_size:
            index = self._next
            self._next += 1
            future = self._futures.get(index)
            if future is not None and not future.set_running_or_notify_cancel():
                self._note(index, WorkflowCancelledError("its future was cancelled"))
                continue
            self._active[index] = control
            batches.append(self.batches[index])
        return batches

    def _succeed(self, result: BatchResult) -> None:
        with self._changed:
            self._active.pop(result.index, None)
            self._images_made += len(result.images)
            if not self._discards:
                self._results[result.index] = result
            if result.outputs and not self._discards:
                self._others[result.index] = result.outputs
            self._note(result.index, None)
            future = self._futures.get(result.index)
        if future is not None:
            future.set_result(result)

    def _fail_batch(self, index: int, error: BaseException) -> None:
        with self._changed:
            self._note(index, error)
            future = self._futures.get(index)
        if future is not None:
            _fail_future(future, error, started=True)

    def _leave(self, batches: Sequence[Batch]) -> None:
        """Take note that nothing works on some batches any more, also not at cleaning up."""
        with self._changed:
            for batch in batches:
                self._active.pop(batch.index, None)

    def _report(self, event: ProgressEvent) -> None:
        """Call `on_progress`, from one thread at a time."""
        callback = self.options.on_progress
        if callback is None:
            return
        with self._progress_lock:
            try:
                callback(event)
            except BaseException:  # SystemExit, too: it would only end one of our threads
                if not self._progress_failed:
                    logger.exception("on_progress raised; the run goes on, and tells it once")
                self._progress_failed = True


def _nobody() -> None:
    return None


def _fail_future(future: Future[BatchResult], error: BaseException, *, started: bool) -> None:
    if started:
        future.set_exception(error)
        return
    if isinstance(error, WorkflowCancelledError):
        future.cancel()
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
