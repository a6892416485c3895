"""Calls of one batch side by side: how many, in which order, and what ends them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from core_backend import DEADLINE, GatedExecutor, helpers

from comfy_executors import Batch, WorkflowCancelledError, WorkflowTimeoutError
from comfy_executors.clients.http import Waiter
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.side_by_side import AHEAD, AT_ONCE, side_by_side

LONG = 3600.0


class Crowd:
    """Calls that count how many of them are being made."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = self.most = self.begun = 0

    def __enter__(self) -> None:
        with self.changed:
            self.inside += 1
            self.begun += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.inside -= 1

    def wait_for(self, begun: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun >= begun, DEADLINE)


def in_a_job(work: Callable[[JobControl], Any], **options: Any) -> tuple[list[Any], Any]:
    """Do something as a backend does; gives what it returned, and its run when that has ended."""
    returned: list[Any] = []

    def behave(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        returned.append(work(control))

    with GatedExecutor(behave) as executor:
        run = executor.submit(1, ignore_errors=True, **options)
        for future in run.futures:
            future.exception(DEADLINE)
        assert helpers() == []
    return returned, run


def test_a_few_at_a_time_and_in_order() -> None:
    crowd, together = Crowd(), threading.Barrier(AT_ONCE)

    def call(index: int, waiter: Waiter) -> int:
        with crowd:
            together.wait(DEADLINE)
            return index

    def work(control: JobControl) -> list[int]:
        calls = [lambda waiter, i=i: call(i, waiter) for i in range(3 * AT_ONCE)]
        return list(side_by_side(calls, control))

    returned, run = in_a_job(work)
    assert run.errors == {}
    assert returned == [list(range(3 * AT_ONCE))]
    assert crowd.most == AT_ONCE


class Result:
    """What can be seen to be gone."""


def test_results_that_nobody_takes_do_not_pile_up_and_those_taken_are_let_go() -> None:
    crowd = Crowd()

    def call(waiter: Waiter) -> Result:
        with crowd:
            return Result()

    def work(control: JobControl) -> list[int]:
        results = side_by_side([call] * 100, control)
        begun = []
        for count in range(1, 60):
            gone = threading.Event()
            weakref.finalize(next(results), gone.set)
            crowd.wait_for(count + AHEAD)  # all that may begin now
            begun.append(crowd.begun - count)
            assert gone.wait(DEADLINE)
        results.close()
        return begun

    returned, run = in_a_job(work)
    assert run.errors == {}
    assert {*returned[0]} == {AHEAD}
    assert crowd.begun == 59 + AHEAD


@pytest.mark.parametrize("count", [0, 1])
def test_one_call_needs_no_thread(count: int) -> None:
    def work(control: JobControl) -> list[bool]:
        here = threading.current_thread()
        calls = [lambda waiter: threading.current_thread() is here and waiter is control] * count
        return list(side_by_side(calls, control))

    assert in_a_job(work)[0] == [[True] * count]


def test_the_first_error_in_order_is_raised_and_the_others_are_broken_off() -> None:
    crowd, later_failed = Crowd(), threading.Event()

    def call(index: int, waiter: Waiter) -> int:
        with crowd:
            crowd.wait_for(4)
            if index == 2:
                later_failed.set()
                raise KeyError(index)
            if index == 1:
                assert later_failed.wait(DEADLINE)
                raise ZeroDivisionError(index)
            if index == 0:
                return index
            waiter.sleep(LONG)
            return index

    def work(control: JobControl) -> Any:
        calls = [lambda waiter, i=i: call(i, waiter) for i in range(40)]
        return list(side_by_side(calls, control))

    returned, run = in_a_job(work)
    assert returned == []
    assert [type(error) for error in run.errors.values()] == [ZeroDivisionError]
    assert crowd.inside == 0
    assert crowd.begun <= 6  # those behind the one that failed are not begun


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_run_that_ends_breaks_off_all_of_them(how: str) -> None:
    crowd = Crowd()
    broken_off: list[type[BaseException]] = []

    def call(waiter: Waiter) -> None:
        woken = threading.Event()
        try:
            with crowd, waiter.interrupting(woken.set):
                if how == "cancel":
                    assert woken.wait(DEADLINE)
                waiter.sleep(LONG)
        except BaseException as error:
            threading.Event().wait(0.2)  # it is waited for, too
            broken_off.append(type(error))
            raise

    def work(control: JobControl) -> Any:
        return list(side_by_side([call] * 8, control))

    def behave(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        work(control)

    expected = WorkflowCancelledError if how == "cancel" else WorkflowTimeoutError
    with GatedExecutor(behave) as executor:
        run = executor.submit(1, timeout=None if how == "cancel" else 0.5)
        crowd.wait_for(AT_ONCE)
        if how == "cancel":
            run.cancel()
        assert isinstance(run.futures[0].exception(DEADLINE), expected)
        assert helpers() == []
    assert len(broken_off) == AT_ONCE
    assert crowd.inside == 0


def test_a_cancellation_breaks_off_each_call_that_is_being_made() -> None:
    called: list[int] = []
    ready = threading.Event()

    def behave(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        with control.interrupting(lambda: called.append(0)):
            pass
        with (
            control.interrupting(lambda: called.append(1)),
            control.interrupting(lambda: called.append(2)),
        ):
            ready.set()
            control.sleep(LONG)

    with GatedExecutor(behave) as executor:
        run = executor.submit(1)
        assert ready.wait(DEADLINE)
        run.cancel()
        assert isinstance(run.futures[0].exception(DEADLINE), WorkflowCancelledError)
    assert sorted(called) == [1, 2]


def test_without_more_threads_it_does_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(control: JobControl) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            calls = [lambda waiter, i=i: i for i in range(9)]
            return list(side_by_side(calls, control))

    assert in_a_job(work)[0] == [list(range(9))]
