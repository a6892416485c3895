from __future__ import annotations

import decimal
import pickle
from pathlib import Path
from typing import Any

import pytest

from comfy_executors.errors import (
    GraphError,
    TemplateError,
    TemplateJSONError,
    TemplateRenderError,
    TemplateSyntaxError,
    TemplateVariablesError,
    UIFormatError,
)
from comfy_executors.workflows import WorkflowTemplate

UI_FORMAT = '{"last_node_id": 1, "nodes": [{"id": 1, "type": "KSampler"}], "links": []}'


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{\n "a": {{ x }', 2, 12, "unexpected '}'"),
        ('{\n "a": {% fi %} }', 2, 10, "unknown tag 'fi'"),
        ('{\n\n "a": {{ x|nofilter }} }', 3, 12, "nofilter"),
        ('{ "a": {{ x ? y }} }', 1, 13, "unexpected char '?'"),
        ("{% if x %}\n{{ a bc }}", 2, 6, "got 'bc'"),
        ("{% for x in y %}", 1, None, "Unexpected end of template"),
        ("{% if x %}\n{{ b b }}", 2, None, "expected token 'end of print statement', got 'b'"),
        ('{}\n{% include "other" %}', 2, None, "cannot include"),
        ('{% import "other" as o %}', 1, None, "cannot include"),
        ('{% from "other" import o %}', 1, None, "cannot include"),
        ('{% extends "other" %}', 1, None, "cannot include"),
        ("{% autoescape true %}{% endautoescape %}", 1, None, "autoescape"),
    ],
)
def test_syntax_errors_show_the_place(text: str, line: int, column: int | None, words: str) -> None:
    with pytest.raises(TemplateSyntaxError) as caught:
        WorkflowTemplate(text, source="w.json")
    error = caught.value
    assert words in error.message
    assert (error.line, error.column, error.source) == (line, column, "w.json")
    assert error.excerpt is not None
    assert f"> {line} | {text.splitlines()[line - 1]}" in error.excerpt
    assert str(error).startswith(f"w.json, line {line}")


def test_the_caret_stands_under_the_column() -> None:
    with pytest.raises(TemplateSyntaxError) as caught:
        WorkflowTemplate("{}\n{# é #} {{ x|oops }}\n{}")
    assert caught.value.excerpt == (
        "  1 | {}\n> 2 | {# é #} {{ x|oops }}\n                   ^\n  3 | {}"
    )


def test_too_few_input_images_are_counted() -> None:
    template = WorkflowTemplate('{\n"a": "{{ input_images[0] }}", "b": "{{ input_images[1] }}"}')
    with pytest.raises(TemplateRenderError) as caught:
        template.render(input_images=["a.png"])
    assert caught.value.message == "the template takes input_images[1]: give 2 input images"
    assert caught.value.line == 2
    with pytest.raises(TemplateRenderError, match=r"input_images\[0\]: give an input image\n"):
        template.render(input_images=())
    other = WorkflowTemplate('{"a": "{{ names[1] }}"}')
    with pytest.raises(TemplateRenderError, match="list object has no element 1"):
        other.render(names=["a"])


def test_all_missing_variables_are_named_at_once() -> None:
    template = WorkflowTemplate("{{ prompt }}{{ width }}{{ style|default('') }}", source="w.json")
    with pytest.raises(TemplateVariablesError) as caught:
        template.render(promt="a fox")
    error = caught.value
    assert error.missing == ("prompt", "width")
    assert error.unknown == ("promt",)
    assert error.known == ("prompt", "style", "width")
    assert str(error) == (
        "w.json: missing variables: prompt, width; unknown variables: promt (did you mean"
        " prompt?); the template has prompt, style, width"
    )


def test_an_unknown_variable_alone_is_an_error() -> None:
    with pytest.raises(TemplateVariablesError, match="the template has no variables") as caught:
        WorkflowTemplate("{}").render(zzz=1)
    assert (caught.value.missing, caught.value.unknown) == ((), ("zzz",))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (None, "EXPORT"),
        ("cn.json", "cn.json"),
        ("my export.json", "'my export.json'"),
        ("https://host/cn.json", "EXPORT"),
    ],
)
def test_without_any_variables_it_is_said_how_to_get_some(source: str | None, named: str) -> None:
    with pytest.raises(TemplateVariablesError) as caught:
        WorkflowTemplate("{}", source=source).render(prompt="a fox")
    assert caught.value.message == (
        "unknown variables: prompt; the template has no variables;"
        f" `comfy-executors template {named} -o FILE` makes a template with some of an export,"
        " and so does from_graph(graph, auto=True) in Python"
    )


def test_a_variable_with_a_guard_elsewhere_is_missing_where_it_has_none() -> None:
    template = WorkflowTemplate("{{ x|default(1) }}\n{{ x }}")
    with pytest.raises(TemplateVariablesError) as caught:
        template.render()
    assert caught.value.missing == ("x",)


class Explosive:
    @property
    def boom(self) -> str:
        raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("expression", "value", "words"),
    [
        ("x.y", {}, "'dict object' has no attribute 'y'"),
        ("x", float("nan"), "variable x cannot be written into a workflow: JSON has no NaN"),
        ("x", float("-inf"), "variable x"),
        ("x", [1, float("inf")], "no infinity"),
        ("x", b"\x89PNG", "variable x cannot .* type bytes"),
        ("x", decimal.Decimal(1), r"type decimal\.Decimal"),
        ("[x]", {1, 2}, "type set"),
        ("x|tojson", b"", "variable x .* type bytes"),
        ("x|map('upper')", ["a"], "type generator; add |list"),
        ("x", {(1, 2): 3}, "variable x"),
        ("range(x)", 10**9, "OverflowError"),
        ("x.__class__", 1, "unsafe"),
        ("x.append(1)", [], "is not safely callable|unsafe"),
        ("x + 1", "a", "TypeError"),
        ("1 // x", 0, "ZeroDivisionError"),
        ("x.boom", Explosive(), "OSError: disk on fire"),
    ],
)
@pytest.mark.parametrize("quote", ["", '"'])
def test_render_errors_show_the_line(expression: str, value: Any, words: str, quote: str) -> None:
    text = f'{{"1":\n {{% if true %}}\n{quote}{{{{ {expression} }}}}{quote}{{% endif %}}}}'
    with pytest.raises(TemplateRenderError, match=words) as caught:
        WorkflowTemplate(text, source="w.json").render(x=value)
    error = caught.value
    assert (error.line, error.source) == (3, "w.json")
    assert f"> 3 | {quote}{{{{ {expression} }}}}{quote}" in str(error)
    assert error.__cause__ is not None


def test_a_circle_and_a_macro_without_a_call_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TemplateRenderError, match=r"variable x .*[Cc]ircular"):
        WorkflowTemplate("{{ x }}").render(x=circle)
    with pytest.raises(TemplateRenderError, match="it is a macro; call it with parentheses"):
        WorkflowTemplate("{% macro m() %}{% endmacro %}{{ m }}").render()
    with pytest.raises(TemplateRenderError, match="RecursionError"):
        WorkflowTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").render()


def test_an_error_in_a_macro_has_the_line_of_the_macro() -> None:
    text = "{% macro m(v) %}\n{{ v.y }}\n{% endmacro %}\n\n{{ m(x) }}"
    with pytest.raises(TemplateRenderError) as caught:
        WorkflowTemplate(text).render(x={})
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{"1":\n {"a": 1,\n }}', 2, 9, "a comma before }"),
        ('{"1":\n [1, 2 , ]}', 2, 8, "a comma before ]"),
        ('{"1": 1 "2": 2}', 1, 9, 'a comma is missing before "'),
        ('{"1": "a "red" fox"}', 1, 11, 'a comma is missing before red, or a " in the text'),
        ("{'1': 1}", 1, 2, "double quotes"),
        ("{\"1\": 'a'}", 1, 7, "double quotes"),
        ('{"1": True}', 1, 7, "True is written true"),
        ('{"1": None}', 1, 7, "None is written null"),
        ('{"1": fox}', 1, 7, "fox wants double quotes"),
        ('{1: "a"}', 1, 2, "a key in double quotes is missing before 1"),
        ('{"1" "a"}', 1, 6, "a colon is missing"),
        ('{"1": , "2": 1}', 1, 7, "a value is missing before ,"),
        ('{"1": NaN}', 1, 7, "NaN is not JSON"),
        ('{"1": {}', 1, 9, "ends too early"),
        ('{"1": "a}', 1, 7, "no closing quote"),
        ('{"1": "a\n"}', 1, 9, "line break or control character inside quotes"),
        ('{"1": "C:\\models"}', 1, 10, "backslash"),
        ('{} {"1": 1}', 1, 4, "something follows"),
        ('{"1": 1 // one\n}', 1, 9, "no comments"),
        ('// one\n{"1": 1}', 1, 1, "no comments"),
        ("", 1, 1, "it is empty"),
        ("{# only a comment #}\n ", 1, 1, "it is empty"),
        ("<!DOCTYPE html><html></html>", 1, 1, "HTML"),
        ("\x89PNG\r\n\x1a\n", 1, 1, "PNG image"),
        ("out/my workflow.json", 1, 1, "use from_file or from_url"),
        ("https://example.com/w", 1, 1, "use from_file or from_url"),
        ('{"1": {"class_type": "A"},\n "1": {}}', 2, 2, "the key '1' is given twice"),
        ('{"1": {"inputs": {"a": 1, "a": 1}}}', 1, 27, "the key 'a' is given twice"),
    ],
)
def test_json_errors_show_the_place(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(TemplateJSONError) as caught:
        WorkflowTemplate(text, source="w.json").render()
    error = caught.value
    assert words in error.message
    assert (error.line, error.column, error.source) == (line, column, "w.json")
    assert error.excerpt is not None
    assert "^" in error.excerpt


def test_json_errors_name_the_place_in_the_rendered_text() -> None:
    template = WorkflowTemplate('{% for i in range(3) %}\n{% endfor %}{"x": {{ x }}\n ,\n}')
    with pytest.raises(TemplateJSONError) as caught:
        template.render(x="a\nb")
    assert (caught.value.line, caught.value.column) == (5, 2)
    assert caught.value.excerpt == '  4 | {"x": "a\\nb"\n> 5 |  ,\n       ^\n  6 | }'


HEADING = "{# A comment\n   of two lines #}\n"


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{"1": {"x": 1,}}', 3, 14),
        ('{"1": {"x": {{ x }},}}', 3, 20),
        ('{"1":\r\n {"x": {{ x }},\r\n}}', 4, 15),
        ('{"1": {"x": {{ x }} oops}}', 3, 21),
        ('{"1": {% for i in [1, 2] %}\n  {"x": {{ x }}},\n{% endfor %}{}}', 4, 3),
        ('{"1": {%- if x %} {"x": {{ x }} } {%- endif %},}', 3, 47),
        ('{"1": {% raw %}{{},{% endraw %}}', 3, 17),
        ('{% macro m(a) %}"{{ a }}": {"y": {{ a }},}{% endmacro %}{ {{ m(x) }} }', 3, 41),
        ('{% set s %}{"x": {{ x }},}{% endset %}{"1": {{ s }} }', 3, 25),
        # What is wrong is a value: the end of the text before it.
        ('{"1": {{ x }}, "2": {{ x }}{{ x }}}', 3, 21),
    ],
)
def test_json_errors_name_the_place_in_the_template(text: str, line: int, column: int) -> None:
    template = WorkflowTemplate(HEADING + text)
    with pytest.raises(TemplateJSONError) as caught:
        template.render(**dict.fromkeys(template.variables, "a\nb"))
    error = caught.value
    assert (error.template_line, error.template_column) == (line, column)
    assert f"(in the template line {line}, column {column}): the rendered" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_same_place_is_not_told_twice() -> None:
    with pytest.raises(TemplateJSONError, match=r"^line 1, column 9: the rendered text"):
        WorkflowTemplate('{"x": {},}').render()


def test_a_long_line_is_cut_around_the_column() -> None:
    text = '{"a": "' + "x" * 5000 + '", "b": oops, "c": "' + "y" * 5000 + '"}'
    with pytest.raises(TemplateJSONError) as caught:
        WorkflowTemplate(text).render()
    line, caret = (caught.value.excerpt or "").split("\n")
    assert len(line) < 120
    assert line[caret.index("^") :].startswith("oops")


def test_an_excerpt_can_be_printed_whatever_the_value_holds() -> None:
    with pytest.raises(TemplateJSONError) as caught:
        WorkflowTemplate('["{{ x }}", oops]').render(x="\ud800\x1b[31m")
    assert str(caught.value).encode()
    assert "\x1b" not in str(caught.value)


def test_deep_nesting_is_an_error_of_ours() -> None:
    with pytest.raises((TemplateJSONError, GraphError)):
        WorkflowTemplate("[" * 200_000 + "]" * 200_000).render()


@pytest.mark.parametrize(
    "text",
    [
        '"\\{{ x }}"',
        '"\\{# c #}{{ x }}"',
        '"\\{% if x %}{{ x }}{% endif %}"',
        '"\\{{ "never" if not x }}{{ x }}"',
        '{% set s %}"\\{% endset %}{{ s }}{{ x }}"',
    ],
)
def test_a_backslash_cannot_eat_the_first_character_of_a_value(text: str) -> None:
    with pytest.raises(TemplateJSONError, match="a backslash stands directly before a value"):
        WorkflowTemplate(f'{{"1": {text}}}').render(x='", "2": "')


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in [] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_template_beyond_the_limits_of_python_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(TemplateSyntaxError, match="nested too deeply"):
        WorkflowTemplate(text)


@pytest.mark.parametrize("text", [{"1": {}}, Path("w.json"), b"{}", None])
def test_what_is_no_text_is_told_where_to_go(text: Any) -> None:
    with pytest.raises(TypeError, match="for a file use from_file, for a dictionary from_graph"):
        WorkflowTemplate(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    with pytest.raises(FileNotFoundError):
        WorkflowTemplate.from_file(path)
    path.write_bytes(b'{"1": "\xe9"}')
    with pytest.raises(TemplateError, match=r"w\.json: .* not UTF-8 text: .* at byte 7"):
        WorkflowTemplate.from_file(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(TemplateError, match="this is a PNG image"):
        WorkflowTemplate.from_file(path)
    path.write_text("{{ x ", encoding="utf-8")
    with pytest.raises(TemplateSyntaxError) as caught:
        WorkflowTemplate.from_file(path)
    assert caught.value.source == str(path)


def test_the_ui_format_is_known_at_once() -> None:
    with pytest.raises(UIFormatError, match=r"^w\.json: .*Workflow > Export \(API\)"):
        WorkflowTemplate(UI_FORMAT, source="w.json")
    with pytest.raises(UIFormatError, match="Export"):
        WorkflowTemplate(UI_FORMAT.replace("1", "{{ x }}")).render(x=1)


def test_what_is_no_graph_is_said_after_rendering() -> None:
    with pytest.raises(GraphError, match=r"w\.json: a workflow is an object .* this is a list"):
        WorkflowTemplate("[{{ x }}]", source="w.json").render(x=1)


@pytest.mark.parametrize("text", ["{{ x", "{{ y }}", "{{ x.y }}", "[,]"])
def test_errors_can_be_pickled(text: str) -> None:
    with pytest.raises(TemplateError) as caught:
        WorkflowTemplate(text, source="w").render(**({"x": {}} if "x.y" in text else {}))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value)
    assert str(copy) == str(caught.value)
