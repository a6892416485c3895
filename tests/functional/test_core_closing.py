"""Closing, leaving `with`, and the bridge to event loops."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from core_backend import (
    DEADLINE,
    TEMPLATE,
    GatedExecutor,
    call_in_thread,
    indexes,
    run_freely,
    threads_of,
)

from comfy_executors import ExecutorClosedError, WorkflowCancelledError
from comfy_executors.executors import base


def test_a_normal_end_of_with_runs_everything() -> None:
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(50)
        next(run)
    assert executor.count("end") == 50
    assert len(list(run)) == 49
    assert (threads_of(executor), executor.backend_closed) == ([], 1)


def test_an_error_in_with_cancels() -> None:
    executor = GatedExecutor(max_workers=2)
    with pytest.raises(ZeroDivisionError), executor:  # noqa: PT012
        run = executor.submit(50)
        executor.wait_until("begin", 2)
        raise ZeroDivisionError
    assert executor.count("begin") == executor.count("end") == 2
    assert len(run.errors) == 50
    assert (run.cancelled(), run.done()) == (True, True)


def test_close_may_be_called_again_and_by_several_threads() -> None:
    executor = GatedExecutor(max_workers=1)
    executor.submit(5)
    closings = [call_in_thread(executor.close) for _ in range(3)]
    executor.wait_until("begin", 1)
    executor.close(cancel=True)
    for closing in closings:
        closing.result(DEADLINE)
    assert executor.backend_closed == 1
    with pytest.raises(ExecutorClosedError, match=r"^GatedExecutor is closed$"):
        executor.submit(1)


def test_threads_without_work_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_IDLE_SECONDS", 0.05)
    with GatedExecutor() as executor:
        for tag in ("a", "b"):
            run = executor.submit(1, tag)
            threads = threads_of(executor)
            assert threads
            executor.gate(0, tag).set_result(None)
            assert len(run.result(DEADLINE)) == 1
            for thread in threads:
                thread.join(DEADLINE)
            assert threads_of(executor) == []


def test_an_executor_that_never_worked_closes_its_backend() -> None:
    executor = GatedExecutor()
    executor.close()
    assert executor.backend_closed == 1


def test_an_executor_that_is_dropped_is_not_kept_alive() -> None:
    executor = GatedExecutor()
    forgotten = weakref.ref(executor)
    del executor
    gc.collect()
    assert forgotten() is None


def test_images_come_out_of_an_async_iteration() -> None:
    async def main() -> list[int]:
        async with GatedExecutor(run_freely) as executor:
            return await take_all(executor, 20)

    assert sorted(asyncio.run(main())) == list(range(20))


def test_cancelling_the_task_cancels_the_run() -> None:
    executor = GatedExecutor()

    async def main() -> None:
        task = asyncio.ensure_future(take_all(executor, 10))
        await asyncio.to_thread(executor.wait_until, "begin", 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    executor.wait_until("end", 2)
    executor.close()
    assert executor.count("begin") == 2


def test_cancelling_the_task_while_its_run_starts_cancels_the_run() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(GatedExecutor):
        def submit_workflow(self, *args: Any, **kwargs: Any) -> Any:
            entered.set()
            assert go_on.wait(DEADLINE)
            return super().submit_workflow(*args, **kwargs)

    executor = Slow()

    async def main() -> None:
        task = asyncio.ensure_future(take_all(executor, 10))
        await asyncio.to_thread(entered.wait, DEADLINE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(main())
    call_in_thread(executor.close).result(DEADLINE)
    assert executor.count("begin") <= 2


def test_cancelling_a_task_that_waits_in_async_with_cancels_its_runs() -> None:
    executor = GatedExecutor()

    async def work() -> None:
        async with executor:
            executor.submit(10)

    async def main() -> None:
        task = asyncio.ensure_future(work())
        await asyncio.to_thread(executor.wait_until, "begin", 2)
        while not executor._closed:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    call_in_thread(asyncio.run, main()).result(DEADLINE)
    assert executor.count("end") == 2
    assert threads_of(executor) == []


def test_futures_can_be_awaited() -> None:
    async def main() -> list[int]:
        async with GatedExecutor(run_freely) as executor:
            futures = [asyncio.wrap_future(future) for future in executor.submit(4).futures]
            return [result.index for result in await asyncio.gather(*futures)]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_an_error_in_async_with_cancels() -> None:
    executor = GatedExecutor()
    run: Any = None

    async def main() -> None:
        nonlocal run
        async with executor:
            run = executor.submit(10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    with pytest.raises(WorkflowCancelledError):
        run.result(0)


async def take_all(executor: GatedExecutor, num_samples: int) -> list[int]:
    images = executor.submit_workflow_async(TEMPLATE, num_samples=num_samples, tag="a")
    return indexes([image async for image in images])
