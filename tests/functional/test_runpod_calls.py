"""The RunPod client against the stub: what is sent again, what is not, and what each end means."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from runpod_worker import PATIENCE, HandWorker, client_of, submit, waiter

from comfy_executors.clients import runpod
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.clients.runpod_chunks import ChunkFile
from comfy_executors.clients.runpod_limits import Limit, RateLimiter
from comfy_executors.errors import (
    AuthenticationError,
    EndpointNotFoundError,
    JobExpiredError,
    JobLostError,
    OutputFileError,
    PayloadTooLargeError,
    ServerError,
    ServerResponseError,
    ServerUnreachableError,
    SubmitUncertainError,
    WaitTimeoutError,
    WorkflowCancelledError,
)
from comfy_executors.testing import RunPodStub

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def stub() -> Iterator[RunPodStub]:
    with RunPodStub() as started:
        yield started


@pytest.fixture
def client(stub: RunPodStub) -> Iterator[RunPodClient]:
    made = client_of(stub)
    made.health(waiter())  # from here on it knows that somebody answers
    yield made
    made.close()


# Submitting.


def test_a_submit_says_all(stub: RunPodStub, client: RunPodClient) -> None:
    job = client.submit(
        {"text": "ein Fuchs \U0001f98a"}, execution_timeout=90.5, ttl=600, waiter=waiter()
    )
    assert (job.id, job.status) == (stub.jobs[0].id, "IN_QUEUE")
    assert stub.jobs[0].input == {"text": "ein Fuchs \U0001f98a"}
    assert stub.jobs[0].policy == {"executionTimeout": 90500, "ttl": 600000}


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}])
def test_a_submit_that_was_refused_for_the_rate_is_sent_again(
    stub: RunPodStub, client: RunPodClient, headers: dict[str, str]
) -> None:
    stub.faults.fail("POST", "/run", status=429, headers=headers, times=2)
    submit(client)
    assert (stub.calls["run"], len(stub.jobs)) == (3, 1)


def test_a_busy_endpoint_is_no_wrong_address(stub: RunPodStub) -> None:
    stub.faults.fail("POST", "/run", status=429, times=5)
    submit(client_of(stub))
    assert (stub.calls["run"], len(stub.jobs)) == (6, 1)


def test_a_submit_that_was_never_connected_is_sent_again(
    stub: RunPodStub, client: RunPodClient
) -> None:
    stub.faults.refuse_connections = True
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(submit, client)
        threading.Timer(0.5, lambda: setattr(stub.faults, "refuse_connections", False)).start()
        assert job.result(PATIENCE).id == stub.jobs[0].id
    assert (stub.calls["run"], len(stub.jobs)) == (1, 1)


def test_nobody_there(stub: RunPodStub) -> None:
    client = client_of(stub)
    stub.stop()
    with pytest.raises(ServerUnreachableError) as error:
        submit(client)
    assert not error.value.maybe_received


@contextmanager
def resetting_server() -> Iterator[tuple[int, list[int]]]:
    """Accept connections and reset each before a TLS handshake can be made."""
    accepted: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if not connection.recv(1):
                        return
                    accepted.append(1)
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        try:
            yield port, accepted
        finally:
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def test_a_failed_handshake_has_sent_nothing() -> None:
    with resetting_server() as (port, accepted):
        client = RunPodClient("ep", "secret", f"https://127.0.0.1:{port}/v2")
        with pytest.raises(ServerUnreachableError, match=r"handshake|reset") as error:
            submit(client)
        client.close()
    assert not error.value.maybe_received
    assert len(accepted) == 3


@pytest.mark.parametrize(("fault", "taken"), [("reset_before", 0), ("reset_after", 1),
                                              ("truncate", 1)])  # fmt: skip
def test_a_submit_without_a_whole_answer_is_not_repeated(
    stub: RunPodStub, client: RunPodClient, fault: str, taken: int
) -> None:
    getattr(stub.faults, fault)("POST", "/run", times=None)
    with pytest.raises(SubmitUncertainError, match="request-1") as error:
        submit(client)
    assert error.value.request_id == "request-1"
    assert (stub.calls["run"], len(stub.jobs)) == (1, taken)


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 524])
def test_a_submit_with_an_unknown_outcome_is_not_repeated(
    stub: RunPodStub, client: RunPodClient, status: int
) -> None:
    stub.faults.fail("POST", "/run", status=status, times=None)
    with pytest.raises(SubmitUncertainError, match="HTML page, not an answer of RunPod"):
        submit(client)
    assert stub.calls["run"] == 1


@pytest.mark.parametrize("body", ["", "<html>captive portal</html>"])
def test_a_page_instead_of_a_job_is_an_unknown_outcome(
    stub: RunPodStub, client: RunPodClient, body: str
) -> None:
    stub.faults.fail("POST", "/run", status=200, body=body)
    with pytest.raises(SubmitUncertainError):
        submit(client)


def test_an_answer_that_comes_too_late_is_an_unknown_outcome(
    stub: RunPodStub, client: RunPodClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod, "_SUBMIT_SECONDS", 0.3)
    stub.faults.delay("POST", "/run", 60.0)
    with pytest.raises(SubmitUncertainError):
        submit(client)
    assert stub.calls["run"] <= 1


def test_an_error_with_status_200_is_a_refusal(stub: RunPodStub, client: RunPodClient) -> None:
    stub.faults.fail("POST", "/run", status=200, body='{"error": "no balance"}', headers=JSON)
    with pytest.raises(ServerResponseError, match="no balance"):
        submit(client)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, ServerResponseError), (401, AuthenticationError), (403, AuthenticationError),
     (404, EndpointNotFoundError), (413, PayloadTooLargeError)],
)  # fmt: skip
def test_a_refused_submit_is_not_repeated(
    stub: RunPodStub, client: RunPodClient, status: int, kind: type[Exception]
) -> None:
    body = '{"error": "/run is not allowed for LB API"}'
    stub.faults.fail("POST", "/run", status=status, body=body, headers=JSON, times=None)
    with pytest.raises(kind) as error:
        submit(client)
    assert type(error.value) is kind
    assert stub.calls["run"] == 1
    assert ("LB API" in str(error.value)) == (status == 400)


class _Cancelled:
    """A waiter whose run is cancelled at some moment."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def sleep(self, seconds: float) -> None:
        self.event.wait(seconds)
        self.limit(seconds)

    def limit(self, seconds: float) -> float:
        if self.event.is_set():
            raise WorkflowCancelledError("cancelled")
        return seconds

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Impatient(_Cancelled):
    """A waiter that waits for nothing."""

    def sleep(self, seconds: float) -> None:
        raise WorkflowCancelledError("cancelled")


def test_a_cancelled_submit_still_learns_its_id(stub: RunPodStub, client: RunPodClient) -> None:
    stub.faults.delay("POST", "/run", 0.5)
    cancelled = _Cancelled()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            client.submit, {"a": 1}, execution_timeout=60, ttl=600, waiter=cancelled
        )
        stub.wait_for(lambda s: future.running())
        threading.Timer(0.2, cancelled.event.set).start()
        assert future.result(PATIENCE).id == stub.jobs[0].id


def test_a_cancelled_backoff_ends_at_once(stub: RunPodStub, client: RunPodClient) -> None:
    stub.faults.fail("POST", "/run", status=429, headers={"Retry-After": "60"}, times=None)
    cancelled = _Cancelled()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            client.submit, {"a": 1}, execution_timeout=60, ttl=600, waiter=cancelled
        )
        stub.wait_for(lambda s: s.calls["run"] == 1)
        cancelled.event.set()
        assert isinstance(future.exception(PATIENCE), WorkflowCancelledError)
    assert (stub.calls["run"], len(stub.jobs)) == (1, 0)


# Asking.


def test_dropped_polls_are_repeated(stub: RunPodStub, client: RunPodClient) -> None:
    job = submit(client)
    stub.faults.reset_before("GET", "/status/*")
    stub.faults.fail("GET", "/status/*", status=502)
    stub.faults.fail("GET", "/status/*", status=200, body="<html>")
    stub.faults.truncate("GET", "/status/*")
    assert client.status(job.id, waiter()).status == "IN_QUEUE"
    assert stub.calls["status"] == 5


def test_polls_end_at_the_deadline(stub: RunPodStub, client: RunPodClient) -> None:
    job = submit(client)
    stub.faults.fail("GET", "/status/*", status=502, times=None)
    with pytest.raises(WaitTimeoutError):
        client.status(job.id, waiter(0.5))


@pytest.mark.parametrize("operation", ["status", "stream", "cancel"])
def test_a_job_that_is_not_known_yet_is_asked_for_again(
    stub: RunPodStub, client: RunPodClient, operation: str
) -> None:
    job = submit(client)
    method = "POST" if operation == "cancel" else "GET"
    stub.faults.fail(method, f"/{operation}/*", status=404, body="{}", headers=JSON, times=2)
    arguments = (1.0, waiter()) if operation == "stream" else (waiter(),)
    assert getattr(client, operation)(job.id, *arguments).status in ("IN_QUEUE", "CANCELLED")
    assert stub.calls[operation] == 3


def test_a_job_that_stays_unknown_is_lost(
    stub: RunPodStub, client: RunPodClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod, "_EARLY_SECONDS", 0.5)
    job = submit(client)
    stub.expire(job.id)
    with pytest.raises(JobLostError, match=job.id) as error:
        client.status(job.id, waiter())
    assert type(error.value) is JobLostError
    assert error.value.job_id == job.id
    assert stub.calls["status"] >= 2


def test_a_job_that_is_not_known_any_more_has_expired(
    stub: RunPodStub, client: RunPodClient
) -> None:
    job = submit(client)
    stub.expire(job.id)
    # An other process that takes the job up later.
    other = client_of(stub)
    for call in (other.status, other.retry):
        with pytest.raises(JobExpiredError, match=job.id):
            call(job.id, waiter())
    with pytest.raises(JobExpiredError, match=job.id):
        other.stream(job.id, 1, waiter())
    assert other.cancel(job.id, waiter()) is None
    assert (stub.calls["status"], stub.calls["stream"], stub.calls["retry"]) == (1, 1, 1)


def test_a_hostile_job_id_stays_a_name(stub: RunPodStub, client: RunPodClient) -> None:
    with pytest.raises(JobExpiredError):
        client.status("../purge-queue?x=1#y", waiter())
    assert stub.calls["status"] == 1
    assert stub.calls["purge-queue"] == 0


def test_the_stream_waits_no_longer_than_the_deadline(
    stub: RunPodStub, client: RunPodClient
) -> None:
    job = submit(client)
    assert client.stream(job.id, 45.0, waiter(2.5)).chunks == ()
    (call,) = [request for request in stub.requests if request.path.startswith("/stream")]
    assert 1000 <= int(call.query["wait"]) <= 1500


@pytest.mark.parametrize("size", [10, 900_000])
def test_a_large_answer_comes_from_a_file_and_is_the_same(
    stub: RunPodStub, client: RunPodClient, size: int
) -> None:
    job_id = submit(client).id
    worker = HandWorker(stub)
    worker.take()
    chunks = [{"number": number, "text": "x" * size} for number in range(6)]
    for chunk in chunks:
        worker.chunk(job_id, chunk)
    answer = client.stream(job_id, 5.0, waiter())
    assert isinstance(answer.chunks, ChunkFile) is (size > 10)
    assert [*answer.chunks] == chunks
    assert (answer.status, len(answer.chunks), answer.is_drained) == ("IN_PROGRESS", 6, False)
    answer.close()


def test_a_full_disk_is_our_error(
    stub: RunPodStub, client: RunPodClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    job_id = submit(client).id
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda size: FullDisk())
    with pytest.raises(OutputFileError, match="No space left on device"):
        client.stream(job_id, 1.0, waiter())


def test_chunks_of_a_lost_answer_are_gone(stub: RunPodStub, client: RunPodClient) -> None:
    job, worker = submit(client), HandWorker(stub)
    worker.take()
    worker.chunk(job.id, "lost")
    stub.faults.reset_after("GET", "/stream/*")
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(client.stream, job.id, 20.0, waiter())
        stub.wait_for(lambda s: s.jobs[0].delivered == 1)
        worker.chunk(job.id, "here")
        assert stream.result(PATIENCE).chunks == ("here",)
    assert (stub.calls["stream"], stub.jobs[0].delivered) == (2, 2)


# Cancel, retry, purge, health.


def test_cancelling_twice_and_too_late(stub: RunPodStub, client: RunPodClient) -> None:
    job, worker = submit(client), HandWorker(stub)
    worker.take()
    worker.done(job.id, output=1)
    for _ in range(2):
        status = client.cancel(job.id, waiter())
        assert status is not None
        assert (status.status, status.output) == ("COMPLETED", 1)


@pytest.mark.parametrize("status", [400, 409])
def test_a_refused_cancel_of_a_job_that_has_ended(
    stub: RunPodStub, client: RunPodClient, status: int
) -> None:
    job = submit(client)
    stub.faults.fail("POST", "/cancel/*", status=status, body="{}", headers=JSON, times=2)
    with pytest.raises(ServerResponseError):
        client.cancel(job.id, waiter())
    HandWorker(stub).take()
    stub.time_out(job.id)
    found = client.cancel(job.id, waiter())
    assert found is not None
    assert found.status == "FAILED"


def test_a_cancel_is_repeated_until_it_arrives(stub: RunPodStub, client: RunPodClient) -> None:
    job = submit(client)
    stub.faults.reset_before("POST", "/cancel/*")
    stub.faults.reset_after("POST", "/cancel/*")
    stub.faults.fail("POST", "/cancel/*", status=429)
    found = client.cancel(job.id, waiter())
    assert found is not None
    assert found.status == "CANCELLED"
    assert (stub.calls["cancel"], stub.calls["status"]) == (4, 1)


@pytest.mark.parametrize(("fault", "calls"), [("reset_before", 2), ("reset_after", 1)])
def test_a_retry_is_looked_up_before_it_is_repeated(
    stub: RunPodStub, client: RunPodClient, fault: str, calls: int
) -> None:
    job, worker = submit(client), HandWorker(stub)
    worker.take()
    worker.done(job.id, error="no memory")
    getattr(stub.faults, fault)("POST", "/retry/*")
    assert client.retry(job.id, waiter()).status == "IN_QUEUE"
    assert (stub.calls["retry"], stub.calls["status"]) == (calls, 1)


def test_a_retry_of_a_job_that_has_not_failed_is_refused(
    stub: RunPodStub, client: RunPodClient
) -> None:
    job = submit(client)
    with pytest.raises(ServerResponseError, match="IN_QUEUE is not retried"):
        client.retry(job.id, waiter())
    assert stub.calls["retry"] == 1


def test_health_and_purge_are_repeated(
    stub: RunPodStub, client: RunPodClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two purges within ten seconds are more than our limiter lets pass.
    monkeypatch.setitem(client._limiter._limiters, "purge-queue", RateLimiter(Limit(9, 9)))
    submit(client)
    stub.faults.fail("GET", "/health", status=502)
    stub.faults.fail("POST", "/purge-queue", status=502)
    assert client.health(waiter()).jobs.in_queue == 1
    assert client.purge_queue(waiter()) == 1
    assert (stub.calls["health"], stub.calls["purge-queue"]) == (3, 2)


def test_an_endpoint_that_is_not_there(stub: RunPodStub) -> None:
    client = RunPodClient("nobody", stub.api_key, stub.url)
    with pytest.raises(EndpointNotFoundError, match="nobody"):
        client.health(waiter())
    with pytest.raises(EndpointNotFoundError):
        submit(client)


# Keys, redirects, forks, limits.


def test_a_wrong_key_is_named_and_not_shown(stub: RunPodStub) -> None:
    client = RunPodClient(stub.endpoint_id, "rpa_WRONG", stub.url)
    with pytest.raises(AuthenticationError, match="RUNPOD_API_KEY") as error:
        client.health(waiter())
    assert "rpa_WRONG" not in "".join(traceback.format_exception(None, error.value, None))
    assert stub.calls["health"] == 1


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", ["{}", '{{"error": "{}"}}', '{{"id": "{}"'])
def test_a_key_that_an_answer_echoes_is_not_shown(
    stub: RunPodStub, client: RunPodClient, status: int, body: str
) -> None:
    text = body.format(f"you sent Bearer {stub.api_key}")
    stub.faults.fail("POST", "/run", status=status, body=text, headers=JSON, times=None)
    with pytest.raises((ServerError, SubmitUncertainError)) as error:
        submit(client)
    assert stub.api_key not in "".join(traceback.format_exception(error.type, error.value, None))
    assert "you sent ..." in str(error.value)


def test_the_key_does_not_follow_a_redirect(stub: RunPodStub, client: RunPodClient) -> None:
    with RunPodStub(endpoint_id="other") as other:
        target = {"Location": f"{other.url}/other/health?secret=1"}
        stub.faults.fail("GET", "/health", status=302, headers=target)
        with pytest.raises(ServerResponseError, match="redirects"):
            client.health(waiter())
        assert other.requests == []


def test_too_many_calls_hold_the_other_clients_back(stub: RunPodStub, client: RunPodClient) -> None:
    stub.faults.fail("POST", "/run", status=429, headers={"Retry-After": "1"})
    with pytest.raises(WorkflowCancelledError):
        client.submit({"a": 1}, execution_timeout=60, ttl=600, waiter=_Impatient())
    began = time.monotonic()
    submit(client_of(stub))
    assert time.monotonic() - began > 0.5
    assert stub.calls["run"] == 2


def test_all_threads_together_stay_below_the_limit(
    stub: RunPodStub, client: RunPodClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.limits.calls["status"] = (1000, 4)
    monkeypatch.setitem(client._limiter._limiters, "status", RateLimiter(Limit(1000, 3)))
    job, other = submit(client), client_of(stub)
    clients = [client, other] * 30
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda each: each.status(job.id, waiter()), clients))
    assert stub.calls["status"] == 60  # none was refused and repeated


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_client_goes_on_in_the_child_of_a_fork(stub: RunPodStub, client: RunPodClient) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with client._limiter["run"]._changed, client._lock:
            held.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        code = 1
        try:
            client.reset()
            submit(client)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()
    submit(client)
    assert len(stub.jobs) == 2
