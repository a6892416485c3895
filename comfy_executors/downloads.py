"""Downloading a template over HTTP, within a time and a size."""

from __future__ import annotations

import concurrent.futures
import threading
from concurrent.futures import Future
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import DecodeError, HTTPError, ProtocolError, ReadTimeoutError

from comfy_executors.errors import (
    AuthenticationError,
    ServerResponseError,
    ServerUnreachableError,
    TemplateError,
)

# Small, because a zipped chunk may unfold to a thousand times its size before it is counted.
_CHUNK_BYTES = 1024
# requests' own exceptions are OSErrors too, and their texts hold the whole address.
_ROOT_CAUSES = (OSError, HTTPException, ProtocolError, DecodeError)


def download_template(url: str, *, timeout: float, max_bytes: int) -> tuple[bytes, str]:
    """Return what stands at an address, and the address without credentials.

    Args:
        url: An http or https address.
        timeout: How long the whole download may take, in seconds.
        max_bytes: How much may come, in bytes.

    Raises:
        ServerUnreachableError: Nobody answers, or not within the timeout.
        AuthenticationError: The answer is 401 or 403.
        ServerResponseError: The answer is another error, an HTML page, or a redirection to
            another scheme.
        TemplateError: The address is none, or more than `max_bytes` came.
    """
    source = _address_to_show(url)
    download = _Download(url, source, timeout, max_bytes)
    # A daemon: the name server, or headers that trickle, can hold it beyond every timeout that a
    # socket knows, and it must not hold up the end of the program as well.
    threading.Thread(target=download.run, name="template-download", daemon=True).start()
    return download.wait(), source


class _Download:
    """One download in a thread of its own, which ends at the first byte after the deadline."""

    def __init__(self, url: str, source: str, timeout: float, max_bytes: int) -> None:
        self._url = url
        self._source = source
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._body: Future[bytes] = Future()
        self._given_up = threading.Event()

    def wait(self) -> bytes:
        try:
            concurrent.futures.wait([self._body], self._timeout)
            if not self._body.done():
                raise _too_slow(self._source, self._timeout)
            return self._body.result()
        finally:
            self._given_up.set()

    def run(self) -> None:
        try:
            self._body.set_result(self._fetch())
        # Whatever it is belongs to the thread that waits.
        except BaseException as error:
            self._body.set_exception(error)

    def _fetch(self) -> bytes:
        source = self._source
        try:
            with requests.get(self._url, timeout=self._timeout, stream=True) as response:
                _check_answer(response, source)
                return self._read_body(response)
        except (requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
            # Their text holds the address with its query.
            raise ServerResponseError(
                f"{source} redirects to another scheme than http and https, or in circles",
                server=source,
            ) from _root_cause(error)
        except requests.exceptions.InvalidURL as error:
            raise TemplateError(f"{source} is not an address") from _root_cause(error)
        except (requests.Timeout, ReadTimeoutError) as error:
            raise _too_slow(source, self._timeout) from _root_cause(error)
        except (requests.RequestException, HTTPError, OSError) as error:
            cause = _root_cause(error)
            reason = f": {cause}" if cause else "; is the address right?"
            raise ServerUnreachableError(
                f"{source} cannot be read{reason}", server=source
            ) from cause

    def _read_body(self, response: requests.Response) -> bytes:
        # `read1` returns what has come, where `read` would wait for a whole chunk of a body that
        # trickles. urllib3 1 has only the second.
        read: Any = getattr(response.raw, "read1", response.raw.read)
        body = bytearray()
        while not self._given_up.is_set():
            chunk = read(_CHUNK_BYTES, decode_content=True)
            if not chunk:
                break
            body += chunk
            if len(body) > self._max_bytes:
                raise TemplateError(
                    f"the template is larger than {self._max_bytes} bytes", source=self._source
                )
        _check_length(response, self._source)
        return bytes(body)


def _address_to_show(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise TemplateError("the template's address is not a URL") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise TemplateError(
            f"a template's address begins with http:// or https:// and a host, not with"
            f" {parts.scheme or 'nothing of the kind'}"
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme.lower()}://{host}{f':{port}' if port else ''}{parts.path}"


def _check_answer(response: requests.Response, source: str) -> None:
    status = response.status_code
    if any(hop.url.startswith("https:") for hop in response.history) and (
        response.url.startswith("http:")
    ):
        raise ServerResponseError(f"{source} redirects from https to http", server=source)
    if status in (401, 403):
        raise AuthenticationError(
            f"{source} answers {status}: it wants credentials, or others",
            server=source,
            status=status,
        )
    if status != 200:
        raise ServerResponseError(f"{source} answers {status}", server=source, status=status)
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise ServerResponseError(
            f"{source} is an HTML page; the address of the raw file is wanted",
            server=source,
            status=status,
        )


def _check_length(response: requests.Response, source: str) -> None:
    # urllib3 1 takes the end of the connection for the end of the body.
    expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and response.raw.tell() < int(expected):
        raise ServerUnreachableError(
            f"{source} cannot be read: it hung up before the end", server=source
        )


def _too_slow(source: str, timeout: float) -> ServerUnreachableError:
    return ServerUnreachableError(
        f"{source} did not deliver within {timeout:g} seconds", server=source
    )


def _root_cause(error: BaseException) -> BaseException | None:
    """Return the error of the network below those that would show the address with its query."""
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    shows_no_address = isinstance(cause, _ROOT_CAUSES) and not isinstance(
        cause, requests.RequestException
    )
    return cause if shows_no_address else None
