"""Progress for people: a bar on a terminal or in a notebook, and plain lines anywhere else.

Both are given to `on_progress=`; several runs may share one. ::

    with ProgressBar(total=16) as progress:
        executor.submit_workflow(template, num_samples=16, on_progress=progress).result()
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any, TypeVar

from comfy_executors.errors import MissingExtraError
from comfy_executors.runs import ProgressEvent

_LINE_SECONDS = 5.0
_ENDS = ("done", "failed", "cancelled")
_PASSING = ("queued", "started", "step")

Self = TypeVar("Self", bound="Progress")


class Tally:
    """What the events of one or several runs add up to.

    Attributes:
        images: The images made.
        lost: The images that failed and cancelled batches were to make.
        retries: How often a batch was run again.
        failures: The batches that failed.
    """

    def __init__(self) -> None:
        self.images = 0
        self.lost = 0
        self.retries = 0
        self.failures = 0
        self._running: dict[tuple[int | None, int], ProgressEvent] = {}

    def add(self, event: ProgressEvent) -> None:
        """Take an event into account."""
        key = (event.row, event.batch)
        if event.kind == "done":
            self.images += event.step or 0
        elif event.kind in _ENDS:
            self.lost += event.max or 0
            self.failures += event.kind == "failed"
        elif event.kind == "retry":
            self.retries += 1
        if event.kind in _ENDS or event.kind == "retry":
            self._running.pop(key, None)
        elif event.kind != "queued":
            self._running[key] = event

    @property
    def counts(self) -> str:
        """How many batches were retried and failed: `1 retried, 2 failed`; nothing without any."""
        counts = ((self.retries, "retried"), (self.failures, "failed"))
        return ", ".join(f"{count} {word}" for count, word in counts if count)

    @property
    def where(self) -> str:
        """Where the running batches are: `batch 3: KSampler, step 5 of 20`, and the next one's."""
        return " · ".join(map(where, self._running.values()))


def where(event: ProgressEvent) -> str:
    """Say where a batch is: `batch 3: KSampler, step 5 of 20`."""
    name = f"batch {event.batch}"
    if event.row is not None:
        name = f"row {event.row}, {name}" if event.batch else f"row {event.row}"
    if event.kind == "waiting":
        return f"{name} waits: {_plain(event.message or '')}"
    if event.kind == "started":
        return f"{name} begins"
    text = f"{name}: {_plain(event.title or f'node {event.node}')}"
    return f"{text}, step {event.step} of {event.max}" if event.kind == "step" else text


def _plain(text: str) -> str:
    """Make one line of a title, in which nothing moves the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class Progress:
    """What `ProgressBar` and `ProgressLines` share: they are called with events, and closed."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._lock = threading.Lock()
        self._open = True

    def __call__(self, event: ProgressEvent) -> None:
        """Take an event, from any thread."""
        with self._lock:
            self._tally.add(event)
            if self._open:
                self._show(event)

    def close(self) -> None:
        """Show no more; what is written now stands below it."""
        with self._lock:
            if self._open:
                self._open = False
                self._close()

    def _show(self, event: ProgressEvent) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        pass

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ProgressBar(Progress):
    """One bar for the images, with the time left, and one line for the nodes that run.

    On a terminal it is drawn with tqdm, in a notebook with tqdm's own widgets.

    Args:
        total: How many images are wanted; None shows no time left.
        made: How many of them were made before, by an earlier run.
        file: Where it is drawn; by default stderr. Notebooks have their own place.

    Raises:
        MissingExtraError: tqdm is not installed.
    """

    def __init__(
        self, total: int | None = None, *, made: int = 0, file: IO[str] | None = None
    ) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise MissingExtraError("tqdm", "cli") from error
        super().__init__()
        file = file or sys.stderr
        # miniters=0 makes `update(0)` redraw, though no oftener than every 0.1 s; smoothing=0
        # makes the rate that of the whole run, where images come by the batch.
        common: dict[str, Any] = {"file": file, "miniters": 0, **_width(file)}
        self._images: Any = tqdm(total=total, initial=made, unit=" images", smoothing=0, **common)
        self._where: Any = tqdm(bar_format="{desc}", leave=False, **common)

    def write(self, text: str, file: IO[str] | None = None) -> None:
        """Write lines above the bar.

        Args:
            text: The lines.
            file: Where to; by default stdout.
        """
        self._images.write(text, file=file or sys.stdout)

    def _show(self, event: ProgressEvent) -> None:
        made = self._images.initial + self._tally.images
        if self._images.total is not None and event.kind in ("failed", "cancelled"):
            # What will not come must not be waited for.
            self._images.total = max(made, self._images.total - (event.max or 0))
        self._images.set_postfix_str(self._tally.counts, refresh=False)
        self._where.set_description_str(self._tally.where, refresh=False)
        self._images.n = made
        for bar in (self._images, self._where):
            # A step passes quickly, but a node can stay for minutes: it must not be left out.
            if event.kind in _PASSING:
                bar.update(0)
            else:
                bar.refresh()

    def _close(self) -> None:
        self._where.close()
        self._images.refresh()
        self._images.close()


class ProgressLines(Progress):
    """A plain line every few seconds, for logs and pipes; a short run has none.

    Args:
        total: How many images are wanted; None shows no time left.
        made: How many of them were made before, by an earlier run.
        file: Where the lines go; by default stderr.
        seconds: The shortest time between two lines, and before the first.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        made: int = 0,
        file: IO[str] | None = None,
        seconds: float = _LINE_SECONDS,
    ) -> None:
        super().__init__()
        self._total = total
        self._made = made
        self._file = file
        self._seconds = seconds
        self._started = self._last = time.monotonic()

    def _show(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            print(self._line(now), file=self._file or sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        tally = self._tally
        made = self._made + tally.images
        parts = [f"{made} images" if self._total is None else f"{made} of {self._total} images"]
        if self._total is not None and tally.images:
            to_come = max(0, self._total - tally.lost - made)
            seconds = to_come * (now - self._started) / tally.images
            parts.append(f"about {_clock(seconds)} left")
        if tally.counts:
            parts.append(tally.counts)
        return "; ".join(part for part in (", ".join(parts), tally.where) if part)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _width(file: IO[str]) -> dict[str, Any]:
    # Some terminals, such as those of CI, say that they have no columns: the bar would be empty.

    try:
        known = os.get_terminal_size(file.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):  # no terminal, or no file at all
        return {}
    return {"dynamic_ncols": True} if known else {"ncols": 80}
