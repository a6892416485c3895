"""The edge of Modal on loopback does what the reference says of the real one, and counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from fastapi import FastAPI, Request
from modal_kit import Caller
from server_kit import PATIENCE
from worker_kit import bench_document

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.testing import ModalEdge


def echo() -> FastAPI:
    """An app that answers with what it was given."""
    app = FastAPI()

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT"])
    async def answer(path: str, request: Request) -> dict[str, Any]:
        body = (await request.body()).decode()
        return {"method": request.method, "path": path, "body": body, **dict(request.headers)}

    return app


@pytest.fixture(scope="module")
def shared() -> Iterator[ModalEdge]:
    with ModalEdge(echo()) as started:
        yield started


@pytest.fixture
def edge(shared: ModalEdge) -> ModalEdge:
    shared.clear()
    return shared


@pytest.fixture
def app(edge: ModalEdge) -> Caller:
    return Caller(edge.url, edge.key, edge.secret)


def test_requests_are_passed_on_and_counted(app: Caller, edge: ModalEdge) -> None:
    told = app.post("/v1/jobs", {"a": 1}).json()
    assert (told["method"], told["body"]) == ("POST", '{"a": 1}')
    assert "modal-secret" not in told
    app.call("GET", "/v1/jobs/fc-1/outputs/x.png")
    app.call("GET", "/v1/jobs/fc-1")
    assert edge.calls == edge.runs == {"submit": 1, "output": 1, "job": 1}


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "modal-http: missing credentials for proxy authorization"),
        ({"Modal-Key": "wk-edge"}, "modal-http: missing credentials for proxy authorization"),
        (
            {"Modal-Key": "ak-1", "Modal-Secret": "as-1"},
            "modal-http: invalid credentials for proxy authorization",
        ),
        (
            {"Authorization": "Bearer wk-edge.wrong"},
            "modal-http: invalid credentials for proxy authorization",
        ),
    ],
)
def test_who_has_no_token_never_reaches_the_app(
    edge: ModalEdge, headers: dict[str, str], words: str
) -> None:
    answer = requests.get(f"{edge.url}/v1/health", headers=headers, timeout=PATIENCE)
    assert (answer.status_code, answer.text) == (401, words)
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert not edge.runs


def test_both_forms_of_a_token_are_taken(edge: ModalEdge) -> None:
    for headers in (
        {"Modal-Key": str(edge.key), "Modal-Secret": edge.secret},
        {"Authorization": f"Bearer {edge.key}.{edge.secret}"},
    ):
        answer = requests.get(f"{edge.url}/v1/health", headers=headers, timeout=PATIENCE)
        assert answer.status_code == 200


# 303.


def slow(edge: ModalEdge, seconds: float) -> None:
    """Make the app take so long for its next request."""
    edge.limits.cold_start = seconds
    edge.scale_to_zero()


def test_what_takes_long_is_answered_303_until_it_is_done(app: Caller, edge: ModalEdge) -> None:
    edge.limits.redirect_after = 0.1
    slow(edge, 1.0)
    answer = app.post("/v1/jobs", {"a": 1})
    assert answer.json()["method"] == "POST"  # it was posted once, and its result was fetched
    assert {hop.status_code for hop in answer.history} == {303}
    assert edge.calls["submit"] == edge.runs["submit"] == 1
    assert edge.calls["result"] == len(answer.history) >= 2


def test_a_303_can_come_at_once(app: Caller, edge: ModalEdge) -> None:
    edge.faults.redirect("POST", "/v1/jobs")
    answer = app.post("/v1/jobs", {})
    assert [hop.status_code for hop in answer.history] == [303]
    assert "__modal_function_call_id=fc-" in answer.history[0].headers["Location"]
    assert app.post("/v1/jobs", {}).history == []


def test_a_result_is_read_once_and_only_by_get(app: Caller, edge: ModalEdge) -> None:
    edge.faults.redirect("POST", "/v1/jobs")
    moved = app.call("POST", "/v1/jobs", json={}, allow_redirects=False)
    url = moved.headers["Location"].replace(edge.url, "")
    wrong = app.call("POST", url, json={})
    assert (wrong.status_code, wrong.text) == (400, "modal-http: bad redirect method")
    assert app.call("GET", url).json()["method"] == "POST"
    assert app.call("GET", url).status_code == 404
    assert edge.runs["submit"] == 1


# Refusals.


@pytest.mark.parametrize(
    ("fault", "options", "status", "words"),
    [
        ("lose_body", {}, 408, "Missing request, possibly due to expiry or cancellation"),
        ("limit_rate", {"retry_after": 2}, 429, "modal-http: rate limit"),
        ("limit_spending", {"times": 1}, 429, "workspace billing cycle spend limit reached"),
        ("undeploy", {"times": 1}, 404, "modal-http: invalid function call"),
        ("stop_app", {"times": 1}, 404, "app for invoked web endpoint is stopped"),
        ("disable_workspace", {"times": 1}, 404, "is disabled"),
        ("crash", {}, 500, "modal-http: internal error: function was terminated by signal"),
    ],
)
def test_each_refusal_is_worded_as_the_real_one(
    app: Caller, edge: ModalEdge, fault: str, options: dict[str, Any], status: int, words: str
) -> None:
    getattr(edge.faults, fault)("POST", "/v1/jobs", **options)
    answer = app.post("/v1/jobs", {})
    assert answer.status_code == status
    assert words in answer.text
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert answer.headers.get("Retry-After") == ("2" if fault == "limit_rate" else None)
    assert not edge.runs
    assert app.post("/v1/jobs", {}).status_code == 200


def test_connections_break_before_and_after_the_app_was_reached(
    app: Caller, edge: ModalEdge
) -> None:
    edge.faults.reset_before("POST", "/v1/jobs")
    with pytest.raises(requests.ConnectionError):
        app.post("/v1/jobs", {})
    assert edge.runs["submit"] == 0
    edge.faults.reset_after("POST", "/v1/jobs")
    with pytest.raises(requests.ConnectionError):
        app.post("/v1/jobs", {})
    assert edge.runs["submit"] == 1


def test_a_body_that_is_too_large_never_reaches_the_app(app: Caller, edge: ModalEdge) -> None:
    edge.limits.body_bytes = 1000
    assert app.call("PUT", "/v1/inputs/x", data=b"x" * 1001).status_code == 413
    assert not edge.runs


def test_a_cold_start_delays_the_first_request_only(app: Caller, edge: ModalEdge) -> None:
    slow(edge, 0.5)
    begun = time.monotonic()
    app.call("GET", "/v1/health")
    cold = time.monotonic()
    app.call("GET", "/v1/health")
    assert cold - begun >= 0.5
    assert time.monotonic() - cold < cold - begun


# With our app behind it: nothing runs twice.


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def ours(server: DevServer) -> Iterator[ModalEdge]:
    with ModalEdge.in_front_of(server.address) as started:
        yield started


@pytest.mark.parametrize("fault", ["run_twice", "reset_after", "redirect", "crash", "lose_body"])
def test_a_submit_that_goes_wrong_is_made_again_and_runs_once(
    ours: ModalEdge, server: DevServer, fault: str
) -> None:
    app = Caller(ours.url, ours.key, ours.secret)
    job = bench_document(2)
    getattr(ours.faults, fault)("POST", "/v1/jobs")
    for _ in range(2):
        try:
            answer = app.post("/v1/jobs", wire.encode_document(job))
        except requests.ConnectionError:
            continue
        if answer.status_code == 202:
            break
    last, events = app.finish(answer.json()["id"])
    assert last["state"] == "done"
    assert [event["kind"] for event in events].count("batch") == 2
    assert len(server.prompts) == 2
    assert server.node_runs["BenchSampler"] == 2


def test_an_answer_to_a_poll_that_is_lost_is_told_again(ours: ModalEdge) -> None:
    app = Caller(ours.url, ours.key, ours.secret)
    job_id = app.submit(bench_document(3))
    ours.faults.reset_after("POST", "/v1/jobs/poll", times=2)
    ours.faults.redirect("POST", "/v1/jobs/poll", times=2)
    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            app.poll_jobs({job_id: ""})
    _, events = app.finish(job_id)
    assert [event["kind"] for event in events].count("output") == 3
