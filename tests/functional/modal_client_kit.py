"""What the tests of Modal share: the edge with our app behind it, job documents, short pauses.

Fixtures are imported by name, and named in `__all__`.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from server_kit import PATIENCE, bench_graph

from comfy_executors.clients import modal_http, modal_refusals
from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.clients.modal import ModalClient
from comfy_executors.clients.modal_answers import ModalJob
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge
from comfy_executors.wire import InputFile, JobDocument, JobGraph

PNG = b"\x89PNG\r\n\x1a\n"
Site = tuple[DevServer, ModalEdge]


@contextmanager
def modal_site(containers: int = 1) -> Iterator[Site]:
    """Start a dev server, and the edge with our app in front of it."""
    with DevServer() as server:  # noqa: SIM117  too long for Python 3.9
        with ModalEdge.in_front_of(server.address, containers=containers) as edge:
            yield server, edge


class Prompts:
    """What a dev server was given since a test began; it is shared, and never reset."""

    def __init__(self, server: DevServer) -> None:
        self.server = server
        # What was cancelled before may still be on its way out of the queue.
        server.wait_for(
            lambda s: not {"running", "pending"} & {p.status for p in s.prompts}, PATIENCE
        )
        self._before = len(server.prompts)

    @property
    def statuses(self) -> Counter[str]:
        return Counter(prompt.status for prompt in self.server.prompts[self._before :])

    def ended(self, **expected: int) -> None:
        """Wait until the prompts, all of them, have ended so."""
        self.wait_for(lambda: self.statuses == expected)

    def running(self) -> None:
        """Wait until one runs."""
        self.wait_for(lambda: self.statuses["running"] == 1)

    def idle(self) -> None:
        """Wait until nothing is left in ComfyUI's queue."""
        self.wait_for(lambda: not {"running", "pending"} & set(self.statuses))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        self.server.wait_for(lambda _: condition(), PATIENCE)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with modal_site() as started:
        yield started


@pytest.fixture
def edge(site: Site) -> Iterator[ModalEdge]:
    site[1].clear()
    yield site[1]
    site[1].clear()


@pytest.fixture
def prompts(site: Site) -> Iterator[Prompts]:
    since = Prompts(site[0])
    yield since
    since.idle()


def waiter(seconds: float = PATIENCE) -> DeadlineWaiter:
    return DeadlineWaiter(seconds)


def client_of(edge: ModalEdge, **options: Any) -> ModalClient:
    return ModalClient(edge.url, edge.key, edge.secret, **options)


def document(
    count: int = 1, seconds: float = 0.0, inputs: tuple[InputFile, ...] = (), **graph: Any
) -> JobDocument:
    """So many batches of one image."""
    graphs = [
        JobGraph(number, 1, number, bench_graph(seconds, **{"seed": number, **graph}))
        for number in range(count)
    ]
    return JobDocument(str(uuid.uuid4()), tuple(graphs), inputs)


def finish(client: ModalClient, job_id: str) -> tuple[ModalJob, list[dict[str, Any]]]:
    """Follow a job to its end; return it and all its events."""
    events: list[dict[str, Any]] = []
    job = client.job(job_id, waiter())
    while True:
        events += map(dict, job.events)
        if job.is_final:
            return job, events
        job = client.poll({job_id: job.cursor}, 20, waiter())[job_id]


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is tried again after a second be tried again soon."""
    monkeypatch.setattr(modal_refusals, "_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(modal_http, "_AGAIN_SECONDS", 0.02)
