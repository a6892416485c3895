"""The values that ComfyUI's editor saved for a node's widgets, by the names of the inputs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from comfy_executors.node_info import Info, choices, input_options, input_type

_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR"})
_DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
# What the editor shows behind a seed, and takes a place among the values.
_CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")
_SEEDS = ("seed", "noise_seed")
# Widgets of the editor, which the server does not know.
_EDITOR_WIDGETS = frozenset(
    {
        *_CONTROL_VALUES,
        "control_after_generate",
        "control_filter_list",
        "upload",
        "audioUI",
        "videopreview",
    }
)
_UPLOADS = (
    "image_upload",
    "animated_image_upload",
    "video_upload",
    "audio_upload",
    "mesh_upload",
    "file_upload",
)
# What the buttons for uploads leave among the values.
_UPLOAD_VALUES = ("image", "", None)
_EMPTY = {"INT": 0, "FLOAT": 0, "STRING": "", "BOOLEAN": False}
_NOTHING = object()
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_PROMPT_PART = re.compile(r"\\.|[{}|]|[^\\{}|]+|\\", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}|])")


def widget_inputs(node: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """Return the values of a node's widgets as the editor sends them; see `widget_values`."""
    values = widget_values(node, info)
    for inputs in (info.get("input") or {}).values():
        for name, config in inputs.items():
            if input_options(config).get("dynamicPrompts") and isinstance(values.get(name), str):
                values[name] = without_alternatives(values[name])
    return values


def widget_values(node: Mapping[str, Any], info: Info) -> dict[str, Any]:
    """Return the values of a node's widgets by the names of the inputs.

    Args:
        node: The node as the editor saves it. Its values are a list in the order of the widgets;
            a dictionary, as some custom nodes write; or both, in newer exports.
        info: The description of its class.

    Returns:
        What the node has saved, and defaults for what it has not.
    """
    inputs = info.get("input") or {}
    required, optional = inputs.get("required") or {}, inputs.get("optional") or {}
    named = _named_values(node)
    if named is None:
        return dict(_Reader(node, saved_values(node)).read(required, optional))
    found = dict(_Reader(node, named).read(required, optional))
    # Custom nodes have widgets that their description does not know of.
    own = {name: named[name] for name in named if name not in _EDITOR_WIDGETS}
    return {**found, **{name: own[name] for name in own if name not in found}}


def saved_values(node: Mapping[str, Any]) -> list[Any]:
    """Return the values of a node's widgets in the order in which the editor shows them."""
    values = node.get("widgets_values") or ()
    return list(values.values() if isinstance(values, Mapping) else values)


def _named_values(node: Mapping[str, Any]) -> dict[str, Any] | None:
    values = node.get("widgets_values")
    if isinstance(values, Mapping):
        return dict(values)
    named = node.get("widgets_values_named")
    if isinstance(named, Mapping) and len(named) == len(values or ()):
        # The editor itself reads the list, which others may have edited.
        return dict(zip(named, values or ()))
    return None


def without_alternatives(text: str) -> str:
    """Return a prompt as the editor sends it: no comments, and of `{red|blue}` the first."""
    kept = []
    taking = [True]
    for part in _PROMPT_PART.findall(_COMMENT.sub("", text)):
        if part == "{":
            taking.append(taking[-1])
        elif part == "|" and len(taking) > 1:
            taking[-1] = False
        elif part == "}" and len(taking) > 1:
            taking.pop()
        elif taking[-1]:
            kept.append(part)
    return _ESCAPED.sub(r"\1", "".join(kept))


class _Reader:
    """Hands out saved values, by name or in the order in which the editor makes the widgets."""

    def __init__(self, node: Mapping[str, Any], saved: dict[str, Any] | list[Any]) -> None:
        self._by_name = saved if isinstance(saved, dict) else None
        self._in_order = deque(saved if isinstance(saved, list) else ())
        self._slots = {slot.get("name"): slot for slot in node.get("inputs") or ()}
        self._sockets_have_values = False

    def read(
        self, required: Mapping[str, Any], optional: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any]]:
        self._sockets_have_values = self._count_values({**required, **optional})
        yield from self._widgets(required)
        if any(map(_is_uploaded, required.values())):
            while self._in_order and self._in_order[0] in _UPLOAD_VALUES:
                self._in_order.popleft()
        yield from self._widgets(optional)

    def _count_values(self, inputs: Mapping[str, Any]) -> bool:
        """Tell whether inputs that were always sockets have values, as in old exports."""
        forced = [name for name in inputs if _is_forced(inputs[name])]
        widgets = [name for name in inputs if self._is_widget(name, inputs[name])]
        controls = [name for name in widgets if _is_controlled(name, inputs[name])]
        return bool(forced) and len(self._in_order) == sum(map(len, (forced, widgets, controls)))

    def _widgets(self, inputs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, config in inputs.items():
            yield from self._widget(prefix + name, config)

    def _widget(self, name: str, config: Any) -> Iterator[tuple[str, Any]]:
        if not self._is_widget(name, config):
            if self._sockets_have_values and _is_forced(config):
                self._take(name)
            return
        value = self._take(name)
        if value is _NOTHING:
            value = _default(config)
        if value is _NOTHING:
            return
        self._skip_control(name, config)
        yield name, value
        if input_type(config) == _DYNAMIC:
            for option in input_options(config).get("options") or ():
                if option.get("key") == value:
                    for section in (option.get("inputs") or {}).values():
                        yield from self._widgets(section, f"{name}.")

    def _is_widget(self, name: str, config: Any) -> bool:
        slot = self._slots.get(name)
        if slot is not None:
            # What the editor wrote down is surer than what we know of its widgets.
            return bool(slot.get("widget"))
        kind = input_type(config)
        return (kind in _WIDGET_TYPES or kind == _DYNAMIC) and not _is_forced(config)

    def _take(self, name: str) -> Any:
        if self._by_name is not None:
            return self._by_name.get(name, _NOTHING)
        return self._in_order.popleft() if self._in_order else _NOTHING

    def _skip_control(self, name: str, config: Any) -> None:
        follows = bool(self._in_order) and self._in_order[0] in _CONTROL_VALUES
        if follows and _is_controlled(name, config):
            self._in_order.popleft()
            if input_type(config) == "COMBO" and self._in_order:
                self._in_order.popleft()  # the filter of the choices


def _is_forced(config: Any) -> bool:
    return bool(input_options(config).get("forceInput"))


def _is_uploaded(config: Any) -> bool:
    return any(input_options(config).get(name) for name in _UPLOADS)


def _is_controlled(name: str, config: Any) -> bool:
    wanted = input_options(config).get("control_after_generate")
    return bool(wanted) or (input_type(config) == "INT" and name.split(".")[-1] in _SEEDS)


def _default(config: Any) -> Any:
    options = input_options(config)
    if "default" in options:
        return options["default"]
    if input_type(config) == _DYNAMIC:
        keys = [option.get("key") for option in options.get("options") or ()]
        return keys[0] if keys else _NOTHING
    known = choices(config)
    return known[0] if known else _EMPTY.get(input_type(config), _NOTHING)
