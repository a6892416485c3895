"""What `runpod smoke` and `modal smoke` share: small images and a cancellation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import CancelledError
from queue import SimpleQueue

from comfy_executors.cli_delivery import DELIVERED, FAILED, error_text
from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.errors import ComfyExecutorsError, JobError, WaitTimeoutError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.runs import ProgressEvent, WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

# Nodes of ComfyUI itself, and no model.
_TEMPLATE = WorkflowTemplate("""{
  "1": {"class_type": "EmptyImage", "inputs":
        {"width": 64, "height": 64, "batch_size": 1, "color": {{ seed % 16777216 }}}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}}
}""")
_BATCHES_TO_CANCEL = 100  # so many that the job still runs when the cancelling comes
_STOP_SECONDS = 60.0


class Smoke:
    """Tries an executor, and tells what works and when.

    Args:
        executor: The executor.
        timeout: Seconds that each run may take.
    """

    def __init__(self, executor: BaseWorkflowExecutor, timeout: float) -> None:
        self._executor = executor
        self._timeout = timeout
        self._started = time.monotonic()

    def run(self, *checks: Callable[[Smoke], None]) -> int:
        """Make the checks, until one fails; return the exit code."""
        try:
            for check in checks:
                check(self)
        except ComfyExecutorsError as error:
            print(f"error: {error_text(error)}", file=sys.stderr)
            return FAILED
        return DELIVERED

    def tell(self, text: str) -> None:
        """Say that something works."""
        print(f"{time.monotonic() - self._started:7.1f} s  {text}", flush=True)

    def images(self) -> str:
        """Make two images; return the id of the job that made the last."""
        run = self._executor.submit_workflow(_TEMPLATE, num_samples=2, timeout=self._timeout)
        return self.results_of(run)

    def results_of(self, run: WorkflowRun) -> str:
        """Tell of each batch as it comes; return the last one's job."""
        job_id = ""
        for result in (future.result() for future in run.futures):
            job_id = result.job_id or ""
            self.tell(f"batch {result.index} of job {job_id}: {len(result.images)} image")
        return job_id

    def cancelling(
        self, states: Callable[[str, Waiter], Iterator[str]], stopped: Container[str], done: str
    ) -> None:
        """Cancel a run whose job is queued, and ask the service whether the job has stopped.

        Args:
            states: Given a job and a deadline, yields the job's state from time to time, until it
                is final.
            stopped: The states of a job that was cancelled.
            done: The state of one that came to its own end.

        Raises:
            JobError: It goes on after `_STOP_SECONDS`, or ended in another way.
        """
        told: SimpleQueue[ProgressEvent] = SimpleQueue()
        run = self._executor.submit_workflow(
            _TEMPLATE,
            num_samples=_BATCHES_TO_CANCEL,
            timeout=self._timeout,
            on_progress=lambda e: told.put(e) if e.kind in ("queued", "failed") else None,
        )
        job_id = told.get().job_id or ""
        run.cancel()
        cancelled = time.monotonic()
        with contextlib.suppress(CancelledError):
            run.result()
        state = "not told"
        with contextlib.suppress(WaitTimeoutError):
            for news in states(job_id, DeadlineWaiter(_STOP_SECONDS)):
                state = news
        if state not in stopped:
            words = f"was cancelled, and {time.monotonic() - cancelled:.1f} s later is {state}"
            if state == done:
                words += ": it ended before the cancelling came, or in spite of it; try again"
            raise JobError(words, job_id=job_id)
        self.tell(f"a cancelled job stops: it is {state}")
