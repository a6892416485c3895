"""The client's own redirect loop, against a server that answers what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from modal_client_kit import short_pauses, waiter

from comfy_executors.clients.modal import ModalClient
from comfy_executors.errors import (
    ServerNotReadyError,
    ServerResponseError,
    WaitTimeoutError,
)

__all__ = ["short_pauses"]
pytestmark = pytest.mark.usefixtures("short_pauses")

HEALTH = json.dumps({"worker": "comfy-executors", "version": "1", "protocol": 1, "backend": "x"})
CANCELLED = json.dumps({"id": "fc-1"})
RESULT = "/v1/health?__modal_function_call_id=fc-"


class Scripted(ThreadingHTTPServer):
    """Answers one after the other of `script`: a status, a body and a Location.

    Attributes:
        script: What is still to be answered; a status of 0 closes the connection.
        seen: The method, path and headers of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[tuple[int, str, str]] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def answers(self, *script: tuple[Any, ...]) -> None:
        self.script = [(*answer, "", "")[:3] for answer in script]

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path, _ in self.seen]


class _Handler(BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        status, body, location = self.server.script.pop(0)
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def client(server: Scripted) -> Iterator[ModalClient]:
    made = ModalClient(server.url, "wk-1", "ws-1")
    yield made
    made.close()


def test_more_hops_than_requests_would_follow(server: Scripted, client: ModalClient) -> None:
    hops = [(303, "", f"{RESULT}{number}") for number in range(40)]
    server.answers(*hops, (200, HEALTH))
    assert client.health(waiter()).version == "1"
    assert server.calls == [("GET", "/v1/health"), *(("GET", hop[2]) for hop in hops)]
    assert all(headers["Modal-Secret"] == "ws-1" for _, _, headers in server.seen)


def test_a_post_goes_on_as_a_get_without_its_body(server: Scripted, client: ModalClient) -> None:
    server.answers((303, "", "/elsewhere?x=%20&y"), (200, CANCELLED))
    assert client.cancel(waiter(), job_id="fc-1") == "fc-1"
    assert server.calls == [("POST", "/v1/jobs/cancel"), ("GET", "/elsewhere?x=%20&y")]
    assert "Content-Length" not in server.seen[1][2]
    assert "Content-Type" not in server.seen[1][2]


def test_an_answer_beside_the_apps_own_path(server: Scripted) -> None:
    client = ModalClient(f"{server.url}/abc")
    server.answers((303, "", "/xyz/answer"), (200, HEALTH))
    client.health(waiter())
    client.close()
    assert server.calls == [("GET", "/abc/v1/health"), ("GET", "/xyz/answer")]


def test_the_newest_address_is_kept(server: Scripted, client: ModalClient) -> None:
    # 408 and a lost connection at the second address: it is asked again, and nothing else is.
    server.answers(
        (303, "", f"{RESULT}1"), (303, "", f"{RESULT}2"), (408,), (0,), (200, CANCELLED)
    )  # fmt: skip
    assert client.cancel(waiter(), job_id="fc-1") == "fc-1"
    paths = [path for _, path in server.calls]
    assert paths == ["/v1/jobs/cancel", f"{RESULT}1", *[f"{RESULT}2"] * 3]


def test_an_answer_that_was_read_already_is_asked_for_anew(
    server: Scripted, client: ModalClient
) -> None:
    gone = (404, "modal-http: invalid function call")
    server.answers((303, "", f"{RESULT}1"), gone, (200, CANCELLED))
    assert client.cancel(waiter(), job_id="fc-1") == "fc-1"
    assert [method for method, _ in server.calls] == ["POST", "GET", "POST"]


@pytest.mark.parametrize("status", [301, 302])
def test_older_redirects_are_followed_to_a_call_only(
    server: Scripted, client: ModalClient, status: int
) -> None:
    server.answers((status, "", f"{RESULT}1"), (200, CANCELLED))
    assert client.cancel(waiter(), job_id="fc-1") == "fc-1"
    server.answers((status, "", "/v2/jobs/cancel"))
    with pytest.raises(ServerResponseError, match="to /v2/jobs/cancel: use that address"):
        client.cancel(waiter(), job_id="fc-1")
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("status", "location", "words"),
    [
        (307, f"{RESULT}1", "307"),
        (308, f"{RESULT}1", "308"),
        (303, "", "to nowhere"),
        (303, "http://user:hush@127.0.0.1:1/x?key=hush", "to http://127.0.0.1, which gets no"),
        (303, "https://example.com/x?key=hush", "to https://example.com, which gets no token"),
        (303, "//example.com/x", "to http://example.com, which gets no token"),
        (303, "http://[::1", "to what is no address"),
        (303, "http://127.0.0.1:99999/x", "to what is no address"),
    ],
)
def test_redirects_that_are_refused(
    server: Scripted, client: ModalClient, status: int, location: str, words: str
) -> None:
    server.answers((status, "", location))
    with pytest.raises(ServerResponseError) as caught:
        client.cancel(waiter(), job_id="fc-1")
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)
    assert len(server.calls) == 1


def test_the_token_goes_to_no_other_port(server: Scripted, client: ModalClient) -> None:
    with Scripted() as other:
        server.answers((303, "", f"{other.url}/v1/health"))
        with pytest.raises(ServerResponseError, match="gets no token of ours"):
            client.health(waiter())
        assert other.seen == []


def test_the_deadline_ends_the_loop(server: Scripted, client: ModalClient) -> None:
    server.script = [(303, "", f"{RESULT}1")] * 100_000
    with pytest.raises(WaitTimeoutError):
        client.health(waiter(0.3))
    assert len(server.calls) > 2


def test_the_cold_start_budget_ends_the_loop(server: Scripted) -> None:
    client = ModalClient(server.url, cold_start_timeout=0.3)
    server.script = [(303, "", f"{RESULT}1")] * 100_000
    with pytest.raises(ServerNotReadyError):
        client.health(waiter())
    client.close()


def test_a_token_in_an_answer_is_not_shown(server: Scripted, client: ModalClient) -> None:
    server.answers((500, "modal-http: status Failure: KeyError('ws-1', 'wk-1')"))
    with pytest.raises(ServerResponseError, match=r"KeyError\('\.\.\.', '\.\.\.'\)"):
        client.health(waiter())
