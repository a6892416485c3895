"""What the command line shows: results on stdout, everything for people on stderr."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from comfy_executors.runs import ProgressEvent

_LINE_SECONDS = 2.0  # between two lines that only say where a batch is


class Display:
    """Shows nothing of the progress: for pipes and `--quiet`. The others build on it.

    Also takes the library's warnings while it is entered, so that they do not run into a bar.

    Args:
        quiet: Whether notes and warnings are dropped, too; errors never are.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._lock = threading.Lock()
        self._open = True
        self._handler = _WarningHandler(self)

    def result(self, *lines: str) -> None:
        """Write lines of what was asked for to stdout, at once.

        Raises:
            BrokenPipeError: Nobody reads it any more.
        """
        print(*lines, sep="\n", flush=True)

    def note(self, text: str) -> None:
        """Tell people something on stderr, unless they want quiet."""
        if not self._quiet:
            self._write(text)

    def error(self, text: str) -> None:
        """Tell people on stderr what went wrong."""
        self._write(text)

    def delivered(self, images: int) -> None:
        """Take note of images that were saved."""

    def on_progress(self, event: ProgressEvent) -> None:
        """Take a run's progress event, from any thread."""
        with self._lock:
            if self._open and event.kind == "waiting":
                self.note(f"batch {event.batch} waits: {event.message}")
            elif self._open:
                self._show(event)

    def end_progress(self) -> None:
        """Show no more progress; what is left to say comes below it."""
        with self._lock:
            if self._open:
                self._open = False
                self._close()

    def _show(self, event: ProgressEvent) -> None:
        pass

    def _write(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _close(self) -> None:
        pass

    def __enter__(self) -> Display:
        logging.getLogger("comfy_executors").addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_progress()
        logging.getLogger("comfy_executors").removeHandler(self._handler)


class LineDisplay(Display):
    """Shows progress as plain lines: for a terminal where tqdm is not installed.

    Args:
        total: How many images are wanted.
        quiet: As for `Display`.
    """

    def __init__(self, total: int, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._total = total
        self._made = 0
        self._next_line = 0.0

    def _show(self, event: ProgressEvent) -> None:
        if event.kind == "done":
            self._made += event.step or 0
            self._write(f"batch {event.batch} is done: {self._made} of {self._total} images")
        elif event.kind == "started":
            self._write(f"batch {event.batch} runs")
        elif event.kind in ("node", "step") and time.monotonic() >= self._next_line:
            self._write(where(event))
            self._next_line = time.monotonic() + _LINE_SECONDS


class BarDisplay(Display):
    """Shows one bar for the images, with the running node beside it.

    Args:
        total: How many images are wanted.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        super().__init__()
        # miniters=0 makes `update(0)` redraw, though no oftener than every 0.1 s; smoothing=0
        # makes the rate that of the whole run, where images come by the batch.
        self._bar: Any = tqdm(total=total, unit=" images", miniters=0, smoothing=0, **_width())

    def result(self, *lines: str) -> None:
        self._bar.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()

    def delivered(self, images: int) -> None:
        self._bar.update(images)

    def _show(self, event: ProgressEvent) -> None:
        if event.kind in ("node", "step"):
            # A step passes quickly, but a node can stay for minutes: it must not be left out.
            self._bar.set_postfix_str(where(event), refresh=event.kind == "node")
            self._bar.update(0)

    def _write(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def _close(self) -> None:
        self._bar.set_postfix_str("", refresh=True)
        self._bar.close()


def _width() -> dict[str, Any]:
    # Some terminals, such as those of CI, say that they have no columns: the bar would be empty.
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return {"dynamic_ncols": True} if known else {"ncols": 80}


class _WarningHandler(logging.Handler):
    """Passes the library's log on to a display."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        # Above warnings there are only bugs, whose tracebacks nobody should miss.
        show = self._display.error if record.levelno > logging.WARNING else self._display.note
        try:
            show(f"{record.levelname.lower()}: {self.format(record)}")
        except Exception:
            # As all handlers do: a broken stderr must not fail the batch that warned.
            self.handleError(record)


def where(event: ProgressEvent) -> str:
    """Say where a batch is: `batch 3: KSampler, step 5 of 20`."""
    text = f"batch {event.batch}: {event.title or f'node {event.node}'}"
    return f"{text}, step {event.step} of {event.max}" if event.kind == "step" else text


def make_display(total: int, *, quiet: bool) -> Display:
    """Choose how progress is shown: a bar or lines on a terminal, else not at all.

    Args:
        total: How many images are wanted.
        quiet: Whether people are to be told errors only.
    """
    if quiet or not sys.stderr.isatty():
        return Display(quiet)
    try:
        return BarDisplay(total)
    except ImportError:
        return LineDisplay(total)
