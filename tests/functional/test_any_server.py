"""The server executor on any ComfyUI: the dev server, or the one that COMFYUI_URL names.

Nobody else should use that server meanwhile. What is asked of it beside is HTTP that ComfyUI has
always had.
"""

from __future__ import annotations

import io
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from server_kit import ENDLESS, PATIENCE, bench_graph

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    ProgressEvent,
    WorkflowCancelledError,
    WorkflowInterruptedError,
    WorkflowRejectedError,
    WorkflowTemplate,
    WorkflowTimeoutError,
)

Graph = dict[str, Any]


@pytest.fixture
def executor(any_server: str) -> Iterator[ComfyServerWorkflowExecutor]:
    with ComfyServerWorkflowExecutor(any_server, max_workers=3) as made:
        yield made


def unique() -> int:
    """A colour that no prompt had before, so that no cache answers."""
    return uuid.uuid4().int % 0xFFFFFF


def graph_of(color: int, **inputs: Any) -> Graph:
    given = {"width": 24, "height": 16, "batch_size": 1, "color": color, "seed": 7, **inputs}
    return {
        "1": {"class_type": "EmptyImage", "inputs": given},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "any"}},
    }


def long_template(url: str, color: int) -> WorkflowTemplate:
    """A graph that runs until it is interrupted, or for half a minute at least."""
    graph = graph_of(color)
    if requests.get(f"{url}/object_info/BenchSampler", timeout=PATIENCE).json():
        sampler = bench_graph(ENDLESS, steps=10_000)
        graph["3"] = sampler["1"]
        graph["2"]["inputs"]["images"] = ["3", 0]
        graph["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        return WorkflowTemplate.from_graph(graph)
    before = "1"
    for number in range(40):
        inputs: Graph = {"image": [before, 0], "upscale_method": "lanczos", "crop": "disabled"}
        inputs.update(width=2048 + number, height=2048)
        before = str(number + 3)
        graph[before] = {"class_type": "ImageScale", "inputs": inputs}
    graph["2"]["inputs"]["images"] = [before, 0]
    return WorkflowTemplate.from_graph(graph)


def bytes_at(url: str, name: str, subfolder: str, type: str) -> bytes:
    params = {"filename": name, "subfolder": subfolder, "type": type}
    answer = requests.get(f"{url}/view", params=params, timeout=PATIENCE)
    assert answer.status_code == 200
    return answer.content


def history(url: str, color: int) -> list[Any]:
    """The finished prompts whose image has a colour."""
    entries = requests.get(f"{url}/history?max_items=50", timeout=PATIENCE).json()
    graphs = [(entry["prompt"][2], entry) for entry in entries.values()]
    return [entry for graph, entry in graphs if _has_color(graph, color)]


def queued(url: str, color: int) -> int:
    body = requests.get(f"{url}/queue", timeout=PATIENCE).json()
    items = [*body["queue_running"], *body["queue_pending"]]
    return sum(_has_color(item[2], color) for item in items)


def _has_color(graph: Graph, color: int) -> bool:
    return bool(graph.get("1", {}).get("inputs", {}).get("color") == color)


def wait_until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(int(PATIENCE / 0.05)):
        if condition():
            return
        tick.wait(0.05)
    raise AssertionError("it never came to that")


def messages(entry: Any) -> set[str]:
    return {message[0] for message in entry["status"]["messages"]}


class Began:
    """Tells when a node of a run is executed."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, event: ProgressEvent) -> None:
        if event.kind == "node":
            self.event.set()

    def wait(self) -> None:
        assert self.event.wait(PATIENCE)


# Outputs, seeds, inputs.


def test_images_are_the_bytes_of_the_server_in_order(
    executor: ComfyServerWorkflowExecutor, any_server: str
) -> None:
    text = json.dumps(graph_of(unique(), batch_size=0)).replace(
        '"batch_size": 0', '"batch_size": {{ batch_size }}'
    )
    run = executor.submit_workflow(WorkflowTemplate(text), num_samples=8, batch_size=6)
    images = run.result(PATIENCE)
    assert [image.batch_index for image in images] == [0] * 6 + [1] * 2
    names = [image.name for image in images]
    assert len(set(names)) == 8
    assert names[:6] == sorted(names[:6])
    for image in images:
        assert image.data == bytes_at(any_server, image.name, image.subfolder, image.type)
        assert image.image.size == (24, 16)


def test_images_are_saved(executor: ComfyServerWorkflowExecutor, tmp_path: Path) -> None:
    template = WorkflowTemplate.from_graph(graph_of(unique(), batch_size=5))
    images = executor.submit_workflow(template, output_dir=tmp_path).result(PATIENCE)
    assert {image.path for image in images} == set(tmp_path.iterdir())
    assert len(images) == 5
    for image in images:
        Image.open(io.BytesIO(image.data)).load()


def test_seeds_are_those_of_the_prompts(
    executor: ComfyServerWorkflowExecutor, any_server: str
) -> None:
    template = WorkflowTemplate.from_graph(graph_of(unique()))
    images = executor.submit_workflow(template, num_samples=3, seed=100).result(PATIENCE)
    assert [image.seed for image in images] == [100, 101, 102]
    for image in images:
        path = f"{any_server}/history/{image.prompt_id}"
        entry = requests.get(path, timeout=PATIENCE).json()[image.prompt_id]
        assert entry["prompt"][2]["1"]["inputs"]["seed"] == image.seed


def test_inputs_arrive_unchanged(executor: ComfyServerWorkflowExecutor, any_server: str) -> None:
    pictures = []
    for _ in range(5):
        file = io.BytesIO()
        Image.frombytes("RGB", (8, 8), os.urandom(192)).save(file, "PNG")
        pictures.append(file.getvalue())
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[4] }}"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "any"}},
    }
    template = WorkflowTemplate(json.dumps(graph))
    run = executor.submit_workflow(template, pictures, num_samples=2)
    images = run.result(PATIENCE)
    assert len(images) == 2
    wanted = Image.open(io.BytesIO(pictures[4])).tobytes()
    assert {image.image.convert("RGB").tobytes() for image in images} == {wanted}
    assert run.job.input_images is not None
    folder = run.job.input_images.folder
    for number, picture in enumerate(pictures):
        assert bytes_at(any_server, f"{number:04d}.png", folder, "input") == picture


def test_previews_are_delivered_if_that_is_wanted(executor: ComfyServerWorkflowExecutor) -> None:
    graph = graph_of(unique())
    graph["3"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    template = WorkflowTemplate.from_graph(graph)
    for wanted, types in ((False, ["output"]), (True, ["output", "temp"])):
        images = executor.submit_workflow(template, include_previews=wanted).result(PATIENCE)
        assert sorted(image.type for image in images) == types


# Stopping.


def test_cancelling_stops_what_runs_and_what_waits(
    executor: ComfyServerWorkflowExecutor, any_server: str
) -> None:
    color, began = unique(), Began()
    template = long_template(any_server, color)
    run = executor.submit_workflow(template, num_samples=3, on_progress=began)
    futures = run.futures
    began.wait()
    wait_until(lambda: queued(any_server, color) == 3)
    run.cancel()
    errors = [future.exception(PATIENCE) for future in futures]
    assert [type(error) for error in errors] == [WorkflowCancelledError] * 3
    wait_until(lambda: queued(any_server, color) == 0)
    wait_until(lambda: len(history(any_server, color)) == 1)
    assert "execution_interrupted" in messages(history(any_server, color)[0])


def test_a_cancelled_run_leaves_others_alone(
    executor: ComfyServerWorkflowExecutor, any_server: str
) -> None:
    first, second, began = unique(), unique(), Began()
    running = executor.submit_workflow(long_template(any_server, first), on_progress=began)
    began.wait()
    waiting = executor.submit_workflow(WorkflowTemplate.from_graph(graph_of(second)))
    wait_until(lambda: queued(any_server, second) == 1)
    waiting.cancel()
    wait_until(lambda: queued(any_server, second) == 0)
    assert queued(any_server, first) == 1
    third = executor.submit_workflow(WorkflowTemplate.from_graph(graph_of(unique())))
    running.cancel()
    assert len(third.result(PATIENCE)) == 1
    assert history(any_server, second) == []


def test_a_batch_timeout_interrupts(executor: ComfyServerWorkflowExecutor, any_server: str) -> None:
    color = unique()
    template = long_template(any_server, color)
    with pytest.raises(WorkflowTimeoutError, match="batch_timeout"):
        executor.submit_workflow(template, batch_timeout=0.5).result(PATIENCE)
    wait_until(lambda: len(history(any_server, color)) == 1)
    assert "execution_interrupted" in messages(history(any_server, color)[0])


def test_an_interrupt_by_somebody_else_is_an_error(
    executor: ComfyServerWorkflowExecutor, any_server: str
) -> None:
    began = Began()
    template = long_template(any_server, unique())
    run = executor.submit_workflow(template, on_progress=began)
    began.wait()
    requests.post(f"{any_server}/interrupt", json={}, timeout=PATIENCE)
    with pytest.raises(WorkflowInterruptedError, match="somebody interrupted"):
        run.result(PATIENCE)


# Errors.


def test_one_bad_batch_does_not_stop_the_others(executor: ComfyServerWorkflowExecutor) -> None:
    # The width of the second batch is 0.
    text = json.dumps(graph_of(unique())).replace('"width": 24', '"width": {{ 24 * (2 - n) }}')
    template = WorkflowTemplate(text)
    good = executor.submit_workflow(template, n=1)
    bad = executor.submit_workflow(template, n=2)
    with pytest.raises(WorkflowRejectedError, match="input width") as caught:
        bad.result(PATIENCE)
    assert {problem.kind for problem in caught.value.problems} == {"value_smaller_than_min"}
    assert len(good.result(PATIENCE)) == 1


def test_a_missing_input_and_a_missing_file_name_the_node(
    executor: ComfyServerWorkflowExecutor,
) -> None:
    graph = graph_of(unique())
    del graph["2"]["inputs"]["images"]
    with pytest.raises(WorkflowRejectedError, match=r"Node 2 \(SaveImage\), input images"):
        executor.submit_workflow(WorkflowTemplate.from_graph(graph)).result(PATIENCE)
    graph = graph_of(unique())
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": f"{uuid.uuid4()}.png"}}
    with pytest.raises(WorkflowRejectedError, match=r"Node 1 \(LoadImage\), input image"):
        executor.submit_workflow(WorkflowTemplate.from_graph(graph)).result(PATIENCE)
