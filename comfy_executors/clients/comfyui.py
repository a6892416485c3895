"""The routes of a ComfyUI server, typed, with its refusals turned into our errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from comfy_executors.clients.comfyui_reports import (
    mapping,
    messages_of,
    node_ids,
    node_outputs,
    text_of,
)
from comfy_executors.clients.http import Answer, HttpClient, Waiter
from comfy_executors.errors import (
    NodeExecutionError,
    NodeProblem,
    ServerResponseError,
    WorkflowError,
    WorkflowInterruptedError,
    WorkflowRejectedError,
)
from comfy_executors.images import kind_of
from comfy_executors.node_info import choices, nearest_names, shown, what_there_is
from comfy_executors.workflows import Graph, class_type, node_title

DEFAULT_PORT = 8188
# Our own mark on a prompt: servers before 0.3.x answer a post with an id of their own, and after a
# lost answer this is the only way to find the prompt again.
MARK = "comfy_executors_id"


class QueuedPrompt(NamedTuple):
    """The answer to a posted prompt.

    Args:
        prompt_id: Its id, which old servers choose themselves.
        rejection: What the server left out of it, for a graph with several outputs.
    """

    prompt_id: str
    rejection: WorkflowRejectedError | None = None


class Queue(NamedTuple):
    """Who waits and who runs, as prompt ids; `marks` maps our marks to ids."""

    running: frozenset[str]
    pending: frozenset[str]
    marks: Mapping[str, str]


class HistoryEntry(NamedTuple):
    """A finished prompt.

    Args:
        outputs: `{node id: {key: [file or text …]}}`.
        cached: The nodes that were answered from the cache.
        error: Why it failed, or None.
    """

    outputs: Mapping[str, Mapping[str, list[Any]]]
    cached: frozenset[str]
    error: WorkflowError | None


class ComfyUIClient:
    """Calls to one ComfyUI server, each once but for the GETs; see `HttpClient`."""

    def __init__(self, http: HttpClient) -> None:
        self.http = http

    def check(self, waiter: Waiter) -> int:
        """Ask whether a ComfyUI server answers, and return how many prompts it has.

        Raises:
            ServerError: Nobody answers, or somebody else does.
        """
        answer = self.http.get("/prompt", waiter)
        body = self._json(answer, "/prompt")
        with self._expecting(answer, "/prompt"):
            return int(body["exec_info"]["queue_remaining"])

    def post_prompt(
        self,
        graph: Graph,
        prompt_id: str,
        client_id: str,
        waiter: Waiter,
        extra_data: Mapping[str, str] | None = None,
    ) -> QueuedPrompt:
        """Post a prompt, once: a second post of the same id would run twice.

        Args:
            graph: The graph.
            prompt_id: Its id, a canonical UUID.
            client_id: The websocket that its events go to. Without one, outputs of cached nodes
                are missing from the history.
            waiter: The deadline.
            extra_data: What nodes are handed beside it, such as a key for API nodes.

        Raises:
            WorkflowRejectedError: The server refuses all of it.
            ServerError: There is no such answer.
        """
        body = {
            "prompt": graph,
            "prompt_id": prompt_id,
            "client_id": client_id,
            "extra_data": {**(extra_data or {}), MARK: prompt_id},
        }
        try:
            answer = self.http.call("POST", "/prompt", waiter, accept=(400,), json=body)
        except ServerResponseError as error:
            if error.status == 500:
                error.transient = False  # ComfyUI stumbled over the graph, and would again
            raise
        parsed = self._json(answer, "/prompt")
        with self._expecting(answer, "/prompt"):
            if answer.status == 400:
                raise rejection(parsed, graph, self.http.base_url)
            partly = parsed.get("node_errors")
            return QueuedPrompt(
                str(parsed["prompt_id"]),
                rejection(parsed, graph, self.http.base_url) if partly else None,
            )

    def queue(self, waiter: Waiter) -> Queue:
        """Return who runs and who waits."""
        answer = self.http.get("/queue", waiter)
        body = self._json(answer, "/queue")
        with self._expecting(answer, "/queue"):
            running, pending = body["queue_running"], body["queue_pending"]
            return Queue(
                frozenset(str(item[1]) for item in running),
                frozenset(str(item[1]) for item in pending),
                {mark: str(item[1]) for item in (*running, *pending) if (mark := _mark(item))},
            )

    def history(self, prompt_id: str, graph: Graph, waiter: Waiter) -> HistoryEntry | None:
        """Return a finished prompt, or None while the server has no entry of it."""
        path = f"/history/{quote(prompt_id, safe='')}"
        answer = self.http.get(path, waiter)
        body = self._json(answer, path)
        with self._expecting(answer, path):
            entry = body.get(prompt_id)
            if entry is None:
                return None
            # Null in entries of old servers; then the outputs are all there is.
            status = mapping(entry.get("status"))
            messages = messages_of(status.get("messages"))
            error = _ending(messages, graph, self.http.base_url)
            if error is None and status.get("status_str") == "error":
                error = WorkflowError(
                    f"prompt {prompt_id} failed, and the server does not say why",
                    prompt_id=prompt_id,
                    server=self.http.base_url,
                )
            return HistoryEntry(
                outputs=node_outputs(entry.get("outputs")),
                cached=node_ids(mapping(messages.get("execution_cached")).get("nodes")),
                error=error,
            )

    def find_marked(self, mark: str, waiter: Waiter) -> str | None:
        """Return the id of the finished prompt that bears a mark of ours; looks at the newest."""
        answer = self.http.get("/history", waiter, params={"max_items": "64"})
        body = self._json(answer, "/history")
        with self._expecting(answer, "/history"):
            found = (key for key, entry in body.items() if _mark(entry.get("prompt")) == mark)
            return next(found, None)

    def delete(self, prompt_ids: Iterable[str], waiter: Waiter) -> None:
        """Take prompts out of the queue; one that runs, or is unknown, stays as it is.

        Also those whose post had no answer yet, and to which an old server gave an id of its own.
        """
        marks = self.queue(waiter).marks
        known = sorted({marks.get(prompt_id, prompt_id) for prompt_id in prompt_ids})
        self.http.call("POST", "/queue", waiter, json={"delete": known})

    def cancel(self, prompt_id: str, waiter: Waiter) -> None:
        """Take a prompt out of the queue, or interrupt it; never another one.

        Servers from 0.26 or so do it in one step. For older ones the queue is looked at before
        the interrupt, because before 0.3.60 or so that stopped whatever ran.
        """
        path = f"/api/jobs/{quote(prompt_id, safe='')}/cancel"
        answer = self.http.call("POST", path, waiter, accept=(404, 405), json={})
        if answer.status == 200:
            return
        self.delete([prompt_id], waiter)
        # A prompt whose post had no answer may have an id that we do not know.
        queue = self.queue(waiter)
        prompt_id = queue.marks.get(prompt_id, prompt_id)
        if prompt_id in queue.running:
            self.http.call("POST", "/interrupt", waiter, json={"prompt_id": prompt_id})

    def view(self, name: str, subfolder: str, type: str, waiter: Waiter) -> bytes | None:
        """Return the bytes of a file, or None when the server does not have it.

        An HTML page, or an image without a byte, as proxies answer with status 200 while a server
        is away, is not the file: it is fetched again.

        Raises:
            ServerError: It cannot be had.
        """
        params = {"filename": name, "subfolder": subfolder, "type": type}

        def call() -> bytes | None:
            answer = self.http.call("GET", "/view", waiter, accept=(404,), params=params)
            if answer.status == 404:
                return None
            self._refuse_page(name, answer)
            return answer.content

        return self.http.retry(call, waiter)

    def _refuse_page(self, name: str, answer: Answer) -> None:
        is_page = answer.headers.get("content-type", "").lower().startswith("text/html")
        may_be_empty = kind_of(name) in ("text", "file")
        if name.lower().endswith(".html") or (not is_page and (answer.content or may_be_empty)):
            return
        what = "an HTML page" if answer.content else "an empty body"
        raise ServerResponseError(
            f"{self.http.base_url} answers /view of {name} with {what} instead of the file: a "
            "proxy or login page in front of it, or a file that is empty there",
            self.http.base_url,
            answer.status,
            transient=True,
        )

    def has_input(self, name: str, subfolder: str, size: int, waiter: Waiter) -> bool:
        """Tell whether the server's input folder has a file of this name and size.

        Our names follow from the content, so that it is the same file.
        """
        params = {"filename": name, "subfolder": subfolder, "type": "input"}

        def call() -> Answer:
            # Whatever it says but 200, uploading is right.
            refusals = (400, 403, 404, 405, 501)
            return self.http.call("HEAD", "/view", waiter, accept=refusals, params=params)

        answer = self.http.retry(call, waiter)
        return answer.status == 200 and answer.headers.get("content-length") == str(size)

    def upload(self, data: bytes, name: str, subfolder: str, waiter: Waiter) -> None:
        """Put a file into the server's input folder, over one of the same name.

        Our names follow from the content, so that repeating it changes nothing.

        Raises:
            ServerResponseError: The server refuses it: too large, or a bad name.
        """
        form = {"subfolder": subfolder, "type": "input", "overwrite": "true"}

        def call() -> Answer:
            files = {"image": (name, data)}
            return self.http.call(
                "POST", "/upload/image", waiter, accept=(400, 413), data=form, files=files
            )

        answer = self.http.retry(call, waiter)
        if answer.status != 200:
            reason = f"{len(data)} bytes are too many" if answer.status == 413 else "a bad name"
            raise ServerResponseError(
                f"{self.http.base_url} refuses the input image {name}: {reason}",
                self.http.base_url,
                answer.status,
            )

    def object_info(self, waiter: Waiter) -> dict[str, Any]:
        """Return the description of all node classes."""
        info: dict[str, Any] = self._json(self.http.get("/object_info", waiter), "/object_info")
        return info

    def _json(self, answer: Answer, path: str) -> Any:
        try:
            return answer.json()
        except (ValueError, RecursionError):  # the latter for brackets nested a thousand deep
            text = self.http.without_keys(answer).content[:200].decode("utf-8", "replace")
            what = "an HTML page" if "<" in text else repr(" ".join(text.split())[:80])
            raise self._not_comfyui(path, what) from None

    @contextlib.contextmanager
    def _expecting(self, answer: Answer, path: str) -> Iterator[None]:
        """Turn what goes wrong with JSON of another shape into our error."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            text = self.http.without_keys(answer).content[:200].decode("utf-8", "replace")
            raise self._not_comfyui(path, text) from None

    def _not_comfyui(self, path: str, what: str) -> ServerResponseError:
        return ServerResponseError(
            f"{self.http.base_url} answers {path} with {what}: no ComfyUI server, or a proxy or "
            "login page in front of it; check the address and its path",
            self.http.base_url,
        )


def _mark(queued: Any) -> str | None:
    """Return our mark on a prompt as the queue and the history list it, if there is one."""
    extra = queued[3] if isinstance(queued, list) and len(queued) > 3 else None
    mark = extra.get(MARK) if isinstance(extra, dict) else None
    return mark if isinstance(mark, str) else None


def rejection(body: Mapping[str, Any], graph: Graph, server: str | None) -> WorkflowRejectedError:
    """Make one error of a 400's body, or of the `node_errors` of a 200."""
    error = body.get("error") or {}
    if isinstance(error, str):
        error = {"message": error}
    problems = [
        _problem(str(node_id), node, item, graph)
        for node_id, node in (body.get("node_errors") or {}).items()
        for item in node.get("errors", ())
    ]
    kind, extra = str(error.get("type", "")), error.get("extra_info") or {}
    if not problems and kind in ("missing_node_type", "invalid_prompt"):
        # Servers before 0.33 name the node in the text only: "Node ID '#1'".
        named = re.search(r"'#(.*)'", str(error.get("details", "")))
        node_id = str(extra.get("node_id") or (named.group(1) if named else ""))
        if class_type(graph, node_id):
            problems = [_missing_class(node_id, graph, kind)]
    details = error.get("details") or ""
    message = str(error.get("message", ""))
    if details and details != message:
        message += f" ({details})"
    return WorkflowRejectedError(
        problems, message, kind=kind, prompt_id=body.get("prompt_id"), server=server
    )


def _missing_class(node_id: str, graph: Graph, kind: str) -> NodeProblem:
    name = class_type(graph, node_id)
    reason = f"the server has no node class {name}; is its custom node package installed there?"
    return NodeProblem(node_id, name, node_title(graph, node_id), None, name, kind, reason)


def _problem(
    node_id: str, node: Mapping[str, Any], item: Mapping[str, Any], graph: Graph
) -> NodeProblem:
    extra = item.get("extra_info") or {}
    kind = str(item.get("type", ""))
    details = str(item.get("details") or "")
    value = extra.get("received_value")
    reason = str(item.get("message") or kind)
    nearest: tuple[str, ...] = ()
    if kind == "value_not_in_list":
        reason, nearest = _not_in_list(value, extra)
    elif kind == "required_input_missing":
        reason = "is required and missing"
    elif kind == "exception_during_validation" and extra.get("exception_type") == "KeyError":
        reason = f"it links to node {details}, which is not in the graph"
    else:
        # The details begin with the input's name, which stands before the reason already.
        name = re.escape(str(extra.get("input_name")))
        details = re.sub(f"^{name}($|, | - )", "", details)
        reason += f": {details}" if details else ""
    return NodeProblem(
        node_id=node_id,
        class_type=node.get("class_type") or class_type(graph, node_id),
        title=node_title(graph, node_id),
        input_name=extra.get("input_name"),
        value=value,
        kind=kind,
        reason=reason,
        nearest=nearest,
    )


def _not_in_list(value: Any, extra: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Word the commonest mistake; the server's own details list every file that there is."""
    options = choices(extra.get("input_config"))
    if options is None:
        return f"{shown(value)} is not in the list", ()
    nearest = nearest_names(str(value), options)
    return f"{shown(value)} is not on the server{what_there_is(options, nearest)}", nearest


def execution_error(data: Mapping[str, Any], graph: Graph, server: str) -> NodeExecutionError:
    """Make our error of the data of an `execution_error` message."""
    node_id = str(data.get("node_id", ""))
    return NodeExecutionError(
        node_id=node_id,
        class_type=text_of(data.get("node_type")) or class_type(graph, node_id),
        title=node_title(graph, node_id),
        exception_type=text_of(data.get("exception_type")) or "Exception",
        exception_message=text_of(data.get("exception_message")).strip(),
        traceback=text_of(data.get("traceback")),
        prompt_id=data.get("prompt_id"),
        server=server,
    )


def interruption(data: Mapping[str, Any], server: str) -> WorkflowInterruptedError:
    """Make our error of the data of an `execution_interrupted` message."""
    return WorkflowInterruptedError(
        f"somebody interrupted prompt {data.get('prompt_id')} on {server}",
        prompt_id=data.get("prompt_id"),
        server=server,
    )


def _ending(messages: Mapping[str, Any], graph: Graph, server: str) -> WorkflowError | None:
    # `status_str` says "error" for interrupted prompts, too: only the messages tell.
    if "execution_interrupted" in messages:
        return interruption(messages["execution_interrupted"], server)
    if "execution_error" in messages:
        return execution_error(messages["execution_error"], graph, server)
    return None
