"""Our RunPod worker as a process of its own, at work for the stub."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from comfy_executors.errors import MissingExtraError
from comfy_executors.testing.runpod_stub import RunPodStub

_GRACE_SECONDS = 10.0
# A worker in a group of its own outlives a test run that is killed, and asks its stub in vain for
# ever. Its standard input ends with whoever started it.
_WATCHED = """
import os, runpy, signal, threading

def watch():
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
"""


def start_worker(program: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a worker in a process group of its own that ends with this process at the latest.

    Args:
        program: What it runs, as Python code; `runpy` is imported.
        options: Those of `subprocess.Popen`.
    """
    command = [sys.executable, "-c", _WATCHED + program]
    return subprocess.Popen(  # noqa: S603  the program is the caller's own
        command, stdin=subprocess.PIPE, start_new_session=True, **options
    )


class RunPodWorkerProcess:
    """The RunPod SDK's worker loop with our handler, in a process of its own. ::

        with DevServer() as server, RunPodStub() as stub:
            with RunPodWorkerProcess(stub, server.address):
                ...

    It needs the extra `runpod-worker`.

    Args:
        stub: The platform that it works for.
        comfyui_address: The ComfyUI beside it, such as a dev server.
        worker_id: Its id; each process wants its own.
        environment: Further variables, such as `BUCKET_ENDPOINT_URL`.

    Raises:
        MissingExtraError: The RunPod SDK is not installed.
    """

    def __init__(
        self,
        stub: RunPodStub,
        comfyui_address: str,
        worker_id: str = "worker-1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if importlib.util.find_spec("runpod") is None:
            raise MissingExtraError("runpod", "runpod-worker")
        self.worker_id = worker_id
        self._environment = {
            **os.environ,
            **stub.worker_environment(worker_id),
            "COMFYUI_ADDRESS": comfyui_address,
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RunPodWorkerProcess:
        """Start the worker and return it; it asks for a job within some seconds."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        # A group of its own: the SDK pings from a second process.
        self._process = start_worker(
            "runpy.run_module('comfy_executors.workers.runpod_handler', run_name='__main__')",
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        return self

    def stop(self) -> None:
        """End the worker as RunPod does: SIGTERM, and SIGKILL when that takes too long."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _reap(process)
        self._log.close()

    @property
    def log(self) -> str:
        """What the worker wrote so far."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def kill(self) -> None:
        """End the worker at once, as when its machine dies."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            _reap(self._process)

    def __enter__(self) -> RunPodWorkerProcess:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
