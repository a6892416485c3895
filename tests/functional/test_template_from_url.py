from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    ServerResponseError,
    ServerUnreachableError,
    TemplateError,
    TemplateSyntaxError,
    UIFormatError,
)
from comfy_executors.workflows import WorkflowTemplate

TEMPLATE = '{"1": {"class_type": "A", "inputs": {"text": "{{ prompt }} \u00e9"}}}'.encode()
GENEROUS = 30.0
SECRETS = ("hunter2", "s3cret", "somebody")


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: each misbehaviour has its own."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        name = self.path.split("?")[0].strip("/").replace("-", "_")
        try:
            getattr(self, name, self.missing)()
        except OSError:
            # The client hung up, as it should when it has seen enough.
            self.server.hung_up.set()
            self.close_connection = True

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def missing(self) -> None:
        self.answer(404, b"no such file")

    def template(self) -> None:
        self.answer(200, TEMPLATE, Content_Type="text/plain; charset=latin-1")

    def bom(self) -> None:
        self.answer(200, b"\xef\xbb\xbf" + TEMPLATE)

    def zipped(self) -> None:
        self.answer(200, gzip.compress(TEMPLATE), Content_Encoding="gzip")

    def bomb(self) -> None:
        self.answer(200, gzip.compress(b" " * 50_000_000), Content_Encoding="gzip")

    def chunked(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(TEMPLATE), 7):
            part = TEMPLATE[start : start + 7]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def keyed(self) -> None:
        self.answer(401, b"", WWW_Authenticate="Basic")

    def forbidden(self) -> None:
        self.answer(403, b"")

    def broken(self) -> None:
        self.answer(500, b"oops")

    def html(self) -> None:
        self.answer(200, b"<!DOCTYPE html><html></html>", Content_Type="text/html; charset=utf-8")

    def png(self) -> None:
        self.answer(200, b"\x89PNG\r\n\x1a\n")

    def syntax(self) -> None:
        self.answer(200, b"{{ x")

    def ui(self) -> None:
        self.answer(200, b'{"nodes": [], "links": []}')

    def moved(self) -> None:
        self.answer(302, b"", Location="/template?token=s3cret")

    def to_file(self) -> None:
        self.answer(302, b"", Location="file:///etc/hostname?token=s3cret")

    def to_ftp(self) -> None:
        self.answer(302, b"", Location="ftp://127.0.0.1/w.json?token=s3cret")

    def to_plain_http(self) -> None:
        self.answer(302, b"", Location=f"{self.server.other}/template?token=s3cret")

    def circle(self) -> None:
        self.answer(302, b"", Location="/circle?token=s3cret")

    def short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEMPLATE) + 10))
        self.end_headers()
        self.wfile.write(TEMPLATE)
        self.close_connection = True

    def silent(self) -> None:
        self.server.released.wait(GENEROUS)

    def stalled(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.server.released.wait(GENEROUS)

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.released.is_set():
            self.wfile.write(b" " * 65536)

    def trickle(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.released.wait(0.01):
            self.wfile.write(b" ")

    def trickling_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.server.released.wait(0.01):
            self.wfile.write(b"x")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        self.other = ""
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.released = threading.Event()
        self.hung_up = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up while headers are written ends here.
        self.hung_up.set()

    def url(self, path: str, credentials: str = "") -> str:
        return f"{self.scheme}://{credentials}127.0.0.1:{self.server_port}/{path}"


def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join(GENEROUS)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve(Server())


@pytest.fixture
def tls_server(tmp_path: Path, server: Server) -> Iterator[Server]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    secure = Server()
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    secure.scheme = "https"
    secure.other = server.url("").rstrip("/")
    yield from serve(secure)


def shown(error: BaseException) -> str:
    """Everything of an error that a log or a terminal would show."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)) + repr(
        error
    )


def assert_download_ends() -> None:
    for thread in threading.enumerate():
        if thread.name == "template-download":
            thread.join(GENEROUS)
            assert not thread.is_alive()


@pytest.mark.parametrize("path", ["template", "bom", "zipped", "chunked", "moved"])
def test_a_template_arrives(server: Server, path: str) -> None:
    template = WorkflowTemplate.from_url(server.url(path), timeout=GENEROUS)
    assert template.render(prompt='"')["1"]["inputs"]["text"] == '" \u00e9'
    assert template.source == server.url(path)
    assert_download_ends()


def test_credentials_are_sent_and_never_shown(server: Server) -> None:
    url = server.url("template?token=s3cret#s3cret", credentials="somebody:hunter2@")
    template = WorkflowTemplate.from_url(url, timeout=GENEROUS)
    path, headers = server.seen[0]
    assert path == "/template?token=s3cret"
    assert headers["Authorization"] == "Basic c29tZWJvZHk6aHVudGVyMg=="
    assert template.source == server.url("template")
    assert not any(secret in repr(template) for secret in SECRETS)


@pytest.mark.parametrize(
    ("path", "error_class", "status", "words"),
    [
        ("nothing", ServerResponseError, 404, "answers 404"),
        ("broken", ServerResponseError, 500, "answers 500"),
        ("keyed", AuthenticationError, 401, "answers 401"),
        ("forbidden", AuthenticationError, 403, "answers 403"),
        ("html", ServerResponseError, 200, "is an HTML page; the address of the raw file"),
        ("to-file", ServerResponseError, None, "redirects to another scheme"),
        ("to-ftp", ServerResponseError, None, "redirects to another scheme"),
        ("circle", ServerResponseError, None, "in circles"),
        ("short", ServerUnreachableError, None, "cannot be read"),
    ],
)
def test_an_answer_without_a_template_is_one_clear_error(
    server: Server, path: str, error_class: type[ComfyExecutorsError], status: int, words: str
) -> None:
    url = server.url(f"{path}?token=s3cret", credentials="somebody:hunter2@")
    with pytest.raises(error_class, match=words) as caught:
        WorkflowTemplate.from_url(url, timeout=GENEROUS)
    assert vars(caught.value)["server"] == server.url(path)
    assert vars(caught.value)["status"] == status
    assert not any(secret in shown(caught.value) for secret in SECRETS)


@pytest.mark.parametrize(
    ("path", "error_class", "words"),
    [
        ("png", TemplateError, "this is a PNG image"),
        ("syntax", TemplateSyntaxError, "unexpected end|expected token"),
        ("ui", UIFormatError, "Export"),
    ],
)
def test_a_wrong_template_names_its_address(
    server: Server, path: str, error_class: type[ComfyExecutorsError], words: str
) -> None:
    url = server.url(f"{path}?token=s3cret")
    with pytest.raises(error_class, match=words) as caught:
        WorkflowTemplate.from_url(url, timeout=GENEROUS)
    assert str(caught.value).startswith(server.url(path))
    assert "s3cret" not in shown(caught.value)


@pytest.mark.parametrize("path", ["endless", "bomb"])
def test_the_size_limit_holds_while_reading(server: Server, path: str) -> None:
    with pytest.raises(TemplateError, match="larger than 100000 bytes") as caught:
        WorkflowTemplate.from_url(server.url(path), timeout=GENEROUS, max_bytes=100_000)
    assert caught.value.source == server.url(path)
    assert_download_ends()


def test_a_template_of_exactly_the_limit_is_taken(server: Server) -> None:
    WorkflowTemplate.from_url(server.url("template"), max_bytes=len(TEMPLATE))
    with pytest.raises(TemplateError, match="larger than"):
        WorkflowTemplate.from_url(server.url("template"), max_bytes=len(TEMPLATE) - 1)


@pytest.mark.parametrize("path", ["silent", "stalled", "trickle", "trickling-head"])
def test_the_timeout_is_for_the_whole_download(server: Server, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ServerUnreachableError, match=r"did not deliver within 0\.4 seconds"):
        WorkflowTemplate.from_url(server.url(path), timeout=0.4)
    assert time.monotonic() - start < GENEROUS / 2
    server.released.set()
    assert_download_ends()


def test_a_download_that_was_given_up_hangs_up(server: Server) -> None:
    with pytest.raises(ServerUnreachableError):
        WorkflowTemplate.from_url(server.url("trickle"), timeout=0.2)
    assert server.hung_up.wait(GENEROUS)
    assert_download_ends()


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://somebody:hunter2@127.0.0.1:{taken.getsockname()[1]}/w?token=s3cret"
        with pytest.raises(ServerUnreachableError, match="refused") as caught:
            WorkflowTemplate.from_url(url, timeout=GENEROUS)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert not any(secret in shown(caught.value) for secret in SECRETS)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://somebody:hunter2@127.0.0.1/w.json",
        "file:///etc/hostname?s3cret",
        "workflow.json?s3cret",
        "http://",
        "http:///w.json?s3cret",
        "http://somebody:hunter2@127.0.0.1:port/w.json",
        "http://somebody:hunter2@.example.invalid/w?s3cret",
        "http://[::1/hunter2",
    ],
)
def test_what_is_no_address_is_refused_unseen(url: str) -> None:
    with pytest.raises(TemplateError) as caught:
        WorkflowTemplate.from_url(url, timeout=GENEROUS)
    assert not any(secret in shown(caught.value) for secret in SECRETS)


def test_a_certificate_is_verified(tls_server: Server) -> None:
    url = tls_server.url("template?token=s3cret")
    with pytest.raises(ServerUnreachableError, match="certificate") as caught:
        WorkflowTemplate.from_url(url, timeout=GENEROUS)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert "s3cret" not in shown(caught.value)


def test_https_is_not_left_for_http(
    tls_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    url = tls_server.url("template", credentials="somebody:hunter2@")
    assert WorkflowTemplate.from_url(url, timeout=GENEROUS).variables == {"prompt"}
    with pytest.raises(ServerResponseError, match="redirects from https to http"):
        WorkflowTemplate.from_url(tls_server.url("to-plain-http"), timeout=GENEROUS)
