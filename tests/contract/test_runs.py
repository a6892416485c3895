"""What a caller can do with a run: futures, waiting, cancelling, errors, progress, threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import DEADLINE, TEMPLATE, Backend

from comfy_executors import (
    BaseWorkflowExecutor,
    ResultsTakenError,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)

Submit = Callable[..., Any]


class Pause:
    """An `on_progress` that holds its run at the first event until the test lets go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, event: object) -> None:
        self.reached.set()
        assert self.let_go.wait(DEADLINE)


@pytest.fixture
def pause() -> Any:
    pause = Pause()
    yield pause
    pause.let_go.set()


def test_futures_are_the_standard_librarys(submit: Submit) -> None:
    futures = submit(20).futures
    heard: list[Any] = []
    futures[0].add_done_callback(heard.append)
    completed = list(concurrent.futures.as_completed(futures, DEADLINE))
    assert all(type(future) is Future for future in futures)
    assert set(completed) == set(futures)
    assert concurrent.futures.wait(futures, 0).not_done == set()
    assert heard == futures[:1]


def test_futures_can_be_awaited(submit: Submit) -> None:
    async def main() -> list[int]:
        futures = [asyncio.wrap_future(future) for future in submit(20).futures]
        return [result.index for result in await asyncio.gather(*futures)]

    assert asyncio.run(main()) == [0, 1, 2]


def test_a_pending_future_can_be_cancelled(submit: Submit, backend: Backend, pause: Pause) -> None:
    run = submit(12, batch_size=1, ignore_errors=True, on_progress=pause)
    assert pause.reached.wait(DEADLINE)
    assert run.futures[11].cancel() is not backend.hands_out_all
    pause.let_go.set()
    if backend.hands_out_all:
        assert sorted(image.batch_index for image in run) == list(range(12))
        return
    assert sorted(image.batch_index for image in run) == list(range(11))
    assert isinstance(run.errors[11], WorkflowCancelledError)


def test_waiting_too_long_leaves_the_run_going(submit: Submit, pause: Pause) -> None:
    run = submit(3, batch_size=1, on_progress=pause)
    assert pause.reached.wait(DEADLINE)
    with pytest.raises(WaitTimeoutError, match=r"of 3 batches were done after 0\.01 s"):
        run.result(timeout=0.01)
    assert not run.done()
    pause.let_go.set()
    assert len(run.result(DEADLINE)) == 3
    assert run.done()


def test_results_that_were_taken_cannot_be_had_again(submit: Submit) -> None:
    run = submit(20)
    next(run)
    with pytest.raises(ResultsTakenError, match=r"result\(\)"):
        run.result(DEADLINE)
    with pytest.raises(ResultsTakenError, match="futures"):
        _ = run.futures
    assert len(list(run)) == 19


def test_cancelling_at_once(submit: Submit) -> None:
    run = submit(100, batch_size=1)
    assert run.cancel()
    assert run.cancelled()
    with pytest.raises(CancelledError):
        run.result(DEADLINE)
    concurrent.futures.wait(run.futures, DEADLINE)
    assert run.done()
    assert all(isinstance(error, WorkflowCancelledError) for error in run.errors.values())


def test_cancelling_in_the_midst(submit: Submit, pause: Pause) -> None:
    run = submit(100, batch_size=1, on_progress=pause, ignore_errors=True)
    assert pause.reached.wait(DEADLINE)
    assert run.cancel()
    pause.let_go.set()
    delivered = [image.batch_index for image in run]
    assert sorted([*delivered, *run.errors]) == list(range(100))
    assert len(run.errors) >= 100 - 8
    assert run.done()


def test_cancelling_what_is_done(submit: Submit) -> None:
    run = submit(2)
    images = run.result(DEADLINE)
    assert not run.cancel()
    assert not run.cancelled()
    assert run.result(0) == images
    assert run.errors == {}


@pytest.mark.parametrize("ignore_errors", [True, False])
def test_a_run_out_of_time(submit: Submit, ignore_errors: bool) -> None:
    run = submit(20, timeout=1e-6, ignore_errors=ignore_errors)
    if ignore_errors:
        assert run.result(DEADLINE) == []
    else:
        with pytest.raises(TimeoutError) as caught:
            run.result(DEADLINE)
        assert isinstance(caught.value, WorkflowTimeoutError)
    concurrent.futures.wait(run.futures, DEADLINE)
    assert sorted(run.errors) == [0, 1, 2]


def test_enough_time_changes_nothing(submit: Submit) -> None:
    assert len(submit(20, timeout=DEADLINE, batch_timeout=DEADLINE).result(DEADLINE)) == 20


def test_progress_is_told_from_one_thread_at_a_time(submit: Submit) -> None:
    inside = threading.Lock()
    events: list[Any] = []

    def record(event: Any) -> None:
        assert inside.acquire(blocking=False), "two threads at once"
        events.append(event)
        inside.release()

    submit(20, on_progress=record).result(DEADLINE)
    kinds = Counter(event.kind for event in events)
    assert (kinds["started"], kinds["done"], kinds["failed"]) == (3, 3, 0)
    done = [event for event in events if event.kind == "done"]
    assert sorted((event.batch, event.step, event.max) for event in done) == [
        (0, 8, 8), (1, 8, 8), (2, 4, 4)
    ]  # fmt: skip


def test_what_progress_raises_is_logged(submit: Submit, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: object) -> None:
        raise ZeroDivisionError

    assert len(submit(8, on_progress=fail).result(DEADLINE)) == 8
    logged = [r for r in caplog.records if r.message.startswith("on_progress raised")]
    assert len(logged) == 1
    assert all(r.exc_info and r.exc_info[0] is ZeroDivisionError for r in logged)


def test_threads_share_an_executor(submit: Submit) -> None:
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda n: submit(n, seed=n).result(DEADLINE), range(1, 13)))
    assert [len(part) for part in images] == list(range(1, 13))
    assert [part[0].seed for part in images] == list(range(1, 13))


def test_threads_share_an_iteration(submit: Submit) -> None:
    run = submit(30, batch_size=2)
    with ThreadPoolExecutor(3) as pool:
        parts: list[list[Any]] = list(pool.map(list, [run] * 3))
    assert Counter(i.batch_index for part in parts for i in part) == dict.fromkeys(range(15), 2)


def test_async_iteration(executor: BaseWorkflowExecutor) -> None:
    async def main() -> list[int]:
        images = executor.submit_workflow_async(TEMPLATE, num_samples=20, color=0)
        return [image.batch_index async for image in images]

    assert Counter(asyncio.run(main())) == {0: 8, 1: 8, 2: 4}


def test_leaving_an_async_iteration_cancels_the_run(executor: BaseWorkflowExecutor) -> None:
    async def main() -> None:
        images: Any = executor.submit_workflow_async(
            TEMPLATE, num_samples=5000, batch_size=1, color=0
        )
        async for _ in images:
            break
        await images.aclose()

    asyncio.run(main())
    executor.close()  # which would otherwise make the other images first
    assert "runs=0" in repr(executor)
