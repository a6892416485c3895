"""Our exceptions as JSON and back: never a class that is not one of `errors.py`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from comfy_executors import errors
from comfy_executors.errors import ComfyExecutorsError, NodeProblem, WorkflowError

_MAX_TEXT = 20_000  # characters; a traceback or a message may be anything
_MAX_VALUE = 2_000  # of an input's value, which may be a whole picture
_MAX_ITEMS = 200
_MAX_DEPTH = 4
_CLASSES = {
    name: cls
    for name, cls in vars(errors).items()
    if isinstance(cls, type)
    and issubclass(cls, ComfyExecutorsError)
    and cls.__module__ == errors.__name__
}


def encode_error(error: BaseException) -> dict[str, Any]:
    """Make `{"type": class name, "facts": attributes}` of an exception, of a bounded size.

    One that is none of ours becomes a `WorkflowError` that names it.
    """
    if type(error).__name__ not in _CLASSES or not isinstance(error, ComfyExecutorsError):
        error = WorkflowError(f"the worker failed: {type(error).__name__}: {error}")
    facts = {name: plain(value) for name, value in vars(error).items() if name != "problems"}
    problems = getattr(error, "problems", None)
    if problems is not None:
        facts["problems"] = [_encode_problem(problem) for problem in problems[:_MAX_ITEMS]]
    return {"type": type(error).__name__, "facts": facts}


def _encode_problem(problem: NodeProblem) -> dict[str, Any]:
    facts = {name: plain(value) for name, value in vars(problem).items()}
    if len(repr(facts["value"])) > _MAX_VALUE:
        facts["value"] = f"{repr(facts['value'])[:_MAX_VALUE]}…"
    return facts


def plain(value: Any, depth: int = 0) -> Any:
    """Make something that every JSON encoder takes, of a bounded size."""
    if isinstance(value, str):
        text = value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}…"
        # Half a surrogate pair is a string to Python and no UTF-8.
        return text.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        items = list(value.items())[:_MAX_ITEMS]
        return {plain(str(key)): plain(item, depth + 1) for key, item in items}
    if isinstance(value, (list, tuple)) and depth < _MAX_DEPTH:
        return [plain(item, depth + 1) for item in value[:_MAX_ITEMS]]
    return plain(str(value))


def decode_error(raw: Any) -> ComfyExecutorsError:
    """Make the exception again, with its attributes.

    What is no such description, or names a class that is not in `errors.py` here, becomes a
    `WorkflowError` with as much of its text as there is.
    """
    raw = raw if isinstance(raw, Mapping) else {}
    name, given = raw.get("type"), raw.get("facts")
    given = given if isinstance(given, Mapping) else {}
    facts = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    facts["message"] = str(facts.get("message", "it does not say why"))
    cls = _CLASSES.get(name) if isinstance(name, str) else None
    try:
        if cls is not None:
            return _build(cls, facts)
    except (TypeError, ValueError, KeyError):
        pass  # the facts are not those of the class; its name and its message remain
    return WorkflowError(f"{name or 'the worker failed'}: {facts['message']}".rstrip(": "))


def _build(cls: type[ComfyExecutorsError], facts: dict[str, Any]) -> ComfyExecutorsError:
    if "problems" in facts:
        facts["problems"] = tuple(_problem(item) for item in facts["problems"])
    wanted = inspect.signature(cls).parameters
    error = cls(**{name: value for name, value in facts.items() if name in wanted})
    # The constructor may have worded the message anew, and some facts are none of its arguments.
    for name in facts.keys() & vars(error).keys():
        setattr(error, name, facts[name])
    error.args = (str(error),)
    return error


def _problem(raw: Any) -> NodeProblem:
    texts = {name: str(raw[name]) for name in ("node_id", "kind", "reason")}
    optional = {name: raw.get(name) for name in ("class_type", "title", "input_name", "value")}
    nearest = tuple(str(item) for item in raw.get("nearest") or ())
    return NodeProblem(**texts, **optional, nearest=nearest)
