"""HTTP as Modal's edge speaks it: proxy tokens, calls that are answered at another address."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NoReturn
from urllib.parse import parse_qs, urljoin, urlsplit, urlunsplit

import requests

from comfy_executors.clients.http import Answer, HttpClient, Waiter
from comfy_executors.clients.modal_refusals import refusal_of
from comfy_executors.errors import ServerResponseError, ServerUnreachableError

# The edge cuts a call at 150 seconds, and then says where its answer will be.
_HEAD_SECONDS = 160.0
_CONNECTIONS = 50
_AGAIN_SECONDS = 1.0
_CALL_PARAMETER = "__modal_function_call_id"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class ModalHttp(HttpClient):
    """`HttpClient` for one app, which follows the edge's redirects itself.

    The environment's proxies and CA bundle are honoured; `~/.netrc` is not, so that the token's
    headers are what is sent. They go to the app's own host alone.

    Args:
        url: The app's address.
        headers: The headers of the proxy token, or none.
        outage_timeout: Seconds for which failed calls are repeated.
    """

    def __init__(self, url: str, headers: Mapping[str, str], outage_timeout: float) -> None:
        parts = urlsplit(url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        super().__init__(
            url,
            headers=headers,
            outage_timeout=outage_timeout,
            connections=_CONNECTIONS,
            head_seconds=_HEAD_SECONDS,
        )

    def send(
        self,
        method: str,
        path: str,
        waiter: Waiter,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> Answer:
        """Make one call, once, and wait for its answer wherever that is.

        Args:
            method: The HTTP method.
            path: The path below the app's address.
            waiter: Its deadline is that of the whole chain of redirects.
            params: The query.
            body: The body.
            content_type: What the body is.

        Raises:
            ServerError: There is no answer, or none that the app would give.
            ComfyExecutorsError: What the app says that is wrong.
        """
        headers = {} if body is None else {"Content-Type": content_type}
        request = requests.Request(
            method, self.base_url + path, params=params, data=body, headers=headers
        )
        what = f"{method} {path}"
        answer = self._exchange(request, waiter)
        url = self.base_url + path
        pause = _Pause(waiter)
        while 300 <= answer.status < 400:
            url = self._answer_url(what, url, answer)
            answer = self._fetch_answer(url, pause, waiter)
        if answer.status in (200, 201, 202):
            self._answered = True
            return answer
        error = refusal_of(what, answer, self.base_url, self._headers.values())
        # The edge is there, which is worth more than the few attempts for a wrong address.
        self._answered = self._answered or answer.status not in (401, 403, 404)
        raise error

    def _fetch_answer(self, url: str, pause: _Pause, waiter: Waiter) -> Answer:
        """GET what a call is answered with, until there is an answer or another address."""
        while True:
            pause.wait()
            try:
                # With a header, so that it is not taken for a path below the app's own address.
                request = requests.Request("GET", url, headers={"Accept": "*/*"})
                answer = self._exchange(request, waiter)
            except ServerUnreachableError as error:
                if not error.transient:
                    raise
                continue
            if answer.status != 408:
                return answer

    def _answer_url(self, what: str, url: str, answer: Answer) -> str:
        """Return where the edge says that a call's answer will be.

        303 tells to go on with GET. 301 and 302 are taken for the same where they name a call,
        since a POST that is moved to another place would lose its body; 307 and 308 would have it
        sent again, and 304 and the like are no answer to anything that is sent here.
        """
        location = answer.headers.get("location", "")
        if not location:
            self._refuse_redirect(what, answer.status, "to nowhere")
        try:
            target = urlsplit(urljoin(url, location))
            is_ours = _origin_of(target.geturl()) == _origin_of(self._origin)
        except ValueError:
            self._refuse_redirect(what, answer.status, "to what is no address")
        if not is_ours or target.username is not None:
            # Without its query: it may be as good as a key.
            place = f"{target.scheme}://{target.hostname}"
            self._refuse_redirect(what, answer.status, f"to {place}, which gets no token of ours")
        names_call = _CALL_PARAMETER in parse_qs(target.query)
        if answer.status != 303 and not (answer.status in (301, 302) and names_call):
            self._refuse_redirect(what, answer.status, f"to {target.path}: use that address")
        return self._origin + urlunsplit(("", "", target.path or "/", target.query, ""))

    def _refuse_redirect(self, what: str, status: int, words: str) -> NoReturn:
        self._answered = True
        raise ServerResponseError(
            f"{self.base_url} answers {what} with {status}, a redirect {words}",
            self.base_url,
            status,
        )


class _Pause:
    """Keeps the calls for an answer apart, when the edge does not hold them."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._begun = float("-inf")

    def wait(self) -> None:
        """Wait until a second has passed since the call before."""
        left = self._begun + _AGAIN_SECONDS - time.monotonic()
        if left > 0:
            self._waiter.sleep(left)
        self._begun = time.monotonic()


def _origin_of(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
