"""Modal: many outputs that are known at once; how they are fetched, and what ends that."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from core_backend import helpers
from modal_client_kit import client_of, document, finish, waiter
from server_kit import PATIENCE

from comfy_executors import ModalWorkflowExecutor, ServerResponseError
from comfy_executors.devserver import DevServer
from comfy_executors.executors.side_by_side import AHEAD, AT_ONCE
from comfy_executors.testing import ModalEdge
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.modal_job import JobRunner
from comfy_executors.workers.modal_local import LocalBackend
from comfy_executors.workers.modal_web import create_web

BROKEN: dict[str, Any] = {"status": 200, "body": "broken", "headers": {"Content-Type": "image/png"}}


class HeldApp:
    """The app, whose outputs can be held back; it counts how often each is asked for."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._changed = threading.Condition()
        self._held: set[str] = set()
        self._turns: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.asked: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "/outputs/" in scope.get("path", ""):
            await self._turn(scope["path"].rpartition("/")[2])
        await self._app(scope, receive, send)

    async def _turn(self, name: str) -> None:
        turn = asyncio.Event()
        with self._changed:
            self.asked[name] += 1
            self._changed.notify_all()
            if name not in self._held:
                return
            self._turns.append((asyncio.get_running_loop(), turn))
        await turn.wait()

    def hold(self, names: Collection[str]) -> None:
        """Hold these back, and count anew."""
        with self._changed:
            self._held = {*names}
            self.asked.clear()

    def release(self) -> None:
        with self._changed:
            self._held = set()
            for loop, turn in self._turns:
                loop.call_soon_threadsafe(turn.set)
            self._turns.clear()

    def wait_for(self, count: int) -> None:
        """Wait until so many outputs have been asked for."""
        with self._changed:
            assert self._changed.wait_for(lambda: sum(self.asked.values()) >= count, PATIENCE)


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[HeldApp, ModalEdge]]:
    with DevServer() as server:
        backend = LocalBackend(JobRunner(Engine(server.address)))
        app = HeldApp(create_web(backend))
        with ModalEdge(app, backend=backend) as edge:
            yield app, edge


@pytest.fixture
def app(site: tuple[HeldApp, ModalEdge]) -> Iterator[HeldApp]:
    site[0].asked.clear()
    yield site[0]
    site[0].release()


@pytest.fixture
def edge(site: tuple[HeldApp, ModalEdge], app: HeldApp) -> Iterator[ModalEdge]:
    site[1].clear()
    yield site[1]
    site[1].clear()


@pytest.fixture
def executor(edge: ModalEdge) -> Iterator[ModalWorkflowExecutor]:
    made = ModalWorkflowExecutor(edge.url, edge.key, edge.secret)
    yield made
    made.close(cancel=True)
    assert helpers() == []


class EndedJob:
    """A job that has ended: who takes it up hears of all that it made in one piece of news.

    Attributes:
        events: What it told, without progress.
        files: Its outputs, in this order.
    """

    def __init__(self, edge: ModalEdge, count: int, **graph: Any) -> None:
        client = client_of(edge)
        self.id = client.submit(document(count, **graph), waiter()).id
        _, told = finish(client, self.id)
        client.close()
        self.events = [event for event in told if event["kind"] != "progress"]
        self.files = [_file(event) for event in self.events if event["kind"] == "output"]

    def ended_before(self, file: str) -> set[int]:
        """The batches of which all was told before this output."""
        at = next(
            n for n, e in enumerate(self.events) if e["kind"] == "output" and _file(e) == file
        )
        return {event["batch"] for event in self.events[:at] if event["kind"] == "batch"}


def _file(event: dict[str, Any]) -> str:
    return str(event["url"]).rpartition("/")[2]


@pytest.mark.parametrize(("batches", "size"), [(1, 8), (8, 1)])
def test_outputs_that_are_known_at_once_are_fetched_side_by_side(
    edge: ModalEdge, app: HeldApp, executor: ModalWorkflowExecutor, batches: int, size: int
) -> None:
    job = EndedJob(edge, batches, batch_size=size)
    expected = [image.data for image in executor.attach(job.id, ordered=True)]
    app.hold(job.files)
    run = executor.attach(job.id, ordered=True)
    assert run.futures
    app.wait_for(AT_ONCE)  # and none has been answered
    app.release()
    assert [image.data for image in run] == expected
    assert len(set(expected)) == 8
    assert sum(app.asked.values()) == len(app.asked) == 8


@pytest.mark.parametrize("saved", [False, True])
def test_an_output_that_cannot_be_had_costs_none_of_those_before_it(
    edge: ModalEdge, app: HeldApp, executor: ModalWorkflowExecutor, tmp_path: Path, saved: bool
) -> None:
    job = EndedJob(edge, 40)
    at = next(n for n, file in enumerate(job.files) if len(job.ended_before(file)) > 2)
    refused, told = job.files[at], job.ended_before(job.files[at])
    edge.faults.limit_spending("GET", f"*/{refused}")
    app.hold(job.files[at - 3 : at])
    run = executor.attach(job.id, ignore_errors=True, output_dir=tmp_path if saved else None)
    futures = run.futures
    # It is refused while those before it are on their way.
    edge.wait_for(lambda e: any(r.path.endswith(refused) for r in e.requests), PATIENCE)
    app.wait_for(at)
    app.release()
    errors = {index: future.exception(PATIENCE) for index, future in enumerate(futures)}
    assert {index for index in errors if errors[index] is None} == told
    for error in {*errors.values()} - {None}:
        assert isinstance(error, ServerResponseError)
        assert (error.job_id, "spend limit" in str(error)) == (job.id, True)
    assert {image.batch_index for image in run} == told
    assert len([*tmp_path.iterdir()]) == saved * len(told)
    assert {*job.files[:at]} <= {*app.asked} <= {*job.files[: at + AHEAD]}
    assert {*app.asked.values()} == {1}


def test_what_was_told_before_a_broken_event_counts(
    edge: ModalEdge, app: HeldApp, executor: ModalWorkflowExecutor
) -> None:
    job = EndedJob(edge, 8)
    at = [n for n, event in enumerate(job.events) if event["kind"] == "batch"][2] + 1
    events = [*job.events[:at], {"kind": "batch", "outputs": "nonsense"}, *job.events[at:]]
    body = json.dumps({"jobs": {job.id: {"state": "done", "events": events}}})
    headers = {"Content-Type": "application/json"}
    edge.faults.fail("POST", "/v1/jobs/poll", status=200, body=body, headers=headers)
    run = executor.attach(job.id, ignore_errors=True)
    told = {event["batch"] for event in events[:at] if event["kind"] == "batch"}
    assert {image.batch_index for image in run} == told
    assert set(run.errors) == {*range(8)} - told
    for error in run.errors.values():
        assert isinstance(error, ServerResponseError)
        assert (error.job_id, "no event of a job" in str(error)) == (job.id, True)
    named = [event for event in events[:at] if event["kind"] == "output"]
    assert sum(app.asked.values()) == len(named)


def test_events_of_a_newer_worker_are_passed_over(
    edge: ModalEdge, executor: ModalWorkflowExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    job = EndedJob(edge, 4)
    events = [{"kind": "forecast", "batch": 9}, *job.events[:3], {"kind": "x"}, *job.events[3:]]
    body = json.dumps({"jobs": {job.id: {"state": "done", "events": events}}})
    headers = {"Content-Type": "application/json"}
    edge.faults.fail("POST", "/v1/jobs/poll", status=200, body=body, headers=headers)
    assert len(executor.attach(job.id).result(PATIENCE)) == 4
    assert caplog.text.count("does not know") == 1
    assert f"job {job.id} told of 'forecast'" in caplog.text


def test_an_output_that_comes_broken_is_fetched_again_beside_the_others(
    edge: ModalEdge, app: HeldApp, executor: ModalWorkflowExecutor
) -> None:
    job = EndedJob(edge, 8)
    expected = [image.data for image in executor.attach(job.id, ordered=True)]
    edge.clear()
    edge.faults.fail("GET", f"*/{job.files[2]}", times=2, **BROKEN)
    assert [image.data for image in executor.attach(job.id, ordered=True)] == expected
    assert edge.calls["output"] == 10


def test_a_cancelled_run_breaks_off_all_that_are_on_their_way(
    edge: ModalEdge, app: HeldApp, executor: ModalWorkflowExecutor, tmp_path: Path
) -> None:
    job = EndedJob(edge, 8)
    app.hold(job.files)
    run = executor.attach(job.id, output_dir=tmp_path)
    futures = run.futures
    app.wait_for(AT_ONCE)
    run.cancel()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(PATIENCE)
    executor.close()
    assert helpers() == []
    assert sum(app.asked.values()) == len(app.asked) == AT_ONCE
    assert [*tmp_path.iterdir()] == []
