"""A server that sends a byte now and then, or nothing at all: no call outlasts its run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from server_kit import PATIENCE, bench

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)
from comfy_executors.clients import http


class SlowServer(ThreadingHTTPServer):
    """Answers as ComfyUI does, but for `/queue`, which is as slow as the test says."""

    daemon_threads = True
    queue = "whole"
    asked = threading.Event()
    over = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/prompt":
            self.answer({"exec_info": {"queue_remaining": 0}})
        elif self.path != "/queue":
            self.send_error(404)
        elif self.server.queue == "silent":
            self.server.asked.set()
            self.server.over.wait(PATIENCE)
        else:
            self.trickle(self.server.queue)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer({"prompt_id": body.get("prompt_id"), "node_errors": {}})

    def answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        self.wfile.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)

    def trickle(self, part: str) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
        self.wfile.write(head + (b"\r\n" if part == "body" else b"X-Long: "))
        self.server.asked.set()
        try:
            while not self.server.over.wait(0.05):
                self.wfile.write(b" ")
        except OSError:
            self.close_connection = True  # the client had enough, as it should


@pytest.fixture
def slow() -> Iterator[SlowServer]:
    server = SlowServer(("127.0.0.1", 0), Handler)
    server.asked, server.over = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("part", ["head", "body", "silent"])
def test_a_cancellation_ends_a_call_in_flight(slow: SlowServer, part: str) -> None:
    slow.queue = part
    executor = ComfyServerWorkflowExecutor(f"127.0.0.1:{slow.server_port}")
    run = executor.submit_workflow(bench())
    assert slow.asked.wait(PATIENCE)
    run.cancel()
    with pytest.raises(WorkflowCancelledError):
        run.result(PATIENCE)
    executor.close()


@pytest.mark.parametrize("part", ["head", "body", "silent"])
def test_a_deadline_ends_a_call_in_flight(slow: SlowServer, part: str) -> None:
    slow.queue = part
    with ComfyServerWorkflowExecutor(f"127.0.0.1:{slow.server_port}") as executor:
        run = executor.submit_workflow(bench(), timeout=1.5)
        with pytest.raises(WorkflowTimeoutError):
            run.result(PATIENCE)


def test_a_call_without_an_answer_is_made_again(
    slow: SlowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "READ_SECONDS", 0.3)
    slow.queue = "silent"
    executor = ComfyServerWorkflowExecutor(f"127.0.0.1:{slow.server_port}", outage_timeout=0.3)
    run = executor.submit_workflow(bench())
    assert slow.asked.wait(PATIENCE)
    slow.asked.clear()
    assert slow.asked.wait(PATIENCE)  # though one wait is as long as an outage may be
    executor.close(cancel=True)
    assert run.done()
