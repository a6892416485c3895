"""The engine of our workers: job documents on the dev server, as events, counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from server_kit import (
    ENDLESS,
    PATIENCE,
    bench_graph,
    ended,
    served,
    statuses,
    stranger_posts,
    threads_since,
)
from worker_kit import Answer, bench_document, document, load_graph, node, put_together

from comfy_executors import wire
from comfy_executors.devserver import DevServer
from comfy_executors.errors import (
    GraphError,
    NodeExecutionError,
    PromptLostError,
    ServerNotReadyError,
    ServerUnreachableError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import BatchResult
from comfy_executors.workers import inbox
from comfy_executors.workers.engine import Engine, Execution
from comfy_executors.workers.outputs import OutgoingBatch


@pytest.fixture
def server() -> Iterator[DevServer]:
    with DevServer() as started:
        yield started


@pytest.fixture
def engine(server: DevServer) -> Iterator[Engine]:
    with Engine(server.url, ready_timeout=PATIENCE) as started:
        yield started


def run(engine: Engine, job: wire.JobDocument) -> Answer:
    return put_together(engine.start(job), job)


def until(execution: Execution, kind: str, **facts: Any) -> list[dict[str, Any]]:
    """Take events up to the first of this kind with these facts."""
    events = []
    for event in execution:
        events.append(event)
        if event["kind"] == kind and all(event.get(k) == v for k, v in facts.items()):
            return events
    raise AssertionError(f"no {kind} in {events}")


def until_all(execution: Execution, *wanted: tuple[str, int]) -> list[dict[str, Any]]:
    """Take events until there was one of each of these kinds, or kinds of progress, and batches."""
    events: list[dict[str, Any]] = []
    left = {*wanted}
    while left:
        event = next(execution)
        events.append(event)
        left.discard((event.get("event", event)["kind"], event.get("batch", -1)))
    return events


def saved(server: DevServer, output: wire.WholeOutput) -> bytes:
    params = {"filename": output.name, "subfolder": output.subfolder, "type": output.type}
    return requests.get(f"{server.url}/view", params=params, timeout=PATIENCE).content


# What comes out.


def test_each_batch_runs_once_and_its_files_come_whole(server: DevServer, engine: Engine) -> None:
    answer = run(engine, bench_document(5, batch_size=2))
    assert answer.events[0]["graphs"] == 5
    assert sorted(answer.batches) == [0, 1, 2, 3, 4]
    outputs = [output for batch in answer.batches.values() for output in batch.outputs]
    assert [output.data for output in outputs] == [saved(server, output) for output in outputs]
    assert len({output.data for output in outputs}) == 10
    assert server.node_runs == {"BenchSampler": 5, "SaveImage": 5}
    assert not answer.failures
    assert answer.missing == []


def test_what_the_graphs_share_is_computed_once(server: DevServer, engine: Engine) -> None:
    loader = node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    graphs = [
        {**bench_graph(seed=seed), "7": loader, "8": node("PreviewAny", source=["7", 0])}
        for seed in range(4)
    ]
    answer = run(engine, document(*graphs))
    assert len(answer.batches) == 4
    assert server.node_runs["CheckpointLoaderSimple"] == 1
    assert server.node_runs["BenchSampler"] == 4


def test_batches_run_in_order(server: DevServer, engine: Engine) -> None:
    answer = run(engine, bench_document(5, 0.2))
    assert list(answer.batches) == [0, 1, 2, 3, 4]
    assert [prompt.graph["1"]["inputs"]["seed"] for prompt in server.prompts] == [0, 1, 2, 3, 4]


def test_the_next_prompt_is_queued_before_the_present_one_ends(
    server: DevServer, engine: Engine
) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = bench_document(4, 0.3)
        answer = pool.submit(run, engine, job)
        server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
        assert len(answer.result(PATIENCE).batches) == 4


def test_a_slow_reader_holds_the_work_back(server: DevServer, engine: Engine) -> None:
    execution = engine.start(bench_document(12))
    until(execution, "batch")
    server.wait_for(lambda s: statuses(s)["success"] == len(s.prompts) >= 4, PATIENCE)
    assert len(server.prompts) <= 5  # four in flight and the one that was taken
    execution.cancel()


def test_a_large_file_comes_in_parts(server: DevServer, engine: Engine) -> None:
    job = bench_document(1, width=1024, height=1024)
    answer = run(engine, job)
    (output,) = answer.batches[0].outputs
    assert output.size > 3_000_000
    assert answer.kinds["output"] == -(-output.size // wire.PART_BYTES)
    assert output.data == saved(server, output)


def test_outputs_are_numbered_by_their_nodes_places_in_the_graph(engine: Engine) -> None:
    image = node("EmptyImage", width=16, height=8, batch_size=1, color=0)
    save = {"images": ["1", 0]}
    graph = {
        "9": node("SaveImage", filename_prefix="nine", **save),
        "1": image,
        "5": node("PreviewAny", source="text"),
        "2": node("SaveImage", filename_prefix="two", **save),
    }
    (batch,) = run(engine, document(graph)).batches.values()
    assert [output.node for output in batch.outputs] == ["9", "5", "2"]
    assert [output.output for output in batch.outputs] == [0, 2, 3]


def test_a_node_of_several_images_has_several_numbers(engine: Engine) -> None:
    (batch,) = run(engine, bench_document(1, batch_size=3)).batches.values()
    assert [output.output for output in batch.outputs] == [1, 4, 7]
    assert [output.name for output in batch.outputs] == [f"t_0000{n}_.png" for n in (1, 2, 3)]


def two_chains(seconds: float, **slow: Any) -> dict[str, Any]:
    """A picture at once, and then another one after a while."""
    late = {
        "3": bench_graph(seconds, seed=5, text=["1", 1], **slow)["1"],
        "4": node("SaveImage", images=["3", 0], filename_prefix="late"),
    }
    return {**bench_graph(), **late}


def test_an_output_comes_while_the_rest_of_its_graph_runs(
    server: DevServer, engine: Engine
) -> None:
    job = document(two_chains(ENDLESS, steps=1000))
    execution = engine.start(job)
    event = until(execution, "output")[-1]
    assert (event["node"], statuses(server)) == ("2", {"running": 1})
    execution.cancel()


def test_outputs_of_a_batch_that_fails_later_are_followed_by_its_error(engine: Engine) -> None:
    job = document(two_chains(0.0, fail="out of luck"), bench_graph(seed=9))
    answer = run(engine, job)
    assert answer.kinds["output"] == 2
    assert list(answer.batches) == [1]
    assert isinstance(answer.failures[0], NodeExecutionError)
    assert answer.events[-1]["outputs"] == 1


def test_a_batch_that_is_run_again_is_numbered_anew() -> None:
    outgoing = OutgoingBatch({"1": {}, "2": {}, "3": {}})
    outputs = [
        WorkflowOutput(name.encode(), name=name, node_id=node_id, prompt_id=prompt_id)
        for prompt_id, node_id, name in [
            ("first", "3", "a"), ("first", "2", "b"), ("second", "2", "c"), ("second", "3", "d"),
            ("second", "2", "e"), ("second", None, "f"),
        ]
    ]  # fmt: skip
    assert [outgoing.add(output).number for output in outputs] == [2, 1, 1, 2, 5, 3]
    made = outgoing.finish(BatchResult(0, [], outputs[2:]))
    assert [(item.name, item.number) for item in made] == [("c", 1), ("e", 5), ("d", 2), ("f", 3)]


def test_little_progress_is_told_when_nobody_looks(engine: Engine) -> None:
    job = document(bench_graph(0.5, steps=50), options=wire.JobOptions(progress=False))
    assert run(engine, job).kinds["progress"] == 0


def test_what_nobody_looks_at_is_told_now_and_then(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_UNWATCHED_GAP_SECONDS", 0.1)
    options = wire.JobOptions(progress=False)
    job = document(bench_graph(ENDLESS, steps=10_000), options=options)
    execution = engine.start(job)
    assert until(execution, "progress")[-1]["event"]["kind"] in ("node", "step", "started")
    execution.cancel()


def test_the_key_of_comfy_org_goes_along_with_each_prompt(server: DevServer) -> None:
    with Engine(server.url, comfy_org_api_key="the endpoint's") as engine:
        for key in (None, "the job's"):
            list(engine.start(bench_document(1), key))
    with Engine(server.url) as engine:
        list(engine.start(bench_document(1)))
    history = requests.get(f"{server.url}/history", timeout=PATIENCE).json()
    sent = [history[p.prompt_id]["prompt"][3].get("api_key_comfy_org") for p in server.prompts]
    assert sent == ["the endpoint's", "the job's", None]


def test_previews_come_only_when_they_are_wanted(engine: Engine) -> None:
    graph = {**bench_graph(), "3": node("PreviewImage", images=["1", 0])}
    wanted = wire.JobOptions(include_previews=True)
    types = [
        [output.type for output in run(engine, job).batches[0].outputs]
        for job in (document(graph), document(graph, options=wanted))
    ]
    assert types == [["output"], ["output", "temp"]]


def test_progress_is_thinned_to_four_a_second(engine: Engine) -> None:
    started = time.monotonic()
    answer = run(engine, bench_document(1, 1.2, steps=240))
    seconds = time.monotonic() - started
    steps = [e["event"] for e in answer.events if e["kind"] == "progress"]
    thinned = [step for step in steps if step["kind"] in ("node", "step")]
    assert 3 <= len(thinned) <= 4 * seconds + 2
    assert [step["kind"] for step in steps[:2]] == ["queued", "started"]
    assert {step["title"] for step in thinned} <= {"Sampler", "SaveImage"}


# Inputs.


def test_each_input_is_uploaded_once_a_job(server: DevServer, engine: Engine) -> None:
    pictures = run(engine, bench_document(2)).data(0) + run(engine, bench_document(2)).data(1)
    names = ["ab_0000.png", "ab_0001.png"]
    files = tuple(
        wire.InputFile(name, data) for name, data in zip(names, pictures) if data is not None
    )
    graphs = [load_graph(name, f"p{number}") for number, name in enumerate(names * 2)]
    answer = run(engine, document(*graphs, input_images=files))
    assert len(answer.batches) == 4
    assert served(server)["POST /upload/image"] == 2
    assert [(server.directory / "input" / file.name).read_bytes() for file in files] == [
        file.data for file in files
    ]


def test_the_newest_job_decides_what_an_input_is(server: DevServer, engine: Engine) -> None:
    pictures = run(engine, bench_document(2)).batches
    datas = [pictures[index].outputs[0].data for index in (0, 1)]
    for data in datas:
        job = document(load_graph("same.png"), input_images=(wire.InputFile("same.png", data),))
        assert len(run(engine, job).batches) == 1
    assert (server.directory / "input" / "same.png").read_bytes() == datas[1]
    assert server.node_runs["LoadImage"] == 2


# Errors.


def test_a_batch_that_fails_does_not_keep_the_others(server: DevServer, engine: Engine) -> None:
    missing = {"1": node("NoSuchNode"), "2": node("SaveImage", images=["1", 0])}
    graphs = [
        bench_graph(seed=1),
        bench_graph(seed=2, fail="out of luck"),
        missing,
        {"1": node("PreviewImage", images=["7", 0])},
        bench_graph(seed=3),
    ]
    answer = run(engine, document(*graphs))
    assert sorted(answer.batches) == [0, 4]
    kinds = {batch: type(error) for batch, error in answer.failures.items()}
    assert kinds == {1: NodeExecutionError, 2: WorkflowRejectedError, 3: GraphError}
    failure = answer.failures[1]
    assert isinstance(failure, NodeExecutionError)
    assert (failure.title, failure.exception_message) == ("Sampler", "out of luck")
    assert statuses(server) == {"success": 2, "error": 1}


def test_a_batch_timeout_is_an_error_of_its_batch(server: DevServer, engine: Engine) -> None:
    options = wire.JobOptions(batch_timeout=0.3)
    job = document(bench_graph(ENDLESS, steps=1000), bench_graph(seed=2), options=options)
    answer = run(engine, job)
    assert sorted(answer.batches) == [1]
    assert isinstance(answer.failures[0], WorkflowTimeoutError)
    ended(server, interrupted=1, success=1)


def test_a_comfyui_that_never_comes_is_an_error_of_the_job(server: DevServer) -> None:
    server.faults.refuse_connections = True
    with Engine(server.url, ready_timeout=0.5) as engine:
        execution = engine.start(bench_document(2))
        answer = put_together(execution, bench_document(2))
    assert list(answer.failures) == [None]
    assert isinstance(answer.failures[None], ServerNotReadyError)
    assert execution.sick
    assert [str(item) for item in answer.missing] == ["the end of batch 0", "the end of batch 1"]


def test_a_comfyui_that_comes_late_is_waited_for(server: DevServer, engine: Engine) -> None:
    server.faults.refuse_connections = True
    job = bench_document(1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(run, engine, job)
        assert not answer.done()
        server.faults.refuse_connections = False
        assert len(answer.result(PATIENCE).batches) == 1


def test_a_comfyui_that_has_answered_is_waited_for_as_in_an_outage(server: DevServer) -> None:
    with Engine(server.url, ready_timeout=PATIENCE, outage_timeout=0.5) as engine:
        assert len(run(engine, bench_document(1)).batches) == 1
        server.faults.refuse_connections = True
        server.drop_websockets()
        execution = engine.start(bench_document(1))
        answer = put_together(execution, bench_document(1))
    assert "not ready within 0.5 s" in str(answer.failures[None])
    assert execution.sick


def test_a_comfyui_that_dies_makes_the_worker_sick(server: DevServer) -> None:
    with Engine(server.url, outage_timeout=0.5) as engine:
        endless = [bench_graph(ENDLESS, seed=seed, steps=1000) for seed in range(2, 9)]
        job = document(bench_graph(), *endless)
        execution = engine.start(job)
        # Nothing is under way then: a request that is being answered keeps its connection open.
        events = until_all(execution, ("batch", 0), ("queued", 1), ("queued", 2))
        server.faults.refuse_connections = True
        server.drop_websockets()
        answer = put_together([*events, *execution], job)
    rest = answer.failures.pop(None)
    assert type(rest) is PromptLostError
    assert "given up" in str(rest)
    # None, where no word of its beginning had come.
    assert [type(error) for error in answer.failures.values()] in ([], [ServerUnreachableError])
    assert execution.sick
    unsettled = {item.batch for item in answer.missing}
    named = sorted([*answer.batches, *unsettled, *answer.failures], key=str)
    assert named == [*range(8)]


def test_the_batch_that_ran_answers_for_the_death_of_comfyui(server: DevServer) -> None:
    graph = bench_graph()
    graph["3"] = bench_graph(100.0, steps=1000, text=["1", 1])["1"]
    graph["4"] = node("SaveImage", images=["3", 0], filename_prefix="late")
    # While it waits for its picture it hears of nothing, and the one behind it does.
    server.faults.delay("GET", "/view", ENDLESS, times=1)
    with Engine(server.url, outage_timeout=0.5) as engine:
        job = document(graph, *(bench_graph(seed=seed) for seed in range(2, 5)))
        execution = engine.start(job)
        events = until_all(execution, ("started", 0), ("queued", 1))
        server.wait_for(lambda s: not s.faults._rules, PATIENCE)
        server.faults.refuse_connections = True
        server.drop_websockets()
        answer = put_together([*events, *execution], job)
    assert {number: type(error) for number, error in answer.failures.items()} == {
        0: ServerUnreachableError,
        None: PromptLostError,
    }
    assert {item.batch for item in answer.missing} == {1, 2, 3}


def test_a_comfyui_that_dies_idle_costs_no_batch(server: DevServer) -> None:
    with Engine(server.url, outage_timeout=0.5) as engine:
        stranger_posts(server, ENDLESS)
        job = bench_document(4)
        execution = engine.start(job)
        events = until(execution, "progress", batch=0)
        server.faults.refuse_connections = True
        server.drop_websockets()
        answer = put_together([*events, *execution], job)
    assert [type(error) for error in answer.failures.values()] == [PromptLostError]
    assert {item.batch for item in answer.missing} == {0, 1, 2, 3}


def test_a_lost_cuda_context_ends_the_job(server: DevServer, engine: Engine) -> None:
    graphs = [bench_graph(seed=1, fail="CUDA error: device-side assert triggered\nTrace")]
    graphs += [bench_graph(ENDLESS, seed=seed, steps=1000) for seed in range(2, 9)]
    execution = engine.start(document(*graphs))
    answer = put_together(execution, document(*graphs))
    assert execution.sick == "CUDA error: device-side assert triggered"
    assert isinstance(answer.failures[0], NodeExecutionError)
    assert isinstance(answer.failures[None], PromptLostError)
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)


def test_out_of_memory_is_no_sickness(engine: Engine) -> None:
    graph = bench_graph(fail="Allocation on device 0 would exceed allowed memory")
    execution = engine.start(document(graph))
    assert [event["kind"] for event in execution][-2:] == ["error", "end"]
    assert execution.sick is None


def test_an_unforeseen_error_is_told_and_does_not_break_the_stream(server: DevServer) -> None:
    class Broken:
        def fetch(self, *_: Any) -> bytes:
            raise RuntimeError("a bug")

    broken: Any = Broken()
    with Engine(server.url, downloader=broken) as engine:
        files = (wire.InputFile("a.png", url="https://example.org/a.png"),)
        answer = run(engine, document(bench_graph(), input_images=files))
    assert type(answer.failures[None]) is WorkflowError
    assert "RuntimeError: a bug" in str(answer.failures[None])


# Cancelling.


def test_cancelling_empties_the_queue_of_what_is_ours(server: DevServer, engine: Engine) -> None:
    execution = engine.start(bench_document(9, ENDLESS, steps=1000))
    until(execution, "progress", batch=1)
    server.wait_for(lambda s: statuses(s) == {"running": 1, "pending": 1}, PATIENCE)
    stranger = stranger_posts(server, 0.0)
    execution.cancel()
    with pytest.raises(WorkflowCancelledError):
        list(execution)
    server.wait_for(lambda s: s.prompts[2].status == "success", PATIENCE)
    assert server.prompts[2].prompt_id == stranger
    # The second may begin in the moment between the two cancellations.
    found = statuses(server)
    assert (found["success"], found["interrupted"] + found["deleted"]) == (1, 2)


def test_a_reader_that_waits_hears_of_a_cancellation_at_once(
    server: DevServer, engine: Engine
) -> None:
    execution = engine.start(bench_document(1, ENDLESS, steps=1000))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, execution)
        server.wait_for(lambda s: statuses(s) == {"running": 1}, PATIENCE)
        execution.cancel()
        with pytest.raises(WorkflowCancelledError):
            reading.result(PATIENCE)
    ended(server, interrupted=1)


def test_cancelling_ends_the_wait_for_a_comfyui(server: DevServer, engine: Engine) -> None:
    server.faults.refuse_connections = True
    execution = engine.start(bench_document(1))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(list, execution)
        execution.cancel()
        with pytest.raises(WorkflowCancelledError):
            reading.result(PATIENCE)


def test_cancelling_before_and_after_does_no_harm(server: DevServer, engine: Engine) -> None:
    early = engine.start(bench_document(1))
    early.cancel()
    with pytest.raises(WorkflowCancelledError):
        next(early)
    late = engine.start(bench_document(1))
    events = list(late)
    late.cancel()
    assert events[-1]["errors"] == 0
    assert statuses(server) == {"success": 1}


def test_closing_leaves_no_thread_and_no_prompt(server: DevServer) -> None:
    before = set(threading.enumerate())
    engine = Engine(server.url)
    execution = engine.start(bench_document(3, ENDLESS, steps=1000))
    until(execution, "progress", batch=0)
    engine.close()
    ended(server, **dict(statuses(server)))
    server.wait_for(lambda s: not {"running", "pending"} & set(statuses(s)), PATIENCE)
    server.wait_for(lambda s: s.open_websockets == 0, PATIENCE)
    assert threads_since(before) == set()
