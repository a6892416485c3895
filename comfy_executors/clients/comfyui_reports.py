"""What a ComfyUI server says of its prompts, made plain types, whatever its shape; no I/O here.

Custom nodes put their own words into messages and history. What is not understood is left out: a
prompt that runs is worth more than a word about it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class OutputFile(NamedTuple):
    """A file that a node reports: its name, its folder, and which of the server's folders."""

    name: str
    subfolder: str
    type: str


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def messages_of(value: Any) -> dict[str, Mapping[str, Any]]:
    """Return the messages of a history entry, a list of pairs, by their type."""
    return {
        item[0]: mapping(item[1])
        for item in (value if isinstance(value, list) else ())
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)
    }


def node_output(value: Any) -> dict[str, list[Any]]:
    """Return what a node reports: for each key the list of its items."""
    return {key: items for key, items in mapping(value).items() if isinstance(items, list)}


def node_outputs(value: Any) -> dict[str, dict[str, list[Any]]]:
    """Return what the nodes of a prompt report, by node id."""
    return {node: node_output(output) for node, output in mapping(value).items()}


def output_file(item: Any) -> OutputFile | None:
    """Return the file that an item of a node's report names, if it names one."""
    name = mapping(item).get("filename")
    if not isinstance(name, str):
        return None
    return OutputFile(
        _encodable(name),
        _encodable(str(item.get("subfolder") or "")),
        _encodable(str(item.get("type") or "output")),
    )


def value_file(item: Any) -> tuple[str, str] | None:
    """Return what an item of a node's report says that is no file: a text, and its file's suffix.

    None for `animated: [true]` and its like, and for what no JSON can be made of.
    """
    if isinstance(item, str):
        return item, "txt"
    try:
        return None if isinstance(item, bool) else (json.dumps(item), "json")
    except RecursionError:  # brackets that are nested a thousand deep
        return None


def node_ids(value: Any) -> frozenset[str]:
    """Return the node ids of a list."""
    items = value if isinstance(value, list) else ()
    return frozenset(item for item in items if isinstance(item, str))


def step_of(data: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the step and the number of steps that a `progress` message tells."""
    step: Any = data.get("value")
    steps: Any = data.get("max")
    if _is_finite(step) and _is_finite(steps):
        return int(step), int(steps)
    return None


def text_of(value: Any) -> str:
    """Return a text, or the lines of one, as a text."""
    if isinstance(value, str):
        return value
    return "".join(map(str, value)) if isinstance(value, list) else ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _encodable(text: str) -> str:
    # JSON can hold half of a surrogate pair, which no URL can.
    return text.encode("utf-8", "replace").decode()
