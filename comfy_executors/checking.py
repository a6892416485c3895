"""Checking a graph against what a server says of its nodes, without running anything.

A server stops at the first unknown class, and looks no further than the first bad link of a chain.
Here all problems come at once, under the server's own names for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comfy_executors.errors import NodeProblem, node_label
from comfy_executors.node_info import (
    Info,
    choices,
    input_options,
    input_type,
    nearest_names,
    shown,
    what_there_is,
)
from comfy_executors.workflows import Graph, class_type, is_link, node_title, output_nodes

_CONVERTERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "INT": (int, "whole number"),
    "FLOAT": (float, "number"),
}
_PRIMITIVES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*"}
# Inputs that choose a file which can be uploaded: their lists lack what lies in subfolders.
_UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")
_WARNINGS = {"unknown_input", "unused_node", "text_as_boolean"}

Problems = Iterator[NodeProblem]


def check_nodes(graph: Graph, object_info: Info) -> list[NodeProblem]:
    """Check every node of a graph: its class, its inputs, their values and links.

    Args:
        graph: A graph that passed `check_graph`.
        object_info: The server's description of its node classes (`GET /object_info`).

    Returns:
        What the server would refuse or what could only fail, and what it would accept though
        hardly anybody means it; `is_warning` tells these apart.
    """
    checked = _Check(graph, object_info)
    problems = list(checked.problems())
    if all(map(is_warning, problems)):
        # With a bad link, a node may be unused only because of that.
        problems += checked.unused()
    return problems


def is_warning(problem: NodeProblem) -> bool:
    """Tell whether a server would run the graph in spite of a problem."""
    return problem.kind in _WARNINGS


class _Check:
    def __init__(self, graph: Graph, object_info: Info) -> None:
        self._graph = graph
        self._info = object_info
        self._linkable = {kind for info in object_info.values() for kind in _output_types(info)}

    def problems(self) -> Problems:
        unknown = [node for node in self._graph if self._info_of(node) is None]
        outputs = output_nodes(self._graph, self._info)
        for node_id in unknown:
            yield self._unknown_class(node_id)
        if not outputs and not unknown:
            yield self._no_outputs()
        yield from self._cycles()
        # A class that the server does not know may be an output, too.
        runs = self._needed_by(outputs) if outputs and not unknown else set(self._graph)
        for node_id in self._graph:
            if node_id in runs:
                yield from self._inputs(node_id)

    def unused(self) -> Problems:
        runs = self._needed_by(output_nodes(self._graph, self._info))
        reason = "no output node needs it: it does not run"
        for node_id in output_nodes(self._graph):
            if node_id not in runs:
                yield self._problem(node_id, None, None, "unused_node", reason)

    def _problem(
        self,
        node_id: str,
        name: str | None,
        value: Any,
        kind: str,
        reason: str,
        nearest: tuple[str, ...] = (),
    ) -> NodeProblem:
        class_name, title = class_type(self._graph, node_id), node_title(self._graph, node_id)
        return NodeProblem(node_id, class_name, title, name, value, kind, reason, nearest)

    def _info_of(self, node_id: str) -> Info | None:
        info: Info | None = self._info.get(class_type(self._graph, node_id) or "")
        return info

    def _label(self, node_id: str) -> str:
        class_name, title = class_type(self._graph, node_id), node_title(self._graph, node_id)
        return node_label(node_id, title, class_name)

    # The graph as a whole.

    def _unknown_class(self, node_id: str) -> NodeProblem:
        name = class_type(self._graph, node_id) or ""
        reason = "the server has no such node class (is its custom node package installed there?)"
        nearest = nearest_names(name, self._info)
        return self._problem(node_id, None, name, "missing_node_type", reason, nearest)

    def _no_outputs(self) -> NodeProblem:
        # In a cycle every node is used; then any of them will do.
        last = (output_nodes(self._graph) or list(self._graph))[-1]
        reason = "nothing saves what it makes: add an output node, such as SaveImage, after it"
        return self._problem(last, None, None, "prompt_no_outputs", reason)

    def _parents(self, node_id: str) -> list[str]:
        links = filter(is_link, self._graph[node_id]["inputs"].values())
        return [link[0] for link in links]

    def _needed_by(self, outputs: list[str]) -> set[str]:
        needed: set[str] = set()
        todo = list(outputs)
        while todo:
            node_id = todo.pop()
            if node_id not in needed:
                needed.add(node_id)
                todo += self._parents(node_id)
        return needed

    def _cycles(self) -> Problems:
        """Take away, again and again, what needs nothing that is left; cycles cannot be."""
        left = set(self._graph)
        while free := {node for node in left if not left.intersection(self._parents(node))}:
            left -= free
        for node_id in self._graph:
            if node_id in left and node_id in self._needed_by(self._parents(node_id)):
                reason = "it needs its own output: its links lead back to it"
                yield self._problem(node_id, None, None, "dependency_cycle", reason)

    # The inputs of one node.

    def _inputs(self, node_id: str) -> Problems:
        info = self._info_of(node_id)
        if info is None:
            return
        given = self._graph[node_id]["inputs"]
        sections = info.get("input") or {}
        required = sections.get("required") or {}
        described = {**(sections.get("optional") or {}), **required}
        hidden = sections.get("hidden") or {}
        missing = [
            name for name in required if name not in given and not _may_be_spread(required[name])
        ]
        unknown = [
            name
            for name in given
            # The parts of a dynamic input are called after it: `format.codec`.
            if name not in hidden and name not in described and name.split(".")[0] not in described
        ]
        renamed = _renamed(unknown, missing)
        yield from self._missing(node_id, missing, renamed)
        for name, value in given.items():
            if name in described:
                yield from self._value(node_id, name, value, described[name])
            elif name in unknown:
                yield self._unknown_input(node_id, name, renamed.get(name), described)

    def _missing(self, node_id: str, missing: list[str], renamed: Mapping[str, str]) -> Problems:
        for name in missing:
            reason = "is required and missing"
            old = [before for before, after in renamed.items() if after == name]
            if old:
                reason += f"; it may be what {old[0]} was called before, which is given"
            yield self._problem(node_id, name, None, "required_input_missing", reason)

    def _unknown_input(
        self, node_id: str, name: str, renamed: str | None, described: Info
    ) -> NodeProblem:
        value = self._graph[node_id]["inputs"][name]
        reason = "the node has no such input, and ignores it"
        if renamed is None:
            nearest = nearest_names(name, described)
        else:
            reason += f"; a newer ComfyUI may have renamed it to {renamed}, which is missing"
            nearest = (renamed,)
        return self._problem(node_id, name, value, "unknown_input", reason, nearest)

    def _value(self, node_id: str, name: str, value: Any, config: Any) -> Problems:
        wanted = input_type(config)
        if isinstance(value, dict) and "__value__" in value:
            return  # how a list is given that is no link
        if wanted.startswith("COMFY_"):
            return  # described by rules of its own
        if is_link(value):
            yield from self._link(node_id, name, value, wanted)
        elif isinstance(value, list):
            reason = (
                f'a link is written ["node id", slot], the id in quotes and the slot without, '
                f"not {shown(value)}"
            )
            yield self._problem(node_id, name, value, "bad_linked_input", reason)
        elif wanted in self._linkable and wanted not in _PRIMITIVES:
            reason = f'wants a link to a {wanted} output, ["node id", slot], not {shown(value)}'
            yield self._problem(node_id, name, value, "invalid_input_type", reason)
        elif wanted in _CONVERTERS:
            yield from self._number(node_id, name, value, wanted, input_options(config))
        elif wanted == "BOOLEAN" and str(value).lower() in ("false", "no", "off", "0"):
            if isinstance(value, str):
                reason = f"the text {shown(value)} counts as true: write false, without quotes"
                yield self._problem(node_id, name, value, "text_as_boolean", reason)
        elif wanted == "COMBO":
            yield from self._choice(node_id, name, value, config)

    def _link(self, node_id: str, name: str, link: Any, wanted: str) -> Problems:
        parent, slot = link
        info = self._info_of(parent)
        if info is None:
            return
        types = _output_types(info)
        output = f"output {slot} of {self._label(parent)}"
        if slot >= len(types):
            there = ", ".join(f"{index} {kind}" for index, kind in enumerate(types)) or "none"
            reason = f"takes {output}, which has {'only ' if types else ''}{there}"
            yield self._problem(node_id, name, link, "bad_linked_input", reason)
        elif not _fits(types[slot], wanted):
            reason = f"wants {wanted}, but {output} is {types[slot]}"
            if wanted in types:
                reason += f"; its {wanted} is output {types.index(wanted)}"
            yield self._problem(node_id, name, link, "return_type_mismatch", reason)

    def _number(
        self, node_id: str, name: str, value: Any, wanted: str, options: Mapping[str, Any]
    ) -> Problems:
        convert, words = _CONVERTERS[wanted]
        try:
            number = convert(value)
        except (ValueError, TypeError, OverflowError):
            reason = f"{shown(value)} is no {words}"
            yield self._problem(node_id, name, value, "invalid_input_type", reason)
            return
        low, high = options.get("min"), options.get("max")
        if low is not None and number < low:
            reason = f"{number} is below the minimum of {low}"
            yield self._problem(node_id, name, value, "value_smaller_than_min", reason)
        elif high is not None and number > high:
            reason = f"{number} is above the maximum of {high}"
            yield self._problem(node_id, name, value, "value_bigger_than_max", reason)

    def _choice(self, node_id: str, name: str, value: Any, config: Any) -> Problems:
        known, options = choices(config), input_options(config)
        if known is None or "remote" in options or str(value) in known:
            return
        if any(options.get(upload) for upload in _UPLOADS):
            # In a subfolder, or with a folder's name in brackets behind it, it may well be there.
            if "/" not in str(value) and not str(value).endswith("]"):
                nearest = nearest_names(str(value), known)
                reason = f"{shown(value)} is not in the server's input folder"
                reason += what_there_is(known, nearest)
                yield self._problem(
                    node_id, name, value, "custom_validation_failed", reason, nearest
                )
            return
        nearest = nearest_names(str(value), known)
        reason = f"{shown(value)} is not on the server{what_there_is(known, nearest)}"
        yield self._problem(node_id, name, value, "value_not_in_list", reason, nearest)


def _renamed(unknown: list[str], missing: list[str]) -> dict[str, str]:
    """Guess which missing inputs are unknown ones under new names."""
    guesses = {name: nearest_names(name, missing) for name in unknown}
    pairs = {name: nearest[0] for name, nearest in guesses.items() if nearest}
    if not pairs and len(unknown) == len(missing) == 1:
        return {unknown[0]: missing[0]}
    return pairs


def _may_be_spread(config: Any) -> bool:
    # Of an input that grows, only the parts are given: `images.image0`.
    kind = input_type(config)
    return kind.startswith("COMFY_") and not kind.startswith("COMFY_DYNAMICCOMBO")


def _output_types(info: Info) -> list[str]:
    return [kind if isinstance(kind, str) else "COMBO" for kind in info.get("output") or ()]


def _fits(received: str, wanted: str) -> bool:
    if "COMBO" in (received, wanted) or received.startswith("COMFY_"):
        return True  # only the server knows whether two lists of choices are the same
    kinds = set(wanted.split(","))
    return "*" in (wanted, received) or bool(kinds.intersection(received.split(",")))
