"""One thread that waits for the news of all jobs of an executor, in one call at a time."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Union

from comfy_executors.clients.modal import MAX_JOBS, ModalClient
from comfy_executors.clients.modal_answers import ModalJob
from comfy_executors.errors import (
    ComfyExecutorsError,
    ServerError,
    ServerNotReadyError,
    WorkflowError,
)

logger = logging.getLogger(__name__)

_HOLD_SECONDS = 20.0  # for which the app may hold a call while there is no news
_LEAST_GAP = 0.25  # between the starts of two calls: images come, or jobs are added
_QUIET_GAP = 2.0  # the same where a call brought nothing but progress

News = Union[ModalJob, ComfyExecutorsError]
Deliver = Callable[[News], None]


class _BrokenOffError(ComfyExecutorsError):
    """Raised when the call is not wanted any more in this form."""


@dataclass
class _Followed:
    """A job, and who is told of it."""

    cursor: str = ""
    state: str = ""
    followers: list[Deliver] = field(default_factory=list)


class JobPoller:
    """Tells each job's news to those who follow it.

    Its thread runs while there are jobs to be followed; `close` ends it at once. A job that is
    added breaks off the call that is waiting, and is in the next one. An outage ends no job that
    was told of before: it goes on without us, and is paid for.

    Args:
        client: The app.
    """

    def __init__(self, client: ModalClient) -> None:
        self._client = client
        self.reset()

    def reset(self) -> None:
        """Start with a new lock and without jobs, in the child of a fork."""
        self._changed = threading.Condition()
        self._jobs: dict[str, _Followed] = {}
        self._thread: threading.Thread | None = None
        self._woken = False
        self._interrupt: Callable[[], None] | None = None

    def follow(self, job_id: str, deliver: Deliver) -> None:
        """Tell of a job from its first event on, until its state is final.

        Args:
            job_id: The job.
            deliver: Is called with the job as it is then, with its new events, or with the error
                that keeps us from asking for it; quickly, and from the poller's thread. In an
                outage it is not called: whoever follows a job sees to its time.
        """
        with self._changed:
            followed = self._jobs.setdefault(job_id, _Followed())
            # Who follows it already hears things twice, which does not matter.
            followed.cursor = ""
            followed.followers.append(deliver)
            is_first = self._thread is None
            if is_first:
                # A daemon, because a call that is held must not keep the interpreter from ending;
                # the executor's close() ends it in good order.
                self._thread = threading.Thread(
                    target=self._run, name=type(self).__name__, daemon=True
                )
                self._thread.start()
        if not is_first:
            self._wake()

    def leave(self, job_id: str, deliver: Deliver) -> None:
        """Tell no more of a job; leaving twice, or one that has ended, has no effect."""
        with self._changed:
            followed = self._jobs.get(job_id)
            if followed is None or deliver not in followed.followers:
                return
            followed.followers.remove(deliver)
            if not followed.followers:
                del self._jobs[job_id]
            is_last = not self._jobs
        if is_last:
            self._wake()

    def close(self) -> None:
        """End the thread; no job is followed any more."""
        with self._changed:
            self._jobs.clear()
            thread = self._thread
        self._wake()
        if thread is not None:
            thread.join()

    # The thread.

    def _run(self) -> None:
        begun = float("-inf")
        gap = _LEAST_GAP
        is_away = False
        while (cursors := self._next(begun, gap)) is not None:
            begun = time.monotonic()
            # With that many, others may wait for their turn.
            hold = _HOLD_SECONDS if len(cursors) < MAX_JOBS else _QUIET_GAP
            try:
                jobs = self._client.poll(cursors, hold, _PollWaiter(self))
            except _BrokenOffError:
                continue
            except ComfyExecutorsError as error:
                if not _may_pass(error):
                    self._fail(cursors, error)
                    continue
                gap = _QUIET_GAP
                unknown = self._never_told(cursors)
                self._fail(unknown, error)
                if not is_away and len(unknown) < len(cursors):
                    logger.warning("%s; its jobs are asked for until their time is over", error)
                    is_away = True
            except Exception as error:
                logger.exception("the news of jobs could not be read")
                self._fail(cursors, WorkflowError(f"the news of the job are broken: {error}"))
            else:
                is_away = False
                gap = _LEAST_GAP if self._hand_out(cursors, jobs) else _QUIET_GAP

    def _next(self, begun: float, gap: float) -> dict[str, str] | None:
        """Wait until a call is due, and return what it asks for; None when nothing is left."""
        with self._changed:
            while self._jobs:
                # What was added does not wait for the quiet to end.
                due = begun + (_LEAST_GAP if self._woken else gap)
                left = due - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._woken = False
            if not self._jobs:
                self._thread = None
                return None
            asked = list(self._jobs)[:MAX_JOBS]
            for job_id in asked if len(self._jobs) > MAX_JOBS else ():
                self._jobs[job_id] = self._jobs.pop(job_id)  # the others are next
            return {job_id: self._jobs[job_id].cursor for job_id in asked}

    def _hand_out(self, cursors: dict[str, str], jobs: dict[str, ModalJob]) -> bool:
        """Tell each job's followers; return whether anything but progress is new."""
        is_news = False
        told: list[tuple[list[Deliver], ModalJob]] = []
        with self._changed:
            for job_id, job in jobs.items():
                followed = self._jobs.get(job_id)
                if followed is None or followed.cursor != cursors.get(job_id):
                    continue  # it was left meanwhile, or is followed anew from its beginning
                kinds = {event.get("kind") for event in job.events}
                is_new = job.state != followed.state or bool(kinds - {"progress"})
                if is_new or job.events:
                    told.append((list(followed.followers), job))
                is_news = is_news or is_new
                followed.cursor, followed.state = job.cursor, job.state
                if job.is_final:
                    del self._jobs[job_id]
        for followers, job in told:
            for deliver in followers:
                deliver(job)
        return is_news

    def _never_told(self, job_ids: Collection[str]) -> list[str]:
        with self._changed:
            return [name for name in job_ids if name in self._jobs and not self._jobs[name].state]

    def _fail(self, job_ids: Collection[str], error: ComfyExecutorsError) -> None:
        with self._changed:
            failed = [self._jobs.pop(job_id) for job_id in job_ids if job_id in self._jobs]
        for followed in failed:
            for deliver in followed.followers:
                # One for each, since a job writes its name on it.
                copied = copy.copy(error)
                copied.__cause__ = error
                deliver(copied)

    # Breaking off.

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            interrupt = self._interrupt
            self._changed.notify_all()
        if interrupt is not None:
            interrupt()


def _may_pass(error: ComfyExecutorsError) -> bool:
    """Tell whether an error is that of an outage, or of an app that starts for longer."""
    if isinstance(error, ServerNotReadyError):
        return True
    return isinstance(error, ServerError) and error.transient


class _PollWaiter:
    """The waiter of the poller's call, which ends when the jobs have changed."""

    def __init__(self, poller: JobPoller) -> None:
        self._poller = poller

    def limit(self, seconds: float) -> float:
        with self._poller._changed:
            self._check()
        return seconds

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._poller._changed:
            self._check()
            while (left := until - time.monotonic()) > 0:
                self._poller._changed.wait(left)
                self._check()

    @contextlib.contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        with self._poller._changed:
            self._check()
            self._poller._interrupt = interrupt
        try:
            yield
        finally:
            with self._poller._changed:
                self._poller._interrupt = None

    def _check(self) -> None:
        if self._poller._woken:
            raise _BrokenOffError("the jobs have changed")
