"""Graphs: links, what is needed for an output, the order of nodes, cache signatures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Graph = Mapping[str, Any]


def is_link(value: object) -> bool:
    return isinstance(value, list)


def parents(graph: Graph, node_id: str) -> list[str]:
    """Return the ids of the nodes that a node is linked to."""
    return [value[0] for value in graph[node_id]["inputs"].values() if is_link(value)]


def signatures(
    graph: Graph, outputs: Iterable[str], fingerprint: Callable[[str], str]
) -> dict[str, str]:
    """Return what tells the result of each node: its class, its inputs, and all its ancestors.

    Args:
        graph: The graph; the part above the outputs has no cycles.
        outputs: The output nodes; only they and their ancestors are looked at.
        fingerprint: Returns, for a node id, what the inputs alone do not tell, such as the
            contents of the file that a node loads.

    Unknown inputs count too, although no node reads them: the real server does the same.
    """
    known: dict[str, str] = {}
    for node_id in _ancestors_first(graph, outputs):
        inputs = {
            name: ["link", known.get(value[0]), value[1]] if is_link(value) else value
            for name, value in graph[node_id]["inputs"].items()
        }
        facts = [graph[node_id]["class_type"], fingerprint(node_id), inputs]
        text = json.dumps(facts, sort_keys=True)
        known[node_id] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return known


def _ancestors_first(graph: Graph, outputs: Iterable[str]) -> Iterator[str]:
    done: set[str] = set()
    stack = [(output, False) for output in outputs]
    while stack:
        node_id, parents_done = stack.pop()
        if node_id in done:
            continue
        if parents_done:
            done.add(node_id)
            yield node_id
        else:
            stack.append((node_id, True))
            stack.extend((parent, False) for parent in parents(graph, node_id))


class Schedule:
    """Hands out the nodes of a graph in the order in which they run.

    A node is ready when all it links to is done. Among the ready ones an output node comes first,
    then the nodes closest to one, as on the real server: people see results early.

    Args:
        graph: The graph; the part above the outputs has no cycles.
        outputs: The output nodes to reach; only they and their ancestors run.
        is_cached: Whether the result of a node is known, so that its ancestors need not run.
    """

    def __init__(
        self, graph: Graph, outputs: Iterable[str], is_cached: Callable[[str], bool]
    ) -> None:
        self._blocking: dict[str, set[str]] = {}
        self._waiting_for: dict[str, set[str]] = {}
        self._outputs = set(outputs)
        for output in outputs:
            self._add(graph, output, is_cached)

    def _add(self, graph: Graph, output: str, is_cached: Callable[[str], bool]) -> None:
        stack = [output]
        while stack:
            node_id = stack.pop()
            if node_id in self._waiting_for:
                continue
            needed: list[str] = []
            if not is_cached(node_id):
                needed = [up for up in parents(graph, node_id) if not is_cached(up)]
            self._waiting_for[node_id] = set(needed)
            for parent in needed:
                self._blocking.setdefault(parent, set()).add(node_id)
            stack.extend(needed)

    def __iter__(self) -> Iterator[str]:
        while self._waiting_for:
            ready = [node for node, needed in self._waiting_for.items() if not needed]
            node_id = min(ready, key=self._distance) if len(ready) > 1 else ready[0]
            yield node_id
            del self._waiting_for[node_id]
            for child in self._blocking.get(node_id, ()):
                self._waiting_for[child].discard(node_id)

    def _distance(self, node_id: str) -> int:
        front = {node_id}
        for distance in range(3):
            if front & self._outputs:
                return distance
            front = {child for node in front for child in self._blocking.get(node, ())}
        return 3
