"""The handler of a RunPod worker: under the SDK's own loop, and under its test server."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from runpod_worker import client_of, kill, needs_sdk, sdk_worker, waiter
from server_kit import ENDLESS, PATIENCE, bench_graph, statuses
from worker_kit import HOSTILE, Answer, bench_document, document, load_graph, put_together

from comfy_executors import wire
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import RunPodStatus
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    NodeExecutionError,
    WorkflowRejectedError,
)
from comfy_executors.testing import RunPodStub

HANDLER = Path(__file__).parents[2] / "comfy_executors" / "workers" / "runpod_handler.py"
START = "from comfy_executors.workers.runpod_handler import main\n\nmain()\n"


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


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
def worker(
    stub: RunPodStub, server: DevServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("COMFYUI_ADDRESS", server.address)
    with sdk_worker(stub, START, tmp_path) as process:
        yield process


def submit(client: RunPodClient, request: dict[str, Any]) -> str:
    job = client.submit(
        request, execution_timeout=60, ttl=600, waiter=waiter(), request_id=str(uuid.uuid4())
    )
    return job.id


def drained(client: RunPodClient, job_id: str) -> list[dict[str, Any]]:
    """Take a job's stream to its end."""
    chunks: list[dict[str, Any]] = []
    while True:
        answer = client.stream(job_id, 5, waiter())
        chunks += answer.chunks
        if answer.is_drained:
            return chunks


def run(client: RunPodClient, job: wire.JobDocument) -> tuple[Answer, RunPodStatus]:
    job_id = submit(client, wire.encode_request(job))
    answer = put_together(drained(client, job_id), job)
    return answer, client.status(job_id, waiter())


# Under the SDK's own loop.


@needs_sdk
def test_a_job_is_streamed_and_its_result_holds_everything(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    job = bench_document(3, batch_size=2)
    answer, status = run(client, job)
    assert sorted(answer.batches) == [0, 1, 2]
    assert answer.missing == []
    assert server.node_runs == {"BenchSampler": 3, "SaveImage": 3}
    assert status.status == "COMPLETED"
    again = assembled(job, status.output)
    assert again.keys() == answer.batches.keys()
    assert [again[index].outputs for index in again] == [
        answer.batches[index].outputs for index in again
    ]
    assert [stub.executions, stub.jobs[0].lost_chunks] == [1, 0]


def assembled(job: wire.JobDocument, events: Any) -> dict[int, wire.CompleteBatch]:
    assembler = wire.Assembler(item.batch for item in job.graphs)
    news = [item for event in events for item in assembler.add(event)]
    return {item.batch: item for item in news if isinstance(item, wire.CompleteBatch)}


@needs_sdk
def test_images_and_the_document_are_one_request(
    server: DevServer, client: RunPodClient, worker: Any
) -> None:
    picture = run(client, bench_document(1))[0].batches[0].outputs[0].data
    files = (wire.InputFile("ab_0000.png", picture),)
    job = document(load_graph("ab_0000.png"), input_images=files)
    request = wire.encode_request(job, joined=job.graphs[0].graph)
    answer = put_together(drained(client, submit(client, request)), job)
    assert len(answer.batches) == 1
    assert server.node_runs["LoadImage"] == 1


@needs_sdk
def test_more_than_a_result_may_hold_comes_by_the_stream(
    stub: RunPodStub, client: RunPodClient, worker: Any
) -> None:
    job = bench_document(5, width=1024, height=1024)
    answer, status = run(client, job)
    assert sum(output.size for batch in answer.batches.values() for output in batch.outputs) > 12e6
    assert len(answer.batches) == 5
    assert stub.jobs[0].lost_chunks == 0
    assert status.output is not None
    assert len(json.dumps(status.output)) < 9_500_000
    assembler = wire.Assembler(range(5))
    whole = [n for event in status.output for n in assembler.add(event)]
    assert [type(item) for item in whole].count(wire.CompleteBatch) == 1
    assert {(item.batch, item.output) for item in assembler.missing()} == {
        (index, 1) for index in assembler.unsettled
    }


@needs_sdk
def test_a_chunk_that_the_stream_lost_is_in_the_result(
    stub: RunPodStub, client: RunPodClient, worker: Any
) -> None:
    stub.faults.lose_chunk(0)
    for number in range(4, 9):
        stub.faults.lose_chunk(number)
    job = bench_document(2)
    job_id = submit(client, wire.encode_request(job))
    assembler = wire.Assembler([0, 1])
    news = [n for event in drained(client, job_id) for n in assembler.add(event)]
    assert assembler.missing()
    output = client.status(job_id, waiter()).output
    assert output is not None
    news += [n for event in output for n in assembler.add(event)]
    assert assembler.missing() == []
    assert sorted(n.batch for n in news if isinstance(n, wire.CompleteBatch)) == [0, 1]
    assert stub.jobs[0].lost_chunks == 6


@needs_sdk
def test_nothing_is_sent_before_an_output_when_nobody_looks(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    graphs = [bench_graph(), bench_graph(ENDLESS, seed=2, steps=1000)]
    job = document(*graphs, options=wire.JobOptions(progress=False))
    job_id = submit(client, wire.encode_request(job))
    stub.wait_for(lambda s: s.jobs[0].chunks == 3, PATIENCE)
    kinds = [chunk["kind"] for chunk in client.stream(job_id, 1, waiter()).chunks]
    assert kinds == ["started", "output", "batch"]
    client.cancel(job_id, waiter())
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)


@needs_sdk
def test_cancelling_empties_the_queue_and_the_next_job_runs(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    job_id = submit(client, wire.encode_request(bench_document(6, ENDLESS, steps=1000)))
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
    client.cancel(job_id, waiter())
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    answer, status = run(client, bench_document(2))
    assert len(answer.batches) == 2
    assert status.status == "COMPLETED"
    assert statuses(server)["success"] == 2
    assert len(server.prompts) == 4


@needs_sdk
def test_cancelling_while_a_chunk_is_on_its_way_empties_the_queue_at_once(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    job_id = submit(client, wire.encode_request(bench_document(3, ENDLESS, steps=10_000)))
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
    stub.faults.delay("POST", "/job-stream/*", 3600.0, times=1)
    stub.wait_for(lambda s: not s.faults._rules, PATIENCE)  # it holds a chunk now
    client.cancel(job_id, waiter())
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    assert statuses(server)["success"] == 0


@needs_sdk
def test_a_job_that_the_platform_begins_twice_is_executed_once(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    stub.faults.execute_twice()
    job = bench_document(2)
    job_id = submit(client, wire.encode_request(job))
    events = drained(client, job_id)
    stub.wait_for(lambda s: s.calls["job-done"] == 2, PATIENCE)
    assert stub.executions == 2
    assert len(server.prompts) == 2
    assembler = wire.Assembler([0, 1])
    news = [n for event in events for n in assembler.add(event)]
    assert sorted(n.batch for n in news if isinstance(n, wire.CompleteBatch)) == [0, 1]


@needs_sdk
def test_a_sick_comfyui_gets_the_worker_replaced(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: subprocess.Popen[bytes]
) -> None:
    graph = bench_graph(fail="CUDA error: an illegal memory access was encountered")
    answer, status = run(client, document(graph))
    assert isinstance(answer.failures[0], NodeExecutionError)
    assert status.status == "COMPLETED"
    stub.wait_for(lambda s: s.stopped_workers == ["worker-1"], PATIENCE)
    assert worker.wait(PATIENCE) == 0


@needs_sdk
def test_a_healthy_worker_stays(
    stub: RunPodStub, client: RunPodClient, worker: subprocess.Popen[bytes]
) -> None:
    for _ in range(2):
        answer, _ = run(client, document(bench_graph(fail="out of luck")))
        assert list(answer.failures) == [0]
    assert stub.stopped_workers == []
    assert worker.poll() is None


@needs_sdk
def test_a_job_that_fails_wholly_is_told_by_its_events(
    client: RunPodClient, server: DevServer, worker: Any
) -> None:
    request = wire.encode_request(bench_document(1))
    request["comfy_executors"]["version"] = 99
    job_id = submit(client, request)
    answer = put_together(drained(client, job_id), bench_document(1))
    assert isinstance(answer.failures[None], WorkflowRejectedError)
    assert "version 1, not 99" in str(answer.failures[None])
    assert client.status(job_id, waiter()).status == "COMPLETED"
    assert server.prompts == []


@needs_sdk
def test_the_official_workers_input_gets_its_answer(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    job_id = submit(client, {"workflow": bench_graph(batch_size=2)})
    stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", PATIENCE)
    answer = client.status(job_id, waiter()).output
    assert set(answer) == {"images"}
    assert stub.jobs[0].chunks == 0
    assert [set(image) for image in answer["images"]] == [{"filename", "type", "data"}] * 2
    assert [base64.b64decode(image["data"]) for image in answer["images"]] == [
        (server.directory / "output" / image["filename"]).read_bytes() for image in answer["images"]
    ]


@needs_sdk
def test_an_official_answer_that_runpod_would_lose_says_what_to_do(
    stub: RunPodStub, client: RunPodClient, worker: Any
) -> None:
    submit(client, {"workflow": bench_graph(width=1500, height=1500, batch_size=2)})
    stub.wait_for(lambda s: s.jobs[0].status == "FAILED", PATIENCE)
    assert "BUCKET_ENDPOINT_URL" in (stub.jobs[0].error or "")


@needs_sdk
def test_the_official_inputs_key_reaches_the_prompt(
    stub: RunPodStub, server: DevServer, client: RunPodClient, worker: Any
) -> None:
    submit(client, {"workflow": bench_graph(), "comfy_org_api_key": "hush"})
    stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", PATIENCE)
    (entry,) = requests.get(f"{server.url}/history", timeout=PATIENCE).json().values()
    assert entry["prompt"][3]["api_key_comfy_org"] == "hush"
    assert "hush" not in str(stub.jobs[0].output)


@needs_sdk
def test_the_official_workers_failures_fail_the_job(
    stub: RunPodStub, client: RunPodClient, worker: Any
) -> None:
    bad: list[dict[str, Any]] = [
        {"workflow": bench_graph(fail="out of luck")},
        {"images": []},
        {"workflow": bench_graph(), "comfy_org_api_key": ["secret"]},
        {"workflow": load_graph("a.png"), "images": [{"name": "../a.png", "image": "AAAA"}]},
    ]
    for request in bad:
        submit(client, request)
    stub.wait_for(lambda s: all(job.status == "FAILED" for job in s.jobs), PATIENCE)
    errors = [job.error for job in stub.jobs]
    words = ["out of luck", "needs a workflow", "must be a string", "without folders"]
    assert [word in error for word, error in zip(words, errors)] == [True] * 4
    assert "secret" not in str(errors)


# Under the SDK's test server.


@contextlib.contextmanager
def api_server(server: DevServer) -> Iterator[str]:
    """Run the handler's file as the SDK's documents say, on a free port."""
    process = subprocess.Popen(
        [sys.executable, str(HANDLER), "--rp_serve_api", "--rp_api_port", "0"],
        env={**os.environ, "COMFYUI_ADDRESS": server.address, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    addresses = (re.search(rb"running on (http://[^ ]+)", line) for line in process.stdout)
    reader = None
    try:
        address = next(found.group(1).decode() for found in addresses if found)
        # A pipe that nobody reads would stop the server.
        reader = threading.Thread(target=process.stdout.read)
        reader.start()
        yield address
    finally:
        kill(process)
        if reader is not None:
            reader.join()
        process.stdout.close()


@pytest.fixture
def api(server: DevServer) -> Iterator[str]:
    with api_server(server) as address:
        yield address


def post(api: str, path: str, request: dict[str, Any] | None = None) -> Any:
    body = None if request is None else {"input": request}
    return requests.post(f"{api}{path}", json=body, timeout=PATIENCE).json()


@needs_sdk
def test_the_test_server_answers_with_all_events(api: str, server: DevServer) -> None:
    job = bench_document(3, width=1024, height=1024)
    answer = post(api, "/runsync", wire.encode_request(job))
    assert answer["status"] == "COMPLETED"
    together = put_together(answer["output"], job)
    assert sorted(together.batches) == [0, 1, 2]
    assert sum(batch.outputs[0].size for batch in together.batches.values()) > 9_000_000
    assert server.node_runs["BenchSampler"] == 3


@needs_sdk
def test_the_test_server_streams_at_the_end(api: str) -> None:
    job = document(bench_graph(), bench_graph(seed=2, fail="out of luck"))
    job_id = post(api, "/run", wire.encode_request(job))["id"]
    answer = post(api, f"/stream/{job_id}")
    together = put_together([chunk["output"] for chunk in answer["stream"]], job)
    assert list(together.batches) == [0]
    assert isinstance(together.failures[1], NodeExecutionError)


@needs_sdk
def test_the_test_server_that_runs_a_job_twice_executes_it_once(
    api: str, server: DevServer
) -> None:
    job = bench_document(2, 0.3)
    job_id = post(api, "/run", wire.encode_request(job))["id"]
    with ThreadPoolExecutor(2) as pool:
        paths = [f"/status/{job_id}", f"/stream/{job_id}"]
        first, second = pool.map(lambda path: post(api, path), paths)
    assert [first["status"], second["status"]] == ["COMPLETED"] * 2
    found = [first["output"], [chunk["output"] for chunk in second["stream"]]]
    assert [len(put_together(events, job).batches) for events in found] == [2, 2]
    assert len(server.prompts) == 2


@needs_sdk
def test_the_test_server_answers_the_official_input(api: str) -> None:
    (answer,) = post(api, "/runsync", {"workflow": bench_graph()})["output"]
    assert [image["type"] for image in answer["images"]] == ["base64"]
    (failed,) = post(api, "/runsync", {"workflow": bench_graph(fail="out of luck")})["output"]
    assert "out of luck" in failed["error"]


@needs_sdk
def test_the_test_server_refuses_hostile_documents(api: str, server: DevServer) -> None:
    for changes, kind, _ in HOSTILE:
        raw = {**wire.encode_document(bench_document(1)), **changes}
        answer = post(api, "/runsync", {"comfy_executors": raw})
        failures = put_together(answer["output"], bench_document(1)).failures
        assert [type(error) for error in failures.values()] == [kind]
    assert server.requests == []
