"""Addresses, what is tried again, and after how long."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_executors.clients import http
from comfy_executors.clients.http import (
    Answer,
    DeadlineWaiter,
    HttpClient,
    is_transient,
    parse_address,
)
from comfy_executors.errors import (
    AuthenticationError,
    ServerError,
    ServerResponseError,
    ServerUnreachableError,
    WaitTimeoutError,
)

URL = "http://example.invalid:8188"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost", "http://localhost:8188"),
        ("localhost:80", "http://localhost:80"),
        (" example.com:9 ", "http://example.com:9"),
        ("127.0.0.1", "http://127.0.0.1:8188"),
        ("[::1]", "http://[::1]:8188"),
        ("[::1]:9", "http://[::1]:9"),
        ("http://[::1]:9/x", "http://[::1]:9/x"),
        ("http://example.com", "http://example.com"),
        ("HTTPS://Example.COM/", "https://example.com"),
        ("https://example.com/comfy/", "https://example.com/comfy"),
        ("example.com/comfy", "http://example.com:8188/comfy"),
        ("https://example.com:8443/a/b//", "https://example.com:8443/a/b"),
    ],
)
def test_parse_address(address: str, url: str) -> None:
    assert parse_address(address, 8188) == (url, None)


@pytest.mark.parametrize(
    ("address", "user"),
    [
        ("http://me:secret@host", ("me", "secret")),
        ("me:secret@host:9", ("me", "secret")),
        ("http://me@host", ("me", "")),
        ("http://m%40e:s%3A%2F%C3%A4@host", ("m@e", "s:/ä")),
    ],
)
def test_parse_address_with_a_user(address: str, user: tuple[str, str]) -> None:
    url, found = parse_address(address, 8188)
    assert found == user
    assert url in ("http://host", "http://host:9")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "http://",
        "ftp://host",
        "ws://host",
        "host:port",
        "host:99999",
        "ho st",
        "::1",
        "http://[::1",
        "http://host?token=x",
        "http://host/#x",
        "http://me:secret@host:port",
        "http://me:secret@[::1",
        "http://me:secret@ho\u2100st",
        "http://me:sec/secret@host",
    ],
)
def test_parse_address_refuses(address: str) -> None:
    with pytest.raises(ValueError, match="address") as caught:
        parse_address(address, 8188)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@settings(deadline=None)
@given(st.text())
def test_parse_address_gives_a_url_or_a_value_error(address: str) -> None:
    try:
        url, _ = parse_address(address, 8188)
    except ValueError:
        return
    assert url.startswith(("http://", "https://"))
    assert not url.endswith("/")


def refusal(
    status: int, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> ServerError:
    client = HttpClient(URL)
    try:
        return client._refusal("GET /x", Answer(status, headers or {}, body))
    finally:
        client.close()


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        *((status, True) for status in (408, 425, 429, 500, 502, 503, 504)),
        *((status, True) for status in range(520, 525)),
        *((status, False) for status in (301, 302, 400, 401, 403, 404, 405, 409, 410, 413, 501)),
    ],
)
def test_which_statuses_are_transient(status: int, transient: bool) -> None:
    error = refusal(status)
    assert is_transient(error) is transient
    assert error.status == status


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("86400", 60.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("-3", None),
        ("²", None),
        ("", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert refusal(429, {"retry-after": value}).retry_after == seconds


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!DOCTYPE html><html>x</html>", "an HTML page, not an answer of ComfyUI's API"),
        (b"<html><head>Bad gateway", "an HTML page, not an answer of ComfyUI's API"),
        (b"", "an empty body"),
        (b"  broken \n pipe ", "broken pipe"),
        (b"\xff\xfe" + b"x" * 3000, "\ufffd\ufffd" + "x" * 198),
    ],
)
def test_what_is_shown_of_an_answer(body: bytes, words: str) -> None:
    assert str(refusal(502, body=body)) == f"{URL} answers GET /x with 502: {words}"


@pytest.mark.parametrize("target", ["http://other/x?key=k", "//[", ""])
def test_a_redirect_names_its_target_without_its_query(target: str) -> None:
    error = refusal(302, {"location": target})
    assert isinstance(error, ServerResponseError)
    assert target.partition("?")[0] in str(error)
    assert "key=k" not in str(error)


def test_a_401_says_whether_there_was_a_key() -> None:
    with_key = HttpClient(URL, headers={"X-Key": "k3y"})
    error = with_key._refusal("GET /x", Answer(401, {}, b""))
    with_key.close()
    assert isinstance(error, AuthenticationError)
    assert str(error) == f"{URL} answers GET /x with 401: is the key right?"
    assert str(refusal(401)).endswith("with 401: pass headers= or auth=")


@pytest.mark.parametrize(
    ("options", "secrets"),
    [
        ({"headers": {"X-Key": "k3y-of-ours"}}, ["k3y-of-ours"]),
        ({"headers": {"Authorization": "Bearer k3y-of-ours"}}, ["k3y-of-ours"]),
        ({"auth": ("user", "pa55w0rd")}, ["pa55w0rd", "dXNlcjpwYTU1dzByZA=="]),
    ],
)
def test_an_answer_that_echoes_the_request_does_not_show_its_key(
    options: Mapping[str, Any], secrets: Sequence[str]
) -> None:
    client = HttpClient(URL, **options)
    # Over the place where the excerpt is cut, too.
    for padding in ("", "x" * 190):
        body = padding + " ".join(["you sent", *client.sent_headers().values(), *secrets])
        error = client._refusal("GET /x", Answer(502, {}, body.encode()))
        assert all(secret[:5] not in str(error) for secret in secrets)
        assert "..." in str(error) or padding
    client.close()


def test_a_short_header_does_not_spoil_what_is_shown() -> None:
    client = HttpClient(URL, headers={"X-Mode": "1"})
    assert str(client._refusal("GET /x", Answer(500, {}, b"1 of 11"))).endswith("1 of 11")
    client.close()


def test_what_is_not_transient_is_called_once() -> None:
    client, calls = HttpClient(URL), []

    def call() -> None:
        calls.append(1)
        raise ServerResponseError("no", URL, 404)

    with pytest.raises(ServerResponseError):
        client.retry(call, DeadlineWaiter(10))
    client.close()
    assert len(calls) == 1


def test_a_server_that_never_answered_is_tried_three_times() -> None:
    client, calls = HttpClient(URL), []

    def call() -> None:
        calls.append(1)
        raise ServerUnreachableError("gone", URL, transient=True)

    with pytest.raises(ServerUnreachableError):
        client.retry(call, DeadlineWaiter(10))
    client.close()
    assert len(calls) == 3


def test_the_deadline_ends_the_retries() -> None:
    client = HttpClient(URL)

    def call() -> None:
        raise ServerResponseError("busy", URL, 429, transient=True, retry_after=60.0)

    with pytest.raises(WaitTimeoutError, match=r"no answer within 0\.05 s"):
        client.retry(call, _Waiter(0.05))
    client.close()


class _Clock(DeadlineWaiter):
    """Whose waits are over at once, and are what the time consists of."""

    def __init__(self, speed: float = 1.0) -> None:
        super().__init__(10)
        self.speed = speed
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += self.speed * seconds


def outage(
    monkeypatch: pytest.MonkeyPatch, clock: _Clock, seconds: float, attempts: int | None = None
) -> int:
    """Call a server that answered before and is gone now; tell how often it was tried."""
    client, calls = HttpClient(URL, outage_timeout=seconds), []
    client._answered = True
    monkeypatch.setattr(http, "time", clock)

    def call() -> None:
        calls.append(1)
        raise ServerUnreachableError("gone", URL, transient=True)

    with pytest.raises(ServerUnreachableError):
        client.retry(call, clock, attempts=attempts)
    client.close()
    return len(calls)


@pytest.mark.parametrize("seconds", [0.0, 3.0, 60.0, 600.0, 7200.0])
def test_an_outage_is_waited_for_as_long_as_was_said(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock = _Clock()
    outage(monkeypatch, clock, seconds)
    assert seconds <= clock.now <= seconds + 5


@pytest.mark.parametrize(("given", "made"), [(None, 100), (3, 3)])
def test_attempts_are_bounded_where_the_time_is_not(
    monkeypatch: pytest.MonkeyPatch, given: int | None, made: int
) -> None:
    assert outage(monkeypatch, _Clock(speed=0.0), 60.0, given) == made


class _Waiter(DeadlineWaiter):
    """Looks at the time once more after each wait, as the waits of a run do."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.limit(seconds)


def test_errors_can_be_pickled() -> None:
    error = refusal(503, {"retry-after": "3"})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
