"""The handler of a RunPod worker by itself: hostile input, settings, sickness, sizes."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_kit import ENDLESS, PATIENCE, bench_graph, statuses
from worker_kit import HOSTILE, bench_document, document, node, put_together

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import InputImageError
from comfy_executors.workers.runpod_handler import RunPodWorker, _Result, engine_from_environment

# On Python 3.9 boto3 says goodbye to it.
pytestmark = pytest.mark.filterwarnings("ignore:Boto3 will no longer support:Warning")


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


# The handler by itself.


def handled(worker: RunPodWorker, request: Any) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [item async for item in worker.handle({"id": "job-1", "input": request})]

    return asyncio.run(collect())


@pytest.fixture
def plain_worker(server: DevServer) -> Iterator[RunPodWorker]:
    made = RunPodWorker({"COMFYUI_ADDRESS": server.address}, {}, shrink_result=False)
    yield made
    made.close()


@pytest.mark.parametrize(("changes", "kind", "words"), HOSTILE)
def test_a_hostile_document_is_refused_before_anything_runs(
    plain_worker: RunPodWorker, server: DevServer, changes: Any, kind: Any, words: str
) -> None:
    raw = {**wire.encode_document(bench_document(1)), **changes}
    answer = put_together(handled(plain_worker, {"comfy_executors": raw}), bench_document(1))
    assert isinstance(answer.failures[None], kind)
    assert words in str(answer.failures[None])
    assert server.requests == []


@pytest.mark.parametrize("images", [7, [7], [{"name": "b.png"}]])
def test_hostile_images_are_refused(plain_worker: RunPodWorker, images: Any) -> None:
    files = (wire.InputFile("a.png", b"x"),)
    request = wire.encode_request(document(bench_graph(), input_images=files))
    request["images"] = images
    answer = put_together(handled(plain_worker, request), bench_document(1))
    assert list(answer.failures) == [None]


@pytest.mark.parametrize(
    "request_",
    [None, 7, [], "x", {}, {"workflow": []}, {"workflow": {}, "images": 7}],
)
def test_an_input_of_neither_kind_is_an_error(plain_worker: RunPodWorker, request_: Any) -> None:
    (answer,) = handled(plain_worker, request_)
    assert set(answer) == {"error"}


def test_a_url_to_a_private_address_fails_the_job(
    plain_worker: RunPodWorker, server: DevServer
) -> None:
    files = (wire.InputFile("a.png", url="https://127.0.0.1:9/a.png"),)
    job = document(bench_graph(), input_images=files)
    answer = put_together(handled(plain_worker, wire.encode_request(job)), job)
    assert isinstance(answer.failures[None], InputImageError)
    assert server.prompts == []


def test_a_workflow_without_images_succeeds_as_the_official_one_does(
    plain_worker: RunPodWorker,
) -> None:
    graph = {"1": node("PreviewAny", source="text")}
    (answer,) = handled(plain_worker, {"workflow": graph})
    assert answer == {"status": "success_no_images", "images": []}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"COMFYUI_READY_TIMEOUT": "soon"}, "COMFYUI_READY_TIMEOUT must be seconds"),
        ({"BUCKET_ENDPOINT_URL": "http://x"}, "BUCKET_ACCESS_KEY_ID"),
        ({"COMFYUI_ADDRESS": "not an address"}, "not an address"),
    ],
)
def test_a_wrong_setting_is_told_to_who_sent_the_job(
    environment: dict[str, str], words: str
) -> None:
    worker = RunPodWorker(environment, {})
    job = bench_document(1)
    answer = put_together(handled(worker, wire.encode_request(job)), job)
    assert words in str(answer.failures[None])
    (official,) = handled(worker, {"workflow": bench_graph()})
    assert words in official["error"]


def test_a_comfyui_that_is_gone_asks_for_a_fresh_worker(server: DevServer) -> None:
    config: dict[str, Any] = {}
    environment = {"COMFYUI_ADDRESS": server.address, "COMFYUI_READY_TIMEOUT": "0.3"}
    server.faults.refuse_connections = True
    worker = RunPodWorker(environment, config)
    (official,) = handled(worker, {"workflow": bench_graph()})
    assert "not ready" in official["error"]
    assert config == {"refresh_worker": True}
    worker.close()


def test_leaving_the_handler_cancels_the_job(plain_worker: RunPodWorker, server: DevServer) -> None:
    async def leave() -> None:
        request = wire.encode_request(bench_document(3, ENDLESS, steps=1000))
        events = plain_worker.handle({"id": "1", "input": request})
        async for event in events:
            if event["kind"] == "progress" and event["event"]["kind"] == "started":
                break
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    assert statuses(server)["success"] == 0


def test_the_dockerfile_names_what_there_is() -> None:
    root = Path(__file__).parents[2]
    lines = (root / "comfy_executors/workers/Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert [name for name in copied if not (root / name).exists()] == []
    # The package is built of nothing else.
    assert {"setup.cfg", "setup.py", "README.md", "LICENSE", "comfy_executors"} == set(copied)
    text = "\n".join(lines)
    assert ".[runpod-worker]" in text
    assert "cp comfy_executors/workers/runpod_handler.py /handler.py" in text


def test_the_settings_are_read() -> None:
    environment = {
        "COMFY_ORG_API_KEY": "hush",
        "COMFYUI_ADDRESS": "comfy:9000",
        "COMFYUI_READY_TIMEOUT": "7.5",
        "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9",
        "BUCKET_ACCESS_KEY_ID": "a",
        "BUCKET_SECRET_ACCESS_KEY": "b",
        "BUCKET_NAME": "pictures",
    }
    with engine_from_environment(environment) as engine:
        assert engine.executor.url == "http://comfy:9000"
        assert engine._comfy_org_api_key == "hush"
        assert engine._ready_timeout == 7.5
        assert engine.storage is not None
        assert engine.storage.bucket == "pictures"


def test_a_result_stays_small_however_long_the_job() -> None:
    part = wire.OutputPart(
        1, 1, 0, 0, 0, 3, "9", "a.png", "", "output", False, 1_500_000, "0" * 64, b"x" * 500_000
    )
    step = wire.Progress(0, 1, 0, wire.ProgressStep("step", "3", "KSampler", 1, 20))
    ends = wire.BatchEnded(9, 1, 0, 1, str(uuid.uuid4()), 1.5)
    second = wire.OutputPart(**{**vars(part), "part": 1})
    encoded = [wire.encode_event(event) for event in (step, part, second, ends)]
    result, kept = _Result(), [dict(raw) for _ in range(8000) for raw in encoded]
    for raw in kept:
        result.shrink(raw)
    last = wire.encode_event(wire.End(9, 1, 8000, 8000, 0))
    result.shrink(last)
    assert last["kind"] == "end"
    assert 6_000_000 < len(json.dumps([*kept, last])) < 10_000_000
    assert sum("data" in event for event in kept) == 8
