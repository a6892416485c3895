"""The dev server's queue, history and jobs, and how its versions differ."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

import pytest
from devserver_client import (
    PROMPT_ID,
    Client,
    bench,
    call,
    dev_server,
    endless,
    finished,
    get,
    kind_of,
    node,
    plain,
    post,
    running,
)

from comfy_executors.devserver import DevServer


@pytest.fixture
def server() -> Iterator[DevServer]:
    with dev_server() as started:
        yield started


def test_interrupt_stops_between_two_steps(server: DevServer) -> None:
    client = Client(server)
    prompt_id = client.post(endless())
    client.until("executing")
    call(server, "POST", "/interrupt", json={"prompt_id": PROMPT_ID})
    assert get(server, "/queue")["queue_running"] != []
    call(server, "POST", "/interrupt", json={"prompt_id": prompt_id})
    assert kind_of(client.end()[-3]) == "execution_interrupted"
    assert server.prompts[0].status == "interrupted"
    assert server.prompts[0].executed_nodes == []


def test_interrupt_without_an_id_stops_whatever_runs(server: DevServer) -> None:
    post(server, endless())
    server.wait_for(running)
    assert call(server, "POST", "/interrupt").status_code == 200
    server.wait_for(finished())
    assert server.prompts[0].status == "interrupted"


def test_a_prompt_deleted_from_the_queue_never_runs(server: DevServer) -> None:
    first = post(server, endless())
    ids = [post(server, plain(color)) for color in range(3)]
    call(server, "POST", "/queue", json={"delete": [ids[1], first, "unknown"]})
    call(server, "POST", "/interrupt")
    server.wait_for(finished(4))
    assert [record.status for record in server.prompts] == [
        "interrupted", "success", "deleted", "success",
    ]  # fmt: skip


def test_clearing_the_queue_spares_what_runs(server: DevServer) -> None:
    post(server, endless())
    server.wait_for(running)
    for color in range(3):
        post(server, plain(color))
    call(server, "POST", "/queue", json={"clear": True})
    assert [record.status for record in server.prompts] == ["running"] + ["deleted"] * 3


def test_cancelling_many_jobs_at_once(server: DevServer) -> None:
    ids = [post(server, endless()), post(server, plain(1)), post(server, plain(2))]
    server.wait_for(running)
    answer = call(server, "POST", "/api/jobs/cancel", json={"job_ids": ids[:2]})
    assert answer.json() == {"cancelled": True}
    server.wait_for(finished(3))
    statuses = [get(server, f"/api/jobs/{ids[0]}")["status"], server.prompts[1].status]
    assert statuses == ["cancelled", "deleted"]
    assert server.prompts[2].status == "success"


def test_jobs_that_wait_or_run_say_so(server: DevServer) -> None:
    ids = [post(server, endless()), post(server, plain())]
    server.wait_for(running)
    assert [get(server, f"/api/jobs/{id_}")["status"] for id_ in ids] == ["in_progress", "pending"]


def test_history_pages_and_is_forgotten(server: DevServer) -> None:
    ids = [post(server, plain(color)) for color in range(4)]
    server.wait_for(finished(4))
    assert list(get(server, "/history")) == ids
    assert list(get(server, "/history?max_items=2")) == ids[2:]
    assert list(get(server, "/history?max_items=2&offset=1")) == ids[1:3]
    call(server, "POST", "/history", json={"delete": [ids[0]]})
    assert list(get(server, "/history")) == ids[1:]
    call(server, "POST", "/history", json={"clear": True})
    assert get(server, "/history") == {}


def test_free_memory_empties_the_cache(server: DevServer) -> None:
    client = Client(server)
    client.run(plain())
    call(server, "POST", "/free", json={"unload_models": True, "free_memory": True})
    client.run(plain())
    assert server.node_runs["EmptyImage"] == 2


def test_an_unknown_version_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"0\.33\.0, 0\.8\.0, 0\.3\.40"):
        DevServer(version="0.1")


def test_version_0_8_has_jobs_but_cannot_cancel_them() -> None:
    with dev_server(version="0.8.0") as server:
        assert post(server, plain(), prompt_id="any form") == "any form"
        server.wait_for(finished())
        assert get(server, "/api/jobs/any form")["status"] == "completed"
        assert call(server, "POST", "/api/jobs/any form/cancel").status_code == 404


def test_very_old_versions_choose_the_id_themselves() -> None:
    with dev_server(version="0.3.40") as server:
        assert post(server, plain(), prompt_id=PROMPT_ID) != PROMPT_ID
        answer = call(server, "GET", "/api/jobs/x")
        assert (answer.status_code, answer.text) == (404, "404: Not Found")


def test_very_old_versions_interrupt_whatever_runs() -> None:
    with dev_server(version="0.3.40") as server:
        post(server, endless())
        server.wait_for(running)
        call(server, "POST", "/interrupt", json={"prompt_id": PROMPT_ID})
        server.wait_for(finished())
        assert server.prompts[0].status == "interrupted"


def test_very_old_versions_know_no_feature_flags() -> None:
    graph = {**bench(previews=True), "2": node("SaveImageWebsocket", images=["1", 0])}
    with dev_server(version="0.3.40") as server:
        client = Client(server, flags=True)
        messages = client.run(graph)
    kinds = Counter(kind_of(message) for message in messages)
    assert kinds["feature_flags"] == kinds["progress_state"] == 0
    frames = [message for message in messages if isinstance(message, bytes)]
    assert [frame[:4] for frame in frames] == [struct.pack(">I", 1)] * 4
