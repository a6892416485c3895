"""Workers for the tests of the RunPod stub: one by hand, and the SDK's own loop in a process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import RunPodJob
from comfy_executors.testing import RunPodStub
from comfy_executors.testing.runpod_process import start_worker

PATIENCE = 20.0

needs_sdk = pytest.mark.skipif(
    importlib.util.find_spec("runpod") is None,
    reason="the RunPod SDK from 1.12 on needs Python 3.10",
)


def waiter(seconds: float = PATIENCE) -> DeadlineWaiter:
    return DeadlineWaiter(seconds)


def client_of(stub: RunPodStub) -> RunPodClient:
    return RunPodClient(stub.endpoint_id, stub.api_key, stub.url)


def submit(client: RunPodClient, **fields: Any) -> RunPodJob:
    return client.submit(
        fields or {"a": 1},
        execution_timeout=60,
        ttl=600,
        waiter=waiter(),
        request_id="request-1",
    )


class HandWorker:
    """Speaks the worker's protocol, one call at a time."""

    def __init__(self, stub: RunPodStub, worker_id: str = "hand-1") -> None:
        self.worker_id = worker_id
        self._base = f"{stub.url}/{stub.endpoint_id}"

    def _call(self, method: str, path: str, body: Any = None) -> requests.Response:
        return requests.request(
            method,
            f"{self._base}/{path}",
            data=None if body is None else json.dumps(body),
            headers={"Authorization": "key-of-hand"},
            timeout=PATIENCE,
        )

    def take(self) -> Any:
        answer = self._call("GET", f"job-take/{self.worker_id}?gpu=x&job_in_progress=0")
        return answer.json() if answer.status_code == 200 else None

    def take_batch(self, size: int) -> Any:
        answer = self._call("GET", f"job-take-batch/{self.worker_id}?gpu=x&batch_size={size}")
        return answer.json() if answer.status_code == 200 else []

    def chunk(self, job_id: str, chunk: Any) -> int:
        path = f"job-stream/{self.worker_id}/{job_id}?gpu=x&isStream=false"
        return self._call("POST", path, {"output": chunk}).status_code

    def done(self, job_id: str, **result: Any) -> int:
        path = f"job-done/{self.worker_id}/{job_id}?gpu=x&isStream=false"
        return self._call("POST", path, result).status_code

    def stops(self) -> list[str]:
        answer = self._call("GET", f"job-stop/{self.worker_id}?gpu=x")
        return answer.json()["jobsToStop"] if answer.status_code == 200 else []

    def ping(self, job_id: str) -> int:
        return self._call("GET", f"ping/{self.worker_id}?gpu=x&job_id={job_id}").status_code


@contextlib.contextmanager
def sdk_worker(
    stub: RunPodStub, handler: str, folder: Path, worker_id: str = "worker-1"
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a handler, given as Python code, under the SDK's own worker loop."""
    script = folder / f"{worker_id}.py"
    script.write_text(handler)
    log = folder / f"{worker_id}.log"
    environment = {**os.environ, **stub.worker_environment(worker_id)}
    with log.open("wb") as file:
        process = start_worker(
            f"runpy.run_path({str(script)!r}, run_name='__main__')",
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        yield process
    except BaseException:
        print(log.read_text())
        raise
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker with the process that pings for it, as the end of a container does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
