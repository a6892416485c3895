"""RunPod: outputs in a bucket, limits of time, many jobs at once, runs that stop early."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from runpod_worker import HandWorker, client_of, needs_sdk, submit
from server_kit import PATIENCE, bench, bench_graph, loading, statuses

from comfy_executors import (
    AuthenticationError,
    InputImageError,
    JobInterruptedError,
    JobResultLostError,
    JobTimeoutError,
    PayloadTooLargeError,
    RunpodComfyWorkflowExecutor,
    RunPodJobFailedError,
    RunPodWorkflowExecutor,
    ServerError,
    ServerResponseError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTemplate,
    WorkflowTimeoutError,
    cli_smoke,
    executors,
    wire,
)
from comfy_executors.cli import main
from comfy_executors.clients import http
from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.devserver import DevServer
from comfy_executors.executors import job_budgets, runpod
from comfy_executors.executors.side_by_side import AT_ONCE
from comfy_executors.testing import RunPodStub, RunPodWorkerProcess

PNG = b"\x89PNG\r\n\x1a\n"
Make = Callable[..., RunPodWorkflowExecutor]


class Store:
    """As much of S3 as it takes: objects are put, and fetched by presigned URLs.

    Attributes:
        puts, gets: The requests so far, as headers with their path under `:path`.
        answers: Statuses, or contents, of the next fetches instead of the truth; or what is waited
            for before it.
        together: Where fetches wait for each other, if anywhere.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[dict[str, str]] = []
        self.gets: list[dict[str, str]] = []
        self.answers: deque[int | bytes | Callable[[], object]] = deque()
        self.together: threading.Barrier | None = None
        self.url = ""

    def clear(self) -> None:
        for kept in (self.objects, self.puts, self.gets, self.answers):
            kept.clear()
        self.together = None

    def answer(self, path: str) -> tuple[int, bytes]:
        if self.together is not None:
            with suppress(threading.BrokenBarrierError):  # the test sees that it is
                self.together.wait(PATIENCE)
        planned = self.answers.popleft() if self.answers else 200
        if callable(planned):
            planned()
            planned = 200
        if isinstance(planned, bytes):
            return 200, planned
        data = self.objects.get(urlsplit(path).path)
        return (404, b"NoSuchKey") if data is None else (planned, data)


@contextmanager
def running(store: Store) -> Iterator[Store]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            store.puts.append({**dict(self.headers), ":path": self.path})
            store.objects[urlsplit(self.path).path] = data
            self.reply(200, b"")

        def do_GET(self) -> None:
            store.gets.append({**dict(self.headers), ":path": self.path})
            self.reply(*store.answer(self.path))

        def reply(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        store.url = f"http://127.0.0.1:{server.server_port}"
        yield store
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running(Store()) as store:
        yield store


@pytest.fixture(scope="module")
def site(store: Store) -> Iterator[tuple[DevServer, RunPodStub]]:
    """Our worker with a bucket."""
    bucket = {
        "BUCKET_ENDPOINT_URL": store.url,
        "BUCKET_ACCESS_KEY_ID": "key-id",
        "BUCKET_SECRET_ACCESS_KEY": "s3cr3t-key",
        "BUCKET_NAME": "pictures",
    }
    with DevServer() as server, RunPodStub() as stub:  # noqa: SIM117  too long for Python 3.9
        with RunPodWorkerProcess(stub, server.address, environment=bucket) as worker:
            yield server, stub
            print(worker.log)  # shown when a test fails
            worker.kill()


@pytest.fixture
def server(site: tuple[DevServer, RunPodStub], store: Store) -> DevServer:
    site[0].reset()
    store.clear()
    return site[0]


@pytest.fixture
def stub(site: tuple[DevServer, RunPodStub], server: DevServer) -> Iterator[RunPodStub]:
    site[1].clear()
    yield site[1]
    site[1].clear()


@pytest.fixture
def bare() -> Iterator[RunPodStub]:
    """A platform without workers."""
    with RunPodStub() as stub:
        yield stub


@contextmanager
def executor_for(stub: RunPodStub, **options: Any) -> Iterator[RunPodWorkflowExecutor]:
    made = RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url, **options)
    try:
        yield made
    finally:
        made.close(cancel=True)


def delivered(run: Any, count: int) -> None:
    """Check that every batch was delivered, each once, with a picture."""
    images = list(run)
    assert Counter(image.batch_index for image in images) == Counter(range(count))
    assert all(image.data.startswith(PNG) for image in images)


# Outputs in a bucket.


@needs_sdk
def test_outputs_in_a_bucket_are_fetched_without_our_key(
    stub: RunPodStub, server: DevServer, store: Store
) -> None:
    with executor_for(stub) as executor:
        delivered(executor.submit_workflow(bench(), num_samples=4), 4)
    assert (len(store.puts), len(store.gets)) == (4, 4)
    assert all("Authorization" in put for put in store.puts)
    assert not any("Authorization" in get for get in store.gets)
    assert stub.api_key not in str(store.gets)
    # The images can be here before the job has ended.
    stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", PATIENCE)
    outputs = [event for event in stub.jobs[0].output if event.get("kind") == "output"]
    assert [set(event) & {"data", "url"} for event in outputs] == [{"url"}] * 4


@needs_sdk
def test_urls_that_the_stream_lost_are_asked_for_again(
    stub: RunPodStub, server: DevServer, store: Store
) -> None:
    for number in range(1, 30):
        stub.faults.lose_chunk(number)
    with executor_for(stub) as executor:
        delivered(executor.submit_workflow(bench(), num_samples=6), 6)
    assert sum(job.lost_chunks for job in stub.jobs) >= 12
    assert (len(stub.jobs), statuses(server), len(store.gets)) == (1, {"success": 6}, 6)


@needs_sdk
def test_an_overloaded_bucket_is_asked_again(stub: RunPodStub, store: Store) -> None:
    store.answers.extend([503, 503, 500, 429])
    with executor_for(stub) as executor:
        delivered(executor.submit_workflow(bench(), num_samples=3), 3)
    assert (len(stub.jobs), len(store.gets)) == (1, 7)


@needs_sdk
@pytest.mark.parametrize("answer", [404, 403, b"<html>", PNG + b"another picture"])
def test_what_is_gone_or_broken_in_a_bucket_costs_only_its_batch(
    stub: RunPodStub, server: DevServer, store: Store, answer: int | bytes
) -> None:
    store.answers.extend([200, answer])
    with executor_for(stub) as executor:
        run = executor.submit_workflow(bench(), num_samples=4)
        attempts = sorted(future.result(PATIENCE).attempts for future in run.futures)
    assert attempts == [1, 1, 1, 2]
    graphs = [len(job.input["comfy_executors"]["graphs"]) for job in stub.jobs]
    assert graphs == [4, 1]
    assert len(store.gets) == 5


@needs_sdk
def test_a_job_with_a_bucket_is_taken_up_whole(stub: RunPodStub, store: Store) -> None:
    with executor_for(stub) as first:
        first.submit_workflow(bench(), num_samples=8).result(PATIENCE)
    store.together = threading.Barrier(AT_ONCE)  # all of them are known at once
    with executor_for(stub) as second:
        delivered(second.attach(stub.jobs[0].id, 8), 8)
    assert not store.together.broken
    assert (len(stub.jobs), len(store.puts), len(store.gets)) == (1, 8, 16)


@needs_sdk
def test_batches_that_are_not_asked_for_are_told(
    stub: RunPodStub, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with executor_for(stub) as first:
        first.submit_workflow(bench(), num_samples=4).result(PATIENCE)
    assert "was not asked for" not in caplog.text
    with executor_for(stub) as second:
        assert len(second.attach(stub.jobs[0].id).result(PATIENCE)) == 1
    # Of whichever is heard first, and of no other.
    told = rf"job {stub.jobs[0].id} has a batch [1-3], which this run was not asked for"
    assert len(re.findall(told, caplog.text)) == 1


def test_the_official_workers_bucket(bare: RunPodStub, store: Store) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3)
        run.futures[2].add_done_callback(lambda _: None)
        job = taken(bare)
        HandWorker(bare).done(job["id"], output={"images": in_bucket(store, job)})
        results = [future.result(PATIENCE) for future in run.futures]
    assert [len(result.images) for result in results] == [1, 1, 1]
    assert len({result.images[0].data for result in results}) == 3
    assert len(store.gets) == 3
    assert not any("Authorization" in get for get in store.gets)


def test_a_file_that_is_gone_from_a_bucket_costs_its_batch_alone(
    bare: RunPodStub, store: Store
) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3)
        run.futures[2].add_done_callback(lambda _: None)
        job = taken(bare)
        images = in_bucket(store, job)
        del store.objects[urlsplit(images[1]["data"]).path]
        HandWorker(bare).done(job["id"], output={"images": images})
        errors = [future.exception(PATIENCE) for future in run.futures]
        assert [type(error) for error in errors].count(type(None)) == 2
        (error,) = (error for error in errors if isinstance(error, ServerResponseError))
        assert (error.status, error.job_id, len(bare.jobs)) == (404, job["id"], 1)
        # A bucket has room for any result; a request has not for any graph.
        long = executor.submit_workflow(bench(text="x" * 300_000), num_samples=40)
        long.futures[39].add_done_callback(lambda _: None)
        bare.wait_for(lambda s: len(s.jobs) == 3, PATIENCE)
        long.cancel()


def in_bucket(store: Store, job: Any, files: int = 1) -> list[dict[str, str]]:
    """Put what each batch of a job made into the store; return what the official worker tells."""
    images = []
    for node in job["input"]["workflow"].values():
        for number in range(files) if node["class_type"] == "SaveImage" else ():
            name = f"{node['inputs']['filename_prefix']}_{number + 1:05d}_.png"
            store.objects[f"/pictures/{name}"] = PNG + name.encode()
            url = f"{store.url}/pictures/{name}?X-Amz-Signature=s"
            images.append({"filename": name, "type": "s3_url", "data": url})
    return images


@pytest.mark.parametrize("how", ["submit", "attach"])
def test_a_batch_is_delivered_before_the_next_ones_file_is_asked_for(
    bare: RunPodStub, store: Store, how: str
) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3)
        job = taken(bare)
        images = in_bucket(store, job)
        if how == "attach":
            HandWorker(bare).done(job["id"], output={"images": images})
            run.result(PATIENCE)
            store.gets.clear()
        looked_at, first_taken = threading.Event(), threading.Event()
        store.answers.append(lambda: looked_at.wait(PATIENCE))
        store.answers.append(lambda: first_taken.wait(PATIENCE))
        if how == "attach":
            run = executor.attach(job["id"], 3)
        else:
            HandWorker(bare).done(job["id"], output={"images": images})
        asked_for: list[int] = []
        for future in run.futures:
            future.add_done_callback(lambda _: asked_for.append(len(store.gets)))
        looked_at.set()
        run.futures[0].result(PATIENCE / 2)
        first_taken.set()
        assert len(run.result(PATIENCE)) == 3
    assert asked_for == [1, 2, 3]


def test_a_slow_consumer_holds_no_more_of_a_bucket_than_the_bound(
    bare: RunPodStub, store: Store
) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui", max_workers=1) as executor:
        run = executor.submit_workflow(bench(), num_samples=10)
        job = taken(bare)
        HandWorker(bare).done(job["id"], output={"images": in_bucket(store, job)})
        ahead = [len(store.gets) - number for number, _ in enumerate(run, 1)]
    assert len(ahead) == len(store.gets) == 10
    assert max(ahead) <= 1 + 2


def test_the_files_of_a_batch_are_fetched_side_by_side(bare: RunPodStub, store: Store) -> None:
    store.clear()
    together = threading.Barrier(2, timeout=PATIENCE)
    store.answers.extend([together.wait] * 4)
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=2)
        job = taken(bare)
        HandWorker(bare).done(job["id"], output={"images": in_bucket(store, job, files=2)})
        results = [future.result(PATIENCE) for future in run.futures]
    names = [[image.name for image in result.images] for result in results]
    assert names == [["t_00001_.png", "t_00002_.png"]] * 2
    assert len({get[":path"] for get in store.gets}) == len(store.gets) == 4


def test_a_run_cancelled_between_batches_asks_for_no_more_files(
    bare: RunPodStub, store: Store
) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3)
        run.futures[0].add_done_callback(lambda _: run.cancel())
        job = taken(bare)
        HandWorker(bare).done(job["id"], output={"images": in_bucket(store, job)})
        errors = [future.exception(PATIENCE) for future in run.futures]
    assert [type(error) for error in errors] == [type(None), *[WorkflowCancelledError] * 2]
    assert (len(store.gets), len(bare.jobs)) == (1, 1)


def test_a_bucket_that_stays_overloaded_fails_what_is_left_of_a_job(
    bare: RunPodStub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_ATTEMPTS", 2)
    monkeypatch.setattr(http, "_ATTEMPTS_A_SECOND", 0)
    store.clear()
    store.answers.extend([200, 503, 503])
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3)
        run.futures[0].add_done_callback(lambda _: None)
        job = taken(bare)
        HandWorker(bare).done(job["id"], output={"images": in_bucket(store, job)})
        first, *others = (future.exception(PATIENCE) for future in run.futures)
    assert first is None
    told = [(error.status, error.job_id) for error in others if isinstance(error, ServerError)]
    assert told == [(503, job["id"])] * 2
    assert (len(store.gets), len(bare.jobs)) == (3, 1)


def taken(stub: RunPodStub) -> Any:
    stub.wait_for(lambda s: any(job.status == "IN_QUEUE" for job in s.jobs), PATIENCE)
    return HandWorker(stub).take()


def test_a_signature_is_not_shown(bare: RunPodStub, store: Store) -> None:
    store.clear()
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench())
        run.futures[0].add_done_callback(lambda _: None)
        job = taken(bare)
        image = {"filename": "a.png", "type": "s3_url", "data": f"{store.url}/a?Signature=hush"}
        HandWorker(bare).done(job["id"], output={"images": [image]})
        with pytest.raises(ServerError, match="404") as caught:
            run.futures[0].result(PATIENCE)
    assert "hush" not in repr(caught.value) + str(caught.value.__cause__)


# Limits of time.


def test_a_job_that_outlasts_its_execution_timeout_is_cancelled(
    bare: RunPodStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod, "_OVERTIME_SECONDS", -4.0)  # before RunPod's own clock
    with executor_for(bare, execution_timeout=5.0) as executor:
        run = executor.submit_workflow(bench(), num_samples=2)
        run.futures[0].add_done_callback(lambda _: None)
        job = taken(bare)
        with pytest.raises(JobTimeoutError, match="execution timeout of 5 s") as caught:
            run.futures[0].result(PATIENCE)
    assert (caught.value.started, caught.value.job_id) == (True, job["id"])
    assert [job.status for job in bare.jobs] == ["CANCELLED"]


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param('{"status": "COMPLETED", "stream": []}', id="alone has ended"),
        pytest.param('{"status": "IN_PROGRESS", "stream": [{"output": {}}]}', id="never pauses"),
    ],
)
def test_a_job_with_a_strange_stream_is_not_followed_for_ever(
    bare: RunPodStub, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setattr(runpod, "_OVERTIME_SECONDS", -4.0)
    bare.faults.fail("GET", "/stream/*", status=200, body=stream, times=None)
    with executor_for(bare, execution_timeout=5.0) as executor:
        run = executor.submit_workflow(bench())
        run.futures[0].add_done_callback(lambda _: None)
        taken(bare)
        with pytest.raises(JobTimeoutError, match="execution timeout of 5 s"):
            run.futures[0].result(PATIENCE)
    assert [job.status for job in bare.jobs] == ["CANCELLED"]


@needs_sdk
def test_whoever_takes_long_over_an_image_costs_the_job_no_time(
    stub: RunPodStub, server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(job_budgets, "time", clock)

    def dawdle(event: Any) -> None:
        if event.kind == "done":
            stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", PATIENCE)
            clock.passed = 10_000.0

    with executor_for(stub) as executor:
        delivered(executor.submit_workflow(bench(0.2), num_samples=3, on_progress=dawdle), 3)
    assert statuses(server) == {"success": 3}


class Clock:
    """The clock, which can be put forward."""

    passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


def test_a_batch_timeout_counts_for_a_job_of_the_official_worker(bare: RunPodStub) -> None:
    with executor_for(bare, worker="worker-comfyui") as executor:
        run = executor.submit_workflow(bench(), num_samples=3, batch_timeout=2.0)
        run.futures[0].add_done_callback(lambda _: None)
        job = taken(bare)
        with pytest.raises(JobTimeoutError) as caught:
            run.futures[0].result(PATIENCE)
    assert bare.jobs[0].policy["executionTimeout"] == 6000
    assert (caught.value.started, caught.value.job_id) == (True, job["id"])
    assert len(bare.jobs) == 1


# Many jobs.


@pytest.mark.slow
def test_a_thousand_jobs_stay_below_the_rate_limits(
    bare: RunPodStub, caplog: pytest.LogCaptureFixture
) -> None:
    """The stub answers 429 to whoever passes the documented limits."""
    count = 1000
    options: dict[str, Any] = {"max_workers": count, "worker": "worker-comfyui"}
    with executor_for(bare, batches_per_job=1, **options) as executor:
        run = executor.submit_workflow(bench(), num_samples=count)
        run.futures[0].add_done_callback(lambda _: None)
        bare.wait_for(lambda s: len(s.jobs) == count, 4 * PATIENCE)  # all of them wait there
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(work_off, bare, f"hand-{n}", count) for n in range(4)]
            images = run.result(4 * PATIENCE)
            done = sum(future.result(PATIENCE) for future in work)
    assert [image.batch_index for image in images] == list(range(count))
    assert (done, len(bare.jobs), bare.calls["run"]) == (count, count, count)
    assert Counter(job.status for job in bare.jobs) == {"COMPLETED": count}
    assert [request for request in bare.requests if request.status == 429] == []
    assert "pool is full" not in caplog.text


def work_off(stub: RunPodStub, worker_id: str, count: int) -> int:
    """Answer jobs as the official worker does, until that many were begun; return how many."""
    worker = HandWorker(stub, worker_id)
    done = 0
    while any(job.status == "IN_QUEUE" for job in stub.jobs):
        for job in worker.take_batch(20):
            answer(worker, job)
            done += 1
    return done


def answer(worker: HandWorker, job: Any) -> None:
    """End a job with one picture for each of its batches."""
    images = [
        {
            "filename": f"{node['inputs']['filename_prefix']}_00001_.png",
            "type": "base64",
            "data": "iVBORw0KGgo=",
        }
        for node in job["input"]["workflow"].values()
        if node["class_type"] == "SaveImage"
    ]
    assert worker.done(job["id"], output={"images": images}) == 200


def wait_for_jobs(stub: RunPodStub, count: int) -> None:
    stub.wait_for(lambda s: len(s.jobs) >= count, PATIENCE)


def test_no_more_jobs_than_max_workers_are_at_runpod(bare: RunPodStub) -> None:
    def at_runpod(stub: RunPodStub) -> int:
        return sum(job.status in ("IN_QUEUE", "IN_PROGRESS") for job in stub.jobs)

    options: dict[str, Any] = {"batches_per_job": 2, "max_workers": 3, "worker": "worker-comfyui"}
    worker = HandWorker(bare)
    most = 0
    with executor_for(bare, **options) as executor:
        run = executor.submit_workflow(bench(), num_samples=20)
        run.futures[0].add_done_callback(lambda _: None)
        for submitted in [*range(3, 11), 10, 10]:
            wait_for_jobs(bare, submitted)
            most = max(most, at_runpod(bare))
            answer(worker, worker.take())
        images = run.result(PATIENCE)
    assert (most, len(bare.jobs), len(images)) == (3, 10, 20)


# Whose error it is.


def test_rows_whose_worker_lost_its_comfyui_end_no_sweep(
    bare: RunPodStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", bare.api_key)
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", bare.url)
    (tmp_path / "t.json").write_text(json.dumps(bench_graph(text="{{ prompt }}")))
    (tmp_path / "rows.csv").write_text("prompt\nfox\nowl\nhare\n")
    files = ["--vars", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "out")]
    comfyui = "http://127.0.0.1:8188"
    error = ServerUnreachableError(f"{comfyui} cannot be reached", server=comfyui)
    dies = yields(STARTED, wire.Failed(1, 1, 0, error), wire.End(2, 1, 0, 0, 1))
    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(
            main, ["run", str(tmp_path / "t.json"), "--runpod", bare.endpoint_id, *files]
        )
        for _ in range(3):
            dies(bare, taken(bare)["id"], None)
        assert sweeping.result(PATIENCE) == 1
    assert len(bare.jobs) == 3
    assert "3 rows failed" in capfd.readouterr().err


Trouble = Callable[[RunPodStub, str, Any], object]


def answers(**result: Any) -> Trouble:
    return lambda stub, job_id, run: HandWorker(stub).done(job_id, **result)


def yields(*events: Any) -> Trouble:
    def trouble(stub: RunPodStub, job_id: str, run: Any) -> None:
        for event in events:
            HandWorker(stub).chunk(job_id, wire.encode_event(event))
        HandWorker(stub).done(job_id, output=[])

    return trouble


def refuses(stub: RunPodStub, job_id: str, run: Any) -> None:
    stub.faults.fail("GET", "/stream/*", status=401)
    HandWorker(stub).ping(job_id)


RAISED = '{"error_type": "<class \'RuntimeError\'>", "error_message": "kaboom"}'
STARTED = wire.Started(0, 1, "r", "w", "1", 1)
FAILURES: dict[str, tuple[Trouble, type[Exception], str]] = {
    "handler error": (answers(error="out of luck"), RunPodJobFailedError, "out of luck"),
    "exception": (answers(error=RAISED), RunPodJobFailedError, "kaboom"),
    "limit passed": (
        lambda stub, job_id, run: stub.time_out(job_id), JobTimeoutError, "execution timeout",
    ),
    "cancelled by others": (
        lambda stub, job_id, run: client_of(stub).cancel(job_id, DeadlineWaiter(9)),
        JobInterruptedError, "cancelled",
    ),
    "no result": (answers(), JobResultLostError, "S3"),
    "not a worker of ours": (answers(output={"text": "hi"}), ServerResponseError, "neither"),
    "a bucket without keys": (
        answers(output={"images": [
            {"filename": "a.png", "type": "s3_url", "data": "simulated_uploaded/1f.png"},
        ]}),
        ServerResponseError, "path of its own instead of a URL",
    ),
    "no event": (answers(output=[{"kind": "end"}]), ServerResponseError, "no event"),
    "another's events": (answers(output=[{"kind": "surprise"}]), ServerResponseError, "neither"),
    "key revoked": (refuses, AuthenticationError, "401"),
    "we cancel": (lambda stub, job_id, run: run.cancel(), WorkflowCancelledError, "cancelled"),
    "a batch": (
        yields(STARTED, wire.Failed(1, 1, 0, WorkflowError("no")), wire.End(2, 1, 0, 0, 1)),
        WorkflowError, "no",
    ),
    "the whole job": (
        yields(STARTED, wire.Failed(1, 1, None, InputImageError("bad")), wire.End(2, 1, 0, 0, 1)),
        InputImageError, "bad",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_each_error_has_its_class_and_the_id_of_its_job(bare: RunPodStub, name: str) -> None:
    trouble, kind, words = FAILURES[name]
    with executor_for(bare) as executor:
        run = executor.submit_workflow(bench())
        (future,) = run.futures
        job = taken(bare)
        trouble(bare, job["id"], run)
        error: Any = future.exception(PATIENCE)
    assert words in str(error)
    assert error.job_id == pickle.loads(pickle.dumps(error)).job_id == job["id"]
    assert type(error) is kind
    assert len(bare.jobs) == 1


OTHERS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "an empty list": ("auto", {"output": []}, ServerResponseError, "neither"),
    "only ours is wanted": (
        "comfy-executors", {"output": {"text": "hi"}}, ServerResponseError, "neither",
    ),
    "ours is wanted, and an empty list": (
        "comfy-executors", {"output": []}, ServerResponseError, "neither",
    ),
    "ours is wanted, and it is the official one": (
        "comfy-executors", {"output": {"images": []}}, ServerResponseError, 'worker="auto"',
    ),
    "the official one misses its fields": (
        "comfy-executors", {"error": "Missing 'workflow' parameter"},
        RunPodJobFailedError, "parameter; if the endpoint runs worker-comfyui, use worker=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_worker_than_ours_costs_one_job(bare: RunPodStub, name: str) -> None:
    worker, result, kind, words = OTHERS[name]
    with executor_for(bare, worker=worker) as executor:
        (future,) = executor.submit_workflow(bench()).futures
        future.add_done_callback(lambda _: None)
        job = taken(bare)
        HandWorker(bare).done(job["id"], **result)
        error: Any = future.exception(PATIENCE)
    assert words in str(error)
    assert (type(error), error.job_id, len(bare.jobs)) == (kind, job["id"], 1)


def test_urls_and_the_official_worker_of_an_endpoint(bare: RunPodStub) -> None:
    with executor_for(bare) as executor:
        (future,) = executor.submit_workflow(loading(), ["https://example.com/a.png"]).futures
        future.add_done_callback(lambda _: None)
        job = taken(bare)
        HandWorker(bare).done(job["id"], error="Missing 'workflow' parameter")
        error: Any = future.exception(PATIENCE)
        assert (type(error), error.job_id) == (RunPodJobFailedError, job["id"])
        assert "if the endpoint runs worker-comfyui, it takes no URLs" in str(error)
        run = executor.submit_workflow(bench())
        run.futures[0].add_done_callback(lambda _: None)
        answer(HandWorker(bare), taken(bare))
        run.result(PATIENCE)
        with pytest.raises(InputImageError, match="takes no URLs"):
            executor.submit_workflow(loading(), ["https://example.com/a.png"])
    assert len(bare.jobs) == 2


@pytest.mark.parametrize("worker", ["auto", "comfy-executors"])
def test_a_job_of_ours_whose_first_event_is_lost_is_still_ours(
    bare: RunPodStub, worker: str
) -> None:
    with executor_for(bare, worker=worker) as executor:
        (future,) = executor.submit_workflow(bench()).futures
        future.add_done_callback(lambda _: None)
        job = taken(bare)
        yields(wire.Failed(1, 1, 0, WorkflowError("no")), wire.End(2, 1, 0, 0, 1))(
            bare, job["id"], None
        )
        error = future.exception(PATIENCE)
    assert type(error) is WorkflowError
    assert executor.found_worker == "comfy-executors"
    assert len(bare.jobs) == 1


def test_a_run_out_of_time_names_its_job(bare: RunPodStub) -> None:
    with executor_for(bare) as executor:
        run = executor.submit_workflow(bench(), timeout=1.0)
        error: Any = run.futures[0].exception(PATIENCE)
    assert type(error) is WorkflowTimeoutError
    assert error.job_id == bare.jobs[0].id
    bare.wait_for(lambda s: s.jobs[0].status == "CANCELLED", PATIENCE)


# Stopping early.


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_stopping_does_not_wait_for_runpod(bare: RunPodStub, how: str) -> None:
    bare.faults.delay("POST", "/cancel/*", 2.0)
    with executor_for(bare) as executor:
        run = executor.submit_workflow(bench(), timeout=1.0 if how == "timeout" else None)
        (future,) = run.futures
        bare.wait_for(lambda s: s.calls["run"] == 1, PATIENCE)
        if how == "cancel":
            run.cancel()
        assert isinstance(future.exception(PATIENCE), (WorkflowCancelledError, TimeoutError))
        assert bare.jobs[0].status == "IN_QUEUE"
    assert bare.jobs[0].status == "CANCELLED"  # closing waited for it


def test_a_cancellation_breaks_off_the_present_poll(bare: RunPodStub) -> None:
    bare.faults.delay("GET", "/stream/*", 3600.0, times=1)
    with executor_for(bare) as executor:
        run = executor.submit_workflow(bench())
        run.futures[0].add_done_callback(lambda _: None)
        while bare.faults._rules:  # until it holds a poll
            HandWorker(bare).ping("none")
        begun = time.monotonic()
        run.cancel()
        with pytest.raises(WorkflowCancelledError):
            run.futures[0].result(PATIENCE)
        assert time.monotonic() - begun < 5.0  # an answer would be waited for 30 s
    assert [job.status for job in bare.jobs] == ["CANCELLED"]


ENDS: dict[str, tuple[Callable[[RunPodStub, str], object], int, str]] = {
    "completed": (
        lambda stub, job_id: answer(HandWorker(stub), taken(stub)),
        1, " s later is COMPLETED: it ended before the cancelling came, or in spite of it",
    ),
    "failed": (
        lambda stub, job_id: HandWorker(stub).done(taken(stub)["id"], error="no"),
        1, " s later is FAILED\n",
    ),
    "forgotten": (
        lambda stub, job_id: stub.expire(job_id),
        0, "a cancelled job stops: it is not known any more",
    ),
    "none": (lambda stub, job_id: None, 1, " s later is IN_QUEUE\n"),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_smoke_asks_what_became_of_the_job_that_it_cancelled(
    bare: RunPodStub, monkeypatch: pytest.MonkeyPatch, capfd: Any, end: str
) -> None:
    bring_about, code, words = ENDS[end]
    if end == "none":
        monkeypatch.setattr(cli_smoke, "_STOP_SECONDS", 3.0)
    monkeypatch.setenv("RUNPOD_API_KEY", bare.api_key)
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", bare.url)
    agreed = '{"status": "CANCELLED"}'  # and nothing is done
    bare.faults.fail("POST", "/cancel/*", status=200, body=agreed, times=None)
    arguments = ["runpod", "smoke", bare.endpoint_id, "--worker", "worker-comfyui"]
    with ThreadPoolExecutor(1) as pool:
        smoke = pool.submit(main, arguments)
        answer(HandWorker(bare), taken(bare))
        # The executor asks once for each job, and then the smoke.
        bare.wait_for(lambda s: s.calls["cancel"] == 1 and s.calls["status"] >= 3, PATIENCE)
        job_id = bare.jobs[1].id
        bring_about(bare, job_id)
        assert smoke.result(PATIENCE) == code
    told = "".join(capfd.readouterr())
    assert words in told
    assert (f"job {job_id}: was cancelled, and " in told) is (code == 1)
    assert bare.calls["status"] <= 20


@pytest.mark.parametrize("how", ["cancel", "timeout", "close"])
def test_an_attached_job_is_cancelled_though_no_thread_came_to_it(
    bare: RunPodStub, how: str
) -> None:
    client = client_of(bare)
    mine, other = (submit(client).id for _ in range(2))
    with executor_for(bare, max_workers=1) as executor:
        executor.attach(other)
        bare.wait_for(lambda s: s.calls["stream"] == 1, PATIENCE)
        run = executor.attach(mine, timeout=0.5 if how == "timeout" else None)
        if how == "cancel":
            run.cancel()
        elif how == "close":
            executor.close(cancel=True)
        bare.wait_for(lambda s: s.jobs[0].status == "CANCELLED", PATIENCE)
        assert (bare.jobs[1].status == "CANCELLED") is (how == "close")
        kind = WorkflowTimeoutError if how == "timeout" else WorkflowCancelledError
        assert isinstance(run.errors[0], kind)
    client.close()


def test_the_alias_is_the_same_class() -> None:
    arguments: tuple[Any, ...] = ("endpoint", "key", "https://runpod.example/v2")
    for alias in (RunpodComfyWorkflowExecutor, executors.RunpodComfyWorkflowExecutor):
        assert alias is RunPodWorkflowExecutor is executors.RunPodWorkflowExecutor
        with alias(*arguments) as made:
            assert made.url == "https://runpod.example/v2/endpoint"


def test_the_same_bytes_travel_once(bare: RunPodStub) -> None:
    template = WorkflowTemplate(
        """{"1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}},
            "2": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[2] }}"}},
            "3": {"class_type": "ImageBlend", "inputs": {"image1": ["1", 0], "image2": ["2", 0],
                  "blend_factor": 0.5, "blend_mode": "normal"}},
            "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0],
                  "filename_prefix": "t"}}}"""
    )
    one, two = PNG + b"one" * 1_000_000, PNG + b"two"
    with executor_for(bare) as executor:  # three of them would be too large
        run = executor.submit_workflow(template, [one, two, one, one])
        run.futures[0].add_done_callback(lambda _: None)
        bare.wait_for(lambda s: len(s.jobs) == 1, PATIENCE)
    request = bare.jobs[0].input
    names = [image["name"] for image in request["images"]]
    assert len(set(names)) == len(names) == 2
    assert [graph["1"]["inputs"]["image"] for graph in [request["workflow"]]] == [names[0]]
    assert request["workflow"]["2"]["inputs"]["image"] == names[0]
    assert [file["name"] for file in request["comfy_executors"]["input_images"]] == names


def test_too_large_input_images_are_refused_at_once(bare: RunPodStub) -> None:
    picture = PNG + bytes(7_500_001)
    with executor_for(bare) as executor, pytest.raises(PayloadTooLargeError, match="https URLs"):
        executor.submit_workflow(loading(), [picture])
    assert bare.requests == []
