"""The container with the GPU: ComfyUI, and the jobs that it runs, without Modal's SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_executors.errors import ServerError
from comfy_executors.workers.comfy_process import ComfyProcess
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.job_records import JobChannel
from comfy_executors.workers.modal_job import JobRunner

# Of the time limit of the container, in which a job tells that it ran too long.
_GRACE_SECONDS = 60.0


class GpuContainer:
    """Starts ComfyUI and waits until it answers; then it runs one job after the other.

    Args:
        address: Where ComfyUI listens.
        comfyui: Its process; None where it runs already.
        startup_timeout: Seconds that it may take.
        timeout: Seconds after which Modal ends a job; one tells of itself a little before.

    Raises:
        RuntimeError: ComfyUI did not start, or ended while it did.
    """

    def __init__(
        self,
        address: str,
        comfyui: ComfyProcess | None,
        *,
        startup_timeout: float,
        timeout: float,
    ) -> None:
        self._comfyui = comfyui
        engine = Engine(address, ready_timeout=startup_timeout, process=comfyui)
        self._runner = JobRunner(
            engine,
            time_limit=max(timeout - _GRACE_SECONDS, timeout / 2),
            prepare=comfyui.ensure_running if comfyui is not None else None,
        )
        try:
            if comfyui is not None:
                comfyui.ensure_running()
            engine.wait_until_ready()
        except (ServerError, OSError) as error:
            self.close()
            # Of another kind: who asks for a job takes a TimeoutError for one that goes on.
            raise RuntimeError(f"ComfyUI did not start: {error}") from error

    @property
    def is_sick(self) -> bool:
        """Whether the next job should go to another container."""
        return self._runner.sick is not None

    def run(self, document: Mapping[str, Any], channel: JobChannel) -> dict[str, Any]:
        """Run a job; see `JobRunner.run`."""
        return self._runner.run(document, channel)

    def close(self) -> None:
        """Cancel what runs, and end ComfyUI and all threads."""
        self._runner.close()
        if self._comfyui is not None:
            self._comfyui.close()
