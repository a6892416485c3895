"""The backend on Modal with the genuine SDK, against a control plane on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from modal_kit import Caller, assemble, emptied, failure_of
from server_kit import ENDLESS, PATIENCE, statuses
from worker_kit import bench_document, document, load_graph

if TYPE_CHECKING:
    from modal_control_plane import ControlPlane

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    JobError,
    JobInterruptedError,
    JobTimeoutError,
    WorkerLostError,
)
from comfy_executors.testing import ModalEdge
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.job_backend import RefusalError
from comfy_executors.workers.job_records import (
    Envelope,
    Outcome,
    cancel_key,
    job_key,
    submit_key,
)
from comfy_executors.workers.modal_backend import ModalBackend, ModalChannel, ModalPlaces
from comfy_executors.workers.modal_job import JobRunner
from comfy_executors.workers.modal_web import create_web

modal: Any = pytest.importorskip("modal", reason="Modal's SDK needs Python 3.10")
pytest_plugins = ["modal_plane"]


@pytest.fixture
def backend(places: ModalPlaces) -> ModalBackend:
    return ModalBackend(places, modal.Function.from_name("test-app", "job"))


def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


# What Modal says of a call.


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (
            "TIMEOUT",
            JobTimeoutError,
            "ran longer than the time limit of the app: deploy it with a larger",
        ),
        ("TERMINATED", WorkerLostError, "its container was lost: out of memory"),
        ("INIT_FAILURE", WorkerLostError, "its container was lost"),
        ("INTERNAL_FAILURE", WorkerLostError, "its container was lost"),
        ("FAILURE", WorkerLostError, "its container was lost"),
    ],
)
def test_how_a_call_ended_becomes_one_of_our_errors(
    plane: ControlPlane, backend: ModalBackend, status: str, kind: type[JobError], words: str
) -> None:
    call_id = wait(backend.spawn({"a": 1}))
    plane.end_without_result(call_id, status, "out of memory")
    outcome = wait(backend.outcome(call_id, 5.0))
    assert type(outcome.failure) is kind
    assert f"{call_id}: {words}" in str(outcome.failure)


@pytest.mark.parametrize("error", [TimeoutError("a socket"), ValueError("x"), KeyError("y")])
def test_an_exception_of_a_job_is_its_failure_and_no_call_that_goes_on(
    plane: ControlPlane, backend: ModalBackend, error: Exception
) -> None:
    """The trap of the SDK: `get` tells a call that goes on by a TimeoutError, too."""
    call_id = wait(backend.spawn({"a": 1}))
    plane.fail(call_id, error)
    outcome = wait(backend.outcome(call_id, 5.0))
    assert type(outcome.failure) is JobError
    assert type(error).__name__ in str(outcome.failure)


def test_a_call_that_goes_on_has_no_outcome(plane: ControlPlane, backend: ModalBackend) -> None:
    call_id = wait(backend.spawn({"a": 1}))
    assert wait(backend.outcome(call_id, 0.0)) is None
    assert wait(backend.outcome(call_id, 0.2)) is None
    plane.finish(call_id, {"b": 2})
    assert wait(backend.outcome(call_id, 5.0)) == Outcome({"b": 2})
    assert wait(backend.outcome(call_id, 5.0)) == Outcome({"b": 2})  # it can be read again


def test_what_is_not_kept_or_not_known_is_expired(
    plane: ControlPlane, backend: ModalBackend
) -> None:
    plane.expired.add("fc-old")
    for call_id in ("fc-old", "fc-never"):
        assert wait(backend.outcome(call_id, 0.1)) == Outcome(is_expired=True)


def test_a_full_app_refuses_for_a_while(plane: ControlPlane, backend: ModalBackend) -> None:
    job = bench_document(1)
    raw = wire.encode_document(job)
    plane.refuse_spawns = True
    with pytest.raises(RefusalError) as refused:
        wait(backend.submit(raw))
    assert (refused.value.status, refused.value.body["kind"]) == (503, "overloaded")
    plane.refuse_spawns = False
    answer = wait(backend.submit(raw))  # at once: the first one has left nothing behind
    assert list(plane.spawned) == [answer["id"]]


# Submitted once.


def test_web_containers_that_submit_at_once_start_one_call(
    plane: ControlPlane, places: ModalPlaces
) -> None:
    function = modal.Function.from_name("test-app", "job")
    containers = [ModalBackend(places, function) for _ in range(4)]
    raw = wire.encode_document(bench_document(1))

    async def submit() -> list[dict[str, Any]]:
        return await asyncio.gather(*(container.submit(raw) for container in containers))

    answers = wait(submit())
    assert len(plane.spawned) == 1
    assert {answer["id"] for answer in answers} == set(plane.spawned)
    assert [answer["repeated"] for answer in answers].count(False) == 1


def test_a_claim_that_a_crash_left_behind_is_taken_over_after_a_minute(
    plane: ControlPlane, backend: ModalBackend, places: ModalPlaces, monkeypatch: Any
) -> None:
    job = bench_document(1)
    raw = wire.encode_document(job)
    places.records.put(submit_key(job.request_id, 0), time.time() - 30)
    monkeypatch.setattr("comfy_executors.workers.job_backend._SUBMIT_SECONDS", 0.1)
    with pytest.raises(RefusalError) as refused:
        wait(backend.submit(raw))
    assert (refused.value.status, refused.value.body["kind"]) == (503, "submitting")
    assert refused.value.retry_after
    assert not plane.spawned
    places.records.put(submit_key(job.request_id, 0), time.time() - 61)
    answer = wait(backend.submit(raw))
    assert list(plane.spawned) == [answer["id"]]
    assert plane.spawned[answer["id"]] == raw


def test_a_job_that_began_though_its_submit_was_lost_is_the_one(
    plane: ControlPlane, backend: ModalBackend, places: ModalPlaces
) -> None:
    """The web container died between the start of the job and its record: no second one runs."""
    job = bench_document(1)
    raw = wire.encode_document(job)
    places.records.put(submit_key(job.request_id, 0), time.time() - 61)
    lost = ModalChannel(places, "fc-lost")
    runner = JobRunner(Engine("127.0.0.1:1", ready_timeout=0.1))
    runner.run(raw, lost)
    assert wait(backend.submit(raw))["id"] == "fc-lost"
    assert not plane.spawned
    second = Envelope.decode(runner.run(raw, ModalChannel(places, "fc-second")))
    runner.close()
    assert second is not None
    assert second.state == "duplicate"


def test_a_document_of_any_size_arrives(plane: ControlPlane, backend: ModalBackend) -> None:
    """What is larger than 8 KiB goes by way of Modal's blobs."""
    data = bytes(range(256)) * 1000
    job = document(load_graph("a.png"), input_images=(wire.InputFile("a.png", data),))
    raw = wire.encode_document(job)
    answer = wait(backend.submit(raw))
    assert plane.rpcs["BlobCreate"] == 1
    assert plane.spawned[answer["id"]] == raw


# Files.


def test_files_are_kept_on_the_volume_and_cleaned_away(
    plane: ControlPlane, backend: ModalBackend, places: ModalPlaces
) -> None:
    large = b"\1" * 3_000_000

    async def use() -> None:
        await backend.write_file("inputs/ab", large)
        await backend.write_file("inputs/cd", b"new")
        assert time.time() - (await backend.written_at("inputs/ab") or 0.0) < PATIENCE
        assert await backend.written_at("inputs/a") is None
        assert await backend.written_at("inputs/nothing") is None
        assert await backend.read_file("outputs/nothing") is None
        pieces = await backend.read_file("inputs/ab")
        assert pieces is not None
        assert b"".join([piece async for piece in pieces]) == large

    assert places.clean() == 0
    wait(use())
    channel = ModalChannel(places, "fc-1")
    channel.write_output("1_00000_00000.png", b"image")
    assert channel.read_input("ab") == large
    assert channel.read_input("nothing") is None
    week = 9 * 24 * 3600
    for name in ("inputs/ab", "outputs/fc-1/1_00000_00000.png"):
        plane.files[name] = plane.files[name][0], time.time() - week
    assert places.clean() == 2
    assert sorted(plane.files) == ["inputs/cd"]


def test_an_input_that_is_put_again_when_it_is_old_stays(
    plane: ControlPlane, backend: ModalBackend, places: ModalPlaces
) -> None:
    data = b"picture"
    digest = hashlib.sha256(data).hexdigest()
    plane.files[f"inputs/{digest}"] = data, time.time() - 9 * 24 * 3600
    assert not wait(backend.has_input(digest))
    assert wait(backend.put_input(digest, data))
    assert wait(backend.has_input(digest))
    assert not wait(backend.put_input(digest, data))
    assert places.clean() == 0


# The whole way: routes, SDK, job, engine, dev server.


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def runner(server: DevServer, plane: ControlPlane, places: ModalPlaces) -> Iterator[JobRunner]:
    """A container: each call that is spawned runs as the GPU class would run it."""
    made = JobRunner(Engine(server.address))

    def work(call_id: str, raw: Any) -> None:
        plane.finish(call_id, made.run(raw, ModalChannel(places, call_id)))

    plane.on_spawn = work
    yield made
    plane.join()
    made.close()


@pytest.fixture
def app(backend: ModalBackend) -> Iterator[Caller]:
    with ModalEdge(create_web(backend)) as edge:
        yield Caller(edge.url, edge.key, edge.secret)


def test_a_job_runs_from_its_submit_to_its_files(
    app: Caller, runner: JobRunner, server: DevServer, plane: ControlPlane
) -> None:
    job = bench_document(3, 0.3, batch_size=2)
    job_id = app.submit(job)
    last, events = app.finish(job_id)
    answer = assemble(events, job)
    assert (last["state"], sorted(answer.batches)) == ("done", [0, 1, 2])
    outputs = [event for event in events if event["kind"] == "output"]
    assert len(outputs) == 6
    assert all(app.output(event) for event in outputs)
    assert len(server.prompts) == 3
    health = app.call("GET", "/v1/health").json()
    assert (health["backend"], health["queued"], health["running"]) == ("modal", 2, 1)


def test_a_container_that_takes_over_finds_what_was_made(
    app: Caller, runner: JobRunner, server: DevServer, plane: ControlPlane, places: ModalPlaces
) -> None:
    job = bench_document(3)
    job_id = app.submit(job)
    app.finish(job_id)
    del plane.files[next(name for name in plane.files if "/1_00001_" in name)]
    other = JobRunner(Engine(server.address))
    again = other.run(wire.encode_document(job), ModalChannel(places, job_id))
    other.close()
    assert again["attempt"] == 2
    assert sorted(assemble(again["events"], job).batches) == [0, 1, 2]
    assert statuses(server) == {"success": 4}


def test_what_a_full_queue_lost_comes_with_the_end(
    app: Caller, runner: JobRunner, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.queue_items = 3
    job = bench_document(4)
    with caplog.at_level(logging.WARNING):
        last, events = app.finish(app.submit(job))
    answer = assemble(events, job)
    assert (last["state"], sorted(answer.batches)) == ("done", [0, 1, 2, 3])
    assert all(app.output(event) for event in events if event["kind"] == "output")
    assert caplog.text.count("has more events than a queue takes") == 1


def test_what_was_lost_in_between_comes_with_the_end(
    app: Caller, runner: JobRunner, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.lost_put = 2
    job = bench_document(4, 0.2)
    with caplog.at_level(logging.WARNING):
        last, events = app.finish(app.submit(job))
    assert (last["state"], caplog.text.count("not told yet")) == ("done", 1)
    answer = assemble(sorted(events, key=lambda event: event["seq"]), job)
    assert sorted(answer.batches) == [0, 1, 2, 3]


def test_another_web_container_goes_on_where_one_left_off(
    app: Caller, runner: JobRunner, places: ModalPlaces
) -> None:
    job_id = app.submit(bench_document(3))
    first = app.until(job_id, "batch")
    cursor = "1.1/0.-1"
    backend = ModalBackend(places, modal.Function.from_name("test-app", "job"))
    with ModalEdge(create_web(backend)) as edge:
        other = Caller(edge.url, edge.key, edge.secret)
        _, rest = other.finish(job_id, cursor)
        assert all(other.output(event) for event in rest if event["kind"] == "output")
    places_told = [(event["attempt"], event["seq"]) for event in rest]
    assert min(places_told) > (1, 1)
    assert rest[-1]["kind"] == "end"
    assert {(e["attempt"], e["seq"]) for e in first if e["kind"] == "batch"} <= set(places_told)


def test_cancelling_asks_modal_and_names_what_ends_without_a_word(
    app: Caller, plane: ControlPlane
) -> None:
    job_id = app.submit(bench_document(1))  # no container: it waits
    answer = app.post("/v1/jobs/cancel", {"id": job_id})
    assert answer.status_code == 202
    last, _ = app.finish(job_id)
    assert plane.cancelled == [job_id]
    assert last["state"] == "cancelled"
    assert isinstance(failure_of(last), JobInterruptedError)


def test_a_job_that_reads_of_its_cancellation_does_not_begin(
    app: Caller, places: ModalPlaces, runner: JobRunner, server: DevServer
) -> None:
    job = bench_document(1)
    places.records.put(cancel_key(job.request_id), time.time())
    envelope = runner.run(wire.encode_document(job), ModalChannel(places, "fc-9"))
    assert envelope["state"] == "cancelled"
    assert not server.prompts


def test_a_running_job_that_is_cancelled_leaves_comfyui_empty(
    app: Caller, runner: JobRunner, server: DevServer, plane: ControlPlane
) -> None:
    job_id = app.submit(bench_document(2, ENDLESS, steps=1000))
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
    app.post("/v1/jobs/cancel", {"id": job_id})
    assert plane.cancelled == [job_id]
    runner.cancel(job_id)  # in a container an exception of Modal's does this
    assert app.finish(job_id)[0]["state"] == "cancelled"
    emptied(server)


@pytest.mark.parametrize(
    "returned",
    [
        {"secret": "of somebody else"},
        Envelope("of another job", "done", 1, ({"secret": 1},)).encode(),
        "secret",
    ],
)
def test_a_call_of_another_function_is_not_served(
    app: Caller, plane: ControlPlane, places: ModalPlaces, returned: Any
) -> None:
    plane.results["fc-stranger"] = None
    plane.finish("fc-stranger", returned)
    assert app.poll_jobs({"fc-stranger": ""})["fc-stranger"]["state"] == "unknown"
    assert app.call("GET", "/v1/jobs/fc-stranger").status_code == 404
    # Not even if it got among the records.
    record = {"request_id": bench_document(1).request_id, "batches": []}
    places.records.put(job_key("fc-stranger"), record)
    last, events = app.finish("fc-stranger")
    assert (last["state"], events) == ("failed", [])
    assert "secret" not in str(last)
