"""HTTP for all clients: one session, one table of errors, one way to retry.

`requests` raises in a dozen ways; here, and only here, they become the classes of `errors.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import IO, Any, NamedTuple, Protocol, TypeVar, Union, cast
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import requests
import tenacity
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth
from requests.cookies import extract_cookies_to_jar
from requests.hooks import dispatch_hook

from comfy_executors.clients.guard import CallGuard, GuardedAdapter
from comfy_executors.errors import (
    AuthenticationError,
    ServerError,
    ServerResponseError,
    ServerUnreachableError,
    WaitTimeoutError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Auth = Union[tuple[str, str], AuthBase]

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # a ComfyUI server that loads a model can be silent for tens of seconds
SLOWEST_UPLOAD = 50_000  # bytes a second, at which a call may take longer than others
_CHUNK_BYTES = 1 << 20
_LEAST_SECRET = 4  # what is shorter is no key, and stands in any text
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_~-]*)+")  # that nothing has to be quoted in
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 5.0
_ATTEMPTS, _ATTEMPTS_A_SECOND = 40, 1.0  # waits are longer on average: the time decides
_ATTEMPTS_BEFORE_FIRST_ANSWER = 3  # a wrong address should not take a minute to say so
# What a proxy or an overloaded server answers for a while; 52x are Cloudflare's.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}


class Waiter(Protocol):
    """How a call waits: shortened by a deadline, ended by a cancellation."""

    def sleep(self, seconds: float) -> None: ...

    def limit(self, seconds: float) -> float: ...

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Have `interrupt` called, by any thread, when it is cancelled within the context."""
        ...


class DeadlineWaiter:
    """A waiter for calls outside of any run: all of them together get so many seconds.

    Args:
        seconds: How long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def sleep(self, seconds: float) -> None:
        """Wait; WaitTimeoutError when the time is up."""
        threading.Event().wait(self.limit(seconds))

    def limit(self, seconds: float) -> float:
        """Shorten a time limit to what is left; WaitTimeoutError when nothing is."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(f"no answer within {self._seconds:g} s")
        return min(seconds, left)

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        """Do nothing: nobody can cancel it."""
        return contextlib.nullcontext()


class Answer(NamedTuple):
    """A whole answer.

    Args:
        status: The HTTP status.
        headers: The headers; names in any case.
        content: The body, complete.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def is_json(self) -> bool:
        """Whether it says that it is JSON."""
        return "json" in self.headers.get("content-type", "")

    def json(self) -> Any:
        """Parse the body; ValueError when it is no JSON."""
        return json.loads(self.content)


class _NoAuth(AuthBase):
    """Keeps requests from taking a password out of ~/.netrc, over a header that the caller set."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


def parse_address(address: str, default_port: int) -> tuple[str, tuple[str, str] | None]:
    """Make a base URL of what people write: `host:port`, or `http(s)://host/prefix`.

    Args:
        address: The address; a bare host gets the default port.
        default_port: That port.

    Returns:
        The base URL without a slash at its end, and the user and password if it had them.

    Raises:
        ValueError: It is no such address.
    """
    text = address.strip()
    has_scheme = "://" in text
    refusal = f"not an address: {_without_user(address)!r}; write host:port or a URL"
    try:
        parts = urlsplit(text if has_scheme else f"http://{text}")
        port = parts.port
    except ValueError:
        # Without its cause, whose words can hold the password.
        too_high = re.search(r":[0-9]{5,}(/|$)", text)
        raise ValueError(refusal + ("; ports end at 65535" if too_high else "")) from None
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or " " in text:
        raise ValueError(refusal)
    if parts.query or parts.fragment:
        raise ValueError(f"an address has no ? or #, as after {_without_user(address)!r}")
    if port is None and not has_scheme:
        port = default_port
    host = f"[{host}]" if ":" in host else host
    netloc = host if port is None else f"{host}:{port}"
    user = None
    if parts.username is not None:
        user = unquote(parts.username), unquote(parts.password or "")
    return urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", "")), user


def _without_user(address: str) -> str:
    # What follows a question mark may be a key as well.
    return re.split("[?#]", address)[0].rsplit("@", 1)[-1]


class HttpClient:
    """Calls to one server.

    Args:
        base_url: The server's URL, a path prefix included, without a slash at its end.
        headers: Sent with each call, to this server only: redirects are not followed.
        auth: User and password, or what `requests` takes as auth.
        verify: Whether TLS certificates are checked, or the path of a CA bundle.
        outage_timeout: Seconds for which failed calls are repeated, once the server has answered
            at all.
        connections: How many connections are kept open.
        head_seconds: How long a server may think before it answers, if not `READ_SECONDS`.

    Raises:
        ValueError: A header has characters that HTTP does not allow.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        auth: Auth | None = None,
        verify: bool | str = True,
        outage_timeout: float = 60.0,
        connections: int = 10,
        head_seconds: float | None = None,
    ) -> None:
        self.base_url = base_url
        self._head_seconds = head_seconds
        self._headers = _checked_headers(headers or {})
        if isinstance(auth, tuple):
            auth = HTTPBasicAuth(_utf8(auth[0]), _utf8(auth[1]))
        self._auth = auth or _NoAuth()
        self._verify = verify
        self._outage_timeout = outage_timeout
        self._connections = connections
        self._answered = False
        self._in_outage = False
        self.reset()

    def reset(self) -> None:
        """Start with new connections; a forked child must not use its parent's."""
        session = requests.Session()
        session.headers.update(self._headers)
        session.auth = self._auth
        self._adapter: HTTPAdapter = GuardedAdapter(
            pool_connections=1, pool_maxsize=self._connections, max_retries=0
        )
        session.mount(self.base_url, self._adapter)
        self._session = session
        # Looked up once: requests would read the environment's proxies again for every call.
        self._settings: Any = session.merge_environment_settings(
            self.base_url, {}, True, self._verify, None
        )
        self._plain = session.prepare_request(requests.Request("GET", self.base_url + "/"))

    def close(self) -> None:
        """Close the connections."""
        # An error that somebody keeps holds on to the frames of its call, and so to the pool of
        # connections, which urllib3 2 leaves to the garbage collector.
        for manager in (self._adapter.poolmanager, *self._adapter.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118  it cannot be iterated over
                manager.pools[key].close()
        self._session.close()

    @property
    def verify(self) -> bool | str:
        """What certificates are checked against, the environment's CA bundle included."""
        return cast("bool | str", self._settings["verify"])

    def sent_headers(self) -> dict[str, str]:
        """Return the headers that a call sends, those of `auth` included, for the websocket."""
        request = self._session.prepare_request(requests.Request("GET", self.base_url))
        return self._own_headers(request)

    def without_keys(self, answer: Answer) -> Answer:
        """Take what was sent as a header, or as a password, out of an answer that is to be shown.

        A proxy, or a server that debugs, may answer with the request.
        """
        secrets = [*self._own_headers(self._plain).values()]
        if isinstance(self._auth, HTTPBasicAuth):
            secrets.append(cast(bytes, self._auth.password).decode())
        content = answer.content
        # A key may be shown without the scheme before it, as in `Bearer KEY`.
        for secret in (*secrets, *(text.rpartition(" ")[2] for text in secrets)):
            if len(secret) >= _LEAST_SECRET:
                content = content.replace(secret.encode(), b"...")
        return answer._replace(content=content)

    def _own_headers(self, request: requests.PreparedRequest) -> dict[str, str]:
        # What requests itself sends with each call; a name that the caller set is the caller's.
        foreign = {name.lower() for name in requests.utils.default_headers()}
        foreign -= {name.lower() for name in self._headers}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in foreign}
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in headers.items()}

    def get(
        self, path: str, waiter: Waiter, *, accept: tuple[int, ...] = (), **kwargs: Any
    ) -> Answer:
        """GET, repeated while the server is out of reach or overloaded. See `call`."""
        return self.retry(lambda: self.call("GET", path, waiter, accept=accept, **kwargs), waiter)

    def retry(
        self,
        call: Callable[[], T],
        waiter: Waiter,
        *,
        attempts: int | None = None,
        outage_timeout: float | None = None,
    ) -> T:
        """Repeat a call that is safe to repeat while its errors are transient.

        Args:
            call: The call.
            waiter: Its deadline and cancellation end the waits in between, too.
            attempts: How often to try at the most; by default `outage_timeout` decides.
            outage_timeout: Seconds for which it is repeated, if not the client's.

        Raises:
            ServerError: The last error, after `outage_timeout` seconds, or at once if it is not
                transient.
        """
        first_failure: list[float] = []
        borne = self._outage_timeout if outage_timeout is None else outage_timeout
        most = attempts or _ATTEMPTS + _ATTEMPTS_A_SECOND * borne

        def stop(state: tenacity.RetryCallState) -> bool:
            # From the first failure on: a call that waits in vain may take as long by itself.
            first_failure.append(time.monotonic())
            if not self._answered:
                return state.attempt_number >= min(most, _ATTEMPTS_BEFORE_FIRST_ANSWER)
            outage = time.monotonic() - first_failure[0]
            return state.attempt_number >= most or outage >= borne

        policy = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=stop,
            wait=_wait,
            sleep=waiter.sleep,
            before_sleep=partial(self._tell_outage, borne),
            reraise=True,
        )
        result = policy(call)
        self._in_outage = False
        return result

    def _tell_outage(self, borne: float, state: tenacity.RetryCallState) -> None:
        """Say once an outage that, and how long, the server is waited for."""
        error = state.outcome.exception() if state.outcome else None
        if self._answered and not self._in_outage:
            self._in_outage = True
            logger.warning("%s; trying again for %g s", error, borne)

    def call(
        self,
        method: str,
        path: str,
        waiter: Waiter,
        *,
        accept: tuple[int, ...] = (),
        params: Mapping[str, str] | None = None,
        json: Any = None,
        data: Mapping[str, str] | None = None,
        files: Any = None,
        into: IO[bytes] | None = None,
    ) -> Answer:
        """Make one call, once.

        Args:
            method: The HTTP method.
            path: The path below the base URL.
            waiter: Its deadline shortens the call's own time limits.
            accept: Statuses beside 200 that the caller understands.
            params: The query.
            json: A body as JSON; or `data` and `files` for a form.
            into: A file for the answer's body, which is empty then: it may be a large one.

        Raises:
            ServerUnreachableError: No whole answer came; `maybe_received` tells whether the
                server may have got the request.
            AuthenticationError: 401 or 403.
            ServerResponseError: Another status; `transient` tells whether to try again.
        """
        request = requests.Request(
            method, self.base_url + path, params=params, json=json, data=data, files=files
        )
        answer = self._exchange(request, waiter, into)
        if answer.status != 200 and answer.status not in accept:
            raise self._refusal(f"{method} {path}", answer)
        self._answered = True
        return answer

    def _exchange(
        self,
        request: requests.Request,
        waiter: Waiter,
        into: IO[bytes] | None = None,
        sender: Waiter | None = None,
    ) -> Answer:
        """Make one call, whatever its answer; `sender` counts for as long as its body is sent."""
        sender = sender or waiter
        head_seconds = self._head_seconds or READ_SECONDS
        # Zero would be an error, not a short time.
        timeout = (
            max(waiter.limit(CONNECT_SECONDS), 0.01),
            max(waiter.limit(head_seconds), 0.01),
        )
        guard = CallGuard(waiter.limit, READ_SECONDS, head_seconds, sender.limit)
        try:
            prepared = self._prepare(request)
            with (
                guard,
                waiter.interrupting(guard.interrupt),
                self._send(prepared, timeout) as response,
            ):
                guard.head_is_here()
                into = into if response.status_code == 200 else None
                size = 0
                pieces: list[bytes] = []
                for piece in response.iter_content(_CHUNK_BYTES):
                    size += len(piece)
                    (pieces.append if into is None else into.write)(piece)
                for each in (*response.history, response):
                    if "set-cookie" in each.headers:
                        # Such as those that keep a client at one of several servers.
                        extract_cookies_to_jar(  # type: ignore[no-untyped-call]
                            self._session.cookies, each.request, each.raw
                        )
        except requests.RequestException as error:
            # A deadline or a cancellation is its own error.
            (sender if guard.is_cut else waiter).limit(READ_SECONDS)
            raise self._unreachable(error, guard.is_cut) from error
        answer = Answer(response.status_code, response.headers, b"".join(pieces))
        expected = answer.headers.get("content-length", "")
        encoded = "content-encoding" in answer.headers or request.method == "HEAD"
        if expected.isdecimal() and not encoded and size != int(expected):
            # urllib3 before 2 does not notice.
            raise ServerUnreachableError(
                f"{self.base_url} cut an answer short: {size} of {expected} bytes",
                server=self.base_url,
                transient=True,
                maybe_received=True,
            )
        return answer

    def _send(
        self, prepared: requests.PreparedRequest, timeout: tuple[float, float]
    ) -> requests.Response:
        # Past the session, which would follow redirects and do much else.
        response = self._adapter.send(prepared, timeout=timeout, **self._settings)
        # Here an `auth` such as HTTPDigestAuth answers a 401.
        answered: requests.Response = dispatch_hook(  # type: ignore[no-untyped-call]
            "response", prepared.hooks, response, timeout=timeout, **self._settings
        )
        return answered

    def _prepare(self, request: requests.Request) -> requests.PreparedRequest:
        path = request.url[len(self.base_url) :]
        has_more = request.data or request.files or request.headers or self._session.cookies
        if has_more or not self._is_plain(request, path):
            return self._session.prepare_request(request)
        # The same as requests would make of it, which takes a third of a small call's time.
        prepared = requests.PreparedRequest()
        prepared.method = request.method
        prepared.headers = self._plain.headers.copy()
        prepared.url = cast(str, self._plain.url)[:-1] + path
        if request.params:
            prepared.url += "?" + urlencode(request.params)
        if request.json is not None:
            prepared.body = json.dumps(request.json, allow_nan=False).encode()
            prepared.headers["Content-Type"] = "application/json"
            prepared.headers["Content-Length"] = str(len(prepared.body))
        return prepared

    def _is_plain(self, request: requests.Request, path: str) -> bool:
        signs = type(self._auth) not in (_NoAuth, HTTPBasicAuth)
        has_known_body = request.method in ("GET", "HEAD") or request.json is not None
        return has_known_body and not signs and _PLAIN_PATH.fullmatch(path) is not None

    def _through(self) -> str:
        """Name the proxy that calls go through, without its password."""
        proxy = requests.utils.select_proxy(self.base_url, self._settings["proxies"])
        if not proxy:
            return ""
        host = _without_user(proxy).split("//")[-1].rstrip("/")
        return f" through the proxy {host} of the environment"

    def _unreachable(self, error: requests.RequestException, is_cut: bool) -> ServerError:
        server, through = self.base_url, self._through()
        if isinstance(error, requests.exceptions.InvalidSchema):
            return ServerUnreachableError(
                f"{server} cannot be reached{through}: SOCKS needs PySocks, "
                "pip install requests[socks]; or set NO_PROXY",
                server=server,
            )
        if isinstance(error, requests.exceptions.SSLError) and not _was_cut_off(error):
            speaks_http = "WRONG_VERSION_NUMBER" in str(error)
            hint = (
                "it speaks http, not https"
                if speaks_http
                else "pass verify= with the path of the CA that signed its certificate"
            )
            return ServerUnreachableError(
                f"{server}: TLS failed: {_root_cause(error)}; {hint}", server=server
            )
        if isinstance(error, requests.exceptions.ReadTimeout):
            message = f"{server} did not answer{through} in time"
        elif isinstance(error, requests.exceptions.ConnectTimeout):
            seconds = f"{CONNECT_SECONDS:g} s"
            message = f"{server} cannot be reached{through}: no connection within {seconds}"
        else:
            message = f"{server} cannot be reached{through}: {_root_cause(error)}"
        if through:
            message += "; set NO_PROXY if it is to be reached directly"
        elif not self._answered:
            message += "; check the address, and that the server runs"
        return ServerUnreachableError(
            message,
            server=server,
            transient=True,
            maybe_received=not is_cut and not _never_sent(error),
        )

    def _refusal(self, what: str, answer: Answer) -> ServerError:
        server, status = self.base_url, answer.status
        what += self._through()  # which may be whose answer it is
        if status in (401, 403):
            hint = "is the key right?" if self._has_key() else "pass headers= or auth="
            return AuthenticationError(
                f"{server} answers {what} with {status}: {hint}", server=server, status=status
            )
        if 300 <= status < 400:
            target = answer.headers.get("location", "nowhere").partition("?")[0]
            return ServerResponseError(
                f"{server} redirects {what} to {target}: use that address", server, status
            )
        hint = "; check the address and its path" if status == 404 else ""
        return ServerResponseError(
            f"{server} answers {what} with {status}: {_excerpt(self.without_keys(answer))}{hint}",
            server,
            status,
            transient=status in _TRANSIENT,
            retry_after=retry_after(answer),
        )

    def _has_key(self) -> bool:
        return bool(self._headers) or not isinstance(self._auth, _NoAuth)


def _utf8(text: str) -> Any:
    # requests would try Latin-1, and show the password in the error.
    return text.encode()


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"the header {name!r} must be text, not {type(value).__name__}")
        # The value may be a key: it is not shown.
        if not f"{name}{value}".isprintable() or not f"{name}{value}".isascii():
            raise ValueError(f"the header {name!r} has characters that HTTP does not allow")
    return dict(headers)


def is_transient(error: BaseException) -> bool:
    """Tell whether the same call may work a little later."""
    return isinstance(error, ServerError) and error.transient


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    backoff: float = tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_WAIT)(state)
    return max(backoff, _FIRST_WAIT, getattr(error, "retry_after", None) or 0.0)


def retry_after(answer: Answer) -> float | None:
    """Read for how many seconds the server wants to be left alone, if it says so."""
    text = answer.headers.get("retry-after", "")
    # Longer than a minute helps nobody who waits; the form with a date is rare and ignored.
    return min(float(text), 60.0) if text.isdecimal() else None


def _never_sent(error: requests.RequestException) -> bool:
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return True
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    never_connected = (
        urllib3.exceptions.NewConnectionError,
        urllib3.exceptions.ConnectTimeoutError,
    )
    return isinstance(reason, never_connected)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _was_cut_off(error: BaseException) -> bool:
    """Tell a TLS connection that ended in its handshake, as in a restart, from a refused one."""
    kinds = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _root_cause(error: BaseException) -> str:
    """Find the operating system's own words, such as `Connection refused`."""
    words = type(error).__name__
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            words = cause.strerror
        elif isinstance(cause, http.client.HTTPException):
            # Such as "Remote end closed connection without response".
            words = str(cause) or type(cause).__name__
    return words


def _excerpt(answer: Answer) -> str:
    text = " ".join(answer.content[:2000].decode("utf-8", "replace").split())
    if "<html" in text[:500].lower() or "<!doctype" in text[:500].lower():
        return "an HTML page, not an answer of ComfyUI's API"
    return text[:200] or "an empty body"
