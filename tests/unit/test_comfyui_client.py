"""What a person reads when a server refuses a graph, and answers of strange shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_executors.clients.comfyui import (
    ComfyUIClient,
    execution_error,
    rejection,
)
from comfy_executors.clients.http import Answer, DeadlineWaiter, HttpClient
from comfy_executors.errors import (
    NodeExecutionError,
    ServerResponseError,
    WorkflowError,
    WorkflowInterruptedError,
)
from comfy_executors.node_info import choices, nearest_names

RECORDINGS = Path(__file__).parent.parent / "recordings"
SAMPLER = 'Node 1 "Sampler" (BenchSampler), input'
IMAGES = 'Node 2 "Save Image" (SaveImage), input images'
CYCLE = "Dependency cycle detected: 1 (ImageInvert) -> 2 (ImageInvert) -> 1 (ImageInvert)"
REFUSED = "the server refused the workflow"
NO_CLASS = "Cannot execute because a node is missing the class_type property."
COMMON = [
    'Node 1 "Sampler" (NoSuchNode): the server has no node class NoSuchNode; '
    "is its custom node package installed there?",
    f"{SAMPLER} seed: is required and missing",
    f"{SAMPLER} width: Value 0 smaller than min of 1",
    f"{SAMPLER} width: Value 99999 bigger than max of 8192",
    f"{SAMPLER} width: Failed to convert an input value to a INT value: "
    "wide, invalid literal for int() with base 10: 'wide'",
    f"{IMAGES}: Return type mismatch between linked nodes: "
    "received_type(STRING) mismatch input_type(IMAGE)",
    "Node 2 \"Save Image\" (SaveImage): it links to node '9', which is not in the graph",
    f"{IMAGES}: Bad linked input, must be a length-2 list of [node_id, slot_index]",
    "Node 1 (LoadImage), input image: Custom validation failed for node: "
    "Invalid image file: absent.png",
    "Node 2 (SaveImage), input images: Return type mismatch between linked nodes: "
    "received_type(MODEL) mismatch input_type(IMAGE)",
    f"{REFUSED}: Prompt has no outputs",
    f"{REFUSED}: Prompt has no outputs",
]
SENTENCES = {
    "comfyui-0.33.0/08_validation_errors": [
        *COMMON,
        f"{REFUSED}: Node 'ID #1' has no class_type. The workflow may be corrupted or a custom "
        "node is missing. (Node ID '#1')",
        f"Node 1 (ImageInvert): {CYCLE}\nNode 2 (ImageInvert): {CYCLE}",
        f"{REFUSED}: No prompt provided",
        f"{REFUSED}: No prompt provided",
    ],
    "comfyui-0.33.0/09_partly_valid_two_outputs": [
        "Node 4 (SaveImage): it links to node '7', which is not in the graph",
    ],
    "comfyui-0.8.0/08_validation_errors": [
        *COMMON,
        f"{REFUSED}: {NO_CLASS} (Node ID '#1')",
        f"{REFUSED}: Prompt outputs failed validation",
        f"{REFUSED}: {NO_CLASS} (Node ID '#nodes')",
        f"{REFUSED}: No prompt provided",
        f"{REFUSED}: No prompt provided",
        f"{REFUSED}: Prompt has no outputs",
    ],
}


@pytest.mark.parametrize("name", SENTENCES)
def test_recorded_refusals_read_well(name: str) -> None:
    sentences = []
    for line in json.loads((RECORDINGS / f"{name}.json").read_text()):
        body, sent = line.get("body"), line.get("sent")
        graph = sent.get("prompt") if isinstance(sent, dict) else None
        if line.get("http") != "POST /prompt" or line["status"] == 500:
            continue
        if line["status"] == 400 or body["node_errors"]:
            error = rejection(body, graph if isinstance(graph, dict) else {}, "http://s")
            sentences.append(str(error))
    assert sentences == SENTENCES[name]


def missing_model(names: list[str], config: list[Any] | None = None) -> str:
    config = [names, {}] if config is None else config
    extra = {"input_name": "ckpt_name", "input_config": config}
    problem = {
        "type": "value_not_in_list",
        "message": "Value not in list",
        "details": f"ckpt_name: 'sd_xl.safetensors' not in {names}",
        "extra_info": {**extra, "received_value": "sd_xl.safetensors"},
    }
    node = {"class_type": "CheckpointLoaderSimple", "errors": [problem]}
    title = {"title": "Load Checkpoint"}
    graph = {"4": {"class_type": "CheckpointLoaderSimple", "inputs": {}, "_meta": title}}
    return str(rejection({"node_errors": {"4": node}}, graph, "http://s"))


def test_a_missing_model_names_the_nearest() -> None:
    assert missing_model(["v1-5-pruned-emaonly.safetensors", "sd_xl_base_1.0.safetensors"]) == (
        'Node 4 "Load Checkpoint" (CheckpointLoaderSimple), input ckpt_name: "sd_xl.safetensors" '
        "is not on the server; nearest: sd_xl_base_1.0.safetensors"
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["flux"], "which has only flux"),
        (["flux", "v1", "pony"], "which has only flux, v1, pony"),
        (["flux", "v1", "pony", "wan"], "which has 4, such as flux, v1, pony"),
    ],
)
def test_a_missing_model_that_none_is_near_tells_which_there_are(
    names: list[str], words: str
) -> None:
    assert missing_model(names).endswith(f'"sd_xl.safetensors" is not on the server, {words}')


def test_long_names_make_a_short_sentence() -> None:
    assert len(missing_model(["é" * 5000] * 12)) < 600


def test_a_missing_model_on_a_server_without_models() -> None:
    assert missing_model([]).endswith("is not on the server, which has none to choose from")


def test_a_missing_model_of_a_server_that_does_not_list_them() -> None:
    assert missing_model([], ["COMBO"]).endswith('"sd_xl.safetensors" is not in the list')


def test_thousands_of_models_make_a_short_sentence() -> None:
    assert len(missing_model([f"sd_xl_{number}.safetensors" for number in range(2000)])) < 250


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ([["a", "b"]], ["a", "b"]),
        (["COMBO", {"options": ["a"]}], ["a"]),
        (["COMBO", {}], None),
        (["INT", {"min": 1}], None),
        ([], None),
        (None, None),
        ("COMBO", None),
    ],
)
def test_choices(config: Any, expected: list[str] | None) -> None:
    assert choices(config) == expected


def test_nearest_names_look_past_case() -> None:
    names = ["SDXL_Base.safetensors", "flux.safetensors", "vae.pt"]
    assert nearest_names("sdxl_base.safetensors", names)[0] == "SDXL_Base.safetensors"
    assert nearest_names("zzz", names) == ()


def test_nearest_names_go_by_the_stem_and_by_parts_of_it() -> None:
    names = ["SDXL/sd_xl_turbo_very_long_1.0_fp16.safetensors", "vae.safetensors"]
    assert nearest_names("sd_xl.safetensors", names) == (names[0],)
    assert nearest_names("vae", names) == (names[1],)


@pytest.mark.parametrize("version", ["0.33.0", "0.8.0"])
def test_recorded_failures_name_the_node(version: str) -> None:
    path = RECORDINGS / f"comfyui-{version}" / "05_execution_error.json"
    lines = json.loads(path.read_text())
    graph = next(line["sent"]["prompt"] for line in lines if line.get("sent"))
    messages = [line["ws"] for line in lines if isinstance(line.get("ws"), dict)]
    data = next(item["data"] for item in messages if item["type"] == "execution_error")
    error = execution_error(data, graph, "http://s")
    assert isinstance(error, NodeExecutionError)
    assert str(error).startswith('Node 1 "Sampler" (BenchSampler) failed: RuntimeError: ')
    assert error.exception_message == error.exception_message.strip() != ""
    assert error.prompt_id == data["prompt_id"]


class OneAnswer(HttpClient):
    """Gives one answer to every call."""

    def __init__(self, body: Any) -> None:
        super().__init__("http://example.invalid")
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answer = Answer(200, {}, content)

    def call(self, *args: Any, **kwargs: Any) -> Answer:
        return self.answer


def history_of(entry: Any) -> Any:
    http = OneAnswer({"p": entry})
    try:
        return ComfyUIClient(http).history("p", {}, DeadlineWaiter(10))
    finally:
        http.close()


def test_the_history_of_an_old_server_without_status() -> None:
    entry = history_of({"outputs": {"2": {"images": []}}, "status": None})
    assert (entry.outputs, entry.error) == ({"2": {"images": []}}, None)


def test_an_interruption_in_the_history_is_none_of_the_nodes() -> None:
    messages = [["execution_interrupted", {"prompt_id": "p"}]]
    entry = history_of({"status": {"status_str": "error", "messages": messages}})
    assert isinstance(entry.error, WorkflowInterruptedError)


def test_a_failure_without_a_reason_is_still_one() -> None:
    entry = history_of({"outputs": {}, "status": {"status_str": "error", "messages": []}})
    assert type(entry.error) is WorkflowError
    assert "does not say why" in str(entry.error)


def test_marks_of_strangers_are_looked_past() -> None:
    mine = {"comfy_executors_id": "mark"}
    queue = [
        [0, "a", {}, None],
        [1, "b", {}, {"comfy_executors_id": ["x"]}],
        [2, "c"],
        [3, "d", {}, mine, []],
    ]
    http = OneAnswer({"queue_running": [], "queue_pending": queue})
    found = ComfyUIClient(http).queue(DeadlineWaiter(10))
    http.close()
    assert found.pending == {"a", "b", "c", "d"}
    assert found.marks == {"mark": "d"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SHAPES = JSON | st.fixed_dictionaries(
    {}, optional={"queue_running": JSON, "queue_pending": JSON, "p": JSON, "prompt_id": JSON}
)


@settings(deadline=None)
@given(SHAPES | st.binary())
def test_an_answer_of_any_shape_is_understood_or_our_error(body: Any) -> None:
    http = OneAnswer(body)
    client, waiter = ComfyUIClient(http), DeadlineWaiter(10)
    calls: list[Callable[[], object]] = [
        lambda: client.check(waiter),
        lambda: client.queue(waiter),
        lambda: client.history("p", {}, waiter),
        lambda: client.find_marked("mark", waiter),
        lambda: client.post_prompt({}, "p", "c", waiter),
    ]
    for call in calls:
        try:
            call()
        except ServerResponseError as refused:
            error = refused
        else:
            continue
        assert "no ComfyUI server" in str(error)
    http.close()


@settings(deadline=None)
@given(JSON.filter(lambda value: isinstance(value, dict)))
def test_a_refusal_of_any_shape_is_an_error_of_ours(body: Any) -> None:
    http = OneAnswer(body)
    http.answer = Answer(400, {}, http.answer.content)
    with pytest.raises((ServerResponseError, WorkflowError)):
        ComfyUIClient(http).post_prompt({}, "p", "c", DeadlineWaiter(10))
    http.close()
