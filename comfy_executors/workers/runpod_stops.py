"""Stop signals that the RunPod SDK lets go, kept for the jobs that they are meant for.

The SDK hands a stop to the task of its job. A job that RunPod gave to this worker has no task yet
while the answer is on its way, and for up to 0.1 seconds afterwards: a stop that comes then is
dropped, RunPod shows the job as cancelled, and it would run on to its end, on the bill.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from typing import Any

logger = logging.getLogger(__name__)

# Much more than the SDK needs; later the same id can only be a job that somebody retries.
_KEPT_SECONDS = 10.0


class EarlyStops:
    """The stops of the last seconds that met no task. It belongs to the SDK's event loop."""

    def __init__(self) -> None:
        self._missed: dict[str, float] = {}

    def watch(self, scaler: type[Any]) -> None:
        """See to it that no stop is lost.

        Args:
            scaler: The SDK's `JobScaler`, whose `stop_job` is replaced.
        """
        stop = getattr(scaler, "stop_job", None)
        if stop is None:
            logger.warning("this runpod cannot stop single jobs: install runpod 1.12 or newer")
            return

        async def stop_job(self_: Any, job_id: str) -> bool:
            task = self_.jobs_tasks.get(job_id)
            # The SDK never gets back the place of a task that is cancelled before its first step.
            while task and inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED:
                await asyncio.sleep(0)
            found: bool = await stop(self_, job_id)
            if not found:
                self.keep(job_id)
            return found

        scaler.stop_job = stop_job

    def keep(self, job_id: str) -> None:
        """Take down a stop that met no task."""
        now = time.monotonic()
        self._missed = {k: at for k, at in self._missed.items() if now - at < _KEPT_SECONDS}
        self._missed[job_id] = now

    def take(self, job_id: str) -> bool:
        """Tell, once, whether a job that begins now was stopped before it did."""
        missed = self._missed.pop(job_id, None)
        return missed is not None and time.monotonic() - missed < _KEPT_SECONDS
