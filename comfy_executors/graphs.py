"""Functions on graphs: workflows in ComfyUI's API format, as plain dictionaries."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from comfy_executors.errors import GraphError, UIFormatError, node_label

# `{node id: {"class_type": ..., "inputs": {...}, "_meta": {"title": ...}}}`
Graph = dict[str, dict[str, Any]]

MAX_SEED = 2**64 - 1
_MAX_BATCHES = 1_000_000  # of one run: they are all planned before the first is sent
_SEED_INPUTS = ("seed", "noise_seed")
_SHOWN_PROBLEMS = 10
_EXPORT_HINT = (
    "export it in ComfyUI with Workflow > Export (API); in older versions enable the dev mode"
    " options in the settings, then use Save (API Format). It is converted by"
    " `comfy-executors template` with --server or --object-info, and in Python by from_file and"
    " from_graph with object_info="
)


class SeedInput(NamedTuple):
    """A seed in a graph, and where it stands."""

    node_id: str
    input_name: str
    value: int


def check_graph(graph: Any, *, source: str | None = None) -> None:
    """Check that something is a workflow in ComfyUI's API format.

    Every node must be a dictionary with a `class_type` and `inputs`, and every link
    `[node id, slot]` must lead to a node of the graph. Other lists of two are data. Whether the
    server knows the classes is not checked.

    Args:
        graph: What to check.
        source: The file or URL that it came from, for the message.

    Raises:
        UIFormatError: It is a workflow in ComfyUI's UI format.
        GraphError: It is no workflow; the message names up to ten problems of one kind.
    """
    place = f"{source}: " if source else ""
    if not isinstance(graph, dict):
        kind = "a list" if isinstance(graph, (list, tuple)) else f"of type {type(graph).__name__}"
        raise GraphError(f"{place}a workflow is an object of nodes by their ids; this is {kind}")
    if is_ui_format(graph):
        raise UIFormatError(
            f"{place}this workflow is in ComfyUI's UI format, which its API does not take;"
            f" {_EXPORT_HINT}"
        )
    if not graph:
        raise GraphError(f"{place}the workflow has no nodes")
    _refuse_wrapped(graph, place)
    for find in (_shape_problems, _dangling_links):
        problems = list(find(graph))
        if problems:
            raise GraphError(place + _listed(problems), node_id=problems[0][0])


def unwrapped(workflow: Any) -> Any:
    """Return the graph in the body of a request, `{"prompt": …}`, and anything else as it is."""
    inner = workflow.get("prompt") if isinstance(workflow, dict) else None
    return inner if _looks_like_graph(inner) else workflow


def is_ui_format(graph: Any) -> bool:
    """Return whether something is a workflow as ComfyUI's editor saves it."""
    if not isinstance(graph, dict):
        return False
    return isinstance(graph.get("nodes"), list) and ("links" in graph or "last_node_id" in graph)


def _refuse_wrapped(graph: dict[Any, Any], place: str) -> None:
    # What `/prompt` takes, what the editor's own code makes, and what RunPod takes.
    wrappers = {f'["{name}"]': graph.get(name) for name in ("prompt", "output", "workflow")}
    if isinstance(graph.get("input"), dict):
        wrappers['["input"]["workflow"]'] = graph["input"].get("workflow")
    for name, inner in wrappers.items():
        if _looks_like_graph(inner):
            raise GraphError(
                f"{place}the workflow is wrapped in {name}; only what stands in there is"
                " the workflow"
            )
    for name, inner in wrappers.items():
        if is_ui_format(inner):
            raise UIFormatError(
                f"{place}what is wrapped in {name} is in ComfyUI's UI format, which its API"
                f" does not take; {_EXPORT_HINT}"
            )


def _looks_like_graph(value: Any) -> bool:
    if not isinstance(value, dict) or "class_type" in value:
        return False
    return any(isinstance(node, dict) and "class_type" in node for node in value.values())


def _shape_problems(graph: dict[Any, Any]) -> Iterator[tuple[str | None, str]]:
    for node_id, node in graph.items():
        if not isinstance(node_id, str):
            yield None, f"node id {node_id!r} is not a string"
        elif not isinstance(node, dict):
            yield node_id, f"Node {node_id} is not an object but {_kind(node)}"
        else:
            where = _label(graph, node_id)
            if not isinstance(node.get("class_type"), str) or not node["class_type"]:
                yield node_id, f"{where} has no class_type"
            if not isinstance(node.get("inputs"), dict):
                yield node_id, f"{where} has no inputs"


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _dangling_links(graph: Graph) -> Iterator[tuple[str | None, str]]:
    for node_id, node in graph.items():
        for input_name, value in node["inputs"].items():
            if is_link(value) and value[0] not in graph:
                yield (
                    node_id,
                    f"{_label(graph, node_id)}, input {input_name}: takes output {value[1]} of"
                    f" node {value[0]}, which is not in the workflow",
                )


def _listed(problems: list[tuple[str | None, str]]) -> str:
    lines = [text for _, text in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - _SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def is_link(value: Any) -> bool:
    """Return whether an input's value is a link, `[node id, slot]`."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
        and value[1] >= 0
    )


def _label(graph: Mapping[str, Any], node_id: str) -> str:
    return node_label(node_id, node_title(graph, node_id), class_type(graph, node_id))


def find_seeds(graph: Mapping[str, Any]) -> list[SeedInput]:
    """Return the integers that are a graph's seeds.

    They stand in inputs called `seed` or `noise_seed`, or in a node that holds an integer and
    nothing else (a primitive), where only such inputs take it. A seed that any other node delivers
    is none of them.
    """
    literal = [
        SeedInput(node_id, name, node["inputs"][name])
        for node_id, node in graph.items()
        for name in _SEED_INPUTS
        if type(node["inputs"].get(name)) is int
    ]
    return [*literal, *_primitive_seeds(graph)]


def _primitive_seeds(graph: Mapping[str, Any]) -> Iterator[SeedInput]:
    takers = find_takers(graph)
    for node_id, node in graph.items():
        inputs = node["inputs"]
        is_integer = list(inputs) == ["value"] and type(inputs["value"]) is int
        if is_integer and node_id in takers and takers[node_id].issubset(_SEED_INPUTS):
            yield SeedInput(node_id, "value", inputs["value"])


def find_takers(graph: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return, by node, what the inputs are called that its links lead to."""
    takers: dict[str, set[str]] = {}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if is_link(value):
                takers.setdefault(value[0], set()).add(name)
    return takers


def find_linked_seed(graph: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first node that takes its seed from another one, and that one; None without."""
    for node_id, node in graph.items():
        for name in _SEED_INPUTS:
            value = node["inputs"].get(name)
            if is_link(value):
                return node_id, value[0]
    return None


def set_seeds(graph: Mapping[str, Any], seed: int) -> Graph:
    """Return the graph with every seed that `find_seeds` finds replaced.

    Args:
        graph: The graph; it is left as it is, and the result shares its unchanged nodes.
        seed: The new value, from 0 to 2**64 - 1.

    Raises:
        ValueError: The seed is out of range or no integer.
    """
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed is an integer from 0 to 2**64 - 1, not {seed!r}")
    result: Graph = dict(graph)
    for node_id, input_name, _ in find_seeds(graph):
        node = result[node_id]
        result[node_id] = {**node, "inputs": {**node["inputs"], input_name: seed}}
    return result


def node_title(graph: Mapping[str, Any], node_id: str) -> str | None:
    """Return the title that a node has in ComfyUI's editor, if the graph tells."""
    node = graph.get(node_id)
    about = node.get("_meta") if isinstance(node, dict) else None
    title = about.get("title") if isinstance(about, dict) else None
    return title if isinstance(title, str) and title else None


def class_type(graph: Mapping[str, Any], node_id: str) -> str | None:
    """Return the class of a node, or None for a node that is not in the graph.

    Servers report nodes that a node expanded to while it ran. Such an id resembles its parent's,
    but the parent's class would be a wrong answer: the events name the parent as `display_node`.
    """
    node = graph.get(node_id)
    name = node.get("class_type") if isinstance(node, dict) else None
    return name if isinstance(name, str) and name else None


def output_nodes(
    graph: Mapping[str, Any], object_info: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the ids of the nodes that deliver a workflow's results, in the graph's order.

    Args:
        graph: The graph.
        object_info: The server's description of its node classes (`GET /object_info`). Without it
            the answer is a guess: the nodes from which no other node takes its input.

    Returns:
        With `object_info` exactly the nodes whose class it marks with `output_node`.
    """
    if object_info is not None:
        return [
            node_id
            for node_id in graph
            if (object_info.get(class_type(graph, node_id) or "") or {}).get("output_node")
        ]
    used = {
        value[0] for node in graph.values() for value in node["inputs"].values() if is_link(value)
    }
    return [node_id for node_id in graph if node_id not in used]


def plan_batches(num_samples: int, batch_size: int) -> list[int]:
    """Divide samples into batches: 20 at a batch size of 8 are 8, 8 and 4.

    Args:
        num_samples: How many images are wanted, at least 1.
        batch_size: How many one batch makes at most, at least 1.

    Raises:
        ValueError: One of them is below 1 or no integer, or these are more than 1,000,000 batches.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    full, rest = divmod(whole_number("num_samples", num_samples, 1), batch_size)
    if full + bool(rest) > _MAX_BATCHES:
        raise ValueError(
            f"num_samples={num_samples} at {batch_size} a batch is more than the {_MAX_BATCHES:,}"
            " batches that one run may have: divide it into several runs"
        )
    return [batch_size] * full + ([rest] if rest else [])


def whole_number(name: str, value: Any, least: int) -> int:
    """Make an int of what counts as one, such as NumPy's integers; truth values do not.

    Args:
        name: What the number is called in the error.
        value: The number.
        least: The lowest that is allowed.

    Raises:
        ValueError: It is no such number.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
    return number
