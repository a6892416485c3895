"""The prompt texts of a graph, found by following what samplers are conditioned on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from comfy_executors.graphs import Graph, class_type, is_link

_Place = tuple[str, str]

_TEXT = re.compile(
    r"(text|prompt|string|value|str)(_?[a-z0-9])?|text_[gl]|clip_[gl]|t5xxl|bert|mt5xl|llama"
    r"|tags|lyrics|positive|negative|(positive|negative)_prompt|populated_text|wildcard_text"
)
_CONDITIONING = re.compile(r"(positive|negative|cond)(itioning)?.*")
# What else goes into nodes on the way, and never holds the prompt.
_OTHER = re.compile(r"model|clip|vae|latent.*|samples|image.*|pixels|mask|control_net|.*model.*")
# In nodes that take text without being conditioned: the remote ones, speech, and many custom ones.
_LONE_PROMPTS = {
    "positive": ("prompt", "positive_prompt", "positive"),
    "negative": ("negative_prompt", "negative"),
}
# What this makes says nothing of the text that goes into it.
_FORGETS = "ConditioningZeroOut"


def find_prompts(graph: Graph) -> tuple[list[_Place], list[_Place]]:
    """Find the texts that a graph's samplers are conditioned on, as `(node id, input name)`.

    Returns:
        The positive and the negative ones, in the order of the samplers. A text that serves as both
        counts as negative, unless there would be no positive one then.
    """
    found: dict[str, list[_Place]] = {}
    for role in ("positive", "negative"):
        trail = _Trail(graph, role)
        places = [place for start in _starts(graph, role) for place in trail.follow(*start)]
        found[role] = list(dict.fromkeys(places or _lone_prompts(graph, role)))
    positive = [place for place in found["positive"] if place not in found["negative"]]
    positive = positive or found["positive"]
    return positive, [place for place in found["negative"] if place not in positive]


def _starts(graph: Graph, role: str) -> Iterator[tuple[str, int]]:
    """Find the links that condition samplers and guiders, not the nodes on the way to them."""
    on_the_way = {
        value[0]
        for node in graph.values()
        for name, value in node["inputs"].items()
        if is_link(value) and _CONDITIONING.fullmatch(name)
    }
    guiders = {
        node["inputs"]["guider"][0]
        for node in graph.values()
        if is_link(node["inputs"].get("guider"))
    }
    for node_id, node in graph.items():
        ends = any(is_link(node["inputs"].get(name)) for name in ("positive", "negative"))
        if node_id in guiders or (ends and node_id not in on_the_way):
            for name, value in node["inputs"].items():
                is_role = (role == "negative") == name.startswith("negative")
                if is_link(value) and _CONDITIONING.fullmatch(name) and is_role:
                    yield value[0], value[1]


def _lone_prompts(graph: Graph, role: str) -> list[_Place]:
    return [
        (node_id, name)
        for node_id, node in graph.items()
        for name in _LONE_PROMPTS[role]
        if isinstance(node["inputs"].get(name), str)
    ]


class _Trail:
    """Follows links upwards to the texts, and no node twice."""

    def __init__(self, graph: Graph, role: str) -> None:
        self._graph = graph
        self._role = role
        self._seen: set[tuple[str, int]] = set()

    def follow(self, node_id: str, slot: int) -> Iterator[_Place]:
        todo = [(node_id, slot)]
        while todo:
            step = todo.pop()
            if step in self._seen or class_type(self._graph, step[0]) == _FORGETS:
                continue
            self._seen.add(step)
            places, links = self._look(*step)
            yield from places
            todo += reversed(links)

    def _look(self, node_id: str, slot: int) -> tuple[list[_Place], list[tuple[str, int]]]:
        """Return the texts of a node, and the links that lead on to others."""
        inputs = self._graph[node_id]["inputs"]
        texts = [name for name in inputs if _TEXT.fullmatch(name)]
        texts = [name for name in texts if self._is_wanted(inputs, name, slot)]
        places = [(node_id, name) for name in texts if isinstance(inputs[name], str)]
        links = {name: value for name, value in inputs.items() if is_link(value)}
        on = [name for name in links if _CONDITIONING.fullmatch(name)]
        on = [name for name in on if self._is_wanted(inputs, name, slot)]
        on += [name for name in texts if name in links and name not in on]
        if not on and not places:
            on = [name for name in links if not _OTHER.fullmatch(name)]
        return places, [(links[name][0], links[name][1]) for name in on]

    def _is_wanted(self, inputs: Mapping[str, object], name: str, slot: int) -> bool:
        """Tell whether an input counts; of a node that passes on both kinds, one does."""
        both = [inputs.get("positive"), inputs.get("negative")]
        if None in both or not name.startswith(("positive", "negative")):
            return True
        passes_on = all(map(is_link, both)) and slot in (0, 1)
        return name.startswith(("positive", "negative")[slot] if passes_on else self._role)
