"""Reading rendered text as JSON, and saying what is wrong with it."""

from __future__ import annotations

import json
import re
from typing import Any

from comfy_executors.errors import TemplateJSONError

_EXCERPT_WIDTH = 100
_FILE_NAME = re.compile(r"https?://\S+|[^\n{}\[\]\"]+\.(?:json|jinja2?|j2)")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


class _NotANumberError(ValueError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


def parse_json(text: str, source: str | None = None) -> Any:
    """Parse the text that a template rendered to.

    Args:
        text: The text.
        source: The file or URL of the template, for messages.

    Raises:
        TemplateJSONError: It is not JSON, or an object has a key twice, which would silently
            drop a node; with line, column and excerpt of the rendered text.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object_of_unique_keys, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        message, index = _explain(text, error)
        raise _json_error(message, text, index, source) from error
    except _DuplicateKeyError as error:
        message = f"the key {error.key!r} is given twice in one object, and the first would be lost"
        raise _json_error(message, text, _second_occurrence(text, error.key), source) from error
    except _NotANumberError as error:
        message = f"{error.name} is not JSON"
        raise _json_error(message, text, _only_occurrence(text, error.name), source) from error
    except RecursionError as error:
        raise _json_error("it is nested too deeply", text, None, source) from error
    except ValueError as error:
        raise _json_error(str(error), text, None, source) from error


def _json_error(
    message: str, text: str, index: int | None, source: str | None
) -> TemplateJSONError:
    message = f"the rendered text is not a JSON workflow: {message}"
    if index is None:
        return TemplateJSONError(message, source=source)
    line, column = position(text, index)
    return TemplateJSONError(
        message, line=line, column=column, excerpt=excerpt(text, line, column), source=source
    )


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return result


def _refuse_constant(name: str) -> Any:
    raise _NotANumberError(name)


def _second_occurrence(text: str, key: str) -> int | None:
    quoted = re.escape(json.dumps(key, ensure_ascii=False))
    found = [match.start() for match in re.finditer(rf"{quoted}\s*:", text)]
    # With more than two there is no telling which object is meant.
    return found[1] if len(found) == 2 else None


def _only_occurrence(text: str, word: str) -> int | None:
    return text.index(word) if text.count(word) == 1 else None


def _explain(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    start = text.lstrip()
    if not start:
        return "it is empty", 0
    if start.startswith("<"):
        return "it looks like an HTML or XML page", 0
    if start[:4] in ("\x89PNG", "\ufffdPNG"):
        return "it looks like a PNG image", 0
    if _FILE_NAME.fullmatch(text):
        return "it looks like a file name or address; use from_file or from_url", 0
    index = _skip_space(text, error.pos)
    comma = _trailing_comma(text, index)
    if comma is not None:
        return f"a comma before {text[_skip_space(text, comma + 1)]} (a trailing comma)", comma
    return _explain_character(text, index, error)


def _skip_space(text: str, index: int) -> int:
    while index < len(text) and text[index] in " \t\r\n":
        index += 1
    return index


def _trailing_comma(text: str, index: int) -> int | None:
    # Python from 3.13 on points at the comma, earlier ones at what follows.
    if text[index : index + 1] == ",":
        following = _skip_space(text, index + 1)
        return index if text[following : following + 1] in ("}", "]") else None
    before = text[:index].rstrip()
    if text[index : index + 1] in ("}", "]") and before.endswith(","):
        return len(before) - 1
    return None


def _explain_character(text: str, index: int, error: json.JSONDecodeError) -> tuple[str, int]:
    rest = text[index:]
    word = re.match(r"[A-Za-z]*", rest)
    if error.msg.startswith("Unterminated string"):
        return "the string that begins here has no closing quote", error.pos
    if error.msg.startswith("Invalid control character"):
        return "a line break or control character inside quotes; is a quote missing?", error.pos
    if error.msg.startswith("Invalid \\"):
        return "a backslash that begins no JSON escape; write two of them", error.pos
    if error.msg.startswith("Extra data"):
        return "something follows the end of the workflow", index
    if not rest:
        return "it ends too early; is a closing bracket missing?", len(text)
    if rest.startswith(("//", "/*")):
        return "JSON has no comments; write {# #}", index
    if rest.startswith("'"):
        return "strings want double quotes", index
    if word and word[0] in _PYTHON_WORDS:
        return f"{word[0]} is written {_PYTHON_WORDS[word[0]]} in JSON", index
    return _explain_expectation(error.msg, word[0] if word and word[0] else rest[0]), index


def _explain_expectation(message: str, found: str) -> str:
    if message.startswith("Expecting ','"):
        return f'a comma is missing before {found}, or a " in the text before it wants a backslash'
    if message.startswith("Expecting ':'"):
        return f"a colon is missing before {found}"
    if found.isalpha():
        return f"{found} wants double quotes"
    if message.startswith("Expecting property name"):
        return f"a key in double quotes is missing before {found}"
    return f"a value is missing before {found}"


def position(text: str, index: int) -> tuple[int, int]:
    """Return line and column, both from 1, of a character of a text."""
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def index_of(text: str, line: int, column: int) -> int:
    """Return the index of the character that stands at a line and column, both from 1."""
    before = text.split("\n")[: line - 1]
    return sum(map(len, before)) + len(before) + column - 1


def excerpt(text: str, line: int, column: int | None = None) -> str:
    """Return a line of a text with its neighbours and a marker.

    Args:
        text: The text.
        line: The line, from 1.
        column: The column to put a caret under, from 1; without it the line itself is marked.

    Returns:
        Up to three numbered lines of at most 100 characters, cut around the column.
    """
    lines = text.split("\n")
    start = max(0, (column or 1) - 1 - _EXCERPT_WIDTH // 2)
    width = len(str(line + 1))
    shown = []
    for number in range(max(1, line - 1), min(len(lines), line + 1) + 1):
        mark = ">" if number == line else " "
        shown.append(f"{mark} {number:>{width}} | {_cut(lines[number - 1], start)}".rstrip())
        if number == line and column is not None:
            shown.append(" " * (width + 5 + column - 1 - start) + "^")
    return "\n".join(shown)


def _cut(line: str, start: int) -> str:
    # Lone surrogates and control characters would break a terminal or a log.
    part = line[start : start + _EXCERPT_WIDTH]
    return "".join(char if char.isprintable() else " " for char in part)
