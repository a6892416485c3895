"""Modal's edge with our app: how soon an image is there, and how few calls wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from comfy_executors import ModalWorkflowExecutor
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge

from .graphs import sampling
from .report import Line

_JOBS, _RUNS = 20, 10
_SECONDS = 200.0  # of a job, with a step every fifth of a second
_PATIENCE = 60.0
_SETTLING_SECONDS = 3.0  # until what happens at a job's beginning is told


def measure(short: bool) -> Iterator[Line]:
    """Measure all of it."""
    with DevServer() as server, ModalEdge.in_front_of(server.address) as edge:
        yield _first_image(edge)
        yield from _waiting(server, edge, 1, 6.0 if short else 20.0)
        yield from _waiting(server, edge, _JOBS, 6.0 if short else 20.0)


def _executor(edge: ModalEdge) -> ModalWorkflowExecutor:
    return ModalWorkflowExecutor(
        edge.url, edge.key, edge.secret, batches_per_job=1, max_workers=_JOBS
    )


def _first_image(edge: ModalEdge) -> Line:
    """Time from the moment in which a run's first file exists to its image in our hands."""
    late = []
    with _executor(edge) as executor:
        executor.batches_per_job = None
        for _ in range(_RUNS):
            run = executor.submit_workflow(sampling(0.05), num_samples=16)
            image = next(run)
            now = time.time()
            (written,) = [
                path.stat().st_mtime
                for path in edge.backend.directory.glob("outputs/*/1_00000_*.png")
                if path.read_bytes() == image.data
            ]
            late.append(now - written)
            list(run)
    return Line(
        f"Modal: first image after its file exists, worst of {_RUNS}",
        "<= 0.5 s",
        f"{max(late):.2f} s",
        max(late) <= 0.5,
    )


def _waiting(server: DevServer, edge: ModalEdge, jobs: int, seconds: float) -> Iterator[Line]:
    """Count the calls while jobs run or wait, and nothing but progress is to be told."""
    edge.clear()
    with _executor(edge) as executor:
        run = executor.submit_workflow(sampling(_SECONDS, steps=1000), num_samples=jobs)
        run.futures[0].add_done_callback(lambda _: None)
        edge.wait_for(lambda e: e.calls["submit"] == jobs, _PATIENCE)
        server.wait_for(lambda s: any(p.status == "running" for p in s.prompts), _PATIENCE)
        threading.Event().wait(_SETTLING_SECONDS)
        before, began = sum(edge.calls.values()), time.monotonic()
        threading.Event().wait(seconds)
        rate = (sum(edge.calls.values()) - before) / (time.monotonic() - began)
        run.cancel()
    yield Line(
        f"Modal: calls a second for {jobs} waiting job{'s' * (jobs > 1)}",
        "<= 0.55",
        f"{rate:.2f}",
        rate <= 0.55,
    )
