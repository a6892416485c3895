"""No value can change the structure of a workflow, and every value lands exactly."""

from __future__ import annotations

import json
from typing import Any, Callable

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from comfy_executors.errors import GraphError
from comfy_executors.workflows import WorkflowTemplate

steady = settings(derandomize=True, deadline=None, max_examples=80)

# What breaks JSON, Jinja, HTML or a marker of an implementation comes up far too rarely by itself.
_HOSTILE = st.sampled_from(
    [
        '"',
        "\\",
        "\\u",
        "\n",
        "\x00",
        "{{ x }}",
        "{% endraw %}",
        "{#",
        '", "fail": "',
        '"}}, "9": {"class_type": "Evil", "inputs": {}}, "8": {"x": "',
        ",",
        "}",
        "]",
        "<&'>",
        "&#34;",
        "\u2028",
        "\ue000",
        "\U0010ffff",
        "\ud83d",
        "\ude00",
        "\ufeff",
        "_Literal('x')",
        "true",
        "0",
    ]
)
_CHARACTERS = st.characters(blacklist_categories=())
TEXTS = st.lists(st.one_of(_HOSTILE, st.text(_CHARACTERS, max_size=4)), max_size=6).map("".join)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def compiled(template: str) -> WorkflowTemplate:
    head = '{"6": {"class_type": "A", "inputs": {"text": '
    return WorkflowTemplate(head + template + ', "seed": 1}, "_meta": {"title": "T"}}}')


def text_of(template: WorkflowTemplate, **variables: Any) -> Any:
    graph = template.render(**variables)
    value = graph["6"]["inputs"].pop("text")
    assert graph == {"6": {"class_type": "A", "inputs": {"seed": 1}, "_meta": {"title": "T"}}}
    return value


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    '"{{ a }}"': lambda a, b: a,
    "{{ a }}": lambda a, b: a,
    "{{ a|tojson }}": lambda a, b: a,
    '"x {{ a }} y"': lambda a, b: f"x {a} y",
    '"{{ a }}{{ b }}"': lambda a, b: a + b,
    '"{{ a ~ b }}"': lambda a, b: a + b,
    "{{ a ~ b }}": lambda a, b: a + b,
    '"{{ a + b }}"': lambda a, b: a + b,
    '"{{ [a, b]|join(a) }}"': lambda a, b: a + a + b,
    '"{{ a|replace(b, a) }}"': lambda a, b: a.replace(b, a),
    '"{{ a|trim|upper }}"': lambda a, b: a.strip().upper(),
    '"{{ "%s|%s"|format(a, b) }}"': lambda a, b: f"{a}|{b}",
    '"{{ "{}|{}".format(a, b) }}"': lambda a, b: f"{a}|{b}",
    '"{{ c|default(a) }}{{ b }}"': lambda a, b: a + b,
    '"{% set s %}{{ a }},{{ b }}{% endset %}{{ s }}"': lambda a, b: f"{a},{b}",
    '"{% set s %}{{ a }}{% endset %}{{ s ~ b }}"': lambda a, b: a + b,
    '"{% set s %}{{ a }}{% endset %}{{ b ~ s ~ b }}"': lambda a, b: b + a + b,
    '"{% set s %}x{{ a }}{% endset %}{{ s|trim|upper|replace("X", b) }}"': (
        lambda a, b: f"x{a}".strip().upper().replace("X", b)
    ),
    '"{% set s %}{{ a }}{% endset %}{% set t %}{{ s }}{{ b }}{{ s }}{% endset %}{{ t }}"': (
        lambda a, b: a + b + a
    ),
    '"{% filter upper %}{{ a }}{% endfilter %}"': lambda a, b: a.upper(),
    "{% filter trim %}{{ a }}{{ b }}{% endfilter %}": lambda a, b: (a + b).strip(),
    '"{% macro m(t) %}{{ t }}!{% endmacro %}{{ m(a) ~ m(b) }}"': lambda a, b: f"{a}!{b}!",
    '{% macro m(t) %}"{{ t }}!"{% endmacro %}{{ m(a) }}': lambda a, b: f"{a}!",
    "{% macro m(t) %}{{ t }}{% endmacro %}{{ m(a) }}": lambda a, b: a,
    '"{% macro m() %}{{ caller(b) }}{% endmacro %}{% call(t) m() %}{{ a }}{{ t }}{% endcall %}"': (
        lambda a, b: a + b
    ),
    '"{% for t in [a, b] recursive %}{{ loop([t]) if loop.first and loop.depth < 2 }}'
    '{{ t }}{% endfor %}"': lambda a, b: a + a + b,
    '{% macro m(t) %}{"k": "{{ t }}", "l": [{{ t }}]}{% endmacro %}{{ m(a) }}': (
        lambda a, b: {"k": a, "l": [a]}
    ),
}
COMPILED_WAYS = {way: compiled(way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
@steady
@given(a=TEXTS, b=TEXTS)
def test_any_text_lands_exactly(way: str, a: str, b: str) -> None:
    template = COMPILED_WAYS[way]
    given_now = {name: {"a": a, "b": b}[name] for name in template.required_variables}
    assert text_of(template, **given_now) == WAYS[way](a, b)


VALUE_OUT = compiled("[{{ v }}, {{ v|tojson }}, {{ [v] }}, {% set x = v %}{{ x }}]")
VALUE_IN = compiled('"{{ v }}"')


@steady
@given(VALUES)
def test_any_value_goes_in_and_out(value: Any) -> None:
    assert text_of(VALUE_OUT, v=value) == [value, value, [value], value]


@steady
@given(VALUES)
def test_any_value_in_quotes_is_text(value: Any) -> None:
    text = text_of(VALUE_IN, v=value)
    assert isinstance(text, str)
    assert value == text if isinstance(value, str) else json.loads(text) == value


EVERYWHERE = WorkflowTemplate(
    '{"1": {"class_type": "{{ v }}", "inputs": {"a": "{{ v }}", "b": {{ v }}, "{{ v }}_": [{{ v }},'
    ' "x{{ v }}y"], "{% set s %}{{ v }}{% endset %}c{{ s }}": {{ v|tojson }}}},'
    '{% macro node(id, v) %}"{{ id }}": {"class_type": "M", "inputs": {"v": "{{ v }}", "w": {{ v }}'
    "}}{% endmacro %}{{ node(2, v) }}}"
)


@steady
@given(VALUES)
def test_the_structure_is_the_same_for_every_value(value: Any) -> None:
    try:
        graph = EVERYWHERE.render(v=value)
    except GraphError:
        # An empty class, or a list that is a link to nowhere: refused, not obeyed.
        reject()
    assert list(graph) == ["1", "2"]
    assert len(graph["1"]["inputs"]) == 4
    assert list(graph["2"]["inputs"]) == ["v", "w"]
    assert graph["1"]["inputs"]["b"] == graph["2"]["inputs"]["w"] == value


@steady
@given(st.dictionaries(TEXTS, VALUES, max_size=3))
def test_any_graph_passes_literally(inputs: dict[str, Any]) -> None:
    graph = {"{{ x }}": {"class_type": "{% A", "inputs": {"list": [inputs]}}}
    assert WorkflowTemplate.from_graph(graph).render() == graph
