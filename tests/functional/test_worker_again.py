"""Jobs that come a second time to the same worker, and outputs that go to a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from server_kit import PATIENCE, bench_graph, statuses
from worker_kit import Answer, bench_document, document, node, put_together

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import OutputFileError
from comfy_executors.workers.engine import Engine, Execution
from comfy_executors.workers.storage import S3Storage

# On Python 3.9 boto3 says goodbye to it.
pytestmark = pytest.mark.filterwarnings("ignore:Boto3 will no longer support:Warning")


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def engine(server: DevServer) -> Iterator[Engine]:
    with Engine(server.url, ready_timeout=PATIENCE) as started:
        yield started


def run(engine: Engine, job: wire.JobDocument) -> Answer:
    return put_together(engine.start(job), job)


def until(execution: Execution, kind: str, **facts: Any) -> list[dict[str, Any]]:
    """Take events up to the first of this kind with these facts."""
    events = []
    for event in execution:
        events.append(event)
        if event["kind"] == kind and all(event.get(k) == v for k, v in facts.items()):
            return events
    raise AssertionError(f"no {kind} in {events}")


# The same job again.


def test_a_job_that_comes_again_is_answered_without_running(
    server: DevServer, engine: Engine
) -> None:
    job = bench_document(3, batch_size=2)
    first, second = run(engine, job), run(engine, job)
    assert [first.attempts, second.attempts] == [{1}, {2}]
    assert sorted(map(str, second.summary())) == sorted(map(str, first.summary()))
    assert len(server.prompts) == 3
    assert second.kinds["progress"] == 0


def test_a_file_that_is_gone_makes_its_batch_run_again(server: DevServer, engine: Engine) -> None:
    job = bench_document(3)
    first = run(engine, job)
    gone = server.directory / "output" / first.batches[1].outputs[0].name
    gone.unlink()
    second = run(engine, job)
    assert sorted(second.batches) == [0, 1, 2]
    assert len(server.prompts) > 3
    assert second.data(0) == first.data(0)


def test_a_file_that_was_changed_makes_its_batch_run_again(
    server: DevServer, engine: Engine
) -> None:
    job = bench_document(2)
    first = run(engine, job)
    changed = server.directory / "output" / first.batches[1].outputs[0].name
    changed.write_bytes(b"something else")
    second = run(engine, job)
    assert len(server.prompts) > 2
    assert second.data(0) == first.data(0)


def test_only_what_failed_runs_again(server: DevServer, engine: Engine) -> None:
    job = document(bench_graph(seed=1), bench_graph(seed=2, fail="no"), bench_graph(seed=3))
    answers = [run(engine, job) for _ in range(2)]
    assert [sorted(answer.batches) for answer in answers] == [[0, 2], [0, 2]]
    assert [list(answer.failures) for answer in answers] == [[1], [1]]
    assert statuses(server) == {"success": 2, "error": 2}


def test_a_job_that_was_cancelled_goes_on_where_it_was(server: DevServer, engine: Engine) -> None:
    graphs = [bench_graph(seed=1), bench_graph(1.0, seed=2, steps=100)]
    job = document(*graphs)
    execution = engine.start(job)
    until(execution, "batch", batch=0)
    execution.cancel()
    answer = run(engine, job)
    assert answer.attempts == {2}
    assert sorted(answer.batches) == [0, 1]
    seeds = [prompt.graph["1"]["inputs"]["seed"] for prompt in server.prompts]
    assert seeds.count(1) == 1


def test_another_graph_under_the_same_number_is_run(server: DevServer, engine: Engine) -> None:
    job = bench_document(1)
    run(engine, job)
    other = document(bench_graph(seed=77), request_id=job.request_id)
    answer = run(engine, other)
    assert answer.attempts == {2}
    assert len(server.prompts) == 2


def test_text_is_made_again_as_it_lies_in_no_folder(server: DevServer, engine: Engine) -> None:
    graph = {**bench_graph(), "3": node("PreviewAny", source="text")}
    job = document(graph)
    first, second = run(engine, job), run(engine, job)
    assert first.data(0) == second.data(0)
    assert [len(server.prompts), server.node_runs["BenchSampler"]] == [2, 1]


def test_a_job_that_comes_while_it_is_under_way_waits_for_itself(
    server: DevServer, engine: Engine
) -> None:
    job = bench_document(2, 0.3)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(run, engine, job) for _ in range(2)]
        results = [answer.result(PATIENCE) for answer in answers]
    assert sorted(attempt for answer in results for attempt in answer.attempts) == [1, 2]
    assert results[0].batches.keys() == results[1].batches.keys() == {0, 1}
    assert len(server.prompts) == 2


def test_two_jobs_share_the_comfyui(server: DevServer, engine: Engine) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda n: run(engine, bench_document(n)), (3, 4)))
    assert [len(answer.batches) for answer in answers] == [3, 4]


# S3.


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    peer = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    peer.start()
    host, port = peer.get_host_and_port()
    yield f"http://{host}:{port}"
    peer.stop()


@pytest.fixture
def storage(s3: str) -> S3Storage:
    made = S3Storage(s3, "key-id", "s3cr3t-key", "pictures")
    made._client.create_bucket(Bucket="pictures")
    return made


def test_outputs_go_to_the_bucket_and_their_addresses_into_the_events(
    server: DevServer, storage: S3Storage
) -> None:
    with Engine(server.url, storage=storage) as engine:
        job = bench_document(2, batch_size=2, width=512, height=512)
        answer = run(engine, job)
        assert run(engine, job).attempts == {2}
    outputs = [output for batch in answer.batches.values() for output in batch.outputs]
    assert answer.kinds["output"] == len(outputs) == 4
    for output in outputs:
        assert output.url is not None
        found = requests.get(output.url, timeout=PATIENCE)
        assert output.matches(found.content)
        assert found.headers["Content-Type"] == "image/png"
    listed = storage._client.list_objects_v2(Bucket="pictures")["Contents"]
    assert len([item for item in listed if item["Key"].startswith(job.request_id)]) == 4


def test_without_its_bucket_the_events_carry_the_bytes(
    server: DevServer, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = S3Storage(s3, "key-id", "s3cr3t-key", "no-such-bucket")
    with Engine(server.url, storage=storage) as engine:
        answer = run(engine, bench_document(1))
    assert answer.batches[0].outputs[0].data is not None
    assert "NoSuchBucket; it is sent in the events instead" in caplog.text
    assert "s3cr3t" not in caplog.text + repr(storage)


def test_a_bucket_out_of_reach_is_our_error(tmp_path: Path) -> None:
    storage = S3Storage("http://127.0.0.1:9", "key-id", "s3cr3t-key")
    with pytest.raises(OutputFileError, match="EndpointConnectionError"):
        storage.put("a.png", b"x")


@pytest.mark.parametrize("missing", ["BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"])
def test_a_bucket_needs_its_keys(missing: str) -> None:
    environment = {
        "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9",
        "BUCKET_ACCESS_KEY_ID": "a",
        "BUCKET_SECRET_ACCESS_KEY": "b",
    }
    assert S3Storage.from_environment(environment) is not None
    with pytest.raises(ValueError, match=missing):
        S3Storage.from_environment({**environment, missing: ""})
    assert S3Storage.from_environment({}) is None
