"""Runs that their caller lets go of: nothing piles up, and nothing is made that nobody can take."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from core_backend import (
    DEADLINE,
    GatedExecutor,
    call_in_thread,
    picture,
    run_freely,
    threads_of,
)

from comfy_executors import (
    BaseWorkflowExecutor,
    Batch,
    BatchResult,
    ProgressEvent,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowOutputImage,
    WorkflowTemplate,
    WorkflowTimeoutError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import Job

GRAPH = {"1": {"class_type": "SaveImage", "inputs": {"seed": 1}}}


class WholeRuns(BaseWorkflowExecutor):
    """Is handed each run in one job, as a serverless backend is."""

    def __init__(self) -> None:
        super().__init__(max_workers=1)
        self.made: list[weakref.ref[WorkflowOutputImage]] = []
        self.ended: Future[type[BaseException] | None] = Future()

    def _job_size(self, batches: Any, job: Job) -> int:
        return len(batches)

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        try:
            for batch in job.batches:
                control.limit(0)
                image = picture(batch)
                self.made.append(weakref.ref(image))
                yield BatchResult(batch.index, [image])
                del image
        except BaseException as error:
            self.ended.set_result(type(error))  # its traceback would hold the images
            raise
        self.ended.set_result(None)

    def alive(self) -> int:
        gc.collect()
        return sum(image() is not None for image in self.made)


def test_views_that_take_one_image_each_leave_nothing_behind() -> None:
    seen = []
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def remember(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        alive.add(batch)

    with GatedExecutor(remember, max_workers=2) as executor:
        for view in range(50):
            for image in executor.submit(1000, str(view)):
                seen.append(image.batch_index)
                break
        del image
        # One more goes through all threads, which see to the others first.
        assert len(executor.submit(1).result(DEADLINE)) == 1
    assert len(seen) == 50
    begun = executor.count("begin")
    assert begun <= 50 * 5 + 1  # the window, and one for the image that was taken
    gc.collect()
    assert len(alive) == 0
    assert threads_of(executor) == []


def test_a_run_that_is_still_held_is_made_to_its_end_after_a_break() -> None:
    with GatedExecutor(run_freely, max_workers=1) as executor:
        run = executor.submit(20)
        next(run)
    assert executor.count("end") == 20
    assert len(list(run)) == 19


def test_a_run_that_was_only_started_is_made_and_not_kept() -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Watched(GatedExecutor):
        def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
            for result in super()._run_job(job, control):
                alive.update(result.images)
                yield result
                del result

    with Watched(run_freely, max_workers=1) as executor:
        executor.submit(40)
        executor.wait_until("end", 40)
        executor.submit(1).result(DEADLINE)
        gc.collect()
        assert len(alive) <= 1


@pytest.mark.parametrize("kept", ["futures", "files"])
def test_futures_and_files_are_enough_to_go_on(kept: str, tmp_path: Path) -> None:
    with GatedExecutor(run_freely, max_workers=1) as executor:
        run = executor.submit(20, output_dir=tmp_path if kept == "files" else None)
        first = next(run) if kept == "files" else None
        futures = run.futures if kept == "futures" else []
        del run
        gc.collect()
    assert executor.count("end") == 20
    assert len(wait(futures, DEADLINE).done) == len(futures)
    assert len(list(tmp_path.iterdir())) == (20 if first else 0)


def test_a_job_of_a_whole_run_ends_when_nobody_holds_the_run() -> None:
    executor = WholeRuns()
    run = executor.submit_workflow(WorkflowTemplate.from_graph(GRAPH), num_samples=1000)
    next(run)
    del run
    gc.collect()
    assert executor.ended.result(DEADLINE) in (WorkflowCancelledError, GeneratorExit)
    assert len(executor.made) < 20
    executor.close()
    assert executor.alive() == 0


def test_a_job_of_a_whole_run_that_was_only_started_is_made_and_not_kept() -> None:
    with WholeRuns() as executor:
        executor.submit_workflow(WorkflowTemplate.from_graph(GRAPH), num_samples=1000)
        assert executor.ended.result(DEADLINE) is None
        assert len(executor.made) == 1000
        executor.submit_workflow(WorkflowTemplate.from_graph(GRAPH)).cancel()
    assert executor.alive() == 0


def test_a_callback_that_knows_its_run_does_not_keep_it() -> None:
    told = []
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(3)
        for future in run.futures:
            future.add_done_callback(lambda _, run=run: told.append(run.done()))
        images = [weakref.ref(image) for image in run.result(DEADLINE)]
        del run, future
        executor.submit(1).result(DEADLINE)
        gc.collect()
        assert [image() for image in images] == [None] * 3
    assert len(told) == 3


def test_a_run_may_be_looked_at_long_after_the_executor_has_done_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = threading.Semaphore(0)

    def fail(executor: GatedExecutor, tag: str, batch: Batch, control: JobControl) -> None:
        if tag == "bad":
            raise WorkflowError("no such luck")

    def hear(event: ProgressEvent) -> None:
        if event.kind == "failed":
            failures.release()

    with GatedExecutor(fail) as executor:
        held = executor.submit(2, "bad", on_progress=hear, ignore_errors=True)
        dropped = executor.submit(3, "bad", on_progress=hear, ignore_errors=True)
        for _ in range(5):
            assert failures.acquire(timeout=DEADLINE)
        # By now the executor has let go of both.
        assert len(executor.submit(1, "good").result(DEADLINE)) == 1
        gc.collect()
        assert "no such luck" not in caplog.text
        del dropped
        gc.collect()
        assert caplog.text.count("3 of 3 batches failed, and nobody looked") == 1
        assert sorted(held.errors) == [0, 1]
        del held
        gc.collect()
    assert caplog.text.count("no such luck") == 1


@pytest.mark.parametrize("taken", ["result", "futures"])
def test_images_that_were_taken_do_not_wait_for_the_garbage_collector(taken: str) -> None:
    with GatedExecutor(run_freely) as executor:
        gc.collect()
        gc.disable()
        try:
            run = executor.submit(3)
            if taken == "result":
                images = [weakref.ref(image) for image in run.result(DEADLINE)]
            else:
                images = [weakref.ref(f.result(DEADLINE).images[0]) for f in run.futures]
            assert len(images) == 3
            del run
            executor.close()  # its threads may just be on their way back
            assert [image() for image in images] == [None] * 3
        finally:
            gc.enable()


def test_letting_go_of_a_run_waits_for_no_lock() -> None:
    locked, free = threading.Event(), threading.Event()

    def hold(executor: GatedExecutor) -> None:
        with executor._lock:
            locked.set()
            assert free.wait(DEADLINE)

    with GatedExecutor(run_freely, max_workers=1) as executor:
        run = executor.submit(50)
        next(run)
        holder = call_in_thread(hold, executor)
        assert locked.wait(DEADLINE)
        del run  # as the garbage collector may do on any thread, with any lock in hand
        gc.collect()
        assert not holder.done()
        free.set()
        holder.result(DEADLINE)


def test_a_break_and_then_the_end_of_with_cancels_whoever_comes_first() -> None:
    for _ in range(20):
        with GatedExecutor(run_freely, max_workers=2) as executor:
            for image in executor.submit(60):
                del image
                break
        assert executor.count("begin") < 60


def test_a_run_can_be_neither_copied_nor_pickled() -> None:
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(3)
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                attempt(run)
        assert len(list(run)) == 3


def test_leaving_the_with_block_of_a_run_cancels_the_rest() -> None:
    with GatedExecutor(run_freely, max_workers=1) as executor:
        with executor.submit(100) as run:
            next(run)
        assert run.cancelled()
        with executor.submit(3) as whole:
            assert len(list(whole)) == 3
        assert not whole.cancelled()
    assert executor.count("begin") <= 3 + 5


def test_a_caller_hears_of_its_timeout_before_the_job_was_taken_back() -> None:
    told: Future[None] = Future()

    class Hanging(BaseWorkflowExecutor):
        """Takes the prompt back from a server that does not answer."""

        def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
            try:
                control.sleep(DEADLINE)
            except WorkflowTimeoutError as error:
                control.give_up(error)
                told.result(DEADLINE)
                raise
            yield BatchResult(0, [])

    with Hanging() as executor:
        template = WorkflowTemplate.from_graph(GRAPH)
        run = executor.submit_workflow(template, num_samples=3, timeout=0.05)
        errors = [future.exception(DEADLINE) for future in run.futures]
        assert [type(error) for error in errors] == [WorkflowTimeoutError] * 3
        assert run.done()
        assert len(run.errors) == 3
        told.set_result(None)
    assert threads_of(executor) == []


def test_a_job_that_is_being_taken_back_is_still_known_to_its_mates() -> None:
    gave_up: Future[None] = Future()
    seen: Future[int] = Future()
    both = threading.Event()
    arrived = threading.Semaphore(1)

    class Mates(BaseWorkflowExecutor):
        """The second job's future fails first; only then the first one looks whom to stop."""

        def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
            if not arrived.acquire(blocking=False):
                both.set()
            try:
                control.sleep(DEADLINE)
            except WorkflowCancelledError as error:
                if job.batches[0].index == 1:
                    control.give_up(error)
                    gave_up.set_result(None)
                    assert seen.result(DEADLINE)
                else:
                    gave_up.result(DEADLINE)
                    seen.set_result(len(control.mates()))
                raise
            yield BatchResult(0, [])

    with Mates(max_workers=2) as executor:
        run = executor.submit_workflow(WorkflowTemplate.from_graph(GRAPH), num_samples=2)
        assert both.wait(DEADLINE)
        run.cancel()
        assert seen.result(DEADLINE) == 2
    assert len(run.errors) == 2


def test_a_future_of_many_is_found_without_making_all_anew() -> None:
    with GatedExecutor(run_freely) as executor:
        run = executor.submit(50)
        first = run.futures
        assert all(run.futures[index] is first[index] for index in range(50))
        first.clear()
        assert len(run.futures) == 50
