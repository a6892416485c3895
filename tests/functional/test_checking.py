"""Checking graphs against a server's own description of its nodes, and against its verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import requests

import comfy_executors
from comfy_executors import NodeProblem, WorkflowTemplate
from comfy_executors.checking import check_nodes, is_warning
from comfy_executors.devserver import DevServer

DEMO = Path(comfy_executors.__file__).with_name("demo") / "workflow.json.jinja"
RECORDED = Path(__file__).parent.parent / "recordings" / "comfyui-0.33.0"
Finding = tuple[str, "str | None", str]


@pytest.fixture(scope="module")
def server() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture(scope="module")
def info(server: DevServer) -> Any:
    return requests.get(f"{server.url}/object_info", timeout=30).json()


@pytest.fixture
def graph() -> Any:
    return WorkflowTemplate.from_file(DEMO).render(prompt="a fox", batch_size=1)


def findings(problems: list[NodeProblem]) -> set[Finding]:
    return {(problem.node_id, problem.input_name, problem.kind) for problem in problems}


def refused(server: DevServer, graph: Any) -> tuple[bool, set[Finding]]:
    """What the server says of a graph, and what it says of which input."""
    answer = requests.post(f"{server.url}/prompt", json={"prompt": graph}, timeout=30)
    return answer.status_code == 400, found_in(answer.json())


def found_in(body: Any) -> set[Finding]:
    return {
        (node_id, error["extra_info"].get("input_name"), error["type"])
        for node_id, node in (body.get("node_errors") or {}).items()
        for error in node["errors"]
    }


def test_a_good_graph_has_no_problems(server: DevServer, info: Any, graph: Any) -> None:
    assert check_nodes(graph, info) == []
    assert refused(server, graph) == (False, set())


BAD_VALUES = [
    ("4", "ckpt_name", "sd_xl.safetensors", "value_not_in_list", "is not on the server; nearest:"),
    ("4", "ckpt_name", "zzz", "value_not_in_list", '"zzz" is not on the server, which has only '),
    ("3", "sampler_name", "eular", "value_not_in_list", "nearest: euler"),
    ("5", "width", 0, "value_smaller_than_min", "0 is below the minimum of 16"),
    ("5", "width", 10**6, "value_bigger_than_max", "is above the maximum of 16384"),
    ("3", "steps", "many", "invalid_input_type", '"many" is no whole number'),
    ("3", "cfg", None, "invalid_input_type", "null is no number"),
    ("8", "vae", ["4"], "bad_linked_input", "a link is written"),
    ("6", "clip", ["4", 0], "return_type_mismatch", "its CLIP is output 1"),
]


@pytest.mark.parametrize(("node", "name", "value", "kind", "words"), BAD_VALUES)
def test_a_bad_value_is_told_as_the_server_tells_it(
    server: DevServer,
    info: Any,
    graph: Any,
    node: str,
    name: str,
    value: Any,
    kind: str,
    words: str,
) -> None:
    graph[node]["inputs"][name] = value
    (problem,) = check_nodes(graph, info)
    assert findings([problem]) == {(node, name, kind)}
    assert words in str(problem)
    assert refused(server, graph) == (True, {(node, name, kind)})


# The server says of these that something went wrong in its own checks, or accepts them at first.
WORSE_VALUES = [
    ("8", "vae", ["4", 3], "bad_linked_input", "has only 0 MODEL, 1 CLIP, 2 VAE"),
    ("8", "vae", [4, 2], "bad_linked_input", "the id in quotes"),
    ("8", "vae", ["4", "2"], "bad_linked_input", "the slot without"),
    ("8", "vae", "4", "invalid_input_type", "wants a link to a VAE output"),
]


@pytest.mark.parametrize(("node", "name", "value", "kind", "words"), WORSE_VALUES)
def test_a_bad_link_is_told_better_than_the_server_does(
    info: Any, graph: Any, node: str, name: str, value: Any, kind: str, words: str
) -> None:
    graph[node]["inputs"][name] = value
    (problem,) = check_nodes(graph, info)
    assert findings([problem]) == {(node, name, kind)}
    assert words in str(problem)


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [("3", "steps", "30"), ("3", "cfg", "7.5"), ("3", "steps", 20.0), ("6", "text", 5)],
)
def test_values_that_the_server_converts_are_good(
    server: DevServer, info: Any, graph: Any, node: str, name: str, value: Any
) -> None:
    graph[node]["inputs"][name] = value
    assert check_nodes(graph, info) == []
    assert refused(server, graph) == (False, set())


def test_an_unknown_class_names_the_nearest(server: DevServer, info: Any, graph: Any) -> None:
    graph["3"]["class_type"] = "KSamplr"
    (problem,) = check_nodes(graph, info)
    assert findings([problem]) == {("3", None, "missing_node_type")}
    assert problem.nearest[0] == "KSampler"
    assert refused(server, graph)[0]


def test_a_missing_input_is_an_error_and_an_unknown_one_a_warning(
    server: DevServer, info: Any, graph: Any
) -> None:
    graph["3"]["inputs"]["sampler"] = graph["3"]["inputs"].pop("sampler_name")
    missing, unknown = check_nodes(graph, info)
    assert findings([missing]) == {("3", "sampler_name", "required_input_missing")}
    assert findings([unknown]) == {("3", "sampler", "unknown_input")}
    assert (is_warning(missing), is_warning(unknown)) == (False, True)
    assert unknown.nearest[0] == "sampler_name"
    assert refused(server, graph) == (True, findings([missing]))


def test_an_input_that_may_have_been_renamed_is_told_on_both_sides(info: Any, graph: Any) -> None:
    inputs = graph["3"]["inputs"]
    inputs["sampler"], inputs["number_of_steps"] = inputs.pop("sampler_name"), inputs.pop("steps")
    told = {problem.input_name: problem for problem in check_nodes(graph, info)}
    assert told.keys() == {"sampler", "sampler_name", "number_of_steps", "steps"}
    for old, new in (("sampler", "sampler_name"), ("number_of_steps", "steps")):
        assert f"may have renamed it to {new}, which is missing" in told[old].reason
        assert f"may be what {old} was called before" in told[new].reason
        assert told[old].nearest == (new,)


def test_one_unknown_and_one_missing_input_are_told_together(info: Any, graph: Any) -> None:
    graph["5"]["inputs"]["x"] = graph["5"]["inputs"].pop("batch_size")
    missing, unknown = check_nodes(graph, info)
    assert missing.reason.endswith("it may be what x was called before, which is given")
    assert "renamed it to batch_size" in unknown.reason
    # With two of each there is nothing to go by.
    graph["5"]["inputs"]["y"] = graph["5"]["inputs"].pop("width")
    reasons = [problem.reason for problem in check_nodes(graph, info)]
    assert not [reason for reason in reasons if "renamed" in reason or "before" in reason]


def test_a_graph_that_saves_nothing(server: DevServer, info: Any, graph: Any) -> None:
    del graph["9"]
    (problem,) = check_nodes(graph, info)
    assert findings([problem]) == {("8", None, "prompt_no_outputs")}
    assert refused(server, graph)[0]


def test_a_node_that_nothing_needs_is_a_warning(server: DevServer, info: Any, graph: Any) -> None:
    graph["10"] = {"class_type": "EmptyLatentImage", "inputs": {"width": "wide"}}
    (problem,) = check_nodes(graph, info)
    assert findings([problem]) == {("10", None, "unused_node")}
    assert is_warning(problem)
    assert refused(server, graph) == (False, set())


def test_a_cycle(server: DevServer, info: Any, graph: Any) -> None:
    graph["3"]["inputs"]["latent_image"] = ["3", 0]
    problems = check_nodes(graph, info)
    assert findings(problems) == {("3", None, "dependency_cycle")}
    assert refused(server, graph) == (True, findings(problems))


def test_text_that_counts_as_true_is_a_warning(info: Any, graph: Any) -> None:
    graph["1"] = bench(previews="false")
    graph["9"]["inputs"]["images"] = ["1", 0]
    del graph["8"], graph["3"]
    problems = [problem for problem in check_nodes(graph, info) if problem.node_id == "1"]
    assert findings(problems) == {("1", "previews", "text_as_boolean")}


def bench(**inputs: Any) -> Any:
    own = {"seed": 1, "width": 16, "height": 16, "batch_size": 1, "steps": 1, "seconds": 0}
    return {"class_type": "BenchSampler", "inputs": {**own, "fail": "", "text": "", **inputs}}


@pytest.mark.parametrize(
    ("name", "good"), [("absent.png", False), ("input/0123/0000.png", True), ("a.png", True)]
)
def test_input_files(info: Any, name: str, good: bool) -> None:
    known = deepcopy(info)
    known["LoadImage"]["input"]["required"]["image"][0] = ["a.png"]
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    expected = set() if good else {("1", "image", "custom_validation_failed")}
    assert findings(check_nodes(graph, known)) == expected


def test_all_problems_come_at_once(info: Any, graph: Any) -> None:
    bad = {(node, name): (value, kind) for node, name, value, kind, _ in BAD_VALUES}
    for (node, name), (value, _) in bad.items():
        graph[node]["inputs"][name] = value
    graph["7"]["class_type"] = "CLIPTextEncoder"
    expected = {(node, name, kind) for (node, name), (_, kind) in bad.items()}
    assert findings(check_nodes(graph, info)) == expected | {("7", None, "missing_node_type")}


def test_descriptions_of_custom_nodes_are_taken_as_they_are() -> None:
    odd = {"any": ["*"], "old": "STRING", "none": [], "list": [[1, 2]], "remote": ["COMBO", {}]}
    described = {
        "Odd": {"input": {"required": odd, "optional": None}, "output": [["x"]]},
        "Sink": {"input": {"required": {"it": ["A,B"]}}, "output": None, "output_node": True},
    }
    graph = {
        "1": {"class_type": "Odd", "inputs": dict.fromkeys(odd, 2)},
        "2": {"class_type": "Sink", "inputs": {"it": ["1", 0]}},
    }
    assert check_nodes(graph, described) == []


def recorded_posts() -> list[Any]:
    """The prompts of all recordings of a real server that are graphs, with its answers."""
    events = [
        event
        for path in sorted(RECORDED.glob("[0-9]*.json"))
        for event in json.loads(path.read_text(encoding="utf-8"))
        if event.get("http") == "POST /prompt" and isinstance(event.get("sent"), dict)
    ]
    return [event for event in events if is_whole(event["sent"].get("prompt"))]


def is_whole(graph: Any) -> bool:
    try:
        WorkflowTemplate.from_graph(graph)
    except ValueError:
        return False
    return True


def test_a_real_servers_verdicts(info: Any) -> None:
    without_models = deepcopy(info)
    without_models["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] = []
    verdicts = {200: 0, 400: 0}
    for event in recorded_posts():
        body, graph = event["body"], event["sent"]["prompt"]
        if {node["class_type"] for node in graph.values()} - info.keys():
            continue  # the recording's server has nodes that this one does not
        if event["status"] == 400 and body["error"]["type"] == "invalid_prompt_id":
            continue
        errors = [item for item in check_nodes(graph, without_models) if not is_warning(item)]
        assert bool(errors) == (event["status"] == 400), graph
        assert findings(errors) >= found_in(body), graph
        verdicts[event["status"]] += 1
    assert verdicts[200] >= 15
    assert verdicts[400] >= 9
