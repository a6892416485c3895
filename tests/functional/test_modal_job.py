"""A job in its container: what comes out of it, whatever happens in it; and jobs begun twice."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from modal_kit import Caller, assemble, emptied, failure_of
from server_kit import ENDLESS, PATIENCE, bench_graph, statuses
from worker_kit import bench_document, document

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    JobTimeoutError,
    OutputFileError,
    ServerNotReadyError,
    WorkerLostError,
    WorkflowRejectedError,
)
from comfy_executors.testing import ModalEdge
from comfy_executors.workers.comfy_process import ComfyProcess, write_model_paths
from comfy_executors.workers.engine import Engine
from comfy_executors.workers.job_records import Envelope, call_key, progress_key
from comfy_executors.workers.modal_container import GpuContainer
from comfy_executors.workers.modal_job import JobRunner


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


class Channel:
    """A channel in memory, which can be told to misbehave."""

    def __init__(self, call_id: str = "fc-test") -> None:
        self.call_id = call_id
        self.records: dict[str, Any] = {}
        self.told: list[Mapping[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.raises: dict[str, BaseException] = {}
        self.changed = threading.Condition()

    def _maybe(self, what: str) -> None:
        if what in self.raises:
            raise self.raises[what]

    def get(self, key: str) -> Any:
        self._maybe("get")
        return self.records.get(key)

    def put(self, key: str, value: Any) -> None:
        with self.changed:
            self.records[key] = value
            self.changed.notify_all()

    def claim(self, key: str, value: Any) -> bool:
        return self.records.setdefault(key, value) is value

    def is_cancelled(self, request_id: str) -> bool:
        return "cancelled" in self.records

    def emit(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._maybe("emit")
        with self.changed:
            self.told.extend(events)
            self.changed.notify_all()

    def events(self) -> list[Mapping[str, Any]]:
        self._maybe("events")
        return self.told

    def kept_outputs(self) -> set[str]:
        return {*self.files}

    def write_output(self, name: str, data: bytes) -> None:
        self._maybe("write_output")
        self.files[name] = data

    def read_input(self, sha256: str) -> bytes | None:
        return None


def run(server: DevServer, job: wire.JobDocument, channel: Channel, **options: Any) -> Envelope:
    runner = JobRunner(Engine(server.address), **options)
    try:
        envelope = Envelope.decode(runner.run(wire.encode_document(job), channel))
    finally:
        runner.close()
    assert envelope is not None
    return envelope


# What comes out of a job.


def test_the_envelope_has_all_that_was_told(server: DevServer) -> None:
    channel = Channel()
    envelope = run(server, bench_document(3), channel)
    assert (envelope.state, envelope.attempt, envelope.failure) == ("done", 1, None)
    assert list(envelope.events) == channel.told
    urls = {event["url"] for event in envelope.events if event["kind"] == "output"}
    assert {f"/v1/jobs/fc-test/outputs/{name}" for name in channel.files} == urls
    assert len(urls) == 3
    assert channel.records[call_key(envelope.request_id)] == "fc-test"


@pytest.mark.parametrize("error", [TimeoutError("slow"), TimeoutError(), RuntimeError("a bug")])
def test_no_exception_leaves_a_job(server: DevServer, error: Exception) -> None:
    """Modal's client would take a TimeoutError of a job for one that goes on, for ever."""

    def prepare() -> None:
        raise error

    envelope = run(server, bench_document(1), Channel(), prepare=prepare)
    assert envelope.state == "failed"
    assert type(error).__name__ in str(wire.decode_error(envelope.failure))


def test_a_document_of_another_version_is_told_in_the_envelope(server: DevServer) -> None:
    runner = JobRunner(Engine(server.address))
    raw = {**wire.encode_document(bench_document(1)), "version": 99}
    envelope = Envelope.decode(runner.run(raw, Channel()))
    runner.close()
    assert envelope is not None
    assert isinstance(wire.decode_error(envelope.failure), WorkflowRejectedError)


class InputCancellation(BaseException):
    """Stands for the exception of this name that Modal raises in a job's main thread."""


def test_a_call_that_modal_cancels_leaves_comfyui_empty(server: DevServer) -> None:
    """It is a BaseException in the middle of anything; here while an output is kept."""
    channel = Channel()
    channel.raises["write_output"] = InputCancellation()
    job = document(bench_graph(), *(bench_graph(ENDLESS, seed=n, steps=9) for n in range(2, 5)))
    runner = JobRunner(Engine(server.address))
    with pytest.raises(InputCancellation):
        runner.run(wire.encode_document(job), channel)
    emptied(server, success=1)
    # The container lives on, and its next job runs.
    again = Envelope.decode(runner.run(wire.encode_document(bench_document(1)), Channel("fc-2")))
    assert again is not None
    assert again.state == "done"
    runner.close()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="containers run Linux")
def test_modals_own_signal_leaves_comfyui_empty(server: DevServer) -> None:
    """Modal raises its exception in the main thread by SIGUSR1, whatever that is waiting for."""
    runner = JobRunner(Engine(server.address))
    main = threading.get_ident()

    def cancel(*_: Any) -> None:
        raise InputCancellation

    channel = Channel()

    def told() -> bool:
        kinds = Counter(event["event"]["kind"] for event in channel.told if "event" in event)
        return kinds == {"queued": 2, "started": 1}

    def send() -> None:
        server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
        with channel.changed:
            assert channel.changed.wait_for(told, PATIENCE)
        # Nothing comes now for a while: the main thread goes back to its wait, where Modal's
        # exception finds it nearly always.
        threading.Event().wait(0.5)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, cancel)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(InputCancellation):
            runner.run(wire.encode_document(bench_document(4, ENDLESS, steps=9)), channel)
    finally:
        signal.signal(signal.SIGUSR1, before)
        sender.join()
    emptied(server)
    runner.close()


def test_a_job_tells_that_it_ran_too_long_before_modal_ends_it(server: DevServer) -> None:
    channel = Channel()
    job = document(bench_graph(), bench_graph(ENDLESS, seed=2, steps=1000))
    envelope = run(server, job, channel, time_limit=2.0)
    assert envelope.state == "done"
    answer = assemble(list(envelope.events), job)
    assert sorted(answer.batches) == [0]
    failure = answer.failures[None]
    assert isinstance(failure, JobTimeoutError)
    assert "2 s: deploy it with a larger COMFY_MODAL_TIMEOUT, or give" in str(failure)
    emptied(server, success=1)


def test_a_job_that_is_cancelled_before_it_begins_runs_nothing(server: DevServer) -> None:
    channel = Channel()
    channel.records["cancelled"] = True
    assert run(server, bench_document(2), channel).state == "cancelled"
    assert not server.prompts


def test_a_second_call_of_a_request_runs_nothing(server: DevServer) -> None:
    job = bench_document(1)
    first = Channel("fc-1")
    second = Channel("fc-2")
    second.records = first.records
    assert run(server, job, first).state == "done"
    assert run(server, job, second).state == "duplicate"
    assert len(server.prompts) == 1


def test_a_call_that_modal_begins_again_elsewhere_is_its_second_attempt(
    server: DevServer,
) -> None:
    """The container was taken away; the new one knows of the first what that wrote down."""
    channel = Channel()
    job = bench_document(1)
    attempts = [run(server, job, channel) for _ in range(2)]
    assert [(envelope.state, envelope.attempt) for envelope in attempts] == [
        ("done", 1),
        ("done", 2),
    ]
    assert {event["attempt"] for event in attempts[1].events} == {2}
    assert sorted(channel.files) == ["1_00000_00000.png"]
    assert statuses(server) == {"success": 1}


def test_a_comfyui_that_never_comes_makes_the_container_sick(server: DevServer) -> None:
    server.faults.refuse_connections = True
    runner = JobRunner(Engine(server.address, ready_timeout=0.5))
    job = bench_document(1)
    envelope = Envelope.decode(runner.run(wire.encode_document(job), Channel()))
    runner.close()
    assert envelope is not None
    assert isinstance(assemble(list(envelope.events), job).failures[None], ServerNotReadyError)
    assert runner.sick


# When the places around it fail.


def test_what_cannot_be_kept_comes_in_the_events(server: DevServer) -> None:
    channel = Channel()
    channel.raises["write_output"] = OutputFileError("the volume is full")
    job = bench_document(1)
    answer = assemble(list(run(server, job, channel).events), job)
    assert [output.url for output in answer.batches[0].outputs] == [None]
    assert answer.data(0) != [None]


def test_events_that_cannot_be_told_are_in_the_envelope(server: DevServer) -> None:
    channel = Channel()
    channel.raises["emit"] = ConnectionError("no network")
    job = bench_document(2)
    envelope = run(server, job, channel)
    assert channel.told == []
    assert sorted(assemble(list(envelope.events), job).batches) == [0, 1]


def test_progress_is_told_though_nothing_follows_it(server: DevServer) -> None:
    """A model that takes minutes to load: what came before it is not kept back."""
    channel = Channel()
    runner = JobRunner(Engine(server.address))
    raw = wire.encode_document(bench_document(1, ENDLESS, steps=1))
    thread = threading.Thread(target=runner.run, args=(raw, channel))
    thread.start()
    with channel.changed:
        kinds = [*(("progress", kind) for kind in ("queued", "started"))]
        assert channel.changed.wait_for(
            lambda: (
                [
                    (event["kind"], event["event"]["kind"])
                    for event in channel.told
                    if event["kind"] == "progress"
                ]
                == kinds
                and channel.records.get(progress_key("fc-test"))
            ),
            PATIENCE,
        )
    runner.cancel("fc-test")
    thread.join()
    runner.close()


# Jobs that are begun twice, followed over the routes.


@pytest.fixture
def edge(server: DevServer) -> Iterator[ModalEdge]:
    with ModalEdge.in_front_of(server.address) as started:
        yield started


@pytest.fixture
def app(edge: ModalEdge) -> Caller:
    return Caller(edge.url, edge.key, edge.secret)


def test_a_job_that_is_restarted_tells_a_higher_attempt(
    app: Caller, edge: ModalEdge, server: DevServer
) -> None:
    job = document(bench_graph(), bench_graph(0.5, seed=2), bench_graph(0.5, seed=3))
    job_id = app.submit(job)
    told = app.until(job_id, "batch")
    first = {event["batch"] for event in told if event["kind"] == "batch"}
    edge.backend.restart(job_id)
    last, events = app.finish(job_id)
    assert last["state"] == "done"
    assert {event["attempt"] for event in events} == {1, 2}
    answer = assemble(events, job)
    assert sorted(answer.batches) == [0, 1, 2]
    assert answer.attempts == {2}
    outputs = [event for event in events if event["kind"] == "output"]
    assert all(app.output(event) for event in outputs)
    assert len({event["url"] for event in outputs}) == 3
    assert statuses(server)["success"] == 3
    assert first


def test_a_job_whose_container_is_killed_has_failed(app: Caller, edge: ModalEdge) -> None:
    job_id = app.submit(bench_document(2, ENDLESS, steps=1000))
    app.until(job_id, "started")
    edge.backend.kill(job_id)
    last, _ = app.finish(job_id)
    assert last["state"] == "failed"
    assert isinstance(failure_of(last), WorkerLostError)


def test_another_container_runs_only_what_is_not_kept(server: DevServer) -> None:
    job = bench_document(4)
    channel = Channel()
    first = run(server, job, channel)
    del channel.files[next(name for name in channel.files if name.startswith("1_00001_"))]
    unheard = [e for e in channel.told if e["kind"] == "output" and e["batch"] == 3]
    channel.told = [event for event in channel.told if event not in unheard]
    second = run(server, job, channel)
    assert (first.attempt, second.attempt) == (1, 2)
    answer = assemble([*second.events], job)
    assert sorted(answer.batches) == [0, 1, 2, 3]
    assert statuses(server) == {"success": 6}
    names = {output.url for batch in answer.batches.values() for output in batch.outputs}
    assert {str(name).rpartition("/")[2] for name in names} <= {*channel.files}
    third = run(server, job, channel)
    assert sorted(assemble([*third.events], job).batches) == [0, 1, 2, 3]
    assert statuses(server) == {"success": 6}


def test_a_container_that_cannot_read_what_was_made_runs_it_again(server: DevServer) -> None:
    job = bench_document(2)
    channel = Channel()
    run(server, job, channel)
    channel.raises["events"] = RuntimeError("no queue")
    again = run(server, job, channel)
    assert sorted(assemble([*again.events], job).batches) == [0, 1]
    assert statuses(server) == {"success": 4}


# The process.


def test_a_comfyui_that_has_died_is_started_again() -> None:
    process = ComfyProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    process.ensure_running()
    first = process._process
    process.ensure_running()
    assert first is not None
    assert process._process is first
    first.kill()
    first.wait()
    process.ensure_running()
    second = process._process
    assert second is not None
    assert (second.pid != first.pid, second.poll()) == (True, None)
    process.close()
    assert second.returncode is not None
    process.close()


def test_a_comfyui_that_dies_at_its_start_is_not_waited_for(server: DevServer) -> None:
    server.faults.refuse_connections = True
    process = ComfyProcess([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="did not start: ComfyUI ended with exit code 3"):
        GpuContainer(server.address, process, startup_timeout=PATIENCE, timeout=PATIENCE)


def test_a_comfyui_that_starts_again_gets_the_time_of_a_start(server: DevServer) -> None:
    process = ComfyProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    process.ensure_running()
    with Engine(server.address, ready_timeout=1.5, outage_timeout=0.5, process=process) as engine:
        engine.wait_until_ready()
        server.faults.refuse_connections = True
        with pytest.raises(ServerNotReadyError, match=r"within 0\.5 s"):
            engine.wait_until_ready()
        assert process._process is not None
        process._process.kill()
        process._process.wait()
        process.ensure_running()
        with pytest.raises(ServerNotReadyError, match=r"within 1\.5 s"):
            engine.wait_until_ready()
    process.close()


def test_comfyui_is_shown_the_models(tmp_path: Path) -> None:
    written = write_model_paths(tmp_path / "models", tmp_path / "paths.yaml")
    paths = json.loads(written.read_text())["models"]
    assert paths.pop("base_path") == str(tmp_path / "models")
    assert {"checkpoints", "loras", "vae", "custom_nodes"} <= set(paths)


def test_comfyui_is_shown_the_models_of_custom_nodes(tmp_path: Path) -> None:
    odd = ["a\nb", ".git", "base_path", "is_default", "..."]
    for name in ["checkpoints", "ipadapter", "LLM", "my-models_2", *odd]:
        (tmp_path / name).mkdir()
    (tmp_path / "readme").write_text("no folder")
    (tmp_path / "linked").symlink_to(tmp_path / "nowhere")
    paths = json.loads(write_model_paths(tmp_path, tmp_path / "paths.yaml").read_text())["models"]
    assert paths.pop("base_path") == str(tmp_path)
    assert {"checkpoints", "ipadapter", "LLM", "my-models_2"} <= set(paths)
    assert not {*odd, "readme", "linked"} & set(paths)
    assert all(name == folder for name, folder in paths.items())
