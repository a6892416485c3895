"""Outputs of the server executor on disk: as they come, and none of a batch that failed."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from pathlib import Path

import pytest
from server_kit import ENDLESS, PATIENCE, bench, bench_graph, ended, served, statuses

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    NodeExecutionError,
    OutputFileError,
    OutputMissingError,
    ProgressEvent,
    ServerResponseError,
    WorkflowCancelledError,
    WorkflowOutput,
    WorkflowTemplate,
    WorkflowTimeoutError,
)
from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.http import DeadlineWaiter, HttpClient
from comfy_executors.devserver import DevServer

LOGIN_PAGE = ("<html>Please log in</html>", "Text/HTML; charset=utf-8", "an HTML page")
NOTHING = ("", "image/png", "an empty body")


def two_samplers(second: dict[str, object]) -> WorkflowTemplate:
    """Saves images of a sampler, and then those of another one which needs the first."""
    graph = bench_graph(batch_size=3)
    graph["3"] = {
        "class_type": "BenchSampler",
        "inputs": {**graph["1"]["inputs"], "text": ["1", 1], **second},
    }
    graph["4"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["3", 0], "filename_prefix": "second"},
    }
    return WorkflowTemplate.from_graph(graph)


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@pytest.mark.parametrize("seed", [100, None])
def test_a_seed_in_a_node_of_its_own_makes_other_images_in_each_batch(seed: int | None) -> None:
    graph = bench_graph(seed=["3", 0])
    graph["3"] = {"class_type": "PrimitiveInt", "inputs": {"value": 42}}
    template = WorkflowTemplate.from_graph(graph)
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        images = executor.submit_workflow(template, num_samples=3, seed=seed).result(PATIENCE)
        sent = [prompt.graph["3"]["inputs"]["value"] for prompt in server.prompts]
    assert len({image.data for image in images}) == 3
    assert {image.seed for image in images} == set(sent)
    assert seed is None or [image.seed for image in images] == [100, 101, 102]


def test_images_are_on_disk_while_the_rest_of_the_graph_runs(tmp_path: Path) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        saved = threading.Event()

        def look(event: ProgressEvent) -> None:
            if len(files(tmp_path)) == 3:
                saved.set()

        template = two_samplers({"seconds": ENDLESS, "steps": 10_000})
        run = executor.submit_workflow(template, output_dir=tmp_path, on_progress=look)
        assert saved.wait(PATIENCE)
        assert (run.done(), statuses(server)) == (False, {"running": 1})
        run.cancel()
        ended(server, interrupted=1)


def test_a_batch_that_fails_leaves_no_files(tmp_path: Path) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(two_samplers({"fail": "no"}), output_dir=tmp_path)
        with pytest.raises(NodeExecutionError, match="no"):
            run.result(PATIENCE)
        assert [r.path for r in server.requests].count("/view") == 3
    assert files(tmp_path) == []


def held(error: BaseException) -> int:
    """How many bytes the frames of an error that is kept hold on to."""
    frames = [
        frame
        for cause in (error, error.__cause__, error.__context__)
        for frame, _ in traceback.walk_tb(cause.__traceback__ if cause else None)
    ]
    assert frames
    values = [value for frame in frames for value in frame.f_locals.values()]
    data = [value for value in values if isinstance(value, bytes)]
    data += [made.data for value in values for made in _outputs(value)]
    return sum(map(len, data))


def _outputs(value: object) -> list[WorkflowOutput]:
    if isinstance(value, WorkflowOutput):
        return [value]
    collector = getattr(value, "_made", None)
    return [*collector.images, *collector.outputs] if collector else []


def test_errors_that_are_kept_hold_no_images() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(two_samplers({"fail": "no"}), num_samples=3)
        futures = run.futures
        errors = [future.exception(PATIENCE) for future in futures]
        assert served(server)["GET /view"] == 9
    assert [held(error) for error in errors if error] == [0, 0, 0]
    gc.collect()
    assert outputs_in_memory(server) == 0


def outputs_in_memory(server: DevServer) -> int:
    found = [thing for thing in gc.get_objects() if isinstance(thing, WorkflowOutput)]
    return sum(output.server == server.url for output in found)


def test_images_that_were_taken_do_not_wait_for_the_garbage_collector() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        gc.collect()
        gc.disable()
        try:
            run = executor.submit_workflow(bench(batch_size=8), num_samples=3)
            assert sum(1 for _ in run) == 24
            del run
            # The threads may just be on their way back to where they wait for work.
            tick, until = threading.Event(), time.monotonic() + PATIENCE
            while outputs_in_memory(server) and time.monotonic() < until:
                tick.wait(0.05)
            assert outputs_in_memory(server) == 0
        finally:
            gc.enable()


def test_an_error_of_a_download_holds_no_images() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(bench(batch_size=8))
        server.faults.delay("GET", "/view", 0.3, times=1)
        server.wait_for(lambda s: served(s)["GET /view"] >= 4, PATIENCE)
        [name, *_] = sorted(os.listdir(server.directory / "output"))[7:]
        (server.directory / "output" / name).unlink()
        error = run.futures[0].exception(PATIENCE)
    assert isinstance(error, OutputMissingError)
    assert held(error) == 0


def test_an_error_of_the_disk_holds_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.delay("GET", "/view", 0.3)
        run = executor.submit_workflow(bench(batch_size=8), output_dir=folder)
        server.wait_for(lambda s: bool(s.prompts), PATIENCE)
        folder.rmdir()
        folder.write_text("a file stands in the way")
        error = run.futures[0].exception(PATIENCE)
    assert isinstance(error, OutputFileError)
    assert held(error) == 0


# Several files of one report.


def test_files_of_a_report_are_fetched_side_by_side_and_keep_their_order() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.delay("GET", "/view", 0.5, times=1)
        images = executor.submit_workflow(bench(batch_size=9)).result(PATIENCE)
        paths = [
            request.query["filename"] for request in server.requests if request.path == "/view"
        ]
    names = [image.name for image in images]
    assert names == sorted(names) == sorted(paths)
    assert paths != names  # others did not wait for the slow one, which is whose request was first
    assert len(set(names)) == 9


@pytest.mark.parametrize("output_dir", [False, True])
def test_a_cancelled_run_breaks_off_all_downloads(output_dir: bool, tmp_path: Path) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.delay("GET", "/view", 2 * PATIENCE)
        folder = tmp_path if output_dir else None
        run = executor.submit_workflow(bench(batch_size=8), output_dir=folder)
        [future] = run.futures
        ended(server, success=1)
        run.cancel()
        assert isinstance(future.exception(PATIENCE), WorkflowCancelledError)
        assert [t.name for t in threading.enumerate() if t.name.endswith("helper")] == []
    assert files(tmp_path) == []


def test_a_file_that_is_missing_ends_the_other_downloads_and_leaves_no_files(
    tmp_path: Path,
) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        server.faults.fail("GET", "/view", status=404)
        server.faults.delay("GET", "/view", 0.2, times=1)
        run = executor.submit_workflow(bench(batch_size=8), output_dir=tmp_path)
        with pytest.raises(OutputMissingError, match="does not have"):
            run.result(PATIENCE)
        assert len(server.prompts) == 1
    assert files(tmp_path) == []


def test_a_batch_that_is_run_again_saves_each_image_once(tmp_path: Path) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        template = two_samplers({})
        executor.submit_workflow(template, randomize_seed=False).result(PATIENCE)
        # The cache names two files of the second node that are gone: three were fetched before.
        for path in sorted((server.directory / "output").glob("second_*"))[1:]:
            path.unlink()
        run = executor.submit_workflow(template, randomize_seed=False, output_dir=tmp_path)
        images = run.result(PATIENCE)
    assert len(images) == 6
    assert len(files(tmp_path)) == 6
    assert {image.path for image in images} == {tmp_path / name for name in files(tmp_path)}


def test_a_folder_that_takes_nothing_fails_the_batch_and_stops_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        template = two_samplers({"seconds": ENDLESS, "steps": 10_000})
        folder.mkdir()
        server.faults.delay("GET", "/view", 2.0, times=1)
        run = executor.submit_workflow(template, output_dir=folder)
        server.wait_for(lambda s: bool(s.prompts), PATIENCE)
        folder.rmdir()
        folder.write_text("a file stands in the way")
        with pytest.raises(OutputFileError):
            run.result(PATIENCE)
        ended(server, interrupted=1)


def test_stopping_a_run_starts_none_of_its_waiting_prompts() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        template = WorkflowTemplate.from_graph(bench_graph(ENDLESS, steps=10_000))
        run = executor.submit_workflow(template, num_samples=10)
        server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 3}, PATIENCE)
        run.cancel()
        ended(server, interrupted=1, deleted=3)


def test_a_timeout_of_the_run_starts_none_of_its_waiting_prompts() -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        template = WorkflowTemplate.from_graph(bench_graph(ENDLESS, steps=10_000))
        run = executor.submit_workflow(template, num_samples=10, timeout=1.0, ignore_errors=True)
        ended(server, interrupted=1, deleted=3)
    assert {type(error) for error in run.errors.values()} == {WorkflowTimeoutError}


# What is no file.


@pytest.mark.parametrize(("body", "kind", "words"), [LOGIN_PAGE, NOTHING])
def test_what_a_proxy_answers_for_a_file_is_no_image(
    tmp_path: Path, body: str, kind: str, words: str
) -> None:
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        headers = {"Content-Type": kind}
        server.faults.fail("GET", "/view", status=200, body=body, headers=headers, times=2)
        [image] = executor.submit_workflow(bench(), output_dir=tmp_path).result(PATIENCE)
        assert image.image.size == (16, 16)
        assert served(server)["GET /view"] == 3
        assert files(tmp_path) == ["t_00001_.png"]


@pytest.mark.parametrize(("body", "kind", "words"), [LOGIN_PAGE, NOTHING])
def test_a_proxy_that_goes_on_so_fails_the_batch_and_names_the_file(
    tmp_path: Path, body: str, kind: str, words: str
) -> None:
    with DevServer() as server:
        headers = {"Content-Type": kind}
        server.faults.fail("GET", "/view", status=200, body=body, headers=headers, times=None)
        with ComfyServerWorkflowExecutor(server.address, outage_timeout=0.5) as executor:
            run = executor.submit_workflow(bench(), output_dir=tmp_path)
            with pytest.raises(ServerResponseError, match=rf"t_00001_\.png with {words}"):
                run.result(PATIENCE)
        assert served(server)["GET /view"] > 1
    assert files(tmp_path) == []


def test_a_file_that_is_a_page_is_one() -> None:
    with DevServer() as server:
        server.faults.fail("GET", "/view", status=200, body="<html></html>")
        http = HttpClient(server.url)
        data = ComfyUIClient(http).view("page.HTML", "", "output", DeadlineWaiter(PATIENCE))
        http.close()
    assert data == b"<html></html>"


# Fewer than asked for.


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    # Others may come of runs of other tests, whenever they are collected.
    names = (".plan", ".comfy_prompt")
    return [record.getMessage() for record in caplog.records if record.name.endswith(names)]


def test_fewer_images_than_the_batchs_size_are_told(caplog: pytest.LogCaptureFixture) -> None:
    template = WorkflowTemplate(json.dumps(bench_graph(text="{{ batch_size }}")))
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(template, num_samples=6, batch_size=5)
        assert len(run.result(PATIENCE)) == 2
    # The second batch wanted one image, and made it.
    (warning,) = warnings_of(caplog)
    assert warning.endswith("made 1 of 5 images")
    assert any(prompt.prompt_id in warning for prompt in server.prompts)


def test_as_many_images_as_the_batchs_size_are_not(caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps(bench_graph(batch_size=0)).replace('"batch_size": 0', '"batch_size": {{ n }}')
    template = WorkflowTemplate(text.replace("{{ n }}", "{{ batch_size }}"))
    with DevServer() as server, ComfyServerWorkflowExecutor(server.address) as executor:
        run = executor.submit_workflow(template, num_samples=6, batch_size=5)
        assert len(run.result(PATIENCE)) == 6
    assert warnings_of(caplog) == []
