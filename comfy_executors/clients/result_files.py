"""Outputs that a worker put into a bucket, fetched by their presigned URLs.

Such a URL is as good as a key: only its host is ever shown. No key of ours is sent along.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import requests

from comfy_executors.clients.http import HttpClient, Waiter
from comfy_executors.errors import ServerResponseError, ServerUnreachableError


def fetch_result(url: str, waiter: Waiter, *, size: int | None = None) -> bytes:
    """Return what stands at a presigned URL, repeated while the store is overloaded.

    Args:
        url: The URL.
        waiter: The deadline.
        size: How many bytes there should be, if that is known.

    Raises:
        ServerError: It is no URL, nobody answers, or the store does not have the file (any more).
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise ServerResponseError(
            "the worker names a path of its own instead of a URL: it has BUCKET_ENDPOINT_URL and "
            "not the keys of the bucket"
        )
    client = _StoreClient(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        content = client.fetch(path, waiter)
    finally:
        client.close()
    if size is not None and len(content) != size:
        raise ServerResponseError(f"{client.base_url} sent {len(content)} of {size} bytes")
    return content


class _StoreClient(HttpClient):
    """`HttpClient` that does not show what stands behind the host."""

    def fetch(self, path: str, waiter: Waiter) -> bytes:
        def once() -> bytes:
            answer = self._exchange(requests.Request("GET", self.base_url + path), waiter)
            # Also if it is a refusal: an overloaded store is worth more than a wrong address.
            self._answered = True
            if answer.status != 200:
                error = self._refusal("GET", answer)
                hint = "" if error.transient else ": the URL expired, or the file is gone"
                raise ServerResponseError(
                    f"{self.base_url} answers {answer.status} instead of an output{hint}",
                    self.base_url,
                    answer.status,
                    transient=error.transient,
                    retry_after=error.retry_after,
                ) from None
            return answer.content

        try:
            return self.retry(once, waiter)
        except ServerUnreachableError as error:
            # Without its cause, whose words can hold the whole address.
            raise ServerUnreachableError(
                f"{self.base_url}, where the worker put an output, cannot be reached",
                server=error.server,
            ) from None
