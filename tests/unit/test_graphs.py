from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comfy_executors.errors import GraphError, UIFormatError
from comfy_executors.workflows import (
    SeedInput,
    WorkflowTemplate,
    check_graph,
    class_type,
    find_seeds,
    node_title,
    output_nodes,
    plan_batches,
    set_seeds,
)

RECORDINGS = Path(__file__).parent.parent / "recordings"


def node(name: str = "A", title: str | None = None, **inputs: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"class_type": name, "inputs": inputs}
    return made if title is None else {**made, "_meta": {"title": title}}


GRAPH = {
    "57:3": node("KSampler", "Sampler", seed=7, model=["4", 0], steps=True),
    "4": node("Loader"),
    "8": node("SaveImage", "", images=["57:3", 0], noise_seed=["4", 1]),
    "9": node("Noise", noise_seed=2**64 - 1, seed=True),
    "10": node("Text", seed="7"),
}


# Posted to see a server refuse them.
_MISTAKES = {
    "08/6": "which is not in the workflow",
    "08/11": "the workflow has no nodes",
    "08/12": "Node 1 has no class_type",
    "08/14": "UI format",
    "08/15": "this is a list",
    "08/16": "this is of type str",
}
REFUSED = {
    f"{version}/{place}": words
    for version in ("comfyui-0.33.0", "comfyui-0.8.0")
    for place, words in _MISTAKES.items()
}
REFUSED["comfyui-0.33.0/09/0"] = "which is not in the workflow"


def recorded_graphs() -> dict[str, Any]:
    graphs = {}
    for path in sorted(RECORDINGS.rglob("[0-9]*.json")):
        events = json.loads(path.read_text(encoding="utf-8"))
        sent = [event.get("sent") for event in events if event.get("http") == "POST /prompt"]
        bodies = [body["prompt"] for body in sent if isinstance(body, dict) and "prompt" in body]
        for index, graph in enumerate(bodies):
            graphs[f"{path.parent.name}/{path.stem[:2]}/{index}"] = graph
    return graphs


RECORDED = recorded_graphs()


@pytest.mark.parametrize("name", sorted(RECORDED.keys() - REFUSED.keys()))
def test_recorded_graphs_survive(name: str) -> None:
    graph = RECORDED[name]
    assert WorkflowTemplate.from_graph(graph).render() == graph
    assert WorkflowTemplate(json.dumps(graph)).render() == graph


@pytest.mark.parametrize("name", REFUSED)
def test_recorded_mistakes_are_found_before_anything_is_sent(name: str) -> None:
    with pytest.raises(GraphError, match=REFUSED[name]):
        WorkflowTemplate.from_graph(RECORDED[name])


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ([GRAPH], "a workflow is an object of nodes by their ids; this is a list"),
        ("text", "of type str"),
        (None, "of type NoneType"),
        ({}, "the workflow has no nodes"),
        ({1: node()}, "node id 1 is not a string"),
        ({"1": []}, "Node 1 is not an object but of type list"),
        ({"1": None}, "Node 1 is not an object but null"),
        ({"1": {"inputs": {}}}, "Node 1 has no class_type"),
        ({"1": {"inputs": {}, "class_type": 5}}, "Node 1 has no class_type"),
        ({"1": {"inputs": {}, "class_type": ""}}, "Node 1 has no class_type"),
        ({"1": {"class_type": "A"}}, r"Node 1 \(A\) has no inputs"),
        ({"1": {"class_type": "A", "inputs": []}}, r"Node 1 \(A\) has no inputs"),
        (
            {"1": node("A", "My node", model=["2", 1])},
            r'Node 1 "My node" \(A\), input model: takes output 1 of node 2, which is not in',
        ),
        ({"prompt": GRAPH}, r'wrapped in \["prompt"\]'),
        ({"prompt": GRAPH, "workflow": {"nodes": [], "links": []}}, r'wrapped in \["prompt"\]'),
        ({"output": GRAPH, "workflow": {"nodes": [], "links": []}}, r'wrapped in \["output"\]'),
        ({"input": {"workflow": GRAPH}}, r'wrapped in \["input"\]\["workflow"\]'),
    ],
)
def test_what_is_no_graph_is_named(graph: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        check_graph(graph, source="w.json")
    assert str(caught.value).startswith("w.json: ")
    assert not isinstance(caught.value, UIFormatError)


@pytest.mark.parametrize(
    "graph",
    [
        {"nodes": [{"id": 1}], "links": [], "version": 0.4},
        {"last_node_id": 3, "nodes": []},
        {"workflow": {"nodes": [], "links": []}},
        {"prompt": {"nodes": [], "links": []}},
    ],
)
def test_the_ui_format_says_how_to_export(graph: Any) -> None:
    with pytest.raises(UIFormatError, match=r"Workflow > Export \(API\).*Save \(API Format\)"):
        check_graph(graph)


def test_a_node_may_be_called_like_a_wrapper() -> None:
    check_graph({"prompt": node(), "nodes": node(), "links": node(x=["prompt", 0])})


def test_all_problems_of_a_kind_are_named_up_to_ten() -> None:
    graph = {str(number): node(x=["404", 0], y=["405", 0]) for number in range(6)}
    with pytest.raises(GraphError) as caught:
        check_graph(graph)
    lines = str(caught.value).split("\n")
    assert len(lines) == 11
    assert lines[1].startswith("Node 0 (A), input y: takes output 0 of node 405")
    assert lines[10] == "and 2 more"
    assert caught.value.node_id == "0"


@pytest.mark.parametrize(
    "value",
    [["a", "b"], [1, 2], ["a", True], ["a", -1], ["a", 0.5], ["a"], ["a", 0, 0], [["a", 0]]],
)
def test_a_list_of_two_that_is_no_link_is_data(value: Any) -> None:
    check_graph({"1": node(x=value)})


def test_find_seeds_takes_literal_integers_only() -> None:
    assert find_seeds(GRAPH) == [
        SeedInput("57:3", "seed", 7),
        SeedInput("9", "noise_seed", 2**64 - 1),
    ]


def test_an_integer_in_a_node_of_its_own_is_a_seed_where_only_seeds_take_it() -> None:
    graph = {
        "1": node("PrimitiveInt", "Seed", value=7),
        "2": node("KSampler", seed=["1", 0]),
        "3": node("RandomNoise", noise_seed=["1", 0]),
        "4": node("KSampler", seed=5),
    }
    assert find_seeds(graph) == [SeedInput("4", "seed", 5), SeedInput("1", "value", 7)]
    changed = set_seeds(graph, 9)
    assert (changed["1"]["inputs"], changed["4"]["inputs"]) == ({"value": 9}, {"seed": 9})
    assert changed["2"] is graph["2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"3": node("KSampler", seed=["1", 0], steps=["1", 0])},
        {"3": node("SaveText", text=["1", 0])},
        {"1": node("RandomInt", low=0)},
        {"1": node("Pick", value=7, index=0)},
        {"1": node("PrimitiveFloat", value=7.0)},
        {"1": node("PrimitiveBoolean", value=True)},
        {"1": node("Join", value=["3", 0]), "3": node("Loader")},
        {"2": node("KSampler", steps=["1", 0])},
    ],
)
def test_another_node_is_no_seed(changes: dict[str, Any]) -> None:
    graph = {"1": node("PrimitiveInt", value=7), "2": node("KSampler", seed=["1", 0])}
    assert find_seeds({**graph, **changes}) == []


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_set_seeds_makes_a_new_graph_that_shares_the_rest(seed: int) -> None:
    before = json.dumps(GRAPH)
    changed = set_seeds(GRAPH, seed)
    assert [found.value for found in find_seeds(changed)] == [seed, seed]
    assert json.dumps(GRAPH) == before
    assert changed["57:3"]["inputs"]["model"] == ["4", 0]
    assert all(changed[key] is GRAPH[key] for key in ("4", "8", "10"))
    assert set_seeds(changed, 7)["57:3"] == GRAPH["57:3"]
    assert list(changed) == list(GRAPH)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None])
def test_set_seeds_refuses_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*64 - 1, not {seed!r}"):
        set_seeds(GRAPH, seed)


def test_titles_and_classes() -> None:
    assert node_title(GRAPH, "57:3") == "Sampler"
    assert [node_title(GRAPH, key) for key in ("4", "8", "404")] == [None, None, None]
    assert node_title({"1": {"_meta": {"title": 5}}, "2": {"_meta": None}}, "1") is None
    assert class_type(GRAPH, "57:3") == "KSampler"
    assert class_type(GRAPH, "57") is None
    assert class_type(GRAPH, "4:1") is None


def test_output_nodes_with_and_without_the_servers_description() -> None:
    assert output_nodes(GRAPH) == ["8", "9", "10"]
    info = {"SaveImage": {"output_node": True}, "Noise": {"output_node": False}, "Text": {}}
    assert output_nodes(GRAPH, info) == ["8"]
    assert output_nodes(
        {"1": node("P", x=["2", 0]), "2": node("P")}, {"P": {"output_node": 1}}
    ) == [
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "sizes"),
    [(20, 8, [8, 8, 4]), (3, 2, [2, 1]), (16, 8, [8, 8]), (1, 8, [1]), (3, 1, [1, 1, 1])],
)
def test_batches_are_planned_exactly(num_samples: int, batch_size: int, sizes: list[int]) -> None:
    assert plan_batches(num_samples, batch_size) == sizes


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None])
def test_batches_want_positive_integers(value: Any) -> None:
    with pytest.raises(ValueError, match=f"num_samples .* not {value!r}"):
        plan_batches(value, 1)
    with pytest.raises(ValueError, match=f"batch_size .* not {value!r}"):
        plan_batches(1, value)


def test_a_run_has_a_million_batches_at_the_most() -> None:
    assert len(plan_batches(1_000_000, 1)) == len(plan_batches(7_999_999, 8)) == 1_000_000
    for num_samples, batch_size in ((1_000_001, 1), (8_000_001, 8), (10**30, 1)):
        with pytest.raises(ValueError, match=r"the 1,000,000 batches that one run may have"):
            plan_batches(num_samples, batch_size)
