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
from comfy_executors.clients.runpod_payload import TTL_SECONDS
from comfy_executors.errors import (
    ComfyExecutorsError,
    ServerError,
    SubmitUncertainError,
    WaitTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobLimits
from comfy_executors.executors.job_results import Settled
from comfy_executors.executors.job_run import JobRun
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.executors.runpod_official import not_our_worker
from comfy_executors.executors.runpod_pace import LEAST_WAIT, Pace
from comfy_executors.runs import Batch
from comfy_executors.wire import WholeOutput

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CANCEL_SECONDS = 20.0
_TTL_SLACK = 60.0


class RunPodJobRun(JobRun):
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
        resubmit: Whether it is submitted again where nobody knows whether it arrived.

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
        resubmit: bool = False,
    ) -> None:
        super().__init__(client.url, control, batches, limits, watch, output_dir)
        self._client = client
        self._resubmit = resubmit
        self.status: RunPodStatus | None = None
        self.output: Any = None
        self._announced = list(announced)
        self._pace = Pace(lambda: client.is_crowded)
        self._is_known = False  # whether RunPod ever said a word of it to us
        self._ended = False

    # Submitting and cancelling.

    def submit(self, request: Mapping[str, Any], request_id: str) -> None:
        """Queue the job.

        Raises:
            SubmitUncertainError: It may be queued, and `on_uncertain_submit` is `raise`.
            ServerError, PayloadTooLargeError: RunPod did not take it.
        """
        self._control.limit(0.0)
        limits = self._limits
        # Its time in the queue counts, and others of ours may run before it.
        ttl = limits.at_once * (limits.queue_timeout + limits.execution_timeout) + _TTL_SLACK
        for attempt in range(3):
            try:
                job = self._client.submit(
                    request,
                    execution_timeout=limits.execution_timeout,
                    ttl=min(ttl, TTL_SECONDS[1]),
                    waiter=self._control,
                    request_id=request_id,
                )
                break
            except SubmitUncertainError as error:
                if not self._resubmit or attempt == 2:
                    raise
                logger.warning("request %s is submitted again: %s", request_id, error)
        self._is_known = True
        self._attach_new(job.id)

    def _cancel(self) -> None:
        if self.job_id is None or self._ended:
            return
        self._ended = True
        cancel_job(self._client, self.job_id)

    # Following.

    def _follow(self) -> Iterator[Settled]:
        while self._results.unsettled:
            answer = self._poll()
            # Now, since whoever takes the results may take long over them, while the job ends.
            is_over = self._budgets.left() <= 0
            with contextlib.closing(answer):
                yield from self._results.take(self._events(answer.chunks))
            status = answer.status or self._ask().status
            self._budgets.see(status == IN_QUEUE)
            if not self._budgets.in_queue:
                self._announce()
            if status in TERMINAL:
                if not answer.chunks:
                    break
            elif is_over or not answer.chunks:
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
        if isinstance(status.output, list):
            yield from self._results.take(self._events(status.output))
        elif status.status == "COMPLETED":
            self.output = status.output

    # What comes.

    def _events(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """Yield those that are events; any other is what another worker answered."""
        for chunk in chunks:
            if isinstance(chunk, dict) and (not chunk or "kind" in chunk):
                yield chunk
            else:
                self.output = chunk

    def _fetch(self, output: WholeOutput, waiter: Waiter) -> bytes | None:
        try:
            return fetch_result(output.url or "", waiter, size=output.size)
        except ServerError as error:
            logger.warning("%s of job %s cannot be fetched: %s", output.name, self.job_id, error)
            return None

    # Ending.

    def _failure(self) -> ComfyExecutorsError:
        failure = self.status.failure(self._server) if self.status else None
        lost = self.started and (self.status is None or self.status.status == "COMPLETED")
        if failure is not None and not lost:
            return failure
        if not self.started and self.status is not None and self.status.is_terminal:
            return not_our_worker(self.status.output if self.output is None else self.output)
        return self._results.lost("ended, and its stream lost")


def cancel_job(client: RunPodClient, job_id: str) -> None:
    """Cancel a job on RunPod; a failure to do so is logged."""
    try:
        # A waiter of its own: the job's has passed its deadline or was cancelled.
        client.cancel(job_id, DeadlineWaiter(_CANCEL_SECONDS))
    except (ServerError, WaitTimeoutError) as error:
        logger.warning("job %s on %s may run on: %s", job_id, client.url, error)
