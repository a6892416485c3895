"""Checks a posted graph against the node classes, with the server's own error messages."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.devserver.graph import is_link

_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": str,
    "BOOLEAN": bool,
}
_LONG_LIST = 20

Info = Mapping[str, Any]
CustomCheck = Callable[[Any], "str | None"]


class MalformedPromptError(ValueError):
    """Raised for a prompt of a shape on which the real server stumbles with a status of 500."""


@dataclass
class Verdict:
    """What came of checking a graph.

    Args:
        outputs: The ids of the output nodes to run, in the order in which they will.
        error: Why nothing can run, or None.
        node_errors: The errors by node, also when something can run.
    """

    outputs: list[str]
    error: dict[str, Any] | None = None
    node_errors: dict[str, Any] = field(default_factory=dict)


def error_body(
    kind: str, message: str, details: str = "", extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "type": kind,
        "message": message,
        "details": details,
        "extra_info": {} if extra_info is None else extra_info,
    }


def validate(
    graph: Any,
    object_info: Info,
    custom_checks: Mapping[tuple[str, str], CustomCheck],
    *,
    detailed: bool,
    targets: list[str] | None = None,
) -> Verdict:
    """Check a graph; values are converted in place to the types that the inputs have.

    Args:
        graph: What was posted as `prompt`.
        object_info: The descriptions of the node classes.
        custom_checks: For (class type, input name) a check that returns what is wrong, or None.
        detailed: Whether missing node types and cycles are named, as newer servers do.
        targets: The only output nodes to run, or None for all of them.

    Raises:
        MalformedPromptError: The graph has a shape on which the server stumbles.
    """
    error = _class_error(graph, object_info, detailed)
    if error is not None:
        return Verdict([], error)
    # The real server keeps the output nodes in a set of strings; backwards fits what was seen.
    outputs = [
        node_id
        for node_id in reversed(list(graph))
        if object_info[graph[node_id]["class_type"]]["output_node"]
        and (targets is None or node_id in targets)
    ]
    if not outputs:
        return Verdict([], error_body("prompt_no_outputs", "Prompt has no outputs"))
    return _Check(graph, object_info, custom_checks, detailed).run(outputs)


def _class_error(graph: Any, object_info: Info, detailed: bool) -> dict[str, Any] | None:
    if detailed and not isinstance(graph, dict):
        raise MalformedPromptError("the prompt is not an object")
    try:
        nodes = [(node_id, graph[node_id]) for node_id in graph]
        for node_id, node in nodes:
            if detailed and not isinstance(node, dict):
                raise MalformedPromptError(f"node {node_id} is not an object")
            has_class = "class_type" in node
            class_type = node["class_type"] if has_class else None
            if class_type is None or class_type not in object_info:
                make = _missing_type if detailed else _missing_type_of_old
                return make(node_id, node, class_type)
    except (TypeError, AttributeError) as error:
        raise MalformedPromptError(str(error)) from error
    return None


def _missing_type(node_id: str, node: Any, class_type: str | None) -> dict[str, Any]:
    title = node.get("_meta", {}).get("title")
    shown = title or class_type or f"ID #{node_id}"
    if class_type is None:
        reason = "has no class_type. The workflow may be corrupted or a custom node is missing."
    else:
        reason = "not found. The custom node may not be installed."
    facts = {"node_id": node_id, "class_type": class_type, "node_title": title}
    return error_body(
        "missing_node_type", f"Node '{shown}' {reason}", f"Node ID '#{node_id}'", facts
    )


def _missing_type_of_old(node_id: str, node: Any, class_type: str | None) -> dict[str, Any]:
    if class_type is None:
        message = "Cannot execute because a node is missing the class_type property."
    else:
        message = f"Cannot execute because node {class_type} does not exist."
    return error_body("invalid_prompt", message, f"Node ID '#{node_id}'")


class _Check:
    """One check of one graph: what is known of its nodes so far."""

    def __init__(
        self,
        graph: dict[str, Any],
        object_info: Info,
        custom_checks: Mapping[tuple[str, str], CustomCheck],
        detailed: bool,
    ) -> None:
        self._graph = graph
        self._object_info = object_info
        self._custom_checks = custom_checks
        self._detailed = detailed
        self._valid: dict[str, bool] = {}
        self._errors: dict[str, list[dict[str, Any]]] = {}
        self._path: list[str] = []

    def run(self, outputs: list[str]) -> Verdict:
        good: list[str] = []
        node_errors: dict[str, Any] = {}
        details: list[str] = []
        for output in outputs:
            if self._output_is_valid(output):
                good.append(output)
                continue
            own = self._errors.get(output, [])
            details += [f"{error['message']}: {error['details']}" for error in own]
            self._report(output, node_errors)
        if good:
            return Verdict(good, None, node_errors)
        error = error_body(
            "prompt_outputs_failed_validation",
            "Prompt outputs failed validation",
            "\n".join(details),
        )
        return Verdict([], error, node_errors)

    def _report(self, output: str, node_errors: dict[str, Any]) -> None:
        for node_id, errors in self._errors.items():
            if errors:
                empty = {
                    "errors": errors,
                    "dependent_outputs": [],
                    "class_type": self._graph[node_id]["class_type"],
                }
                node_errors.setdefault(node_id, empty)["dependent_outputs"].append(output)

    def _output_is_valid(self, output: str) -> bool:
        try:
            return self._is_valid(output)
        except Exception as error:
            # The real server reports whatever goes wrong in its checks, a missing node included.
            self._path.clear()
            kind, message = "exception_during_validation", "Exception when validating node"
            facts = _exception_facts(error)
            self._errors[output] = [error_body(kind, message, str(error), facts)]
            self._valid[output] = False
            return False

    def _is_valid(self, node_id: str) -> bool:
        if node_id in self._valid:
            return self._valid[node_id]
        if node_id in self._path:
            self._report_cycle(self._path[self._path.index(node_id) :])
            return False
        self._path.append(node_id)
        errors = self._errors.setdefault(node_id, [])
        inputs_are_valid = self._check_inputs(node_id, errors)
        self._path.pop()
        self._valid[node_id] = inputs_are_valid and not errors
        return self._valid[node_id]

    def _report_cycle(self, cycle: list[str]) -> None:
        if not self._detailed:
            return
        names = [f"{node} ({self._graph[node]['class_type']})" for node in [*cycle, cycle[0]]]
        for node in cycle:
            facts = {"node_id": node, "cycle_nodes": list(cycle)}
            error = error_body(
                "dependency_cycle", "Dependency cycle detected", " -> ".join(names), facts
            )
            self._errors.setdefault(node, []).append(error)

    def _check_inputs(self, node_id: str, errors: list[dict[str, Any]]) -> bool:
        """Return whether all linked nodes are valid; a node's own errors go to `errors`."""
        node = self._graph[node_id]
        inputs = node["inputs"]
        described = self._object_info[node["class_type"]]["input"]
        links_are_valid = True
        for section in ("required", "optional"):
            for name, config in described.get(section, {}).items():
                if name not in inputs:
                    if section == "required":
                        errors.append(_missing_input(name))
                elif is_link(inputs[name]):
                    links_are_valid &= self._check_link(name, config, inputs[name], errors)
                else:
                    self._check_value(node["class_type"], name, config, inputs, errors)
        return links_are_valid

    def _check_link(
        self, name: str, config: list[Any], link: list[Any], errors: list[dict[str, Any]]
    ) -> bool:
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            facts = {"input_name": name, "input_config": config, "received_value": link}
            errors.append(error_body("bad_linked_input", message, name, facts))
            return True
        parent, slot = link
        received = tuple(self._object_info[self._graph[parent]["class_type"]]["output"])[slot]
        if not _fits(received, config[0]):
            errors.append(_type_mismatch(name, config, received, link))
            return True
        try:
            return self._is_valid(parent)
        except Exception as error:
            del self._path[self._path.index(parent) :]
            facts = {"input_name": name, "input_config": config, "linked_node": link}
            facts.update(_exception_facts(error), exception_message=str(error))
            kind = "exception_during_inner_validation"
            message = "Exception when validating inner node"
            self._errors[parent] = [error_body(kind, message, str(error), facts)]
            self._valid[parent] = False
            return False

    def _check_value(
        self,
        class_type: str,
        name: str,
        config: list[Any],
        inputs: dict[str, Any],
        errors: list[dict[str, Any]],
    ) -> None:
        options = config[1] if len(config) > 1 else {}
        convert = _CONVERTERS.get(config[0]) if isinstance(config[0], str) else None
        if convert is not None:
            try:
                inputs[name] = convert(inputs[name])
            except Exception as error:
                errors.append(_conversion_error(name, config, inputs[name], error))
                return
        custom_check = self._custom_checks.get((class_type, name))
        if custom_check is not None:
            complaint = custom_check(inputs[name])
            if complaint is not None:
                errors.append(_custom_error(name, complaint))
            return
        errors.extend(_range_errors(name, config, options, inputs[name]))
        choices = options.get("options", []) if config[0] == "COMBO" else config[0]
        if isinstance(choices, list) and inputs[name] not in choices:
            errors.append(_not_in_list(name, config, choices, inputs[name]))


def _fits(received: str, wanted: Any) -> bool:
    return bool(wanted in ("*", received))


def _missing_input(name: str) -> dict[str, Any]:
    facts = {"input_name": name}
    return error_body("required_input_missing", "Required input is missing", name, facts)


def _type_mismatch(name: str, config: list[Any], received: str, link: list[Any]) -> dict[str, Any]:
    facts = {
        "input_name": name,
        "input_config": config,
        "received_type": received,
        "linked_node": link,
    }
    details = f"{name}, received_type({received}) mismatch input_type({config[0]})"
    message = "Return type mismatch between linked nodes"
    return error_body("return_type_mismatch", message, details, facts)


def _conversion_error(name: str, config: list[Any], value: Any, error: Exception) -> dict[str, Any]:
    facts = {
        "input_name": name,
        "input_config": config,
        "received_value": value,
        "exception_message": str(error),
    }
    message = f"Failed to convert an input value to a {config[0]} value"
    return error_body("invalid_input_type", message, f"{name}, {value}, {error}", facts)


def _custom_error(name: str, complaint: str) -> dict[str, Any]:
    message = "Custom validation failed for node"
    facts = {"input_name": name}
    return error_body("custom_validation_failed", message, f"{name} - {complaint}", facts)


def _range_errors(
    name: str, config: list[Any], options: Mapping[str, Any], value: Any
) -> list[dict[str, Any]]:
    facts = {"input_name": name, "input_config": config, "received_value": value}
    if "min" in options and value < options["min"]:
        message = f"Value {value} smaller than min of {options['min']}"
        return [error_body("value_smaller_than_min", message, name, facts)]
    if "max" in options and value > options["max"]:
        message = f"Value {value} bigger than max of {options['max']}"
        return [error_body("value_bigger_than_max", message, name, facts)]
    return []


def _not_in_list(name: str, config: list[Any], choices: list[Any], value: Any) -> dict[str, Any]:
    is_long = len(choices) > _LONG_LIST
    shown = f"(list of length {len(choices)})" if is_long else str(choices)
    facts = {
        "input_name": name,
        "input_config": None if is_long else config,
        "received_value": value,
    }
    details = f"{name}: '{value}' not in {shown}"
    return error_body("value_not_in_list", "Value not in list", details, facts)


def _exception_facts(error: Exception) -> dict[str, Any]:
    trace = sys.exc_info()[2]
    return {"exception_type": type(error).__name__, "traceback": traceback.format_tb(trace)}
