"""Calls of one job made side by side, a few at a time; their results come in order."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from comfy_executors.clients.http import Waiter
from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.executors.control import JobControl

logger = logging.getLogger(__name__)

T = TypeVar("T")
Call = Callable[[Waiter], T]

AT_ONCE = 4
AHEAD = 2 * AT_ONCE  # calls that are begun while the result of the first is not taken


def side_by_side(calls: Sequence[Call[T]], control: JobControl) -> Generator[T, None, None]:
    """Make calls, `AT_ONCE` at a time, and yield what they return, in their order.

    One call is made on the caller's thread, which also takes its part in several. Results that are
    taken slowly do not pile up: no more than `AHEAD` calls are begun whose results were not taken.
    When one fails, those behind it are broken off; at the end, or when the iterator is closed, no
    thread is left.

    Args:
        calls: Each takes the waiter that its waits are to go through.
        control: Its deadline and its cancellation end all of them.

    Raises:
        What the first one, in their order, raised; and as `JobControl.receive` does.
    """
    if len(calls) == 1:
        yield calls[0](control)
    elif calls:
        yield from _Crew(calls, control).results()


class _Crew(Generic[T]):
    """The threads that make the calls."""

    def __init__(self, calls: Sequence[Call[T]], control: JobControl) -> None:
        self.control = control
        self._calls = list(calls)
        self._changed = threading.Condition()
        self._begun: deque[Future[T]] = deque()  # whose results were not taken
        self._next = 0
        self._last = len(calls) - 1  # of those whose results are of use
        self._interrupts: dict[Callable[[], None], int] = {}

    def results(self) -> Generator[T, None, None]:
        helpers = []
        try:
            for _ in range(min(AT_ONCE, len(self._calls)) - 1):
                # A daemon, as the executor's own threads are: it is waited for below, but may be
                # blocked in a read when the interpreter ends.
                helper = threading.Thread(target=self._work, name=_name(), daemon=True)
                try:
                    helper.start()
                except RuntimeError as error:  # out of memory, or the interpreter is about to end
                    logger.info("fewer calls side by side: %s", error)
                    break
                helpers.append(helper)
            for _ in range(len(self._calls)):
                yield self._take()
        finally:
            self._break_off(behind=-1)
            for helper in helpers:
                helper.join()
            # Results can be large, and calls may know them. An error that is kept holds on to us,
            # and so do the answers of our calls, until the garbage collector sees to them.
            self._begun.clear()
            self._calls.clear()

    def _take(self) -> T:
        """Wait for the next result, and make calls meanwhile."""
        while not (self._begun and self._begun[0].done()) and self._make_next():
            pass
        self.control.wait_for(self._begun[0])
        with self._changed:
            future = self._begun.popleft()
            self._changed.notify_all()
        return future.result()

    def _work(self) -> None:
        while self._wait_for_room():
            self._make_next()

    def _wait_for_room(self) -> bool:
        """Wait until a call may be begun; False when there is none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._next > self._last or len(self._begun) < AHEAD)
            return self._next <= self._last

    def _make_next(self) -> bool:
        """Make the next call, if there is one that may be begun."""
        with self._changed:
            if self._next > self._last or len(self._begun) >= AHEAD:
                return False
            index = self._next
            self._next += 1
            future: Future[T] = Future()
            self._begun.append(future)
        try:
            future.set_result(self._calls[index](_CallWaiter(self, index)))
        except BaseException as error:  # whoever waits for it must hear of it
            self._break_off(behind=index)
            future.set_exception(error)
        return True

    def _break_off(self, behind: int) -> None:
        """Break off the calls behind one, and begin no more."""
        with self._changed:
            self._last = min(self._last, behind)
            late = [interrupt for interrupt, i in self._interrupts.items() if i > self._last]
            self._changed.notify_all()
        for interrupt in late:
            interrupt()

    def check(self, index: int) -> None:
        """Raise WorkflowCancelledError when a call is broken off."""
        with self._changed:
            self._check(index)

    @contextlib.contextmanager
    def interrupting(self, interrupt: Callable[[], None], index: int) -> Iterator[None]:
        """Have a call broken off, whether it is for us or for the run."""
        with self._changed:
            self._check(index)
            self._interrupts[interrupt] = index
        try:
            with self.control.interrupting(interrupt):
                yield
        finally:
            with self._changed:
                del self._interrupts[interrupt]

    def _check(self, index: int) -> None:
        if index > self._last:
            raise WorkflowCancelledError("another call of the job failed")


class _CallWaiter:
    """How one of the calls waits."""

    def __init__(self, crew: _Crew[Any], index: int) -> None:
        self._crew = crew
        self._index = index

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        with self.interrupting(woken.set):
            woken.wait(self.limit(seconds))
        self.limit(0)

    def limit(self, seconds: float) -> float:
        self._crew.check(self._index)
        return self._crew.control.limit(seconds)

    def interrupting(self, interrupt: Callable[[], None]) -> AbstractContextManager[None]:
        return self._crew.interrupting(interrupt, self._index)


def _name() -> str:
    # As the thread that waits for it, so that it is known whose it is.
    return f"{threading.current_thread().name} helper"
