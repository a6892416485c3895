"""One job of several batches, from its submission to its end: what is the same at any backend."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from comfy_executors.clients.http import Waiter
from comfy_executors.errors import ComfyExecutorsError, PromptLostError
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobBudgets, JobLimits
from comfy_executors.executors.job_results import JobResults, Settled
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.runs import Batch
from comfy_executors.wire import WholeOutput

logger = logging.getLogger(__name__)


class JobRun(abc.ABC):
    """A job that is followed to its end.

    Args:
        server: The address of the backend, without keys.
        control: The deadline, the cancel signal and the progress of the job.
        batches: Its batches by their number in the job.
        limits: Its limits.
        watch: Who explains a queue that does not move.
        output_dir: Where outputs are saved as they come, if anywhere.
    """

    _budgets: JobBudgets  # once the job has an id

    def __init__(
        self,
        server: str,
        control: JobControl,
        batches: Mapping[int, Batch],
        limits: JobLimits,
        watch: QueueWatch,
        output_dir: Path | None,
    ) -> None:
        self._server = server
        self._control = control
        self._batches = batches
        self._limits = limits
        self._watch = watch
        self._results = JobResults(control, batches, server, self._fetch, output_dir)

    @property
    def job_id(self) -> str | None:
        """The backend's id of the job, once it was submitted."""
        return self._results.job_id

    @property
    def started(self) -> bool:
        """Whether a worker of ours said anything."""
        return self._results.started

    def naming_job(self) -> contextlib.AbstractContextManager[None]:
        """Write the job's id on every error of ours that leaves the block."""
        return self._results.naming_job()

    # What a backend adds, beside the way in which a job is submitted.

    @abc.abstractmethod
    def _follow(self) -> Iterator[Settled]:
        """Yield what becomes of each batch, until all are settled or the job has ended."""

    @abc.abstractmethod
    def _fetch(self, output: WholeOutput, waiter: Waiter) -> bytes | None:
        """Fetch an output that is elsewhere, on any thread; None where it is gone."""

    @abc.abstractmethod
    def _cancel(self) -> None:
        """Cancel the job unless it has ended; a failure to do so is logged."""

    @abc.abstractmethod
    def _failure(self) -> ComfyExecutorsError:
        """Say why batches have no result, of a job whose worker told no error of the whole."""

    # From its submission to its end.

    def attach(self, job_id: str) -> None:
        """Take up a job that was submitted before; its budgets count from here."""
        self._results.job_id = job_id
        self._budgets = JobBudgets(
            self._control, self._results, self._watch, self._server, self._limits
        )

    def _attach_new(self, job_id: str) -> None:
        """Take up a job that was submitted just now."""
        self.attach(job_id)
        logger.info("job %s on %s has batches %s", job_id, self._server, [*self._batches])
        for number in self._batches:
            self._results.tell("queued", number)

    def follow(self) -> Iterator[Settled]:
        """Yield what becomes of each batch, until all are settled or the job has ended.

        Who leaves it before cancels the job.

        Raises:
            JobTimeoutError: A budget is used up.
            ServerError: The backend cannot be asked.
        """
        with self._cancelling(), self.naming_job():
            try:
                yield from self._follow()
            finally:
                self._budgets.end()
                self._results.discard()

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        """Cancel the job, whatever ends the block before its time."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, ComfyExecutorsError) and not isinstance(error, PromptLostError):
                # Nobody waits until the backend has answered the cancelling.
                self._control.give_up(error)
            self._cancel()
            raise

    def raise_for_rest(self) -> None:
        """Say why batches have no result, if some have none.

        Raises:
            JobOutputLostError: A worker made them, and they were lost on the way.
            WorkflowError: Any other reason.
        """
        if self._results.missing():
            raise self._results.name_job(self._results.error or self._failure())
