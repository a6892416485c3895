"""One job on RunPod: submit it, follow its stream, and turn what comes into results.

The stream is asked with long polls that RunPod answers when there is something; each answer also
tells the status. What a stream has lost is looked for in the job's final result. How the polls are
paced stands in runpod_pace.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.clients.result_files import fetch_result
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import (
    TERMINAL,
    RunPodStatus,
    RunPodStream,
)
from comfy_executors.errors import (
    ComfyExecutorsError,
    JobOutputLostError,
    JobTimeoutError,
    ServerError,
    SubmitUncertainError,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.runpod_pace import LEAST_WAIT, Clock, JobLimits, Pace
from comfy_executors.executors.runpod_queue import QueueWatch
from comfy_executors.images import WorkflowOutput, WorkflowOutputImage, kind_of
from comfy_executors.runs import Batch, BatchFailure, BatchResult, ProgressEvent
from comfy_executors.wire import (
    Assembler,
    CompleteBatch,
    Failed,
    News,
    Progress,
    Started,
    WholeOutput,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Settled = Union[BatchResult, BatchFailure]

_STUCK_SECONDS = 30.0
_CANCEL_SECONDS = 20.0
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
        job_id: RunPod's id of the job, once it was submitted.
        started: Whether our own worker said that it began.
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
        self._output_dir = output_dir
        self._assembler = Assembler(batches, keeps_data=False)
        self._made: dict[int, dict[int, WorkflowOutput]] = {}  # of batches that are not complete
        self._lost: list[str] = []
        self.job_id: str | None = None
        self.started = False
        self.status: RunPodStatus | None = None
        self.output: Any = None
        self._announced = list(announced)
        self._pace = Pace(lambda: client.is_crowded)
        self._clock = Clock(limits)
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
            self._control.progress(ProgressEvent("queued", index, job_id=job.id))

    def attach(self, job_id: str) -> None:
        """Take up a job that was submitted before; its budgets count from here."""
        self.job_id = job_id
        self._clock = Clock(self._limits)

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
                for batch in list(self._made):
                    self._discard(batch)
        except BaseException as error:
            if isinstance(error, (WorkflowCancelledError, WorkflowTimeoutError)):
                self._control.give_up(error)
            self.cancel()
            raise

    def _follow(self) -> Iterator[Settled]:
        while self._assembler.unsettled:
            answer = self._poll()
            with contextlib.closing(answer):
                for chunk in answer.chunks:
                    yield from self._take(chunk)
            status = answer.status or self._ask().status
            self._clock.see(status)
            if not self._clock.in_queue:
                self._announce()
            if not answer.chunks:
                if status in TERMINAL:
                    break
                self._keep_limits()
        if self._assembler.unsettled:
            yield from self._read_result()
        self._ended = True

    @property
    def unsettled(self) -> list[int]:
        """The batches of which nothing has become yet."""
        return list(self._assembler.unsettled)

    def _announce(self) -> None:
        while self._announced:
            event = ProgressEvent("started", self._announced.pop(0), job_id=self.job_id)
            self._control.progress(event)

    def _poll(self) -> RunPodStream:
        def once(job_id: str) -> RunPodStream:
            wait = min(self._pace.begin(self._control), self._clock.left())
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
                if not error.transient or not self._is_known or self._clock.left() <= 0:
                    raise
                logger.warning("job %s is asked for again: %s", self.job_id, error)
                self._pace.rest(self._control)
            else:
                self._is_known = True
                return answer

    def _read_result(self) -> Iterator[Settled]:
        """Look into the final result for what the stream did not bring."""
        while not (status := self._ask()).is_terminal:
            self._pace.rest(self._control)
        self.status = status
        self._ended = True
        if status.status == "COMPLETED" and not isinstance(status.output, list):
            self.output = status.output
        for event in status.output if isinstance(status.output, list) else ():
            yield from self._take(event)

    def _keep_limits(self) -> None:
        clock = self._clock
        if clock.in_queue and clock.seconds >= _STUCK_SECONDS and clock.explain_again():
            self._explain()
        if clock.left() > 0:
            return
        if not clock.in_queue:
            raise JobTimeoutError(
                f"ran longer than its execution timeout of {self._limits.execution_timeout:g} s",
                started=True,
                job_id=self.job_id,
                server=self._client.url,
            )
        words = self._watch.explain(self._control)
        raise JobTimeoutError(
            f"waited {self._limits.queue_timeout:g} s for a worker" + (f": {words}" * bool(words)),
            started=False,
            job_id=self.job_id,
            server=self._client.url,
        )

    def _explain(self) -> None:
        words = self._watch.explain(self._control)
        if words:
            for index in self._assembler.unsettled[:1]:
                event = ProgressEvent(
                    "waiting", self._batches[index].index, message=words, job_id=self.job_id
                )
                self._control.progress(event)

    # What comes.

    def _take(self, chunk: Any) -> Iterator[Settled]:
        if not isinstance(chunk, dict) or (chunk and "kind" not in chunk):
            self.output = chunk
            return
        for news in self._assembler.add(chunk):
            settled = self._hear(news)
            if settled is not None:
                yield settled

    def _hear(self, news: News) -> Settled | None:
        if isinstance(news, Started):
            self.started = True
        elif isinstance(news, Progress):
            self._report(news)
        elif isinstance(news, WholeOutput):
            self._keep(news)
        elif isinstance(news, Failed) and news.batch is not None:
            self._discard(news.batch)
            return BatchFailure(self._batches[news.batch].index, self._named(news.error))
        elif isinstance(news, CompleteBatch):
            return self._result(news)
        return None

    def _report(self, news: Progress) -> None:
        if news.event.kind != "queued":  # which it was on RunPod
            index = self._batches[news.batch].index
            event = ProgressEvent(batch=index, job_id=self.job_id, **vars(news.event))
            self._control.progress(event)

    def _named(self, error: ComfyExecutorsError) -> ComfyExecutorsError:
        error.job_id = error.job_id or self.job_id
        return error

    @contextlib.contextmanager
    def naming_job(self) -> Iterator[None]:
        """Write the job's id on every error of ours that leaves the block."""
        try:
            yield
        except ComfyExecutorsError as error:
            self._named(error)
            raise

    def _keep(self, whole: WholeOutput) -> None:
        data = whole.data if whole.data is not None else self._fetch(whole)
        if data is None:
            self._lost.append(f"{whole.name} of batch {whole.batch}")
            return
        output = self._output(whole, data)
        if self._output_dir is not None:
            output._save_and_release(self._output_dir)
        self._made.setdefault(whole.batch, {})[whole.output] = output

    def _discard(self, batch: int) -> None:
        """Remove what was saved of a batch that is not complete."""
        for output in self._made.pop(batch, {}).values():
            if output.path is not None:
                output.path.unlink(missing_ok=True)

    def _result(self, complete: CompleteBatch) -> Settled | None:
        made = self._made.get(complete.batch, {})
        if any(whole.output not in made for whole in complete.outputs):
            return None  # it could not be fetched
        # What else there is was made by another attempt, and is not part of this one.
        outputs = [made.pop(whole.output) for whole in complete.outputs]
        for output in outputs:
            output.prompt_id = complete.prompt_id
        batch = self._batches[complete.batch]
        images = [output for output in outputs if isinstance(output, WorkflowOutputImage)]
        return BatchResult(
            batch.index,
            images,
            [output for output in outputs if not isinstance(output, WorkflowOutputImage)],
            seed=batch.seed,
            prompt_id=complete.prompt_id,
            server=self._client.url,
            job_id=self.job_id,
        )

    def _fetch(self, output: WholeOutput) -> bytes | None:
        """Fetch what lies in a bucket; None where it is gone or broken."""
        try:
            data = fetch_result(output.url or "", self._control, size=output.size)
        except ServerError as error:
            logger.warning("%s of job %s cannot be fetched: %s", output.name, self.job_id, error)
            return None
        return data if output.matches(data) else None

    def _output(self, whole: WholeOutput, data: bytes) -> WorkflowOutput:
        batch = self._batches[whole.batch]
        is_image = kind_of(whole.name) == "image"
        return (WorkflowOutputImage if is_image else WorkflowOutput)(
            data,
            name=whole.name,
            subfolder=whole.subfolder,
            type=whole.type,
            node_id=whole.node,
            batch_index=batch.index,
            seed=batch.seed,
            server=self._client.url,
            cached=whole.cached,
        )

    # Ending.

    def raise_for_rest(self) -> None:
        """Say why batches have no result, if some have none.

        Raises:
            JobOutputLostError: The worker made them, and they were lost on the way.
            WorkflowError: Any other reason.
        """
        missing = [*self._lost, *map(str, self._assembler.missing())]
        if not missing:
            return
        if self._assembler.job_error is not None:
            raise self._named(self._assembler.job_error)
        failure = self.status.failure(self._client.url) if self.status else None
        lost = self.started and (self.status is None or self.status.status == "COMPLETED")
        if failure is not None and not lost:
            raise failure
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" * (len(missing) > 5))
        raise JobOutputLostError(
            f"ended, and its stream lost {shown}", job_id=self.job_id, server=self._client.url
        )


def cancel_job(client: RunPodClient, job_id: str) -> None:
    """Cancel a job on RunPod; a failure to do so is logged."""
    try:
        # A waiter of its own: the job's has passed its deadline or was cancelled.
        client.cancel(job_id, DeadlineWaiter(_CANCEL_SECONDS))
    except (ServerError, WaitTimeoutError) as error:
        logger.warning("job %s on %s may run on: %s", job_id, client.url, error)
