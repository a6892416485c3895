"""The RunPod stub: what it answers to clients and workers, its limits and its faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import requests
from runpod_worker import (
    PATIENCE,
    HandWorker,
    client_of,
    kill,
    needs_sdk,
    sdk_worker,
    submit,
    waiter,
)

from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.testing import RunPodStub


@pytest.fixture
def stub() -> Iterator[RunPodStub]:
    with RunPodStub() as started:
        yield started


@pytest.fixture
def client(stub: RunPodStub) -> Iterator[RunPodClient]:
    made = client_of(stub)
    yield made
    made.close()


@pytest.fixture
def worker(stub: RunPodStub) -> HandWorker:
    return HandWorker(stub)


def raw(stub: RunPodStub, method: str, path: str, body: Any = None, key: str = "") -> Any:
    return requests.request(
        method,
        f"{stub.url}/{stub.endpoint_id}{path}",
        data=body,
        headers={"Authorization": key or f"Bearer {stub.api_key}"},
        timeout=PATIENCE,
    )


# Bodies and keys.


@pytest.mark.parametrize("body", ["", "no JSON", "[]", '{"input": "x"}', '{"input": [1]}', "{}"])
def test_an_input_that_is_no_object_is_refused(stub: RunPodStub, body: str) -> None:
    assert raw(stub, "POST", "/run", body).status_code == 400
    assert stub.jobs == []


def test_an_empty_input_is_lost_on_the_way(stub: RunPodStub, worker: HandWorker) -> None:
    answer = raw(stub, "POST", "/run", '{"input": {}}').json()
    assert answer["status"] == "IN_QUEUE"
    assert worker.take() == {"id": answer["id"]}


@pytest.mark.parametrize(("extra", "status"), [(0, 200), (1, 413)])
def test_a_body_has_ten_megabytes_at_most(stub: RunPodStub, extra: int, status: int) -> None:
    frame = len('{"input":{"a":""}}')
    body = '{"input":{"a":"' + "x" * (10_000_000 - frame + extra) + '"}}'
    assert raw(stub, "POST", "/run", body).status_code == status
    assert len(stub.jobs) == (status == 200)


def test_runsync_takes_twice_as_much_and_answers_the_end(
    stub: RunPodStub, worker: HandWorker
) -> None:
    body = json.dumps({"input": {"a": "x" * 15_000_000}})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(raw, stub, "POST", "/runsync", body)
        job_id = worker.take()["id"]
        worker.done(job_id, output=7)
        result = answer.result(PATIENCE).json()
    assert job_id.startswith("sync-")
    assert (result["status"], result["output"]) == ("COMPLETED", 7)


def test_runsync_does_not_wait_for_ever(stub: RunPodStub) -> None:
    answer = raw(stub, "POST", "/runsync?wait=1000", '{"input": {"a": 1}}').json()
    assert answer["status"] == "IN_QUEUE"
    assert stub.jobs[0].status == "IN_QUEUE"


@pytest.mark.parametrize(("key", "status"), [("Bearer stub-key", 200), ("stub-key", 200),
                                             ("Bearer wrong", 401), ("stub", 401)])  # fmt: skip
def test_a_key_is_needed(stub: RunPodStub, key: str, status: int) -> None:
    assert raw(stub, "GET", "/health", key=key).status_code == status


def test_another_endpoint_is_not_found(stub: RunPodStub) -> None:
    headers = {"Authorization": f"Bearer {stub.api_key}"}
    for path in ("/x", "/another-endpoint/health", "/stub-endpoint-2/health"):
        assert requests.get(stub.url + path, headers=headers, timeout=PATIENCE).status_code == 404


# The way of a job.


def test_a_job_goes_its_way(stub: RunPodStub, client: RunPodClient, worker: HandWorker) -> None:
    job = submit(client, text="fox")
    assert client.status(job.id, waiter()).status == "IN_QUEUE"
    assert worker.take() == {"id": job.id, "input": {"text": "fox"}}
    assert client.status(job.id, waiter()).worker_id == "hand-1"
    worker.done(job.id, status="IN_PROGRESS", output={"step": 3})
    assert client.status(job.id, waiter()).output == {"step": 3}
    worker.done(job.id, output={"images": []})
    status = client.status(job.id, waiter())
    assert (status.status, status.output, status.error) == ("COMPLETED", {"images": []}, None)
    assert status.queue_seconds is not None
    assert status.execution_seconds is not None
    assert [record.executions for record in stub.jobs] == [1]


def test_a_late_progress_does_not_undo_the_end(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    worker.done(job.id, output=1)
    assert worker.done(job.id, status="IN_PROGRESS", output=0) == 200
    assert stub.jobs[0].status == "COMPLETED"
    assert stub.jobs[0].output == 1


def test_chunks_are_handed_out_once(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    for number in range(3):
        assert worker.chunk(job.id, number) == 200
    first = client.stream(job.id, 1, waiter())
    worker.chunk(job.id, 3)
    worker.done(job.id, output=[])
    second, third = client.stream(job.id, 1, waiter()), client.stream(job.id, 1, waiter())
    assert [first.chunks, second.chunks, third.chunks] == [(0, 1, 2), (3,), ()]
    assert [first.is_drained, second.is_drained, third.is_drained] == [False, False, True]
    assert (stub.jobs[0].chunks, stub.jobs[0].delivered) == (4, 4)


def test_an_empty_stream_is_held_until_there_is_something(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.stream, job.id, 20, waiter())
        worker.chunk(job.id, "late")
        assert answer.result(PATIENCE).chunks == ("late",)
    assert stub.calls["stream"] == 1


def test_a_chunk_of_more_than_a_megabyte_is_refused(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    assert worker.chunk(job.id, "x" * 1_000_000) == 400
    assert worker.chunk(job.id, "x" * 900_000) == 200
    assert (stub.jobs[0].chunks, stub.jobs[0].lost_chunks) == (1, 1)


def test_a_result_that_is_too_large_leaves_nothing(
    client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    assert worker.done(job.id, output="x" * 10_000_000) == 400
    status = client.status(job.id, waiter())
    assert (status.status, status.output) == ("COMPLETED", None)


def test_cancelling_a_waiting_job_keeps_workers_from_it(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    first, second = submit(client), submit(client)
    status = client.cancel(first.id, waiter())
    assert status is not None
    assert status.status == "CANCELLED"
    assert worker.take()["id"] == second.id
    assert stub.executions == 1


def test_cancelling_a_running_job_tells_its_worker(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    with ThreadPoolExecutor(1) as pool:
        stops = pool.submit(worker.stops)
        stub.wait_for(lambda s: s.jobs[0].status == "IN_PROGRESS")
        client.cancel(job.id, waiter())
        assert stops.result(PATIENCE) == [job.id]
    worker.done(job.id, output=1)
    assert stub.jobs[0].status == "CANCELLED"


def test_only_a_failed_job_is_retried(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    job = submit(client)
    worker.take()
    assert raw(stub, "POST", f"/retry/{job.id}").status_code == 400
    worker.done(job.id, error="no memory", output={"details": ["x"]})
    assert client.retry(job.id, waiter()).status == "IN_QUEUE"
    assert stub.jobs[0].error is None
    assert worker.take()["id"] == job.id
    worker.done(job.id, output=2)
    assert (stub.jobs[0].output, stub.jobs[0].executions) == (2, 2)


def test_purging_removes_what_waits(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    for _ in range(3):
        submit(client)
    worker.take()
    assert client.purge_queue(waiter()) == 2
    assert [job.status for job in stub.jobs] == ["IN_PROGRESS", "CANCELLED", "CANCELLED"]


def test_a_batch_of_jobs_is_taken_at_once(client: RunPodClient, worker: HandWorker) -> None:
    jobs = [submit(client).id for _ in range(3)]
    assert [job["id"] for job in worker.take_batch(2)] == jobs[:2]
    assert [job["id"] for job in worker.take_batch(2)] == jobs[2:]


def test_health_counts(stub: RunPodStub, client: RunPodClient, worker: HandWorker) -> None:
    for _ in range(3):
        submit(client)
    worker.done(worker.take()["id"], output=1)
    worker.take()
    health = client.health(waiter())
    assert (health.jobs.completed, health.jobs.in_progress, health.jobs.in_queue) == (1, 1, 1)
    assert (health.workers.running, health.workers.idle) == (1, 0)


# Time.


def test_results_are_kept_for_a_while(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    stub.limits.retention = 0.2
    job = submit(client)
    worker.take()
    worker.done(job.id, output=1)
    stub.wait_for(lambda s: not s.jobs[0].known)
    assert raw(stub, "GET", f"/status/{job.id}").status_code == 404


def test_the_ttl_ends_a_job_in_any_state(stub: RunPodStub, worker: HandWorker) -> None:
    body = '{"input": {"a": 1}, "policy": {"ttl": 200}}'
    waiting, running = (raw(stub, "POST", "/run", body).json()["id"] for _ in range(2))
    assert worker.take()["id"] == waiting
    stub.wait_for(lambda s: not any(job.known for job in s.jobs))
    assert worker.stops() == [waiting]
    assert raw(stub, "GET", f"/status/{running}").status_code == 404


@pytest.mark.parametrize(("status", "error"), [("FAILED", "executionTimeout exceeded"),
                                               ("TIMED_OUT", None)])  # fmt: skip
def test_an_execution_timeout(
    stub: RunPodStub, worker: HandWorker, status: str, error: str | None
) -> None:
    stub.faults.timeout_status = status
    raw(stub, "POST", "/run", '{"input": {"a": 1}, "policy": {"executionTimeout": 100}}')
    job_id = worker.take()["id"]
    stub.wait_for(lambda s: s.jobs[0].status not in ("IN_QUEUE", "IN_PROGRESS"))
    assert (stub.jobs[0].status, stub.jobs[0].error) == (status, error)
    assert worker.stops() == [job_id]


def test_a_silent_worker_is_given_up_twice(stub: RunPodStub, worker: HandWorker) -> None:
    stub.limits.worker_silence = 0.2
    raw(stub, "POST", "/run", '{"input": {"a": 1}}')
    other = HandWorker(stub, "hand-2")
    first, second = worker.take(), other.take()
    assert first == second
    stub.wait_for(lambda s: s.jobs[0].status == "FAILED")
    assert stub.jobs[0].error == "job timed out after 1 retries"
    assert stub.jobs[0].workers == ("hand-1", "hand-2")


@pytest.mark.parametrize("sign", ["ping", "chunk", "progress"])
def test_signs_of_life_keep_a_job(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker, sign: str
) -> None:
    stub.limits.worker_silence = 1.0
    job = submit(client)
    worker.take()
    signs: dict[str, Callable[[], int]] = {
        "ping": lambda: worker.ping(job.id),
        "chunk": lambda: worker.chunk(job.id, 1),
        "progress": lambda: worker.done(job.id, status="IN_PROGRESS", output=1),
    }
    over = threading.Event()
    for _ in range(6):
        assert signs[sign]() == 200
        over.wait(0.25)
    assert (stub.jobs[0].status, stub.jobs[0].retries) == ("IN_PROGRESS", 0)
    stub.wait_for(lambda s: s.jobs[0].status == "IN_QUEUE")


# Rate limits and faults.


def test_too_many_calls_are_answered_with_429(stub: RunPodStub) -> None:
    stub.limits.calls["run"] = (2, 10)
    body = '{"input": {"a": 1}}'
    statuses = [raw(stub, "POST", "/run", body).status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert len(stub.jobs) == 2


def test_too_many_calls_at_once_are_answered_with_429(
    stub: RunPodStub, client: RunPodClient
) -> None:
    stub.limits.calls["stream"] = (100, 1)
    job = submit(client)
    with ThreadPoolExecutor(2) as pool:
        calls = {pool.submit(raw, stub, "GET", f"/stream/{job.id}?wait=60000") for _ in range(2)}
        refused, held = wait(calls, PATIENCE, FIRST_COMPLETED)
        assert [call.result().status_code for call in refused] == [429]
        client.cancel(job.id, waiter())
        assert [call.result(PATIENCE).status_code for call in held] == [200]


def test_a_job_can_be_executed_twice(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    stub.faults.execute_twice()
    job = submit(client)
    other = HandWorker(stub, "hand-2")
    assert worker.take() == other.take()
    worker.chunk(job.id, "a")
    other.chunk(job.id, "b")
    other.done(job.id, output="b")
    worker.done(job.id, output="a")
    assert client.stream(job.id, 1, waiter()).chunks == ("a", "b")
    assert (stub.jobs[0].output, stub.jobs[0].executions) == ("b", 2)


def test_the_same_worker_can_get_a_job_again(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    stub.faults.execute_twice()
    job = submit(client)
    worker.take()
    worker.done(job.id, output=1)
    assert worker.take()["id"] == job.id
    worker.done(job.id, output=2)
    assert (stub.jobs[0].output, stub.jobs[0].executions) == (1, 2)


def test_a_chunk_can_be_lost(stub: RunPodStub, client: RunPodClient, worker: HandWorker) -> None:
    stub.faults.lose_chunk(1)
    job = submit(client)
    worker.take()
    assert [worker.chunk(job.id, number) for number in range(3)] == [200, 200, 200]
    assert client.stream(job.id, 1, waiter()).chunks == (0, 2)
    assert stub.jobs[0].lost_chunks == 1


def test_a_worker_can_fall_silent(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    stub.limits.worker_silence = 0.2
    stub.faults.silence_worker(after_chunks=1)
    job = submit(client)
    worker.take()
    worker.chunk(job.id, "heard")
    worker.chunk(job.id, "not heard")
    worker.done(job.id, output=1)
    other = HandWorker(stub, "hand-2")
    assert other.take()["id"] == job.id
    stub.limits.worker_silence = PATIENCE  # this one may take its time
    other.done(job.id, output=2)
    assert client.stream(job.id, 1, waiter()).chunks == ("heard",)
    assert (stub.jobs[0].output, stub.jobs[0].retries) == (2, 1)


def test_a_result_can_be_lost(stub: RunPodStub, client: RunPodClient, worker: HandWorker) -> None:
    stub.faults.lose_result()
    for expected in (None, 1):
        job = submit(client)
        worker.take()
        worker.done(job.id, output=1)
        assert client.status(job.id, waiter()).output == expected


@pytest.mark.parametrize(
    ("stuck", "throttled", "unhealthy"),
    [("throttled", 1, 0), ("unhealthy", 0, 1), ("no workers", 0, 0)],
)
def test_a_queue_can_be_stuck(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker,
    stuck: str, throttled: int, unhealthy: int,
) -> None:  # fmt: skip
    stub.faults.stuck_queue = stuck
    job = submit(client)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(worker.take)
        workers = client.health(waiter()).workers
        assert (workers.throttled, workers.unhealthy) == (throttled, unhealthy)
        assert workers.idle == workers.running == workers.ready == 0
        assert stub.jobs[0].executions == 0
        stub.faults.stuck_queue = None
        assert taken.result(PATIENCE)["id"] == job.id


def test_a_worker_that_wants_a_fresh_container_gets_no_more(
    stub: RunPodStub, client: RunPodClient, worker: HandWorker
) -> None:
    stub.limits.worker_poll = 0.1
    first, second = submit(client), submit(client)
    worker.take()
    worker.done(first.id, output=1, stopPod=True)
    assert stub.stopped_workers == ["hand-1"]
    assert worker.take() is None
    assert HandWorker(stub, "hand-2").take()["id"] == second.id


# The stub itself.


def test_clear_forgets_everything(stub: RunPodStub, client: RunPodClient) -> None:
    job = submit(client)
    stub.limits.chunk_bytes = 1
    stub.faults.stuck_queue = "throttled"
    stub.clear()
    assert stub.jobs == []
    assert stub.requests == []
    assert stub.faults.stuck_queue is None
    assert stub.limits.chunk_bytes == 1_000_000
    assert raw(stub, "GET", f"/status/{job.id}").status_code == 404


def test_stopping_ends_every_thread_and_every_wait() -> None:
    before = set(threading.enumerate())
    with RunPodStub() as stub, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(HandWorker(stub).take)
        stub.wait_for(lambda s: taken.running())
        stub.stop()
        with pytest.raises(requests.ConnectionError):
            taken.result(PATIENCE)
    assert set(threading.enumerate()) - before == set()


def test_waiting_in_vain_says_for_what(stub: RunPodStub, client: RunPodClient) -> None:
    submit(client)
    with pytest.raises(TimeoutError, match=r"len\(s.jobs\) == 2.*jobs: 1 IN_QUEUE"):
        stub.wait_for(lambda s: len(s.jobs) == 2, timeout=0.01)


# With the SDK's own worker loop.

_HANDLER = """
import asyncio, pathlib, runpod

async def handler(job):
    try:
        for number in range(job["input"]["n"]):
            yield {"number": number}
        if job["input"].get("fail"):
            raise RuntimeError("out of memory")
        if job["input"].get("hang"):
            await asyncio.sleep(3600)
    except asyncio.CancelledError:
        pathlib.Path(job["input"]["hang"]).write_text("cancelled")
        raise

runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
"""


@needs_sdk
def test_the_sdk_runs_a_generator(stub: RunPodStub, client: RunPodClient, tmp_path: Path) -> None:
    with sdk_worker(stub, _HANDLER, tmp_path):
        job = submit(client, n=3)
        chunks: list[Any] = []
        stream = client.stream(job.id, 20, waiter(60))
        while not stream.is_drained:
            chunks += stream.chunks
            stream = client.stream(job.id, 20, waiter(60))
        status = client.status(job.id, waiter())
        stub.wait_for(lambda s: s.calls["ping"] > 0)
    assert chunks == status.output == [{"number": number} for number in range(3)]
    assert status.failure() is None
    assert (stub.executions, stub.calls["job-stream"], stub.calls["job-done"]) == (1, 3, 1)


@needs_sdk
def test_cancelling_reaches_the_handler_in_the_sdk(
    stub: RunPodStub, client: RunPodClient, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with sdk_worker(stub, _HANDLER, tmp_path):
        job = submit(client, n=1, hang=str(mark))
        stub.wait_for(lambda s: s.jobs[0].chunks == 1, 60)
        client.cancel(job.id, waiter())
        after = submit(client, n=0)
        stub.wait_for(lambda s: s.jobs[1].status == "COMPLETED", 60)
    # One handler at a time: the first ended before the second began.
    assert mark.read_text() == "cancelled"
    assert [record.status for record in stub.jobs] == ["CANCELLED", "COMPLETED"]
    assert client.status(after.id, waiter()).output == []
    assert stub.calls["job-done"] == 1


@needs_sdk
def test_a_failing_handler_in_the_sdk(
    stub: RunPodStub, client: RunPodClient, tmp_path: Path
) -> None:
    with sdk_worker(stub, _HANDLER, tmp_path):
        job = submit(client, n=1, fail=True)
        stub.wait_for(lambda s: s.jobs[0].status == "FAILED", 60)
    failure = client.status(job.id, waiter()).failure()
    assert failure is not None
    assert str(failure) == f"job {job.id}: failed: out of memory"
    assert "RuntimeError" in vars(failure)["traceback"]


@needs_sdk
def test_a_killed_worker_is_replaced(
    stub: RunPodStub, client: RunPodClient, tmp_path: Path
) -> None:
    stub.limits.worker_silence = 3.0
    with sdk_worker(stub, _HANDLER, tmp_path) as process:
        job = submit(client, n=1, hang=str(tmp_path / "mark"))
        stub.wait_for(lambda s: s.jobs[0].chunks == 1, 60)
        kill(process)
        worker = HandWorker(stub)
        assert worker.take()["id"] == job.id
        worker.done(job.id, output="after all")
    assert stub.jobs[0].workers == ("worker-1", "hand-1")
    assert client.status(job.id, waiter()).output == "after all"
