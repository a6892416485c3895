"""RunPod with a stand-in for the official worker: joined graphs, its answers and its limits."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runpod_worker import needs_sdk, sdk_worker
from server_kit import PATIENCE, bench, bench_graph, served, statuses

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    InputImageError,
    JobResultLostError,
    RunPodJobFailedError,
    RunPodWorkflowExecutor,
    WorkflowTemplate,
)
from comfy_executors.cli import main
from comfy_executors.devserver import DevServer
from comfy_executors.testing import RunPodStub

pytestmark = needs_sdk

OFFICIAL = Path(__file__).with_name("runpod_official.py").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DevServer, RunPodStub]]:
    with DevServer() as server, RunPodStub() as stub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYUI_ADDRESS", server.url)
        with sdk_worker(stub, OFFICIAL, tmp_path_factory.mktemp("worker")):
            yield server, stub


@pytest.fixture
def server(site: tuple[DevServer, RunPodStub]) -> DevServer:
    site[0].reset()
    return site[0]


@pytest.fixture
def stub(site: tuple[DevServer, RunPodStub]) -> Iterator[RunPodStub]:
    site[1].clear()
    yield site[1]
    site[1].clear()


Make = Callable[..., RunPodWorkflowExecutor]


@pytest.fixture
def make(stub: RunPodStub) -> Iterator[Make]:
    made: list[RunPodWorkflowExecutor] = []

    def make(worker: str = "worker-comfyui", **options: Any) -> RunPodWorkflowExecutor:
        made.append(
            RunPodWorkflowExecutor(
                stub.endpoint_id, stub.api_key, stub.url, worker=worker, **options
            )
        )
        return made[-1]

    yield make
    for executor in made:
        executor.close(cancel=True)


def picture() -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


# Five workflows as people have them.


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def loader() -> dict[str, Any]:
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "6": node("CLIPTextEncode", clip=["4", 1], text="a fox"),
        "7": node("CLIPTextEncode", clip=["4", 1], text="blurry"),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size="BATCH_SIZE"),
    }


def sampler(latent: str, **inputs: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": 0, "steps": 2, "cfg": 7.0, "denoise": 1.0}
    settings.update(sampler_name="euler", scheduler="normal", **inputs)
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}
    return node("KSampler", latent_image=[latent, 0], **settings, **links)


def saved(source: str, number: str, prefix: str = "fox") -> dict[str, Any]:
    return {
        f"{number}0": node("VAEDecode", samples=[source, 0], vae=["4", 2]),
        f"{number}1": node("SaveImage", images=[f"{number}0", 0], filename_prefix=prefix),
    }


def text_to_image() -> dict[str, Any]:
    return {**loader(), "3": sampler("5"), **saved("3", "9")}


def image_to_image() -> dict[str, Any]:
    graph = {**loader(), "1": node("LoadImage", image="{{ input_images[0] }}")}
    graph["2"] = node("VAEEncode", pixels=["1", 0], vae=["4", 2])
    del graph["5"]
    return {**graph, "3": sampler("2", denoise=0.6), **saved("3", "9")}


def refiner() -> dict[str, Any]:
    settings: dict[str, Any] = {"noise_seed": 0, "steps": 4, "cfg": 7.0, "sampler_name": "euler"}
    settings.update(scheduler="normal", model=["4", 0], positive=["6", 0], negative=["7", 0])
    base = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3}
    fine = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 10000}
    return {
        **loader(),
        "3": node(
            "KSamplerAdvanced", latent_image=["5", 0],
            return_with_leftover_noise="enable", **base, **settings,
        ),
        "8": node(
            "KSamplerAdvanced", latent_image=["3", 0],
            return_with_leftover_noise="disable", **fine, **settings,
        ),
        **saved("8", "9", "sub/refined"),
    }  # fmt: skip


def two_save_nodes() -> dict[str, Any]:
    graph = {**loader(), "3": sampler("5"), **saved("3", "9", "large")}
    graph["12"] = node(
        "ImageScale", image=["90", 0], width=32, height=32, upscale_method="area", crop="disabled"
    )
    return {**graph, "13": node("SaveImage", images=["12", 0], filename_prefix="small")}


def seed_node() -> dict[str, Any]:
    graph = {**loader(), "20": node("PrimitiveInt", value="SEED")}
    graph["3"] = sampler("5", seed=["20", 0])
    graph["8"] = sampler("3", seed=["20", 0], denoise=0.5)
    return {**graph, **saved("8", "9")}


WORKFLOWS = [text_to_image, image_to_image, refiner, two_save_nodes, seed_node]


def template_of(graph: dict[str, Any]) -> WorkflowTemplate:
    text = json.dumps(graph).replace('"BATCH_SIZE"', "{{ batch_size }}")
    return WorkflowTemplate(text.replace('"SEED"', "{{ seed }}"))


def pictures(run: Any) -> dict[int, list[tuple[str | None, str, bytes]]]:
    """Everything that tells batches apart, but the metadata, which holds the joined graph."""
    return {
        future.result(PATIENCE).index: sorted(
            (image.node_id, image.subfolder, Image.open(io.BytesIO(image.data)).tobytes())
            for image in future.result().images
        )
        for future in run.futures
    }


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.__name__)
def test_a_joined_graph_makes_the_same_pictures(
    make: Make, stub: RunPodStub, workflow: Callable[[], dict[str, Any]]
) -> None:
    template = template_of(workflow())
    inputs = [picture()] if workflow is image_to_image else None
    options: dict[str, Any] = {"num_samples": 5, "seed": 40, "batch_size": 2}
    joined = pictures(make().submit_workflow(template, inputs, **options))
    with DevServer() as own, ComfyServerWorkflowExecutor(own.address) as one_by_one:
        expected = pictures(one_by_one.submit_workflow(template, inputs, **options))
    assert joined == expected
    assert len({str(batch) for batch in joined.values()}) == len(joined)
    assert len(stub.jobs) == 1


def test_shared_nodes_run_once(make: Make, server: DevServer) -> None:
    make().submit_workflow(template_of(text_to_image()), num_samples=16).result(PATIENCE)
    runs = server.node_runs
    assert (runs["CheckpointLoaderSimple"], runs["EmptyLatentImage"]) == (1, 1)
    assert (runs["KSampler"], runs["SaveImage"]) == (16, 16)


def test_inputs_are_uploaded_once(make: Make, server: DevServer) -> None:
    template = template_of(image_to_image())
    make().submit_workflow(template, [picture()], num_samples=16).result(PATIENCE)
    assert served(server)["POST /upload/image"] == 1
    assert server.node_runs["LoadImage"] == 1


def test_auto_finds_out(make: Make, stub: RunPodStub) -> None:
    executor = make("auto")
    for _ in range(2):
        images = executor.submit_workflow(bench(), num_samples=4, seed=1).result(PATIENCE)
        assert [image.batch_index for image in images] == [0, 1, 2, 3]
        assert [image.seed for image in images] == [1, 2, 3, 4]
        assert {image.name for image in images} <= {f"t_0000{n}_.png" for n in range(1, 9)}
    assert [set(job.input) for job in stub.jobs] == [{"workflow", "comfy_executors"}] * 2


def test_only_official_fields_for_the_official_worker(make: Make, stub: RunPodStub) -> None:
    make().submit_workflow(template_of(image_to_image()), [picture()]).result(PATIENCE)
    assert set(stub.jobs[0].input) == {"workflow", "images"}


@pytest.mark.parametrize("worker", ["auto", "worker-comfyui"])
def test_a_job_takes_what_a_result_has_room_for(make: Make, stub: RunPodStub, worker: str) -> None:
    graph = text_to_image()
    graph["5"]["inputs"].update(width=1024, height=1024)
    run = make(worker, max_workers=1).submit_workflow(template_of(graph), num_samples=5)
    assert [image.batch_index for image in run.result(PATIENCE)] == list(range(5))
    saves = [json.dumps(job.input["workflow"]).count("SaveImage") for job in stub.jobs]
    assert saves == [3, 2]


def test_what_cannot_be_told_apart_is_not_joined(make: Make, stub: RunPodStub) -> None:
    graph = bench_graph()
    graph["3"] = node("SaveImageWebsocket", images=["1", 0])
    template = WorkflowTemplate.from_graph(graph)
    assert len(make().submit_workflow(template, num_samples=3).result(PATIENCE)) == 3
    assert len(stub.jobs) == 3


def failing(condition: str) -> WorkflowTemplate:
    graph = bench_graph()
    graph["1"]["inputs"]["fail"] = f"{{{{ 'boom' if {condition} else '' }}}}"
    return WorkflowTemplate(json.dumps(graph))


def test_one_bad_batch_does_not_spoil_the_others(make: Make, stub: RunPodStub) -> None:
    run = make().submit_workflow(failing("seed == 2"), num_samples=4, seed=1, ignore_errors=True)
    assert Counter(image.batch_index for image in run) == {0: 1, 2: 1, 3: 1}
    error: Any = run.errors[1]
    assert isinstance(error, RunPodJobFailedError)
    assert "boom" in str(error)
    assert error.job_id in [job.id for job in stub.jobs]


def test_a_refused_graph_is_not_tried_again(make: Make, stub: RunPodStub) -> None:
    graph = bench_graph()
    graph["1"]["class_type"] = "NoSuchNode"
    run = make().submit_workflow(WorkflowTemplate.from_graph(graph), num_samples=3)
    with pytest.raises(RunPodJobFailedError, match="validation failed"):
        run.result(PATIENCE)
    assert len(stub.jobs) == 1


def test_no_image_is_an_error(make: Make) -> None:
    graph = {"1": node("EmptyImage", width=8, height=8, batch_size=1, color=0)}
    graph["2"] = node("SaveImageWebsocket", images=["1", 0])
    run = make().submit_workflow(WorkflowTemplate.from_graph(graph), randomize_seed=False)
    with pytest.raises(RunPodJobFailedError, match="no image that worker-comfyui passes on"):
        run.result(PATIENCE)


def test_a_lost_result_says_what_to_do(make: Make, stub: RunPodStub) -> None:
    stub.faults.lose_result(times=2)
    with pytest.raises(JobResultLostError, match="S3") as caught:
        make().submit_workflow(bench()).result(PATIENCE)
    assert caught.value.job_id == stub.jobs[0].id
    assert len(stub.jobs) == 1


@pytest.mark.parametrize("worker", ["auto", "worker-comfyui"])
def test_a_lost_result_of_several_batches_is_made_in_smaller_jobs(
    make: Make, stub: RunPodStub, server: DevServer, worker: str
) -> None:
    stub.faults.lose_result()
    images = make(worker).submit_workflow(bench(), num_samples=3).result(PATIENCE)
    assert [image.batch_index for image in images] == [0, 1, 2]
    assert len(stub.jobs) == 4


@pytest.mark.parametrize("worker", ["auto", "worker-comfyui"])
def test_results_that_are_always_lost_are_not_paid_for_again_and_again(
    make: Make, stub: RunPodStub, server: DevServer, worker: str
) -> None:
    stub.faults.lose_result(times=9)
    run = make(worker).submit_workflow(bench(), num_samples=3, ignore_errors=True)
    assert list(run) == []
    assert {type(error) for error in run.errors.values()} == {JobResultLostError}
    # All together, and one by one; where it is not sure whose worker it is, one tells enough.
    assert len(stub.jobs) == (4 if worker == "worker-comfyui" else 2)


@pytest.mark.parametrize("worker", ["auto", "worker-comfyui", "comfy-executors"])
def test_a_batch_that_is_too_large_is_warned_of(
    make: Make, stub: RunPodStub, caplog: pytest.LogCaptureFixture, worker: str
) -> None:
    caplog.set_level(logging.WARNING)
    stub.faults.stuck_queue = "no workers"
    run = make(worker).submit_workflow(bench(width=4096, height=1024))
    run.cancel()
    told = "the images of one batch are about 12 MB" in caplog.text
    assert told is (worker != "comfy-executors")
    assert ("if the endpoint runs that" in caplog.text) is (worker == "auto")


@pytest.mark.parametrize("worker", ["auto", "worker-comfyui"])
def test_a_joined_job_can_be_taken_up_again(make: Make, stub: RunPodStub, worker: str) -> None:
    made = make().submit_workflow(bench(batch_size=2), num_samples=3).result(PATIENCE)
    run = make(worker).attach(stub.jobs[0].id, 3)
    again = [future.result(PATIENCE) for future in run.futures]
    assert [len(result.images) for result in again] == [2, 2, 2]
    assert [image.data for result in again for image in result.images] == [i.data for i in made]
    assert {result.job_id for result in again} == {stub.jobs[0].id}
    assert len(stub.jobs) == 1


def test_the_worker_can_be_named_on_the_command_line(
    stub: RunPodStub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", stub.api_key)
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", stub.url)
    (tmp_path / "t.json").write_text(json.dumps(bench_graph()))
    where = ["--runpod", stub.endpoint_id, "--worker", "worker-comfyui"]
    output = ["--num-samples", "2", "--output", str(tmp_path / "out")]
    assert main(["run", str(tmp_path / "t.json"), *where, *output]) == 0
    assert [set(job.input) for job in stub.jobs] == [{"workflow"}]
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert main(["runpod", "smoke", stub.endpoint_id, "--worker", "worker-comfyui"]) == 0
    assert "the worker is worker-comfyui" in capfd.readouterr().out


def test_a_worker_that_is_not_known_is_refused(capfd: Any) -> None:
    with pytest.raises(SystemExit):
        main(["run", "t.json", "--runpod", "x", "--worker", "mine"])
    assert "worker-comfyui" in capfd.readouterr().err


def test_urls_are_refused_before_anything_is_sent(make: Make, stub: RunPodStub) -> None:
    with pytest.raises(InputImageError, match="takes no URLs"):
        make().submit_workflow(template_of(image_to_image()), ["https://example.com/a.png"])
    assert stub.jobs == []


def test_workers_before_5_pass_on_one_image(
    stub: RunPodStub, server: DevServer, make: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COMFYUI_ADDRESS", server.url)
    monkeypatch.setenv("OFFICIAL_SHAPE", "4")
    with RunPodStub() as other, sdk_worker(other, OFFICIAL, tmp_path, "old-1"):
        executor = RunPodWorkflowExecutor(other.endpoint_id, other.api_key, other.url)
        with executor:
            images = executor.submit_workflow(bench(), num_samples=3).result(PATIENCE)
            assert [image.batch_index for image in images] == [0, 1, 2]
            assert len(other.jobs) == 4  # the first told nothing of whose image it was
    assert os.environ["OFFICIAL_SHAPE"] == "4"
    assert statuses(server)["success"] == 4
