"""Bugs of other clients of ComfyUI, each of which could be ours."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import as_completed

import pytest
import requests
from server_kit import (
    ENDLESS,
    PATIENCE,
    VERSIONS,
    bench,
    bench_graph,
    ended,
    served,
    statuses,
    stranger_posts,
)

from comfy_executors import ComfyServerWorkflowExecutor, WorkflowTemplate
from comfy_executors.devserver import DevServer
from comfy_executors.errors import WorkflowRejectedError


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def executor(server: DevServer) -> Iterator[ComfyServerWorkflowExecutor]:
    with ComfyServerWorkflowExecutor(server.address) as made:
        yield made


def test_the_blocking_call_works_and_futures_end(executor: ComfyServerWorkflowExecutor) -> None:
    run = executor.submit_workflow(bench(), num_samples=5)
    done = [future.result() for future in as_completed(run.futures, timeout=PATIENCE)]
    assert sorted(result.index for result in done) == [0, 1, 2, 3, 4]


def test_cancelling_reaches_the_server(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    run = executor.submit_workflow(bench(ENDLESS, steps=10_000), num_samples=3)
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 2}, PATIENCE)
    run.cancel()
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    assert statuses(server)["success"] == 0


@pytest.mark.parametrize("text", ['a "fox"', 'x", "fail": "no', "a\\b\nc", "$HOME ${HOME} {{ 1 }}"])
def test_a_prompt_sets_its_own_input_and_no_other(
    server: DevServer, executor: ComfyServerWorkflowExecutor, text: str
) -> None:
    template = WorkflowTemplate(json.dumps(bench_graph(text="{{ prompt }}")))
    run = executor.submit_workflow(template, prompt=text)
    assert len(run.result(PATIENCE)) == 1
    (prompt,) = server.prompts
    assert prompt.graph["1"]["inputs"]["text"] == text
    assert prompt.graph["1"]["inputs"]["fail"] == ""


def test_an_odd_number_of_samples(server: DevServer, executor: ComfyServerWorkflowExecutor) -> None:
    text = json.dumps(bench_graph(batch_size=77)).replace("77", "{{ batch_size }}")
    template = WorkflowTemplate(text)
    run = executor.submit_workflow(template, num_samples=3, batch_size=2)
    assert len(run.result(PATIENCE)) == 3
    sizes = [prompt.graph["1"]["inputs"]["batch_size"] for prompt in server.prompts]
    assert sorted(sizes) == [1, 2]


def test_a_star_import() -> None:
    code = "from comfy_executors import *; print(ComfyServerWorkflowExecutor.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ComfyServerWorkflowExecutor\n"


def test_a_job_between_queue_and_history_is_not_lost(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.refuse_websockets = True
    images = executor.submit_workflow(bench(), num_samples=30).result(PATIENCE)
    assert len({image.name for image in images}) == 30
    ended(server, success=30)


@pytest.mark.parametrize("status", [502, 503])
def test_a_post_that_fails_after_it_was_accepted_is_not_queued_twice(
    server: DevServer, executor: ComfyServerWorkflowExecutor, status: int
) -> None:
    server.faults.reset_after("POST", "/prompt")
    server.faults.fail("GET", "/queue", status=status)
    assert len(executor.submit_workflow(bench()).result(PATIENCE)) == 1
    ended(server, success=1)
    assert served(server)["POST /prompt"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_preview_frames_are_no_results(version: str) -> None:
    template = bench(previews=True, steps=5)
    with DevServer(version=version) as server, ComfyServerWorkflowExecutor(server.address) as e:
        images = e.submit_workflow(template).result(PATIENCE)
    assert [image.type for image in images] == ["output"]


def test_the_websocket_is_there_before_the_first_post(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)
    routes = [f"{request.method} {request.path}" for request in server.requests]
    assert routes.index("GET /ws") < routes.index("POST /prompt")
    assert {prompt.client_id for prompt in server.prompts} == {
        request.query["clientId"] for request in server.requests if request.path == "/ws"
    }


def test_a_dropped_socket_starts_no_storm(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    server.faults.drop_websocket_after = "executing"
    assert len(executor.submit_workflow(bench(2.0)).result(PATIENCE)) == 1
    # Polls after 0, 0.25, 0.65, 1.3 and 2.3 s; one history at the end.
    assert served(server)["GET /queue"] <= 6
    assert served(server)["GET /history/*"] <= 2


def test_files_of_one_name_in_two_subfolders(executor: ComfyServerWorkflowExecutor) -> None:
    graph = bench_graph()
    graph["2"]["inputs"]["filename_prefix"] = "a/same"
    graph["3"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0},
    }
    graph["4"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["3", 0], "filename_prefix": "b/same"},
    }
    images = executor.submit_workflow(WorkflowTemplate.from_graph(graph)).result(PATIENCE)
    assert {image.name for image in images} == {"same_00001_.png"}
    assert {image.subfolder: image.image.width for image in images} == {"a": 16, "b": 8}


def test_a_strangers_end_is_not_ours(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    stranger = stranger_posts(server, 0.3)
    (image,) = executor.submit_workflow(bench(0.2)).result(PATIENCE)
    assert image.prompt_id != stranger
    ended(server, success=2)


def test_the_environment_stays_out_of_values(
    server: DevServer, executor: ComfyServerWorkflowExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "NAME", "secret")
    template = WorkflowTemplate.from_graph(bench_graph(text="$NAME ${NAME} %NAME%"))
    executor.submit_workflow(template).result(PATIENCE)
    assert server.prompts[0].graph["1"]["inputs"]["text"] == "$NAME ${NAME} %NAME%"


def test_a_video_under_images_is_delivered(
    server: DevServer, executor: ComfyServerWorkflowExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    graph = bench_graph(batch_size=2)
    graph["2"] = {
        "class_type": "SaveWEBM",
        "inputs": {
            "images": ["1", 0],
            "filename_prefix": "v",
            "codec": "vp9",
            "fps": 24.0,
            "crf": 32.0,
        },
    }
    with caplog.at_level(logging.WARNING):
        run = executor.submit_workflow(WorkflowTemplate.from_graph(graph))
        assert run.result(PATIENCE) == []
    (video,) = run.outputs(PATIENCE)
    assert (video.kind, video.name) == ("video", "v_00001_.webm")
    assert video.data == (server.directory / "output" / video.name).read_bytes()
    assert "no image but 1 other outputs" in caplog.text


def test_a_200_with_node_errors_is_an_error(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    graph = bench_graph()
    a_text = {"images": ["1", 1], "filename_prefix": "x"}
    graph["3"] = {"class_type": "SaveImage", "inputs": a_text}
    with pytest.raises(WorkflowRejectedError, match="Node 3"):
        executor.submit_workflow(WorkflowTemplate.from_graph(graph)).result(PATIENCE)


def test_two_executors_never_share_a_client_id(
    server: DevServer, executor: ComfyServerWorkflowExecutor
) -> None:
    with ComfyServerWorkflowExecutor(server.address) as other:
        runs = [made.submit_workflow(bench(), num_samples=5) for made in (executor, other)]
        names = {image.name for run in runs for image in run.result(PATIENCE)}
    assert len(names) == 10
    assert len({prompt.client_id for prompt in server.prompts}) == 2


def test_the_key_stays_with_the_server(server: DevServer) -> None:
    with ComfyServerWorkflowExecutor(server.address, headers={"X-Key": "k"}) as executor:
        executor.submit_workflow(bench()).result(PATIENCE)
    assert all(request.headers.get("X-Key") == "k" for request in server.requests)
    plain = requests.get(f"{server.url}/queue", timeout=PATIENCE)
    assert "k" not in plain.request.headers.values()
