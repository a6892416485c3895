"""Twelve small prompts that clients of ComfyUI stumble over: the right images, or a clear error.

They run on the dev server, or on the ComfyUI server of the environment variable COMFYUI_URL when
that is set; the one that needs a node which that server may lack is skipped there.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from PIL import Image
from server_kit import PATIENCE

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowOutputImage, WorkflowTemplate
from comfy_executors.errors import NodeExecutionError, WorkflowRejectedError

Graph = dict[str, Any]


@pytest.fixture
def executor(any_server: str) -> Iterator[ComfyServerWorkflowExecutor]:
    with ComfyServerWorkflowExecutor(any_server) as made:
        yield made


def need(url: str, class_type: str) -> None:
    if not requests.get(f"{url}/object_info/{class_type}", timeout=PATIENCE).json():
        pytest.skip(f"{url} has no node {class_type}")


def empty(size: int = 32, batch_size: int = 1) -> Graph:
    color = uuid.uuid4().int % 0xFFFFFF  # another picture each time, so that no cache answers
    inputs = {"width": size, "height": size, "batch_size": batch_size, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs, "_meta": {"title": "Nothing yet"}}


def save(source: str, prefix: str = "twelve") -> Graph:
    return {
        "class_type": "SaveImage",
        "inputs": {"images": [source, 0], "filename_prefix": prefix},
    }


def sampler(**inputs: Any) -> Graph:
    given: Graph = {"seed": uuid.uuid4().int % 2**32, "width": 32, "height": 32, "batch_size": 1}
    given.update({"steps": 3, "seconds": 0.0, "fail": "", "text": "", **inputs})
    return {"class_type": "BenchSampler", "inputs": given, "_meta": {"title": "The sampler"}}


def run(
    executor: ComfyServerWorkflowExecutor, graph: Graph, **options: Any
) -> list[WorkflowOutputImage]:
    """Run a graph and check that each image can be opened and is no other's double."""
    template = WorkflowTemplate.from_graph(graph)
    images = executor.submit_workflow(template, randomize_seed=False, **options).result(PATIENCE)
    for image in images:
        Image.open(io.BytesIO(image.data)).load()
    assert len({(image.subfolder, image.name) for image in images}) == len(images)
    return images


def test_1_a_batch_of_four(executor: ComfyServerWorkflowExecutor) -> None:
    assert len(run(executor, {"1": empty(batch_size=4), "2": save("1")})) == 4


def test_2_two_save_nodes(executor: ComfyServerWorkflowExecutor) -> None:
    images = run(executor, {"1": empty(), "2": save("1", "first"), "3": save("1", "second")})
    assert sorted(image.node_id or "" for image in images) == ["2", "3"]


def test_3_an_output_in_a_subfolder(executor: ComfyServerWorkflowExecutor) -> None:
    folder = f"twelve-{uuid.uuid4().hex}"
    graph = {"1": empty(), "2": save("1", f"{folder}/deep/x"), "3": save("1", "x")}
    graph["4"] = empty(48)
    graph["3"] = save("4", f"{folder}/x")
    images = {image.subfolder: image for image in run(executor, graph)}
    assert set(images) == {folder, f"{folder}/deep"}
    # Both are called x_00001_.png; each must be its own.
    assert images[folder].image.size == (48, 48)
    assert images[f"{folder}/deep"].image.size == (32, 32)


def test_4_previews_switched_on(executor: ComfyServerWorkflowExecutor, any_server: str) -> None:
    need(any_server, "BenchSampler")
    images = run(executor, {"1": sampler(previews=True), "2": save("1")})
    assert [image.type for image in images] == ["output"]


def test_5_a_large_websocket_frame(executor: ComfyServerWorkflowExecutor) -> None:
    noise = io.BytesIO()
    Image.frombytes("RGB", (1024, 1024), os.urandom(3 * 1024 * 1024)).save(noise, "PNG")
    load = {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}}
    node = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    template = WorkflowTemplate(json.dumps({"1": load, "2": node}))
    (image,) = executor.submit_workflow(template, [noise.getvalue()]).result(PATIENCE)
    assert len(image.data) > 2_000_000
    assert image.image.convert("RGB").tobytes() == Image.open(noise).tobytes()


def test_6_a_node_id_with_a_colon(executor: ComfyServerWorkflowExecutor) -> None:
    images = run(executor, {"57:2": empty(), "57:3": save("57:2")})
    assert [image.node_id for image in images] == ["57:3"]


def test_7_only_a_preview_node(executor: ComfyServerWorkflowExecutor) -> None:
    node = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    images = run(executor, {"1": empty(), "2": node}, include_previews=True)
    assert [image.type for image in images] == ["temp"]


def test_8_images_over_the_websocket(executor: ComfyServerWorkflowExecutor) -> None:
    node = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}}
    images = run(executor, {"1": empty(batch_size=3), "2": node})
    assert [image.type for image in images] == ["websocket"] * 3


def test_9_the_same_graph_again(executor: ComfyServerWorkflowExecutor) -> None:
    graph = {"1": empty(), "2": save("1")}
    (first,), (second,) = run(executor, graph), run(executor, graph)
    assert (first.cached, second.cached) == (False, True)
    assert (first.name, first.data) == (second.name, second.data)


def test_10_an_unknown_node_class(executor: ComfyServerWorkflowExecutor) -> None:
    graph = {"1": {**empty(), "class_type": "NoSuchNode"}, "2": save("1")}
    with pytest.raises(WorkflowRejectedError, match=r"Node 1 \"Nothing yet\" \(NoSuchNode\)"):
        run(executor, graph)


def test_11_a_bad_input_value(executor: ComfyServerWorkflowExecutor) -> None:
    with pytest.raises(WorkflowRejectedError, match=r"\(EmptyImage\), input width: .*0") as caught:
        run(executor, {"1": empty(0), "2": save("1")})
    assert [problem.kind for problem in caught.value.problems] == ["value_smaller_than_min"] * 2


def test_12_a_node_that_raises(executor: ComfyServerWorkflowExecutor) -> None:
    load = {"class_type": "LoadImage", "inputs": {"image": "{{ input_images[0] }}"}}
    load["_meta"] = {"title": "The picture"}
    template = WorkflowTemplate(json.dumps({"1": load, "2": save("1")}))
    with pytest.raises(NodeExecutionError) as caught:
        executor.submit_workflow(template, [b"no picture " + os.urandom(8)]).result(PATIENCE)
    error = caught.value
    assert str(error).startswith('Node 1 "The picture" (LoadImage) failed: PIL.UnidentifiedImage')
    assert "cannot identify image file" in error.exception_message
    assert error.traceback
