"""What is done once for all threads, while some of them wait for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from comfy_executors.errors import WorkflowCancelledError
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.once import Once
from comfy_executors.runs import Job, RunOptions, WorkflowRun

PATIENCE = 10.0


def control() -> JobControl:
    run = WorkflowRun(
        [], Job(()), RunOptions(), lock=threading.RLock(), window=1, on_room=lambda: None
    )
    return JobControl(run, lambda: None)


class Slow:
    """An action that begins, and ends when it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.began = threading.Event()
        self.let_go = threading.Event()
        self.times = 0
        self._error = error

    def __call__(self) -> None:
        self.times += 1
        self.began.set()
        assert self.let_go.wait(PATIENCE)
        if self._error is not None:
            raise self._error


class Told(JobControl):
    """A control that says when it begins to wait."""

    def __init__(self) -> None:
        vars(self).update(vars(control()))
        self.waits = threading.Event()

    def wait_for(self, future: Any) -> None:
        self.waits.set()
        super().wait_for(future)


def test_the_second_waits_for_the_first() -> None:
    once, slow, second = Once(), Slow(), Told()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(once.do, "a", control(), slow)
        assert slow.began.wait(PATIENCE)
        other = pool.submit(once.do, "a", second, slow)
        assert second.waits.wait(PATIENCE)
        assert not other.done()
        slow.let_go.set()
        assert (first.result(PATIENCE), other.result(PATIENCE)) == (True, False)
    assert slow.times == 1
    assert once.do("b", control(), slow)


def test_what_failed_is_done_by_the_next() -> None:
    once, slow, second = Once(), Slow(ZeroDivisionError()), Told()
    done: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(once.do, "a", control(), slow)
        assert slow.began.wait(PATIENCE)
        other = pool.submit(once.do, "a", second, lambda: done.append(1))
        assert second.waits.wait(PATIENCE)
        slow.let_go.set()
        assert isinstance(first.exception(PATIENCE), ZeroDivisionError)
        assert other.result(PATIENCE)
    assert done == [1]


def test_waiting_can_be_cancelled() -> None:
    once, slow, second = Once(), Slow(), Told()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(once.do, "a", control(), slow)
        assert slow.began.wait(PATIENCE)
        other = pool.submit(once.do, "a", second, slow)
        assert second.waits.wait(PATIENCE)
        second.cancel("enough")
        with pytest.raises(WorkflowCancelledError, match="enough"):
            other.result(PATIENCE)
        slow.let_go.set()


def test_what_is_forgotten_is_done_again() -> None:
    once = Once()
    done: list[int] = []
    for expected in (True, False):
        assert once.do("a", control(), lambda: done.append(1)) is expected
    once.forget()
    assert once.do("a", control(), lambda: done.append(1))
    assert done == [1, 1]
