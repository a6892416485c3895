"""The Modal client without a socket: addresses, tokens, answers, the words for them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from comfy_executors import ModalWorkflowExecutor
from comfy_executors.clients import modal
from comfy_executors.clients.http import Answer
from comfy_executors.clients.modal import ModalClient
from comfy_executors.clients.modal_answers import (
    ModalBatch,
    ModalHealth,
    parse_health,
    parse_job,
    parse_jobs,
)
from comfy_executors.clients.modal_refusals import MissingInputsError, refusal_of
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    EndpointNotFoundError,
    JobExpiredError,
    JobLostError,
    PayloadTooLargeError,
    ServerError,
    ServerResponseError,
    WorkflowRejectedError,
)
from comfy_executors.executors.modal import describe
from comfy_executors.wire import JobDocument, JobGraph, encode_error

URL = "https://me--app-web.modal.run"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODAL_KEY", raising=False)
    monkeypatch.delenv("MODAL_SECRET", raising=False)


# Addresses.


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (URL, URL),
        (f" {URL}/ ", URL),
        ("https://images.example.com/comfy/", "https://images.example.com/comfy"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://127.1.2.3:8000", "http://127.1.2.3:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(url: str, kept: str) -> None:
    assert ModalClient(url).url == kept


@pytest.mark.parametrize(
    "url",
    [
        "http://me--app-web.modal.run",
        "http://192.168.1.5:8000",
        "http://localhost.example.com",
        "me--app-web.modal.run",
        "https://user:hush@me--app-web.modal.run",
        f"{URL}?key=hush",
        "ftp://x",
        "",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|https://") as caught:
        ModalClient(url)
    assert "hush" not in str(caught.value)


# Tokens.


def headers_of(client: ModalClient) -> dict[str, str]:
    sent = client._http.sent_headers()
    return {name: value for name, value in sent.items() if name.startswith("Modal")}


def test_tokens_come_from_arguments_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert headers_of(ModalClient(URL)) == {}
    monkeypatch.setenv("MODAL_KEY", "wk-env\n")
    monkeypatch.setenv("MODAL_SECRET", "ws-env")
    assert headers_of(ModalClient(URL)) == {"Modal-Key": "wk-env", "Modal-Secret": "ws-env"}
    given = headers_of(ModalClient(URL, "wk-1", "ws-1"))
    assert given == {"Modal-Key": "wk-1", "Modal-Secret": "ws-1"}
    assert headers_of(ModalClient(URL, "", "")) == {}


@pytest.mark.parametrize(
    ("key", "secret", "words"),
    [
        ("wk-hush", None, "secret= or MODAL_SECRET is missing"),
        (None, "ws-hush", "key= or MODAL_KEY is missing"),
        ("ak-hush", "as-hush", "account's token"),
        ("wk-hush", "as-hush", "account's token"),
        ("wk-hush\x00", "ws-hush", "characters"),
    ],
)
def test_tokens_that_are_none(key: str | None, secret: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ModalClient(URL, key, secret)
    assert "hush" not in str(caught.value)


def test_a_token_is_shown_nowhere() -> None:
    client = ModalClient(URL, "wk-hush", "ws-hush")
    executor = ModalWorkflowExecutor(URL, "wk-hush", "ws-hush")
    assert "hush" not in f"{client!r} {executor!r} {vars(executor)}"
    for holder in (client, executor):
        with pytest.raises((TypeError, AttributeError)):
            pickle.dumps(holder)


# Answers.


def test_a_job() -> None:
    batches = [{"batch": 3, "size": 2, "seed": None}]
    job = parse_job({"id": "fc-1", "state": "running", "cursor": "c", "batches": batches})
    assert (job.id, job.state, job.cursor, job.is_final) == ("fc-1", "running", "c", False)
    assert job.batches == (ModalBatch(3, 2, None),)


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "unknown", "expired"])
def test_final_states(state: str) -> None:
    assert parse_job({"id": "fc-1", "state": state}).is_final


@pytest.mark.parametrize(
    "body",
    [
        None, [], {}, {"id": "fc-1"}, {"state": "done"}, {"id": 1, "state": "done"},
        {"id": "", "state": "done"}, {"id": "fc-1", "state": "done", "events": {}, "batches": 1},
        {"id": "fc-1", "state": "done", "events": ["x"]},
        {"id": "fc-1", "state": "done", "batches": [{"batch": -1, "size": 1}]},
        {"id": "fc-1", "state": "done", "batches": [{"batch": 0, "size": "x"}]},
    ],
)  # fmt: skip
def test_an_answer_that_is_no_job(body: Any) -> None:
    with pytest.raises(ValueError, match=r"no |object"):
        parse_job(body)


def test_many_jobs() -> None:
    jobs = parse_jobs({"jobs": {"fc-1": {"state": "unknown"}, "fc-2": {"state": "expired"}}})
    assert isinstance(jobs["fc-1"].failure, JobLostError)
    assert isinstance(jobs["fc-2"].failure, JobExpiredError)
    with pytest.raises(ValueError, match="no JSON object"):
        parse_jobs({"jobs": []})


def test_health() -> None:
    body = {"worker": "comfy-executors", "version": "0.2.0", "protocol": 1, "backend": "modal"}
    assert parse_health({**body, "queued": None, "running": 2}) == ModalHealth(
        "0.2.0", 1, "modal", None, 2, None
    )
    with pytest.raises(ValueError, match="no app of comfy-executors"):
        parse_health({"ok": True})


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((None, None, None), ""),
        ((2, 0, 0), "2 jobs wait, and no GPU container runs"),
        ((2, 3, 3), "3 GPU containers are busy"),
        ((2, 0, 1), "should take one soon"),
    ],
)
def test_the_state_of_an_app_in_words(counts: tuple[Any, ...], words: str) -> None:
    assert words in describe(ModalHealth("0.2.0", 1, "modal", *counts))


# Refusals.


def refusal(status: int, body: str, token: tuple[str, ...] = ("wk-1",)) -> ComfyExecutorsError:
    return refusal_of("POST /v1/jobs", Answer(status, {}, body.encode()), URL, token)


EDGE = {
    (401, "modal-http: missing credentials for proxy authorization"):
        (AuthenticationError, "pass key= and secret=", False, False),
    (401, "modal-http: invalid credentials for proxy authorization"):
        (AuthenticationError, "not the account's token", False, False),
    (401, '{"detail": "no"}'): (AuthenticationError, "is wrong", False, False),
    (403, "forbidden"): (AuthenticationError, "not for this environment", False, False),
    (404, "modal-http: invalid function call"):
        (EndpointNotFoundError, "no app is deployed", True, False),
    (404, "modal-http: app for invoked web endpoint is stopped"):
        (EndpointNotFoundError, "deploy it again", False, False),
    (404, "modal-http: workspace ac-1 is disabled"):
        (EndpointNotFoundError, "billing", False, False),
    (404, "<html>"): (EndpointNotFoundError, "nothing of ours", False, False),
    (408, "Missing request, possibly due to expiry or cancellation"):
        (ServerResponseError, "Missing request", True, False),
    (429, "modal-http: rate limit exceeded"): (ServerResponseError, "rate", True, False),
    (429, "slow down"): (ServerResponseError, "slow down", True, False),
    (429, "modal-http: Webhook failed: workspace billing cycle spend limit reached"):
        (ServerResponseError, "spend limit", False, False),
    (400, "modal-http: bad redirect method"): (ServerResponseError, "bad redirect", False, False),
    (500, "modal-http: internal error: function was terminated by signal"):
        (ServerResponseError, "terminated", True, True),
    (500, "modal-http: internal error: status InternalFailure: Server has lost track of input"):
        (ServerResponseError, "lost track", True, True),
    (500, "modal-http: internal server error: status Failure: ValueError('x')"):
        (ServerResponseError, "look at its logs", False, True),
    (500, "Internal Server Error"): (ServerResponseError, "Internal", True, True),
    (502, "<!doctype html><p>x"): (ServerResponseError, "an HTML page", True, True),
    (504, ""): (ServerResponseError, "an empty body", True, True),
}  # fmt: skip


@pytest.mark.parametrize("answer", EDGE, ids=lambda answer: f"{answer[0]} {answer[1][:50]}")
def test_what_the_edge_says(answer: tuple[int, str]) -> None:
    kind, words, transient, received = EDGE[answer]
    error = refusal(*answer)
    assert type(error) is kind
    assert isinstance(error, ServerError)
    assert words in str(error)
    assert (error.status, error.transient, error.maybe_received) == (
        answer[0], transient, received,
    )  # fmt: skip
    assert URL in str(error)


def app(status: int, kind: str, **facts: Any) -> ComfyExecutorsError:
    return refusal(status, json.dumps({"error": {"kind": kind, "message": "it is so", **facts}}))


@pytest.mark.parametrize(
    ("status", "kind", "transient"),
    [
        (400, "bad_request", False),
        (404, "unknown_output", False),
        (404, "unknown_route", False),
        (413, "too_large", False),
        (503, "submitting", True),
        (503, "overloaded", True),
        (500, "internal", True),
    ],
)
def test_what_the_app_says(status: int, kind: str, transient: bool) -> None:
    error = app(status, kind)
    assert type(error) is ServerResponseError
    assert "it is so" in str(error)
    assert (error.status, error.transient) == (status, transient)


def test_a_failure_of_the_app_is_ours_again() -> None:
    told = WorkflowRejectedError((), "no graph", kind="bad_job_document")
    error = app(422, "refused", failure=encode_error(told))
    assert isinstance(error, WorkflowRejectedError)
    assert "no graph" in str(error)


def test_missing_inputs() -> None:
    error = app(409, "missing_inputs", inputs=["a", "b"])
    assert isinstance(error, MissingInputsError)
    assert error.digests == ("a", "b")


def test_a_retry_after_is_heeded() -> None:
    answer = Answer(429, {"retry-after": "7"}, b"modal-http: rate limit exceeded")
    error = refusal_of("GET /", answer, URL, ())
    assert isinstance(error, ServerError)
    assert error.retry_after == 7.0


# Sizes.


def test_a_job_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal, "MAX_DOCUMENT_BYTES", 1000)
    graph = JobGraph(0, 1, None, {"1": {"class_type": "X", "inputs": {"text": "x" * 1000}}})
    document = JobDocument("0" * 36, (graph,))
    with pytest.raises(PayloadTooLargeError) as caught:
        ModalClient(URL).submit(document, None)  # type: ignore[arg-type]
    assert caught.value.limit == 1000


def test_both_ends_have_the_same_limits() -> None:
    web = pytest.importorskip("comfy_executors.workers.modal_web")
    for name in ("PROTOCOL", "MAX_WAIT", "MAX_JOBS", "MAX_DOCUMENT_BYTES", "MAX_INPUT_BYTES"):
        assert getattr(modal, name) == getattr(web, name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cold_start_timeout": 0}, "cold_start_timeout"),
        ({"queue_timeout": -1}, "queue_timeout"),
        ({"execution_timeout": 0.0}, "execution_timeout"),
        ({"batches_per_job": 0}, "batches_per_job"),
        ({"max_workers": 0}, "max_workers"),
    ],
)
def test_arguments_of_an_executor(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModalWorkflowExecutor(URL, **options)
