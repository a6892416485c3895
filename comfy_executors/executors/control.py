"""What a backend is given beside its job: deadlines, the cancel signal, a mailbox, progress."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from comfy_executors.errors import WorkflowCancelledError, WorkflowTimeoutError
from comfy_executors.runs import Batch, ProgressEvent, WorkflowRun


class JobControl:
    """The strings that hold a running job; a backend's every wait goes through it.

    Each wait ends at once when the run is cancelled, and at the deadline at the latest.
    """

    def __init__(self, run: WorkflowRun, release_place: Callable[[], None]) -> None:
        # Weak: else a run that is done would wait for the garbage collector with all its images.
        self._run = weakref.ref(run)
        self._release_place = release_place
        self._changed = threading.Condition()
        self._mail: deque[Any] = deque()
        self._cancel_reason: str | None = None
        self._interrupts: set[Callable[[], None]] = set()  # of the calls being made
        self._run_deadline = self._deadline = run.deadline
        self._run_limit = self._limit = f"the run's timeout of {run.options.timeout} s"
        self._has_place = True
        # Whether it matters at once how far execution has come.
        self._is_watched = (
            run.options.on_progress is not None or run.options.batch_timeout is not None
        )
        self.attempt = 0
        # What the job has on its server at present, for those that stop the whole run.
        self.prompt_id: str | None = None
        # Our own id of the job, the same in all its attempts.
        self.job_id = str(uuid.uuid4())
        self.batch_timeout = run.options.batch_timeout
        self.on_giving_up: Callable[[BaseException], None] | None = None
        self.gave_up = False
        self.wants_progress = run.options.on_progress is not None

    # For the executor, the run, and whoever brings news.

    def next_attempt(self) -> None:
        """Start anew: no mail of the attempt before, and no deadline but the run's.

        Raises as `receive` does, so that nothing is begun that is not wanted any more.
        """
        self.attempt += 1
        self._set_deadline(None)
        with self._changed:
            self._mail.clear()
            self._check()

    def cancel(self, reason: str) -> None:
        """Make the job stop: its next wait, or the present one, raises."""
        with self._changed:
            self._cancel_reason = reason
            interrupts = list(self._interrupts)
            self._changed.notify_all()
        for interrupt in interrupts:
            interrupt()

    def post(self, item: Any, *, wake: bool = True) -> None:
        """Put something into the job's mailbox; any thread may."""
        with self._changed:
            self._mail.append(item)
            if wake or self._is_watched:
                self._changed.notify_all()

    @property
    def holds_place(self) -> bool:
        """Whether the job still has its place among `max_workers`."""
        with self._changed:
            return self._has_place

    # For the backend.

    def receive(self, timeout: float) -> Any | None:
        """Wait for mail.

        Args:
            timeout: Seconds to wait at the most.

        Returns:
            The next item, or None when none came in time.

        Raises:
            WorkflowCancelledError: The run was cancelled.
            WorkflowTimeoutError: The run's or the batch's deadline passed.
        """
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                self._check()
                if self._mail:
                    return self._mail.popleft()
                left = until - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(self._cap(left))

    def mates(self) -> list[JobControl]:
        """Return the controls of all jobs of this run, if the whole run is to stop.

        While one job's batch timeout passes, the others go on, and the answer is empty.
        """
        run, deadline = self._run(), self._run_deadline
        over = deadline is not None and time.monotonic() >= deadline
        with self._changed:
            if self._cancel_reason is None and not over:
                return []
        running = run._running() if run is not None else []
        return [control for control in running if isinstance(control, JobControl)]

    def sleep(self, seconds: float) -> None:
        """Wait, for a backoff; mail stays in the mailbox. Raises as `receive` does."""
        until = time.monotonic() + seconds
        with self._changed:
            self._check()
            while (left := until - time.monotonic()) > 0:
                self._changed.wait(self._cap(left))
                self._check()

    def wait_for(self, future: Future[Any]) -> None:
        """Wait until a future is done, whatever came of it. Raises as `receive` does."""
        future.add_done_callback(self._notify)
        with self._changed:
            while not future.done():
                self._check()
                self._changed.wait(self._cap(threading.TIMEOUT_MAX))

    def limit(self, seconds: float) -> float:
        """Shorten a time limit, in seconds, to what the deadline leaves of it."""
        with self._changed:
            self._check()
            return self._cap(seconds)

    def begin(self, batch: Batch) -> None:
        """Say that the batch's execution began; its `batch_timeout` counts from here."""
        timeout = self.batch_timeout
        if timeout is not None:
            self._set_deadline(timeout)
        self.progress(ProgressEvent("started", batch.index))

    def end(self) -> None:
        """Say that execution ended, so that the server is free for another job's batch.

        What is left, such as downloads, is counted against no deadline but the run's.
        """
        self._set_deadline(None)
        with self._changed:
            has_place, self._has_place = self._has_place, False
        if has_place:
            self._release_place()

    def give_up(self, error: BaseException) -> None:
        """Fail what is left of the job now, before what it has on a server is taken back.

        Without it a caller's `timeout` would be over only when a server that hangs has not
        answered the cancelling either. The job then still ends by raising the error.
        """
        self.gave_up = True
        if self.on_giving_up is not None:
            self.on_giving_up(error)

    def progress(self, event: ProgressEvent) -> None:
        """Pass a progress event on to the run's `on_progress`."""
        run = self._run()
        if run is not None:  # what comes when all is done is no news
            run._report(event)

    @contextlib.contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Have a call broken off when the run is cancelled while it is made; several may be.

        Args:
            interrupt: Breaks it off; any thread may call it.
        """
        with self._changed:
            self._check()
            self._interrupts.add(interrupt)
        try:
            yield
        finally:
            with self._changed:
                self._interrupts.discard(interrupt)

    # Inside.

    def _notify(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _set_deadline(self, batch_timeout: float | None) -> None:
        deadline, limit = self._run_deadline, self._run_limit
        if batch_timeout is not None:
            batch_deadline = time.monotonic() + batch_timeout
            if deadline is None or batch_deadline < deadline:
                deadline, limit = batch_deadline, f"the batch_timeout of {batch_timeout} s"
        with self._changed:
            self._deadline, self._limit = deadline, limit
            self._changed.notify_all()

    def _check(self) -> None:
        if self._cancel_reason is not None:
            raise WorkflowCancelledError(self._cancel_reason)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise WorkflowTimeoutError(f"{self._limit} passed")

    def _cap(self, seconds: float) -> float:
        if self._deadline is None:
            return max(0.0, seconds)
        return max(0.0, min(seconds, self._deadline - time.monotonic()))
