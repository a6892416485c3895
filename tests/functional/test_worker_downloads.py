"""Input images by URL: https only, public addresses only, bounded in size and time."""

from __future__ import annotations

import http.server
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from server_kit import PATIENCE

from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.errors import InputImageError, WaitTimeoutError
from comfy_executors.workers.downloads import InputDownloader, _is_public

PICTURE = b"\x89PNG" + bytes(range(256)) * 1000


class Host(http.server.BaseHTTPRequestHandler):
    """Serves a picture and a few surprises; counts what was asked for."""

    asked: ClassVar[Counter[str]] = Counter()
    stop: ClassVar[threading.Event]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked[self.path] += 1
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif path == "/trickle":
            self.send_response(200)
            self.end_headers()
            while not self.stop.wait(0.02):
                self.wfile.write(b"x")
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(PICTURE)
        else:
            body = {"/empty": b"", "/picture": PICTURE}.get(path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    authority = trustme.CA()
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    Host.asked, Host.stop = Counter(), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads = False
    # In the connection's own thread, so that a client that refuses the certificate stops nobody.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"https://localhost:{server.server_port}"
    finally:
        Host.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def fetch(url: str, *, allow_private: bool = True, **options: Any) -> bytes:
    downloader = InputDownloader(allow_private=allow_private, **options)
    return downloader.fetch(url, "a.png", DeadlineWaiter(PATIENCE))


def test_a_picture_comes_as_it_is_with_the_query_of_its_address(host: str) -> None:
    assert fetch(f"{host}/picture?key=a%20b&x=ü") == PICTURE
    assert Host.asked == {"/picture?key=a%20b&x=%C3%BC": 1}


def test_private_addresses_are_refused_before_anything_is_sent(host: str) -> None:
    with pytest.raises(InputImageError, match="no public address"):
        fetch(f"{host}/picture", allow_private=False)
    assert Host.asked == {}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.8", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::",
    ],
)  # fmt: skip
def test_no_disguise_makes_an_address_public(address: str) -> None:
    assert not _is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_public_addresses_are_public(address: str) -> None:
    assert _is_public(address)


@pytest.mark.parametrize(
    "url",
    ["http://example.org/a.png", "ftp://example.org/a", "file:///etc/passwd", "https:///a.png",
     "https://u:p@example.org/a", "//example.org/a", "https://example.org:x/a", ""],
)  # fmt: skip
def test_only_plain_https_addresses_are_taken(url: str) -> None:
    with pytest.raises(InputImageError):
        fetch(url)


def test_a_redirect_is_followed_within_https(host: str) -> None:
    assert fetch(f"{host}/to//picture") == PICTURE
    assert fetch(f"{host}/to/{host}/picture") == PICTURE
    with pytest.raises(InputImageError, match="must begin with https"):
        fetch(f"{host}/to/http://localhost/picture")


def test_redirects_in_a_circle_end(host: str) -> None:
    target = "/to/" * 8 + "/picture"
    with pytest.raises(InputImageError, match="redirects more than 3 times"):
        fetch(f"{host}{target}")
    assert sum(Host.asked.values()) == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [("/nothing", "answered with 404"), ("/empty", "empty file"), ("/cut", "cut short")],
)
def test_what_is_no_whole_file_is_an_error(host: str, path: str, words: str) -> None:
    with pytest.raises(InputImageError, match=words):
        fetch(f"{host}{path}?secret=1")


def test_a_file_that_is_too_large_is_not_read_to_its_end(host: str) -> None:
    with pytest.raises(InputImageError, match="more than 1000 bytes"):
        fetch(f"{host}/picture", max_bytes=1000)


def test_a_peer_that_trickles_is_given_up_in_time(host: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputImageError, match=r"more than 0\.5 s"):
        fetch(f"{host}/trickle", seconds=0.5)
    assert time.monotonic() - started < 10


def test_a_cancellation_ends_a_download(host: str) -> None:
    downloader = InputDownloader(allow_private=True)
    with pytest.raises(WaitTimeoutError):
        downloader.fetch(f"{host}/trickle", "a.png", DeadlineWaiter(0.3))


def test_a_certificate_of_nobody_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputImageError, match=r"cannot fetch a\.png from localhost") as caught:
        fetch(f"{host}/picture?secret=1")
    assert "secret" not in str(caught.value)
    assert Host.asked == {}


def test_nobody_there_is_an_error_with_the_host() -> None:
    with pytest.raises(InputImageError, match=r"from 127\.0\.0\.1: Connection refused"):
        fetch("https://127.0.0.1:9/a.png?secret=1")


def test_no_thread_and_no_socket_is_left(host: str) -> None:
    before = threading.active_count()
    for _ in range(3):
        fetch(f"{host}/picture")
    assert [t for t in threading.enumerate() if isinstance(t, threading.Timer)] == []
    assert threading.active_count() <= before + 3  # connections that the test's host still closes
