"""Addresses, keys, certificates, uploads, and what is left after close()."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import http.server
import json
import logging
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import requests
import trustme
from server_kit import (
    ENDLESS,
    PATIENCE,
    VERSIONS,
    bench,
    bench_graph,
    ended,
    loading,
    served,
    statuses,
)

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate
from comfy_executors.clients import comfyui_events
from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    AuthenticationError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    WaitTimeoutError,
    WorkflowRejectedError,
)
from comfy_executors.executors import comfy_server
from comfy_executors.images import InputImageSet

E = TypeVar("E", bound=Exception)
KEY = "k3y-that-nobody-may-see"


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure_server(authority: trustme.CA) -> Iterator[DevServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    with DevServer(ssl_context=context, path_prefix="/comfy") as started:
        yield started


@contextmanager
def web_server(
    answer: Callable[[http.server.BaseHTTPRequestHandler], None],
) -> Iterator[tuple[str, list[Any]]]:
    """Run a server of another kind; gives its address and the headers of each request."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            answer(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(Handler) as port:
        yield f"127.0.0.1:{port}", seen


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    """Run such a server and return its port."""
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield int(other.server_address[1])
    finally:
        other.shutdown()
        thread.join()
        other.server_close()


def answers(
    status: int, body: bytes = b"", **headers: str
) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def works(executor: ComfyServerWorkflowExecutor, server: DevServer) -> None:
    """Run three prompts and check that the websocket brought their events."""
    with executor:
        assert len(executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)) == 3
    ended(server, success=3)
    assert served(server)["GET /ws"] == 1
    assert served(server)["GET /queue"] == 0


def failure(
    address: str,
    kind: type[E],
    match: str,
    *,
    template: WorkflowTemplate | None = None,
    images: list[bytes] | None = None,
    **options: Any,
) -> E:
    """Run a prompt that fails and return its error."""
    with ComfyServerWorkflowExecutor(address, **options) as executor:
        run = executor.submit_workflow(template or bench(), images)
        error = run.futures[0].exception(PATIENCE)
    assert isinstance(error, kind)
    assert re.search(match, str(error))
    return error


# Addresses.


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "http://127.0.0.1:{}/"])
def test_addresses(server: DevServer, form: str) -> None:
    works(ComfyServerWorkflowExecutor(form.format(server.port)), server)


def test_an_ipv6_address() -> None:
    server = DevServer(host="::1")
    try:
        server.start()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    try:
        works(ComfyServerWorkflowExecutor(f"[::1]:{server.port}"), server)
    finally:
        server.stop()


def test_an_address_with_a_prefix() -> None:
    with DevServer(path_prefix="/a/b") as server:
        works(ComfyServerWorkflowExecutor(f"{server.url}/"), server)


def test_a_wrong_address_says_so_quickly() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        begun = time.monotonic()
        caught = failure(address, ServerUnreachableError, "check the address")
        assert time.monotonic() - begun < 5
    assert caught.server == f"http://{address}"


def test_a_wrong_prefix_names_the_status() -> None:
    with DevServer(path_prefix="/comfy") as server:
        failure(server.address, ServerResponseError, "GET /prompt with 404")
        assert server.prompts == []


def test_a_server_of_html_is_told_from_comfyui() -> None:
    page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    with web_server(answers(200, page, Content_Type="text/html")) as (address, seen):
        failure(address, ServerResponseError, "an HTML page: no ComfyUI server")
        assert len(seen) == 1


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"null", b'{"exec_info": 3}'])
def test_a_server_of_other_json_is_told_from_comfyui(body: bytes) -> None:
    with web_server(answers(200, body, Content_Type="application/json")) as (address, _):
        failure(address, ServerResponseError, "no ComfyUI server")


# What cannot work is refused before there is a connection.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"auth": "user:" + KEY}, TypeError, "auth must be a tuple of two strings"),
        ({"auth": ("user", KEY, "x")}, TypeError, "auth must be a tuple"),
        ({"auth": ("user", KEY.encode())}, TypeError, "auth must be a tuple"),
        ({"auth": ["user", KEY]}, TypeError, "not this list"),
        ({"auth": ()}, TypeError, "not this tuple"),
        ({"headers": [("X-Key", KEY)]}, TypeError, "headers must be a mapping, not list"),
        ({"headers": KEY}, TypeError, "headers must be a mapping, not str"),
        ({"verify": "no/such.pem"}, ValueError, "path of a CA bundle, not 'no/such.pem'"),
        ({"verify": ""}, ValueError, "not ''"),
        ({"verify": None}, ValueError, "not None"),
        ({"verify": 0}, ValueError, "not 0"),
        ({"outage_timeout": 0}, ValueError, "above 0, not 0"),
        ({"outage_timeout": -1.0}, ValueError, "above 0, not -1.0"),
        ({"outage_timeout": float("nan")}, ValueError, "above 0, not nan"),
        ({"outage_timeout": "60"}, ValueError, "above 0, not '60'"),
        ({"outage_timeout": None}, ValueError, "above 0, not None"),
        ({"outage_timeout": True}, ValueError, "above 0, not True"),
    ],
)
def test_arguments_of_a_wrong_kind(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        ComfyServerWorkflowExecutor("localhost", **arguments)
    assert KEY not in str(caught.value)


# TLS.


@pytest.mark.parametrize("kind", [str, Path])
def test_a_certificate_of_an_own_authority(
    secure_server: DevServer, authority: trustme.CA, tmp_path: Path, kind: Callable[[Path], Any]
) -> None:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    works(ComfyServerWorkflowExecutor(secure_server.url, verify=kind(bundle)), secure_server)


def test_the_environments_authority_counts_for_both(
    secure_server: DevServer,
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    works(ComfyServerWorkflowExecutor(secure_server.url), secure_server)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_verify_can_be_switched_off_for_both(secure_server: DevServer) -> None:
    works(ComfyServerWorkflowExecutor(secure_server.url, verify=False), secure_server)


def test_an_unknown_certificate_is_refused(secure_server: DevServer) -> None:
    failure(
        secure_server.url, ServerUnreachableError, r"TLS failed.*verify=", headers={"X-Key": KEY}
    )
    assert secure_server.requests == []


def test_a_tls_connection_cut_off_in_its_handshake_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[int] = []

        def cut_off() -> None:
            for count in range(3):
                connection, _ = listener.accept()
                accepted.append(count)
                connection.recv(65536)  # all of it: the close is then no reset
                connection.close()

        thread = threading.Thread(target=cut_off)
        thread.start()
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        error = failure(address, ServerUnreachableError, "cannot be reached")
        thread.join()
    assert len(accepted) == 3
    assert error.transient


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Answer for a minute, 64 KiB in a hundredth of a second."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(6000 * 65536))
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(6000):
            handler.wfile.write(bytes(65536))
            time.sleep(0.01)


def test_a_deadline_ends_a_download_in_its_middle() -> None:
    with web_server(drip) as (address, seen):
        client = HttpClient(f"http://{address}")
        begun = time.monotonic()
        with pytest.raises(WaitTimeoutError):
            client.get("/view", DeadlineWaiter(0.5))
        client.close()
        assert time.monotonic() - begun < PATIENCE / 2
    assert len(seen) == 1


# Keys.


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ({"Authorization": f"Bearer {KEY}"}, {"headers": {"Authorization": f"Bearer {KEY}"}}),
        ({"X-Api-Key": KEY}, {"headers": {"x-api-key": KEY}}),
        ({"User-Agent": KEY}, {"headers": {"User-Agent": KEY}}),
        (
            {"Authorization": "Basic " + base64.b64encode("me:pässwörd€".encode()).decode()},
            {"auth": ("me", "pässwörd€")},
        ),
    ],
)
def test_keys_reach_http_and_websocket(wanted: dict[str, str], given: dict[str, Any]) -> None:
    with DevServer(headers=wanted) as server:
        works(ComfyServerWorkflowExecutor(server.address, **given), server)


def test_user_and_password_of_the_address() -> None:
    wanted = {"Authorization": "Basic " + base64.b64encode(b"me:p@ss:w").decode()}
    with DevServer(headers=wanted) as server:
        executor = ComfyServerWorkflowExecutor(f"http://me:p%40ss%3Aw@{server.address}")
        assert "p@ss" not in executor.url
        works(executor, server)


class HeaderAuth(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["X-Own"] = KEY
        return request


def test_an_auth_object_of_its_own_reaches_the_websocket() -> None:
    with DevServer(headers={"X-Own": KEY}) as server:
        works(ComfyServerWorkflowExecutor(server.address, auth=HeaderAuth()), server)


def test_netrc_does_not_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    wanted = {"Authorization": f"Bearer {KEY}"}
    with DevServer(headers=wanted) as server:
        works(ComfyServerWorkflowExecutor(server.address, headers=wanted), server)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("key", [{}, {"X-Key": KEY}])
def test_a_refused_key_is_one_clear_error(status: int, key: dict[str, str]) -> None:
    hint = "is the key right" if key else "pass headers= or auth="
    with web_server(answers(status)) as (address, seen):
        caught = failure(address, AuthenticationError, hint, headers=key)
        assert caught.status == status
        assert len(seen) == 1


def test_a_redirect_is_not_followed() -> None:
    with web_server(answers(200, b"{}")) as (elsewhere, seen):
        target = f"http://{elsewhere}/login?token=t"
        with web_server(answers(302, Location=target)) as (address, _):
            caught = failure(address, ServerResponseError, "redirects", headers={"X-Key": KEY})
        assert seen == []
    assert "token" not in str(caught)


def test_a_redirected_websocket_is_not_followed(server: DevServer) -> None:
    with web_server(answers(200, b"{}")) as (elsewhere, seen):
        target = {"Location": f"ws://{elsewhere}/ws"}
        server.faults.fail("GET", "/ws", status=302, headers=target, times=None)
        with ComfyServerWorkflowExecutor(server.address, headers={"X-Key": KEY}) as executor:
            assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
        assert seen == []
    assert served(server)["GET /ws"] >= 1


def test_keys_appear_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("urllib3", "websocket", "requests", "comfy_executors"):
        caplog.set_level(logging.DEBUG, logger=name)  # set back after the test
    shown = []
    with DevServer(headers={"Authorization": "Bearer other"}) as server:
        executor = ComfyServerWorkflowExecutor(
            f"http://user:{KEY}@{server.address}", headers={"X-Key": KEY}
        )
        with pytest.raises(AuthenticationError) as caught, executor:
            executor.submit_workflow(bench()).result(PATIENCE)
        shown += [repr(executor), repr(vars(executor).values()), executor.url]
    shown += ["".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))]
    shown += [repr(pickle.loads(pickle.dumps(caught.value)).__dict__), caplog.text]
    assert caplog.records
    assert not [text for text in shown if KEY in text]


def test_keys_appear_nowhere_in_a_run_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wanted = {"X-Key": KEY}
    with DevServer(headers=wanted) as server:
        server.faults.refuse_websockets = True
        server.faults.fail("GET", "/view", times=2)
        server.faults.fail("POST", "/prompt")
        with ComfyServerWorkflowExecutor(server.address, headers=wanted) as executor:
            run = executor.submit_workflow(bench(fail="broken"), num_samples=2)
            with pytest.raises(Exception, match="RuntimeError: broken") as caught:
                run.result(PATIENCE)
    assert "polling instead" in caplog.text
    assert KEY not in caplog.text + repr(caught.value) + repr(run)


@pytest.mark.parametrize("value", ["a\nb", "a\r\nX: y", "ä", "a\0"])
def test_a_header_that_http_does_not_allow_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="'X-Key' has characters") as caught:
        ComfyServerWorkflowExecutor(headers={"X-Key": value})
    assert value not in str(caught.value)


# Proxies.


def test_a_proxy_in_the_environment_is_used(
    server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server(answers(502)) as (proxy, seen):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("no_proxy", "")
        caught = failure(f"{server.address}", ServerResponseError, "502")
        assert f"through the proxy {proxy} of the environment" in str(caught)
        assert len(seen) == 3
    assert server.requests == []


def test_a_proxy_that_is_down_is_named_without_its_password(
    server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{KEY}@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    caught = failure(server.address, ServerUnreachableError, "set NO_PROXY")
    assert f"{server.url} cannot be reached through the proxy 127.0.0.1:9 of " in str(caught)
    assert KEY not in "".join(traceback.format_exception(None, caught, caught.__traceback__))


class SocksHandler(http.server.BaseHTTPRequestHandler):
    """A SOCKS proxy that gives the answers itself instead of passing them on."""

    seen: ClassVar[list[tuple[str, int]]] = []

    def setup(self) -> None:
        super().setup()
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\5\0")
        *_, length = self.rfile.read(5)
        host = self.rfile.read(length).decode()
        self.seen.append((host, int.from_bytes(self.rfile.read(2), "big")))
        self.wfile.write(b"\5\0\0\1" + bytes(6))

    def do_GET(self) -> None:
        (drip if self.path == "/drip" else answers(200, b"whole"))(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_socks_proxy_is_used_and_deadlines_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SocksHandler, "seen", [])
    with serving(SocksHandler) as port:
        monkeypatch.setenv("all_proxy", f"socks5h://127.0.0.1:{port}")
        client = HttpClient("http://gpu.invalid:8188")
        assert client.get("/whole", DeadlineWaiter(PATIENCE)).content == b"whole"
        with pytest.raises(WaitTimeoutError):
            client.get("/drip", DeadlineWaiter(0.5))
        client.close()
    assert set(SocksHandler.seen) == {("gpu.invalid", 8188)}


_WITHOUT_PYSOCKS = """
import sys
sys.modules["socks"] = None  # as if it were not installed
from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate
from comfy_executors.errors import ServerUnreachableError
template = WorkflowTemplate.from_graph({"1": {"class_type": "A", "inputs": {}}})
with ComfyServerWorkflowExecutor("localhost:9") as executor:
    try:
        executor.submit_workflow(template).result(30)
    except ServerUnreachableError as error:
        print(error.transient, error)
"""


def test_a_socks_proxy_without_pysocks_says_what_is_missing() -> None:
    proxies = {"all_proxy": f"socks5h://me:{KEY}@127.0.0.1:9", "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PYSOCKS],
        env={**os.environ, **proxies},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    words = "False http://localhost:9 cannot be reached through the proxy 127.0.0.1:9 of the "
    words += "environment: SOCKS needs PySocks, pip install requests[socks]; or set NO_PROXY\n"
    assert done.stdout == words, done.stderr
    assert KEY not in done.stderr


def test_no_proxy_is_respected(server: DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    works(ComfyServerWorkflowExecutor(server.address), server)


# A server that starts.


def test_waiting_for_a_server_that_starts(server: DevServer) -> None:
    server.faults.refuse_connections = True
    opener = threading.Timer(0.5, setattr, (server.faults, "refuse_connections", False))
    opener.start()
    with ComfyServerWorkflowExecutor(server.address) as executor:
        executor.wait_until_ready(PATIENCE)
        assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
    opener.join()


def test_waiting_for_a_server_behind_a_proxy_that_answers_already(server: DevServer) -> None:
    server.faults.fail("GET", "/prompt", status=404, times=2)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        executor.wait_until_ready(PATIENCE)
    assert served(server) == {"GET /prompt": 3}


def test_a_server_that_never_starts(server: DevServer) -> None:
    server.faults.fail("GET", "/prompt", status=502, times=None)
    last = pytest.raises(ServerNotReadyError, match=r"not ready within 1 s; last: .*502")
    with ComfyServerWorkflowExecutor(server.address) as executor, last as e:
        executor.wait_until_ready(1)
    assert isinstance(e.value, TimeoutError)
    assert 2 <= served(server)["GET /prompt"] <= 12


def test_a_refused_key_ends_the_waiting() -> None:
    with web_server(answers(401)) as (address, seen):
        with ComfyServerWorkflowExecutor(address) as executor, pytest.raises(AuthenticationError):
            executor.wait_until_ready(PATIENCE)
        assert len(seen) == 1


# Connections.


def test_prompts_share_a_websocket(server: DevServer) -> None:
    with ComfyServerWorkflowExecutor(server.address, max_workers=8) as executor:
        runs = [executor.submit_workflow(bench(0.02), num_samples=8) for _ in range(3)]
        assert sum(len(run.result(PATIENCE)) for run in runs) == 24
        assert served(server)["GET /ws"] == 1
        assert server.open_websockets == 1
    ended(server, success=24)
    assert len({prompt.client_id for prompt in server.prompts}) == 1


def own_threads() -> list[str]:
    names = ("comfy-executors-websocket", "ComfyServerWorkflowExecutor")
    return [t.name for t in threading.enumerate() if t.name.startswith(names)]


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_left_after_close(version: str) -> None:
    with DevServer(version=version) as server:
        before = own_sockets(server.port)
        with ComfyServerWorkflowExecutor(server.address) as executor:
            assert len(executor.submit_workflow(bench(), num_samples=8).result(PATIENCE)) == 8
            assert own_sockets(server.port) > before
            assert own_threads()
        assert own_threads() == []
        server.wait_for(lambda s: s.open_websockets == 0, PATIENCE)
        assert own_sockets(server.port) == before


def test_nothing_is_left_after_close_though_an_error_is_kept(server: DevServer) -> None:
    before = own_sockets(server.port)
    client = HttpClient(server.url)
    server.faults.reset_before("GET", "/queue")
    # Its traceback holds on to all that took part in the call.
    with pytest.raises(ServerUnreachableError) as kept:
        client.call("GET", "/queue", DeadlineWaiter(PATIENCE))
    client.call("GET", "/queue", DeadlineWaiter(PATIENCE))
    assert own_sockets(server.port) == before + 1
    client.close()
    assert own_sockets(server.port) == before
    assert kept.value.__cause__ is not None


def own_sockets(port: int) -> int:
    """How many sockets of this process are connected to a port."""
    count = 0
    for item in gc.get_objects():
        if isinstance(item, socket.socket) and item.family == socket.AF_INET:
            try:
                count += item.getpeername()[1] == port
            except OSError:
                continue
    return count


def test_an_idle_websocket_is_given_back_and_made_anew(
    server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui_events, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(comfyui_events, "_IDLE_SECONDS", 0.2)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        for _ in range(3):
            assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
            server.wait_for(lambda s: s.open_websockets == 0, PATIENCE)
    assert served(server)["GET /ws"] == 3
    assert served(server)["GET /queue"] == 0


def test_an_idle_websocket_is_given_back_though_strangers_are_busy(
    server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfyui_events, "_TICK_SECONDS", 0.3)
    monkeypatch.setattr(comfyui_events, "_IDLE_SECONDS", 0.3)
    body = {"prompt": bench_graph(0.01)}
    with ComfyServerWorkflowExecutor(server.address) as executor:
        assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
        until = time.monotonic() + PATIENCE
        while server.open_websockets and time.monotonic() < until:
            requests.post(f"{server.url}/prompt", json=body, timeout=PATIENCE)
        assert server.open_websockets == 0


# Uploads.


def example(server: DevServer) -> bytes:
    return (server.directory / "input" / "example.png").read_bytes()


def test_inputs_are_uploaded_once_and_unchanged(server: DevServer) -> None:
    data = example(server)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        runs = [executor.submit_workflow(loading(), [data], num_samples=4) for _ in range(2)]
        again = executor.submit_workflow(loading(), [data])
        for run in (*runs, again):
            run.result(PATIENCE)
    assert served(server)["POST /upload/image"] == 1
    (uploaded,) = (server.directory / "input").glob("*/0000.png")
    assert hashlib.sha256(uploaded.read_bytes()).digest() == hashlib.sha256(data).digest()


def test_outputs_are_the_bytes_of_the_server(server: DevServer) -> None:
    with ComfyServerWorkflowExecutor(server.address) as executor:
        images = executor.submit_workflow(bench(batch_size=3), num_samples=2).result(PATIENCE)
    assert len(images) == 6
    for image in images:
        on_disk = (server.directory / "output" / image.subfolder / image.name).read_bytes()
        assert hashlib.sha256(image.data).digest() == hashlib.sha256(on_disk).digest()


def test_inputs_are_uploaded_once_a_server_by_many_executors(server: DevServer) -> None:
    data = example(server)
    for _ in range(3):
        with ComfyServerWorkflowExecutor(server.address) as executor:
            run = executor.submit_workflow(loading(), input_images=[data])
            assert len(run.result(PATIENCE)) == 1
    assert served(server)["POST /upload/image"] == 1


def test_an_input_that_is_there_in_part_is_uploaded_again(server: DevServer) -> None:
    data = example(server)
    folder = server.directory / "input" / InputImageSet([data]).folder
    folder.mkdir()
    (folder / "0000.png").write_bytes(data[:-1])
    with ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(loading(), input_images=[data])
        assert len(run.result(PATIENCE)) == 1
    assert (folder / "0000.png").read_bytes() == data


@pytest.mark.parametrize("version", VERSIONS)
def test_inputs_that_a_restart_wiped_are_uploaded_again(version: str) -> None:
    with DevServer(version=version) as server:
        data = example(server)
        with ComfyServerWorkflowExecutor(server.address) as executor:
            assert len(executor.submit_workflow(loading(), [data]).result(PATIENCE)) == 1
            server.restart()
            (uploaded,) = (server.directory / "input").glob("*/0000.png")
            shutil.rmtree(uploaded.parent)
            assert len(executor.submit_workflow(loading(), [data]).result(PATIENCE)) == 1
        assert served(server)["POST /upload/image"] == 2


def test_only_so_many_uploads_are_remembered(
    server: DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfy_server, "_KNOWN_UPLOADS", 2)
    data = example(server)
    # Bytes behind the end of a PNG change nothing but the set's name.
    first, second, third = (data + bytes(number) for number in range(3))
    with ComfyServerWorkflowExecutor(server.address) as executor:
        for image in (first, second, third, third, second, first):
            assert len(executor.submit_workflow(loading(), [image]).result(PATIENCE)) == 1
    assert served(server)["POST /upload/image"] == 3
    assert served(server)["HEAD /view"] == 4  # the first one was asked for again


def test_batches_wait_for_the_upload_that_another_one_makes(server: DevServer) -> None:
    server.faults.delay("POST", "/upload/image", 0.5)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(loading(), [example(server)], num_samples=4)
        assert len(run.result(PATIENCE)) == 4
    assert served(server)["HEAD /view"] == served(server)["POST /upload/image"] == 1
    assert [r.status for r in server.requests if r.path == "/prompt" and r.status != 200] == []
    assert served(server)["POST /prompt"] == 4


def test_input_images_are_uploaded_side_by_side(server: DevServer) -> None:
    data = example(server)
    server.faults.delay("HEAD", "/view", 0.5, times=1)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(loading(), [data + bytes(i) for i in range(9)])
        assert len(run.result(PATIENCE)) == 1
    uploads = [r for r in server.requests if r.path in ("/view", "/upload/image")]
    heads = [r.query["filename"] for r in uploads if r.method == "HEAD"]
    assert sorted(heads) == [f"{number:04d}.png" for number in range(9)]
    assert heads != sorted(heads)  # others did not wait for the slow one, which came first
    assert served(server)["POST /upload/image"] == 9


def test_one_of_many_inputs_that_is_refused_fails_the_run(server: DevServer) -> None:
    data = example(server)
    server.faults.fail("POST", "/upload/image", status=413)
    images = [data + bytes(i) for i in range(9)]
    with ComfyServerWorkflowExecutor(server.address) as executor:
        error = executor.submit_workflow(loading(), images).futures[0].exception(PATIENCE)
        assert isinstance(error, ServerResponseError)
        assert server.prompts == []
        # Nothing of it is taken for uploaded.
        assert len(executor.submit_workflow(loading(), images).result(PATIENCE)) == 1
    assert len(list((server.directory / "input").glob("*/*.png"))) == 9


def test_an_upload_that_fails_for_one_run_is_tried_by_the_other(server: DevServer) -> None:
    data = example(server)
    server.faults.delay("POST", "/upload/image", 0.3)
    with ComfyServerWorkflowExecutor(server.address) as executor:
        first = executor.submit_workflow(loading(), [data])
        server.wait_for(lambda s: served(s)["GET /prompt"] >= 1, PATIENCE)
        second = executor.submit_workflow(loading(), [data])
        first.cancel()
        assert len(second.result(PATIENCE)) == 1


def test_an_input_that_is_too_large_is_an_error(server: DevServer) -> None:
    server.faults.fail("POST", "/upload/image", status=413)
    failure(
        server.address,
        ServerResponseError,
        "bytes are too many",
        template=loading(),
        images=[example(server)],
    )
    assert server.prompts == []


@pytest.mark.parametrize("version", VERSIONS)
def test_old_servers_choose_the_id(version: str) -> None:
    with DevServer(version=version) as server:
        with ComfyServerWorkflowExecutor(server.address) as executor:
            images = executor.submit_workflow(bench(), num_samples=4).result(PATIENCE)
        ended(server, success=4)
        assert {i.prompt_id for i in images} == {p.prompt_id for p in server.prompts}


def test_a_rejected_graph_of_several_outputs_is_not_run(server: DevServer) -> None:
    graph = bench_graph(ENDLESS, steps=1000)
    graph["3"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}
    template = WorkflowTemplate.from_graph(graph)
    failure(
        server.address,
        WorkflowRejectedError,
        "input images: is required and missing",
        template=template,
    )
    server.wait_for(lambda s: set(statuses(s)) <= {"interrupted", "deleted"}, PATIENCE)
    assert len(server.prompts) == 1


def test_the_valid_part_of_a_graph_runs_if_that_is_wanted(server: DevServer) -> None:
    graph = bench_graph()
    graph["3"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}
    with ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(WorkflowTemplate.from_graph(graph), allow_partial=True)
        assert len(run.result(PATIENCE)) == 1
    ended(server, success=1)


def test_errors_of_the_server_can_be_pickled(server: DevServer) -> None:
    caught = failure(server.address, WorkflowRejectedError, "width", template=bench(width=0))
    again = pickle.loads(pickle.dumps(caught))
    assert str(again) == str(caught)
    assert not isinstance(again, ServerError)
    json.dumps(again.problems[0].value)
