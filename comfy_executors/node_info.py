"""What a server says of its node classes (`GET /object_info`), read and worded."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Union

from comfy_executors.errors import GraphError

_NEAREST = 3
_ALIKE = 0.5
_SHOWN_VALUE = 120

# The description of one node class, and of all of them by their names.
Info = Mapping[str, Any]
# All of them, or a JSON file that holds them.
ObjectInfo = Union[Info, str, os.PathLike[str]]


def read_object_info(object_info: ObjectInfo) -> Info:
    """Return the description of a server's nodes, read from a file where it is one.

    Raises:
        OSError: The file cannot be read.
        GraphError: It is not what `GET /object_info` answers.
    """
    if isinstance(object_info, Mapping):
        return object_info
    with open(object_info, "rb") as file:
        try:
            info = json.load(file)
        except ValueError as error:
            raise GraphError(f"{os.fspath(object_info)} is no JSON: {error}") from error
    if not isinstance(info, dict) or not any(map(_is_description, info.values())):
        raise GraphError(
            f"{os.fspath(object_info)} is not what a server answers to GET /object_info"
        )
    return info


def _is_description(info: Any) -> bool:
    return isinstance(info, dict) and "input" in info


def input_type(config: Any) -> str:
    """Return the type of an input; lists of choices, the older way to write them, are COMBO."""
    if not isinstance(config, (list, tuple)) or not config:
        return "*"
    return config[0] if isinstance(config[0], str) else "COMBO"


def input_options(config: Any) -> Mapping[str, Any]:
    """Return what an input's description says beside its type: default, minimum, choices."""
    if isinstance(config, (list, tuple)) and len(config) > 1 and isinstance(config[1], Mapping):
        return config[1]
    return {}


def choices(config: Any) -> list[str] | None:
    """Return the values that an input's description lists, or None if it lists none."""
    if not isinstance(config, (list, tuple)) or not config:
        return None
    options = config[0]
    if options == "COMBO" and len(config) > 1 and isinstance(config[1], Mapping):
        options = config[1].get("options")
    return [str(option) for option in options] if isinstance(options, (list, tuple)) else None


def what_there_is(names: Collection[str], nearest: Collection[str]) -> str:
    """Word what a server has instead, where no name is near: `, which has 12, such as a, b, c`."""
    if nearest:
        return ""
    if not names:
        return ", which has none to choose from"
    some = ", ".join(map(_cut, itertools.islice(names, _NEAREST)))
    count = f"{len(names)}, such as" if len(names) > _NEAREST else "only"
    return f", which has {count} {some}"


def nearest_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names most like a given one, best first, at most three.

    Folders and endings do not count: all model files end alike.
    """
    wanted = _stem(name)
    matcher = difflib.SequenceMatcher(b=wanted)
    likeness = {candidate: _likeness(matcher, wanted, _stem(candidate)) for candidate in names}
    close = [candidate for candidate, like in likeness.items() if like >= _ALIKE]
    return tuple(sorted(close, key=lambda candidate: -likeness[candidate])[:_NEAREST])


def _stem(name: str) -> str:
    return os.path.splitext(re.split(r"[\\/]", name)[-1])[0].lower()


def _likeness(matcher: difflib.SequenceMatcher[str], wanted: str, candidate: str) -> float:
    matcher.set_seq1(candidate)
    like = 0.0
    # The two quick ones are never below the exact one, and a server can have thousands of names.
    if matcher.real_quick_ratio() >= _ALIKE and matcher.quick_ratio() >= _ALIKE:
        like = matcher.ratio()
    contained = len(wanted) > 2 and (wanted in candidate or candidate in wanted)
    return max(like, _ALIKE) if contained and candidate else like


def shown(value: Any) -> str:
    """Write a value as JSON for a sentence, cut where it is long."""
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}…"
