"""RunPod with our worker: the stub, the SDK's own worker loop, our handler, the dev server."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runpod_worker import client_of, needs_sdk, submit
from server_kit import (
    ENDLESS,
    PATIENCE,
    bench,
    bench_but,
    bench_graph,
    ended,
    loading,
    served,
    statuses,
)
from worker_kit import bench_document

from comfy_executors import (
    InputImageError,
    JobExpiredError,
    JobInterruptedError,
    JobTimeoutError,
    NodeExecutionError,
    PayloadTooLargeError,
    RunPodWorkflowExecutor,
    SubmitUncertainError,
    WorkerLostError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTemplate,
    wire,
)
from comfy_executors.cli import main
from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.devserver import DevServer
from comfy_executors.executors import job_budgets, runpod_job
from comfy_executors.testing import RunPodStub, RunPodWorkerProcess

pytestmark = needs_sdk

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[DevServer, RunPodStub]]:
    with DevServer() as server, RunPodStub() as stub:  # noqa: SIM117  too long for Python 3.9
        with RunPodWorkerProcess(stub, server.address) as worker:
            yield server, stub
            print(worker.log)  # shown when a test fails


@pytest.fixture
def server(site: tuple[DevServer, RunPodStub]) -> Iterator[DevServer]:
    site[0].reset()
    yield site[0]
    idle(site[0])


@pytest.fixture
def stub(site: tuple[DevServer, RunPodStub]) -> Iterator[RunPodStub]:
    site[1].clear()
    yield site[1]
    site[1].clear()


@pytest.fixture
def make(stub: RunPodStub) -> Iterator[Callable[..., RunPodWorkflowExecutor]]:
    made: list[RunPodWorkflowExecutor] = []

    def make(**options: Any) -> RunPodWorkflowExecutor:
        made.append(RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.close(cancel=True)


def idle(server: DevServer) -> None:
    """Wait until nothing is left on the server."""
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)


Make = Callable[..., RunPodWorkflowExecutor]


def delivered(run: Any, count: int) -> None:
    """Check that every batch was delivered, each once."""
    assert Counter(image.batch_index for image in run) == Counter(range(count))


# Jobs.


def test_a_run_is_one_job_whose_shared_nodes_run_once(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    delivered(make().submit_workflow(loaded_and_noised(), [picture()], num_samples=16), 16)
    assert [job.executions for job in stub.jobs] == [1]
    assert server.node_runs["LoadImage"] == 1
    assert served(server)["POST /upload/image"] == 1
    assert statuses(server) == {"success": 16}


def loaded_and_noised() -> WorkflowTemplate:
    """An input image that all batches share, beside what the seed makes."""
    load = {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "t"}}
    noise = bench_graph()["1"]
    blend = {"image1": ["4", 0], "image2": ["1", 0], "blend_factor": 0.5, "blend_mode": "normal"}
    graph = {"4": load, "1": noise, "2": save, "3": {"class_type": "ImageBlend", "inputs": blend}}
    return WorkflowTemplate(json.dumps(graph))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


def test_batches_per_job_divides_a_run(make: Make, stub: RunPodStub) -> None:
    run = make(batches_per_job=4).submit_workflow(bench(), num_samples=10)
    results = [future.result(PATIENCE) for future in run.futures]
    documents = [job.input["comfy_executors"] for job in stub.jobs]
    assert sorted(len(document["graphs"]) for document in documents) == [2, 4, 4]
    assert len({document["request_id"] for document in documents}) == 3
    assert {result.job_id for result in results} == {job.id for job in stub.jobs}


def test_images_arrive_while_the_job_runs(make: Make, stub: RunPodStub) -> None:
    run = make().submit_workflow(bench(0.3), num_samples=6)
    assert next(run).data.startswith(PNG)
    assert [job.status for job in stub.jobs] == ["IN_PROGRESS"]
    assert len(list(run)) == 5


def slow_second_picture() -> WorkflowTemplate:
    """A picture at once, and then another one that never comes."""
    graph = bench_graph()
    graph["3"] = bench_graph(ENDLESS, seed=5, steps=1000, text=["1", 1])["1"]
    graph["4"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["3", 0], "filename_prefix": "late"},
    }
    return WorkflowTemplate.from_graph(graph)


def test_an_image_is_on_disk_while_the_rest_of_its_graph_runs(
    make: Make, server: DevServer, tmp_path: Path
) -> None:
    second = threading.Event()
    run = make().submit_workflow(
        slow_second_picture(),
        output_dir=tmp_path,
        on_progress=lambda event: second.set() if event.node == "3" else None,
    )
    assert second.wait(PATIENCE)
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes().startswith(PNG)
    assert statuses(server) == {"running": 1}
    run.cancel()
    with pytest.raises(WorkflowCancelledError):
        run.futures[0].result(PATIENCE)
    assert list(tmp_path.iterdir()) == []  # it was part of a batch that did not come to its end


def test_what_a_failed_batch_saved_is_removed(make: Make, tmp_path: Path) -> None:
    graph = bench_graph()
    graph["3"] = bench_graph(0.0, seed=5, fail="boom", text=["1", 1])["1"]
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "b"}}
    template = WorkflowTemplate.from_graph(graph)
    run = make().submit_workflow(template, num_samples=2, output_dir=tmp_path, ignore_errors=True)
    assert list(run) == []
    assert [type(error) for error in run.errors.values()] == [NodeExecutionError] * 2
    assert list(tmp_path.iterdir()) == []


def test_output_dir_has_each_image_of_a_job_once(
    make: Make, stub: RunPodStub, tmp_path: Path
) -> None:
    stub.faults.execute_twice()
    run = make().submit_workflow(bench(batch_size=2), num_samples=4, output_dir=tmp_path)
    paths = [image.path for image in run]
    assert sorted(path for path in paths if path) == sorted(tmp_path.iterdir())
    assert len(set(paths)) == 8
    assert run.done()


def test_the_policy_holds_both_budgets(make: Make, stub: RunPodStub) -> None:
    executor = make(queue_timeout=100, execution_timeout=50, max_workers=3)
    executor.submit_workflow(bench()).result(PATIENCE)
    # Two others of ours may have to run before it.
    assert stub.jobs[0].policy == {"executionTimeout": 50_000, "ttl": 510_000}


def test_the_policy_stays_within_runpods_week(make: Make, stub: RunPodStub) -> None:
    executor = make(queue_timeout=300_000, execution_timeout=300_000)
    executor.submit_workflow(bench()).result(PATIENCE)
    assert stub.jobs[0].policy == {"executionTimeout": 300_000_000, "ttl": 604_800_000}


@pytest.mark.parametrize("worker", ["auto", "comfy-executors"])
def test_what_a_request_holds(make: Make, stub: RunPodStub, worker: str) -> None:
    make(worker=worker).submit_workflow(loading(), [picture()]).result(PATIENCE)
    request = stub.jobs[0].input
    (name,) = [image["name"] for image in request["images"]]
    assert request["comfy_executors"]["input_images"] == [{"name": name}]
    assert ("workflow" in request) is (worker == "auto")


def test_input_images_may_be_urls(make: Make, stub: RunPodStub) -> None:
    url = "https://127.0.0.1:1/fox.webp?key=secret"
    run = make().submit_workflow(loading(), [url], num_samples=1)
    with pytest.raises(InputImageError, match="no public address") as caught:
        run.result(PATIENCE)
    assert "secret" not in str(caught.value)
    request = stub.jobs[0].input
    assert [image["url"] for image in request["comfy_executors"]["input_images"]] == [url]
    assert set(request) == {"comfy_executors"}  # the official worker could not run it


def test_one_batch_fails_and_its_error_names_the_job(make: Make, stub: RunPodStub) -> None:
    graph = bench_graph()
    graph["1"]["inputs"]["fail"] = "{{ '' if seed != 2 else 'boom' }}"
    template = WorkflowTemplate(json.dumps(graph))
    run = make().submit_workflow(template, num_samples=3, seed=1, ignore_errors=True)
    assert sorted(image.batch_index for image in run) == [0, 2]
    error: Any = run.errors[1]
    assert isinstance(error, NodeExecutionError)
    assert (error.exception_message, error.job_id) == ("boom", stub.jobs[0].id)
    assert pickle.loads(pickle.dumps(error)).job_id == error.job_id


# What gets lost.


def test_a_lost_chunk_is_found_in_the_final_result(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    for number in range(1, 9):
        stub.faults.lose_chunk(number)
    delivered(make().submit_workflow(bench(), num_samples=4), 4)
    assert sum(job.lost_chunks for job in stub.jobs) == 8
    assert (len(stub.jobs), statuses(server)) == (1, {"success": 4})


def test_chunks_that_are_nowhere_cost_only_their_batches(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    stub.faults.lose_result()
    for number in range(8, 25):
        stub.faults.lose_chunk(number)
    run = make().submit_workflow(bench(), num_samples=6)
    attempts = sorted(future.result(PATIENCE).attempts for future in run.futures)
    first, second = (job.input["comfy_executors"] for job in stub.jobs)
    assert attempts.count(2) == len(second["graphs"]) < 6
    assert first["request_id"] == second["request_id"]
    assert statuses(server) == {"success": 6}  # the worker knew what it had made


def test_a_lost_answer_of_a_stream_loses_nothing(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    stub.faults.reset_after("GET", "/stream/*", times=3)
    delivered(make().submit_workflow(bench(0.1), num_samples=8), 8)
    assert (len(stub.jobs), statuses(server)) == (1, {"success": 8})


def test_a_result_that_is_lost_does_not_matter_after_the_stream(
    make: Make, stub: RunPodStub
) -> None:
    stub.faults.lose_result()
    delivered(make().submit_workflow(bench(), num_samples=4), 4)
    assert [job.executions for job in stub.jobs] == [1]


def test_a_job_that_runs_twice_is_delivered_once(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    stub.faults.execute_twice()
    delivered(make().submit_workflow(bench(), num_samples=4), 4)
    stub.wait_for(lambda s: s.executions == 2, PATIENCE)
    make().submit_workflow(bench()).result(PATIENCE)  # the worker is through with it
    assert statuses(server) == {"success": 5}


def test_a_worker_that_falls_silent_is_replaced(make: Make, stub: RunPodStub) -> None:
    stub.limits.worker_silence = 1.0
    stub.faults.silence_worker(after_chunks=4)
    delivered(make().submit_workflow(bench(), num_samples=4), 4)
    assert [(job.retries, job.executions) for job in stub.jobs] == [(1, 2)]


def test_a_worker_that_stays_silent_is_an_error(make: Make, stub: RunPodStub) -> None:
    stub.limits.worker_silence = 0.5
    stub.faults.silence_worker(times=2)
    run = make().submit_workflow(bench(), num_samples=2)
    with pytest.raises(WorkerLostError) as caught:
        run.result(PATIENCE)
    assert caught.value.job_id == stub.jobs[0].id
    assert len(stub.jobs) == 1


def test_the_rest_of_a_job_whose_comfyui_is_sick_is_run_by_a_fresh_worker() -> None:
    with DevServer() as server, RunPodStub() as stub:
        workers = [RunPodWorkerProcess(stub, server.address, name) for name in ("one", "two")]
        with workers[0], workers[1]:
            executor = RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url)
            run = executor.submit_workflow(
                bench_but(3, fail="CUDA error: an illegal memory access was encountered"),
                num_samples=10,
                seed=0,
                ignore_errors=True,
            )
            images = list(run)
            executor.close()
            for worker in workers:
                worker.kill()
    assert Counter(image.batch_index for image in images) == Counter({*range(10)} - {3})
    assert {index: type(error) for index, error in run.errors.items()} == {3: NodeExecutionError}
    assert [job.executions for job in stub.jobs] == [1, 1]
    assert len(stub.stopped_workers) == 1


def test_a_job_that_runpod_forgets_is_run_again(
    make: Make, stub: RunPodStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comfy_executors.clients.runpod._EARLY_SECONDS", 0.0)
    run = make().submit_workflow(bench(0.2), num_samples=4)
    next(run)
    stub.expire(stub.jobs[0].id)
    assert len(list(run)) == 3
    assert [job.known for job in stub.jobs] == [False, True]


# Memory.


@pytest.mark.slow
def test_what_a_stream_holds_for_a_slow_consumer_is_not_in_memory(
    stub: RunPodStub, server: DevServer
) -> None:
    program = Path(__file__).with_name("runpod_slow_consumer.py")
    command = [sys.executable, str(program), stub.url, stub.endpoint_id, stub.api_key, "24"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        # All that is left comes with one answer: 23 images of 3 MB, in base64.
        stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", 2 * PATIENCE)
        process.stdin.write(b"\n")
        process.stdin.flush()
        taken, most = map(int, process.stdout.readline().split())
    assert (process.returncode, taken) == (0, 24)
    # Three results wait, one is assembled; the whole answer as text would be 96 MB.
    assert most < 48_000_000
    assert len(stub.jobs) == 1


# Trouble on the way.


def late(seconds: float, method: str, path: str) -> Callable[[Any], object]:
    return lambda faults: faults.delay(method, path, seconds, times=1)


def failing(method: str, path: str, **how: Any) -> Callable[[Any], object]:
    return lambda faults: faults.fail(method, path, times=2, **how)


PASSING: dict[str, Callable[[Any], object]] = {
    "late answer to a submit": late(1.0, "POST", "/run"),
    "late answers to polls": late(1.5, "GET", "/stream/*"),
    "cut off polls": lambda faults: faults.truncate("GET", "/stream/*", times=2),
    "polls that do not arrive": lambda faults: faults.reset_before("GET", "/stream/*", times=2),
    "too many submits": failing("POST", "/run", status=429),
    "too many submits, with a time": failing(
        "POST", "/run", status=429, headers={"Retry-After": "1"}
    ),
    "bad gateway": failing("GET", "/stream/*", status=502),
    "a page with status 200": failing("GET", "/stream/*", status=200),
    "too many polls": failing("GET", "/stream/*", status=429, headers={"Retry-After": "1"}),
    "not known yet": failing("GET", "/stream/*", status=404),
    "twice": lambda faults: faults.execute_twice(),
    "lost chunks": lambda faults: [faults.lose_chunk(number) for number in (1, 3, 4)],
    "lost result": lambda faults: faults.lose_result(),
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_trouble_loses_nothing_and_repeats_nothing(
    make: Make, stub: RunPodStub, server: DevServer, name: str
) -> None:
    PASSING[name](stub.faults)
    delivered(make().submit_workflow(bench(), num_samples=3), 3)
    assert stub.faults._rules == []  # all of it happened
    stub.wait_for(lambda s: [job.status for job in s.jobs] == ["COMPLETED"], PATIENCE)
    assert statuses(server) == {"success": 3}


def test_an_outage_does_not_end_a_job(
    make: Make, stub: RunPodStub, server: DevServer, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make()
    executor._client._http._outage_timeout = 0.1
    running, told = threading.Event(), threading.Event()
    run = executor.submit_workflow(
        bench(0.5), num_samples=3, on_progress=lambda event: running.set()
    )
    assert running.wait(PATIENCE)
    with caplog.at_level(logging.WARNING):
        handler = logging.Handler()
        handler.emit = lambda record: told.set()  # type: ignore[method-assign]
        logging.getLogger(runpod_job.__name__).addHandler(handler)
        stub.faults.fail("GET", "/stream/*", status=503, times=None)
        assert told.wait(PATIENCE)  # longer than a call is repeated by itself
        logging.getLogger(runpod_job.__name__).removeHandler(handler)
    stub.faults.clear()
    delivered(run, 3)
    assert [job.executions for job in stub.jobs] == [1]


def test_an_uncertain_submit_is_an_error(make: Make, stub: RunPodStub) -> None:
    stub.faults.reset_after("POST", "/run")
    run = make().submit_workflow(bench(), num_samples=2)
    with pytest.raises(SubmitUncertainError) as caught:
        run.result(PATIENCE)
    assert caught.value.request_id == stub.jobs[0].input["comfy_executors"]["request_id"]
    assert (len(stub.jobs), stub.calls["run"]) == (1, 1)


def test_an_uncertain_submit_may_be_repeated(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    stub.faults.reset_after("POST", "/run")
    executor = make(on_uncertain_submit="resubmit")
    delivered(executor.submit_workflow(bench(), num_samples=3), 3)
    stub.wait_for(lambda s: [job.status for job in s.jobs] == ["COMPLETED"] * 2, PATIENCE)
    assert statuses(server) == {"success": 3}  # one worker: it knows the request


def test_a_payload_that_is_too_large_is_refused_unsent(make: Make, stub: RunPodStub) -> None:
    run = make().submit_workflow(loading(), [PNG + bytes(7_499_900)])  # its graph is too much
    with pytest.raises(PayloadTooLargeError, match="https URLs"):
        run.result(PATIENCE)
    assert stub.jobs == []


def test_a_long_run_is_divided_into_requests_that_fit(make: Make, stub: RunPodStub) -> None:
    run = make().submit_workflow(bench(text="x" * 300_000), num_samples=40)
    run.futures[39].add_done_callback(lambda _: None)
    stub.wait_for(lambda s: len(s.jobs) >= 2, PATIENCE)
    assert run.cancel()
    assert {len(job.input["comfy_executors"]["graphs"]) for job in stub.jobs} <= set(range(10, 20))


# Waiting and stopping.


def test_a_queue_that_does_not_move_is_explained(
    make: Make, stub: RunPodStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_budgets, "_STUCK_SECONDS", 0.5)
    stub.faults.stuck_queue = "throttled"
    events: list[Any] = []
    run = make(queue_timeout=3).submit_workflow(bench(), on_progress=events.append)
    with pytest.raises(JobTimeoutError, match=r"waited 3 s for a worker: .* throttled") as caught:
        run.result(PATIENCE)
    assert not caught.value.started
    waiting = [event for event in events if event.kind == "waiting"]
    assert len(waiting) == 1
    assert "no free GPU" in str(waiting[0].message)
    assert [job.id for job in stub.jobs] == [caught.value.job_id]
    stub.wait_for(lambda s: s.jobs[0].status == "CANCELLED", PATIENCE)
    assert stub.calls["health"] == 1


def test_a_queue_that_nobody_can_explain_is_waited_for_no_longer(
    make: Make, stub: RunPodStub
) -> None:
    stub.faults.stuck_queue = "throttled"
    stub.faults.fail("GET", "/health", status=503, times=None)
    run = make(queue_timeout=2).submit_workflow(bench())
    with pytest.raises(JobTimeoutError, match=r"waited 2 s for a worker$"):
        run.result(PATIENCE)  # which is half of what an outage of `/health` is borne elsewhere
    assert stub.calls["health"]


def test_a_queue_timeout_is_heard_of_before_the_cancelling_is_answered(
    make: Make, stub: RunPodStub
) -> None:
    stub.faults.stuck_queue = "throttled"
    stub.faults.delay("POST", "/cancel/*", 3.0)
    executor = make(queue_timeout=1)
    run = executor.submit_workflow(bench())
    with pytest.raises(JobTimeoutError, match="waited 1 s"):
        run.result(PATIENCE)
    assert [job.status for job in stub.jobs] == ["IN_QUEUE"]
    executor.close()
    assert [job.status for job in stub.jobs] == ["CANCELLED"]


def test_the_platforms_timeout(make: Make, stub: RunPodStub, server: DevServer) -> None:
    run = make().submit_workflow(bench(ENDLESS, steps=1000), num_samples=2)
    server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
    stub.time_out(stub.jobs[0].id)
    with pytest.raises(JobTimeoutError) as caught:
        run.result(PATIENCE)
    assert (caught.value.started, caught.value.job_id) == (True, stub.jobs[0].id)
    idle(server)


def test_a_job_that_somebody_cancels(make: Make, stub: RunPodStub, server: DevServer) -> None:
    executor, other = make(), make()
    run = executor.submit_workflow(bench(ENDLESS, steps=1000))
    server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
    other._client.cancel(stub.jobs[0].id, DeadlineWaiter(PATIENCE))
    with pytest.raises(JobInterruptedError):
        run.result(PATIENCE)
    ended(server, interrupted=1)


@pytest.mark.parametrize("how", ["cancel", "with", "timeout", "batch_timeout"])
def test_stopping_leaves_nothing_running(
    make: Make, stub: RunPodStub, server: DevServer, how: str
) -> None:
    executor = make()
    limits: dict[str, Any] = {how: 1.0} if "timeout" in how else {}
    running = threading.Event()
    run = executor.submit_workflow(
        bench(ENDLESS, steps=1000),
        num_samples=3,
        on_progress=lambda event: running.set() if event.kind == "started" else None,
        **limits,
    )
    if how == "cancel":
        assert running.wait(PATIENCE)
        run.cancel()
    elif how == "with":
        with pytest.raises(ZeroDivisionError), executor:  # noqa: PT012
            assert running.wait(PATIENCE)
            raise ZeroDivisionError
    with pytest.raises(WorkflowError):
        run.result(PATIENCE)
    idle(server)
    stub.wait_for(lambda s: s.jobs[0].status in ("CANCELLED", "COMPLETED"), PATIENCE)


# Taking up a job of another process.


def abandoned(make: Make, stub: RunPodStub, count: int, **options: Any) -> str:
    """Submit a job whose process is gone after the first image."""
    run = make(**options).submit_workflow(bench(0.1), num_samples=count)
    next(run)
    stub.wait_for(lambda s: s.jobs[0].status == "COMPLETED", PATIENCE)
    return stub.jobs[0].id


def test_a_job_can_be_taken_up_again(make: Make, stub: RunPodStub) -> None:
    job_id = abandoned(make, stub, 3)
    run = make().attach(job_id, 3)
    results = [future.result(PATIENCE) for future in run.futures]
    assert [len(result.images) for result in results] == [1, 1, 1]
    assert [result.job_id for result in results] == [job_id] * 3
    assert len(stub.jobs) == 1


def test_a_later_job_of_a_run_can_be_taken_up(make: Make, stub: RunPodStub) -> None:
    make(batches_per_job=2, max_workers=1).submit_workflow(bench(), num_samples=4).result(PATIENCE)
    run = make().attach(stub.jobs[1].id, 2, first_batch=2)
    assert [image.batch_index for image in run.result(PATIENCE)] == [0, 1]


def test_a_job_that_is_gone_cannot_be_taken_up(make: Make, stub: RunPodStub) -> None:
    run = make().attach("no-such-job", 2)
    with pytest.raises(JobExpiredError) as caught:
        run.result(PATIENCE)
    assert caught.value.job_id == "no-such-job"
    assert stub.calls["run"] == 0


def test_a_running_job_can_be_taken_up_and_cancelled(
    make: Make, stub: RunPodStub, server: DevServer
) -> None:
    # By nobody who would read its stream, too: each event goes to one reader.
    request = wire.encode_request(bench_document(1, ENDLESS, steps=1000), None)
    with contextlib.closing(client_of(stub)) as client:
        submit(client, **request)
    server.wait_for(lambda s: statuses(s)["running"] == 1, PATIENCE)
    following = threading.Event()
    run = make().attach(stub.jobs[0].id, on_progress=lambda event: following.set())
    assert following.wait(PATIENCE)
    run.cancel()
    with pytest.raises(WorkflowCancelledError):
        run.futures[0].result(PATIENCE)
    idle(server)
    assert stub.jobs[0].status == "CANCELLED"


# The command line.


@pytest.fixture
def command(stub: RunPodStub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("RUNPOD_API_KEY", stub.api_key)
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", stub.url)
    return lambda *arguments: main(arguments)


def test_run_on_runpod(
    command: Callable[..., int], stub: RunPodStub, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(bench_graph()))
    arguments = ("--num-samples", "3", "--batches-per-job", "2", "--output", str(tmp_path / "out"))
    assert command("run", str(tmp_path / "t.json"), "--runpod", stub.endpoint_id, *arguments) == 0
    assert sorted(capfd.readouterr().out.split()) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert len(stub.jobs) == 2


def test_health(command: Callable[..., int], stub: RunPodStub, capfd: Any) -> None:
    assert command("runpod", "health", stub.endpoint_id, "--json") == 0
    assert set(json.loads(capfd.readouterr().out)) == {"jobs", "workers"}
    assert command("runpod", "health", stub.endpoint_id) == 0
    assert capfd.readouterr().out.startswith("jobs: 0 completed, 0 failed, 0 in progress")
    assert command("runpod", "health", "no-such-endpoint") == 3


def test_smoke(command: Callable[..., int], stub: RunPodStub, capfd: Any) -> None:
    assert command("runpod", "smoke", stub.endpoint_id) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" s  ")[1].split(" of job")[0] for line in lines[1:]] == [
        "batch 0", "batch 1", "the worker is comfy-executors",
        "a cancelled job stops: it is CANCELLED",
    ]  # fmt: skip
    assert [job.status for job in stub.jobs] == ["COMPLETED", "CANCELLED"]


def test_a_wrong_key(
    command: Callable[..., int], stub: RunPodStub, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "hush")
    assert command("runpod", "smoke", stub.endpoint_id) == 1
    shown = capfd.readouterr().err
    assert "RUNPOD_API_KEY" in shown
    assert "hush" not in shown


def test_few_calls_are_made(make: Make, stub: RunPodStub) -> None:
    make().submit_workflow(bench(0.25), num_samples=12).result(PATIENCE)  # three seconds
    assert stub.calls["run"] == 1
    assert stub.calls["stream"] + stub.calls["status"] <= 3 * (3 + 2)
