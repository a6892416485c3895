"""Following one job for all who ask about it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from comfy_executors.errors import (
    ComfyExecutorsError,
    JobError,
    JobExpiredError,
    JobInterruptedError,
)
from comfy_executors.wire import decode_error, encode_error
from comfy_executors.workers.job_records import (
    Envelope,
    Outcome,
    cancel_key,
    is_urgent,
    position,
    progress_key,
)

logger = logging.getLogger(__name__)

FINAL = {"done", "failed", "cancelled", "expired"}
FIRST_LOOK_SECONDS = 1.0
_IDLE_SECONDS = 60.0
_OUTCOME_WAIT = 10.0
_PROGRESS_PAUSE = 1.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 10.0
_BEFORE = (0, -1)  # the position before all events


@dataclass(frozen=True)
class Cursor:
    """How much of a job's events is known.

    Args:
        feed: The position of the newest known event of the feed.
        progress: That of the newest known thinned progress, which comes another way.
    """

    feed: tuple[int, int] = _BEFORE
    progress: tuple[int, int] = _BEFORE

    def __str__(self) -> str:
        (attempt, seq), (progress_attempt, progress_seq) = self.feed, self.progress
        return f"{attempt}.{seq}/{progress_attempt}.{progress_seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read a cursor; the empty string is the one before all events.

        Raises:
            ValueError: It is none of ours.
        """
        if not text:
            return cls()
        feed, progress = (tuple(map(int, part.split("."))) for part in text.split("/"))
        (attempt, seq), (progress_attempt, progress_seq) = feed, progress
        return cls((attempt, seq), (progress_attempt, progress_seq))


class JobSource(Protocol):
    """Where a watch learns of its job; see `JobBackend`."""

    async def get_record(self, key: str) -> Any: ...

    async def outcome(self, call_id: str, wait: float) -> Outcome | None: ...

    def feed(self, call_id: str) -> AsyncGenerator[list[dict[str, Any]], None]: ...


class JobWatch:
    """What is known of one job, kept up to date while somebody asks.

    Args:
        source: Where to ask.
        call_id: The job's id.
        record: What was written down when it was submitted.

    Attributes:
        state: `queued`, `running`, or one of `FINAL`.
        error: Why it failed.
        listeners: What is set whenever something is new.
    """

    def __init__(self, source: JobSource, call_id: str, record: Mapping[str, Any]) -> None:
        self.call_id = call_id
        self.record = record
        self.state = "queued"
        self.error: ComfyExecutorsError | None = None
        self.listeners: set[asyncio.Event] = set()
        self._source = source
        self._events: dict[tuple[int, int], dict[str, Any]] = {}
        self._late: set[tuple[int, int]] = set()  # only the envelope told of them
        self._progress: list[dict[str, Any]] = []
        self._newest = _BEFORE
        self._used = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = time.monotonic()

    def start(self) -> None:
        """Begin to follow the job."""
        follows = (self._follow_feed, self._follow_progress, self._follow_call)
        self._tasks = [asyncio.create_task(self._persist(follow)) for follow in follows]

    async def close(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def touch(self) -> None:
        """Say that somebody asks."""
        self._used = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether nobody has asked for a while."""
        return not self.listeners and time.monotonic() - self._used > _IDLE_SECONDS

    @property
    def is_fresh(self) -> bool:
        """Whether it was begun just now, and may not know yet how things stand."""
        return time.monotonic() - self._begun < FIRST_LOOK_SECONDS

    def is_urgent(self, cursor: Cursor) -> bool:
        """Tell whether there is something that who waits wants to know at once."""
        return self._newest > cursor.feed

    def has_progress(self, cursor: Cursor) -> bool:
        """Tell whether there is anything new at all."""
        return any(place > cursor.feed for place in self._events) or any(
            position(event) > cursor.progress for event in self._progress
        )

    def tell(self, cursor: Cursor) -> dict[str, Any]:
        """Make the job object for who knows so much."""
        is_final = self.state in FINAL
        feed = [
            event
            for place, event in self._events.items()
            if place > cursor.feed or (is_final and place in self._late)
        ]
        progress = [event for event in self._progress if position(event) > cursor.progress]
        new = Cursor(
            max((*map(position, feed), cursor.feed)),
            max((*map(position, progress), cursor.progress)),
        )
        return {
            "id": self.call_id,
            "request_id": self.record["request_id"],
            "state": self.state,
            "cursor": str(new),
            "events": sorted((*feed, *progress), key=position),
            "error": None if self.error is None else encode_error(self.error),
        }

    async def output(self, url: str, seconds: float) -> dict[str, Any] | None:
        """Wait for the event of an output; None where it does not come, or the job has ended."""

        def find() -> dict[str, Any] | None:
            return next((e for e in self._events.values() if e.get("url") == url), None)

        await self._until(lambda: find() is not None or self.state in FINAL, seconds)
        return find()

    async def _until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds, at the most so long."""
        deadline = time.monotonic() + seconds
        news = asyncio.Event()
        self.listeners.add(news)
        try:
            while not holds() and (left := deadline - time.monotonic()) > 0:
                news.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), left)
        finally:
            self.listeners.discard(news)

    # What keeps it up to date.

    async def _persist(self, follow: Callable[[], Awaitable[None]]) -> None:
        """Follow something to its end, over the faults of who is asked."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await follow()
                return
            except Exception:
                logger.warning("cannot follow job %s for now", self.call_id, exc_info=True)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)

    async def _follow_feed(self) -> None:
        feed = self._source.feed(self.call_id)
        try:
            async for events in feed:
                self._add(events)
        finally:
            await feed.aclose()

    async def _follow_progress(self) -> None:
        while self.state not in FINAL:
            if self.state == "running":
                progress = await self._source.get_record(progress_key(self.call_id))
                if progress and progress != self._progress:
                    self._progress = progress
                    self._notify()
            # A record tells nobody that it was changed.
            await asyncio.sleep(_PROGRESS_PAUSE)

    async def _follow_call(self) -> None:
        outcome = await self._source.outcome(self.call_id, 0.0)
        while outcome is None:
            if self.state == "queued" and await self._is_cancelled():
                # A job looks before it begins, and would not; what Modal says of it may take long.
                outcome = Outcome()
            else:
                outcome = await self._source.outcome(self.call_id, _OUTCOME_WAIT)
        await self._settle(outcome)

    async def _settle(self, outcome: Outcome) -> None:
        envelope = Envelope.decode(outcome.returned)
        is_ours = envelope is not None and envelope.request_id == self.record["request_id"]
        if envelope is not None and is_ours:
            told = {position(event) for event in envelope.events}
            # They come by the feed, but for what it lost.
            await self._until(lambda: told <= self._events.keys(), FIRST_LOOK_SECONDS)
            self._late.update(told - self._events.keys())
            self._events.update({position(event): event for event in envelope.events})
            state, failure = envelope.state, envelope.failure
            error = None if failure is None else decode_error(failure)
        elif outcome.is_expired:
            state = "expired"
            error = JobExpiredError("its result is kept for a week", job_id=self.call_id)
        else:
            state = "cancelled" if await self._is_cancelled() else "failed"
            words = "returned what no job of this app would return"
            error = outcome.failure or JobError(words, job_id=self.call_id)
        if state in ("cancelled", "duplicate"):
            state = "cancelled"
            error = JobInterruptedError("was cancelled", job_id=self.call_id)
        self.state, self.error = state, error
        self._progress = []
        self._notify()

    async def _is_cancelled(self) -> bool:
        return bool(await self._source.get_record(cancel_key(self.record["request_id"])))

    def _add(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._events.setdefault(position(event), event)
            if is_urgent(event):
                self._newest = max(self._newest, position(event))
        if self.state == "queued":
            self.state = "running"
        self._notify()

    def _notify(self) -> None:
        for listener in self.listeners:
            listener.set()
