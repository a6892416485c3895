"""Bodies that take long to be sent."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from requests.auth import HTTPDigestAuth

from comfy_executors import RunPodWorkflowExecutor, WorkflowTemplate
from comfy_executors.clients import http
from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.clients.runpod import RunPodClient
from comfy_executors.errors import ServerUnreachableError, WaitTimeoutError

PATIENCE = 30.0
BODY = b"x" * 12_000_000  # more than the buffers of the two sockets hold
ANSWER = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Peer:
    """A server whose every move the test makes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self._connections: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> socket.socket:
        connection = self._listener.accept()[0]
        connection.settimeout(PATIENCE)
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        for each in (*self._connections, self._listener):
            each.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with contextlib.closing(peer):
        yield peer


def read_request(connection: socket.socket, pause: float = 0.0) -> tuple[bytes, int]:
    """Read a whole request; return its head, and how many bytes its body has."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, rest = bytes(data).partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    wanted, got = int(lengths[0].split(b":")[1]), len(rest)
    while got < wanted:
        if pause:
            threading.Event().wait(pause)
        step = min(wanted - got, wanted // 20)
        while step:
            piece = len(connection.recv(min(step, 65536)))
            got, step = got + piece, step - piece
    return head, got


def test_a_slow_upload_goes_on_for_as_long_as_it_moves(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CONNECT_SECONDS", 1.5)
    client = HttpClient(peer.url)

    def serve() -> int:
        connection = peer.accept()
        _, got = read_request(connection, pause=0.2)  # 4 seconds in all
        connection.sendall(ANSWER % (b"200 OK", 2, b"{}"))
        return got

    with ThreadPoolExecutor(1) as pool, contextlib.closing(client):
        serving = pool.submit(serve)
        answer = client.call("POST", "/x", DeadlineWaiter(PATIENCE), files={"f": ("a", BODY)})
        assert answer.json() == {}
        assert serving.result(PATIENCE) > len(BODY)


def test_an_upload_that_does_not_move_was_not_received(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.5)
    with contextlib.closing(HttpClient(peer.url)) as client:
        with pytest.raises(ServerUnreachableError) as caught:
            client.call("POST", "/x", DeadlineWaiter(PATIENCE), json=[BODY.decode()])
        assert caught.value.transient
        assert not caught.value.maybe_received
        with pytest.raises(WaitTimeoutError):
            client.call("POST", "/x", DeadlineWaiter(0.3), json=[BODY.decode()])


def test_what_was_sent_whole_may_have_been_received(peer: Peer) -> None:
    def serve() -> None:
        connection = peer.accept()
        read_request(connection)
        connection.close()

    with ThreadPoolExecutor(1) as pool, contextlib.closing(HttpClient(peer.url)) as client:
        serving = pool.submit(serve)
        with pytest.raises(ServerUnreachableError) as caught:
            client.call("POST", "/x", DeadlineWaiter(PATIENCE), json=[BODY.decode()])
        serving.result(PATIENCE)
    assert caught.value.maybe_received


def test_an_auth_that_answers_a_401_sends_the_whole_body_again(peer: Peer) -> None:
    challenge = b'401 No\r\nWWW-Authenticate: Digest realm="r", nonce="n", qop="auth"'

    def serve() -> list[int]:
        connection = peer.accept()
        sizes = [read_request(connection)[1]]
        connection.sendall(ANSWER % (challenge, 2, b"{}"))
        sizes.append(read_request(connection)[1])
        connection.sendall(ANSWER % (b"200 OK", 2, b"{}"))
        return sizes

    client = HttpClient(peer.url, auth=HTTPDigestAuth("me", "secret"))
    with ThreadPoolExecutor(1) as pool, contextlib.closing(client):
        serving = pool.submit(serve)
        client.call("POST", "/x", DeadlineWaiter(PATIENCE), json=[BODY.decode()])
        first, second = serving.result(PATIENCE)
    assert first == second > len(BODY)


def test_a_body_that_an_auth_sent_again_may_have_been_received(peer: Peer) -> None:
    challenge = b'401 No\r\nWWW-Authenticate: Digest realm="r", nonce="n", qop="auth"'

    def serve() -> int:
        connection = peer.accept()
        connection.recv(65536)
        # Nobody reads the rest, which cannot be sent then; the answer is there all the same.
        connection.sendall(ANSWER % (challenge + b"\r\nConnection: close", 2, b"{}"))
        connection.shutdown(socket.SHUT_WR)
        connection.close()
        connection = peer.accept()
        _, got = read_request(connection)
        connection.close()
        return got

    client = HttpClient(peer.url, auth=HTTPDigestAuth("me", "secret"))
    with ThreadPoolExecutor(1) as pool, contextlib.closing(client):
        serving = pool.submit(serve)
        with pytest.raises(ServerUnreachableError) as caught:
            client.call("POST", "/x", DeadlineWaiter(PATIENCE), json=[BODY.decode()])
        assert serving.result(PATIENCE) > len(BODY)
    assert caught.value.maybe_received


def test_a_cancelled_job_is_not_sent_to_its_end(peer: Peer) -> None:
    cancelled = threading.Event()

    def serve() -> tuple[int, bool]:
        connection = peer.accept()
        got = len(connection.recv(65536))
        run.cancel()
        cancelled.set()
        while data := connection.recv(65536):  # a slow line
            got += len(data)
            threading.Event().wait(0.01)
        return got, not data

    template = WorkflowTemplate.from_graph(
        {"1": {"class_type": "SaveImage", "inputs": {"text": "x" * 8_000_000}}}
    )
    with ThreadPoolExecutor(1) as pool:
        executor = RunPodWorkflowExecutor(
            "endpoint", "key", f"{peer.url}/v2", worker="comfy-executors"
        )
        run = executor.submit_workflow(template)
        serving = pool.submit(serve)
        run.futures[0].add_done_callback(lambda _: None)
        with pytest.raises(CancelledError):
            run.result(PATIENCE)
        executor.close()
        got, _ = serving.result(PATIENCE)
    assert got < 8_000_000


def test_a_job_of_which_a_part_was_sent_is_submitted_again(peer: Peer) -> None:
    client = RunPodClient("endpoint", "key", f"{peer.url}/v2")

    def serve() -> int:
        connection = peer.accept()
        connection.recv(65536)
        # Unread bytes make it a reset.
        connection.close()
        connection = peer.accept()
        _, got = read_request(connection)
        body = b'{"id": "job-1", "status": "IN_QUEUE"}'
        connection.sendall(ANSWER % (b"200 OK", len(body), body))
        return got

    with ThreadPoolExecutor(1) as pool, contextlib.closing(client):
        serving = pool.submit(serve)
        job = client.submit(
            {"image": "x" * 9_000_000},
            execution_timeout=60,
            ttl=600,
            waiter=DeadlineWaiter(PATIENCE),
        )
        assert serving.result(PATIENCE) > 9_000_000
    assert job.id == "job-1"
