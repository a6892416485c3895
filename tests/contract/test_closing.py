"""Closing an executor: what it waits for, what it leaves behind, what it shows."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest
from conftest import DEADLINE, TEMPLATE, Backend, sockets_to

from comfy_executors import ExecutorClosedError, WorkflowError


def test_with_waits_though_nobody_iterates(backend: Backend) -> None:
    with backend.make(batch_size=1) as executor:
        run = executor.submit_workflow(TEMPLATE, num_samples=20, color=1)
    assert run.done()
    assert run.errors == {}
    assert len(list(run)) == 20


def test_with_cancels_on_an_error(backend: Backend) -> None:
    with pytest.raises(ZeroDivisionError), backend.make() as executor:  # noqa: PT012
        run = executor.submit_workflow(TEMPLATE, num_samples=2000, color=2, ignore_errors=True)
        raise ZeroDivisionError
    assert run.done()
    assert run.cancelled()
    assert len(list(run)) + len(run.errors) == 2000


def test_async_with_waits(backend: Backend) -> None:
    async def main() -> Any:
        async with backend.make(batch_size=4) as executor:
            return executor.submit_workflow(TEMPLATE, num_samples=8, color=3)

    assert len(asyncio.run(main()).result(0)) == 8


def test_a_cancelled_task_cancels_its_run(backend: Backend) -> None:
    async def main() -> None:
        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hear(event: object) -> None:
            loop.call_soon_threadsafe(began.set)

        async def iterate() -> None:
            async with backend.make() as executor:
                images = executor.submit_workflow_async(
                    TEMPLATE, num_samples=5000, color=4, on_progress=hear
                )
                async for _ in images:
                    pass

        task = asyncio.ensure_future(iterate())
        await asyncio.wait_for(began.wait(), DEADLINE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_closed_executor_takes_no_work(backend: Backend) -> None:
    executor = backend.make()
    executor.close()
    executor.close()
    before = backend.requests()
    with pytest.raises(ExecutorClosedError, match="is closed"):
        executor.submit_workflow(TEMPLATE, color=5)
    assert backend.requests() == before


@pytest.mark.parametrize("cancel", [True, False])
def test_nothing_is_left_after_closing(backend: Backend, cancel: bool) -> None:
    before = set(threading.enumerate())
    executor = backend.make()
    run = executor.submit_workflow(TEMPLATE, num_samples=20, color=6, ignore_errors=True)
    next(run)
    if backend.port and os.path.exists("/proc/self/net/tcp"):
        assert sockets_to(backend.port) > 0
    executor.close(cancel=cancel)
    left = [thread for thread in threading.enumerate() if thread not in before]
    # The service stands in this process, too, and its loop starts threads when it likes.
    of_loops = ("asyncio_", "uvloop_")
    assert [thread for thread in left if not thread.name.startswith(of_loops)] == []
    if backend.port and os.path.exists("/proc/self/net/tcp"):
        assert sockets_to(backend.port) == 0


def test_closing_from_a_callback_ends_the_threads(backend: Backend) -> None:
    executor = backend.make(max_workers=2)
    run = executor.submit_workflow(
        TEMPLATE,
        num_samples=50,
        color=7,
        ignore_errors=True,
        on_progress=lambda event: executor.close(cancel=True),
    )
    delivered = list(run)
    executor.close()
    assert len(delivered) + len(run.errors) == 50
    assert not any(type(executor).__name__ == thread.name for thread in threading.enumerate())


def test_no_secret_is_shown(backend: Backend) -> None:
    with backend.make() as executor:
        run = executor.submit_workflow(TEMPLATE, num_samples=2, color=8, timeout=DEADLINE)
        result = run.futures[0].result(DEADLINE)
        shown = [executor, run, run.batches[0], result, result.images[0], run.job]
        text = " ".join(map(repr, [*shown, WorkflowError("x", server=result.server)]))
    assert repr(executor).startswith(f"<{type(executor).__name__} ")
    assert repr(executor).endswith("batch_size=1 max_workers=4 runs=0 closed>")
    assert [secret for secret in backend.secrets if secret in text] == []
