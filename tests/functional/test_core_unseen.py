"""Failures that nobody looked at are told: nothing is lost in silence."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from comfy_executors import BaseWorkflowExecutor, BatchResult, WorkflowError, WorkflowTemplate
from comfy_executors.executors.control import JobControl
from comfy_executors.runs import Job

DEADLINE = 30.0
GRAPH = {"1": {"class_type": "SaveImage", "inputs": {"seed": 1}}}


class FailingExecutor(BaseWorkflowExecutor):
    """Fails each batch."""

    def _run_job(self, job: Job, control: JobControl) -> Iterator[BatchResult]:
        raise WorkflowError("out of luck")
        yield  # a generator, as a backend is


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    gc.collect()
    messages = [record.getMessage() for record in caplog.records]
    # The collector may come upon runs that another test dropped: only ours fail like this.
    return [text for text in messages if "nobody looked" in text and "out of luck" in text]


@pytest.fixture
def template() -> WorkflowTemplate:
    return WorkflowTemplate.from_graph(GRAPH)


def test_a_run_that_was_started_and_forgotten(
    template: WorkflowTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    with FailingExecutor() as executor:
        executor.submit_workflow(template, num_samples=3)
    assert told(caplog) == [
        "3 of 3 batches failed, and nobody looked at the run; batch 0: out of luck"
    ]


def test_a_run_that_ignores_its_errors(
    template: WorkflowTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    with FailingExecutor() as executor:
        assert list(executor.submit_workflow(template, num_samples=2, ignore_errors=True)) == []
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("look", ["result", "futures", "errors", "iterate"])
def test_whoever_looked_is_not_told_again(
    template: WorkflowTemplate, caplog: pytest.LogCaptureFixture, look: str
) -> None:
    with FailingExecutor() as executor:
        run = executor.submit_workflow(template, num_samples=2, ignore_errors=look == "errors")
        if look == "futures":
            assert isinstance(run.futures[0].exception(DEADLINE), WorkflowError)
        elif look == "errors":
            assert run.result(DEADLINE) == []
            assert sorted(run.errors) == [0, 1]
        else:
            with pytest.raises(WorkflowError):
                next(run) if look == "iterate" else run.result(DEADLINE)
    assert told(caplog) == []


def test_a_cancelled_run_has_nothing_to_tell(
    template: WorkflowTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    with FailingExecutor() as executor:
        run = executor.submit_workflow(template, num_samples=2)
        run.cancel()
        with pytest.raises(WorkflowError):
            run.result(DEADLINE)
    assert told(caplog) == []
