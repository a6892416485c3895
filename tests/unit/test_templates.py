from __future__ import annotations

import enum
import json
import pickle
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from comfy_executors.errors import GraphError
from comfy_executors.workflows import WorkflowTemplate

NASTY = (
    'a "red" fox, it\'s \\ \n\r\t\x00\x1f\x7f <lora:x:0.8> & {{ x }} {% raw %} {# c #}'
    ' ", "fail": "x \u2028\u2029 \ue000\ufffe\U0010ffff \U0001f98a \ud83d\ude00 \udc00 &quot; '
    "\\u0022"
)


def text_of(template: str, **variables: Any) -> Any:
    text = '{"6": {"class_type": "CLIPTextEncode", "inputs": {"text": %s}}}'
    graph = WorkflowTemplate(text.replace("%s", template)).render(**variables)
    assert list(graph) == ["6"]
    assert list(graph["6"]) == ["class_type", "inputs"]
    assert list(graph["6"]["inputs"]) == ["text"]
    return graph["6"]["inputs"]["text"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('"{{ p }}"', NASTY),
        ("{{ p }}", NASTY),
        ('"a {{ p }} b"', f"a {NASTY} b"),
        ('"\\"{{ p }}\\\\"', f'"{NASTY}\\'),
        ('"{{ p }}{{ p }}"', NASTY * 2),
        ('"{{ p ~ p }}"', NASTY * 2),
        ('"{{ p + p }}"', NASTY * 2),
        ('"{{ [p, p]|join(p) }}"', NASTY * 3),
        ('"{{ p|upper }}"', NASTY.upper()),
        ('"{{ p|replace("fox", p) }}"', NASTY.replace("fox", NASTY)),
        ('"{{ p|trim|string|e|escape|safe }}"', NASTY.strip()),
        ('"{{ "%s!"|format(p) }}"', f"{NASTY}!"),
        ('"{{ "{}!".format(p) }}"', f"{NASTY}!"),
        ('"{{ q|default(p) }}"', NASTY),
        ('"{{ q|default({}, true)|length }}"', "0"),
        ('"{% if p %}{{ p }}{% endif %}"', NASTY),
        ('["{{ p }}", {{ p }}, {{ p|tojson }}]', [NASTY] * 3),
        ('"{% set x = p %}{{ x }}"', NASTY),
        ('"{% set x %}a {{ p }}{% endset %}{{ x }}"', f"a {NASTY}"),
        ('"{% set x %}{{ p }}{% endset %}{{ x ~ p }}"', NASTY * 2),
        ('"{% set x %}{{ p }}{% endset %}{{ p ~ x ~ p }}"', NASTY * 3),
        ('"{% set x %}{{ p }}{% endset %}{{ x|replace("fox", "cat")|upper }}"', None),
        ('"{% set x | upper %}{{ p }}{% endset %}{{ x }}"', NASTY.upper()),
        ('"{% filter upper %}{{ p }}{% endfilter %}"', NASTY.upper()),
        ("{% filter upper %}{{ p }}{% endfilter %}", NASTY.upper()),
        ('"{% macro m(t) %}{{ t }}, {{ t }}{% endmacro %}{{ m(p) }}"', f"{NASTY}, {NASTY}"),
        ('{% macro m(t) %}"a {{ t }}"{% endmacro %}{{ m(p) }}', f"a {NASTY}"),
        ("{% macro m(t) %}{{ t }}{% endmacro %}{{ m(p) }}", NASTY),
        ('"{% macro m(t) %}{{ t }}{% endmacro %}{{ m(p) ~ p }}"', NASTY * 2),
        ('"{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}{{ p }}{% endcall %}"', None),
        ('{% block b %}"{{ p }}"{% endblock %}', NASTY),
        ('"{% for c in [p, p] %}{{ c }}{% if not loop.last %} | {% endif %}{% endfor %}"', None),
        ('"{{ d.key }}{{ d["key"] }}"', NASTY * 2),
    ],
)
def test_text_lands_exactly(template: str, expected: str | None) -> None:
    special = {
        "replace(": NASTY.replace("fox", "cat").upper(),
        "caller": f"<{NASTY}>",
        "loop": f"{NASTY} | {NASTY}",
    }
    if expected is None:
        expected = next(value for key, value in special.items() if key in template)
    wanted = {"p": NASTY, "d": {"key": NASTY}}
    names = WorkflowTemplate(template).required_variables
    assert text_of(template, **{name: wanted[name] for name in names}) == expected


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        (True, "true"),
        (False, "false"),
        (None, "null"),
        (7, "7"),
        (-0.5, "-0.5"),
        (2**64 - 1, "18446744073709551615"),
        ([1, 'a"b', None], '[1, "a\\"b", null]'),
        ({"k": ["\n"]}, '{"k": ["\\n"]}'),
        ("7", "7"),
    ],
)
def test_values_become_json_outside_quotes_and_its_text_inside(value: Any, quoted: str) -> None:
    assert text_of('[{{ v }}, "{{ v }}", {{ v|tojson }}]', v=value) == [value, quoted, value]


def test_tojson_inside_quotes_is_the_text_of_the_json() -> None:
    assert text_of('"{{ v|tojson }}"', v='a "b"') == '"a \\"b\\""'
    assert json.loads(text_of('"{{ v|tojson(indent=2) }}"', v={"a": [1]})) == {"a": [1]}


class Style(str, enum.Enum):
    NOIR = "film noir"


class Steps(enum.IntEnum):
    FEW = 4


def test_paths_tuples_and_enumerations_are_what_they_hold() -> None:
    values = [PurePosixPath("in/0.png"), Style.NOIR, Steps.FEW, (1, 2)]
    assert text_of("{{ v }}", v=values) == ["in/0.png", "film noir", 4, [1, 2]]
    assert text_of('"{{ a }} {{ b }}"', a=values[0], b=values[1]) == "in/0.png film noir"


def test_a_block_holds_json_that_its_author_wrote() -> None:
    template = """
    {% macro text(id, prompt) -%}
      "{{ id }}": {"class_type": "Text", "inputs": {"text": "{{ prompt }}", "n": {{ id }}}}
    {%- endmacro %}
    {% set second %}{{ text("2", negative) }}{% endset %}
    {# a comment with a " #}
    { {{ text("1", prompt) }}, {{ second }} }
    """
    graph = WorkflowTemplate(template).render(prompt=NASTY, negative='"}, "9": {')
    assert graph == {
        "1": {"class_type": "Text", "inputs": {"text": NASTY, "n": "1"}},
        "2": {"class_type": "Text", "inputs": {"text": '"}, "9": {', "n": "2"}},
    }


def test_json_escapes_and_line_breaks_of_a_block_mean_text_inside_quotes() -> None:
    block = '{% set x %}a \\"b\\"\\n\\ud83e\\udd8a "c"\nd{% endset %}'
    assert text_of(block + '"{{ x }}"') == 'a "b"\n\U0001f98a "c"\nd'
    assert text_of(block + '"{{ x|upper }}"') == 'A "B"\n\U0001f98a "C"\nD'


@pytest.mark.parametrize(
    "template",
    [
        '[{% for i in n %}{{ i }}{{ "," if not loop.last }}{% endfor %}]',
        '[{% for i in n %}{{ i }}{{ ", " if not loop.last else "" }}{% endfor %}]',
        '[{% for i in n %}{{ "" if loop.first else "," }}{{ i }}{% endfor %}]',
        "[{% for i in n %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}]",
        '[{% set sep = joiner(",") %}{% for i in n %}{{ sep() }}{{ i }}{% endfor %}]',
    ],
)
def test_commas_of_a_loop_are_structure(template: str) -> None:
    assert text_of(template, n=[1, 2, 3]) == [1, 2, 3]


def test_an_escape_may_be_split_by_a_block() -> None:
    assert text_of('"a\\{% if t %}"{{ p }}\\{% endif %}n"', t=True, p='", "') == 'a"", "\n'


def test_what_a_string_method_makes_of_a_block_is_a_value() -> None:
    block = '{% set s %}{"{}": 1}{% endset %}'
    assert text_of(block + "[{{ s }}, {{ s|upper }}, {{ s[:2] }}]") == [
        {"{}": 1},
        '{"{}": 1}',
        '{"',
    ]
    assert text_of("{% set s %}a {}{% endset %}{{ s.format(p) }}", p='"') == 'a "'
    assert text_of("{% set s %}1, {}{% endset %}[{{ s.format(2) }}]") == ["1, 2"]


def test_other_strings_of_an_inline_if_are_values() -> None:
    template = '[{{ "a, b" if v else "c" }}, {{ "" if v else "c" }}, {{ v if v else "," }}]'
    assert text_of(template, v="x") == ["a, b", "", "x"]
    assert text_of(template, v="") == ["c", "c", ","]


def test_a_joiner_of_words_and_an_inline_if_without_else() -> None:
    template = '"{% set j = joiner(" and ") %}{% for i in n %}{{ j() }}{{ i }}{% endfor %}"'
    assert text_of(template, n=["a", "b"]) == "a and b"
    assert text_of('"{{ "x" if v }}"', v=False) == ""


def test_a_value_can_be_a_key_but_not_a_second_one() -> None:
    template = WorkflowTemplate('{"{{ id }}": {"class_type": "A", "inputs": { {{ name }}: 1 }}}')
    graph = template.render(id='1": {}, "2', name='x": 0, "y')
    assert graph == {'1": {}, "2': {"class_type": "A", "inputs": {'x": 0, "y': 1}}}


def test_line_breaks_of_any_kind_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    text = '\ufeff{"1":\r\n {"class_type": "A",\r "inputs": {"x": "{{ x }}"}}}\r\n\n'
    path = tmp_path / "w.json.jinja"
    path.write_bytes(text.encode())
    for template in (WorkflowTemplate(text), WorkflowTemplate.from_file(path)):
        assert template.render(x="é\r\n")["1"]["inputs"] == {"x": "é\r\n"}


def test_variables_and_those_that_must_be_given() -> None:
    template = WorkflowTemplate(
        "{% macro m(a, b=base) %}{{ a }}{{ caller() }}{{ varargs }}{% endmacro %}"
        "{% set made = 1 %}{% for i in range(n) %}{{ i }}{{ loop.index }}{{ made }}{% endfor %}"
        "{{ style|default('x') }}{{ mood|d }}{% if extra is defined %}{{ extra }}{% endif %}"
        "{{ late is undefined }}{{ namespace(a=1).a }}{{ prompt|upper }}"
    )
    assert template.required_variables == {"base", "n", "prompt"}
    assert template.variables == {"base", "n", "prompt", "style", "mood", "extra", "late"}


def test_a_guarded_variable_may_be_left_out() -> None:
    template = (
        '"{% set s = style|default("plain") %}{{ s }}{% if x is defined %}{{ x }}{% endif %}"'
    )
    assert text_of(template) == "plain"
    assert text_of(template, style="noir", x="!") == "noir!"


def test_variables_may_be_called_self_or_text() -> None:
    assert text_of('"{{ text }}{{ source }}"', text="a", source="b") == "ab"


def test_a_graph_is_taken_literally_and_copied() -> None:
    graph = {"1": {"class_type": "A", "inputs": {"text": "{{ x }} {% if %} \ud83d\ude00"}}}
    template = WorkflowTemplate.from_graph(graph)
    graph["1"]["inputs"]["text"] = "changed"  # type: ignore[index]
    rendered = template.render()
    assert rendered["1"]["inputs"]["text"] == "{{ x }} {% if %} \ud83d\ude00"
    rendered["1"]["inputs"]["text"] = "changed"
    assert template.render() != rendered
    assert template.variables == template.required_variables == frozenset()


@pytest.mark.parametrize("value", [float("nan"), b"bytes", {1, 2}])
def test_a_graph_must_be_json(value: Any) -> None:
    with pytest.raises(GraphError, match="cannot be written as JSON"):
        WorkflowTemplate.from_graph({"1": {"class_type": "A", "inputs": {"x": value}}})


def test_templates_can_be_pickled(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text('{"1": {"class_type": "A", "inputs": {"x": "{{ x }}"}}}')
    template = pickle.loads(pickle.dumps(WorkflowTemplate.from_file(path)))
    assert template.source == str(path)
    assert template.variables == {"x"}
    assert template.render(x=NASTY)["1"]["inputs"]["x"] == NASTY
    graph = {"1": {"class_type": "A", "inputs": {"x": "{{ x }}"}}}
    literal = pickle.loads(pickle.dumps(WorkflowTemplate.from_graph(graph)))
    assert literal.render() == graph


def test_repr_shows_source_and_variables() -> None:
    assert (
        repr(WorkflowTemplate("{{ b }}{{ a }}")) == "<WorkflowTemplate from text, variables: a, b>"
    )
    named = WorkflowTemplate("{}", source="w.json")
    assert repr(named) == "<WorkflowTemplate w.json, variables: none>"


def test_many_threads_render_one_template() -> None:
    template = WorkflowTemplate(
        '{% macro m(t) %}"{{ t }}"{% endmacro %}{% set j = joiner(",") %}'
        '{"1": {"class_type": "A", "inputs": {"x": [{% for i in range(50) %}{{ j() }}{{ m(x) }}'
        "{% endfor %}]}}}"
    )
    wrong: list[Any] = []

    def render(name: str) -> None:
        for count in range(20):
            value = f'{name} "{count}"'
            if template.render(x=value)["1"]["inputs"]["x"] != [value] * 50:
                wrong.append(value)

    threads = [threading.Thread(target=render, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
