"""What goes out: the same as `requests` itself would send, cookies included."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import requests
from requests.auth import AuthBase

from comfy_executors.clients.http import DeadlineWaiter, HttpClient


class Signature(AuthBase):
    """Signs the body, as cloud services want it."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["X-Signed"] = f"{request.method} {request.path_url} {request.body!r}"
        return request


@pytest.mark.parametrize("auth", [None, ("me", "s:ä"), Signature()])
@pytest.mark.parametrize(
    "base", ["http://host.invalid:1", "https://Höst.invalid/a b/ü", "http://[::1]:9/x"]
)
@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        ("GET", "/queue", {}),
        ("GET", "/history/0-a_Z~", {}),
        ("GET", "/a/../b", {}),
        ("GET", "/file name+%2f%zz?X-Sig=a%2Fb c&é=1", {}),
        ("GET", "/view", {"params": {"filename": 'ä "b" +&=?#.png', "subfolder": "", "type": "x"}}),
        ("HEAD", "/view", {"params": {"filename": "a/b"}}),
        ("POST", "/prompt", {"json": {"text": 'ä "\n\U0001f98a', "n": [1, None, True, 1.5]}}),
        ("POST", "/interrupt", {"json": {}}),
        ("POST", "/upload", {"data": {"a": "ä"}}),
        ("POST", "/raw", {"data": b"\0", "headers": {"Content-Type": "x/y"}}),
    ],
)
def test_what_is_sent_is_what_requests_would_send(
    base: str, method: str, path: str, more: dict[str, Any], auth: Any
) -> None:
    client = HttpClient(base, headers={"X-Key": "k"}, auth=auth)
    request = requests.Request(method, base + path, **more)
    wanted, prepared = client._session.prepare_request(request), client._prepare(request)
    assert (prepared.method, prepared.url) == (wanted.method, wanted.url)
    assert dict(prepared.headers) == {
        name: str(len(prepared.body or b"")) if name == "Content-Length" else value
        for name, value in wanted.headers.items()
    }
    if "json" in more:
        assert json.loads(prepared.body or b"") == more["json"]
    else:
        assert prepared.body == wanted.body


@pytest.fixture
def cookie_server() -> Iterator[tuple[str, list[str | None]]]:
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append(self.headers["Cookie"])
            self.send_response(200)
            self.send_header("Set-Cookie", "server=seven; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cookie_that_binds_to_one_of_several_servers_goes_back(
    cookie_server: tuple[str, list[str | None]],
) -> None:
    url, seen = cookie_server
    client = HttpClient(url)
    for _ in range(2):
        client.get("/", DeadlineWaiter(10))
    assert seen == [None, "server=seven"]
    assert client.sent_headers()["Cookie"] == "server=seven"  # for the websocket
    client.close()
