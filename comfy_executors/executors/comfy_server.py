"""Running batches on a ComfyUI server. The way of one prompt stands in `comfy_prompt.py`."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from requests.auth import AuthBase

from comfy_executors.checking import check_nodes, is_warning
from comfy_executors.clients.comfyui import DEFAULT_PORT, ComfyUIClient
from comfy_executors.clients.comfyui_events import EventStream
from comfy_executors.clients.http import (
    Auth,
    DeadlineWaiter,
    HttpClient,
    Waiter,
    parse_address,
)
from comfy_executors.errors import (
    OutputMissingError,
    PromptLostError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    WaitTimeoutError,
    WorkflowRejectedError,
)
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.comfy_prompt import ComfyPrompt
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.once import Once
from comfy_executors.executors.side_by_side import AT_ONCE, side_by_side
from comfy_executors.images import InputImageSet
from comfy_executors.runs import Batch, BatchResult, Job
from comfy_executors.workflows import Graph, output_nodes

logger = logging.getLogger(__name__)

_READY_POLL = 0.5
_KNOWN_UPLOADS = 256  # sets of input images; of one that is forgotten the server is asked again

Self = TypeVar("Self", bound="ComfyServerWorkflowExecutor")


class ComfyServerWorkflowExecutor(BaseWorkflowExecutor):
    """Run workflow templates on a ComfyUI server.

    Args:
        address: `host:port`, a bare host (port 8188), or `http(s)://host/prefix`.
        batch_size: How many images one execution of the graph makes, for templates that say
            `batch_size`.
        input_base_dir: What templates see before the folder in `input_images_dir`.
        max_workers: How many prompts are kept queued, the running one included.
        headers: Sent with each HTTP call and with the websocket, to this server only.
        auth: User and password for basic auth, or an `AuthBase` of `requests`.
        verify: Whether TLS certificates are checked, or the path of a CA bundle.
        outage_timeout: Seconds that a server which has answered before may be out of reach (while
            it restarts, say) until the batches that wait for it fail.

    Raises:
        ValueError: The address or a number is none, or `verify` names no file.
        TypeError: `headers` or `auth` is of another kind.
    """

    _greeted: bool
    _object_info: dict[str, Any] | None  # once a graph was refused
    _uploads: Once

    def __init__(
        self,
        address: str = "localhost:8188",
        batch_size: int = 1,
        input_base_dir: str = "input",
        *,
        max_workers: int = 4,
        headers: Mapping[str, str] | None = None,
        auth: Auth | None = None,
        verify: bool | str | os.PathLike[str] = True,
        outage_timeout: float = 60.0,
    ) -> None:
        _check_connection(headers, auth, verify, outage_timeout)
        super().__init__(batch_size, max_workers=max_workers)
        self.input_base_dir = input_base_dir.rstrip("/")
        self.url, user = parse_address(address, DEFAULT_PORT)
        self._http = HttpClient(
            self.url,
            headers=headers,
            auth=auth or user,
            verify=verify if isinstance(verify, bool) else os.fspath(verify),
            outage_timeout=outage_timeout,
            # Twice as many batches as there are places: some download while others execute.
            connections=2 * self.max_workers * AT_ONCE + 1,
        )
        self._client = ComfyUIClient(self._http)
        self._events = EventStream(self._http)
        self._reset_knowledge()

    @classmethod
    def create(cls: type[Self], comfy_host: str, *args: Any, **kwargs: Any) -> Self:
        """Make an executor; the name that comfy-executors 0.1.0 had for it.

        It takes the constructor's arguments, and works in `with` and in `async with`.
        """
        return cls(comfy_host, *args, **kwargs)

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Wait for a server that is still starting.

        Args:
            timeout: Seconds to wait.

        Raises:
            ServerNotReadyError: It did not answer as a ComfyUI server in time; the last error is
                its cause.
            AuthenticationError: It answers 401 or 403.
        """
        waiter = DeadlineWaiter(timeout)
        last: ServerError | None = None
        while True:
            try:
                self._client.check(waiter)
                return
            except WaitTimeoutError as error:
                raise ServerNotReadyError(
                    f"{self.url} was not ready within {timeout:g} s"
                    + (f"; last: {last}" if last else ""),
                    self.url,
                ) from (last or error)
            except ServerError as error:
                # What stands in front of a server that starts answers in its place.
                if not error.transient and not isinstance(error, ServerResponseError):
                    raise
                last = error
            with contextlib.suppress(WaitTimeoutError):  # check() says it better
                waiter.sleep(_READY_POLL)

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        (batch,) = job.batches
        graph = batch.render(batch)
        try:
            yield self._run_batch(batch, graph, job, control)
        except PromptLostError:
            self._uploads.forget()  # a server that started anew may have lost them, too
            raise
        except OutputMissingError as error:
            if not error.cached or error.node_id is None:
                raise
            # The server's cache names files that were deleted since, perhaps all of them.
            logger.warning("batch %d is run again with its cache broken: %s", batch.index, error)
            graph = _break_cache(graph, {error.node_id, *output_nodes(graph)})
            yield self._run_batch(batch, graph, job, control)

    def _run_batch(self, batch: Batch, graph: Graph, job: Job, control: JobControl) -> BatchResult:
        self._greet(control)
        uploaded = self._upload(job.input_images, control)
        prompt = ComfyPrompt(self._client, self._events, control, job, batch, graph)
        try:
            return prompt.run()
        except WorkflowRejectedError as error:
            if uploaded or job.input_images is None:
                raise self._explained(error, graph, control) from error
            # Input images that an earlier run uploaded may be gone with the server's disk.
            self._uploads.forget()
            self._upload(job.input_images, control)
        return ComfyPrompt(self._client, self._events, control, job, batch, graph).run()

    def _explained(
        self, error: WorkflowRejectedError, graph: Graph, control: JobControl
    ) -> WorkflowRejectedError:
        """Word a refusal by the server's own description of its nodes.

        A server stops at the first unknown class, blames a bad link on the wrong node, and does
        not say which names come near.
        """
        try:
            if self._object_info is None:
                self._object_info = self._client.object_info(control)
        except ServerError as unavailable:
            logger.info("%s does not describe its nodes: %s", self.url, unavailable)
            return error
        checked = check_nodes(graph, self._object_info)
        problems = [problem for problem in checked if not is_warning(problem)]
        if not problems:
            return error
        return WorkflowRejectedError(
            problems,
            error.message,
            kind=error.kind,
            prompt_id=error.prompt_id,
            server=error.server,
        )

    def _greet(self, control: JobControl) -> None:
        """Make sure, once, that a ComfyUI server is there, before anything is sent to it."""
        if not self._greeted:
            self._client.check(control)
            self._greeted = True

    def _upload(self, images: InputImageSet | None, control: JobControl) -> bool:
        """Upload a set of images unless that was done; tell whether it was done just now."""
        if images is None:
            return False
        # By the set's folder, which follows from its content.
        return self._uploads.do(images.folder, control, partial(self._put_all, images, control))

    def _put_all(self, images: InputImageSet, control: JobControl) -> None:
        calls = [partial(self._put, images.folder, *item) for item in images.files.items()]
        with contextlib.closing(side_by_side(calls, control)) as uploads:
            for _ in uploads:
                pass

    def _put(self, folder: str, name: str, data: bytes, waiter: Waiter) -> None:
        if not self._client.has_input(name, folder, len(data), waiter):
            self._client.upload(data, name, folder, waiter)

    def _close_backend(self) -> None:
        self._events.close()
        self._http.close()

    def _reset_backend(self) -> None:
        self._http.reset()
        self._events.reset()
        self._reset_knowledge()

    def _reset_knowledge(self) -> None:
        self._greeted = False
        self._object_info = None
        self._uploads = Once(_KNOWN_UPLOADS)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} {super().__repr__().split(' ', 1)[1]}"


def _check_connection(headers: object, auth: object, verify: object, outage: Any) -> None:
    """Refuse what would fail at the first call only; keys may be among it and are not shown."""
    if headers is not None and not isinstance(headers, Mapping):
        raise TypeError(f"headers must be a mapping, not {type(headers).__name__}")
    is_pair = isinstance(auth, tuple) and len(auth) == 2 and all(isinstance(s, str) for s in auth)
    if auth is not None and not is_pair and not isinstance(auth, AuthBase):
        raise TypeError(
            "auth must be a tuple of two strings, user and password, or a requests AuthBase, not "
            f"this {type(auth).__name__}"
        )
    is_path = isinstance(verify, (str, os.PathLike)) and os.path.exists(verify)
    if not isinstance(verify, bool) and not is_path:
        raise ValueError(f"verify must be True, False or the path of a CA bundle, not {verify!r}")
    is_number = isinstance(outage, (int, float)) and not isinstance(outage, bool)
    if not is_number or not outage > 0:
        raise ValueError(f"outage_timeout must be a number of seconds above 0, not {outage!r}")


def _break_cache(graph: Graph, node_ids: set[str]) -> Graph:
    """Give nodes an input that they do not have: they run again, and nothing else does."""
    again = {"comfy_executors_again": uuid.uuid4().hex}
    return {
        node_id: {**node, "inputs": {**node["inputs"], **again}} if node_id in node_ids else node
        for node_id, node in graph.items()
    }
