"""The websocket's handshake, and how a connection that has died is noticed."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import pytest
import websocket
from requests import PreparedRequest
from requests.auth import AuthBase
from server_kit import PATIENCE

from comfy_executors.clients import comfyui_events
from comfy_executors.clients.comfyui_events import EventStream
from comfy_executors.clients.comfyui_frames import ConnectionLost, Event
from comfy_executors.clients.http import HttpClient

_PING, _PONG, _CLOSE = 0x9, 0xA, 0x8
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Server(ThreadingHTTPServer):
    """Accepts websockets, sends nothing of its own, and answers pings if it is told to."""

    daemon_threads = True

    def __init__(self, *, head: str = "", answers_pings: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.head = head
        self.answers_pings = answers_pings
        self.seen: list[Any] = []  # the headers of each handshake
        self.pings = 0
        self.changed = threading.Condition()

    def wait_for(self, predicate: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, PATIENCE)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        key = (self.headers["Sec-WebSocket-Key"] + _MAGIC).encode()
        accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        head += f"Sec-WebSocket-Accept: {accept}\r\n{self.server.head}\r\n"
        with self.server.changed:
            self.server.seen.append(self.headers)
            self.server.changed.notify_all()
        self.wfile.write(head.encode())
        while self.take_frame() not in (None, _CLOSE):
            pass

    def take_frame(self) -> int | None:
        """Read one short frame, as clients send them: with a mask."""
        head = self.rfile.read(2)
        if len(head) < 2:
            return None
        self.rfile.read(4 + (head[1] & 0x7F))
        opcode = head[0] & 0xF
        if opcode == _PING:
            with self.server.changed:
                self.server.pings += 1
                self.server.changed.notify_all()
            if self.server.answers_pings:
                self.wfile.write(bytes([0x80 | _PONG, 0]))
        return opcode


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def stream_to(server: Server, host: str = "127.0.0.1", **options: Any) -> Iterator[EventStream]:
    http = HttpClient(f"http://{host}:{server.server_port}", **options)
    stream = EventStream(http)
    try:
        yield stream
    finally:
        stream.close()
        http.close()


# Handshakes.


def test_cookies_of_one_handshake_do_not_go_out_with_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # websocket-client has a jar for all connections of the process.
    monkeypatch.setattr(websocket._handshake.CookieJar, "jar", {})
    websocket._handshake.CookieJar.add("other=program; Domain=localhost")
    with running(Server(head="Set-Cookie: session=of-alice; Domain=localhost\r\n")) as server:
        for key in ("alice", "bob"):
            with stream_to(server, "localhost", headers={"X-Key": key}) as stream:
                assert stream.connect().result(PATIENCE) is not None
        assert [headers["X-Key"] for headers in server.seen] == ["alice", "bob"]
        assert [headers["Cookie"] for headers in server.seen] == [None, None]
        # What others have in the jar is theirs, and still goes out with their handshakes.
        assert websocket._handshake.CookieJar.get("localhost") == "other=program"
        connection = websocket.create_connection(f"ws://localhost:{server.server_port}/")
        connection.shutdown()  # type: ignore[no-untyped-call]
        assert server.seen[-1]["Cookie"] == "other=program"


def test_the_cookies_that_the_caller_gave_go_out_once() -> None:
    with running(Server()) as server:
        with stream_to(server, headers={"Cookie": "mine=1"}) as stream:
            assert stream.connect().result(PATIENCE) is not None
        assert [headers.get_all("Cookie") for headers in server.seen] == [["mine=1"]]


@pytest.mark.parametrize("cookie", ["a/b=c", "a[b]=c; domain=x", "=", "a=b; domain=localhost;;"])
def test_a_cookie_of_an_odd_name_is_no_obstacle(cookie: str) -> None:
    with running(Server(head=f"Set-Cookie: {cookie}\r\n")) as server, stream_to(server) as stream:
        client_id = stream.connect().result(PATIENCE)
        assert client_id is not None
        assert stream.is_promising(client_id)


class Forgetful(AuthBase):
    """Whose own error is none of websocket-client's."""

    left = 2

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        if threading.current_thread().name == "comfy-executors-websocket" and self.left:
            self.left -= 1
            raise LookupError("no token")
        return request


def test_an_error_of_another_kind_is_one_more_try(caplog: pytest.LogCaptureFixture) -> None:
    with running(Server()) as server, stream_to(server, auth=Forgetful()) as stream:
        assert stream.connect().result(PATIENCE) is None
        stream.subscribe("p", "lost", lambda event: None, frozenset())  # so that it tries again
        server.wait_for(lambda: server.seen)
    assert "(LookupError): polling instead" in caplog.text


# Silence.


def test_an_idle_connection_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui_events, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(comfyui_events, "_PING_SECONDS", 0.7)
    with running(Server()) as server, stream_to(server) as stream:
        client_id = stream.connect().result(PATIENCE)
        assert client_id is not None
        server.wait_for(lambda: server.pings >= 3)
        assert stream.is_promising(client_id)
        assert len(server.seen) == 1


def test_a_connection_that_answers_no_ping_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui_events, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(comfyui_events, "_PING_SECONDS", 0.1)
    events: Queue[Event] = Queue()
    with running(Server(answers_pings=False)) as server, stream_to(server) as stream:
        client_id = stream.connect().result(PATIENCE)
        assert client_id is not None
        stream.subscribe("p", client_id, events.put, frozenset())
        assert events.get(timeout=PATIENCE) == ConnectionLost(client_id)
        server.wait_for(lambda: len(server.seen) == 2)
