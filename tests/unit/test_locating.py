"""A node or an input is found in the text of a template, where Jinja allows it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from test_template_properties import TEXTS

from comfy_executors.locating import locate
from comfy_executors.parametrize import find_parameters
from comfy_executors.rendering import outline
from comfy_executors.template_text import write_template

TEMPLATE = """{# "3": {"inputs": {"steps": 1}} #}
{
  "3": {"class_type": "KSampler", "inputs": {
    "steps": {{ steps | default("}} \\"3\\": {") }},
    "text": "{{ prompt }}, {% raw %}{{ "steps": {% endraw %}4k",
    "odd\\"name": [1, {"steps": {"steps": 2}, "9": 4}],
    "model": ["4", 0]
  }, "_meta": {"title": "steps"}},
  {%- for lora in loras %}
  "lora{{ loop.index }}": {"inputs": {"name": {{ lora }}}},
  {%- endfor %}
  {% macro node(id) %}"{{ id }}": {"inputs": {"value": {{ id }}}}{% endmacro %}
  {{ node(4) }},
  "lora{{ last }}9": {"inputs": {"name": "last"}},
  "9": {"inputs": {}}
}
"""
PLACES = {
    ("3",): '"3": {"class_type"',
    ("3", "class_type"): '"KSampler"',
    ("3", "inputs", "steps"): "{{ steps |",
    ("3", "inputs", "text"): '"{{ prompt',
    ("3", "inputs", 'odd"name'): "[1, {",
    ("3", "inputs", "model"): '["4", 0]',
    ("lora2",): '"lora{{ loop',
    ("lora2", "inputs", "name"): "{{ lora }}",
    ("lora19", "inputs", "name"): '"last"',
    ("9",): '"9": {"inputs"',
    ("4", "inputs", "value"): "{{ id }}}}{%",
}


@pytest.mark.parametrize("way", PLACES, ids=lambda way: "-".join(way))
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_where_it_stands(way: tuple[str, ...], ending: str) -> None:
    assert TEMPLATE.count(PLACES[way]) == 1
    before = TEMPLATE[: TEMPLATE.index(PLACES[way])]
    expected = (before.count("\n") + 1, len(before) - before.rfind("\n"))
    assert locate(TEMPLATE.replace("\n", ending), *way) == expected


@pytest.mark.parametrize(
    "way", [("3", "inputs", "absent"), ("3", "absent"), ("lora2", "inputs", "steps")]
)
def test_what_does_not_stand_there(way: tuple[str, ...]) -> None:
    assert locate(TEMPLATE, *way) is None


def test_an_outline_keeps_every_character_in_its_place() -> None:
    shown = outline(TEMPLATE)
    assert shown == "".join(own if own == there else "\0" for own, there in zip(shown, TEMPLATE))
    assert len(shown) == len(TEMPLATE.rstrip("\n"))
    assert "default" not in shown
    assert '{{ "steps": ' in shown


@settings(derandomize=True, deadline=None, max_examples=40)
@given(TEXTS, TEXTS)
def test_each_input_of_a_written_template_is_found(text: str, name: str) -> None:
    graph: Any = {
        "7": {"class_type": "A", "inputs": {"text": text, "x": [text, {name: 1}], "last": 1}}
    }
    written = write_template(graph, find_parameters(graph))
    line, column = locate(written, "7", "inputs", "last") or (0, 0)
    assert written.split("\n")[line - 1][column - 1 :] == "1"
