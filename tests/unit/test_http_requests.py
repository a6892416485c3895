"""What goes out: the same as `requests` itself would send, cookies and signatures included."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from requests.auth import AuthBase, HTTPBasicAuth, HTTPDigestAuth

from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.errors import AuthenticationError, ServerResponseError


class Signature(AuthBase):
    """Signs the body, as cloud services want it."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["X-Signed"] = f"{request.method} {request.path_url} {request.body!r}"
        return request


class Rotating(HTTPBasicAuth):
    """Basic auth whose password changes with each call."""

    calls = 0

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        self.calls += 1
        request.headers["Authorization"] = f"Basic t{self.calls}"
        return request


def test_an_auth_of_ones_own_is_asked_for_each_call() -> None:
    client = HttpClient("http://host.invalid", auth=Rotating("me", ""))
    request = requests.Request("GET", "http://host.invalid/queue")
    sent = [client._prepare(request).headers["Authorization"] for _ in range(3)]
    assert len(set(sent)) == 3


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


@contextmanager
def web_server(
    answer: Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str]]],
) -> Iterator[str]:
    """Run a server that gives such statuses and headers, and return its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers = answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_cookie_that_binds_to_one_of_several_servers_goes_back() -> None:
    seen: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        seen.append(request.headers["Cookie"])
        return 200, {"Set-Cookie": "server=seven; Path=/"}

    with web_server(answer) as url:
        client = HttpClient(url)
        for _ in range(2):
            client.get("/", DeadlineWaiter(10))
        assert seen == [None, "server=seven"]
        assert client.sent_headers()["Cookie"] == "server=seven"  # for the websocket
        client.close()


def _digest(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def test_digest_auth_answers_what_the_server_asks() -> None:
    statuses = []
    asks = 'Digest realm="r", nonce="n0", qop="auth", algorithm=MD5'

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        said = dict(re.findall(r'(\w+)="?([^",]+)', request.headers.get("Authorization", "")))
        secret, what = _digest("me:r:s3cret"), _digest(f"{request.command}:{request.path}")
        wanted = _digest(f"{secret}:n0:{said.get('nc')}:{said.get('cnonce')}:auth:{what}")
        statuses.append(200 if said.get("response") == wanted else 401)
        # The cookie shows that also the answer to the first request is looked at.
        return (200, {}) if statuses[-1] == 200 else (401, {"WWW-Authenticate": asks, **cookie})

    cookie = {"Set-Cookie": "server=seven; Path=/"}
    with web_server(answer) as url:
        client = HttpClient(url, auth=HTTPDigestAuth("me", "s3cret"))
        client.get("/queue", DeadlineWaiter(10))
        client.call("POST", "/prompt", DeadlineWaiter(10), json={"a": 1})
        assert statuses == [401, 200, 200]
        assert client.sent_headers()["Cookie"] == "server=seven"
        client.close()
        wrong = HttpClient(url, auth=HTTPDigestAuth("me", "wrong"))
        with pytest.raises(AuthenticationError, match="is the key right"):
            wrong.get("/queue", DeadlineWaiter(10))
        wrong.close()


def test_the_hook_of_an_auth_does_not_have_redirects_followed() -> None:
    seen = []

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        seen.append(request.path)
        return 302, {"Location": "//["}

    with web_server(answer) as url:
        client = HttpClient(url, auth=HTTPDigestAuth("me", "s3cret"))
        with pytest.raises(ServerResponseError, match="redirects GET /queue"):
            client.get("/queue", DeadlineWaiter(10))
        client.close()
    assert seen == ["/queue"]
