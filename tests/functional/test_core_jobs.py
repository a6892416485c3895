"""Jobs of several batches: how they are handed out, held back, retried, and ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from core_backend import DEADLINE, TEMPLATE, call_in_thread, indexes, picture

from comfy_executors import (
    BaseWorkflowExecutor,
    Batch,
    BatchResult,
    PromptLostError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import BatchFailure, Job


class JobExecutor(BaseWorkflowExecutor):
    """Makes one result after the other, and takes down which; `fail` says what goes wrong."""

    def __init__(self, size: int | None = None, *, max_workers: int = 1) -> None:
        super().__init__(max_workers=max_workers)
        self.size = size
        self.jobs: list[list[int]] = []
        self.made: list[int] = []
        self.closed: list[bool] = []
        self.fail: dict[int, list[BaseException]] = {}
        self.news = threading.Condition()
        self.gate = threading.Event()
        self.gate.set()

    def _job_size(self, batches: Sequence[Batch], job: Job) -> int:
        return self.size or len(batches)

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult | BatchFailure]:
        self.note(self.jobs, [batch.index for batch in job.batches])
        assert self.gate.wait(DEADLINE)
        try:
            for batch in job.batches:
                control.limit(1)
                errors = self.fail.get(batch.index)
                if errors:
                    error = errors.pop()
                    if isinstance(error, PromptLostError):
                        raise error
                    yield BatchFailure(batch.index, error)
                    continue
                self.note(self.made, batch.index)
                yield BatchResult(batch.index, [picture(batch)], seed=batch.seed)
        except GeneratorExit:
            self.note(self.closed, True)
            raise

    def note(self, journal: list[Any], item: Any) -> None:
        with self.news:
            journal.append(item)
            self.news.notify_all()

    def wait_for(self, journal: list[Any], count: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: len(journal) >= count, DEADLINE), journal

    def submit(self, num_samples: int, **options: Any) -> Any:
        return self.submit_workflow(TEMPLATE, num_samples=num_samples, tag="a", **options)


@pytest.mark.parametrize(("size", "jobs"), [(None, [7]), (3, [3, 3, 1]), (7, [7]), (1, [1] * 7)])
def test_a_run_is_divided_into_jobs(size: int | None, jobs: list[int]) -> None:
    with JobExecutor(size) as executor:
        assert indexes(executor.submit(7).result(DEADLINE)) == list(range(7))
    assert [len(job) for job in executor.jobs] == jobs
    assert [index for job in executor.jobs for index in job] == list(range(7))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_slow_consumer_holds_the_results_back(ordered: bool) -> None:
    with JobExecutor(max_workers=2) as executor:
        run = executor.submit(50, ordered=ordered)
        ahead = []
        for taken, image in enumerate(run):
            executor.wait_for(executor.made, min(50, taken + 4))
            ahead.append(len(executor.made) - taken)
            assert image.batch_index == taken
    assert max(ahead) <= 6  # four in the buffer, the one on its way to us, and one taken
    assert len(executor.jobs) == 1


def test_asking_for_everything_lifts_the_bound() -> None:
    with JobExecutor() as executor:
        run = executor.submit(50)
        executor.wait_for(executor.made, 2)
        assert len(run.futures) == 50
        executor.wait_for(executor.made, 50)


def test_a_job_that_is_held_back_does_not_keep_others_waiting() -> None:
    with JobExecutor(max_workers=1) as executor:
        held = [executor.submit(20) for _ in range(5)]
        executor.wait_for(executor.made, 10)  # the buffer of each
        assert len(executor.submit(3).result(DEADLINE)) == 3
        assert [len(list(run)) for run in reversed(held)] == [20] * 5


def test_jobs_that_end_out_of_order_do_not_lock_an_ordered_iteration() -> None:
    with JobExecutor(10, max_workers=4) as executor:
        assert indexes(executor.submit(80, ordered=True)) == list(range(80))


def test_one_failure_leaves_the_other_batches_alone() -> None:
    with JobExecutor() as executor:
        executor.fail = {1: [WorkflowError("bad")]}
        run = executor.submit(4, ignore_errors=True)
        assert indexes(run) == [0, 2, 3]
    assert [str(error) for error in run.errors.values()] == ["bad"]
    assert run.errors[1].batch_index == 1


def test_a_failure_stops_the_job_and_the_backend() -> None:
    with JobExecutor() as executor:
        executor.fail = {0: [WorkflowError("bad")]}
        run = executor.submit(50)
        with pytest.raises(WorkflowError, match="bad"):
            list(run)
    assert executor.closed == [True]
    assert len(executor.made) <= 4


def test_what_is_lost_is_run_again_alone() -> None:
    with JobExecutor() as executor:
        executor.fail = {2: [PromptLostError("gone"), PromptLostError("gone")]}
        run = executor.submit(4)
        results = [future.result(DEADLINE) for future in run.futures]
    assert executor.jobs == [[0, 1, 2, 3], [2, 3], [2, 3]]
    assert [result.attempts for result in results] == [1, 1, 3, 3]


def test_an_error_of_the_whole_job_names_each_batch() -> None:
    with JobExecutor() as executor:
        executor.fail = {1: [PromptLostError("gone") for _ in range(9)]}
        run = executor.submit(3, ignore_errors=True)
        assert indexes(run) == [0]
    assert [error.batch_index for error in run.errors.values()] == [1, 2]
    assert {type(error) for error in run.errors.values()} == {PromptLostError}


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_a_job_that_is_held_back_can_be_stopped(how: str) -> None:
    with JobExecutor() as executor:
        run = executor.submit(50, ignore_errors=True, timeout=0.2 if how == "timeout" else None)
        executor.wait_for(executor.made, 2)
        if how == "cancel":
            assert run.cancel()
        executor.wait_for(executor.closed, 1)
        assert len(list(run)) == len(executor.made)
    expected = WorkflowCancelledError if how == "cancel" else WorkflowTimeoutError
    assert {type(error) for error in run.errors.values()} == {expected}


def test_closing_waits_for_what_is_held_back() -> None:
    executor = JobExecutor()
    run = executor.submit(50)
    executor.wait_for(executor.made, 2)
    call_in_thread(executor.close).result(DEADLINE)
    assert len(executor.made) == 50
    assert len(list(run)) == 50


def test_cancelled_futures_are_left_out_of_a_job() -> None:
    with JobExecutor(4, max_workers=1) as executor:
        executor.gate.clear()
        executor.submit(1)
        executor.wait_for(executor.jobs, 1)
        run = executor.submit(8, ignore_errors=True)
        assert all(run.futures[index].cancel() for index in (1, 4, 5, 6, 7))
        executor.gate.set()
        assert indexes(run) == [0, 2, 3]
    assert executor.jobs[1:] == [[0, 2, 3]]
