"""Where in a template a node or one of its inputs stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from comfy_executors.json_text import position
from comfy_executors.rendering import JINJA, outline

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_COLON = re.compile(r"\s*:\s*")


def locate(text: str, node_id: str, *keys: str) -> tuple[int, int] | None:
    """Return where a value of a node stands in the text of a template.

    Args:
        text: The template.
        node_id: The node. Where a loop or a macro makes its id, the likeliest one is taken.
        *keys: The way to the value, such as `"inputs", "steps"`; without any, the node itself.

    Returns:
        Line and column, both from 1, of the value, or for a node of its id; None when the template
        writes it in a way that cannot be followed.
    """
    shown = outline(text)
    likeness = [
        (_likeness(path[-len(keys) - 1], node_id), -len(path), -offset)
        for path, offset in _places(shown, only_keys=not keys)
        if len(path) > len(keys) and tuple(path[len(path) - len(keys) :]) == keys
    ]
    best = max((found for found in likeness if found[0] is not None), default=None)
    return position(shown, -best[2]) if best else None


def _places(text: str, only_keys: bool) -> Iterator[tuple[Sequence[str], int]]:
    """Yield the path of each key of an object, and where it or its value begins."""
    path: list[str] = []
    for token in _TOKEN.finditer(text):
        if token[0] in "{[":
            path.append("")
        elif token[0] in "}]":
            del path[-1:]
        else:
            colon = _COLON.match(text, token.end())
            if colon and path:
                path[-1] = _unquoted(token[0])
                yield path, token.start() if only_keys else colon.end()


def _unquoted(key: str) -> str:
    if JINJA in key:
        return key[1:-1]
    try:
        return str(json.loads(key))
    except ValueError:
        return key[1:-1]


def _likeness(key: str, node_id: str) -> int | None:
    """Return how many characters of a key are the author's own, if it can become a node's id."""
    parts = re.split(rf"{JINJA}[{JINJA}\n]*", key)
    if re.fullmatch(".*".join(map(re.escape, parts)), node_id, re.DOTALL):
        return sum(map(len, parts))
    return None
