"""Running a job document on the ComfyUI of this machine, as a stream of events."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import comfy_executors
from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.http import HttpClient
from comfy_executors.errors import (
    ComfyExecutorsError,
    InputImageError,
    NodeExecutionError,
    OutputFileError,
    PromptLostError,
    ServerNotReadyError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowError,
)
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import WorkflowRun
from comfy_executors.saving import safe_name
from comfy_executors.wire import (
    BatchEnded,
    CompleteBatch,
    End,
    Failed,
    InputFile,
    JobDocument,
    JobGraph,
    OutputPart,
    Progress,
    ProgressStep,
    Started,
    encode_event,
    split,
)
from comfy_executors.workers.comfy_process import ComfyProcess
from comfy_executors.workers.downloads import InputDownloader
from comfy_executors.workers.inbox import Inbox
from comfy_executors.workers.ledger import Ledger, MadeBatch, MadeOutput, fingerprint
from comfy_executors.workers.outputs import JobWaiter, OutgoingBatch, fetch_again
from comfy_executors.workers.prompts import GraphExecutor
from comfy_executors.workers.storage import S3Storage

logger = logging.getLogger(__name__)

WORKER = "comfy-executors"
# One runs and one waits in ComfyUI's queue; twice as many are being fetched or handed out.
_QUEUED = 2
_IN_FLIGHT = 2 * _QUEUED
# Seconds of waiting for ComfyUI between two looks at a cancellation, and at its process.
_READY_SLICE = 1.0
_CANCEL_SECONDS = 20.0


class JobFiles(Protocol):
    """The place of an app for the files of one job."""

    def put_output(self, batch: int, name: str, data: bytes) -> str:
        """Keep an output and return its URL; OutputFileError where it cannot be kept."""

    def read_input(self, sha256: str, name: str) -> bytes:
        """Return an input image by its digest; InputImageError where it is not there."""

    def recall(self, batch: int) -> CompleteBatch | None:
        """Return a batch that an earlier attempt of the job made, if all of it is kept."""


class Engine:
    """Runs jobs on a ComfyUI; several at once share its queue.

    Args:
        address: ComfyUI's address, as `ComfyServerWorkflowExecutor` takes it.
        storage: Where outputs are put instead of into the events, if anywhere.
        ready_timeout: Seconds that a ComfyUI may take to start.
        outage_timeout: Seconds without an answer after which it has died; it is on this machine.
        downloader: What fetches input images that are given as URLs.
        comfy_org_api_key: The key of comfy.org that nodes are handed which call paid services,
            where a job does not bring its own.
        process: ComfyUI's process, where it is ours: one that has ended is not waited for.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8188",
        *,
        storage: S3Storage | None = None,
        ready_timeout: float = 300.0,
        outage_timeout: float = 30.0,
        downloader: InputDownloader | None = None,
        comfy_org_api_key: str | None = None,
        process: ComfyProcess | None = None,
    ) -> None:
        self.executor = GraphExecutor(address, max_workers=_QUEUED, outage_timeout=outage_timeout)
        self.http = HttpClient(self.executor.url, outage_timeout=outage_timeout)
        self.storage = storage
        self._ready_timeout = ready_timeout
        self._outage_timeout = outage_timeout
        self._process = process
        self._answered = 0  # which of its starts has answered
        self.downloader = downloader or InputDownloader()
        self.ledger = Ledger()
        self._comfy_org_api_key = comfy_org_api_key

    def start(
        self,
        document: JobDocument,
        comfy_org_api_key: str | None = None,
        *,
        files: JobFiles | None = None,
    ) -> Execution:
        """Begin a job; iterate over what this returns.

        Args:
            document: The job.
            comfy_org_api_key: Its own key for nodes that call paid services.
            files: Where its outputs go and its input images may lie, if the app has such a place.
        """
        return Execution(self, document, comfy_org_api_key or self._comfy_org_api_key, files)

    def wait_until_ready(self, limit: Callable[[float], float] = float) -> None:
        """Wait until ComfyUI answers: a while where it starts, less where it has answered before.

        Args:
            limit: Shortens a time limit, in seconds, or raises what ends the wait.

        Raises:
            ServerNotReadyError: It did not answer in time, or has ended.
            AuthenticationError: It answers 401 or 403.
        """
        start = 1 if self._process is None else self._process.starts
        timeout = self._ready_timeout
        if start == self._answered:
            timeout = min(timeout, self._outage_timeout)
        deadline = time.monotonic() + timeout
        while True:
            left = limit(deadline - time.monotonic())
            try:
                self.executor.wait_until_ready(max(0.01, min(_READY_SLICE, left)))
            except ServerNotReadyError as error:
                code = None if self._process is None else self._process.exit_code
                if code is None and left > _READY_SLICE:
                    continue
                words = f"was not ready within {timeout:g} s"
                if code is not None:
                    words = f"ended with exit code {code}: look at its log"
                raise ServerNotReadyError(f"ComfyUI {words}", self.executor.url) from error
            self._answered = start
            return

    def close(self) -> None:
        """Cancel what runs and end all threads."""
        self.executor.close(cancel=True)
        self.http.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Running(NamedTuple):
    """A batch that ComfyUI has."""

    item: JobGraph
    run: WorkflowRun
    outgoing: OutgoingBatch


class Execution:
    """A job while it runs: an iterator of its events as JSON, once over.

    Iterating blocks; it raises `WorkflowCancelledError` after `cancel`, and nothing else: what goes
    wrong is an event.

    Attributes:
        sick: Why ComfyUI can no longer be trusted, if it cannot: jobs should go to a fresh worker.
    """

    def __init__(
        self,
        engine: Engine,
        document: JobDocument,
        comfy_org_api_key: str | None = None,
        files: JobFiles | None = None,
    ) -> None:
        self._engine = engine
        self._document = document
        self._comfy_org_api_key = comfy_org_api_key
        self._files = files
        self._client = ComfyUIClient(engine.http)
        self._inbox = Inbox(document.options.progress)
        self._waiter = JobWaiter()
        self._running: dict[int, _Running] = {}
        self._submitting = threading.Lock()
        self._is_fed = False
        self._claimed = False
        self._events = self._run()
        self._attempt = 0
        self._seq = 0
        self._counts = {"batches": 0, "outputs": 0, "errors": 0}
        self.sick: str | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._events)

    def cancel(self) -> None:
        """Take our prompts out of ComfyUI's queue and interrupt the one that runs.

        Any thread may; when it returns ComfyUI has been told. A job that has ended is left alone.
        """
        self._waiter.cancel()
        self._inbox.cancel()
        self._engine.ledger.wake()
        self._finish()

    def _finish(self) -> None:
        with self._submitting:
            runs = [running.run for running in self._running.values()]
            claimed, self._claimed = self._claimed, False
        for run in runs:
            run.cancel()
        futures = [future for run in runs for future in run.futures]
        if concurrent.futures.wait(futures, _CANCEL_SECONDS).not_done:
            logger.warning("ComfyUI was not told of a cancellation within %g s", _CANCEL_SECONDS)
        if claimed:
            self._engine.ledger.release(self._document.request_id)

    # The events, in order.

    def _run(self) -> Iterator[dict[str, Any]]:
        try:
            self._claim()
            yield self._event(
                Started,
                request_id=self._document.request_id,
                worker=WORKER,
                version=comfy_executors.__version__,
                graphs=len(self._document.graphs),
            )
            try:
                self._engine.wait_until_ready(self._waiter.limit)
                self._upload()
                yield from self._run_batches()
            except WorkflowCancelledError:
                raise
            except ComfyExecutorsError as error:
                yield self._failure(None, error)
            except Exception as error:
                logger.exception("job %s failed in an unforeseen way", self._document.request_id)
                yield self._failure(None, error)
            yield self._event(End, **self._counts)
        finally:
            self._finish()

    def _claim(self) -> None:
        ledger = self._engine.ledger
        self._attempt = ledger.claim(self._document.request_id, lambda: self._inbox.cancelled)
        with self._submitting:
            # A cancellation of just now found nothing to release.
            self._claimed = not self._inbox.cancelled
        if not self._claimed:
            ledger.release(self._document.request_id)
            raise WorkflowCancelledError("the job was cancelled")

    def _event(self, kind: Any, **facts: Any) -> dict[str, Any]:
        event = kind(self._seq, self._attempt, **facts)
        self._seq += 1
        return encode_event(event)

    def _failure(self, batch: int | None, error: BaseException) -> dict[str, Any]:
        self._counts["errors"] += 1
        self.sick = self.sick or _sickness(error)
        if not isinstance(error, ComfyExecutorsError):
            error = WorkflowError(f"the worker failed: {type(error).__name__}: {error}")
        return self._event(Failed, batch=batch, error=error)

    # Before the batches.

    def _upload(self) -> None:
        # In every job: it costs nothing on one machine, and no other file can be in the way.
        for file in self._document.input_images:
            self._client.upload(self._content(file), file.name, "", self._waiter)

    def _content(self, file: InputFile) -> bytes:
        if file.data is not None:
            return file.data
        if file.sha256 is None:
            return self._engine.downloader.fetch(file.url or "", file.name, self._waiter)
        if self._files is None:
            raise InputImageError(
                f"this worker keeps no input images: {file.name} must come with its bytes or a url"
            )
        return self._files.read_input(file.sha256, file.name)

    # The batches.

    def _run_batches(self) -> Iterator[dict[str, Any]]:
        waiting = deque(self._document.graphs)
        while waiting or self._running:
            # The first alone until ComfyUI has it: of two at once, either could be queued first.
            room = _IN_FLIGHT if self._is_fed else 1
            if waiting and len(self._running) < room:
                yield from self._begin(waiting.popleft())
                continue
            batch, news = self._inbox.get()
            self._is_fed = True
            if isinstance(news, ProgressStep):
                yield self._event(Progress, batch=batch, event=news)
                continue
            if isinstance(news, WorkflowOutput):
                made = self._running[batch].outgoing.add(news)
                yield from self._send(batch, made, news.data)
                continue
            yield from self._settle(batch)
            if self.sick and (waiting or self._running):
                # None of these began, or all that they made is gone: they can run elsewhere.
                raise PromptLostError(f"the rest of the job was given up: {self.sick}")

    def _begin(self, item: JobGraph) -> Iterator[dict[str, Any]]:
        again = self._again(item)
        if again is not None:
            yield from again
            return
        try:
            self._submit(item)
        except WorkflowCancelledError:
            raise
        except ComfyExecutorsError as error:
            yield self._failure(item.batch, error)

    def _again(self, item: JobGraph) -> Iterator[dict[str, Any]] | None:
        """Tell again of a batch that an earlier attempt made; None where it is to be run."""
        if self._files is not None:
            kept = self._files.recall(item.batch)
            return None if kept is None else self._tell_kept(kept)
        mark = fingerprint(item, self._document.options)
        made = self._engine.ledger.recall(self._document.request_id, item.batch, mark)
        found = fetch_again(made, self._client, self._waiter) if made else None
        if made is None or found is None:
            return None
        return self._tell_fetched(item.batch, made, found)

    def _tell_kept(self, kept: CompleteBatch) -> Iterator[dict[str, Any]]:
        for output in kept.outputs:
            yield self._event(OutputPart, part=0, parts=1, **vars(output))
        numbers = tuple(output.output for output in kept.outputs)
        yield self._end_of_batch(kept.batch, numbers, kept.prompt_id, kept.seconds)

    def _tell_fetched(
        self, batch: int, made: MadeBatch, found: deque[tuple[MadeOutput, bytes]]
    ) -> Iterator[dict[str, Any]]:
        while found:
            yield from self._send(batch, *found.popleft())
        yield self._end_of_batch(batch, made.numbers, made.prompt_id, made.seconds)

    def _submit(self, item: JobGraph) -> None:
        with self._submitting:
            self._waiter.limit(0)
            run = self._engine.executor.submit_graph(
                item,
                self._document.options,
                on_progress=partial(self._inbox.progress, item.batch),
                on_output=partial(self._inbox.output, item.batch),
                comfy_org_api_key=self._comfy_org_api_key,
            )
            self._running[item.batch] = _Running(item, run, OutgoingBatch(item.graph))
        run.futures[0].add_done_callback(lambda _: self._inbox.settle(item.batch))

    def _settle(self, batch: int) -> Iterator[dict[str, Any]]:
        (future,) = self._running[batch].run.futures
        error = None if future.cancelled() else future.exception()
        if isinstance(error, ServerUnreachableError):
            yield from self._blame(error)
            return
        with self._submitting:
            item, run, outgoing = self._running.pop(batch)
        if error is not None:
            yield self._failure(batch, error)
            return
        result = future.result()
        mark = fingerprint(item, self._document.options)
        made = MadeBatch(mark, outgoing.finish(result), result.prompt_id, result.seconds)
        del run, outgoing, future, result  # they hold the bytes that were passed on
        if self._files is None:
            self._engine.ledger.remember(self._document.request_id, batch, made)
        yield self._end_of_batch(batch, made.numbers, made.prompt_id, made.seconds)

    def _blame(self, error: ServerUnreachableError) -> Iterator[dict[str, Any]]:
        """Make the death of ComfyUI the error of what it had begun, whichever batch heard of it.

        Those that wait in its queue may hear of it first, and have nothing to do with it.
        """
        self.sick = self.sick or _sickness(error)
        for batch in [batch for batch in self._running if batch in self._inbox.began]:
            with self._submitting:
                running = self._running.pop(batch)
            running.run.cancel()
            yield self._failure(batch, error)

    def _end_of_batch(
        self, batch: int, numbers: tuple[int, ...], prompt_id: str | None, seconds: float
    ) -> dict[str, Any]:
        self._counts["batches"] += 1
        self._counts["outputs"] += len(numbers)
        return self._event(
            BatchEnded,
            batch=batch,
            outputs=len(numbers),
            prompt_id=prompt_id,
            seconds=round(seconds, 3),
            numbers=numbers,
        )

    def _send(self, batch: int, made: MadeOutput, data: bytes) -> Iterator[dict[str, Any]]:
        about = {
            "batch": batch,
            "output": made.number,
            "node": made.node,
            "name": made.name,
            "subfolder": made.subfolder,
            "type": made.type,
            "cached": made.cached,
            "size": len(data),
            "sha256": made.sha256,
        }
        url = self._store(batch, made.number, made.name, data)
        if url is not None:
            yield self._event(OutputPart, part=0, parts=1, url=url, **about)
            return
        contents = list(split(data))
        for part, content in enumerate(contents):
            yield self._event(OutputPart, part=part, parts=len(contents), data=content, **about)

    def _store(self, batch: int, number: int, name: str, data: bytes) -> str | None:
        storage = self._engine.storage
        try:
            if self._files is not None:
                self._waiter.limit(0)
                return self._files.put_output(batch, name, data)
            if storage is not None:
                self._waiter.limit(0)
                file = f"{batch:05d}_{number:03d}_{safe_name(name, 'output')}"
                return storage.put(f"{self._document.request_id}/{file}", data)
        except OutputFileError as error:
            # The picture is made and paid for, and the events can carry it.
            logger.warning("%s; it is sent in the events instead", error)
        return None


def _sickness(error: BaseException) -> str | None:
    """Tell whether an error means that ComfyUI will fail the next job, too."""
    if isinstance(error, (ServerUnreachableError, ServerNotReadyError)):
        return str(error)
    # After one of these the process's CUDA context is lost for good; out of memory is none.
    if isinstance(error, NodeExecutionError) and "CUDA error" in error.exception_message:
        return error.exception_message.splitlines()[0]
    return None
