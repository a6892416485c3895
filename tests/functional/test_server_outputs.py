"""Outputs of the server executor on disk: as they come, and none of a batch that failed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    NodeExecutionError,
    OutputFileError,
    ProgressEvent,
    WorkflowTemplate,
)
from comfy_executors.devserver import DevServer
from server_kit import ENDLESS, PATIENCE, bench_graph, ended, statuses


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
        server.faults.delay("GET", "/view", 0.2, times=1)
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
        executor.submit_workflow(template, num_samples=10, timeout=1.0, ignore_errors=True)
        ended(server, interrupted=1, deleted=3)
