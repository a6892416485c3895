"""One job on Modal: submit it, follow its events, fetch its outputs, see to its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.modal import MAX_WAIT, ModalClient, digest_of
from comfy_executors.clients.modal_answers import DONE, QUEUED, ModalJob
from comfy_executors.clients.modal_refusals import MissingInputsError
from comfy_executors.errors import (
    ComfyExecutorsError,
    JobError,
    JobLostError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    WaitTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobLimits
from comfy_executors.executors.job_results import Settled
from comfy_executors.executors.job_run import JobRun
from comfy_executors.executors.modal_poller import JobPoller
from comfy_executors.executors.once import Once
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.runs import Batch
from comfy_executors.wire import JobDocument, WholeOutput

logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 20.0
_INPUT_ROUNDS = 3


class ModalJobRun(JobRun):
    """A job that is followed to its end.

    Args:
        client: The app.
        poller: Who waits for news.
        control: The deadline, the cancel signal and the progress of the job.
        batches: Its batches by their number in the job.
        limits: Its limits.
        watch: Who explains a queue that does not move.
        inputs: Which input images were put there.
        output_dir: Where outputs are saved as they come, if anywhere.
    """

    def __init__(
        self,
        client: ModalClient,
        poller: JobPoller,
        control: JobControl,
        batches: Mapping[int, Batch],
        limits: JobLimits,
        watch: QueueWatch,
        inputs: Once,
        output_dir: Path | None = None,
    ) -> None:
        super().__init__(client.url, control, batches, limits, watch, output_dir)
        self._client = client
        self._poller = poller
        self._inputs = inputs
        self._request_id: str | None = None  # while a job may run that has no id yet
        self._end: ModalJob | None = None

    # Submitting and cancelling.

    def submit(self, document: JobDocument) -> None:
        """Submit the job.

        Raises:
            ServerError, PayloadTooLargeError, WorkflowRejectedError: The app did not take it.
        """
        with self._cancelling():
            self._control.limit(0.0)
            self._request_id = document.request_id
            try:
                job = self._submit(document)
            except ServerError as error:
                if not error.maybe_received:
                    self._request_id = None
                raise
            self._attach_new(job.id)

    def _submit(self, document: JobDocument) -> ModalJob:
        for attempt in range(_INPUT_ROUNDS):
            try:
                return self._client.submit(document, self._control)
            except MissingInputsError as error:
                if attempt == _INPUT_ROUNDS - 1:
                    raise
                if attempt > 0:
                    self._inputs.forget()  # what was put long ago is gone
                self._put_inputs(document, error.digests)
        raise AssertionError("it was submitted, or there was an error")

    def _put_inputs(self, document: JobDocument, digests: Sequence[str]) -> None:
        contents = {digest_of(f.data): f.data for f in document.input_images if f.data is not None}
        for digest in digests:
            put = partial(self._client.put_input, contents.get(digest, b""), self._control)
            self._inputs.do(digest, self._control, put)

    def _cancel(self) -> None:
        if self._end is None and (self.job_id or self._request_id):
            cancel_job(self._client, self.job_id, self._request_id)

    # Following.

    def _follow(self) -> Iterator[Settled]:
        job_id = self.job_id
        assert job_id is not None
        self._poller.follow(job_id, self._control.post)
        try:
            while self._results.unsettled and self._end is None:
                yield from self._take_news()
        finally:
            self._poller.leave(job_id, self._control.post)

    def _take_news(self) -> Iterator[Settled]:
        budgets = self._budgets
        news = self._control.receive(min(budgets.left(), budgets.until_explanation()))
        if news is None:
            budgets.keep()
            return
        if isinstance(news, ComfyExecutorsError):
            raise news
        budgets.see(news.state == QUEUED, news.attempt)
        yield from self._results.take(news.events)
        if news.is_final:
            self._end = news

    def _fetch(self, output: WholeOutput, waiter: Waiter) -> bytes | None:
        while True:
            try:
                return self._client.output(output.url or "", waiter)
            except ServerUnreachableError as error:
                # As with the job's news, its own time is what ends an outage.
                if not error.transient or self._budgets.left() <= 0:
                    raise
            except (JobLostError, ServerNotReadyError) as error:
                reason: ComfyExecutorsError = error
                break
            except ServerResponseError as error:
                status = error.status or 404  # or the path led elsewhere
                if not error.transient and status < 500 and status not in (404, 410):
                    raise
                reason = error
                break
        logger.warning("%s of job %s is gone: %s", output.name, self.job_id, reason)
        return None

    # Ending.

    def _failure(self) -> ComfyExecutorsError:
        end = self._end
        if end is None or end.state == DONE:
            return self._results.lost("ended, and there is no")
        if end.failure is not None:
            return end.failure
        return JobError(f"ended as {end.state}", job_id=self.job_id, server=self._server)


def cancel_job(client: ModalClient, job_id: str | None, request_id: str | None = None) -> None:
    """Cancel a job, and wait until it has ended; a failure to do so is logged."""
    # A waiter of its own: the job's has passed its deadline or was cancelled.
    waiter = DeadlineWaiter(_CANCEL_SECONDS)
    name = job_id or f"request {request_id}"
    try:
        job_id = client.cancel(waiter, job_id=job_id, request_id=request_id)
        cursor = ""
        while job_id is not None:
            job = client.poll({job_id: cursor}, MAX_WAIT, waiter).get(job_id)
            if job is None or job.is_final:
                return
            cursor = job.cursor
    except JobLostError:
        return  # it cannot run on
    except (ServerError, WaitTimeoutError) as error:
        logger.warning("job %s on %s may run on: %s", name, client.url, error)
