"""A job in the container with the GPU: run on the ComfyUI there, and told as it goes.

Nothing here knows of Modal's SDK; `modal_app.py` is the thin shell around it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from comfy_executors.errors import InputImageError, JobTimeoutError, WorkflowCancelledError
from comfy_executors.wire import (
    Assembler,
    CompleteBatch,
    End,
    Failed,
    JobDocument,
    decode_document,
    encode_event,
)
from comfy_executors.workers.engine import Engine, Execution
from comfy_executors.workers.job_records import (
    Envelope,
    JobChannel,
    attempt_key,
    call_key,
    is_thinned,
    is_urgent,
    job_key,
    job_record,
    progress_key,
)

logger = logging.getLogger(__name__)

_PROGRESS_GAP = 1.0  # seconds between two records of progress: each is a call over the network
_MAX_SUFFIX = 10


class JobRunner:
    """Runs jobs on the ComfyUI of this container.

    Args:
        engine: What runs them.
        time_limit: Seconds after which a job is ended with an error that says so; below the time
            limit of the container, which would end it without a word.
        prepare: Called before each job, such as to start a ComfyUI that has died.

    Attributes:
        sick: Why ComfyUI can no longer be trusted, if it cannot: the container should be replaced.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        time_limit: float | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._prepare = prepare
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._running: dict[str, Execution] = {}
        self.sick: str | None = None

    def run(self, raw: Mapping[str, Any], channel: JobChannel) -> dict[str, Any]:
        """Run a job document to its end and return the envelope, as JSON.

        No exception comes out of it but those that end the container or the call, and then
        ComfyUI was told to stop. In particular no TimeoutError: who asks Modal for the result would
        take it for a job that goes on.
        """
        request_id = str(raw.get("request_id"))
        try:
            return self._run(raw, channel).encode()
        except Exception as error:
            logger.exception("job %s failed in an unforeseen way", channel.call_id)
            return Envelope.failed(request_id, error).encode()

    def cancel(self, call_id: str) -> None:
        """End a job that runs; any thread may. When it returns ComfyUI has been told."""
        with self._lock:
            execution = self._running.get(call_id)
        if execution is not None:
            execution.cancel()

    def close(self) -> None:
        """Cancel what runs and end all threads."""
        self._engine.close()

    def _run(self, raw: Mapping[str, Any], channel: JobChannel) -> Envelope:
        document = decode_document(raw)
        if not _is_the_one(document, channel):
            return Envelope(document.request_id, "duplicate")
        if self._prepare is not None:
            self._prepare()
        attempt = _count_attempt(channel)
        made = _made_before(document, channel) if attempt > 1 else {}
        execution = self._engine.start(document, files=_JobFiles(channel, attempt, made))
        with self._lock:
            self._running[channel.call_id] = execution
        story = _Story(channel, attempt)
        try:
            if channel.is_cancelled(document.request_id):
                execution.cancel()
            state = self._follow(execution, story, channel)
        finally:
            story.close()
            with self._lock:
                self._running.pop(channel.call_id, None)
            self.sick = self.sick or execution.sick
        return Envelope(document.request_id, state, attempt, tuple(story.told))

    def _follow(self, execution: Execution, story: _Story, channel: JobChannel) -> str:
        limit = _TimeLimit(self._time_limit, execution)
        try:
            for event in execution:
                story.tell(event)
        except WorkflowCancelledError:
            if not limit.has_passed:
                return "cancelled"
            story.give_up(
                JobTimeoutError(
                    f"ran longer than the app's time limit of {self._time_limit:g} s: deploy it "
                    "with a larger COMFY_MODAL_TIMEOUT, or give a job less to do with "
                    "batches_per_job=",
                    started=True,
                    job_id=channel.call_id,
                )
            )
        except BaseException:
            # Modal cancels a call by an exception here, and ComfyUI would go on for the next job.
            execution.cancel()
            raise
        finally:
            limit.close()
        return "done"


def _is_the_one(document: JobDocument, channel: JobChannel) -> bool:
    """Tell whether this call is the one of its request, of which a second may have been started."""
    key = call_key(document.request_id)
    channel.claim(job_key(channel.call_id), job_record(document))
    if channel.claim(key, channel.call_id):
        return True
    return bool(channel.get(key) == channel.call_id)


def _count_attempt(channel: JobChannel) -> int:
    attempt = 1
    while not channel.claim(attempt_key(channel.call_id, attempt), time.time()):
        attempt += 1
    return attempt


def _made_before(document: JobDocument, channel: JobChannel) -> dict[int, CompleteBatch]:
    """Find the batches that earlier attempts made, in other containers, and that are kept."""
    assembler = Assembler((item.batch for item in document.graphs), keeps_data=False)
    try:
        kept = channel.kept_outputs()
        news = [
            item
            for event in channel.events()
            if event["kind"] != "output" or PurePosixPath(event.get("url", "")).name in kept
            for item in assembler.add(event)
        ]
    except Exception:
        logger.warning("job %s: all of it is run again", channel.call_id, exc_info=True)
        return {}
    return {item.batch: item for item in news if isinstance(item, CompleteBatch)}


class _TimeLimit:
    """Ends an execution that takes too long."""

    def __init__(self, seconds: float | None, execution: Execution) -> None:
        self.has_passed = False
        self._execution = execution
        self._timer = None if seconds is None else threading.Timer(seconds, self._pass)
        if self._timer is not None:
            self._timer.start()

    def _pass(self) -> None:
        self.has_passed = True
        self._execution.cancel()

    def close(self) -> None:
        """Stop the clock; its thread has ended when this returns."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()


class _JobFiles:
    """The outputs and input images of one attempt; see `engine.JobFiles`."""

    def __init__(
        self, channel: JobChannel, attempt: int, made_before: Mapping[int, CompleteBatch]
    ) -> None:
        self._channel = channel
        self._attempt = attempt
        self._made_before = made_before
        # A batch that runs again makes other files, which must not take the place of the first.
        self._numbers = itertools.count()

    def put_output(self, batch: int, name: str, data: bytes) -> str:
        """Keep an output under a name of our own, of which ComfyUI's gives the suffix only."""
        suffix = PurePosixPath(name.replace("\\", "/")).suffix.lower()
        is_plain = suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= _MAX_SUFFIX
        number = next(self._numbers)
        kept = f"{self._attempt}_{batch:05d}_{number:05d}{suffix if is_plain else ''}"
        self._channel.write_output(kept, data)
        return f"/v1/jobs/{self._channel.call_id}/outputs/{kept}"

    def read_input(self, sha256: str, name: str) -> bytes:
        """Return an input image that was put there before.

        Raises:
            InputImageError: It is not there any more.
        """
        data = self._channel.read_input(sha256)
        if data is None:
            raise InputImageError(f"the input image {name} is not kept any more: submit it again")
        return data

    def recall(self, batch: int) -> CompleteBatch | None:
        """Return a batch that an earlier attempt made, if all of it is kept."""
        return self._made_before.get(batch)


class _Story:
    """A job's events on their way to who waits for them, told by a thread of its own.

    What is in a hurry goes at once, with all that was kept back before it; the rest goes once a
    second. Of thinned progress only the newest of each batch is written down.

    Attributes:
        told: All events but thinned progress.
    """

    def __init__(self, channel: JobChannel, attempt: int) -> None:
        self.told: list[dict[str, Any]] = []
        self._channel = channel
        self._attempt = attempt
        self._seq = 0
        self._changed = threading.Condition()
        self._pending: list[dict[str, Any]] = []
        self._newest: dict[int, dict[str, Any]] = {}
        self._is_newer = False
        self._is_urgent = False
        self._is_closed = False
        self._due = 0.0
        self._thread = threading.Thread(target=self._work, name="comfy-job-story")
        self._thread.start()

    def tell(self, event: dict[str, Any]) -> None:
        """Take the next event, as JSON."""
        # The engine only knows of the attempts in this container.
        event["attempt"] = self._attempt
        self._seq = event["seq"] + 1
        with self._changed:
            if is_thinned(event):
                self._newest[event["batch"]] = event
                self._is_newer = True
            else:
                self.told.append(event)
                self._pending.append(event)
                self._is_urgent = self._is_urgent or is_urgent(event)
                if event["kind"] in ("batch", "error"):
                    self._newest.pop(event["batch"], None)
            self._changed.notify_all()

    def give_up(self, error: JobTimeoutError) -> None:
        """Tell that the whole job failed, and the end of it."""
        kinds = [event["kind"] for event in self.told]
        errors = 1 + kinds.count("error")
        outputs = [e for e in self.told if e["kind"] == "output" and e["part"] == 0]
        self.tell(encode_event(Failed(self._seq, self._attempt, None, error)))
        end = End(self._seq, self._attempt, kinds.count("batch"), len(outputs), errors)
        self.tell(encode_event(end))

    def close(self) -> None:
        """Tell what is left; the thread has ended when this returns."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_newer or self._is_closed)
                # A second for more to come, but for what is in a hurry.
                self._changed.wait_for(
                    lambda: self._is_urgent or self._is_closed, self._due - time.monotonic()
                )
                pending, self._pending = self._pending, []
                newest = list(self._newest.values()) if self._is_newer else []
                self._is_newer = self._is_urgent = False
                if not pending and not newest and self._is_closed:
                    return
                is_due = time.monotonic() >= self._due
                if newest and not is_due:
                    self._is_newer, newest = not self._is_closed, []
            try:
                self._pass_on(pending, newest)
            except Exception:
                # What the job returns has all of it.
                logger.warning("job %s: cannot tell now", self._channel.call_id, exc_info=True)
            if is_due:
                self._due = time.monotonic() + _PROGRESS_GAP

    def _pass_on(self, pending: list[dict[str, Any]], newest: list[dict[str, Any]]) -> None:
        if pending:
            self._channel.emit(pending)
        if newest:
            self._channel.put(progress_key(self._channel.call_id), newest)
