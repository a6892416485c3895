"""What callers hold: futures and their callbacks, shared iteration, waiting, signal handlers."""

from __future__ import annotations

import concurrent.futures
import logging
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import CancelledError
from typing import Any

import pytest
from core_backend import DEADLINE, GatedExecutor, call_in_thread, indexes, run_freely, threads_of

from comfy_executors import (
    BatchResult,
    ProgressEvent,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowOutput,
    WorkflowTimeoutError,
)


def test_futures_asked_for_late_have_the_state_of_their_batch() -> None:
    with GatedExecutor(max_workers=2) as executor:
        run = executor.submit(4, ignore_errors=True)
        executor.gate(0).set_exception(WorkflowError("boom"))
        executor.gate(1).set_result(None)
        executor.wait_until("begin", 4)
        first, second, third, _ = run.futures
        assert str(first.exception(DEADLINE)) == "boom"
        assert second.result(DEADLINE).index == 1
        assert third.running()
        executor.open_gates(4)


def test_futures_of_a_cancelled_run_are_settled() -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(20)
        executor.wait_until("begin", 1)
        run.cancel()
        futures = run.futures
        assert isinstance(futures[0].exception(DEADLINE), WorkflowCancelledError)
        assert all(future.cancelled() for future in futures[1:])
        assert len(concurrent.futures.wait(futures, DEADLINE).done) == 20


def test_futures_of_a_run_out_of_time_are_settled() -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(20, timeout=0.01, ignore_errors=True)
        assert run.result(DEADLINE) == []
        errors = [future.exception(DEADLINE) for future in run.futures]
    assert [type(error) for error in errors] == [WorkflowTimeoutError] * 20


def test_cancelled_futures_are_never_run_and_end_the_run() -> None:
    executor = GatedExecutor(max_workers=1)
    run = executor.submit(5, ignore_errors=True)
    executor.wait_until("begin", 1)
    assert [future.cancel() for future in run.futures] == [False, True, True, True, True]
    closing = call_in_thread(executor.close)
    executor.gate(0).set_result(None)
    closing.result(DEADLINE)
    assert run.done()
    assert executor.count("begin") == 1
    assert sorted(run.errors) == [1, 2, 3, 4]
    assert indexes(run) == [0]


@pytest.mark.parametrize("action", ["cancel", "submit", "close", "result", "futures"])
def test_a_callback_may_call_back(action: str) -> None:
    executor = GatedExecutor(max_workers=2)
    run = executor.submit(6)
    executor.wait_until("begin", 2)
    seen: list[Any] = []
    heard = threading.Event()

    def call_back(future: Any) -> None:
        if action == "cancel":
            seen.append(run.cancel())
        elif action == "submit":
            seen.append(executor.submit(1, "more"))
        elif action == "close":
            executor.close(cancel=True)
            seen.append(None)
        elif action == "result":
            with pytest.raises(WaitTimeoutError):
                run.result(0)
            seen.append(None)
        else:
            seen.append(run.futures)

    run.futures[0].add_done_callback(call_back)
    run.futures[0].add_done_callback(lambda _: heard.set())
    executor.open_gates(1)
    executor.open_gates(1, "more")
    assert heard.wait(DEADLINE)
    executor.open_gates(6)
    concurrent.futures.wait(run.futures, DEADLINE)
    call_in_thread(executor.close).result(DEADLINE)
    assert len(seen) == 1
    assert threads_of(executor) == []
    assert executor.backend_closed == 1


def test_progress_callbacks_that_close_do_not_wait_for_each_other() -> None:
    executor = GatedExecutor(max_workers=4)

    def close(event: ProgressEvent) -> None:
        executor.close(cancel=True)

    run = executor.submit(8, on_progress=close, ignore_errors=True)
    assert call_in_thread(run.result).result(DEADLINE) == []
    call_in_thread(executor.close).result(DEADLINE)
    assert threads_of(executor) == []


def test_the_last_thread_closes_the_backend_for_a_callback() -> None:
    executor = GatedExecutor()
    closed = threading.Event()
    executor._close_backend = closed.set  # type: ignore[method-assign]
    run = executor.submit(1)
    run.futures[0].add_done_callback(lambda _: executor.close())
    executor.gate(0).set_result(None)
    assert closed.wait(DEADLINE)


def test_a_callback_that_exits_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(3)
        executor.wait_until("begin", 1)
        for future in run.futures:
            future.add_done_callback(lambda _: sys.exit("from a callback"))
        executor.gate(1).set_exception(WorkflowError("boom"))
        executor.open_gates(3)
        concurrent.futures.wait(run.futures, DEADLINE)
        executor.open_gates(3, "next")
        assert len(executor.submit(3, "next").result(DEADLINE)) == 3
        assert [future.exception() is None for future in run.futures] == [True, False, True]
        assert repr(run) == "<WorkflowRun batches=3 running=0 done=2 failed=1>"
    assert Counter(record.message for record in caplog.records) == {
        "raised after its batch was settled, by a callback": 3
    }


def test_on_progress_may_raise_and_even_exit(caplog: pytest.LogCaptureFixture) -> None:
    def exit_now(event: ProgressEvent) -> None:
        sys.exit("from on_progress")

    with GatedExecutor(run_freely) as executor:
        assert len(executor.submit(5, on_progress=exit_now).result(DEADLINE)) == 5
    assert len(caplog.records) == 1  # and not once for each of the ten events


def test_on_progress_is_called_by_one_thread_at_a_time() -> None:
    inside, most, calls = 0, 0, 0
    lock = threading.Lock()

    def count(event: ProgressEvent) -> None:
        nonlocal inside, most, calls
        with lock:
            inside += 1
            calls += 1
            most = max(most, inside)
        with lock:
            inside -= 1

    with GatedExecutor(run_freely, max_workers=4) as executor:
        executor.submit(200, on_progress=count).result(DEADLINE)
    assert (most, calls) == (1, 400)


@pytest.mark.parametrize("ordered", [True, False])
def test_threads_may_share_an_iteration(ordered: bool) -> None:
    with GatedExecutor(run_freely, max_workers=4) as executor:
        run = executor.submit(400, ordered=ordered)
        parts = [call_in_thread(indexes, run) for _ in range(5)]
        taken = [part.result(DEADLINE) for part in parts]
    assert sorted(index for part in taken for index in part) == list(range(400))
    if ordered:
        assert all(part == sorted(part) for part in taken)


def test_all_threads_of_a_shared_iteration_hear_of_an_error() -> None:
    with GatedExecutor(max_workers=1) as executor:
        run = executor.submit(3)
        parts = [call_in_thread(indexes, run) for _ in range(3)]
        executor.wait_until("begin", 1)
        executor.gate(0).set_exception(WorkflowError("boom"))
        assert [str(part.exception(DEADLINE)) for part in parts] == ["boom"] * 3


def test_an_iterator_that_has_ended_stays_ended() -> None:
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(3)
        assert len(list(run)) == 3
        assert [next(run, None), next(run, None)] == [None, None]


def test_waiting_for_ages_is_no_error() -> None:
    with GatedExecutor() as executor:
        run = executor.submit(1)
        waiting = call_in_thread(run.result, 1e12)
        executor.wait_until("begin", 1)
        executor.gate(0).set_result(None)
        assert indexes(waiting.result(DEADLINE)) == [0]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_signal_handler_may_cancel_at_any_moment() -> None:
    with GatedExecutor() as executor:
        run = executor.submit(5)
        executor.wait_until("begin", 2)
        before = signal.signal(signal.SIGUSR1, lambda *_: run.cancel())
        try:
            with executor._lock:  # the main thread may be here when the signal comes
                signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        with pytest.raises(CancelledError):
            run.result(DEADLINE)


def test_a_run_without_images_says_where_its_outputs_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Films(GatedExecutor):
        def _run_job(self, job: Any, control: Any) -> Any:
            for batch in job.batches:
                film = WorkflowOutput(b"film", name="film.mp4", batch_index=batch.index)
                yield BatchResult(batch.index, [], [film])

    with Films() as executor, caplog.at_level(logging.WARNING):
        run = executor.submit(3)
        assert list(run) == []
        assert [film.name for film in run.outputs(DEADLINE)] == ["film.mp4"] * 3
    assert [record.message for record in caplog.records if "nobody" not in record.message] == [
        "the run made no image but 3 other outputs; they are on run.outputs()"
    ]
