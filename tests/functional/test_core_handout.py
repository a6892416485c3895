"""How batches are handed out: the window, places, turns among runs, retries, deadlines."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from core_backend import (
    DEADLINE,
    GatedExecutor,
    call_in_thread,
    indexes,
    run_freely,
    threads_of,
)

from comfy_executors import (
    Batch,
    ProgressEvent,
    PromptLostError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
)
from comfy_executors.executors.control import JobControl


def test_a_slow_consumer_bounds_what_is_handed_out() -> None:
    taken, ahead = 0, []

    def record(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        ahead.append(executor.count("begin") - taken)

    with GatedExecutor(record, max_workers=2) as executor:
        run = executor.submit(30)
        executor.wait_until("end", 4)  # the window: two more than there are places
        for _ in run:
            taken += 1
            executor.wait_until("end", min(30, 4 + taken - 1))
    assert taken == 30
    assert max(ahead) in (4, 5)  # a batch counts as taken while its image is on its way to us


def test_taken_images_are_not_kept() -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    with GatedExecutor(run_freely, max_workers=2) as executor:
        for image in executor.submit(40):
            alive.add(image)
            del image
            gc.collect()
            most = max(most, len(alive))
    assert most <= 1


@pytest.mark.parametrize("lift", ["futures", "result", "outputs", "output_dir", "close"])
def test_what_wants_everything_lifts_the_bound(lift: str, tmp_path: Path) -> None:
    executor = GatedExecutor(run_freely, max_workers=1)
    run = executor.submit(20, output_dir=tmp_path if lift == "output_dir" else None)
    if lift == "futures":
        assert len(run.futures) == 20
    elif lift in ("result", "outputs"):
        getattr(run, lift)(DEADLINE)
    elif lift == "close":
        executor.close()
    executor.wait_until("end", 20)
    assert indexes(sorted(run, key=lambda image: image.batch_index)) == list(range(20))
    executor.close()


def test_runs_take_turns() -> None:
    with GatedExecutor(max_workers=1) as executor:
        runs = [executor.submit(3, "a")]
        executor.wait_until("begin", 1)
        runs += [executor.submit(3, tag) for tag in "bc"]
        for tag in "cba":  # the gate that is closed opens last
            executor.open_gates(3, tag)
        assert [len(run.result(DEADLINE)) for run in runs] == [3, 3, 3]
    begun = [tag for kind, tag, _ in executor.journal if kind == "begin"]
    assert begun == list("aabcabcbc")


def test_a_run_that_is_stopping_does_not_keep_another_from_starting() -> None:
    held = threading.Event()

    def download(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        control.end()
        if (tag, batch.index) == ("slow", 0):  # deaf to its cancel signal for a while
            assert held.wait(DEADLINE)

    with GatedExecutor(download, max_workers=2) as executor:
        slow = executor.submit(100, "slow")
        executor.wait_until("end", 3)
        slow.cancel()
        for _ in range(20):  # the threads may be on their way to idleness, at first
            assert len(executor.submit(1, "next").result(5)) == 1  # less than an idle one waits
        held.set()


def test_a_place_is_free_once_execution_ended() -> None:
    downloaded = threading.Event()

    def download(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        control.end()
        if batch.index == 0:
            assert downloaded.wait(DEADLINE)

    with GatedExecutor(download, max_workers=1) as executor:
        run = executor.submit(2)
        assert next(run).batch_index == 1  # while the first one still downloads
        downloaded.set()
        assert indexes(run) == [0]


def test_places_are_never_exceeded_while_batches_execute() -> None:
    executing, most = 0, 0
    lock = threading.Lock()

    def execute(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        nonlocal executing, most
        with lock:
            executing += 1
            most = max(most, executing)
        control.limit(1.0)
        with lock:
            executing -= 1
        control.end()

    with GatedExecutor(execute, max_workers=3) as executor:
        runs = [executor.submit(40, tag) for tag in "abcd"]
        assert sum(len(run.result(DEADLINE)) for run in runs) == 160
        assert len(threads_of(executor)) <= 2 * 3
    assert most <= 3


def lose(times: int) -> Any:
    def behave(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        if control.attempt <= times:
            raise PromptLostError(f"lost {control.attempt}")

    return behave


def test_a_lost_prompt_is_run_again() -> None:
    events: list[Any] = []
    with GatedExecutor(lose(2)) as executor:
        run = executor.submit(1, on_progress=events.append)
        result = run.futures[0].result(DEADLINE)
    assert result.attempts == 3
    assert [event.kind for event in events] == [
        "started", "retry", "started", "retry", "started", "done",
    ]  # fmt: skip
    assert [event.message for event in events if event.kind == "retry"] == ["lost 1", "lost 2"]


def test_after_three_attempts_the_last_error_counts() -> None:
    with GatedExecutor(lose(9)) as executor:
        run = executor.submit(1)
        with pytest.raises(PromptLostError, match="lost 3") as caught:
            run.result(DEADLINE)
    assert executor.count("begin") == 3
    assert caught.value.batch_index == 0
    assert run.errors == {0: caught.value}


def test_cancelling_cuts_the_backoff_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *_: 3600.0)
    backing_off = threading.Event()

    def hear(event: ProgressEvent) -> None:
        if event.kind == "retry":
            backing_off.set()

    with GatedExecutor(lose(1)) as executor:
        run = executor.submit(1, on_progress=hear)
        assert backing_off.wait(DEADLINE)
        assert run.cancel()
        with pytest.raises(WorkflowCancelledError):
            run.result(DEADLINE)
    assert executor.count("begin") == 1


def test_other_errors_are_not_retried() -> None:
    with GatedExecutor() as executor:
        run = executor.submit(1)
        executor.gate(0).set_exception(ServerUnreachableError("gone"))
        with pytest.raises(ServerUnreachableError):
            run.result(DEADLINE)
    assert executor.count("begin") == 1


def test_an_unforeseen_exception_is_logged_and_delivered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with GatedExecutor() as executor:
        run = executor.submit(2, ignore_errors=True)
        executor.gate(0).set_exception(ZeroDivisionError("a bug"))
        executor.open_gates(2)
        assert indexes(run) == [1]
    assert isinstance(run.errors[0], ZeroDivisionError)
    (told,) = [record for record in caplog.records if record.name.endswith("executors.base")]
    assert told.message == "batch 0 failed in an unforeseen way"


def test_a_backend_without_a_result_is_an_error() -> None:
    class Forgetful(GatedExecutor):
        def _run_job(self, job: Any, control: JobControl) -> Any:
            return iter(())

    with Forgetful() as executor, pytest.raises(WorkflowError, match=r"without a result for \[0\]"):
        executor.submit(1).result(DEADLINE)


def test_an_error_does_not_hide_images_that_are_there() -> None:
    with GatedExecutor(max_workers=3) as executor:
        run = executor.submit(3)
        executor.wait_until("begin", 3)
        executor.gate(0).set_exception(WorkflowError("boom"))
        assert run.futures[0].exception(DEADLINE)
        executor.open_gates(3)
        wait(run.futures, DEADLINE)
        assert sorted([next(run).batch_index, next(run).batch_index]) == [1, 2]
        with pytest.raises(WorkflowError, match="boom"):
            next(run)


def test_the_timeout_of_a_run_counts_while_another_has_all_places() -> None:
    with GatedExecutor(max_workers=1) as executor:
        busy = executor.submit(1, "busy")
        executor.wait_until("begin", 1)
        late = executor.submit(3, "late", timeout=0.05)
        with pytest.raises(WorkflowTimeoutError, match=r"timeout of 0\.05 s"):
            late.futures[2].result(DEADLINE)
        assert not busy.done()
        assert executor.count("begin") == 1
        executor.open_gates(1, "busy")
        assert len(busy.result(DEADLINE)) == 1


def test_an_idle_thread_hears_of_a_new_deadline() -> None:
    with GatedExecutor(max_workers=2) as executor:
        executor.open_gates(2, "warm")
        executor.submit(2, "warm").result(DEADLINE)
        busy = executor.submit(2, "busy")
        executor.wait_until("begin", 2, "busy")
        late = call_in_thread(executor.submit(1, "late", timeout=0.05).result)
        with pytest.raises(WorkflowTimeoutError):
            late.result(5)  # less than an idle thread waits
        executor.open_gates(2, "busy")
        assert len(busy.result(DEADLINE)) == 2


def test_a_batch_that_executes_too_long_fails_alone() -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(2, batch_timeout=0.05, ignore_errors=True)
        executor.gate(1).set_result(None)
        assert indexes(run) == [1]
    assert isinstance(run.errors[0], WorkflowTimeoutError)
    assert "batch_timeout of 0.05 s" in str(run.errors[0])


def test_a_run_out_of_time_fails_its_running_and_its_waiting_batches() -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(3, timeout=0.05, ignore_errors=True)
        assert run.result(DEADLINE) == []
    assert [type(error) for error in run.errors.values()] == [WorkflowTimeoutError] * 3
    assert executor.count("begin") <= 1


def test_an_attempt_that_comes_too_late_does_not_begin() -> None:
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(4, timeout=1e-9, ignore_errors=True)
        assert run.result(DEADLINE) == []
    assert executor.journal == []


def test_no_thread_is_made_beyond_need() -> None:
    with GatedExecutor(max_workers=4) as executor:
        executor.open_gates(1)
        executor.submit(1).result(DEADLINE)
        for _ in range(20):
            executor.submit(1).result(DEADLINE)
        assert len(threads_of(executor)) <= 2


def test_when_no_thread_can_be_started_the_executor_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    executor = GatedExecutor(run_freely)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="GatedExecutor cannot work: can't start new"):
            executor.submit(1)
    assert len(executor.submit(1).result(DEADLINE)) == 1
    executor.close()
    assert executor.journal == [("begin", "a", 0), ("end", "a", 0)]
