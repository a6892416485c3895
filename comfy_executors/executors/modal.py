"""Running batches on our app on Modal. The way of one job stands in `modal_job.py`."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.modal import (
    COLD_START_SECONDS,
    MAX_DOCUMENT_BYTES,
    MAX_INPUT_BYTES,
    ModalClient,
    input_too_large,
)
from comfy_executors.clients.modal_answers import ModalHealth
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobLimits
from comfy_executors.executors.modal_job import ModalJobRun, cancel_job
from comfy_executors.executors.modal_poller import JobPoller
from comfy_executors.executors.once import Once
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.executors.remote_inputs import RemoteInputImageSet
from comfy_executors.executors.serverless import (
    AttachedJob,
    ServerlessWorkflowExecutor,
    attached_batches,
    job_graph,
    unknown_graph,
)
from comfy_executors.images import InputImageSet, InputImageSource
from comfy_executors.runs import (
    Batch,
    BatchFailure,
    BatchResult,
    Job,
    ProgressCallback,
    WorkflowRun,
)

_ROOM_BYTES = MAX_DOCUMENT_BYTES * 9 // 10  # graphs differ a little in size
# Modal's queue takes 5,000 pieces of news of a job, of which a batch makes two and more; after
# those, images would come only when the job has ended.
_MOST_BATCHES = 1000


class ModalWorkflowExecutor(ServerlessWorkflowExecutor):
    """Run workflow templates on this library's app on Modal.

    Args:
        url: The app's address, as `modal deploy` tells it: `https://….modal.run`.
        key: The proxy token's id, `wk-…`; by default the environment's `MODAL_KEY`. It is shown
            nowhere.
        secret: The proxy token's secret, `ws-…`; by default the environment's `MODAL_SECRET`.
        batch_size: How many images one execution of the graph makes, for templates that say
            `batch_size`.
        batches_per_job: How many batches a job takes; None puts the whole run into one, which is
            one GPU container's work. A number spreads a run over jobs, and so over containers. A
            job takes 1,000 batches at the most; longer runs are divided.
        max_workers: How many jobs are kept at Modal at once.
        cold_start_timeout: Seconds within which the app must answer each call, the start of its
            web container included.
        queue_timeout: Seconds that a job may wait for a GPU container, whose start counts. They
            begin anew whenever another job of this executor begins or ends.
        execution_timeout: Seconds that a job may run there: the whole run, without
            `batches_per_job`.

    Raises:
        ValueError: The address or the token cannot be used, or an argument is out of its range.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        secret: str | None = None,
        batch_size: int = 1,
        *,
        batches_per_job: int | None = None,
        max_workers: int = 4,
        cold_start_timeout: float = COLD_START_SECONDS,
        queue_timeout: float = 900.0,
        execution_timeout: float = 3600.0,
    ) -> None:
        budgets = {
            "cold_start_timeout": cold_start_timeout,
            "queue_timeout": queue_timeout,
            "execution_timeout": execution_timeout,
        }
        for name, seconds in budgets.items():
            if not seconds > 0:
                raise ValueError(f"{name} must be seconds above 0, not {seconds!r}")
        super().__init__(batch_size, max_workers=max_workers, batches_per_job=batches_per_job)
        self._client = ModalClient(url, key, secret, cold_start_timeout=cold_start_timeout)
        self.url = self._client.url
        self._cold_start_timeout = cold_start_timeout
        self._limits = JobLimits(queue_timeout, execution_timeout)
        self._poller = JobPoller(self._client)
        self._inputs = Once()
        self._watch = QueueWatch(lambda waiter: describe(self._client.health(waiter)))

    def attach(
        self,
        call_id: str,
        *,
        ordered: bool = False,
        ignore_errors: bool = False,
        timeout: float | None = None,
        on_progress: ProgressCallback | None = None,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> WorkflowRun:
        """Take up a job that an earlier process started, within a week of its end.

        What was made is all there, and is fetched again; nothing is run again. The app is asked
        at once for the job's batches, their sizes and seeds.

        Args:
            call_id: The job, as `ProgressEvent.job_id` and `BatchResult.job_id` tell it.
            ordered, ignore_errors, timeout, on_progress, output_dir: As for `submit_workflow`.

        Returns:
            A run of its batches, counted from 0.

        Cancelling this run, or a passed `timeout`, cancels the job, also while the run still waits
        for one of `max_workers` places: the call that cancels then waits for Modal's answer.

        Raises:
            JobLostError: The app does not know the job.
            JobExpiredError: It ended more than a week ago.
            ServerError: The app cannot be asked.
            ExecutorClosedError: The executor is closed.
        """
        told = self._client.job(call_id, self._patient()).batches
        batches = [
            Batch(index, batch.size, batch.seed, unknown_graph) for index, batch in enumerate(told)
        ]
        numbers = [batch.number for batch in told]
        return self._attach(
            call_id, batches, numbers, ordered, ignore_errors, timeout, on_progress, output_dir
        )

    def health(self, waiter: Waiter | None = None) -> ModalHealth:
        """Ask the app whether it is there, and how busy it is; this wakes no GPU container.

        Args:
            waiter: The deadline; by default `cold_start_timeout`.

        Raises:
            ServerError: It does not answer, does not take the token, or is no app of ours.
        """
        return self._client.health(waiter or self._patient())

    def _patient(self) -> DeadlineWaiter:
        # A little more, so that the client's own words come first.
        return DeadlineWaiter(self._cold_start_timeout + 1.0)

    def _load_inputs(self, sources: Sequence[InputImageSource]) -> InputImageSet:
        images = RemoteInputImageSet(sources)
        for file in images.unique:
            if len(file.data or b"") > MAX_INPUT_BYTES:
                raise input_too_large(len(file.data or b""), self.url)
        return images

    def _fitting(self, first: Batch, job: Job) -> int:
        size = len(json.dumps(job_graph(first).graph)) + 200
        return min(_MOST_BATCHES, _ROOM_BYTES // size)

    def _submit_and_follow(
        self, job: Job, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        run = self._new_run({batch.index: batch for batch in job.batches}, job, control)
        graphs = [job_graph(batch) for batch in job.batches]
        document = self._document(_request_id(control), graphs, job, control)
        run.submit(document)
        yield from run.follow()
        run.raise_for_rest()

    def _follow_attached(
        self, job: AttachedJob, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        run = self._new_run(attached_batches(job), job, control)
        run.attach(job.attachment.job_id)
        yield from run.follow()
        run.raise_for_rest()

    def _new_run(self, batches: Mapping[int, Batch], job: Job, control: JobControl) -> ModalJobRun:
        return ModalJobRun(
            self._client,
            self._poller,
            control,
            batches,
            self._limits,
            self._watch,
            self._inputs,
            job.output_dir,
        )

    def _cancel_job(self, job_id: str) -> None:
        cancel_job(self._client, job_id)

    def _close_backend(self) -> None:
        self._poller.close()
        self._client.close()

    def _reset_backend(self) -> None:
        super()._reset_backend()
        self._client.reset()
        self._poller.reset()
        self._watch.reset()
        self._inputs = Once()


def _request_id(control: JobControl) -> str:
    """Return the idempotency key of the present attempt.

    Each attempt is a job of its own: under the first one's key it would only be told of that.
    """
    if control.attempt == 1:
        return control.job_id
    return str(uuid.uuid5(uuid.UUID(control.job_id), str(control.attempt)))


def describe(health: ModalHealth) -> str:
    """Put the state of an app into a sentence, with what to do about it."""
    if health.queued is None or health.containers is None:
        return ""
    waiting = f"{health.queued} jobs wait"
    if not health.containers:
        return (
            f"{waiting}, and no GPU container runs: one is starting, or Modal has no free GPU of "
            "this kind"
        )
    if health.running is not None and health.running >= health.containers:
        return (
            f"{waiting}, and {health.containers} GPU containers are busy: let the app have more, "
            "or wait"
        )
    return f"{waiting}, and {health.containers} GPU containers should take one soon"
