"""What all executors share: threads, hand-out, retries, closing. A backend adds `_run_job`.

The way of a batch: `submit_workflow` plans and renders (plan.py) → the run (runs.py) waits until
one of `max_workers` places is free → a worker thread takes the batch and calls `_run_job` →
its result settles the batch's future and wakes whoever iterates.

One lock guards the executor and its runs; nothing blocks while it is held.
"""

from __future__ import annotations

import abc
import atexit
import copy
import difflib
import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import tenacity

from comfy_executors.errors import (
    ComfyExecutorsError,
    ExecutorClosedError,
    OutputFileError,
    PromptLostError,
    WorkflowCancelledError,
    WorkflowError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.plan import Plan, refuse_previews_only
from comfy_executors.executors.sweep import RowCall, RowResult, map_rows
from comfy_executors.graphs import whole_number
from comfy_executors.images import InputImageSet, InputImageSource, WorkflowOutputImage
from comfy_executors.runs import (
    Batch,
    BatchFailure,
    BatchResult,
    Job,
    ProgressCallback,
    ProgressEvent,
    RunOptions,
    WorkflowRun,
)
from comfy_executors.workflows import WorkflowTemplate

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="BaseWorkflowExecutor")

_IDLE_SECONDS = 10.0  # a worker without work ends: a forgotten close() then costs nothing
_BATCH_ATTEMPTS = 3
_BACKOFF_SECONDS = 10.0  # the longest wait between two attempts


class BaseWorkflowExecutor(abc.ABC):
    """Run workflow templates in batches on worker threads.

    Use it with `with`: a normal end waits for all runs, an exception cancels them. One executor
    may serve many threads, and one made before a fork works in the child.

    Args:
        batch_size: How many images one execution of the graph makes, for templates that say
            `batch_size`.
        max_workers: How many batches are kept at the server at once, the running one included.

    Raises:
        ValueError: A number is below 1.
    """

    _lock: threading.RLock
    _changed: threading.Condition  # threads wait for work here
    _ended: threading.Condition  # close() waits for threads here
    _runs: deque[WorkflowRun]  # that are not done
    _known_runs: weakref.WeakSet[WorkflowRun]  # done or not, for the child of a fork
    _threads: set[threading.Thread]
    _live: int  # threads that work or look for work
    _busy: int  # of these, those that work
    _places_taken: int
    _parked: int  # jobs, each on a thread, that wait until somebody takes results

    def __init__(self, batch_size: int = 1, *, max_workers: int = 4) -> None:
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.max_workers = whole_number("max_workers", max_workers, 1)
        self.input_base_dir = "input"
        self._known_runs = weakref.WeakSet()
        self._reset_threads()
        self._closed = False
        self._backend_closed = False
        _executors.add(self)

    # What a backend adds.

    @abc.abstractmethod
    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult | BatchFailure]:
        """Run the batches of a job, blocking, and yield each one's result when it is complete.

        Between two results it may be left waiting for long, or be closed. A `BatchFailure` is the
        result of a batch that failed while the others go on.

        Args:
            job: The batches, whose graphs `batch.render(batch)` makes, and what they share.
            control: Every wait goes through it; call `begin` and `end` around the execution.

        Raises:
            PromptLostError: What was handed over is lost; the base hands the batches without a
                result over again, a bounded number of times.
            ComfyExecutorsError: The batches without a result fail with it.
        """

    def _load_inputs(self, sources: Sequence[InputImageSource]) -> InputImageSet:
        """Read what a caller gives as `input_images`."""
        return InputImageSet(sources)

    def _job_size(self, batches: Sequence[Batch], job: Job) -> int:
        """Tell how many batches of a run a job takes; the whole run where that is more.

        A run that hands out several at once holds its results back instead of its batches while
        nobody takes them: `_run_job` is not resumed.

        Args:
            batches: The batches of the run.
            job: What they share; without batches.
        """
        return 1

    def _close_backend(self) -> None:
        """Give back what the backend holds; no job runs any more."""

    def _reset_backend(self) -> None:
        """Forget what a forked child must not share with its parent, such as sockets."""

    # What users call.

    def submit_workflow(
        self,
        workflow_template: WorkflowTemplate,
        input_images: Sequence[InputImageSource] | None = None,
        num_samples: int = 1,
        randomize_seed: bool = True,
        ignore_errors: bool = False,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        ordered: bool = False,
        timeout: float | None = None,
        batch_timeout: float | None = None,
        on_progress: ProgressCallback | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        include_previews: bool = False,
        allow_partial: bool = False,
        variables: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> WorkflowRun:
        """Start making images and return at once.

        Args:
            workflow_template: The template.
            input_images: Paths, bytes, open files, Pillow images or `InputImage`s, for templates
                that use `input_images` or `input_images_dir`.
            num_samples: How many images to make, in 1,000,000 batches at the most.
            randomize_seed: Draw a fresh seed for each batch; off, the graph's own seeds stay, and
                a server answers repeated batches from its cache.
            ignore_errors: Go on when a batch fails: deliver what worked, and keep the errors on
                `WorkflowRun.errors`.
            seed: Make it reproducible: batch i uses `seed + i`.
            batch_size: Images a batch, for this run.
            ordered: Iterate in the order of the batches instead of their completion.
            timeout: Seconds that the whole run may take; then the rest fails.
            batch_timeout: Seconds that one batch may execute; waiting in a queue does not count.
            on_progress: Called with a `ProgressEvent`, from one worker thread at a time; keep it
                short. What it raises is logged.
            output_dir: Save each image here as its batch completes; the objects then read from
                there. Made if it does not exist.
            include_previews: Deliver outputs of type `temp`, too.
            allow_partial: Run the valid part of a graph of which the server refuses some outputs.
            variables: The template's variables, for names that are arguments here.
            template_variables: The template's variables.

        Returns:
            The run: an iterator of images with `futures`, `result()`, `cancel()` and more.

        Raises:
            TemplateError, GraphError, InputImageError, ValueError, TypeError: What was given
                cannot work; nothing was sent.
            OutputFileError: `output_dir` cannot be made.
            ExecutorClosedError: The executor is closed.
        """
        if not isinstance(workflow_template, WorkflowTemplate):
            raise TypeError(
                f"workflow_template must be a WorkflowTemplate, not "
                f"{type(workflow_template).__name__}: use WorkflowTemplate.from_file or from_graph"
            )
        _refuse_misspelt(template_variables, workflow_template.variables)
        images = self._load_inputs(input_images) if input_images else None
        plan = Plan(
            workflow_template,
            num_samples=num_samples,
            batch_size=self.batch_size if batch_size is None else batch_size,
            seed=seed,
            randomize_seed=randomize_seed,
            variables=_merge_variables(variables or {}, template_variables),
            input_images=images,
            input_images_dir=(
                f"{self.input_base_dir}/{images.folder}" if images and images.has_folder else None
            ),
        )
        if not include_previews:
            refuse_previews_only(plan.graph)
        plan.warn()
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be callable, not {type(on_progress).__name__}")
        options = RunOptions(
            ordered=ordered,
            ignore_errors=ignore_errors,
            timeout=_positive("timeout", timeout),
            batch_timeout=_positive("batch_timeout", batch_timeout),
            on_progress=on_progress,
            output_dir=None if output_dir is None else _make_folder(output_dir),
        )
        job = Job((), images, include_previews, allow_partial, options.output_dir)
        return self._start(plan.batches, job, options)

    def map_workflows(
        self,
        workflow_template: WorkflowTemplate,
        rows: Iterable[Mapping[str, Any]],
        *,
        ordered: bool = False,
        on_progress: ProgressCallback | None = None,
        **options: Any,
    ) -> Generator[RowResult, None, None]:
        """Run a template once for each row of variables, several at a time.

        Rows are taken from `rows`, which may be endless, as results are taken: only as many are
        begun ahead as keep the server busy. A row that fails, because it does not fit the template
        or because its run fails, stops no other. Closing the iterator cancels what it began.

        Args:
            workflow_template: The template.
            rows: The variables of each run. `seed`, `num_samples` and `input_images` in a row are
                the arguments of its run.
            ordered: Yield in the order of the rows instead of their completion.
            on_progress: Called with each `ProgressEvent`, whose `row` says which row it belongs
                to; never from two threads at once.
            options: What `submit_workflow` takes, variables included, for all rows. What a row
                says wins; `timeout` is for each row; with `ignore_errors` a row that fails still
                delivers those of its batches that succeed.

        Returns:
            A generator of one `RowResult` a row. Nothing is run before it is asked for the first.

        Raises:
            TypeError: `workflow_template` is no template. Misspelt options are told by the first
                row.
        """
        calls = (RowCall(index, row) for index, row in enumerate(rows))
        return map_rows(
            self, workflow_template, calls, ordered=ordered, on_progress=on_progress, **options
        )

    async def submit_workflow_async(
        self, *args: Any, **kwargs: Any
    ) -> AsyncIterator[WorkflowOutputImage]:
        """Iterate over the images of `submit_workflow` from an event loop.

        A thin bridge: it takes the same arguments and waits in the loop's default thread pool.
        Leaving the iteration early, or cancelling its task, cancels the run.

        Raises:
            As `submit_workflow` and iterating its run do.
        """
        import asyncio  # only here: blocking programs do not pay for it

        given_up = threading.Event()
        started: list[WorkflowRun] = []

        def start() -> None:
            started.append(self.submit_workflow(*args, **kwargs))
            if given_up.is_set():
                started[0].cancel()

        try:
            await asyncio.to_thread(start)
            while (image := await asyncio.to_thread(next, started[0], None)) is not None:
                yield image
        finally:
            # A cancelled task leaves its thread behind, which may be starting the run just now:
            # both set first and look then, so that one of them sees the other.
            given_up.set()
            for run in started:
                run.cancel()

    def close(self, *, cancel: bool = False) -> None:
        """Wait for all runs and end all threads; afterwards no work is taken.

        Interrupting it with Ctrl-C cancels what is left, and ends the threads all the same. From a
        callback on one of the executor's own threads it returns at once, since that thread cannot
        wait for its own end; the last thread then closes what is left.

        Args:
            cancel: Cancel what is queued and interrupt what runs, only our own, instead of
                waiting for it.
        """
        try:
            with self._changed:
                self._closed = True
                runs = list(self._runs)
                for run in runs:
                    run._unbounded |= not run._forsaken  # nobody may be left to take its results
                inside = threading.current_thread() in self._threads
            if cancel:
                _cancel_all(runs)
            self._wake()
            if not inside:
                if runs and not cancel:
                    logger.info("closing waits for %d runs; cancel() ends them", len(runs))
                self._join()
                for run in runs:
                    run._warn_of_unseen_errors()
        except BaseException:
            _cancel_all(list(self._runs))
            self._join()
            raise
        finally:
            self._close_backend_if_last()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(cancel=exc_type is not None)

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import asyncio

        try:
            await asyncio.to_thread(self.close, cancel=exc_type is not None)
        except asyncio.CancelledError:
            # The thread goes on waiting, and the end of the loop waits for it.
            await asyncio.to_thread(self.close, cancel=True)
            raise

    def __repr__(self) -> str:
        with self._changed:
            return (
                f"<{type(self).__name__} batch_size={self.batch_size} "
                f"max_workers={self.max_workers} runs={len(self._runs)}"
                f"{' closed' if self._closed else ''}>"
            )

    # Handing out.

    def _start(self, batches: Sequence[Batch], job: Job, options: RunOptions) -> WorkflowRun:
        run = WorkflowRun(
            batches,
            job,
            options,
            lock=self._lock,
            # Two more than there are places: while some batches execute, others are downloaded or
            # wait to be taken. More would only fill the memory of a slow consumer.
            window=self.max_workers + 2,
            on_room=self._wake,
            job_size=self._job_size(batches, job),
        )
        with self._changed:
            if self._closed:
                raise ExecutorClosedError(f"{type(self).__name__} is closed")
            self._runs.append(run)
            self._known_runs.add(run)
            try:
                self._see_to_work()
            except RuntimeError as error:  # no thread can be started, and there is none
                self._runs.remove(run)
                raise ExecutorClosedError(f"{type(self).__name__} cannot work: {error}") from error
        twin = run._for_caller(self._note_forsaken)
        self._known_runs.add(twin)
        return twin

    def _note_forsaken(self, run: WorkflowRun) -> None:
        # Only this much: it may be the garbage collector that calls, at any moment.
        run._forsaken = True
        if self._lock.acquire(blocking=False):
            try:
                self._changed.notify()
                self._results_taken.notify_all()
            finally:
                self._lock.release()

    def _wake(self) -> None:
        with self._changed:
            self._see_to_work()

    def _see_to_work(self) -> None:
        """See to it that somebody takes the work there is. The lock is held."""
        for run in [run for run in self._runs if run._is_done()]:
            self._runs.remove(run)
        self._results_taken.notify_all()
        if self._closed and not self._runs:
            self._changed.notify_all()
            return
        places = max(0, self.max_workers - self._places_taken)
        want = min(places, sum(run._room() for run in self._runs))
        # When all are busy with other runs, somebody has to see a deadline pass all the same.
        watch = any(run.deadline is not None and run._has_unstarted() for run in self._runs)
        want = max(want, int(watch))
        self._changed.notify(want)
        # Downloads go on when their batch has left its place: twice the threads.
        most = 2 * self.max_workers + int(watch) + self._parked
        for _ in range(min(want - (self._live - self._busy), most - self._live)):
            self._start_thread()

    def _start_thread(self) -> None:
        # A daemon, because an idle or blocked thread must not keep the interpreter from ending;
        # close(), or at the latest _close_forgotten, ends it in good order.
        thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
        # Counted first and under the lock: close() finds every thread, also one whose start was
        # interrupted by Ctrl-C.
        self._live += 1
        self._threads = {thread, *(other for other in self._threads if other.is_alive())}
        try:
            thread.start()
        except RuntimeError as error:  # out of memory, or the interpreter is about to end
            self._live -= 1
            self._threads.remove(thread)
            if not self._live:
                raise
            logger.warning("the %d threads there are have to do: %s", self._live, error)

    def _work(self) -> None:
        while (work := self._next_work()) is not None:
            try:
                work()
            except BaseException:  # SystemExit of a future's callback: other runs need this thread
                logger.exception("raised after its batch was settled, by a callback")
            del work  # results can be large, and the next wait long
            with self._changed:
                self._busy -= 1
                self._see_to_work()
        self._close_backend_if_last()

    def _next_work(self) -> Callable[[], object] | None:
        """Wait for something to do; None when this thread is to end."""
        with self._changed:
            while (work := self._find_forsaken() or self._pick() or self._find_expired()) is None:
                if not self._wait_for_work():
                    self._live -= 1
                    self._ended.notify_all()
                    return None
            self._busy += 1
            self._see_to_work()
            return work

    def _find_forsaken(self) -> Callable[[], object] | None:
        return next((run._see_to_forsaken for run in self._runs if run._forsaken), None)

    def _find_expired(self) -> Callable[[], object] | None:
        deadline, run = self._next_deadline()
        return run._expire if run is not None and deadline <= time.monotonic() else None

    def _next_deadline(self) -> tuple[float, WorkflowRun | None]:
        """Find the run whose batches that were not handed out expire first. The lock is held."""
        runs = [run for run in self._runs if run._has_unstarted()]
        run = min(runs, key=lambda run: run.deadline or math.inf, default=None)
        return (run and run.deadline) or math.inf, run

    def _wait_for_work(self) -> bool:
        """Wait until there may be work; False when this thread may end. The lock is held."""
        if self._closed and not self._runs:
            return False
        left = self._next_deadline()[0] - time.monotonic()
        woken = self._changed.wait(min(max(0.0, left), _IDLE_SECONDS))
        return woken or bool(self._runs)

    def _pick(self) -> Callable[[], object] | None:
        """Hand out a job of the run whose turn it is. The lock is held."""
        if self._places_taken >= self.max_workers:
            return None
        for run in list(self._runs):
            while run._room() > 0:
                control = JobControl(run, self._release_place)
                batches = run._hand_out(control)
                if batches:
                    self._places_taken += 1
                    # Runs take turns, so that a long one does not keep the others waiting.
                    self._runs.remove(run)
                    self._runs.append(run)
                    return partial(self._execute, run, batches, control)
            if run._is_done():  # the futures of all that was left had been cancelled
                self._runs.remove(run)
        return None

    def _release_place(self) -> None:
        with self._changed:
            self._places_taken -= 1
        self._wake()

    # Working.

    def _execute(self, run: WorkflowRun, batches: Sequence[Batch], control: JobControl) -> None:
        pending = {batch.index: batch for batch in batches}
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PromptLostError),
            stop=tenacity.stop_after_attempt(_BATCH_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=_BACKOFF_SECONDS),
            sleep=control.sleep,
            before_sleep=partial(_tell_retry, pending, control),
            reraise=True,
        )
        started = time.monotonic()
        fail_rest = partial(_fail_rest, run, pending, control)
        control.on_giving_up = fail_rest
        try:
            retrying(self._attempt, run, pending, control, started)
        except BaseException as error:  # whatever it was, the batch's future must hear of it
            control.end()
            if not control.gave_up and not pending:
                raise
            if pending and not isinstance(error, ComfyExecutorsError):
                logger.exception("batch %d failed in an unforeseen way", min(pending))
            fail_rest(error)
        finally:
            control.on_giving_up = None
            run._leave(batches)

    def _attempt(
        self, run: WorkflowRun, pending: dict[int, Batch], control: JobControl, started: float
    ) -> None:
        control.next_attempt()
        job = replace(run.job, batches=tuple(pending.values()))
        results = self._run_job(job, control)
        try:
            for result in results:
                if len(pending) == 1:
                    control.end()
                if isinstance(result, BatchFailure):
                    del pending[result.index]
                    _fail(run, control, result.index, result.error)
                else:
                    self._deliver(run, pending, control, result, started)
                del result  # it can be large, and the next one long in coming
                if pending:
                    self._await_takers(run, control, pending)
                if run._forsaken:  # all other threads may be busy
                    run._see_to_forsaken()
        finally:
            # At once when something was raised here, so that the backend stops what runs.
            if isinstance(results, Generator):
                results.close()
        if pending:
            raise WorkflowError(f"the backend ended without a result for {sorted(pending)}")

    def _deliver(
        self,
        run: WorkflowRun,
        pending: dict[int, Batch],
        control: JobControl,
        result: BatchResult,
        started: float,
    ) -> None:
        batch = pending[result.index]
        if run.options.output_dir is not None:
            for output in (*result.images, *result.outputs):
                if output.path is None:
                    output._save_and_release(run.options.output_dir)
        seconds = time.monotonic() - started
        result = replace(result, seconds=seconds, attempts=control.attempt)
        control.progress(
            ProgressEvent("done", batch.index, step=len(result.images), max=batch.size)
        )
        del pending[result.index]  # first: what a callback raises is no failure of the batch
        run._succeed(result)

    def _await_takers(
        self, run: WorkflowRun, control: JobControl, pending: Mapping[int, Batch]
    ) -> None:
        """Wait while the run holds as many results as it may; raises as `control.receive` does.

        Neither its place nor its thread is missed by other runs meanwhile.
        """
        with self._changed:
            if run._wants_more(pending):
                return
            self._parked += 1
            has_place = control.holds_place
            self._places_taken -= has_place
            try:
                self._see_to_work()
                while not run._wants_more(pending):
                    # Not for ever: who lets go of a run may find the lock taken, and tell nobody.
                    self._results_taken.wait(control.limit(_IDLE_SECONDS))
                control.limit(0)
            finally:
                self._parked -= 1
                self._places_taken += has_place

    # Ending.

    def _join(self) -> None:
        """Wait until all threads have ended; they do when no run is left."""
        # Not by Thread.join alone: until Python 3.12, a join that Ctrl-C interrupts takes the
        # thread for one that has ended.
        with self._changed:
            while self._live:
                self._ended.wait()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _close_backend_if_last(self) -> None:
        with self._changed:
            last = self._closed and not self._live and not self._backend_closed
            self._backend_closed = self._backend_closed or last
        if last:
            self._close_backend()

    def _reset_threads(self) -> None:
        # Reentrant, so that a signal handler may cancel a run at any moment.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._results_taken = threading.Condition(self._lock)
        self._runs = deque()
        self._threads = set()
        self._live = 0
        self._busy = 0
        self._places_taken = 0
        self._parked = 0

    def _after_fork_in_child(self) -> None:
        # The parent's threads do not exist here, and its locks may be held for ever.
        self._reset_threads()
        for run in self._known_runs:
            run._abandon(self._lock)
        self._reset_backend()


def _fail(run: WorkflowRun, control: JobControl, index: int, error: BaseException) -> None:
    kind = "cancelled" if isinstance(error, WorkflowCancelledError) else "failed"
    size = run.batches[index].size
    control.progress(ProgressEvent(kind, index, max=size, message=str(error)))
    run._fail_batch(index, error)


def _fail_rest(
    run: WorkflowRun, pending: dict[int, Batch], control: JobControl, error: BaseException
) -> None:
    shared = len(pending) > 1
    for index in list(pending):
        del pending[index]  # first: what a callback raises is no second failure
        _fail(run, control, index, _copy(error) if shared else error)


def _copy(error: BaseException) -> BaseException:
    """Make an error for one of several batches: ours name their batch."""
    if not isinstance(error, ComfyExecutorsError):
        return error
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied.with_traceback(error.__traceback__)


def _tell_retry(
    pending: Mapping[int, Batch], control: JobControl, state: tenacity.RetryCallState
) -> None:
    error = state.outcome.exception() if state.outcome else None
    for index in pending:
        logger.warning("batch %d is run again: %s", index, error)
        control.progress(ProgressEvent("retry", index, message=str(error)))


def _cancel_all(runs: Sequence[WorkflowRun]) -> None:
    for run in runs:
        run.cancel()


def _merge_variables(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    twice = sorted(set(first) & set(second))
    if twice:
        raise ValueError(f"given twice, as a keyword and in variables=: {', '.join(twice)}")
    return {**first, **second}


def _refuse_misspelt(given: Mapping[str, Any], variables: Container[str]) -> None:
    """Raise TypeError for a variable that no template has and that is nearly an argument."""
    code = BaseWorkflowExecutor.submit_workflow.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    for name in given:
        near = difflib.get_close_matches(name, arguments, n=1, cutoff=0.8)
        if near and name not in variables:
            raise TypeError(f"submit_workflow has no argument {name}: did you mean {near[0]}?")


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{name} must be a number of seconds above 0, not {seconds!r}")
    return seconds


def _make_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before any GPU time is spent on what could not be saved.
        probe = folder / f".saving-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise OutputFileError(f"output_dir {folder} is a file, not a folder") from error
    except OSError as error:
        raise OutputFileError(f"cannot save into {folder}: {error.strerror}") from error
    return folder


_executors: weakref.WeakSet[BaseWorkflowExecutor] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for executor in list(_executors):
        try:
            executor._after_fork_in_child()
        except Exception:  # one that failed while it was made must not leave the others as they are
            logger.exception("%s cannot be used in this process", type(executor).__name__)


@atexit.register
def _close_forgotten() -> None:
    for executor in list(_executors):
        if not executor._threads:
            continue  # it never worked, and perhaps was never wholly made
        unfinished = len(executor._runs)
        if unfinished:
            logger.warning(
                "%r was not closed: cancelling %d unfinished runs; use it with `with`",
                executor,
                unfinished,
            )
        executor.close(cancel=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
