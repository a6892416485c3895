"""The budgets of a job: how long it may wait for a worker, and how long it may run."""

from __future__ import annotations

import time
from dataclasses import dataclass

from comfy_executors.errors import JobTimeoutError
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_results import JobResults
from comfy_executors.executors.queue_watch import QueueWatch

_STUCK_SECONDS = 30.0
_EXPLAIN_SECONDS = 15.0
# Within which the backend must explain it; a little, where the budget leaves nothing.
_ASK_SECONDS = (1.0, 3.0)


@dataclass(frozen=True)
class JobLimits:
    """How long a job may wait and run.

    Args:
        queue_timeout: Seconds that it may wait for a worker while no other job of ours begins or
            ends.
        execution_timeout: Seconds that it may run.
        overtime: Seconds that are granted on top, for a backend that keeps the limit itself.
        at_once: How many jobs of ours may be there at once; the others may run before it.
    """

    queue_timeout: float
    execution_timeout: float
    overtime: float = 0.0
    at_once: int = 1


class JobBudgets:
    """Counts what a job has used of its two budgets, and explains a queue that does not move.

    Args:
        control: The deadline of the waits.
        results: The job, which is named in errors, and by which explanations are told.
        watch: Who explains the queue, and knows whether it moves.
        server: The address of the backend, without keys.
        limits: The budgets.
    """

    def __init__(
        self,
        control: JobControl,
        results: JobResults,
        watch: QueueWatch,
        server: str,
        limits: JobLimits,
    ) -> None:
        self._control = control
        self._results = results
        self._watch = watch
        self._server = server
        self._limits = limits
        self.in_queue = True
        self._attempt = 1
        self._since = time.monotonic()
        self._explained = float("-inf")

    def see(self, in_queue: bool, attempt: int = 1) -> None:
        """Take down whether the job waits, and in which attempt; a change begins a budget anew."""
        if in_queue != self.in_queue or attempt > self._attempt:
            self.in_queue = in_queue
            self._attempt = max(attempt, self._attempt)
            self._since = time.monotonic()
            self._explained = float("-inf")
            self._watch.note_move()

    def end(self) -> None:
        """Take down that the job has ended; one that never ran leaves its place to nobody."""
        if not self.in_queue:
            self._watch.note_move()

    def left(self) -> float:
        """Return what is left of the budget, in seconds, at least 0.

        Time behind other jobs of ours that run and end is no waiting in vain: with each of them
        the queue's budget begins anew.
        """
        limits = self._limits
        if self.in_queue:
            since = max(self._since, self._watch.moved_at)
            return max(0.0, limits.queue_timeout - (time.monotonic() - since))
        return max(0.0, limits.execution_timeout + limits.overtime - self._seconds())

    def until_explanation(self) -> float:
        """Return the seconds until a queue that does not move is to be explained."""
        if not self.in_queue:
            return float("inf")
        stuck = min(_STUCK_SECONDS, self._limits.queue_timeout / 2)
        due = max(stuck, self._explained + _EXPLAIN_SECONDS)
        return max(0.0, due - self._seconds())

    def keep(self) -> None:
        """Explain a queue that does not move, every 15 seconds once, and see to the limits.

        Raises:
            JobTimeoutError: The budget is used up.
        """
        if self.until_explanation() == 0:
            self._explained = self._seconds()
            self._explain()
        if self.left() > 0:
            return
        if not self.in_queue:
            raise self._timeout(
                f"ran longer than its execution timeout of {self._limits.execution_timeout:g} s: "
                "give it more with execution_timeout=, or less to do with batches_per_job="
            )
        words = self._watch.words  # who waited long enough is not kept waiting for more
        raise self._timeout(
            f"waited {self._limits.queue_timeout:g} s for a worker" + (f": {words}" * bool(words))
        )

    def _explain(self) -> None:
        least, most = _ASK_SECONDS
        words = self._watch.explain(self._control, max(least, min(most, self.left())))
        if words:
            for number in self._results.unsettled[:1]:
                self._results.tell("waiting", number, message=words)

    def _seconds(self) -> float:
        return time.monotonic() - self._since

    def _timeout(self, message: str) -> JobTimeoutError:
        return JobTimeoutError(
            message, started=not self.in_queue, job_id=self._results.job_id, server=self._server
        )
