"""Many threads, many runs, cancelled at random: every batch is accounted for."""

from __future__ import annotations

import random
from typing import Any

import pytest
from core_backend import DEADLINE, GatedExecutor, call_in_thread, indexes, threads_of

from comfy_executors import Batch, PromptLostError, WorkflowCancelledError, WorkflowError
from comfy_executors.executors.control import JobControl

CALLERS, RUNS, BATCHES = 6, 12, 15


def misbehave(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
    chance = random.Random(f"{tag} {batch.index} {control.attempt}").random()
    if chance < 0.1:
        raise WorkflowError("boom")
    if chance < 0.12:
        raise PromptLostError("lost")
    if chance < 0.5:
        control.end()
    control.receive(0.002 * chance)


def use(executor: GatedExecutor, caller: int) -> list[tuple[int, int, int]]:
    return [use_once(executor, f"{caller}.{number}") for number in range(RUNS)]


def use_once(executor: GatedExecutor, tag: str) -> tuple[int, int, int]:
    chance = random.Random(tag)
    options = {"ordered": chance.random() < 0.5, "ignore_errors": True}
    run: Any = executor.submit(BATCHES, tag, **options)
    futures = run.futures if chance.random() < 0.3 else []
    for future in futures[::4]:
        future.cancel()
    delivered = 0
    stop_after = chance.randrange(2 * BATCHES)
    for _ in run:
        delivered += 1
        if delivered == stop_after:
            run.cancel()
    assert run.done()
    cancelled = sum(isinstance(e, WorkflowCancelledError) for e in run.errors.values())
    return delivered, len(run.errors) - cancelled, cancelled


@pytest.mark.parametrize("max_workers", [1, 4])
def test_delivered_failed_and_cancelled_make_what_was_planned(
    max_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *_: 0.001)
    with GatedExecutor(misbehave, max_workers=max_workers) as executor:
        callers = [call_in_thread(use, executor, caller) for caller in range(CALLERS)]
        counts = [count for caller in callers for count in caller.result(DEADLINE)]
        assert len(threads_of(executor)) <= 2 * max_workers
    assert [sum(count) for count in counts] == [BATCHES] * CALLERS * RUNS
    assert all(sum(kind) > 0 for kind in zip(*counts))
    assert executor.count("begin") == executor.count("end")
    assert threads_of(executor) == []


def test_closing_in_the_midst_of_it_leaves_nothing_behind() -> None:
    executor = GatedExecutor(misbehave, max_workers=3)
    runs = [executor.submit(50, str(number), ignore_errors=True) for number in range(10)]
    iterations = [call_in_thread(indexes, run) for run in runs]
    executor.wait_until("end", 60)
    executor.close(cancel=True)
    delivered = [len(iteration.result(DEADLINE)) for iteration in iterations]
    assert [n + len(run.errors) for n, run in zip(delivered, runs)] == [50] * 10
    assert threads_of(executor) == []
