"""What executors share whose backend takes jobs of several batches, and keeps them by an id."""

from __future__ import annotations

import abc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from comfy_executors.errors import GraphError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.remote_inputs import RemoteInputImageSet
from comfy_executors.graphs import Graph, whole_number
from comfy_executors.runs import (
    Batch,
    BatchFailure,
    BatchResult,
    Job,
    ProgressCallback,
    RunOptions,
    WorkflowRun,
)
from comfy_executors.wire import JobDocument, JobGraph, JobOptions


@dataclass(eq=False)
class Attachment:
    """A job that another process submitted, and the run that takes it up.

    Args:
        job_id: The backend's id of the job.
        numbers: The numbers that its batches have in the job.
        run: Finds the run, once it was started, while somebody holds it.
    """

    job_id: str
    numbers: Sequence[int]
    run: Callable[[], WorkflowRun | None] | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the run was cancelled, or its deadline has passed."""
        if self.run is None:
            return False
        run = self.run()
        if run is None:
            return True
        is_late = run.deadline is not None and time.monotonic() >= run.deadline
        return is_late or run.cancelled() or run.done()


@dataclass(frozen=True)
class AttachedJob(Job):
    """What an attached run works on."""

    # With a default only because those of `Job` before it have one.
    attachment: Attachment = field(default_factory=lambda: Attachment("", ()))


class ServerlessWorkflowExecutor(BaseWorkflowExecutor):
    """An executor whose jobs have several batches, and can be taken up by another process.

    Args:
        batch_size, max_workers: See `BaseWorkflowExecutor`.
        batches_per_job: How many batches a job takes; None puts the whole run into one.

    Raises:
        ValueError: A number is below 1.
    """

    url: str

    def __init__(
        self, batch_size: int = 1, *, max_workers: int = 4, batches_per_job: int | None = None
    ) -> None:
        if batches_per_job is not None:
            batches_per_job = whole_number("batches_per_job", batches_per_job, 1)
        super().__init__(batch_size, max_workers=max_workers)
        self.batches_per_job = batches_per_job
        self._unfollowed: dict[Attachment, str] = {}

    # What a backend adds.

    @abc.abstractmethod
    def _follow_attached(
        self, job: AttachedJob, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        """Do what `_run_job` does, for a job that is at the backend already."""

    @abc.abstractmethod
    def _cancel_job(self, job_id: str) -> None:
        """Cancel a job at the backend; a failure to do so is logged."""

    # What it is given.

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult | BatchFailure]:
        if isinstance(job, AttachedJob):
            self._unfollowed.pop(job.attachment, None)
            yield from self._follow_attached(job, control)
        else:
            yield from self._submit_and_follow(job, control)

    @abc.abstractmethod
    def _submit_and_follow(
        self, job: Job, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        """Do what `_run_job` does, for a job that is to be submitted."""

    def _job_size(self, batches: Sequence[Batch], job: Job) -> int:
        if isinstance(job, AttachedJob):
            return len(batches)
        wanted = min(len(batches), self.batches_per_job or len(batches))
        return max(1, min(wanted, self._fitting(batches[0], job)))

    @abc.abstractmethod
    def _fitting(self, first: Batch, job: Job) -> int:
        """Tell how many batches like the first one the backend takes in one job."""

    def _attach(
        self,
        job_id: str,
        batches: Sequence[Batch],
        numbers: Sequence[int],
        ordered: bool,
        ignore_errors: bool,
        timeout: float | None,
        on_progress: ProgressCallback | None,
        output_dir: str | os.PathLike[str] | None,
    ) -> WorkflowRun:
        """Start a run that takes up a job; its batches have these numbers there."""
        options = RunOptions(
            ordered=ordered,
            ignore_errors=ignore_errors,
            timeout=timeout,
            on_progress=on_progress,
            output_dir=None if output_dir is None else Path(output_dir),
        )
        attachment = Attachment(job_id, numbers)
        self._unfollowed[attachment] = job_id
        try:
            job = AttachedJob((), output_dir=options.output_dir, attachment=attachment)
            run = self._start(batches, job, options)
            attachment.run = run._held_by_executor
        except BaseException:
            self._unfollowed.pop(attachment, None)
            raise
        self._cancel_unfollowed()  # another thread may have closed the executor just now
        return run

    def _document(
        self, request_id: str, graphs: Sequence[JobGraph], job: Job, control: JobControl
    ) -> JobDocument:
        images = job.input_images
        return JobDocument(
            request_id,
            tuple(graphs),
            images.unique if isinstance(images, RemoteInputImageSet) else (),
            JobOptions(
                job.include_previews,
                job.allow_partial,
                control.batch_timeout,
                control.wants_progress,
            ),
        )

    def _wake(self) -> None:
        super()._wake()
        self._cancel_unfollowed()

    def _cancel_unfollowed(self) -> None:
        """Cancel the jobs of attached runs that were stopped before a thread came to them."""
        for attachment in list(self._unfollowed):
            # Whoever takes it out sees to it: this, or the thread that follows it.
            if attachment.is_stopped and self._unfollowed.pop(attachment, ""):
                self._cancel_job(attachment.job_id)

    def _reset_backend(self) -> None:
        self._unfollowed.clear()  # the parent follows them

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} {super().__repr__().split(' ', 1)[1]}"


def attached_batches(job: AttachedJob) -> dict[int, Batch]:
    """Return the batches by the numbers that they have in the job."""
    return {job.attachment.numbers[batch.index]: batch for batch in job.batches}


def job_graph(batch: Batch) -> JobGraph:
    """Render a batch for a job document."""
    return JobGraph(batch.index, batch.size, batch.seed, batch.render(batch))


def unknown_graph(batch: Batch) -> Graph:
    """Stand in for a batch's graph."""
    raise GraphError("the graphs of a job that another process submitted are not known")
