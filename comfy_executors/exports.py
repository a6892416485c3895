"""From ComfyUI's UI format to its API format: what the editor does when it queues a workflow.

The editor's file holds boxes and wires: widgets by their order, links by number, nodes that exist
only on the screen, and subgraphs. The server wants classes with named inputs. The names, and which
inputs are widgets, come from the server's description of its nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Union

from comfy_executors.errors import GraphError, node_label
from comfy_executors.graphs import Graph, is_link
from comfy_executors.node_info import Info, nearest_names
from comfy_executors.widgets import saved_values, widget_inputs, widget_values

_MUTED, _BYPASSED = 2, 4
# Nodes that exist in the editor alone.
_NOTES = frozenset({"Note", "MarkdownNote"})
_REROUTES = frozenset({"Reroute", "Reroute (rgthree)"})
_PRIMITIVE, _SETTER, _GETTER = "PrimitiveNode", "SetNode", "GetNode"
_EDITOR_ONLY = _NOTES | _REROUTES | {_PRIMITIVE, _SETTER, _GETTER}
# The box from which links come into a subgraph, and the one to which they go out.
_INPUT_BOX, _OUTPUT_BOX = "-10", "-20"
_ANY = ("*", "", "0")
_SHOWN_UNKNOWN = 10
_MOST_NODES = 20_000

Node = Mapping[str, Any]


class _Link(NamedTuple):
    origin: str
    slot: int
    target: str
    target_slot: int


class _Output(NamedTuple):
    """An output of a node that the server knows."""

    node_id: str
    slot: int


class _Value(NamedTuple):
    """A value that a node of the editor gives in place of an output."""

    value: Any


_Source = Union[_Output, _Value, None]


@dataclass(frozen=True, eq=False)
class _Level:
    """The workflow itself, or one instance of a subgraph in it.

    Args:
        path: What stands before the ids of its nodes: nothing, or `57:`.
        graph: The workflow, or the subgraph's definition.
        parent: The level that the instance stands in.
        instance: The node that stands for it there.
    """

    path: str
    graph: Mapping[str, Any]
    parent: _Level | None = None
    instance: Node | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    links: dict[Any, _Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes.update({str(node["id"]): node for node in _nodes(self.graph)})
        self.links.update(_links(self.graph))


def convert_export(workflow: Mapping[str, Any], object_info: Info) -> Graph:
    """Turn a workflow as ComfyUI's editor saves it into the format that its API takes.

    Muted nodes are left out and bypassed ones bridged, subgraphs are unfolded (their nodes get ids
    such as `57:3`), and notes, reroutes and primitives resolved. Of alternatives in a prompt,
    `{red|blue}`, the first is taken, where the editor picks one at random.

    Args:
        workflow: The workflow, with `nodes` and `links`.
        object_info: The server's description of its node classes (`GET /object_info`).

    Raises:
        GraphError: A node's class is not described, or the file is damaged; the message names the
            node.
    """
    try:
        return _Export(workflow, object_info).graph()
    except GraphError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        # Files edited by hand or by programs have anything in any place.
        raise GraphError(
            f"the workflow is damaged, or the description of the nodes: {error!r}"
        ) from error


class _Export:
    def __init__(self, workflow: Mapping[str, Any], object_info: Info) -> None:
        self._info = object_info
        definitions = (workflow.get("definitions") or {}).get("subgraphs") or []
        self._subgraphs = {graph.get("id"): graph for graph in definitions}
        self._levels: dict[str, _Level] = {}
        size = 0
        for level in self._unfold(_Level("", workflow)):
            self._levels[level.path] = level
            size += len(level.nodes)
            if size > _MOST_NODES:
                # A few subgraphs, each with some of the next, unfold without end.
                raise GraphError(f"unfolded, the workflow has more than {_MOST_NODES} nodes")

    def graph(self) -> Graph:
        placed = [(level, node) for level in self._levels.values() for node in level.nodes.values()]
        wanted = [(level, node) for level, node in placed if self._runs(node)]
        self._refuse_unknown(wanted)
        graph: Graph = {}
        for level, node in wanted:
            if node["type"] in self._info:
                graph[_id(level, node)] = self._converted(level, node)
        for converted in graph.values():
            inputs = converted["inputs"].items()
            converted["inputs"] = {
                name: value
                for name, value in inputs
                if not is_link(value) or value[0] in graph  # else its source is muted
            }
        return graph

    def _unfold(self, level: _Level) -> Iterator[_Level]:
        yield level
        for node in level.nodes.values():
            definition = self._subgraphs.get(node["type"])
            if definition is not None and not _is_off(node):
                self._refuse_endless(level, definition)
                path = f"{level.path}{node['id']}:"
                yield from self._unfold(_Level(path, definition, level, node))

    def _refuse_endless(self, level: _Level, definition: Mapping[str, Any]) -> None:
        above: _Level | None = level
        while above is not None:
            if above.graph is definition:
                raise GraphError(f"subgraph {definition.get('name')!r} contains itself")
            above = above.parent

    def _runs(self, node: Node) -> bool:
        return not (
            _is_off(node) or node["type"] in _EDITOR_ONLY or node["type"] in self._subgraphs
        )

    def _refuse_unknown(self, wanted: Iterable[tuple[_Level, Node]]) -> None:
        unknown = [
            (level, node)
            for level, node in wanted
            # What is linked to nothing is decoration, such as a label: it has no class anywhere.
            if node["type"] not in self._info and _is_linked(node)
        ]
        if not unknown:
            return
        lines = [self._unknown(level, node) for level, node in unknown[:_SHOWN_UNKNOWN]]
        if len(unknown) > _SHOWN_UNKNOWN:
            lines.append(f"and {len(unknown) - _SHOWN_UNKNOWN} more")
        raise GraphError("\n".join(lines), node_id=_id(*unknown[0]))

    def _unknown(self, level: _Level, node: Node) -> str:
        label = node_label(_id(level, node), node.get("title"), node["type"])
        if node["type"].startswith(("workflow>", "workflow/")):
            return f"{label}: is a group node; convert it to a subgraph in ComfyUI, and save again"
        nearest = nearest_names(node["type"], self._info)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        return (
            f"{label}: the description of the nodes has no such class (is its custom node package"
            f" installed on that server?){hint}"
        )

    def _converted(self, level: _Level, node: Node) -> dict[str, Any]:
        info = self._info[node["type"]]
        inputs = {name: _wrapped(value) for name, value in widget_inputs(node, info).items()}
        for index, slot in enumerate(_slots(node, "inputs")):
            source = self._source_of_input(level, node, index, set())
            if isinstance(source, _Output):
                inputs[slot["name"]] = [source.node_id, source.slot]
            elif source is not None:
                inputs[slot["name"]] = _wrapped(source.value)
        title = node.get("title") or info.get("display_name") or node["type"]
        return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}

    # Where a link comes from.

    def _source_of_input(
        self, level: _Level, node: Node, index: int, seen: set[Any], wanted: str | None = None
    ) -> _Source:
        slot = _slots(node, "inputs")[index]
        link = level.links.get(slot.get("link"))
        if link is None:
            return None
        _refuse_circle(level, node, ("input", index), seen)
        if link.origin == _INPUT_BOX and level.parent is not None:
            return self._source_outside(level, link.slot, seen)
        return self._source_of_output(level, link, wanted or str(slot.get("type")), seen)

    def _source_outside(self, level: _Level, slot: int, seen: set[Any]) -> _Source:
        """Follow a link out of a subgraph, to what its instance is given there."""
        assert level.parent is not None
        assert level.instance is not None
        name = _at(level.graph.get("inputs"), slot).get("name")
        for index, outer in enumerate(_slots(level.instance, "inputs")):
            if outer.get("name") == name and outer.get("link") is not None:
                return self._source_of_input(level.parent, level.instance, index, seen)
        return self._shown_value(level.graph, level.instance, slot)

    # What a subgraph's instance shows of the widgets inside.

    def _shown_value(
        self, definition: Mapping[str, Any], instance: Node, slot: int
    ) -> _Value | None:
        """Return the value of an input that is not linked: the instance's own, or the inner one."""
        widget = self._widget_behind(definition, slot)
        if widget is None:
            return None
        before = sum(self._widget_behind(definition, index) is not None for index in range(slot))
        own = saved_values(instance)
        if before < len(own):
            return _Value(own[before])
        node, name = widget
        inner = self._subgraphs.get(node["type"])
        if inner is not None:
            return self._shown_value(inner, node, _index_of(inner, name))
        values = widget_values(node, self._info.get(node["type"]) or {})
        return _Value(values[name]) if name in values else None

    def _widget_behind(self, definition: Mapping[str, Any], slot: int) -> tuple[Node, str] | None:
        """Return the first node in a subgraph with a widget that an input of it sets."""
        nodes = {str(node["id"]): node for node in _nodes(definition)}
        for _, link in _links(definition):
            node = nodes.get(link.target)
            if link.origin != _INPUT_BOX or link.slot != slot or node is None:
                continue
            target = _at(_slots(node, "inputs"), link.target_slot)
            name = str(target.get("name"))
            inner = self._subgraphs.get(node["type"])
            if inner is None:
                found = bool(target.get("widget"))
            else:
                index = _index_of(inner, name)
                found = not _is_off(node) and self._widget_behind(inner, index) is not None
            if found:
                return node, name
        return None

    def _source_of_output(self, level: _Level, link: _Link, wanted: str, seen: set[Any]) -> _Source:
        node = level.nodes.get(link.origin)
        if node is None:
            return None
        _refuse_circle(level, node, ("output", link.slot), seen)
        kind = node["type"]
        if node.get("mode") == _BYPASSED:
            index = _bridge(node, link.slot, wanted)
            return None if index is None else self._source_of_input(level, node, index, seen)
        if node.get("mode") == _MUTED:
            return _Output(_id(level, node), link.slot)
        if kind in self._subgraphs:
            return self._source_inside(level, node, link.slot, wanted, seen)
        if kind in _REROUTES and _slots(node, "inputs"):
            return self._source_of_input(level, node, 0, seen, wanted)
        if kind == _PRIMITIVE:
            return _Value(_first_value(node))
        if kind == _GETTER:
            return self._source_of_setter(level, node, wanted, seen)
        return None if kind in _EDITOR_ONLY else _Output(_id(level, node), link.slot)

    def _source_inside(
        self, level: _Level, node: Node, slot: int, wanted: str, seen: set[Any]
    ) -> _Source:
        inner = self._levels[f"{_id(level, node)}:"]
        numbers = set(_at(inner.graph.get("outputs"), slot).get("linkIds") or ())
        for number, link in inner.links.items():
            if number in numbers and link.target == _OUTPUT_BOX:
                if link.origin == _INPUT_BOX:
                    return self._source_outside(inner, link.slot, seen)
                return self._source_of_output(inner, link, wanted, seen)
        return None

    def _source_of_setter(
        self, level: _Level, getter: Node, wanted: str, seen: set[Any]
    ) -> _Source:
        name = _first_value(getter)
        above: _Level | None = level
        while above is not None:
            for node in above.nodes.values():
                if node["type"] == _SETTER and _first_value(node) == name:
                    return self._source_of_input(above, node, 0, seen, wanted)
            above = above.parent
        return None


def _id(level: _Level, node: Node) -> str:
    return f"{level.path}{node['id']}"


def _is_off(node: Node) -> bool:
    return node.get("mode") in (_MUTED, _BYPASSED)


def _is_linked(node: Node) -> bool:
    return any(slot.get("link") is not None for slot in _slots(node, "inputs")) or any(
        slot.get("links") for slot in _slots(node, "outputs")
    )


def _nodes(graph: Mapping[str, Any]) -> Iterator[Node]:
    for node in graph.get("nodes") or ():
        if not isinstance(node, dict) or "id" not in node or not isinstance(node.get("type"), str):
            raise GraphError("the workflow is damaged: one of its nodes has no id or no type")
        yield node


def _links(graph: Mapping[str, Any]) -> Iterator[tuple[Any, _Link]]:
    for link in graph.get("links") or ():
        try:
            if isinstance(link, dict):
                number = link["id"]
                ends = [link[f"{end}_{what}"] for end in ("origin", "target") for what in _ENDS]
            else:
                number, *ends = link[:5]
            origin, slot, target, target_slot = ends
            yield number, _Link(str(origin), int(slot), str(target), int(target_slot))
        except (KeyError, TypeError, ValueError) as error:
            raise GraphError(f"the workflow is damaged: {link!r} is no link") from error


_ENDS = ("id", "slot")


def _slots(node: Node, which: str) -> list[Mapping[str, Any]]:
    return node.get(which) or []


def _at(items: Any, index: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = items[index] if items and 0 <= index < len(items) else {}
    return found


def _first_value(node: Node) -> Any:
    return next(iter(saved_values(node)), None)


def _wrapped(value: Any) -> Any:
    # A bare list would be taken for a link; the server unwraps it.
    return {"__value__": value} if isinstance(value, list) else value


def _index_of(definition: Mapping[str, Any], name: str) -> int:
    names = [str(item.get("name")) for item in definition.get("inputs") or ()]
    return names.index(name) if name in names else -1


def _bridge(node: Node, slot: int, wanted: str) -> int | None:
    """Return the input that a bypassed node passes on in place of an output, if there is one."""
    inputs = [str(item.get("type")) for item in _slots(node, "inputs")]
    given = str(_at(node.get("outputs"), slot).get("type"))
    if wanted in _ANY:
        return (slot if slot < len(inputs) else 0) if inputs else None
    if slot < len(inputs) and _joins(inputs[slot], given) and _joins(inputs[slot], wanted):
        return slot
    if wanted in inputs:
        return inputs.index(wanted)
    fitting = (
        index for index, kind in enumerate(inputs) if _joins(kind, given) and _joins(kind, wanted)
    )
    return next(fitting, None)


def _joins(one: str, other: str) -> bool:
    if one in _ANY or other in _ANY:
        return True
    return bool(set(one.lower().split(",")) & set(other.lower().split(",")))


def _refuse_circle(level: _Level, node: Node, place: tuple[str, int], seen: set[Any]) -> None:
    key = (_id(level, node), *place)
    if key in seen:
        label = node_label(_id(level, node), node.get("title"), node["type"])
        raise GraphError(f"{label}: its links lead back to it", node_id=_id(level, node))
    seen.add(key)
