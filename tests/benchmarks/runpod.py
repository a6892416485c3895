"""RunPod's stub: how soon an image is there, and how many jobs go through at once."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import requests

from comfy_executors import RunPodWorkflowExecutor
from comfy_executors.devserver import DevServer
from comfy_executors.testing import RunPodStub, RunPodWorkerProcess
from comfy_executors.wire import BatchEnded, End, OutputPart, Started, encode_event

from .graphs import sampling
from .report import Line

_JOBS, _WORKERS, _SECONDS = 100, 20, 1.0


def measure(short: bool) -> Iterator[Line]:
    """Measure both; the first needs the RunPod SDK."""
    if importlib.util.find_spec("runpod") is not None:
        yield _first_image()
    yield from _many_jobs(_JOBS // 2 if short else _JOBS)


@contextmanager
def _site() -> Iterator[tuple[DevServer, RunPodStub]]:
    with DevServer() as server, RunPodStub() as stub, RunPodWorkerProcess(stub, server.address):
        yield server, stub


def _first_image() -> Line:
    """Time from the end of a batch on ComfyUI to its image in our hands, the worst of ten."""
    late = []
    with _site() as (server, stub):  # noqa: SIM117  too long for Python 3.9
        with RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url) as executor:
            executor.submit_workflow(sampling(0.0)).result()  # the worker has started
            for _ in range(10):
                before = len(server.prompts)
                run = executor.submit_workflow(sampling(0.05), num_samples=16)
                next(run)
                now = time.monotonic()
                ends = [p.ended for p in server.prompts[before:] if p.ended is not None]
                late.append(now - min(ends))
                list(run)
    return Line(
        "RunPod: first image after its batch ended, 50 ms sampler, worst of 10",
        "<= 0.7 s",
        f"{max(late):.2f} s",
        max(late) <= 0.7,
    )


def _many_jobs(jobs: int) -> Iterator[Line]:
    floor = jobs * _SECONDS / _WORKERS
    stopping = threading.Event()
    with RunPodStub() as stub, ThreadPoolExecutor(_WORKERS) as pool:
        for number in range(_WORKERS):
            pool.submit(_work, stub, f"hand-{number}", stopping)
        with RunPodWorkflowExecutor(
            stub.endpoint_id, stub.api_key, stub.url, batches_per_job=1, max_workers=_WORKERS
        ) as executor:
            started = time.monotonic()
            images = executor.submit_workflow(sampling(0.0), num_samples=jobs).result()
            seconds = time.monotonic() - started
        calls = stub.calls["stream"] + stub.calls["status"]
        stub.limits.worker_poll = 0.1
        stopping.set()
    assert len(images) == jobs
    yield Line(
        f"RunPod: {jobs} jobs of 1 s, max_workers={_WORKERS}",
        f"<= {1.25 * floor:.2f} s",
        f"{seconds:.2f} s",
        seconds <= 1.25 * floor,
    )
    a_second = calls / (jobs * _SECONDS)
    yield Line(
        "RunPod: status and stream calls a job-second", "<= 3", f"{a_second:.2f}", a_second <= 3
    )


def _work(stub: RunPodStub, worker_id: str, stopping: threading.Event) -> None:
    """Do what a worker does, without a process of its own for each of twenty."""
    base = f"{stub.url}/{stub.endpoint_id}"
    session = requests.Session()
    session.headers["Authorization"] = "key-of-hand"
    while not stopping.is_set():
        answer = session.get(f"{base}/job-take/{worker_id}?gpu=x", timeout=30)
        if answer.status_code != 200:
            continue
        job = answer.json()
        for event in _events(job["input"]["comfy_executors"]):
            body = json.dumps({"output": event})
            session.post(f"{base}/job-stream/{worker_id}/{job['id']}?gpu=x", data=body, timeout=30)
        body = json.dumps({"output": []})
        session.post(f"{base}/job-done/{worker_id}/{job['id']}?gpu=x", data=body, timeout=30)


def _events(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make what our worker sends when nobody looks at the progress: nothing before an output."""
    threading.Event().wait(_SECONDS)
    yield encode_event(Started(0, 1, document["request_id"], "comfy-executors", "0", 1))
    (graph,) = document["graphs"]
    batch, data = graph["batch"], b"picture"
    digest = sha256(data).hexdigest()
    yield encode_event(
        OutputPart(1, 1, batch, 0, 0, 1, "2", "t.png", "", "output", False, len(data), digest, data)
    )
    yield encode_event(BatchEnded(2, 1, batch, 1, None, _SECONDS))
    yield encode_event(End(3, 1, 1, 1, 0))
