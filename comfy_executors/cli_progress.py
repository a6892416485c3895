"""What the command line shows: results on stdout, everything for people on stderr."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from comfy_executors.errors import MissingExtraError
from comfy_executors.progress import Progress, ProgressBar, ProgressLines, where
from comfy_executors.runs import ProgressEvent

_WATCHED_LINE_SECONDS = 1.0  # where somebody sits in front of it


class Display:
    """Where a command tells its results, its progress and what people should know.

    Also takes the library's warnings while it is entered, so that they do not run into a bar.

    Args:
        progress: How progress is shown, or None.
        quiet: Whether notes and warnings are dropped; errors never are.
    """

    def __init__(self, progress: Progress | None = None, *, quiet: bool = False) -> None:
        self._progress = progress
        self._quiet = quiet
        self._handler = _WarningHandler(self)

    def result(self, *lines: str) -> None:
        """Write lines of what was asked for to stdout, at once.

        Raises:
            BrokenPipeError: Nobody reads it any more.
        """
        if isinstance(self._progress, ProgressBar):
            self._progress.write("\n".join(lines))
            sys.stdout.flush()
        else:
            print(*lines, sep="\n", flush=True)

    def note(self, text: str) -> None:
        """Tell people something on stderr, unless they want quiet."""
        if not self._quiet:
            self._write(text)

    def error(self, text: str) -> None:
        """Tell people on stderr what went wrong."""
        self._write(text)

    def on_progress(self, event: ProgressEvent) -> None:
        """Take a run's progress event, from any thread."""
        if event.kind == "waiting":
            self.note(where(event))
        elif self._progress is not None:
            self._progress(event)

    def end_progress(self) -> None:
        """Show no more progress; what is left to say comes below it."""
        if self._progress is not None:
            self._progress.close()

    def _write(self, text: str) -> None:
        if isinstance(self._progress, ProgressBar):
            self._progress.write(text, sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

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


class _WarningHandler(logging.Handler):
    """Passes the library's log on to a display, each sentence once."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        # Above warnings there are only bugs, whose tracebacks nobody should miss.
        show = self._display.error if record.levelno > logging.WARNING else self._display.note
        try:
            text = f"{record.levelname.lower()}: {self.format(record)}"
            # The rows of a sweep would all say the same of their template.
            if text not in self._said:
                self._said.add(text)
                show(text)
        except Exception:
            # As all handlers do: a broken stderr must not fail the batch that warned.
            self.handleError(record)


def make_display(total: int, *, quiet: bool, made: int = 0) -> Display:
    """Choose how progress is shown: a bar on a terminal, else now and then a line.

    Args:
        total: How many images are wanted.
        quiet: Whether people are to be told errors only.
        made: How many of the images an earlier run has made.
    """
    if quiet:
        return Display(quiet=True)
    if sys.stderr.isatty():
        try:
            return Display(ProgressBar(total, made=made))
        except MissingExtraError:
            return Display(ProgressLines(total, made=made, seconds=_WATCHED_LINE_SECONDS))
    return Display(ProgressLines(total, made=made))
