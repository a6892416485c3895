"""One job on RunPod: submit it, follow its stream, and turn what comes into results.

The stream is asked with long polls that RunPod answers when there is something; each answer also
tells the status. What a stream has lost is looked for in the job's final result. How the polls are
paced stands in runpod_pace.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.result_files import fetch_result
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import (
    IN_QUEUE,
    TERMINAL,
    RunPodStatus,
    RunPodStream,
)
from comfy_executors.errors import (
    ComfyExecutorsError,
    PromptLostError,
    ServerError,
    SubmitUncertainError,
    WaitTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobBudgets
from comfy_executors.executors.job_results import JobResults, Settled
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.executors.runpod_official import not_our_worker
from comfy_executors.executors.runpod_pace import LEAST_WAIT, JobLimits, Pace
from comfy_executors.runs import Batch
from comfy_executors.wire import WholeOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CANCEL_SECONDS = 20.0
_OVERTIME_SECONDS = 30.0  # RunPod ends jobs some seconds after their limit
_TTL_SLACK = 60.0


class RunPodJobRun:
    """A job that is followed to its end.

    Args:
        client: The endpoint.
        control: The deadline, the cancel signal and the progress of the job.
        batches: Its batches by their number in the job.
        limits: Its limits.
        watch: Who explains a queue that does not move.
        announced: The batches of a worker that tells no progress: they count as started when the
            job does.
        output_dir: Where outputs are saved as they come, if anywhere.

    Attributes:
        status: RunPod's last word on the job, where batches are left once `follow` has ended.
        output: What a worker that is not ours answered, or None.
    """

    def __init__(
        self,
        client: RunPodClient,
        control: JobControl,
        batches: Mapping[int, Batch],
        limits: JobLimits,
        watch: QueueWatch,
        announced: Sequence[int] = (),
        output_dir: Path | None = None,
    ) -> None:
        self._client = client
        self._control = control
        self._batches = batches
        self._limits = limits
        self._watch = watch
        self._results = JobResults(control, batches, client.url, self._fetch, output_dir)
        self.status: RunPodStatus | None = None
        self.output: Any = None
        self._announced = list(announced)
        self._pace = Pace(lambda: client.is_crowded)
        self._budgets = self._new_budgets()
        self._is_known = False  # whether RunPod ever said a word of it to us
        self._ended = False

    @property
    def job_id(self) -> str | None:
        """RunPod's id of the job, once it was submitted."""
        return self._results.job_id

    @property
    def started(self) -> bool:
        """Whether our own worker said anything."""
        return self._results.started

    def naming_job(self) -> contextlib.AbstractContextManager[None]:
        """Write the job's id on every error of ours that leaves the block."""
        return self._results.naming_job()

    # Submitting and cancelling.

    def submit(self, request: Mapping[str, Any], request_id: str) -> None:
        """Queue the job.

        Raises:
            SubmitUncertainError: It may be queued, and `on_uncertain_submit` is `raise`.
            ServerError, PayloadTooLargeError: RunPod did not take it.
        """
        self._control.limit(0.0)
        ttl = self._limits.queue_timeout + self._limits.execution_timeout + _TTL_SLACK
        for attempt in range(3):
            try:
                job = self._client.submit(
                    request,
                    execution_timeout=self._limits.execution_timeout,
                    ttl=ttl,
                    waiter=self._control,
                    request_id=request_id,
                )
                break
            except SubmitUncertainError as error:
                if not self._limits.resubmit or attempt == 2:
                    raise
                logger.warning("request %s is submitted again: %s", request_id, error)
        self.attach(job.id)
        self._is_known = True
        logger.info("job %s on %s has batches %s", job.id, self._client.url, [*self._batches])
        for index in self._batches:
            self._results.tell("queued", index)

    def attach(self, job_id: str) -> None:
        """Take up a job that was submitted before; its budgets count from here."""
        self._results.job_id = job_id
        self._budgets = self._new_budgets()

    def cancel(self) -> None:
        """Cancel the job on RunPod unless it has ended; a failure to do so is logged."""
        if self.job_id is None or self._ended:
            return
        self._ended = True
        cancel_job(self._client, self.job_id)

    # Following.

    def follow(self) -> Iterator[Settled]:
        """Yield what becomes of each batch, until all are settled or the job has ended.

        Who leaves it before cancels the job.
        """
        try:
            try:
                with self.naming_job():
                    yield from self._follow()
            finally:
                self._results.discard()
        except BaseException as error:
            if isinstance(error, ComfyExecutorsError) and not isinstance(error, PromptLostError):
                self._control.give_up(
                    error
                )  # nobody waits until RunPod has answered the cancelling
            self.cancel()
            raise

    def _follow(self) -> Iterator[Settled]:
        while self._results.unsettled:
            answer = self._poll()
            with contextlib.closing(answer):
                yield from self._results.take(self._events(answer.chunks))
            status = answer.status or self._ask().status
            self._budgets.see(status == IN_QUEUE)
            if not self._budgets.in_queue:
                self._announce()
            if not answer.chunks:
                if status in TERMINAL:
                    break
                self._budgets.keep()
        if self._results.unsettled:
            yield from self._read_result()
        self._ended = True

    def _announce(self) -> None:
        while self._announced:
            self._results.tell("started", self._announced.pop(0))

    def _poll(self) -> RunPodStream:
        def once(job_id: str) -> RunPodStream:
            wait = min(self._pace.begin(self._control), self._budgets.left())
            return self._client.stream(job_id, max(LEAST_WAIT, wait), self._control)

        answer = self._insist(once)
        self._pace.end(bool(answer.chunks) or answer.status in TERMINAL, self._control)
        return answer

    def _ask(self) -> RunPodStatus:
        return self._insist(lambda job_id: self._client.status(job_id, self._control))

    def _insist(self, call: Callable[[str], T]) -> T:
        """Ask for the job, through an outage as well: it goes on without us, and is paid for."""
        assert self.job_id is not None
        while True:
            try:
                answer = call(self.job_id)
            except ServerError as error:
                if not error.transient or not self._is_known or self._budgets.left() <= 0:
                    raise
                logger.warning("job %s is asked for again: %s", self.job_id, error)
                self._pace.rest(self._control)
            else:
                self._is_known = True
                return answer

    def _read_result(self) -> Iterator[Settled]:
        """Look into the final result for what the stream did not bring."""
        while not (status := self._ask()).is_terminal:
            self._budgets.see(status.status == IN_QUEUE)
            self._budgets.keep()
            self._pace.rest(self._control)
        self.status = status
        self._ended = True
        if status.status == "COMPLETED" and not isinstance(status.output, list):
            self.output = status.output
        if isinstance(status.output, list):
            yield from self._results.take(self._events(status.output))

    def _new_budgets(self) -> JobBudgets:
        return JobBudgets(
            self._control,
            self._results,
            self._watch,
            self._client.url,
            queue_timeout=self._limits.queue_timeout,
            execution_timeout=self._limits.execution_timeout,
            overtime=_OVERTIME_SECONDS,
        )

    # What comes.

    def _events(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """Yield those that are events; any other is what another worker answered."""
        for chunk in chunks:
            if isinstance(chunk, dict) and (not chunk or "kind" in chunk):
                yield chunk
            else:
                self.output = chunk

    def _fetch(self, output: WholeOutput, waiter: Waiter) -> bytes | None:
        """Fetch what lies in a bucket; None where it is gone."""
        try:
            return fetch_result(output.url or "", waiter, size=output.size)
        except ServerError as error:
            logger.warning("%s of job %s cannot be fetched: %s", output.name, self.job_id, error)
            return None

    # Ending.

    def raise_for_rest(self) -> None:
        """Say why batches have no result, if some have none.

        Raises:
            JobOutputLostError: The worker made them, and they were lost on the way.
            ServerResponseError: Another worker than ours answered.
            WorkflowError: Any other reason.
        """
        if not self._results.missing():
            return
        if self._results.error is not None:
            raise self._results.error
        failure = self.status.failure(self._client.url) if self.status else None
        lost = self.started and (self.status is None or self.status.status == "COMPLETED")
        if failure is not None and not lost:
            raise failure
        if not self.started and self.status is not None and self.status.is_terminal:
            output = self.status.output if self.output is None else self.output
            with self.naming_job():
                raise not_our_worker(output)
        raise self._results.lost("ended, and its stream lost")


def cancel_job(client: RunPodClient, job_id: str) -> None:
    """Cancel a job on RunPod; a failure to do so is logged."""
    try:
        # A waiter of its own: the job's has passed its deadline or was cancelled.
        client.cancel(job_id, DeadlineWaiter(_CANCEL_SECONDS))
    except (ServerError, WaitTimeoutError) as error:
        logger.warning("job %s on %s may run on: %s", job_id, client.url, error)
