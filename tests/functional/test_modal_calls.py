"""Modal's retry table, row by row, through the real edge, routes, engine and dev server.

Each call is repeated as often as it should be and no more; whatever happens on the way, each job
runs once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from modal_client_kit import (
    PNG,
    Prompts,
    Site,
    client_of,
    document,
    edge,
    finish,
    prompts,
    short_pauses,
    site,
    waiter,
)
from server_kit import ENDLESS, PATIENCE

from comfy_executors.clients import modal_http
from comfy_executors.clients.modal import ModalClient, digest_of
from comfy_executors.clients.modal_refusals import MissingInputsError
from comfy_executors.errors import (
    AuthenticationError,
    EndpointNotFoundError,
    JobLostError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowRejectedError,
)
from comfy_executors.testing import ModalEdge
from comfy_executors.wire import InputFile

__all__ = ["edge", "prompts", "short_pauses", "site"]
pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def client(edge: ModalEdge) -> Iterator[ModalClient]:
    made = client_of(edge)
    made.health(waiter())  # from here on it knows that somebody answers
    edge.clear()
    yield made
    made.close()


class Job:
    """A job of two batches that has ended."""

    def __init__(self, client: ModalClient) -> None:
        self.id = client.submit(document(2), waiter()).id
        _, self.events = finish(client, self.id)
        self.output = next(e["url"] for e in self.events if e["kind"] == "output")


@dataclass(frozen=True)
class Row:
    """A kind of call.

    Args:
        name: What the edge counts it as.
        method: Its method, and
        path: its path, as faults take them.
        make: Makes the call, given the client and a job; returns what can be checked.
    """

    name: str
    method: str
    path: str
    make: Callable[[ModalClient, Job], Any]


ROWS = [
    Row("submit", "POST", "/v1/jobs", lambda c, j: c.submit(document(1), waiter()).id),
    Row("poll", "POST", "/v1/jobs/poll", lambda c, j: c.poll({j.id: ""}, 5, waiter())[j.id].state),
    Row("job", "GET", "/v1/jobs/fc-*", lambda c, j: len(c.job(j.id, waiter()).batches)),
    Row("output", "GET", "/v1/jobs/*/outputs/*", lambda c, j: c.output(j.output, waiter())[:8]),
    Row("input", "PUT", "/v1/inputs/*", lambda c, j: c.put_input(PNG, waiter())),
    Row("cancel", "POST", "/v1/jobs/cancel", lambda c, j: c.cancel(waiter(), job_id=j.id)),
    Row("health", "GET", "/v1/health", lambda c, j: c.health(waiter()).backend),
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@pytest.fixture(scope="module")
def ended_job(site: Site) -> Job:
    client = client_of(site[1])
    made = Job(client)
    client.close()
    return made


@pytest.fixture
def job(ended_job: Job, edge: ModalEdge) -> Job:
    """The job; whatever is counted begins after it."""
    return ended_job


def check(row: Row, job: Job, result: Any, prompts: Prompts) -> None:
    """Look at what a call answered, and that each batch has run once."""
    expected = {
        "poll": "done", "job": 2, "output": PNG, "input": None, "cancel": job.id,
        "health": "local",
    }  # fmt: skip
    assert result == expected.get(row.name, result)
    prompts.ended(**({"success": 1} if row.name == "submit" else {}))


# How each kind of trouble that passes is made, how often the call is seen by the edge then, and
# how often by the app.
PASSING: dict[str, tuple[Callable[[ModalEdge, Row], None], int, int]] = {
    "reset before": (lambda e, r: e.faults.reset_before(r.method, r.path, 2), 3, 1),
    "reset after": (lambda e, r: e.faults.reset_after(r.method, r.path, 2), 3, 3),
    "cut short": (lambda e, r: e.faults.truncate(r.method, r.path, 2), 3, 3),
    "303 at once": (lambda e, r: e.faults.redirect(r.method, r.path), 1, 1),
    "408": (lambda e, r: e.faults.lose_body(r.method, r.path, 2), 3, 1),
    "429 rate": (lambda e, r: e.faults.limit_rate(r.method, r.path, 2), 3, 1),
    "500 crash": (lambda e, r: e.faults.crash(r.method, r.path, 2), 3, 1),
    "502 page": (lambda e, r: e.faults.fail(r.method, r.path, times=2), 3, 1),
    "404 for a moment": (lambda e, r: e.faults.undeploy(r.method, r.path, 2), 3, 1),
    "run twice": (lambda e, r: e.faults.run_twice(r.method, r.path), 1, 2),
}


@rows
@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes(
    client: ModalClient, edge: ModalEdge, prompts: Prompts, job: Job, row: Row, trouble: str
) -> None:
    fault, calls, runs = PASSING[trouble]
    fault(edge, row)
    result = row.make(client, job)
    assert (edge.calls[row.name], edge.runs[row.name]) == (calls, runs)
    assert edge.calls["result"] == (1 if trouble.startswith("303") else 0)
    check(row, job, result, prompts)


@rows
def test_nobody_there_for_a_moment(
    client: ModalClient, edge: ModalEdge, prompts: Prompts, job: Job, row: Row
) -> None:
    edge.faults.refuse_connections = True
    back = threading.Timer(0.3, lambda: setattr(edge.faults, "refuse_connections", False))
    back.start()
    result = row.make(client, job)
    back.join()
    assert (edge.calls[row.name], edge.runs[row.name]) == (1, 1)
    check(row, job, result, prompts)


@rows
def test_an_answer_that_does_not_come(
    edge: ModalEdge, prompts: Prompts, job: Job, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_http, "_HEAD_SECONDS", 0.5)
    client = client_of(edge)
    client.health(waiter())
    edge.clear()
    edge.faults.delay(row.method, row.path, 1.0, times=1)
    result = row.make(client, job)
    client.close()
    edge.wait_for(lambda e: e.calls[row.name] == 2, PATIENCE)  # the first was on its way, too
    check(row, job, result, prompts)


@rows
def test_303_after_a_while(
    client: ModalClient, edge: ModalEdge, prompts: Prompts, job: Job, row: Row
) -> None:
    edge.limits.redirect_after = 0.2
    edge.limits.cold_start = 1.0
    edge.scale_to_zero()
    result = row.make(client, job)
    edge.limits.redirect_after = 150.0
    assert edge.runs[row.name] == 1
    assert edge.calls["result"] >= 2
    check(row, job, result, prompts)


PERMANENT: dict[str, tuple[Callable[[ModalEdge, Row], None], type[Exception], str, int]] = {
    "429 spend": (
        lambda e, r: e.faults.limit_spending(r.method, r.path),
        ServerResponseError, "spend limit; raise it", 1,
    ),
    "404 undeployed": (
        lambda e, r: e.faults.undeploy(r.method, r.path),
        EndpointNotFoundError, "no app is deployed", 3,
    ),
    "404 stopped": (
        lambda e, r: e.faults.stop_app(r.method, r.path),
        EndpointNotFoundError, "the app is stopped", 1,
    ),
    "404 disabled": (
        lambda e, r: e.faults.disable_workspace(r.method, r.path),
        EndpointNotFoundError, "workspace is disabled", 1,
    ),
    "500 failure": (
        lambda e, r: e.faults.fail(
            r.method, r.path, status=500, times=None,
            body="modal-http: internal error: status Failure: ImportError('torch')",
        ),
        ServerResponseError, "look at its logs", 1,
    ),
}  # fmt: skip


@rows
@pytest.mark.parametrize("trouble", PERMANENT)
def test_what_does_not_pass(
    client: ModalClient, edge: ModalEdge, prompts: Prompts, job: Job, row: Row, trouble: str
) -> None:
    fault, kind, words, calls = PERMANENT[trouble]
    fault(edge, row)
    with pytest.raises(kind, match=words):
        row.make(client, job)
    assert (edge.calls[row.name], edge.runs[row.name]) == (calls, 0)
    assert prompts.statuses == {}


def test_a_submit_is_tried_few_times_where_the_app_crashes(
    client: ModalClient, edge: ModalEdge
) -> None:
    edge.faults.crash("POST", "/v1/jobs", None)
    with pytest.raises(ServerResponseError, match="terminated by signal") as caught:
        client.submit(document(), waiter())
    assert caught.value.maybe_received
    assert edge.calls["submit"] == 5


def test_other_calls_are_tried_until_the_deadline(client: ModalClient, edge: ModalEdge) -> None:
    edge.faults.crash("GET", "/v1/health", 6)
    assert client.health(waiter()).version
    assert edge.calls["health"] == 7


# Tokens.


@pytest.mark.parametrize(
    ("key", "secret", "words"),
    [
        ("", "", "wants a proxy token: pass key= and secret="),
        ("wk-edge", "ws-wrong", "is wrong, was deleted"),
        ("wk-wrong", "ws-edge", "not the account's token"),
    ],
)
def test_a_token_that_is_missing_or_wrong(
    edge: ModalEdge, key: str, secret: str, words: str
) -> None:
    client = ModalClient(edge.url, key, secret)
    with pytest.raises(AuthenticationError, match=words) as caught:
        client.submit(document(), waiter())
    client.close()
    assert "wrong" not in str(caught.value).replace("is wrong", "")
    assert not caught.value.maybe_received
    assert (edge.calls["submit"], edge.runs["submit"]) == (1, 0)


def test_netrc_does_not_replace_the_token(
    edge: ModalEdge, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login u password p\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    edge.faults.redirect("GET", "/v1/health")
    client = client_of(edge)
    client.health(waiter())
    client.close()
    sent = [dict(request.headers) for request in edge.requests]
    assert [headers.get("Modal-Key") for headers in sent] == [edge.key, edge.key]
    assert [headers.get("Modal-Secret") for headers in sent] == [edge.secret, edge.secret]
    assert not any("Authorization" in headers for headers in sent)


# Submitting.


def test_the_same_request_is_one_job(
    client: ModalClient, edge: ModalEdge, prompts: Prompts
) -> None:
    asked = document(2)
    first, second = client.submit(asked, waiter()), client.submit(asked, waiter())
    assert first.id == second.id
    finish(client, first.id)
    prompts.ended(success=2)


def test_input_images_that_are_missing(client: ModalClient, prompts: Prompts) -> None:
    files = tuple(InputFile(f"{n}.png", f"{time.monotonic()}{n}".encode()) for n in range(3))
    asked = document(1, inputs=files)
    with pytest.raises(MissingInputsError) as caught:
        client.submit(asked, waiter())
    assert set(caught.value.digests) == {digest_of(file.data or b"") for file in files}
    assert not caught.value.transient
    for file in files:
        client.put_input(file.data or b"", waiter())
    finish(client, client.submit(asked, waiter()).id)
    prompts.ended(success=1)


def test_a_document_that_the_app_refuses(client: ModalClient, edge: ModalEdge) -> None:
    asked = document(1)
    doubled = type(asked)(asked.request_id, (*asked.graphs, *asked.graphs))
    with pytest.raises(WorkflowRejectedError, match="same batch number"):
        client.submit(doubled, waiter())
    assert edge.calls["submit"] == 1


def test_a_request_that_was_cancelled_before_is_never_started(
    client: ModalClient, edge: ModalEdge, prompts: Prompts
) -> None:
    asked = document(1)
    assert client.cancel(waiter(), request_id=asked.request_id) is None
    with pytest.raises(WorkflowCancelledError):
        client.submit(asked, waiter())
    assert prompts.statuses == {}


def test_a_job_that_nobody_knows(client: ModalClient) -> None:
    for call in (
        lambda: client.job("fc-none", waiter()),
        lambda: client.cancel(waiter(), job_id="fc-none"),
    ):
        with pytest.raises(JobLostError):
            call()
    found = client.poll({"fc-none": ""}, 0, waiter())["fc-none"]
    assert (found.state, found.is_final) == ("unknown", True)
    assert isinstance(found.failure, JobLostError)


def test_an_output_that_is_not_there(client: ModalClient, job: Job) -> None:
    with pytest.raises(ServerResponseError) as caught:
        client.output(f"/v1/jobs/{job.id}/outputs/none.png", waiter())
    assert caught.value.status == 404
    for elsewhere in ("https://example.com/x.png", "//example.com/x.png", ""):
        with pytest.raises(ServerResponseError, match="elsewhere"):
            client.output(elsewhere, waiter())


# Cancelling, and time.


def test_cancelling_empties_comfyui(client: ModalClient, edge: ModalEdge, prompts: Prompts) -> None:
    job_id = client.submit(document(3, ENDLESS, steps=1000), waiter()).id
    prompts.running()
    edge.faults.reset_after("POST", "/v1/jobs/cancel", 1)
    assert client.cancel(waiter(), job_id=job_id) == job_id
    job, _ = finish(client, job_id)
    assert job.state == "cancelled"
    prompts.idle()
    assert (edge.calls["cancel"], prompts.statuses["success"]) == (2, 0)


def test_nobody_there_at_all(edge: ModalEdge) -> None:
    client = client_of(edge)
    edge.faults.refuse_connections = True
    with pytest.raises(ServerUnreachableError) as caught:
        client.submit(document(), waiter())
    client.close()
    edge.faults.refuse_connections = False
    assert not caught.value.maybe_received
    assert edge.calls["submit"] == 0


def test_a_submit_of_which_nobody_knows_says_so(client: ModalClient, edge: ModalEdge) -> None:
    edge.faults.reset_after("POST", "/v1/jobs", 1)
    edge.faults.stop_app("POST", "/v1/jobs")
    with pytest.raises(EndpointNotFoundError) as caught:
        client.submit(document(), waiter())
    assert caught.value.maybe_received  # the first may have arrived, and it had


def test_a_cold_start_has_its_budget(edge: ModalEdge) -> None:
    client = client_of(edge, cold_start_timeout=0.5)
    edge.limits.redirect_after = 0.1
    edge.limits.cold_start = ENDLESS
    edge.scale_to_zero()
    with pytest.raises(ServerNotReadyError, match=r"did not answer within 0\.5 s"):
        client.health(waiter())
    client.close()
    assert edge.runs["health"] == 0
