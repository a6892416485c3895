"""`map_workflows`: one run a row, bounded, tied to its row, none in the way of another."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import BENCH, PATIENCE

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    DummyWorkflowExecutor,
    ExecutorClosedError,
    InputImageError,
    NodeExecutionError,
    ProgressEvent,
    RowResult,
    TemplateVariablesError,
    WorkflowOutputImage,
    WorkflowTemplate,
    WorkflowTimeoutError,
)
from comfy_executors.devserver import DevServer

TEMPLATE = WorkflowTemplate(BENCH)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def server(shared_server: DevServer) -> DevServer:
    shared_server.reset()
    return shared_server


@pytest.fixture
def executor(server: DevServer) -> Iterator[ComfyServerWorkflowExecutor]:
    with ComfyServerWorkflowExecutor(server.address) as executor:
        yield executor


def texts(server: DevServer) -> Counter[str]:
    """The `prompt` of each row that was executed."""
    return Counter(prompt.graph["1"]["inputs"]["text"] for prompt in server.prompts)


def test_every_row_is_run_once_and_tied_to_its_images(
    executor: ComfyServerWorkflowExecutor, server: DevServer
) -> None:
    rows = [{"prompt": f"row {index}"} for index in range(50)]
    results = list(executor.map_workflows(TEMPLATE, rows))
    assert sorted(result.index for result in results) == list(range(50))
    assert texts(server) == Counter(row["prompt"] for row in rows)
    by_id = {prompt.prompt_id: prompt.graph["1"]["inputs"] for prompt in server.prompts}
    for result in results:
        [image] = result.images
        assert result.row is rows[result.index]
        assert by_id[str(image.prompt_id)]["text"] == result.row["prompt"]
        assert by_id[str(image.prompt_id)]["seed"] == image.seed == result.seed
        assert (result.error, result.outputs) == (None, [])
        assert result.seconds > 0


def test_a_row_says_how_it_is_run(executor: ComfyServerWorkflowExecutor, server: DevServer) -> None:
    rows: list[dict[str, Any]] = [{"seed": 5, "num_samples": 3}, {"prompt": "own"}, {}]
    results = list(
        executor.map_workflows(
            TEMPLATE, rows, ordered=True, seed=7, batch_size=2, prompt="common",
            variables={"seconds": 0.01},
        )
    )  # fmt: skip
    assert [result.index for result in results] == [0, 1, 2]
    assert [[image.seed for image in result.images] for result in results] == [[5, 5, 6], [7], [7]]
    assert texts(server) == {"common": 3, "own": 1}
    assert {prompt.graph["1"]["inputs"]["seconds"] for prompt in server.prompts} == {0.01}


def test_a_row_that_fails_stops_no_other(
    executor: ComfyServerWorkflowExecutor, server: DevServer
) -> None:
    rows: list[Any] = [
        {"prompt": "a"},
        {"prompt": "b", "fail": "boom"},
        {"promt": "c"},
        {"prompt": "d", "seed": -1},
        {"prompt": "e", "num_samples": "many"},
        {"prompt": "f", "num_samples": 0},
        {"prompt": "g", "batch_size": 2},
        ["h"],
        {"prompt": "i", "input_images": ["none.png"]},
        {"prompt": "j", "seconds": {1, 2}},
        {"prompt": "k", "num_samples": 3_000_000_000},
        {"prompt": "l"},
    ]
    results = list(executor.map_workflows(TEMPLATE, rows, ordered=True))
    errors = {result.index: result.error for result in results if result.error}
    assert [result.row for result in results] == rows
    assert [result.index for result in results if len(result.images) == 1] == [0, 11]
    assert sorted(errors) == list(range(1, 11))
    assert isinstance(errors[1], NodeExecutionError)
    assert isinstance(errors[2], TemplateVariablesError)
    assert "promt (did you mean prompt?)" in str(errors[2])
    assert "seed must be a whole number from 0" in str(errors[3])
    assert "num_samples must be a whole number from 1, not 'many'" in str(errors[4])
    assert "num_samples" in str(errors[5])
    assert "pass batch_size=" in str(errors[6])
    assert "a row is a mapping of variables, not list" in str(errors[7])
    assert isinstance(errors[8], InputImageError)
    assert "the 1,000,000 batches that one run may have" in str(errors[10])
    assert texts(server) == {"a": 1, "b": 1, "l": 1}


def test_a_failed_row_ends_its_own_batches(server: DevServer) -> None:
    rows = [{"fail": "boom", "prompt": "bad"}, {"prompt": "good"}]
    with ComfyServerWorkflowExecutor(server.address, max_workers=1) as executor:
        results = list(executor.map_workflows(TEMPLATE, rows, ordered=True, num_samples=20))
    assert isinstance(results[0].error, NodeExecutionError)
    assert (len(results[0].images), len(results[1].images)) == (0, 20)
    assert texts(server)["good"] == 20
    assert texts(server)["bad"] < 20


def test_ignored_errors_leave_what_worked(executor: ComfyServerWorkflowExecutor) -> None:
    template = WorkflowTemplate(
        BENCH.replace("{{ fail | default('') }}", "{{ '' if seed else 1 }}")
    )
    [result] = executor.map_workflows(template, [{}], num_samples=3, seed=0, ignore_errors=True)
    assert isinstance(result.error, NodeExecutionError)
    assert [image.seed for image in result.images] == [1, 2]


def test_rows_are_begun_as_results_are_taken(server: DevServer) -> None:
    begun: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            begun.append(len(begun))
            yield {"prompt": str(len(begun))}

    with ComfyServerWorkflowExecutor(server.address, max_workers=2) as executor:
        results = executor.map_workflows(TEMPLATE, endless())
        assert begun == []
        for taken in range(30):
            assert isinstance(next(results), RowResult)
            assert len(begun) <= taken + 2 + 2
        results.close()
    assert len(server.prompts) <= len(begun)


def test_what_was_taken_is_not_kept(executor: ComfyServerWorkflowExecutor) -> None:
    images: weakref.WeakSet[WorkflowOutputImage] = weakref.WeakSet()
    most = 0
    for result in executor.map_workflows(TEMPLATE, ({} for _ in range(60))):
        images.update(result.images)
        del result
        gc.collect()
        most = max(most, len(images))
    assert most <= executor.max_workers + 2


def test_closing_cancels_what_was_begun(server: DevServer) -> None:
    # With one place, the rows are executed in their order.
    with ComfyServerWorkflowExecutor(server.address, max_workers=1) as executor:
        rows = [{}, *({"seconds": 3600} for _ in range(20))]
        results = executor.map_workflows(TEMPLATE, rows)
        assert next(results).index == 0
        server.wait_for(lambda _: statuses(server)["running"] == 1, PATIENCE)
        results.close()
    assert not {"running", "pending"} & statuses(server).keys()
    assert statuses(server)["success"] == 1


def statuses(server: DevServer) -> Counter[str]:
    return Counter(prompt.status for prompt in server.prompts)


def test_an_error_in_the_loop_cancels(server: DevServer) -> None:
    def work() -> None:
        with ComfyServerWorkflowExecutor(server.address, max_workers=1) as executor:
            for result in executor.map_workflows(TEMPLATE, [{}, *[{"seconds": 3600}] * 9]):
                raise LookupError(result.index)

    with pytest.raises(LookupError):
        work()
    # What runs ends at its next step after it was interrupted, which nobody waits for.
    ended = {"success", "interrupted", "deleted"}
    server.wait_for(lambda _: statuses(server).keys() <= ended, PATIENCE)


def test_rows_that_raise_cancel_what_was_begun(server: DevServer) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"seconds": 3600}
        raise LookupError("no more rows")

    with ComfyServerWorkflowExecutor(server.address) as executor, pytest.raises(LookupError):
        next(executor.map_workflows(TEMPLATE, rows()))
    assert statuses(server)["success"] == 0


def test_a_closed_executor_ends_the_sweep(server: DevServer) -> None:
    executor = ComfyServerWorkflowExecutor(server.address)
    results = executor.map_workflows(TEMPLATE, [{}] * 20)
    next(results)
    executor.close()
    with pytest.raises(ExecutorClosedError):
        list(results)


def test_progress_says_the_row_and_comes_from_one_thread_at_a_time(
    executor: ComfyServerWorkflowExecutor,
) -> None:
    events: list[ProgressEvent] = []
    inside = threading.Lock()
    overlaps: list[ProgressEvent] = []

    def note(event: ProgressEvent) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(event)
            return
        events.append(event)
        inside.release()

    list(executor.map_workflows(TEMPLATE, [{}] * 8, num_samples=2, on_progress=note))
    done = Counter(event.row for event in events if event.kind == "done")
    assert done == dict.fromkeys(range(8), 2)
    assert overlaps == []


def test_a_row_that_cannot_start_reports_its_failure(
    executor: ComfyServerWorkflowExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[ProgressEvent] = []

    def note(event: ProgressEvent) -> None:
        events.append(event)
        raise LookupError("a callback of ours")

    rows: list[dict[str, Any]] = [{"promt": "x"}, {"promt": "y", "num_samples": 3}]
    assert len(list(executor.map_workflows(TEMPLATE, rows, num_samples=2, on_progress=note))) == 2
    assert [(event.kind, event.row, event.max) for event in events] == [
        ("failed", 0, 2), ("failed", 1, 3),
    ]  # fmt: skip
    assert caplog.text.count("LookupError: a callback of ours") == 2


def test_restarts_and_dropped_sockets_lose_no_row(server: DevServer) -> None:
    rows = [{"prompt": str(index), "seconds": 0.02} for index in range(60)]
    with ComfyServerWorkflowExecutor(server.address) as executor:
        results = executor.map_workflows(TEMPLATE, rows)
        taken = [next(results) for _ in range(10)]
        server.restart()
        taken += [next(results) for _ in range(10)]
        server.drop_websockets()
        taken += list(results)
    assert Counter(result.index for result in taken) == dict.fromkeys(range(60), 1)
    assert [result.error for result in taken if result.error] == []
    assert Counter(len(result.images) for result in taken) == {1: 60}
    done = [p.graph["1"]["inputs"]["text"] for p in server.prompts if p.status == "success"]
    # What a restarted server forgot before its image was fetched had to be made again.
    assert set(done) == set(map(str, range(60)))
    assert len(done) <= 60 + executor.max_workers


def test_a_timeout_is_for_each_row(server: DevServer) -> None:
    rows: list[dict[str, Any]] = [{"seconds": 3600}, {}, {}]
    with ComfyServerWorkflowExecutor(server.address, max_workers=1) as executor:
        results = list(executor.map_workflows(TEMPLATE, rows, batch_timeout=0.3))
    errors = {result.index: result.error for result in results if result.error}
    assert errors.keys() == {0}
    assert isinstance(errors[0], WorkflowTimeoutError)
    assert Counter(p.status for p in server.prompts) == {"interrupted": 1, "success": 2}


def test_misspelt_options_raise(executor: ComfyServerWorkflowExecutor, server: DevServer) -> None:
    with pytest.raises(TypeError, match="did you mean num_samples"):
        next(executor.map_workflows(TEMPLATE, [{}], num_sample=2))
    with pytest.raises(TypeError, match="on_progress must be callable, not str"):
        executor.map_workflows(TEMPLATE, [{}], on_progress="show")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a WorkflowTemplate, not str"):
        executor.map_workflows(BENCH, [{}])  # type: ignore[arg-type]
    assert server.prompts == []


def test_images_go_to_disk(executor: ComfyServerWorkflowExecutor, tmp_path: Path) -> None:
    results = list(executor.map_workflows(TEMPLATE, [{}] * 5, output_dir=tmp_path))
    paths = {image.path for result in results for image in result.images}
    assert paths == set(tmp_path.iterdir())
    assert len(paths) == 5


def test_every_executor_has_it() -> None:
    with DummyWorkflowExecutor(image_size=8) as executor:
        results = list(executor.map_workflows(TEMPLATE, [{"prompt": "x"}, {"promt": "y"}]))
    assert Counter(result.error is None for result in results) == {True: 1, False: 1}
