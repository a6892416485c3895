"""One factory for each executor class; every case of this folder runs on all of them.

With the environment variable COMFYUI_URL set, the ComfyUI cases use that server instead of the dev
server. The graphs have core nodes only.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from comfy_executors import (
    BaseWorkflowExecutor,
    ComfyServerWorkflowExecutor,
    DummyWorkflowExecutor,
    ModalWorkflowExecutor,
    RunPodWorkflowExecutor,
    WorkflowTemplate,
)
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge, RunPodStub, RunPodWorkerProcess

DEADLINE = 60.0  # seconds; generous, since nothing is meant to come near it

# EmptyImage ignores its seed, which keeps the batches out of the server's cache all the same.
_GRAPH = """{
  "1": {"class_type": "EmptyImage", "inputs":
        {"width": 16, "height": 16, "batch_size": BATCH_SIZE, "color": {{ color }}, "seed": 7}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "contract"}}
}"""
TEMPLATE = WorkflowTemplate(_GRAPH.replace("BATCH_SIZE", "{{ batch_size }}"))
SINGLE = WorkflowTemplate(_GRAPH.replace("BATCH_SIZE", "1"))


@dataclass(frozen=True)
class Backend:
    """An executor class to be tested.

    Args:
        make: Makes an executor with the given options.
        requests: Counts what was sent to the service so far; always 0 where nothing is sent.
        port: The TCP port of the service in this process, or None.
        secrets: What must never be shown.
        hands_out_all: Whether a run is one job, so that none of its batches waits for its turn.
    """

    make: Callable[..., BaseWorkflowExecutor]
    requests: Callable[[], int] = lambda: 0
    port: int | None = None
    secrets: tuple[str, ...] = ()
    hands_out_all: bool = False


def _dummy() -> Iterator[Backend]:
    yield Backend(lambda **options: DummyWorkflowExecutor(image_size=8, **options))


def _comfy_server() -> Iterator[Backend]:
    url = os.environ.get("COMFYUI_URL")
    if url:
        yield Backend(lambda **options: _make_client(url, **options), secrets=("hush-hush",))
        return
    with DevServer() as server:
        yield Backend(
            lambda **options: _make_client(server.address, **options),
            # Websockets come on top of these, and are on record only once they close.
            requests=lambda: sum(request.path != "/ws" for request in server.requests),
            port=server.port,
            secrets=("hush-hush",),
        )


def _make_client(address: str, **options: Any) -> BaseWorkflowExecutor:
    return ComfyServerWorkflowExecutor(address, headers={"X-Api-Key": "hush-hush"}, **options)


@pytest.fixture(scope="session")
def runpod_stub() -> Iterator[RunPodStub]:
    """RunPod's stub, the SDK's own worker loop in processes, our handler, the dev server.

    The loop pauses for up to a second after each job that it takes; there are six of them, so
    that jobs need not wait for it.
    """
    pytest.importorskip("runpod", reason="the RunPod SDK from 1.12 on needs Python 3.10")
    with DevServer() as server, RunPodStub(api_key="hush-hush") as stub, ExitStack() as workers:
        for number in range(6):
            worker = RunPodWorkerProcess(stub, server.address, f"worker-{number}")
            workers.enter_context(worker)
            workers.callback(worker.kill)  # a worker that waits for a job is long in ending
        yield stub


@pytest.fixture(scope="session")
def official_stub() -> Iterator[RunPodStub]:
    """The same with a stand-in for the official worker instead of our handler."""
    pytest.importorskip("runpod", reason="the RunPod SDK from 1.12 on needs Python 3.10")
    with DevServer() as server, RunPodStub(api_key="hush-hush") as stub, ExitStack() as workers:
        for number in range(2):
            environment = {**stub.worker_environment(f"w-{number}"), "COMFYUI_ADDRESS": server.url}
            worker = subprocess.Popen(
                [sys.executable, str(_OFFICIAL)],
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the SDK pings from a second process
            )
            workers.callback(worker.wait)
            workers.callback(os.killpg, worker.pid, signal.SIGKILL)
        yield stub


def _runpod(stub: RunPodStub, **settings: Any) -> Iterator[Backend]:
    yield Backend(
        lambda **options: RunPodWorkflowExecutor(
            stub.endpoint_id, stub.api_key, stub.url, **settings, **options
        ),
        requests=lambda: sum(stub.calls[name] for name in _CLIENT_CALLS),
        port=int(stub.url.split(":")[2].split("/")[0]),
        secrets=("hush-hush",),
        hands_out_all=settings.get("batches_per_job", 1) is None,
    )


@pytest.fixture(scope="session")
def modal_edge() -> Iterator[ModalEdge]:
    """Modal's edge, uvicorn, the app's own routes, the worker engine, the dev server."""
    with DevServer() as server, ModalEdge.in_front_of(server.address, containers=4) as edge:
        yield edge


def _modal(edge: ModalEdge, **settings: Any) -> Iterator[Backend]:
    yield Backend(
        lambda **options: ModalWorkflowExecutor(
            edge.url, edge.key, edge.secret, **settings, **options
        ),
        requests=lambda: len(edge.requests),
        port=int(edge.url.split(":")[2]),
        secrets=(str(edge.key), edge.secret),
        hands_out_all=settings.get("batches_per_job", 1) is None,
    )


_CLIENT_CALLS = ("run", "status", "stream", "cancel", "health")
FACTORIES: dict[str, Callable[[], Iterator[Backend]]] = {
    "dummy": _dummy,
    "comfy_server": _comfy_server,
}
RUNPOD: dict[str, dict[str, Any]] = {
    "runpod": {"batches_per_job": None},
    "runpod_jobs_of_two": {"batches_per_job": 2},
    "runpod_official": {"batches_per_job": None, "worker": "worker-comfyui"},
}
MODAL: dict[str, dict[str, Any]] = {
    "modal": {"batches_per_job": None},
    "modal_jobs_of_two": {"batches_per_job": 2},
}
_OFFICIAL = Path(__file__).parents[1] / "functional" / "runpod_official.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the official worker out where jobs are cancelled: it runs them to their end first."""
    items[:] = [
        item
        for item in items
        if "runpod_official" not in item.name or item.path.stem == "test_images_and_seeds"
    ]


@pytest.fixture(scope="session", params=sorted({*FACTORIES, *MODAL, *RUNPOD}))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param in RUNPOD:
        settings = RUNPOD[request.param]
        stub = "official_stub" if "worker" in settings else "runpod_stub"
        yield from _runpod(request.getfixturevalue(stub), **settings)
        return
    if request.param in MODAL:
        yield from _modal(request.getfixturevalue("modal_edge"), **MODAL[request.param])
        return
    yield from FACTORIES[request.param]()


@pytest.fixture
def executor(backend: Backend) -> Iterator[BaseWorkflowExecutor]:
    executor = backend.make(batch_size=8)
    yield executor
    executor.close(cancel=True)


@pytest.fixture
def submit(executor: BaseWorkflowExecutor) -> Callable[..., Any]:
    """Submits the template with a colour; runs are typed Any, as the tests poke at them."""

    def submit(num_samples: int = 1, template: WorkflowTemplate = TEMPLATE, **options: Any) -> Any:
        if "variables" not in options:
            options.setdefault("color", 255)
        return executor.submit_workflow(template, num_samples=num_samples, **options)

    return submit


def sockets_to(port: int) -> int:
    """Count this process' own ends of connections to a port; Linux only."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd))
        except FileNotFoundError:  # closed while we look
            continue
        if match:
            inodes.add(match[1])
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and int(row[2].split(":")[1], 16) == port for row in rows)
