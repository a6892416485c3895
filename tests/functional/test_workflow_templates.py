"""ComfyUI's own workflows, in the editor's format, against a real server's descriptions."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from comfy_executors import GraphError, NodeProblem, WorkflowTemplate
from comfy_executors.checking import check_nodes, is_warning
from comfy_executors.exports import convert_export
from comfy_executors.graphs import is_ui_format
from comfy_executors.parametrize import find_parameters, required_variables

EXPORTS = Path(__file__).parents[1] / "exports"
BY_THE_EDITOR = sorted((EXPORTS / "editor").glob("*.json"))
EDITOR_ONLY = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
# Choices of nodes that are newer than the server that described them.
NEWER = {
    ("CLIPLoader", "type"),
    ("DualCLIPLoader", "type"),
    ("FluxKontextMultiReferenceLatentMethod", "reference_latents_method"),
}


@cache
def description() -> Any:
    return json.loads((EXPORTS / "object_info.json").read_text("utf-8"))


def workflow(name: str) -> Any:
    folder = files("comfyui_workflow_templates_json") / "templates"
    return json.loads((folder / name).read_text(encoding="utf-8"))


def workflow_names() -> list[str]:
    folder = files("comfyui_workflow_templates_json") / "templates"
    names = (item.name for item in folder.iterdir())
    return sorted(name for name in names if name.endswith(".json"))


def is_absent_file(problem: NodeProblem) -> bool:
    """Tell whether a server would only miss a model or an input file."""
    if problem.kind == "value_not_in_list":
        return "." in str(problem.value) or (problem.class_type, problem.input_name) in NEWER
    return problem.kind == "custom_validation_failed"


def assert_accepted(graph: Any) -> None:
    problems = [item for item in check_nodes(graph, description()) if not is_warning(item)]
    assert [str(item) for item in problems if not is_absent_file(item)] == []


@pytest.mark.parametrize("path", BY_THE_EDITOR, ids=lambda path: path.stem)
def test_a_workflow_becomes_what_the_editor_makes_of_it(path: Path) -> None:
    graph = convert_export(workflow(path.name), description())
    without_titles = {
        node_id: {key: value for key, value in node.items() if key != "_meta"}
        for node_id, node in graph.items()
    }
    assert without_titles == json.loads(path.read_text("utf-8"))
    assert_accepted(graph)


def test_there_are_enough_of_them() -> None:
    assert len(BY_THE_EDITOR) >= 20


def test_every_described_workflow_converts_and_is_accepted() -> None:
    graphs = [
        WorkflowTemplate.from_graph(export, object_info=description()).render()
        for export in map(workflow, workflow_names())
        if is_ui_format(export) and is_described(export)
    ]
    assert len(graphs) >= 35
    for graph in graphs:
        assert_accepted(graph)
        required = required_variables(find_parameters(graph))
        assert WorkflowTemplate.from_graph(graph, auto=True).render(**required) == graph


def test_other_workflows_name_the_node_that_is_not_described() -> None:
    others = [
        export
        for export in map(workflow, workflow_names())
        if is_ui_format(export) and not is_described(export)
    ]
    assert len(others) >= 500
    for export in others[::10]:
        with pytest.raises(GraphError) as caught:
            convert_export(export, description())
        assert_names_an_unknown_class(str(caught.value))


def is_described(export: Any) -> bool:
    subgraphs = (export.get("definitions") or {}).get("subgraphs") or []
    kinds = {node["type"] for graph in (export, *subgraphs) for node in graph["nodes"]}
    return kinds <= {*description(), *(graph["id"] for graph in subgraphs), *EDITOR_ONLY}


def assert_names_an_unknown_class(text: str) -> None:
    for line in text.splitlines():
        if line.startswith("and "):
            continue
        label, reason = line.split(": the description of the nodes has no such class")
        assert label.startswith("Node ")
        assert label.rpartition(" (")[2].rstrip(")") not in description()
        assert "custom node package" in reason
