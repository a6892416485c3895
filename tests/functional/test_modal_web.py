"""The routes of the Modal app: uvicorn behind the edge, the engine, the dev server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from modal_kit import Caller, assemble, emptied, failure_of
from server_kit import ENDLESS, PATIENCE, bench_graph, statuses, threads_since
from worker_kit import HOSTILE, bench_document, document, load_graph, node

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    InputImageError,
    JobExpiredError,
    JobInterruptedError,
    NodeExecutionError,
    WorkflowCancelledError,
    WorkflowRejectedError,
)
from comfy_executors.testing import ModalEdge
from comfy_executors.workers import modal_web


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def edge(server: DevServer) -> Iterator[ModalEdge]:
    with ModalEdge.in_front_of(server.address, containers=3) as started:
        yield started


@pytest.fixture
def app(edge: ModalEdge) -> Caller:
    return Caller(edge.url, edge.key, edge.secret)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# A job from its submit to its files.


def test_a_job_is_told_by_its_events_and_its_files_stand_behind_urls(
    app: Caller, server: DevServer
) -> None:
    job = bench_document(3, batch_size=2)
    job_id = app.submit(job)
    last, events = app.finish(job_id)
    answer = assemble(events, job)
    assert (last["state"], last["error"]) == ("done", None)
    assert last["request_id"] == job.request_id
    assert sorted(answer.batches) == [0, 1, 2]
    outputs = [event for event in events if event["kind"] == "output"]
    assert len({event["url"] for event in outputs}) == len(outputs) == 6
    assert not any("data" in event for event in outputs)
    assert all(digest(app.output(event)) == event["sha256"] for event in outputs)
    assert server.node_runs == {"BenchSampler": 3, "SaveImage": 3}


def test_all_events_but_fast_progress_are_told_once_and_in_order(app: Caller) -> None:
    _, events = app.finish(app.submit(bench_document(4)))
    places = [(event["attempt"], event["seq"]) for event in events]
    assert places == sorted(set(places))
    kinds = [event["kind"] for event in events if event["kind"] != "progress"]
    assert sorted(kinds) == sorted(["started", *["output", "batch"] * 4, "end"])
    steps = [e["event"]["kind"] for e in events if e["kind"] == "progress"]
    assert (steps.count("queued"), steps.count("started")) == (4, 4)


def test_events_are_told_again_from_any_cursor(app: Caller) -> None:
    job_id = app.submit(bench_document(2))
    cursors = [""]
    told: list[list[dict[str, Any]]] = []
    while not told or told[-1][-1]["kind"] != "end":
        job = app.poll_jobs({job_id: cursors[-1]})[job_id]
        if job["events"]:
            told.append(job["events"])
            cursors.append(job["cursor"])
    app.finish(job_id)
    for place, cursor in enumerate(cursors):
        again = app.poll_jobs({job_id: cursor})[job_id]["events"]
        wanted = [event for events in told[place:] for event in events]
        assert [e for e in again if e["kind"] != "progress"] == [
            e for e in wanted if e["kind"] != "progress"
        ]


def test_one_job_tells_its_batches_to_who_takes_it_up(app: Caller) -> None:
    job = document(bench_graph(seed=1), bench_graph(seed=2))
    job_id = app.submit(job)
    app.finish(job_id)
    answer = app.call("GET", f"/v1/jobs/{job_id}")
    assert answer.status_code == 200
    told = answer.json()
    assert told["batches"] == [{"batch": n, "size": 1, "seed": None} for n in (0, 1)]
    assert (told["state"], told["events"][-1]["kind"]) == ("done", "end")
    after = app.call("GET", f"/v1/jobs/{job_id}", params={"after": told["cursor"]}).json()
    assert after["events"] == []


def test_a_batch_that_fails_is_an_event_of_a_job_that_is_done(app: Caller) -> None:
    job = document(bench_graph(seed=1, fail="out of luck"), bench_graph(seed=2))
    last, events = app.finish(app.submit(job))
    answer = assemble(events, job)
    assert last["state"] == "done"
    assert isinstance(answer.failures[0], NodeExecutionError)
    assert sorted(answer.batches) == [1]


# Submitting.


def test_the_same_request_id_is_one_job(app: Caller, server: DevServer) -> None:
    raw = wire.encode_document(bench_document(1))
    first, second = (app.post("/v1/jobs", raw) for _ in range(2))
    assert (first.json()["repeated"], second.json()["repeated"]) == (False, True)
    assert first.json()["id"] == second.json()["id"]
    assert first.headers["Location"] == f"/v1/jobs/{first.json()['id']}"
    app.finish(first.json()["id"])
    assert len(server.prompts) == 1


def test_many_submits_at_once_are_one_job(app: Caller, server: DevServer, edge: ModalEdge) -> None:
    raw = wire.encode_document(bench_document(1))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: app.post("/v1/jobs", raw), range(8)))
    assert {answer.status_code for answer in answers} == {202}
    (job_id,) = {answer.json()["id"] for answer in answers}
    assert [answer.json()["repeated"] for answer in answers].count(False) == 1
    app.finish(job_id)
    assert len(server.prompts) == 1


@pytest.mark.parametrize(("changes", "kind", "words"), HOSTILE)
def test_a_wrong_document_is_refused_with_the_error_to_raise(
    app: Caller, server: DevServer, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    answer = app.post("/v1/jobs", {**wire.encode_document(bench_document(1)), **changes})
    assert (answer.status_code, answer.json()["error"]["kind"]) == (422, "refused")
    error = failure_of(answer)
    assert type(error) is kind
    assert words in str(error)
    assert not server.prompts


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "kind"),
    [
        ("POST", "/v1/jobs", {"data": b"{"}, 400, "bad_request"),
        ("POST", "/v1/jobs", {"json": [1]}, 400, "bad_request"),
        ("POST", "/v1/jobs", {}, 400, "bad_request"),
        ("POST", "/v1/jobs/poll", {"json": {"jobs": {}}}, 400, "bad_request"),
        ("POST", "/v1/jobs/poll", {"json": {"jobs": {"fc-1": "x"}}}, 400, "bad_request"),
        ("POST", "/v1/jobs/poll", {"json": {"jobs": {"fc-1": "1.2"}}}, 400, "bad_request"),
        ("POST", "/v1/jobs/poll", {"json": {"jobs": {"a": ""}, "wait": -1}}, 400, "bad_request"),
        (
            "POST",
            "/v1/jobs/poll",
            {"json": {"jobs": {f"fc-{number}": "" for number in range(101)}}},
            400,
            "bad_request",
        ),
        ("POST", "/v1/jobs/cancel", {"json": {}}, 400, "bad_request"),
        ("POST", "/v1/jobs/cancel", {"json": {"id": "a", "request_id": "b"}}, 400, "bad_request"),
        ("POST", "/v1/jobs/cancel", {"json": {"id": "fc-none"}}, 404, "unknown_job"),
        ("GET", "/v1/jobs/fc-none", {}, 404, "unknown_job"),
        ("GET", "/v1/jobs/fc-none/outputs/1_00000_00000.png", {}, 404, "unknown_job"),
        ("PUT", f"/v1/inputs/{'A' * 64}", {"data": b"x"}, 400, "bad_request"),
        ("PUT", f"/v1/inputs/{'0' * 64}", {"data": b"x"}, 400, "wrong_hash"),
        ("GET", "/v1/nothing", {}, 404, "unknown_route"),
        ("GET", "/docs", {}, 404, "unknown_route"),
        ("DELETE", "/v1/jobs", {}, 405, "wrong_method"),
    ],
)
def test_what_is_wrong_is_answered_in_json(
    app: Caller, method: str, path: str, options: dict[str, Any], status: int, kind: str
) -> None:
    answer = app.call(method, path, **options)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)
    assert answer.json()["error"]["message"]


def test_too_large_a_body_is_refused_unread(app: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_web, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(modal_web, "MAX_INPUT_BYTES", 2000)
    for method, path, size in (
        ("POST", "/v1/jobs", 1001),
        ("PUT", f"/v1/inputs/{'0' * 64}", 2001),
    ):
        answer = app.call(method, path, data=b" " * size)
        assert (answer.status_code, answer.json()["error"]["kind"]) == (413, "too_large")


def test_an_id_that_is_none_of_ours_is_unknown(app: Caller) -> None:
    job_id = app.submit(bench_document(1))
    jobs = app.poll_jobs({"fc-01STRANGER": "", job_id: ""}, wait=20)
    assert jobs["fc-01STRANGER"]["state"] == "unknown"
    assert isinstance(failure_of(jobs["fc-01STRANGER"]), JobExpiredError)
    assert jobs[job_id]["state"] in ("queued", "running", "done")


def test_what_is_not_kept_any_more_is_expired(app: Caller, edge: ModalEdge) -> None:
    job_id = app.submit(bench_document(1))
    app.finish(job_id)
    edge.backend.expire(job_id)
    assert app.poll_jobs({job_id: ""})[job_id]["state"] == "expired"
    answer = app.call("GET", f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.json()["error"]["kind"]) == (410, "expired")
    assert isinstance(failure_of(answer), JobExpiredError)


def test_health_tells_how_busy_the_app_is(app: Caller, edge: ModalEdge) -> None:
    job_ids = [app.submit(bench_document(1, ENDLESS, steps=1000)) for _ in range(4)]
    for job_id in job_ids[:3]:
        app.until(job_id, "started")
    health = app.call("GET", "/v1/health").json()
    assert (health["ok"], health["protocol"], health["backend"]) == (True, 1, "local")
    assert (health["queued"], health["running"], health["containers"]) == (1, 3, 3)
    for job_id in job_ids:
        app.post("/v1/jobs/cancel", {"id": job_id})
    assert {app.finish(job_id)[0]["state"] for job_id in job_ids} == {"cancelled"}


# Waiting.


def test_a_poll_waits_no_longer_than_it_may(app: Caller) -> None:
    job_id = app.submit(bench_document(1, ENDLESS, steps=1))
    cursor = ""
    while cursor.split("/")[0] < "1.2":  # past started, queued and started on ComfyUI
        cursor = app.poll_jobs({job_id: cursor})[job_id]["cursor"]
    begun = time.monotonic()
    quiet = app.poll_jobs({job_id: cursor}, wait=0.5)[job_id]
    assert 0.4 < time.monotonic() - begun < PATIENCE / 2
    assert quiet["state"] == "running"
    app.post("/v1/jobs/cancel", {"id": job_id})


def test_no_poll_is_held_longer_than_the_cap(app: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modal_web, "MAX_WAIT", 0.2)
    job_id = app.submit(bench_document(1, ENDLESS, steps=1))
    cursor = app.poll_jobs({job_id: ""})[job_id]["cursor"]
    for _ in range(3):  # each of them would go on until the test gives up
        assert app.poll_jobs({job_id: cursor}, wait=1000)[job_id]["state"] == "running"
        answer = app.call("GET", f"/v1/jobs/{job_id}", params={"after": cursor, "wait": 1000})
        assert answer.json()["state"] == "running"
    app.post("/v1/jobs/cancel", {"id": job_id})


def test_many_jobs_wait_on_one_call(app: Caller, edge: ModalEdge) -> None:
    """Twenty jobs, all of them waiting: no more than one call in two seconds for all of them."""
    first = app.submit(bench_document(1, ENDLESS, steps=10_000))
    others = [app.submit(bench_document(1, ENDLESS, steps=10_000)) for _ in range(19)]
    cursors = dict.fromkeys([first, *others], "")
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # what there is at first
        jobs = app.poll_jobs(cursors, wait=0.0)
        cursors = {job_id: job["cursor"] for job_id, job in jobs.items()}
    edge.clear()
    begun = time.monotonic()
    calls = 0
    while time.monotonic() - begun < 4.5:
        jobs = app.poll_jobs(cursors)
        cursors = {job_id: job["cursor"] for job_id, job in jobs.items()}
        calls += 1
    assert edge.calls == {"poll": calls}
    assert calls <= (time.monotonic() - begun) / modal_web.PROGRESS_SECONDS + 1
    app.post("/v1/jobs/cancel", {"id": others[-1]})
    jobs = app.poll_jobs(cursors)
    assert jobs[others[-1]]["state"] == "cancelled"
    for job_id in cursors:
        app.post("/v1/jobs/cancel", {"id": job_id})
    assert {app.finish(job_id)[0]["state"] for job_id in cursors} == {"cancelled"}


def test_an_output_is_told_as_soon_as_its_file_exists(app: Caller, server: DevServer) -> None:
    """The rest of its graph still runs: it ends the wait of a poll, which progress would not."""
    late = bench_graph(ENDLESS, seed=5, text=["1", 1], steps=1000)["1"]
    save = node("SaveImage", images=["3", 0], filename_prefix="late")
    job_id = app.submit(document({**bench_graph(), "3": late, "4": save}))
    told = app.until(job_id, "output")[-1]
    seconds = time.time() - (server.directory / "output" / told["name"]).stat().st_mtime
    assert statuses(server) == {"running": 1}
    assert app.output(told)
    assert seconds < modal_web.PROGRESS_SECONDS / 2  # some 0.2 s on a machine with time
    app.post("/v1/jobs/cancel", {"id": job_id})
    app.finish(job_id)


# Inputs and outputs.


def test_inputs_are_put_once_and_named_by_their_digest(
    app: Caller, server: DevServer, edge: ModalEdge
) -> None:
    job_id = app.submit(bench_document(1))
    _, events = app.finish(job_id)
    data = app.output(next(event for event in events if event["kind"] == "output"))
    path = f"/v1/inputs/{digest(data)}"
    job = document(
        load_graph("a.png"), input_images=(wire.InputFile("a.png", sha256=digest(data)),)
    )
    assert app.call("HEAD", path).status_code == 404
    answer = app.post("/v1/jobs", wire.encode_document(job))
    assert answer.status_code == 409
    assert answer.json()["error"]["kind"] == "missing_inputs"
    assert answer.json()["error"]["inputs"] == [digest(data)]
    put, again = app.call("PUT", path, data=data), app.call("PUT", path, data=data)
    assert (put.status_code, again.status_code) == (201, 200)
    assert put.json() == {"sha256": digest(data), "size": len(data)}
    assert app.call("HEAD", path).status_code == 200
    last, events = app.finish(app.submit(job))
    assert last["state"] == "done"
    assert assemble(events, job).failures == {}
    assert (server.directory / "input" / "a.png").read_bytes() == data


def test_an_input_that_has_lain_long_is_put_again_before_a_job_waits_for_it(
    app: Caller, edge: ModalEdge
) -> None:
    data = uuid.uuid4().bytes
    path = f"/v1/inputs/{digest(data)}"
    file = edge.backend.directory / "inputs" / digest(data)
    named = (wire.InputFile("a.png", sha256=digest(data)),)
    job = wire.encode_document(document(bench_graph(), input_images=named))
    app.call("PUT", path, data=data)
    days = 24 * 3600.0
    os.utime(file, times=(time.time() - 3 * days,) * 2)
    assert app.call("PUT", path, data=data).status_code == 200
    assert app.call("HEAD", path).status_code == 200
    os.utime(file, times=(time.time() - 5 * days,) * 2)
    assert app.call("HEAD", path).status_code == 404
    assert app.post("/v1/jobs", job).status_code == 409
    assert app.call("PUT", path, data=data).status_code == 201
    assert time.time() - file.stat().st_mtime < days
    assert app.post("/v1/jobs", job).status_code == 202


def test_an_input_that_is_gone_when_the_job_begins_is_an_error_of_the_job(
    app: Caller, edge: ModalEdge
) -> None:
    data = uuid.uuid4().bytes
    app.call("PUT", f"/v1/inputs/{digest(data)}", data=data)
    gate = app.submit(bench_document(1, ENDLESS, steps=1000))
    blocked = [gate, *(app.submit(bench_document(1, ENDLESS, steps=1000)) for _ in range(2))]
    file = wire.InputFile("a.png", sha256=digest(data))
    job = document(load_graph("a.png"), input_images=(file,))
    job_id = app.submit(job)
    (edge.backend.directory / "inputs" / digest(data)).unlink()
    for other in blocked:
        app.post("/v1/jobs/cancel", {"id": other})
    _, events = app.finish(job_id)
    error = assemble(events, job).failures[None]
    assert isinstance(error, InputImageError)
    assert "not kept any more" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "../../records",
        "..%2f..%2fetc%2fpasswd",
        "1_00000_00001.png",
        "1_00000_00000.png%00",
        "%2e%2e",
    ],
)
def test_only_what_the_job_told_of_is_served(app: Caller, name: str) -> None:
    job_id = app.submit(bench_document(1))
    _, events = app.finish(job_id)
    assert app.output(next(event for event in events if event["kind"] == "output"))
    url = f"{app.url}/v1/jobs/{job_id}/outputs/{name}"
    request = app.session.prepare_request(requests.Request("GET", url))
    request.url = url  # as it stands: requests would tidy it up
    answer = app.session.send(request, timeout=PATIENCE)
    assert answer.status_code == 404
    assert answer.json()["error"]["kind"] in ("unknown_output", "unknown_route")


def test_an_output_is_no_page_for_a_browser(app: Caller) -> None:
    _, events = app.finish(app.submit(bench_document(1)))
    url = next(event["url"] for event in events if event["kind"] == "output")
    headers = app.call("GET", url).headers
    assert headers["Content-Type"] == "image/png"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Disposition"] == "attachment"


# Cancelling.


def test_cancelling_ends_with_an_empty_queue(app: Caller, server: DevServer) -> None:
    job_id = app.submit(bench_document(5, ENDLESS, steps=1000))
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
    answers = [app.post("/v1/jobs/cancel", {"id": job_id}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == job_id
    last, events = app.finish(job_id)
    assert last["state"] == "cancelled"
    assert isinstance(failure_of(last), JobInterruptedError)
    assert "end" not in {event["kind"] for event in events}
    emptied(server)


def test_a_job_that_waits_is_cancelled_without_having_begun(
    app: Caller, server: DevServer, edge: ModalEdge
) -> None:
    running = [app.submit(bench_document(1, ENDLESS, steps=1000)) for _ in range(3)]
    for job_id in running:
        app.until(job_id, "started")
    waiting = app.submit(bench_document(1))
    app.post("/v1/jobs/cancel", {"id": waiting})
    for job_id in running:
        app.post("/v1/jobs/cancel", {"id": job_id})
    last, events = app.finish(waiting)
    assert (last["state"], events) == ("cancelled", [])
    assert {app.finish(job_id)[0]["state"] for job_id in running} == {"cancelled"}
    assert statuses(server)["success"] == 0


def test_a_job_that_has_ended_stays_as_it_is(app: Caller) -> None:
    job_id = app.submit(bench_document(1))
    app.finish(job_id)
    answer = app.post("/v1/jobs/cancel", {"id": job_id})
    assert (answer.status_code, answer.json()["state"]) == (202, "done")
    assert app.poll_jobs({job_id: ""})[job_id]["state"] == "done"


def test_who_never_learned_the_id_cancels_by_the_request_id(app: Caller, server: DevServer) -> None:
    job = bench_document(1, ENDLESS, steps=1000)
    job_id = app.submit(job)
    server.wait_for(lambda s: statuses(s) == {"running": 1}, PATIENCE)
    answer = app.post("/v1/jobs/cancel", {"request_id": job.request_id})
    assert answer.json()["id"] == job_id
    assert app.finish(job_id)[0]["state"] == "cancelled"
    emptied(server)


def test_a_request_that_was_cancelled_before_it_came_is_never_started(
    app: Caller, server: DevServer
) -> None:
    job = bench_document(1)
    cancelled = app.post("/v1/jobs/cancel", {"request_id": job.request_id}).json()
    assert (cancelled["id"], cancelled["state"]) == (None, "cancelled")
    answer = app.post("/v1/jobs", wire.encode_document(job))
    assert (answer.status_code, answer.json()["error"]["kind"]) == (409, "cancelled")
    assert isinstance(failure_of(answer), WorkflowCancelledError)
    assert not server.prompts


def test_a_refusal_by_comfyui_is_told_with_its_node(app: Caller) -> None:
    job = document({"1": {"class_type": "NoSuchNode", "inputs": {}}, **bench_graph()})
    _, events = app.finish(app.submit(job))
    error = assemble(events, job).failures
    assert not error or isinstance(next(iter(error.values())), WorkflowRejectedError)


def test_closing_leaves_no_thread(server: DevServer) -> None:
    before = set(threading.enumerate())
    with ModalEdge.in_front_of(server.address) as edge:
        app = Caller(edge.url, edge.key, edge.secret)
        app.submit(bench_document(2, ENDLESS, steps=1000))
        server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
        assert threads_since(before)
    assert threads_since(before) == set()
    emptied(server)


# What has to be installed.


def in_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return done.stdout.strip()


def test_the_routes_and_both_backends_load_without_modal() -> None:
    code = (
        "import sys; from comfy_executors.workers import modal_web, modal_local, modal_backend;"
        "print('modal' in sys.modules)"
    )
    assert in_python(code) == "False"


@pytest.mark.parametrize(
    ("package", "code", "extra"),
    [
        ("fastapi", "import comfy_executors.workers.modal_web", "modal-worker"),
        ("uvicorn", "from comfy_executors.testing import ModalEdge", "modal-worker"),
        (
            "modal",
            "from comfy_executors.workers.modal_backend import ModalPlaces; ModalPlaces('x')",
            "modal-app",
        ),
    ],
)
def test_what_is_missing_is_told_with_its_extra(package: str, code: str, extra: str) -> None:
    told = in_python(
        f"import sys; sys.modules[{package!r}] = None\n"
        "from comfy_executors.errors import MissingExtraError\n"
        f"try:\n    exec({code!r})\nexcept MissingExtraError as error:\n    print(error)"
    )
    assert told == f"{package} is not installed: run pip install 'comfy-executors[{extra}]'"


def test_the_stand_in_for_runpod_needs_nothing_of_modals() -> None:
    code = "import sys, comfy_executors.testing; print({'uvicorn', 'fastapi'} & {*sys.modules})"
    assert in_python(code) == "set()"
