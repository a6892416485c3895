"""What all executors share: threads, hand-out, retries, closing. A backend adds `_run_job`.

The way of a batch: `submit_workflow` plans and renders (plan.py) → the run (runs.py) waits until
one of `max_workers` places is free → a worker thread takes the batch and calls `_run_job` →
its result settles the batch's future and wakes whoever iterates.

One lock guards the executor and its runs; nothing blocks while it is held.
"""

from __future__ import annotations

import abc
import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
    WorkflowError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.plan import Plan, refuse_previews_only
from comfy_executors.images import InputImageSet, InputImageSource, WorkflowOutputImage
from comfy_executors.runs import (
    Batch,
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

    _lock: threading.Lock
    _changed: threading.Condition
    _runs: deque[WorkflowRun]
    _threads: set[threading.Thread]
    _live: int  # threads that still look for work
    _idle: int  # of these, those that wait for it
    _places_taken: int

    def __init__(self, batch_size: int = 1, *, max_workers: int = 4) -> None:
        for name, value in (("batch_size", batch_size), ("max_workers", max_workers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        self.batch_size = batch_size
        self.max_workers = max_workers
        self.input_base_dir = "input"
        self._reset_threads()
        self._closed = False
        _executors.add(self)

    # What a backend adds.

    @abc.abstractmethod
    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        """Run the batches of a job, blocking, and yield each one's result when it is complete.

        Args:
            job: The batches, whose graphs `batch.render(batch)` makes, and what they share.
            control: Every wait goes through it; call `begin` and `end` around the execution.

        Raises:
            PromptLostError: What was handed over is lost; the base hands the batches without a
                result over again, a bounded number of times.
            ComfyExecutorsError: The batches without a result fail with it.
        """

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
            num_samples: How many images to make.
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
        images = InputImageSet(input_images) if input_images else None
        plan = Plan(
            workflow_template,
            num_samples=num_samples,
            batch_size=self.batch_size if batch_size is None else batch_size,
            seed=seed,
            randomize_seed=randomize_seed,
            variables=_merge_variables(variables or {}, template_variables),
            input_images=images,
            input_images_dir=f"{self.input_base_dir}/{images.folder}" if images else "",
        )
        if not include_previews:
            refuse_previews_only(plan.graph)
        if len(plan.batches) > 1 and not plan.seeded:
            logger.warning(
                "the %d batches have the same seeds: a server answers all but the first from its "
                "cache, with the same images",
                len(plan.batches),
            )
        options = RunOptions(
            ordered=ordered,
            ignore_errors=ignore_errors,
            timeout=_positive("timeout", timeout),
            batch_timeout=_positive("batch_timeout", batch_timeout),
            on_progress=on_progress,
            output_dir=None if output_dir is None else _make_folder(output_dir),
        )
        job = Job((), images, include_previews, allow_partial)
        return self._start(plan.batches, job, options)

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

        run = await asyncio.to_thread(self.submit_workflow, *args, **kwargs)
        try:
            while (image := await asyncio.to_thread(next, run, None)) is not None:
                yield image
        finally:
            run.cancel()

    def close(self, *, cancel: bool = False) -> None:
        """Wait for all runs and end all threads; afterwards no work is taken.

        Interrupting it with Ctrl-C cancels what is left, and ends the threads all the same.

        Args:
            cancel: Cancel what is queued and interrupt what runs, only our own, instead of
                waiting for it.
        """
        with self._changed:
            self._closed = True
            runs = list(self._runs)
            for run in runs:
                run._unbounded = True  # nobody may be left to take its results
            self._changed.notify_all()
        try:
            if cancel:
                _cancel_all(runs)
            self._wake()
            self._join()
        except BaseException:
            _cancel_all(runs)
            self._join()
            raise
        finally:
            self._close_backend()

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

        await asyncio.to_thread(self.close, cancel=exc_type is not None)

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
            # Twice the places: while some batches execute, others are downloaded or wait to be
            # taken, and a short pause of the consumer leaves no place empty.
            window=2 * self.max_workers,
            on_room=self._wake,
        )
        with self._changed:
            if self._closed:
                raise ExecutorClosedError(f"{type(self).__name__} is closed")
            self._runs.append(run)
        self._wake()
        return run

    def _wake(self) -> None:
        """See to it that somebody takes the work there is."""
        with self._changed:
            for run in [run for run in self._runs if run._is_done()]:
                self._runs.remove(run)
            places = self.max_workers - self._places_taken
            want = min(places, sum(run._room() for run in self._runs))
            # Downloads go on when their batch has left its place: twice the threads.
            new = min(want - self._idle, 2 * self.max_workers - self._live)
            if self._closed and not self._runs:
                self._changed.notify_all()
            self._changed.notify(max(0, want))
            for _ in range(new):
                self._start_thread()

    def _start_thread(self) -> None:
        # A daemon, because an idle or blocked thread must not keep the interpreter from ending;
        # close(), or at the latest _close_forgotten, ends it in good order.
        thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
        # Under the lock, so that close() never finds a thread that was not started.
        thread.start()
        self._live += 1
        self._threads = {thread, *(other for other in self._threads if other.is_alive())}

    def _work(self) -> None:
        while (work := self._next_work()) is not None:
            self._execute(*work)
            del work  # results can be large, and the next wait long
            self._wake()

    def _next_work(self) -> tuple[WorkflowRun, Batch, JobControl] | None:
        while True:
            with self._changed:
                work = self._pick()
                if work is not None:
                    return work
                next_deadline, run = self._next_deadline()
                left = next_deadline - time.monotonic()
                if left > 0 and self._idle_until(min(left, _IDLE_SECONDS)):
                    self._live -= 1
                    return None
            if left <= 0 and run is not None:
                run._expire()

    def _next_deadline(self) -> tuple[float, WorkflowRun | None]:
        """Find the run whose batches that were not handed out expire first. The lock is held."""
        runs = [run for run in self._runs if run._has_unstarted()]
        run = min(runs, key=lambda run: run.deadline or math.inf, default=None)
        return (run and run.deadline) or math.inf, run

    def _idle_until(self, seconds: float) -> bool:
        """Wait for work; tell whether this thread may end. The lock is held."""
        if self._closed and not self._runs:
            return True
        self._idle += 1
        try:
            woken = self._changed.wait(seconds)
        finally:
            self._idle -= 1
        return not woken and not self._runs

    def _pick(self) -> tuple[WorkflowRun, Batch, JobControl] | None:
        """Hand out a batch of the run whose turn it is. The lock is held."""
        if self._places_taken >= self.max_workers:
            return None
        for run in list(self._runs):
            while run._room() > 0:
                control = JobControl(run, self._release_place)
                batch = run._hand_out(control)
                if batch is not None:
                    self._places_taken += 1
                    # Runs take turns, so that a long one does not keep the others waiting.
                    self._runs.remove(run)
                    self._runs.append(run)
                    return run, batch, control
        return None

    def _release_place(self) -> None:
        with self._changed:
            self._places_taken -= 1
        self._wake()

    # Working.

    def _execute(self, run: WorkflowRun, batch: Batch, control: JobControl) -> None:
        pending = {batch.index: batch}
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PromptLostError),
            stop=tenacity.stop_after_attempt(_BATCH_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=_BACKOFF_SECONDS),
            sleep=control.sleep,
            before_sleep=partial(_tell_retry, pending, control),
            reraise=True,
        )
        started = time.monotonic()
        try:
            retrying(self._attempt, run, pending, control, started)
        except BaseException as error:  # whatever it was, the batch's future must hear of it
            control.end()
            if not isinstance(error, ComfyExecutorsError):
                logger.exception("batch %d failed in an unforeseen way", batch.index)
            for index in pending:
                control.progress(ProgressEvent("failed", index, message=str(error)))
                run._fail_batch(index, error)

    def _attempt(
        self, run: WorkflowRun, pending: dict[int, Batch], control: JobControl, started: float
    ) -> None:
        control.next_attempt()
        job = replace(run.job, batches=tuple(pending.values()))
        for result in self._run_job(job, control):
            batch = pending[result.index]
            if run.options.output_dir is not None:
                for output in (*result.images, *result.outputs):
                    output._save_and_release(run.options.output_dir)
            seconds = time.monotonic() - started
            result = replace(result, seconds=seconds, attempts=control.attempt)
            if len(pending) == 1:
                control.end()
            control.progress(
                ProgressEvent("done", batch.index, step=len(result.images), max=batch.size)
            )
            run._succeed(result)
            del pending[result.index]
        if pending:
            raise WorkflowError(f"the backend ended without a result for {sorted(pending)}")

    # Ending.

    def _join(self) -> None:
        """Wait until all threads have ended; they do when no run is left."""
        while True:
            with self._changed:
                others = self._threads - {threading.current_thread()}
            if not others:
                return
            for thread in others:
                thread.join()
            with self._changed:
                self._threads -= others

    def _reset_threads(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._runs = deque()
        self._threads = set()
        self._live = 0
        self._idle = 0
        self._places_taken = 0

    def _after_fork_in_child(self) -> None:
        runs = list(self._runs)
        # The parent's threads do not exist here, and its locks may be held for ever.
        self._reset_threads()
        for run in runs:
            run._abandon(self._lock)
        self._reset_backend()


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


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not seconds > 0:
        raise ValueError(f"{name} must be a number of seconds above 0, not {seconds!r}")
    return seconds


def _make_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFileError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


_executors: weakref.WeakSet[BaseWorkflowExecutor] = weakref.WeakSet()


def _reset_after_fork() -> None:
    for executor in list(_executors):
        executor._after_fork_in_child()


@atexit.register
def _close_forgotten() -> None:
    for executor in list(_executors):
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
