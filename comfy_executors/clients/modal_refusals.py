"""What the answers of an app on Modal mean that are none to the call: the edge's and the app's.

Modal's edge answers in plain text that begins with `modal-http:`, the app in JSON; the same status
means different things from one and the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from comfy_executors.clients.http import Answer, retry_after
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    EndpointNotFoundError,
    JobLostError,
    ServerError,
    ServerResponseError,
)
from comfy_executors.wire import decode_error

_EDGE = "modal-http:"
_MAX_WORDS = 500
# What a proxy, the edge or an overloaded app answers for a while.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_AGAIN_SECONDS = 1.0  # such an answer comes at once, and what it tells of takes its time
_ACCOUNT_TOKENS = ("ak-", "as-")

_NO_TOKEN = "the app wants a proxy token: pass key= and secret=, or set MODAL_KEY and MODAL_SECRET"  # noqa: S105
_WRONG_TOKEN = (
    "the proxy token is wrong, was deleted, or is not for this environment; it is a pair wk-… and "  # noqa: S105
    "ws-…, not the account's token ak-… and as-…"
)


class MissingInputsError(ServerResponseError):
    """Raised when a job names input images that the app does not have (any more)."""

    digests: tuple[str, ...] = ()


def refuse_account_token(key: str, secret: str) -> None:
    """Raise ValueError for a token that can deploy and delete apps, before it goes anywhere."""
    if key.startswith(_ACCOUNT_TOKENS) or secret.startswith(_ACCOUNT_TOKENS):
        raise ValueError(
            "that is the account's token (ak-…, as-…), which a client must not have: make a proxy "
            "token (wk-…, ws-…) in Modal's settings"
        )


def refusal_of(
    what: str, answer: Answer, server: str, token: Collection[str]
) -> ComfyExecutorsError:
    """Make the error for an answer.

    Args:
        what: The call, such as `POST /v1/jobs`.
        answer: The answer.
        server: The address of the app, without keys.
        token: The proxy token that was sent, if any; it is shown nowhere.
    """
    for part in token:
        answer = answer._replace(content=answer.content.replace(part.encode(), b"..."))
    text = " ".join(answer.content[: 4 * _MAX_WORDS].decode("utf-8", "replace").split())
    if text.startswith(_EDGE):
        return _from_edge(what, answer, text[len(_EDGE) :].strip(), server)
    error = _error_object(answer)
    if error is not None:
        return _from_app(what, answer, error, server)
    if answer.status in (401, 403):
        # Of the app itself, or of something in front of it.
        words = _WRONG_TOKEN if token else _NO_TOKEN
        return AuthenticationError(
            f"{server} answers {what} with {answer.status}: {words}",
            server,
            answer.status,
            maybe_received=False,
        )
    if answer.status == 404:
        return _not_found(what, server, "nothing of ours is at this address", transient=False)
    if text[:500].lower().startswith(("<html", "<!doctype")):
        text = "an HTML page, not an answer of the app"
    return _answered(what, answer, text[:_MAX_WORDS] or "an empty body", server)


def _from_edge(what: str, answer: Answer, words: str, server: str) -> ServerError:
    status, text = answer.status, words.lower()
    if status in (401, 403):
        why = _NO_TOKEN if "missing credentials" in text else _WRONG_TOKEN
        return AuthenticationError(
            f"{server} answers {what} with {status}: {why}", server, status, maybe_received=False
        )
    if "is stopped" in text:
        return _not_found(what, server, "the app is stopped: deploy it again", transient=False)
    if "is disabled" in text:
        reason = "the workspace is disabled; look at its billing on modal.com"
        return _not_found(what, server, reason, transient=False)
    if "invalid function call" in text:
        # Also for a moment while a container is started anew.
        reason = "no app is deployed at this address"
        return _not_found(what, server, reason, transient=True)
    if "spend limit" in text:
        return ServerResponseError(
            f"{server} answers {what} with {status}: the workspace has reached its spend limit; "
            "raise it on modal.com",
            server,
            status,
            maybe_received=False,
        )
    if "status failure" in text:  # an exception in the app, or while it started
        return ServerResponseError(
            f"{server} answers {what} with {status}: the app failed, look at its logs: "
            f"{words[:_MAX_WORDS]}",
            server,
            status,
        )
    return _answered(what, answer, words[:_MAX_WORDS], server)


def _answered(what: str, answer: Answer, words: str, server: str) -> ServerResponseError:
    status = answer.status
    transient = status in _TRANSIENT
    return ServerResponseError(
        f"{server} answers {what} with {status}: {words}",
        server,
        status,
        transient=transient,
        # The body of a call did not arrive, or the call was refused.
        maybe_received=status >= 500,
        retry_after=(retry_after(answer) or _AGAIN_SECONDS) if transient else None,
    )


def _not_found(what: str, server: str, reason: str, *, transient: bool) -> EndpointNotFoundError:
    return EndpointNotFoundError(
        f"{server} answers {what} with 404: {reason}; is the address the one that "
        "`modal deploy` told?",
        server,
        404,
        transient=transient,
        maybe_received=False,
        retry_after=_AGAIN_SECONDS if transient else None,
    )


def _error_object(answer: Answer) -> Mapping[str, Any] | None:
    try:
        body = answer.json()
    except ValueError:
        return None
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else None


def _from_app(
    what: str, answer: Answer, error: Mapping[str, Any], server: str
) -> ComfyExecutorsError:
    words = str(error.get("message") or error.get("kind") or "it does not say why")[:_MAX_WORDS]
    if isinstance(error.get("failure"), Mapping):
        failure = decode_error(error["failure"])
        if isinstance(failure, JobLostError) and failure.server is None:
            failure.server = server
        return failure
    if error.get("kind") == "missing_inputs":
        missing = MissingInputsError(f"{server}: {words}", server, answer.status)
        inputs = error.get("inputs")
        missing.digests = tuple(map(str, inputs)) if isinstance(inputs, list) else ()
        return missing
    return _answered(what, answer, words, server)
