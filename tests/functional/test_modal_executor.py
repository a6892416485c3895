"""Modal with our app: the edge, uvicorn, the app's routes, the engine, the dev server."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from modal_client_kit import (
    PNG,
    Prompts,
    client_of,
    edge,
    modal_site,
    prompts,
    short_pauses,
    site,
    waiter,
)
from PIL import Image
from server_kit import ENDLESS, PATIENCE, bench, bench_but, bench_graph, free_port, loading

from comfy_executors import (
    AuthenticationError,
    EndpointNotFoundError,
    InputImageError,
    JobExpiredError,
    JobInterruptedError,
    JobLostError,
    JobTimeoutError,
    ModalWorkflowExecutor,
    NodeExecutionError,
    PayloadTooLargeError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    WorkerLostError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTemplate,
)
from comfy_executors.clients import modal as modal_client
from comfy_executors.clients.modal import ModalClient
from comfy_executors.executors import job_budgets, modal, modal_poller
from comfy_executors.testing import ModalEdge
from comfy_executors.workers.comfy_process import ComfyProcess
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.modal_job import JobRunner
from comfy_executors.workers.modal_local import LocalBackend
from comfy_executors.workers.modal_web import create_web

__all__ = ["edge", "prompts", "short_pauses", "site"]

GONE: dict[str, Any] = {
    "status": 404,
    "body": json.dumps({"error": {"kind": "unknown_output", "message": "no such output"}}),
    "headers": {"Content-Type": "application/json"},
}
BROKEN: dict[str, Any] = {"status": 200, "body": "broken", "headers": {"Content-Type": "image/png"}}


Make = Callable[..., ModalWorkflowExecutor]


@pytest.fixture
def make(edge: ModalEdge, prompts: Prompts) -> Iterator[Make]:
    made: list[ModalWorkflowExecutor] = []

    def make(**options: Any) -> ModalWorkflowExecutor:
        made.append(ModalWorkflowExecutor(edge.url, edge.key, edge.secret, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.close(cancel=True)


class Hearing:
    """An `on_progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, event: Any) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def of(self, kind: str) -> list[Any]:
        with self._changed:
            return [event for event in self.events if event.kind == kind]

    def until(self, holds: Callable[[Any], bool]) -> None:
        """Wait for such an event."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(holds, self.events)), PATIENCE)

    def wait(self, kind: str, count: int = 1) -> str:
        """Wait for so many events of a kind, one or more, and return the first one's job."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(event.kind == kind for event in self.events) >= count, PATIENCE
            )
        return str(self.of(kind)[0].job_id)


def delivered(run: Any, count: int) -> None:
    """Check that every batch was delivered, each once."""
    assert Counter(image.batch_index for image in run) == Counter(range(count))


def picture(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


# Jobs.


def test_a_run_is_one_job(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    delivered(make().submit_workflow(bench(), num_samples=6), 6)
    assert (edge.calls["submit"], edge.calls["output"]) == (1, 6)
    assert prompts.statuses == {"success": 6}


def test_batches_per_job_divides_a_run(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    run = make(batches_per_job=4).submit_workflow(bench(), num_samples=10)
    results = [future.result(PATIENCE) for future in run.futures]
    assert sorted(Counter(result.job_id for result in results).values()) == [2, 4, 4]
    assert edge.calls["submit"] == 3
    assert prompts.statuses == {"success": 10}


def test_a_long_run_is_divided_into_jobs_whose_news_fit_into_modals_queue(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    heard = Hearing()
    graph = bench(ENDLESS, steps=1000)
    run = make().submit_workflow(graph, num_samples=2100, on_progress=heard)
    heard.wait("queued", 2100)
    jobs = {event.job_id for event in heard.of("queued")}
    run.cancel()
    sizes = [len(client_of(edge).job(job_id, waiter()).batches) for job_id in jobs]
    assert sorted(sizes) == [100, 1000, 1000]
    prompts.idle()


def test_images_arrive_while_the_job_runs(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    run = make().submit_workflow(bench(0.3), num_samples=5)
    assert next(run).data.startswith(PNG)
    assert prompts.statuses["success"] < 5
    assert len(list(run)) == 4


def test_progress_names_the_job(make: Make) -> None:
    heard = Hearing()
    result = make().submit_workflow(bench(0.2), num_samples=2, on_progress=heard)
    (job_id,) = {future.result(PATIENCE).job_id for future in result.futures}
    kinds = Counter(event.kind for event in heard.events)
    assert (kinds["queued"], kinds["started"], kinds["done"]) == (2, 2, 2)
    named = {event.job_id for event in heard.events if event.kind != "done"}
    assert named == {job_id}


def test_one_batch_fails_and_its_error_names_the_job(make: Make) -> None:
    graph = bench_graph()
    graph["1"]["inputs"]["fail"] = "{{ '' if seed != 2 else 'boom' }}"
    heard = Hearing()
    run = make().submit_workflow(
        WorkflowTemplate(json.dumps(graph)),
        num_samples=3, seed=1, ignore_errors=True, on_progress=heard,
    )  # fmt: skip
    assert sorted(image.batch_index for image in run) == [0, 2]
    error: Any = run.errors[1]
    assert isinstance(error, NodeExecutionError)
    assert (error.exception_message, error.job_id) == ("boom", heard.wait("queued"))


def test_input_images_are_uploaded_once(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    executor = make(batches_per_job=2)
    images = [picture("green"), picture("blue")]
    for _ in range(2):
        delivered(executor.submit_workflow(loading(), images, num_samples=4), 4)
    assert edge.calls["input"] == 2
    assert prompts.statuses == {"success": 8}


def test_an_executor_puts_its_old_input_images_again(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    executor = make()
    data = picture("yellow")
    kept = edge.backend.directory / "inputs" / hashlib.sha256(data).hexdigest()
    for puts in (1, 2):
        executor.submit_workflow(loading(), [data]).result(PATIENCE)
        assert edge.calls["input"] == puts
        os.utime(kept, times=(0.0, 0.0))


def test_input_images_may_be_urls(make: Make, edge: ModalEdge) -> None:
    run = make().submit_workflow(loading(), ["https://127.0.0.1:1/fox.webp?key=hush"])
    with pytest.raises(InputImageError, match="no public address") as caught:
        run.result(PATIENCE)
    assert "hush" not in str(caught.value)
    assert edge.calls["input"] == 0


def test_an_input_image_that_is_too_large_is_refused_unsent(
    make: Make, edge: ModalEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal, "MAX_INPUT_BYTES", 100)
    with pytest.raises(PayloadTooLargeError, match="https URL"):
        make().submit_workflow(loading(), [PNG + bytes(100)])
    assert edge.requests == []


# What gets lost.


def test_an_output_that_comes_broken_is_fetched_again(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    edge.faults.fail("GET", "*/outputs/1_00001_*", times=2, **BROKEN)
    edge.faults.truncate("GET", "*/outputs/1_00002_*")
    delivered(make().submit_workflow(bench(), num_samples=4), 4)
    assert (edge.calls["submit"], edge.calls["output"]) == (1, 7)
    assert prompts.statuses == {"success": 4}


@pytest.mark.parametrize(("fault", "times"), [(GONE, 1), (BROKEN, 3)])
def test_an_output_that_is_gone_costs_only_its_batch(
    make: Make, edge: ModalEdge, prompts: Prompts, fault: dict[str, Any], times: int
) -> None:
    edge.faults.fail("GET", "*/outputs/1_00001_*", times=times, **fault)
    run = make().submit_workflow(bench(), num_samples=4)
    results = [future.result(PATIENCE) for future in run.futures]
    assert [result.attempts for result in results] == [1, 2, 1, 1]
    assert len({result.job_id for result in results}) == 2
    assert edge.calls["submit"] == 2
    assert prompts.statuses == {"success": 5}


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_output_that_the_app_cannot_serve_costs_only_its_batch(
    make: Make,
    edge: ModalEdge,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr(modal_client, "_OUTPUT_SECONDS", 0.3)
    edge.faults.fail("GET", "*/outputs/1_00001_*", status=status, times=None)

    def hear(event: Any) -> None:
        if event.kind == "retry":
            edge.faults.clear()

    run = make().submit_workflow(bench(), num_samples=4, on_progress=hear)
    results = [future.result(PATIENCE) for future in run.futures]
    assert [result.attempts for result in results] == [1, 2, 1, 1]
    assert edge.calls["submit"] == 2
    assert prompts.statuses == {"success": 5}


def test_an_output_is_waited_for_while_nobody_is_there(
    make: Make, edge: ModalEdge, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_client, "_OUTPUT_SECONDS", 0.1)
    given_up = threading.Event()
    fetch = ModalClient.output

    def fetched(*args: Any) -> bytes:
        try:
            return fetch(*args)
        except ServerUnreachableError:
            given_up.set()
            raise

    monkeypatch.setattr(ModalClient, "output", fetched)
    edge.faults.reset_before("GET", "*/outputs/*", times=None)
    run = make().submit_workflow(bench(), num_samples=2)
    run.futures[0].add_done_callback(lambda _: None)
    assert given_up.wait(PATIENCE)
    edge.faults.clear()
    delivered(run, 2)
    assert edge.calls["submit"] == 1
    assert prompts.statuses == {"success": 2}


def test_a_job_that_is_restarted_delivers_nothing_twice(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(0.2), num_samples=5, on_progress=heard)
    images = [next(run)]
    edge.backend.restart(heard.wait("queued"))
    images += run
    assert Counter(image.batch_index for image in images) == Counter(range(5))
    assert edge.calls["submit"] == 1
    # One may have ended in the very moment, before the worker took note of it.
    assert prompts.statuses["success"] in (5, 6)


def test_a_job_that_is_restarted_has_its_time_anew(
    make: Make, edge: ModalEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(job_budgets, "time", clock)
    heard = Hearing()
    run = make(execution_timeout=60).submit_workflow(bench(100.0, steps=1000), on_progress=heard)
    heard.wait("step")
    clock.now = 50.0
    edge.backend.restart(heard.wait("queued"))
    heard.wait("started", 2)
    clock.now = 100.0
    heard.wait("step", len(heard.of("step")) + 2)
    run.cancel()
    with pytest.raises(WorkflowCancelledError):
        run.futures[0].result(PATIENCE)


def test_a_job_whose_container_dies_for_good(make: Make, edge: ModalEdge) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(0.2), num_samples=5, ignore_errors=True, on_progress=heard)
    images = [next(run)]
    edge.backend.kill(heard.wait("queued"))
    images += run
    assert len(images) + len(run.errors) == 5
    assert all(isinstance(error, WorkerLostError) for error in run.errors.values())
    assert edge.calls["submit"] == 1


def test_a_job_that_modal_forgets_is_run_again(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(0.3), num_samples=4, on_progress=heard)
    images = [next(run)]
    edge.backend.expire(heard.wait("queued"))
    images += run
    assert Counter(image.batch_index for image in images) == Counter(range(4))
    assert edge.calls["submit"] == 2


def test_the_death_of_comfyui_costs_the_batch_that_it_ran() -> None:
    address = f"127.0.0.1:{free_port()}"
    port = address.partition(":")[2]
    comfyui = ComfyProcess([sys.executable, "-m", "comfy_executors", "devserver", "--port", port])
    engine = Engine(address, outage_timeout=1.0, process=comfyui)
    backend = LocalBackend(JobRunner(engine, prepare=comfyui.ensure_running))
    heard = Hearing()
    edge = ModalEdge(create_web(backend), backend=backend)
    with contextlib.closing(comfyui), edge:
        executor = ModalWorkflowExecutor(edge.url, edge.key, edge.secret)
        run = executor.submit_workflow(
            bench_but(3, seconds=ENDLESS),
            num_samples=10,
            seed=0,
            ignore_errors=True,
            on_progress=heard,
        )
        heard.until(lambda event: (event.kind, event.batch) == ("started", 3))
        # What was made before it is fetched first: it would be lost with that ComfyUI.
        history = requests.get(f"http://{address}/history", timeout=PATIENCE).json()
        heard.wait("done", len(history))
        assert comfyui._process is not None
        comfyui._process.kill()
        images = list(run)
        executor.close()
        assert (edge.calls["submit"], comfyui.starts) == (2, 2)
        # Of the second ComfyUI.
        history = requests.get(f"http://{address}/history", timeout=PATIENCE).json()
    assert Counter(image.batch_index for image in images) == Counter({*range(10)} - {3})
    assert {index: type(error) for index, error in run.errors.items()} == {
        3: ServerUnreachableError
    }
    again = [event.batch for event in heard.of("retry")]
    assert len({*again} - {3}) == len(again) == len(history)


# Trouble on the way; each row of the retry table is in test_modal_calls.py.


@pytest.mark.usefixtures("short_pauses")
def test_a_run_through_all_kinds_of_trouble(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    for method, path in [("POST", "/v1/jobs"), ("POST", "/v1/jobs/poll"), ("GET", "*/outputs/*")]:
        edge.faults.reset_after(method, path)
        edge.faults.lose_body(method, path)
        edge.faults.limit_rate(method, path)
        edge.faults.crash(method, path)
        edge.faults.redirect(method, path)
        edge.faults.run_twice(method, path)
    delivered(make().submit_workflow(bench(0.05), num_samples=8), 8)
    assert edge.calls["submit"] == 5
    assert prompts.statuses == {"success": 8}


def test_an_app_that_goes_away_fails_the_run(make: Make, edge: ModalEdge) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(ENDLESS, steps=1000), num_samples=2, on_progress=heard)
    heard.wait("started")
    edge.faults.stop_app("POST", "/v1/jobs/poll", 1)
    with pytest.raises(EndpointNotFoundError, match="the app is stopped"):
        run.result(PATIENCE)


class Outage(logging.Handler):
    """Knows when the poller has borne an outage for longer than a call may take."""

    def __init__(self, edge: ModalEdge) -> None:
        super().__init__(logging.WARNING)
        self._edge = edge
        self._told = threading.Event()
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())
        self._told.set()

    def wait(self) -> None:
        assert self._told.wait(PATIENCE)

    @contextmanager
    def begin(self, how: str = "answers 503") -> Iterator[None]:
        if how == "resets":
            for method in ("GET", "POST"):
                self._edge.faults.reset_before(method, "*", times=None)
        else:
            self._edge.faults.fail("POST", "/v1/jobs/poll", status=503, times=None)
        yield
        self._edge.faults.clear()


@pytest.fixture
def outage(edge: ModalEdge) -> Iterator[Outage]:
    made = Outage(edge)
    modal_poller.logger.addHandler(made)
    yield made
    modal_poller.logger.removeHandler(made)


@pytest.mark.parametrize("how", ["resets", "answers 503"])
def test_an_outage_of_the_app_ends_no_job_that_it_has(
    make: Make, edge: ModalEdge, prompts: Prompts, outage: Outage, how: str
) -> None:
    heard = Hearing()
    executor = make(cold_start_timeout=1.5)
    run = executor.submit_workflow(bench(0.8), num_samples=6, on_progress=heard)
    heard.wait("started")
    with outage.begin(how):
        outage.wait()
        prompts.ended(success=6)
    delivered(run, 6)
    assert (edge.calls["submit"], edge.calls["cancel"]) == (1, 0)
    assert len(outage.warnings) == 1


def test_an_outage_without_an_end_is_borne_for_the_jobs_own_time(
    make: Make, edge: ModalEdge, prompts: Prompts, outage: Outage
) -> None:
    heard = Hearing()
    executor = make(cold_start_timeout=1.0, execution_timeout=8.0)
    run = executor.submit_workflow(bench(ENDLESS, steps=1000), on_progress=heard)
    heard.wait("started")
    with outage.begin(), pytest.raises(JobTimeoutError, match="execution timeout of 8 s"):
        run.result(PATIENCE)
    assert len(outage.warnings) == 1
    prompts.ended(interrupted=1)


def test_a_job_is_cancelled_in_an_outage_of_its_news(
    make: Make, edge: ModalEdge, prompts: Prompts, outage: Outage
) -> None:
    heard = Hearing()
    executor = make(cold_start_timeout=1.0)
    run = executor.submit_workflow(bench(ENDLESS, steps=1000), on_progress=heard)
    heard.wait("started")
    with outage.begin():
        outage.wait()
        run.cancel()
        with pytest.raises((WorkflowCancelledError, CancelledError)):
            run.futures[0].result(PATIENCE)
        prompts.ended(interrupted=1)
        executor.close()
        assert "JobPoller" not in [thread.name for thread in threading.enumerate()]


def test_a_job_that_was_never_told_of_is_not_waited_for(
    make: Make, edge: ModalEdge, outage: Outage
) -> None:
    with outage.begin(), pytest.raises(ServerError, match=r"503|did not answer within 1 s"):
        make(cold_start_timeout=1.0).submit_workflow(bench()).result(PATIENCE)
    assert outage.warnings == []


def test_a_wrong_token(edge: ModalEdge, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with ModalWorkflowExecutor(edge.url, "wk-hush", "ws-hush") as executor:
        run = executor.submit_workflow(bench())
        with pytest.raises(AuthenticationError) as caught:
            run.result(PATIENCE)
    assert edge.calls == {"submit": 1}  # nothing that would have to be cancelled
    assert "hush" not in f"{caught.value!r}{caplog.text}"


# Budgets.


def test_a_queue_that_does_not_move_is_explained(
    make: Make, edge: ModalEdge, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Hearing()
    busy = make().submit_workflow(bench(ENDLESS, steps=1000), on_progress=first)
    first.wait("started")
    monkeypatch.setattr(job_budgets, "_STUCK_SECONDS", 0.2)
    heard = Hearing()
    run = make(queue_timeout=0.6).submit_workflow(bench(), on_progress=heard)
    words = r"waited 0\.6 s for a worker: 1 jobs wait, and 1 GPU containers are busy"
    with pytest.raises(JobTimeoutError, match=words) as caught:
        run.result(PATIENCE)
    assert (caught.value.started, caught.value.job_id) == (False, heard.wait("queued"))
    (waiting,) = heard.of("waiting")
    assert "containers are busy" in waiting.message
    busy.cancel()
    prompts.idle()
    assert edge.calls["health"] == 1
    assert prompts.statuses["success"] == 0  # the one that waited never ran


def test_what_comes_before_the_queue_is_not_counted_as_waiting(make: Make, edge: ModalEdge) -> None:
    """Such as the start of the app's web container, and the upload of input images."""
    edge.faults.delay("POST", "/v1/jobs", 2.0)
    delivered(make(queue_timeout=1.5).submit_workflow(bench(), num_samples=2), 2)
    assert edge.calls["submit"] == 1


def test_jobs_that_wait_for_our_own_are_not_given_up(make: Make, prompts: Prompts) -> None:
    executor = make(batches_per_job=1, queue_timeout=3.0)  # four jobs, and one container
    delivered(executor.submit_workflow(bench(1.5), num_samples=4), 4)
    assert prompts.statuses == {"success": 4}


def test_a_job_that_runs_too_long(make: Make, prompts: Prompts) -> None:
    run = make(execution_timeout=0.5).submit_workflow(bench(ENDLESS, steps=1000), num_samples=2)
    with pytest.raises(JobTimeoutError, match=r"execution timeout of 0\.5 s") as caught:
        run.result(PATIENCE)
    assert caught.value.started
    prompts.idle()


def test_a_cold_start_that_takes_too_long() -> None:
    # A site of its own, which ends with what it was sent and has not answered.
    with modal_site() as (_, edge):
        edge.limits.cold_start = 2.0
        edge.limits.redirect_after = 0.1
        edge.scale_to_zero()
        executor = ModalWorkflowExecutor(edge.url, edge.key, edge.secret, cold_start_timeout=0.5)
        run = executor.submit_workflow(bench())
        with pytest.raises(ServerNotReadyError, match=r"did not answer within"):
            run.result(PATIENCE)
        executor.close()


# Stopping.


@pytest.mark.parametrize("how", ["cancel", "with", "timeout", "batch_timeout"])
def test_stopping_leaves_nothing_running(
    make: Make, edge: ModalEdge, prompts: Prompts, how: str
) -> None:
    executor = make()
    heard = Hearing()
    limits: dict[str, Any] = {how: 1.0} if "timeout" in how else {}
    run = executor.submit_workflow(
        bench(ENDLESS, steps=1000), num_samples=3, on_progress=heard, **limits
    )
    job_id = heard.wait("queued")
    if how == "cancel":
        heard.wait("started")
        run.cancel()
    elif how == "with":
        heard.wait("started")
        with pytest.raises(ZeroDivisionError), executor:
            raise ZeroDivisionError
    with pytest.raises(WorkflowError):
        run.result(PATIENCE)
    executor.close()
    # It is not only asked for: the app was asked until it had ended.
    names = [request.path for request in edge.requests]
    assert "/v1/jobs/poll" in names[names.index("/v1/jobs/cancel") :]
    assert client_of(edge).job(job_id, waiter()).is_final
    prompts.idle()
    assert prompts.statuses["success"] == 0


def test_cancelling_while_the_submit_is_on_its_way(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    edge.faults.delay("POST", "/v1/jobs", 0.5)
    executor = make()
    run = executor.submit_workflow(bench(ENDLESS, steps=1000), num_samples=2)
    threading.Timer(0.2, run.cancel).start()
    with pytest.raises(CancelledError):
        run.result(PATIENCE)
    executor.close()
    edge.wait_for(lambda e: e.calls["submit"] == 1, PATIENCE)
    assert edge.calls["cancel"] == 1
    prompts.idle()
    assert prompts.statuses["success"] == 0


def test_a_cancellation_that_is_not_confirmed_is_told(
    make: Make, edge: ModalEdge, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(ENDLESS, steps=1000), on_progress=heard)
    heard.wait("started")
    edge.faults.stop_app("POST", "/v1/jobs/cancel", 1)
    run.cancel()
    with pytest.raises(WorkflowCancelledError):
        run.futures[0].result(PATIENCE)
    make().attach(heard.wait("queued")).cancel()
    assert f"job {heard.wait('queued')} on {edge.url} may run on" in caplog.text


def test_a_job_that_somebody_cancels(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    heard = Hearing()
    run = make().submit_workflow(bench(ENDLESS, steps=1000), on_progress=heard)
    job_id = heard.wait("started")
    client_of(edge).cancel(waiter(), job_id=job_id)
    with pytest.raises(JobInterruptedError) as caught:
        run.result(PATIENCE)
    assert caught.value.job_id == job_id
    prompts.ended(interrupted=1)


# Taking up a job of another process.


def test_a_job_can_be_taken_up_again(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    heard = Hearing()
    first = make().submit_workflow(bench(), num_samples=3, seed=7, on_progress=heard)
    expected = [image.data for image in first.result(PATIENCE)]
    run = make().attach(heard.wait("queued"), ordered=True)
    assert [image.data for image in run] == expected
    assert [(batch.size, batch.seed) for batch in run.batches] == [(1, 7), (1, 8), (1, 9)]
    assert edge.calls["submit"] == 1
    assert prompts.statuses == {"success": 3}


def test_a_job_that_runs_is_taken_up_twice_at_once(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    heard = Hearing()
    first = make().submit_workflow(bench(0.3), num_samples=4, on_progress=heard)
    executor = make()
    runs = [executor.attach(heard.wait("started")) for _ in range(2)]
    for run in (first, *runs):
        delivered(run, 4)
    assert edge.calls["submit"] == 1
    assert prompts.statuses == {"success": 4}


def test_a_later_job_of_a_run_can_be_taken_up(make: Make, edge: ModalEdge) -> None:
    run = make(batches_per_job=2, max_workers=1).submit_workflow(bench(), num_samples=4, seed=3)
    last = run.futures[3].result(PATIENCE)
    taken_up = make().attach(str(last.job_id))
    assert [image.seed for image in taken_up.result(PATIENCE)] == [5, 6]
    assert [image.batch_index for image in taken_up.result()] == [0, 1]


def test_a_job_that_is_gone_cannot_be_taken_up(make: Make, edge: ModalEdge) -> None:
    with pytest.raises(JobLostError):
        make().attach("fc-none")
    heard = Hearing()
    make().submit_workflow(bench(), on_progress=heard).result(PATIENCE)
    edge.backend.expire(heard.wait("queued"))
    with pytest.raises(JobExpiredError):
        make().attach(heard.wait("queued"))


def test_a_running_job_can_be_taken_up_and_cancelled(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    heard = Hearing()
    first = make().submit_workflow(bench(ENDLESS, steps=1000), on_progress=heard)
    run = make().attach(heard.wait("started"))
    run.cancel()
    with pytest.raises((WorkflowCancelledError, CancelledError)):
        run.futures[0].result(PATIENCE)
    with pytest.raises(JobInterruptedError):
        first.result(PATIENCE)
    prompts.ended(interrupted=1)


# Few calls, soon.


def test_many_jobs_wait_on_one_call(make: Make, edge: ModalEdge, prompts: Prompts) -> None:
    executor = make(batches_per_job=1, max_workers=20)
    heard = Hearing()
    run = executor.submit_workflow(
        bench(ENDLESS, steps=1000), num_samples=20, on_progress=heard, ignore_errors=True
    )
    run.futures[0].add_done_callback(lambda _: None)
    heard.wait("queued", 20)
    heard.wait("started")
    before, began = edge.calls["poll"], time.monotonic()
    threads = [thread.name for thread in threading.enumerate()]
    threading.Event().wait(4.0)
    seconds = time.monotonic() - began
    assert edge.calls["poll"] - before <= seconds / 2 + 1  # of twenty jobs together
    assert threads.count("JobPoller") == 1
    assert edge.calls["job"] == 0
    run.cancel()
    executor.close()
    assert "JobPoller" not in [thread.name for thread in threading.enumerate()]
    assert edge.calls["submit"] == 20
    prompts.idle()


def test_a_job_that_is_added_is_heard_of_at_once(make: Make, edge: ModalEdge) -> None:
    executor = make(batches_per_job=1)
    heard = Hearing()
    slow = executor.submit_workflow(bench(1.0), on_progress=heard)
    heard.wait("started")
    # The call for the first job is held by now, for seconds.
    quick = executor.submit_workflow(bench(0.0))
    began = time.monotonic()
    slow.result(PATIENCE)
    quick.result(PATIENCE)
    assert time.monotonic() - began < 10.0


def test_answers_that_say_nothing_are_not_asked_for_in_a_hurry(
    make: Make, edge: ModalEdge, prompts: Prompts
) -> None:
    body, headers = json.dumps({"jobs": {}}), {"Content-Type": "application/json"}
    edge.faults.fail("POST", "/v1/jobs/poll", status=200, body=body, headers=headers, times=None)
    run = make().submit_workflow(bench())
    run.futures[0].add_done_callback(lambda _: None)
    edge.wait_for(lambda e: e.calls["poll"] == 1, PATIENCE)
    threading.Event().wait(1.0)
    assert edge.calls["poll"] == 1
    edge.faults.clear()
    delivered(run, 1)


def test_news_that_are_broken_are_an_error(make: Make, edge: ModalEdge) -> None:
    body = json.dumps({"jobs": []})
    headers = {"Content-Type": "application/json"}
    edge.faults.fail("POST", "/v1/jobs/poll", status=200, body=body, headers=headers)
    with pytest.raises(ServerResponseError, match="not as an app of ours"):
        make().submit_workflow(bench()).result(PATIENCE)


FORK = """
import os, sys
sys.path.insert(0, os.getcwd())
from server_kit import bench
from comfy_executors import ModalWorkflowExecutor
executor = ModalWorkflowExecutor(*sys.argv[1:])
print(len(executor.submit_workflow(bench(0.1), num_samples=2).result(60)), flush=True)
running = executor.submit_workflow(bench(0.5), num_samples=2)
next(running)  # a call is held while the fork is made
if os.fork() == 0:
    print(len(executor.submit_workflow(bench(0.1), num_samples=3).result(60)), flush=True)
    executor.close()
    os._exit(0)
os.wait()
print(len(list(running)), flush=True)
executor.close()
"""


@pytest.mark.skipif(not hasattr(sys, "getsitepackages") and sys.platform == "win32", reason="fork")
def test_an_executor_works_in_the_child_of_a_fork(edge: ModalEdge, prompts: Prompts) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, edge.url, str(edge.key), edge.secret],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert done.stdout.split() == ["2", "3", "1"], done.stderr
    assert prompts.statuses == {"success": 7}


def test_more_jobs_than_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_poller, "MAX_JOBS", 3)
    with (
        modal_site(containers=4) as (_, edge),
        ModalWorkflowExecutor(
            edge.url, edge.key, edge.secret, batches_per_job=1, max_workers=4
        ) as executor,
    ):
        heard = Hearing()
        run = executor.submit_workflow(
            bench(ENDLESS, steps=1000), num_samples=3, on_progress=heard, ignore_errors=True
        )
        heard.wait("queued", 3)
        # The fourth has its turn while the first three are still asked for.
        fourth = Hearing()
        last = executor.submit_workflow(bench(), on_progress=fourth)
        client_of(edge).cancel(waiter(), job_id=fourth.wait("queued"))
        with pytest.raises(JobInterruptedError):
            last.result(PATIENCE)
        run.cancel()
