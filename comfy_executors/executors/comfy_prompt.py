"""One prompt on a ComfyUI server: post it, follow it, fetch what it makes.

It is followed by the events of its websocket. Whenever these cannot be had (no connection, a lost
one, one that has brought nothing yet, silence for too long) the server's queue is asked, and then
its history: in this order, since a prompt that ends moves from the one to the other in one step.
"""

from __future__ import annotations

import logging
import time
import traceback
import uuid

from comfy_executors.clients.comfyui import (
    ComfyUIClient,
    HistoryEntry,
    QueuedPrompt,
    execution_error,
    interruption,
)
from comfy_executors.clients.comfyui_events import EventStream
from comfy_executors.clients.comfyui_frames import ConnectionLost, Event, ImageEvent, PromptEvent
from comfy_executors.clients.comfyui_reports import node_ids, node_output, step_of
from comfy_executors.clients.http import DeadlineWaiter
from comfy_executors.errors import (
    ComfyExecutorsError,
    PromptLostError,
    ServerError,
    ServerUnreachableError,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)
from comfy_executors.executors.comfy_outputs import OutputCollector
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import Batch, BatchResult, Job, ProgressEvent
from comfy_executors.workflows import Graph, class_type, node_title, output_nodes

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 20.0  # of a prompt whose websocket is up, until it is looked up all the same
_FIRST_POLL, _LONGEST_POLL = 0.25, 2.0  # seconds between look-ups without a websocket
_FRESH_POLL = 1.0  # seconds until the first look-up with one that has brought nothing yet
_LOST_AFTER = 1.0  # seconds between the two look-ups that make a prompt a lost one
_LATE_HISTORY = 15.0  # seconds that the history may lag behind the events
_CANCEL_SECONDS, _CANCEL_ATTEMPTS = 10.0, 3  # a server that is gone has nothing to cancel
_STEPS = {"execution_start", "execution_cached", "progress"}
_ENDINGS = {"execution_success", "execution_error", "execution_interrupted"}


class ComfyPrompt:
    """One prompt, from posting it to its result.

    Args:
        client: The server's routes.
        events: The server's websocket.
        control: The job's deadline, cancel signal, mailbox and progress.
        job: What the batches of the run share.
        batch: The batch.
        graph: Its graph.
    """

    def __init__(
        self,
        client: ComfyUIClient,
        events: EventStream,
        control: JobControl,
        job: Job,
        batch: Batch,
        graph: Graph,
    ) -> None:
        self._client = client
        self._events = events
        self._control = control
        self._job = job
        self._batch = batch
        self._graph = graph
        self._server = client.http.base_url
        # Images of such nodes come over the websocket and nowhere else.
        self._websocket_nodes = frozenset(
            node for node in graph if "websocket" in (class_type(graph, node) or "").lower()
        )
        self._id = str(uuid.uuid4())
        self._client_id = ""
        self._maybe_posted = False
        self._answered = False
        self._begun = False
        self._ended = False
        self._missed_events = False
        self._made = OutputCollector(client, control, job, batch, graph)

    def run(self) -> BatchResult:
        """Post the prompt, wait for its end and return what it made.

        Whatever stops us on the way, a prompt that may still be on the server is cancelled there.
        """
        self._client_id = self._client.http.retry(self._connect, self._control)
        try:
            self._post()
            self._follow()
            return self._result()
        except BaseException as error:
            try:
                if isinstance(error, (WorkflowCancelledError, WorkflowTimeoutError)):
                    self._control.give_up(error)
                self._made.discard()
            finally:  # whatever a callback raises
                self._cancel()
            _let_go(error)
            raise
        finally:
            self._control.prompt_id = None
            self._events.unsubscribe(self._id)

    def _connect(self) -> str:
        attempt = self._events.connect()
        self._control.wait_for(attempt)
        client_id = attempt.result()
        if client_id is None and self._websocket_nodes:
            raise ServerUnreachableError(
                f"no websocket to {self._server}, and images of node {min(self._websocket_nodes)} "
                "come only over that",
                server=self._server,
                transient=True,
                maybe_received=False,
            )
        # Without a client id, outputs of cached nodes are missing from the history.
        return client_id or uuid.uuid4().hex

    # Posting.

    def _post(self) -> None:
        self._subscribe()
        queued = self._client.http.retry(self._post_once, self._control)
        if queued.prompt_id != self._id:
            self._events.unsubscribe(self._id)
            self._id = queued.prompt_id
            self._subscribe()
        if queued.rejection is not None and not self._job.allow_partial:
            raise queued.rejection
        self._control.progress(ProgressEvent("queued", self._batch.index))

    def _subscribe(self) -> None:
        self._control.prompt_id = self._id
        self._events.subscribe(self._id, self._client_id, self._hear, self._websocket_nodes)

    def _post_once(self) -> QueuedPrompt:
        # The server runs a prompt id that is posted twice two times: look before posting again.
        if self._maybe_posted:
            found = self._find_posted()
            if found is not None:
                return QueuedPrompt(found)
        before, self._maybe_posted = self._maybe_posted, True
        try:
            queued = self._client.post_prompt(
                self._graph, self._id, self._client_id, self._control, self._job.extra_data
            )
            self._answered = True
            return queued
        except WorkflowRejectedError:
            self._maybe_posted = before
            raise
        except ServerError as error:
            self._maybe_posted = before or error.maybe_received
            raise

    def _find_posted(self) -> str | None:
        """Look twice for a prompt whose post had no answer; servers may still be busy with it."""
        for attempt in range(2):
            if attempt:
                self._control.sleep(_LOST_AFTER)
            queue = self._client.queue(self._control)
            if self._id in queue.running or self._id in queue.pending:
                return self._id
            if self._id in queue.marks:
                return queue.marks[self._id]
            if self._client.history(self._id, self._graph, self._control) is not None:
                return self._id
            marked = self._client.find_marked(self._id, self._control)
            if marked is not None:
                return marked
        return None

    def _cancel(self) -> None:
        if self._ended or not self._maybe_posted:
            return
        # A waiter of its own: the job's has passed its deadline or was cancelled.
        waiter = DeadlineWaiter(_CANCEL_SECONDS)
        try:
            for look in range(1 if self._answered else 2):
                if look:
                    # The server may have been about to queue a post that was broken off.
                    waiter.sleep(_LOST_AFTER)
                self._client.http.retry(
                    lambda: self._take_off(waiter), waiter, attempts=_CANCEL_ATTEMPTS
                )
        except (ServerError, WaitTimeoutError) as error:
            logger.warning("prompt %s on %s may run on: %s", self._id, self._server, error)

    def _take_off(self, waiter: DeadlineWaiter) -> None:
        # When the whole run stops, what waits goes first: interrupting what runs would start it.
        run = {mate.prompt_id for mate in self._control.mates() if mate.prompt_id is not None}
        if len(run) > 1:
            self._client.delete(run, waiter)
        self._client.cancel(self._id, waiter)

    # Following.

    def _hear(self, event: Event) -> None:
        """Take an event from the reader's thread."""
        if isinstance(event, PromptEvent) and event.type in _ENDINGS and self._concerns(event):
            # At once, and not after the downloads that lie before it in the mailbox: the server
            # is free for the next prompt.
            self._control.end()
        # Waking a thread for each step would cost more than all else that is done here.
        self._control.post(event, wake=not _is_step(event))

    def _concerns(self, event: Event) -> bool:
        # The mailbox is the job's: it can hold mail to the prompt before.
        if isinstance(event, ConnectionLost):
            return event.client_id == self._client_id
        return event.prompt_id == self._id

    def _follow(self) -> None:
        poll = _FRESH_POLL if self._events.is_promising(self._client_id) else _FIRST_POLL
        while not self._ended:
            relied = self._events.is_live(self._client_id)
            event = self._control.receive(SILENCE_SECONDS if relied else poll)
            if event is not None:
                if self._concerns(event):
                    self._take(event)
            elif relied or not self._events.is_live(self._client_id):
                self._look_up(relied)
                poll = min(_LONGEST_POLL, 1.6 * poll)

    def _look_up(self, relied: bool | None = None) -> None:
        """Ask the queue, then the history; twice nothing means that the server lost the prompt.

        Args:
            relied: Whether the websocket is relied on, if it is asked because there was no word.
        """
        for attempt in range(2):
            if attempt:
                self._control.sleep(_LOST_AFTER)
            queue = self._client.queue(self._control)
            if self._id in queue.running:
                self._begin()
                return
            if self._id in queue.pending:
                return
            entry = self._client.history(self._id, self._graph, self._control)
            if entry is not None:
                try:
                    self._settle(entry)
                finally:
                    if relied is not None:
                        self._note_missed(relied)
                return
        self._ended = True  # there is nothing to cancel
        raise self._lost(
            f"{self._server} has prompt {self._id} neither in its queue nor in its history: it "
            "was restarted, or somebody cleared its queue"
        )

    def _note_missed(self, relied: bool) -> None:
        """Note that the prompt ended without a word: a connection that is open is deaf."""
        self._missed_events = True
        if relied or not self._events.is_live(self._client_id):
            self._events.drop(self._client_id)

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionLost):
            self._missed_events = True
            self._look_up()
        elif isinstance(event, ImageEvent):
            self._made.add_websocket_image(event)
        else:
            self._take_message(event)

    def _take_message(self, event: PromptEvent) -> None:
        data = event.data
        if event.type == "execution_start":
            self._begin()
        elif event.type == "execution_cached":
            self._made.cached.update(node_ids(data.get("nodes")))
        elif event.type == "executing" and data.get("node") is None:
            # Servers of 2023 and 2024 have no other ending; newer ones send it after theirs.
            self._look_up()
        elif event.type in ("executing", "progress"):
            self._report_node(event)
        elif event.type == "executed":
            self._made.fetch_node(self._id, str(data.get("node")), node_output(data.get("output")))
        elif event.type in _ENDINGS:
            self._end(event)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._control.begin(self._batch)

    def _report_node(self, event: PromptEvent) -> None:
        node = str(event.data.get("node"))
        title = node_title(self._graph, node) or class_type(self._graph, node)
        if event.type == "executing":
            self._control.progress(ProgressEvent("node", self._batch.index, node, title))
            return
        step = step_of(event.data)
        if step is not None:
            self._control.progress(ProgressEvent("step", self._batch.index, node, title, *step))

    # Ending.

    def _end(self, event: PromptEvent) -> None:
        self._ended = True
        if event.type == "execution_error":
            raise execution_error(event.data, self._graph, self._server)
        if event.type == "execution_interrupted":
            raise interruption(event.data, self._server)
        if self._missed_events:
            self._settle(self._late_history())
            return
        # Old servers do not report the outputs of cached nodes; they are in the history. A node
        # that reports nothing may also just be one that makes nothing.
        if set(output_nodes(self._graph)) - self._made.reported - self._websocket_nodes:
            entry = self._client.history(self._id, self._graph, self._control)
            if entry is not None:
                self._settle(entry)

    def _late_history(self) -> HistoryEntry:
        """Read the history of a prompt that has ended; the entry can come after the events."""
        pause, until = 0.05, time.monotonic() + _LATE_HISTORY
        while True:
            entry = self._client.history(self._id, self._graph, self._control)
            if entry is not None:
                return entry
            if time.monotonic() >= until:
                raise self._lost(f"prompt {self._id} ended, and the history has no word of it")
            self._control.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)

    def _settle(self, entry: HistoryEntry) -> None:
        self._ended = True
        self._control.end()
        if entry.error is not None:
            raise entry.error
        self._made.cached |= entry.cached
        for node, output in entry.outputs.items():
            self._made.fetch_node(self._id, node, output)

    def _result(self) -> BatchResult:
        if self._websocket_nodes and self._missed_events:
            raise self._lost(
                f"images of node {min(self._websocket_nodes)} come only over the websocket, and "
                "that was lost"
            )
        made = self._made
        if not made.images and not made.outputs:
            if made.previews:
                raise WorkflowError(
                    f"prompt {self._id} made only previews: pass include_previews=True, or save "
                    "with a SaveImage node",
                    prompt_id=self._id,
                    server=self._server,
                )
            logger.warning("prompt %s on %s made nothing", self._id, self._server)
        elif 0 < len(made.images) < self._batch.size:
            logger.warning(
                "prompt %s on %s made %d of %d images",
                self._id,
                self._server,
                len(made.images),
                self._batch.size,
            )
        return BatchResult(
            index=self._batch.index,
            images=made.images,
            outputs=made.outputs,
            seed=self._batch.seed,
            prompt_id=self._id,
            server=self._server,
        )

    def _lost(self, message: str) -> PromptLostError:
        return PromptLostError(message, prompt_id=self._id, server=self._server)


def _let_go(error: BaseException) -> None:
    """Clear the frames of an error of ours, which is kept, of the images they had in hand."""
    cause: BaseException | None = error if isinstance(error, ComfyExecutorsError) else None
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _is_step(event: Event) -> bool:
    """Tell whether an event only says how far a prompt has come."""
    if not isinstance(event, PromptEvent):
        return False
    has_node = event.type == "executing" and event.data.get("node") is not None
    return has_node or event.type in _STEPS
