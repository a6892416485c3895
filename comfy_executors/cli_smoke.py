"""What `runpod smoke` and `modal smoke` share: small images and a cancellation."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

from comfy_executors.cli_delivery import DELIVERED, FAILED, error_text
from comfy_executors.errors import ComfyExecutorsError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.runs import WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

# Nodes of ComfyUI itself, and no model.
_TEMPLATE = WorkflowTemplate("""{
  "1": {"class_type": "EmptyImage", "inputs":
        {"width": 64, "height": 64, "batch_size": 1, "color": {{ seed % 16777216 }}}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}}
}""")


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

    def cancelling(self) -> None:
        """Cancel a run whose job is queued."""
        queued = threading.Event()
        run = self._executor.submit_workflow(
            _TEMPLATE,
            timeout=self._timeout,
            on_progress=lambda event: queued.set() if event.kind in ("queued", "failed") else None,
        )
        queued.wait()
        run.cancel()
        with contextlib.suppress(CancelledError):
            run.result()
        self.tell("a cancelled job stops")
