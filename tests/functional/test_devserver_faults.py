"""Each way in which the dev server can be told to misbehave."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import websocket
from devserver_client import (
    PATIENCE,
    Client,
    bench,
    call,
    dev_server,
    finished,
    get,
    kind_of,
    plain,
    post,
)

from comfy_executors.devserver import DevServer


@pytest.fixture
def server() -> Iterator[DevServer]:
    with dev_server() as started:
        yield started


def test_refused_connections_come_back_on_the_same_port(server: DevServer) -> None:
    port = server.port
    with requests.Session() as session:
        assert session.get(f"{server.url}/prompt", timeout=PATIENCE).status_code == 200
        server.faults.refuse_connections = True
        # Neither over the connection that the session keeps nor over a new one.
        for get_it in (session.get, requests.get):
            with pytest.raises(requests.ConnectionError):
                get_it(f"{server.url}/prompt", timeout=PATIENCE)
        server.faults.refuse_connections = False
        assert server.port == port
        assert session.get(f"{server.url}/prompt", timeout=PATIENCE).status_code == 200


def test_refusing_connections_spares_open_websockets(server: DevServer) -> None:
    client = Client(server)
    client.post(bench(seconds=0.1))
    server.faults.refuse_connections = True
    assert kind_of(client.end()[-1]) == "executing"
    assert server.open_websockets == 1


def test_a_silenced_websocket_stays_open_and_says_nothing(server: DevServer) -> None:
    client = Client(server)
    client.until("status")
    server.faults.silence_websockets = True
    client.post(plain())
    server.wait_for(finished())
    assert server.open_websockets == 1
    server.drop_websockets()
    assert client.rest() == []


@pytest.mark.parametrize(
    "kind",
    ["status", "execution_start", "execution_cached", "executing", "progress", "progress_state",
     "preview", "executed", "execution_success"],
)  # fmt: skip
@pytest.mark.parametrize("before", [False, True])
def test_a_websocket_is_dropped_at_a_message(server: DevServer, kind: str, before: bool) -> None:
    client = Client(server)
    client.until("status")
    server.faults.drop_websocket_after = f"before:{kind}" if before else kind
    client.post(bench(previews=True))
    kinds = [kind_of(message) for message in client.rest()]
    assert kinds.count(kind) == (0 if before else 1)
    assert before or kinds[-1] == kind
    server.wait_for(lambda s: s.open_websockets == 0)
    assert server.faults.drop_websocket_after is None
    server.wait_for(finished())
    assert server.prompts[0].status == "success"


def test_drop_websockets_counts_them(server: DevServer) -> None:
    clients = [Client(server, str(number)) for number in range(3)]
    server.wait_for(lambda s: s.open_websockets == 3)
    assert server.drop_websockets() == 3
    for client in clients:
        client.rest()
    server.wait_for(lambda s: s.open_websockets == 0)


def test_websockets_can_be_refused(server: DevServer) -> None:
    server.faults.refuse_websockets = True
    with pytest.raises(websocket.WebSocketBadStatusException) as error:
        Client(server)
    assert error.value.status_code == 503


@pytest.mark.parametrize("deaf", [False, True])
def test_a_reconnected_websocket_may_go_deaf(server: DevServer, deaf: bool) -> None:
    server.faults.deaf_reconnect = deaf
    old = Client(server)
    new = Client(server)
    new.until("status")
    old.socket.close()
    server.wait_for(lambda s: s.open_websockets == 1)
    new.post(plain())
    server.wait_for(finished())
    server.drop_websockets()
    assert ("execution_success" in [kind_of(message) for message in new.rest()]) is not deaf


def test_the_history_can_be_late(server: DevServer) -> None:
    server.faults.history_delay = 1000.0
    client = Client(server)
    prompt_id = client.post(plain())
    client.until("execution_success")
    assert get(server, f"/history/{prompt_id}") == {}
    assert get(server, "/queue")["queue_running"][0][1] == prompt_id
    server.restart()
    assert server.prompts[0].status == "lost"


@pytest.mark.parametrize("path", ["/queue", "/api/queue"])
def test_a_failure_hits_so_many_requests_in_either_form(server: DevServer, path: str) -> None:
    server.faults.fail("GET", "/queue", status=503, times=2, headers={"Retry-After": "1"})
    answers = [call(server, "GET", path) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].headers["Retry-After"] == "1"
    assert "<html>" in answers[0].text
    assert [record.status for record in server.requests] == [503, 503, 200]
    assert {record.path for record in server.requests} == {"/queue"}


def test_a_failure_matches_by_glob_until_cleared(server: DevServer) -> None:
    server.faults.fail("GET", "/api/history/*", times=None)
    assert [call(server, "GET", f"/history/{n}").status_code for n in range(3)] == [502] * 3
    assert call(server, "GET", "/history").status_code == 200
    server.faults.clear()
    assert call(server, "GET", "/history/1").status_code == 200


def test_a_delay_is_at_least_that_long(server: DevServer) -> None:
    server.faults.delay("GET", "/queue", 0.05)
    started = time.monotonic()
    assert call(server, "GET", "/queue").status_code == 200
    assert time.monotonic() - started >= 0.05


def test_a_delay_does_not_keep_the_server_from_stopping(server: DevServer) -> None:
    server.faults.delay("GET", "/queue", 1000.0)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(call, server, "GET", "/queue")
        server.stop()
        with pytest.raises(requests.ConnectionError):
            waiting.result(PATIENCE)


@pytest.mark.parametrize(("fault", "accepted"), [("reset_before", 0), ("reset_after", 1)])
def test_a_reset_before_or_after_a_post(server: DevServer, fault: str, accepted: int) -> None:
    getattr(server.faults, fault)("POST", "/prompt")
    with pytest.raises(requests.ConnectionError):
        post(server, plain())
    server.wait_for(finished(accepted))
    assert len(server.prompts) == accepted
    assert [record.status for record in server.requests] == [None]
    post(server, plain())
    assert len(server.prompts) == accepted + 1


def test_a_post_that_is_accepted_and_answered_by_a_page(server: DevServer) -> None:
    server.faults.fail_after("POST", "/prompt", status=504)
    body = {"prompt": plain()}
    answer = requests.post(f"{server.url}/prompt", json=body, timeout=PATIENCE)
    assert (answer.status_code, answer.headers["Content-Type"][:9]) == (504, "text/html")
    server.wait_for(finished())
    assert [record.status for record in server.requests] == [504]


def test_a_truncated_answer_announces_the_whole(server: DevServer) -> None:
    path = "/view?filename=example.png&type=input"
    whole = call(server, "GET", path).content
    server.faults.truncate("GET", "/view")
    # Not through requests, which notices only with urllib3 from 2 on.
    with contextlib.closing(http.client.HTTPConnection(server.address, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.getheader("Content-Length") == str(len(whole))
        with pytest.raises(http.client.IncompleteRead) as error:
            answer.read()
    assert len(error.value.partial) == len(whole) // 2
    assert call(server, "GET", path).content == whole
