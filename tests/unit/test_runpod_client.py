"""The RunPod client without a socket: answers, ends of jobs, keys, sizes and the rate limiter."""

from __future__ import annotations

import json
import pickle
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_answers import (
    RunPodStatus,
    parse_health,
    parse_job,
    parse_removed,
    parse_status,
    parse_stream,
)
from comfy_executors.clients.runpod_limits import LIMITS, Limit, RateLimiter, limiter_of
from comfy_executors.clients.runpod_payload import MAX_PAYLOAD_BYTES
from comfy_executors.errors import (
    EndpointNotFoundError,
    JobError,
    JobExpiredError,
    JobInterruptedError,
    JobLostError,
    JobResultLostError,
    JobTimeoutError,
    PayloadTooLargeError,
    RunPodJobFailedError,
    SubmitUncertainError,
    WaitTimeoutError,
    WorkerLostError,
    WorkflowError,
    WorkflowInterruptedError,
)

KEY = "rpa_SECRET123"
NO_SERVER = "http://127.0.0.1:9/v2"  # nothing of these tests gets as far as a connection


@pytest.fixture
def client() -> RunPodClient:
    return RunPodClient("abc123", KEY, NO_SERVER)


# Answers.


def test_a_job() -> None:
    job = parse_job({"id": "x-u1", "status": "IN_QUEUE"})
    assert (job.id, job.status) == ("x-u1", "IN_QUEUE")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "no balance"}, "no balance"),
        ({"status": "IN_QUEUE"}, "no id"),
        ([], "no JSON object"),
        ("text", "no JSON object"),
        (None, "no JSON object"),
    ],
)
def test_an_answer_that_is_no_job(body: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_job(body)


def test_a_whole_status() -> None:
    status = parse_status(
        {"id": "x", "status": "COMPLETED", "delayTime": 31618, "executionTime": 1437,
         "workerId": "pod", "retries": 1, "output": {"a": 1}, "input": {"prompt": "private"}}
    )  # fmt: skip
    assert (status.queue_seconds, status.execution_seconds) == (31.618, 1.437)
    assert (status.worker_id, status.retries, status.output) == ("pod", 1, {"a": 1})
    assert "private" not in repr(status)


def test_a_bare_status() -> None:
    status = parse_status({"id": "x", "status": "IN_QUEUE"})
    assert status == RunPodStatus("x", "IN_QUEUE")
    assert status.failure() is None


@pytest.mark.parametrize("body", [{}, {"id": "x"}, {"status": "FAILED"}, [], "x", {"error": "e"}])
def test_an_answer_that_is_no_status(body: Any) -> None:
    with pytest.raises(ValueError, match=r"no id and status|no JSON object|^e$"):
        parse_status(body)


@pytest.mark.parametrize("word", ["RUNNING", "SOMETHING_NEW"])
def test_an_unknown_status_goes_on(word: str) -> None:
    status = parse_status({"id": "x", "status": word})
    assert not status.is_terminal
    assert status.failure() is None


@pytest.mark.parametrize(
    ("body", "status", "chunks"),
    [
        ({"status": "IN_PROGRESS", "stream": [{"output": 1}, {"output": None}]},
         "IN_PROGRESS", (1, None)),
        ({"status": "COMPLETED", "stream": []}, "COMPLETED", ()),
        ({"status": "FAILED"}, "FAILED", ()),
        ([{"output": "a", "metrics": {}}, {"metrics": {}}], "", ("a",)),
    ],
)  # fmt: skip
def test_a_stream(body: Any, status: str, chunks: tuple[Any, ...]) -> None:
    stream = parse_stream(body)
    assert (stream.status, stream.chunks) == (status, chunks)
    assert stream.is_drained == (status in ("COMPLETED", "FAILED"))


@pytest.mark.parametrize("body", [{}, {"stream": "x"}, {"error": "no stream"}, "x"])
def test_an_answer_that_is_no_stream(body: Any) -> None:
    with pytest.raises(ValueError, match=r"no stream|no JSON object"):
        parse_stream(body)


def test_health() -> None:
    jobs = {"completed": 1, "failed": 5, "inProgress": 2, "inQueue": 3, "retried": 4}
    health = parse_health({"jobs": jobs, "workers": {"idle": 1, "throttled": 2}})
    assert (health.jobs.in_progress, health.jobs.in_queue, health.jobs.retried) == (2, 3, 4)
    assert (health.workers.throttled, health.workers.unhealthy) == (2, 0)


@pytest.mark.parametrize("body", [{}, {"jobs": {}}, {"jobs": 1, "workers": 2}, []])
def test_an_answer_that_is_no_health(body: Any) -> None:
    with pytest.raises(ValueError, match=r"no jobs and workers|no JSON object"):
        parse_health(body)


def test_a_purge() -> None:
    assert parse_removed({"removed": 2, "status": "completed"}) == 2
    with pytest.raises(ValueError, match="how many"):
        parse_removed({"status": "completed"})


# Ends of jobs.


def failure(status: str, **fields: Any) -> JobError:
    found = parse_status({"id": "job-7", "status": status, **fields}).failure("https://x/v2/e")
    assert found is not None
    assert found.job_id == "job-7"
    assert "job-7" in str(found)
    assert found.server == "https://x/v2/e"
    return found


@pytest.mark.parametrize("output", [{}, [], 0, False, "", {"images": []}])
def test_completed_with_an_output_is_no_failure(output: Any) -> None:
    assert parse_status({"id": "x", "status": "COMPLETED", "output": output}).failure() is None


@pytest.mark.parametrize("fields", [{}, {"output": None}])
def test_completed_without_an_output(fields: dict[str, Any]) -> None:
    found = failure("COMPLETED", **fields)
    assert type(found) is JobResultLostError
    assert "S3" in str(found)


@pytest.mark.parametrize(
    ("status", "fields", "kind"),
    [
        ("CANCELLED", {}, JobInterruptedError),
        ("FAILED", {"error": "executionTimeout exceeded"}, JobTimeoutError),
        ("FAILED", {"error": "Execution timeout exceeded."}, JobTimeoutError),
        ("TIMED_OUT", {"error": "executionTimeout exceeded"}, JobTimeoutError),
        ("FAILED", {"error": "job timed out after 1 retries", "retries": 1}, WorkerLostError),
        ("TIMED_OUT", {"error": "job timed out after 2 retries"}, WorkerLostError),
        ("TIMED_OUT", {}, JobTimeoutError),
        ("TIMED_OUT", {"workerId": "pod"}, JobTimeoutError),
        ("FAILED", {"error": "no such checkpoint"}, RunPodJobFailedError),
        # A handler that has these words in its own error, with an output beside it.
        ("FAILED", {"error": "executionTimeout exceeded", "output": {}}, RunPodJobFailedError),
        ("FAILED", {}, RunPodJobFailedError),
    ],
)
def test_the_ways_to_fail(status: str, fields: dict[str, Any], kind: type[JobError]) -> None:
    assert type(failure(status, **fields)) is kind


@pytest.mark.parametrize(("fields", "started"), [({}, False), ({"workerId": "p"}, True)])
def test_a_timeout_tells_whether_it_began(fields: dict[str, Any], started: bool) -> None:
    found = failure("TIMED_OUT", **fields)
    assert isinstance(found, JobTimeoutError)
    assert isinstance(found, TimeoutError)
    assert found.started is started


def test_a_limit_that_runpod_keeps_says_what_to_do() -> None:
    found = str(failure("FAILED", error="executionTimeout exceeded"))
    assert "execution_timeout=" in found
    assert "batches_per_job=" in found


def test_a_lost_worker_tells_the_retries() -> None:
    found = failure("FAILED", error="job timed out after 1 retries", workerId="pod")
    assert isinstance(found, WorkerLostError)
    assert (found.retries, found.worker_id) == (1, "pod")


def test_an_exception_comes_as_json_text() -> None:
    error = {"error_type": "<class 'torch.cuda.OutOfMemoryError'>", "error_message": "kaboom",
             "error_traceback": "Traceback ...", "hostname": "h", "worker_id": "pod"}  # fmt: skip
    found = failure("FAILED", error=json.dumps(error))
    assert isinstance(found, RunPodJobFailedError)
    assert str(found) == "job job-7: failed: OutOfMemoryError: kaboom"
    assert (found.reason, found.exception_type) == ("kaboom", "OutOfMemoryError")
    assert (found.traceback, found.worker_id) == ("Traceback ...", "pod")


def test_an_exception_of_a_generator_comes_as_text() -> None:
    found = failure("FAILED", error="handler: boom\nat 1 \ntraceback: Traceback\n  File ...")
    assert isinstance(found, RunPodJobFailedError)
    assert (found.reason, found.traceback) == ("boom\nat 1", "Traceback\n  File ...")


@pytest.mark.parametrize("details", [["one", "two"], "one", None, [1]])
def test_details_are_kept(details: Any) -> None:
    found = failure("FAILED", error="Job processing failed", output={"details": details})
    assert isinstance(found, RunPodJobFailedError)
    known = [] if details is None else details if isinstance(details, list) else [details]
    assert found.details == tuple(str(detail) for detail in known)
    assert str(found) == "; ".join(["job job-7: failed: Job processing failed", *found.details])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"code": 3}, '{"code": 3}'),
        ([1], "[1]"),
        ("", "RunPod gives no reason"),
        ("{", "{"),
        ("7", "7"),
    ],
)
def test_an_error_can_be_anything(error: Any, reason: str) -> None:
    found = failure("FAILED", error=error)
    assert isinstance(found, RunPodJobFailedError)
    assert found.reason == reason


ERRORS = [
    EndpointNotFoundError("no", "https://x", 404),
    PayloadTooLargeError("big", size=11, limit=10, server="https://x"),
    JobError("m", job_id="j"),
    SubmitUncertainError("?", request_id="r", server="https://x"),
    RunPodJobFailedError("r", job_id="j", exception_type="E", traceback="t", details=["d"]),
    JobTimeoutError("late", started=True, job_id="j"),
    JobInterruptedError("gone", job_id="j"),
    WorkerLostError("dead", retries=1, job_id="j", worker_id="w"),
    JobResultLostError("none", job_id="j"),
    JobLostError("lost", job_id="j"),
    JobExpiredError("old", job_id="j"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_how_the_errors_are_related() -> None:
    assert issubclass(JobInterruptedError, WorkflowInterruptedError)
    assert issubclass(PayloadTooLargeError, (ValueError,))
    assert issubclass(PayloadTooLargeError, WorkflowError)
    assert issubclass(JobError, WorkflowError)
    assert not issubclass(JobInterruptedError, CancelledError)


# Keys and arguments.


def test_the_key_is_shown_nowhere(client: RunPodClient) -> None:
    assert repr(client) == "<RunPodClient http://127.0.0.1:9/v2/abc123>"
    with pytest.raises(TypeError, match="key") as error:
        pickle.dumps(client)
    assert KEY not in str(error.value)
    assert not [name for name, value in vars(client).items() if KEY in repr(value)]


def test_the_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", f" {KEY}\n")
    assert RunPodClient("abc123")._http.sent_headers()["Authorization"] == f"Bearer {KEY}"
    assert RunPodClient("abc123").url == "https://api.runpod.ai/v2/abc123"


@pytest.mark.parametrize("key", [None, "", "  "])
def test_without_a_key(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    with pytest.raises(ValueError, match="RUNPOD_API_KEY"):
        RunPodClient("abc123", key)


def test_a_key_that_no_header_takes_is_not_shown() -> None:
    with pytest.raises(ValueError, match="Authorization") as error:
        RunPodClient("abc123", "sécret\x00")
    assert "sécret" not in str(error.value)


@pytest.mark.parametrize("endpoint_id", ["", "a/b", "..", "a?b", "https://api.runpod.ai/v2/a"])
def test_what_is_no_endpoint(endpoint_id: str) -> None:
    with pytest.raises(ValueError, match="not the id"):
        RunPodClient(endpoint_id, KEY)


@pytest.mark.parametrize(
    "url", ["api.runpod.ai/v2", "ftp://x", "https://me:pw@x/v2", "https://x?a"]
)
def test_what_is_no_base_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|address") as error:
        RunPodClient("abc123", KEY, url)
    assert "pw" not in str(error.value)


@pytest.mark.parametrize("job_id", ["", ".", ".."])
def test_what_is_no_job(client: RunPodClient, job_id: str) -> None:
    with pytest.raises(ValueError, match="not the id"):
        client.status(job_id, DeadlineWaiter(1))


@pytest.mark.parametrize(
    ("execution_timeout", "ttl", "words"),
    [(4.9, 60, "execution_timeout"), (700_000, 60, "execution_timeout"), (60, 9, "ttl"),
     (60, 700_000, "ttl"), (float("nan"), 60, "execution_timeout")],
)  # fmt: skip
def test_times_have_bounds(
    client: RunPodClient, execution_timeout: float, ttl: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        client.submit(
            {"a": 1}, execution_timeout=execution_timeout, ttl=ttl, waiter=DeadlineWaiter(1)
        )


@pytest.mark.parametrize("content", [{}, [1], "text", {"a": float("nan")}])
def test_what_is_no_input(client: RunPodClient, content: Any) -> None:
    with pytest.raises(ValueError, match=r"not empty|JSON"):
        client.submit(content, execution_timeout=60, ttl=600, waiter=DeadlineWaiter(1))


def test_a_payload_is_measured_first(client: RunPodClient) -> None:
    content = {"data": "x" * MAX_PAYLOAD_BYTES}
    with pytest.raises(PayloadTooLargeError, match="https URLs") as error:
        client.submit(content, execution_timeout=60, ttl=600, waiter=DeadlineWaiter(1))
    assert error.value.limit == 10_000_000
    assert error.value.size > error.value.limit


@pytest.mark.parametrize("wait", [0.5, 46, -1])
def test_a_stream_is_held_for_a_sensible_time(client: RunPodClient, wait: float) -> None:
    with pytest.raises(ValueError, match="wait is from 1 to 45"):
        client.stream("job", wait, DeadlineWaiter(1))


# The rate limiter.


def test_our_limits_are_below_those_of_runpod() -> None:
    documented = {"run": (1000, 200), "status": (2000, 400), "stream": (2000, 400),
                  "cancel": (100, 20), "purge-queue": (2, 2)}  # fmt: skip
    for name, (calls, concurrent) in documented.items():
        assert LIMITS[name].calls < calls
        assert LIMITS[name].concurrent < concurrent
        assert LIMITS[name].window == 10.0


def test_clients_of_an_endpoint_and_key_share_a_limiter() -> None:
    first = limiter_of("https://x/v2/a", "k1")
    assert limiter_of("https://x/v2/a", "k1") is first
    assert limiter_of("https://x/v2/b", "k1") is not first
    assert limiter_of("https://x/v2/a", "k2") is not first


def test_two_clients_share_their_limiter() -> None:
    clients = [RunPodClient("abc123", KEY, NO_SERVER) for _ in range(2)]
    other = RunPodClient("abc123", KEY + "2", NO_SERVER)
    assert clients[0]._limiter is clients[1]._limiter
    assert other._limiter is not clients[0]._limiter


def test_no_more_calls_than_allowed_in_any_window() -> None:
    limiter = RateLimiter(Limit(calls=5, concurrent=100, window=0.2))
    starts: list[float] = []

    def call(_: int) -> None:
        with limiter.turn(DeadlineWaiter(20)):
            starts.append(time.monotonic())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(20)))
    starts.sort()
    # What a call notes is a little later than what the limiter counts.
    assert all(starts[i + 5] - starts[i] > 0.15 for i in range(15))
    assert len(starts) == 20


def test_no_more_calls_at_once_than_allowed() -> None:
    limiter = RateLimiter(Limit(calls=1000, concurrent=3))
    inside, most = [0], [0]
    lock = threading.Lock()
    full = threading.Barrier(3)

    def call(number: int) -> None:
        with limiter.turn(DeadlineWaiter(20)):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            full.wait(20)
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(call, range(12)))
    assert most == [3]


def test_who_waits_for_a_turn_has_a_deadline() -> None:
    limiter = RateLimiter(Limit(calls=10, concurrent=1))
    with limiter.turn(DeadlineWaiter(20)), pytest.raises(WaitTimeoutError):
        limiter.turn(DeadlineWaiter(0.05)).__enter__()
    with limiter.turn(DeadlineWaiter(20)):
        pass


def test_a_failing_call_gives_its_turn_back() -> None:
    limiter = RateLimiter(Limit(calls=10, concurrent=1))
    for _ in range(3):
        with pytest.raises(KeyError), limiter.turn(DeadlineWaiter(20)):
            raise KeyError


def test_a_pause_holds_everybody() -> None:
    limiter = RateLimiter(Limit(calls=10, concurrent=10))
    began = time.monotonic()
    limiter.pause(0.2)
    with limiter.turn(DeadlineWaiter(20)):
        assert time.monotonic() - began >= 0.2
