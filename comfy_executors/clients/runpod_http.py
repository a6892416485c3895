"""HTTP as RunPod speaks it: its words in errors, bodies that were measured, failed handshakes."""

from __future__ import annotations

import ssl
from typing import ClassVar

import requests
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from comfy_executors.clients.guard import GuardedAdapter, GuardedHTTPSConnection
from comfy_executors.clients.http import Answer, HttpClient, Waiter
from comfy_executors.clients.runpod_answers import said
from comfy_executors.errors import (
    AuthenticationError,
    EndpointNotFoundError,
    ServerError,
    ServerResponseError,
)

_CONNECTIONS = 600  # all calls that the rate limiter lets run at once; urllib3 warns of more


class RunPodHttp(HttpClient):
    """`HttpClient` in RunPod's words."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, headers={"Authorization": f"Bearer {key}"}, connections=_CONNECTIONS)

    def reset(self) -> None:
        super().reset()
        self._adapter = _Adapter(pool_connections=1, pool_maxsize=self._connections, max_retries=0)
        self._session.mount(self.base_url, self._adapter)

    def post(
        self,
        path: str,
        body: bytes,
        waiter: Waiter,
        *,
        sender: Waiter,
        accept: tuple[int, ...] = (),
    ) -> Answer:
        """POST a body of JSON that was measured, once.

        See `call`. Until all of it was sent, `sender` may break it off; then `waiter` alone counts.
        """
        request = requests.Request(
            "POST",
            self.base_url + path,
            data=body,
            headers={"Content-Type": "application/json"},
        )
        answer = self._exchange(request, waiter, sender=sender)
        if answer.status != 200 and answer.status not in accept:
            raise self._refusal(f"POST {path}", answer)
        self._answered = True
        return answer

    def _refusal(self, what: str, answer: Answer) -> ServerError:
        error = super()._refusal(what, answer)
        if isinstance(error, AuthenticationError):
            return AuthenticationError(
                f"{self.base_url} answers {what} with {answer.status}: the key (api_key= or "
                "RUNPOD_API_KEY) is wrong, revoked, or not for this endpoint",
                self.base_url,
                answer.status,
            )
        if answer.status == 404:
            return EndpointNotFoundError(
                f"{self.base_url} answers {what} with 404: is {self.base_url.rpartition('/')[2]} "
                "the id of an endpoint that belongs to this key?",
                self.base_url,
                404,
            )
        if answer.status == 429:
            # It is there, and only busy: worth more than the few attempts for a wrong address.
            self._answered = True
        if 300 <= answer.status < 400:
            return error
        return ServerResponseError(
            f"{self.base_url} answers {what} with {answer.status}: "
            f"{words_of(self.without_keys(answer))}",
            self.base_url,
            answer.status,
            transient=error.transient,
            retry_after=error.retry_after,
        )


class _Connection(GuardedHTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            # Otherwise a handshake that was cut off looks like a request that was.
            raise NewConnectionError(self, f"the TLS handshake failed: {error}") from error


class _Pool(HTTPSConnectionPool):
    ConnectionCls = _Connection


class _Adapter(GuardedAdapter):
    pools: ClassVar[dict[str, type[HTTPConnectionPool]]] = {
        **GuardedAdapter.pools,
        "https": _Pool,
    }


def words_of(answer: Answer) -> str:
    """Return what the service says, or what kind of thing it sent."""
    try:
        words = said(answer.json())
    except ValueError:
        words = answer.content[:2000].decode("utf-8", "replace")
    text = " ".join((words or "").split())
    if text[:500].lower().startswith(("<html", "<!doctype")):
        return "an HTML page, not an answer of RunPod's API"
    return text[:500] or "an empty body"
