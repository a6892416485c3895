"""Writing a graph with variables as the text of a template."""

from __future__ import annotations

import json
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_executors.errors import GraphError
from comfy_executors.graphs import Graph
from comfy_executors.parametrize import Parameter, Place

_JINJA = re.compile(r"\{[{%#]")
_SHORT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LINE = 100


def write_template(graph: Graph, parameters: Iterable[Parameter]) -> str:
    """Write a template that renders to a graph, with variables in the places of the parameters.

    Args:
        graph: The graph. What looks like Jinja in it is written so that it stays text.
        parameters: What becomes variables.

    Raises:
        GraphError: JSON cannot express the graph.
    """
    parameters = list(parameters)
    places = {place: parameter for parameter in parameters for place in parameter.places}
    try:
        nodes = [
            f"  {_string(node_id)}: {_node(node_id, node, places)}"
            for node_id, node in graph.items()
        ]
    except (TypeError, ValueError) as error:
        raise GraphError(f"the workflow cannot be written as JSON: {error}") from error
    return _heading(parameters) + "{\n" + ",\n".join(nodes) + "\n}\n"


def _heading(parameters: list[Parameter]) -> str:
    lines = []
    for words, required in (("Required", True), ("Optional", False)):
        names = dict.fromkeys(item.name for item in parameters if item.required is required)
        if names:
            lines += textwrap.wrap(f"{words}: {', '.join(names)}.", _LINE - 6)
    return "{# " + "\n   ".join(lines) + " #}\n" if lines else ""


def _node(node_id: str, node: Mapping[str, Any], places: Mapping[Place, Parameter]) -> str:
    parts = []
    for key, value in node.items():
        if key == "inputs" and value:
            inputs = [
                f"      {_string(name)}: {_input(inner, places.get(Place(node_id, name)))}"
                for name, inner in value.items()
            ]
            text = "{\n" + ",\n".join(inputs) + "\n    }"
        else:
            text = _json(value)
        parts.append(f"    {_string(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n  }"


def _input(value: Any, parameter: Parameter | None) -> str:
    if parameter is None:
        return _json(value)
    expression = parameter.expression or parameter.name
    if not parameter.required:
        expression += f" | default({parameter.default or _default(value)})"
    written = f"{{{{ {expression} }}}}"
    return f'"{written}"' if isinstance(value, str) else written


def _default(value: Any) -> str:
    return _jinja_string(value) if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        items = ", ".join(f"{_string(key)}: {_json(inner)}" for key, inner in value.items())
        # A key that is an expression must not make three braces of two.
        return f"{{ {items} }}" if items.startswith("{") else f"{{{items}}}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value, allow_nan=False)


def _string(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"the key {text!r} is no string")
    written = json.dumps(text, ensure_ascii=False)
    if _JINJA.search(written) or any(unicodedata.category(char) == "Cs" for char in written):
        # As a value it stays text; and half a character cannot be written into a file.
        return f"{{{{ {_jinja_string(text)} }}}}"
    return written


def _jinja_string(text: str) -> str:
    return '"' + "".join(map(_jinja_character, text)) + '"'


def _jinja_character(char: str) -> str:
    if char in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[char]
    if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\u{ord(char):04x}"
    return char
