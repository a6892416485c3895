"""Jinja to JSON text, so that no value can change the structure of a workflow.

Jinja hands over what it renders piece by piece. The template's own text arrives as `_Literal`;
everything else is a value, and only what the author wrote counts as structure. No marker stands
in the text, so there is none that a value could forge. At the end the pieces are joined by a
writer that knows whether it stands inside quotes, and writes each value accordingly.

What a macro, a set block or a call block makes is a `_Fragment`: to filters, tests and `~` it is
its plain text, to the writer it is the author's text with values in it.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from types import TracebackType
from typing import Any, Callable, NamedTuple, Union

import jinja2
from jinja2 import meta, nodes
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, pass_context
from jinja2.visitor import NodeTransformer

# Stands for a character of Jinja in an outline: JSON cannot hold it.
JINJA = "\0"
# Names the frames of the compiled template in a traceback.
_FILENAME = "<workflow template>"
_QUOTE_OR_ESCAPE = re.compile(r'\\.?|"', re.DOTALL)
_JSON_ESCAPES = re.compile(r'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+')
_COMMA_OR_SPACE = " \t\r\n,"
_NO_LOADER = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class DanglingBackslashError(ValueError):
    """Raised when a value follows a backslash, which would eat the value's first character.

    Args:
        written: The text that was rendered up to there.
    """

    def __init__(self, written: str) -> None:
        self.written = written
        super().__init__("a backslash stands directly before a value; write two of them")


class _Literal(str):
    """Text that the template's author wrote, as opposed to a value; `offset` says where."""

    offset: int | None

    def __new__(cls, text: str, offset: int | None = None) -> _Literal:
        literal = super().__new__(cls, text)
        literal.offset = offset
        return literal


class _Value(NamedTuple):
    """A value in both its forms: outside quotes (`json`) and inside them, unescaped (`text`)."""

    json: str
    text: str


class _Fragment(str):
    """What a macro or a block made.

    As a string it is what it means inside quotes; a string method therefore returns a plain
    string, which is a value like any other.
    """

    _parts: tuple[_Part, ...]

    def __new__(cls, text: str, parts: tuple[_Part, ...] | None = None) -> _Fragment:
        fragment = super().__new__(cls, text)
        # The sandbox calls `type(fragment)(text)` in `format`: such a text is only a value.
        fragment._parts = (_value(text),) if parts is None else parts
        return fragment


_Part = Union[_Literal, _Value, _Fragment]


def _concat(pieces: Iterable[Any]) -> _Fragment:
    parts = tuple(_part(piece) for piece in pieces)
    return _Fragment("".join(_meaning(part) for part in parts), parts)


def _part(piece: Any) -> _Part:
    # Filter blocks and calls of anything but a macro come here without `finalize`.
    return piece if isinstance(piece, (_Literal, _Value, _Fragment)) else _value(piece)


def _meaning(part: _Part) -> str:
    if isinstance(part, _Value):
        return part.text
    if isinstance(part, _Literal):
        return _JSON_ESCAPES.sub(lambda match: str(json.loads(f'"{match[0]}"')), part)
    return str(part)


def _value(value: Any) -> _Value:
    if isinstance(value, str):
        # `str.__str__` because an enumeration of strings has another `__str__`.
        text = str.__str__(value)
        return _Value(_dumps(text), text)
    if isinstance(value, PurePath):
        return _value(str(value))
    text = _dumps(value)
    return _Value(text, text)


def _dumps(value: Any, indent: int | None = None) -> str:
    # ASCII escapes would join two lone surrogates into one character.
    return json.dumps(
        value, ensure_ascii=False, allow_nan=False, indent=indent, default=_json_default
    )


def _json_default(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Undefined):
        return str(value)
    if isinstance(value, Macro):
        raise TypeError("it is a macro; call it with parentheses")
    name = type(value).__name__
    if type(value).__module__ != "builtins":
        name = f"{type(value).__module__}.{name}"
    hint = "; add |list" if hasattr(value, "__next__") else ""
    raise TypeError(f"JSON has no place for the type {name}{hint}")


@pass_context
def _finalize(context: Context, value: Any) -> _Part:
    if isinstance(value, Undefined):
        # A strict one raises here; an inline `if` without `else` stands for nothing.
        return _Literal(str(value))
    if isinstance(value, _Fragment):
        return value
    written: _Value = _checked(context, value, _value)
    return written


@pass_context
def _tojson(context: Context, value: Any, indent: int | None = None) -> _Fragment:
    text = _checked(context, value, lambda checked: _dumps(checked, indent))
    return _Fragment(text, (_Value(text, text),))


def _checked(context: Context, value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(value)
    except (TypeError, ValueError, RecursionError) as error:
        names = [name for name, other in context.get_all().items() if other is value]
        what = f"variable {names[0]}" if names else f"a value of type {type(value).__name__}"
        reason = str(error)
        if reason.startswith("Out of range float"):
            reason = "JSON has no NaN and no infinity"
        raise jinja2.TemplateRuntimeError(
            f"{what} cannot be written into a workflow: {reason}"
        ) from error


class _CommaJoiner(Joiner):
    """Jinja's `joiner`, whose commas are structure when they stand outside quotes."""

    def __call__(self) -> str:
        text = super().__call__()
        return text if text.strip(_COMMA_OR_SPACE) else _concat([_Literal(text)])


class _CodeGenerator(NativeCodeGenerator):
    """Compiles the template's own text to `_Literal`s and leaves values as they are."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> _Literal:
        text = super()._output_child_to_const(node, frame, finalize)
        return _Literal(text, getattr(node, "offset", None))

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        # There is one in each group: `_CommaLiterals` gives each a statement of its own.
        (literal,) = group
        return f"environment.literal({str(literal)!r}, {literal.offset})"


class _CommaLiterals(NodeTransformer):
    """Turns `{{ "," if not loop.last }}` into the `{% if %}` that it stands for.

    Outside quotes a string is written as a JSON string, which nobody wants of a comma.
    """

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        return [self._statement(child) for child in node.nodes]

    def _statement(self, child: nodes.Expr) -> nodes.Node:
        if not isinstance(child, nodes.CondExpr):
            return nodes.Output([child], lineno=child.lineno)
        texts = [_constant_text(child.expr1), _constant_text(child.expr2)]
        if None in texts or "," not in "".join(filter(None, texts)):
            return nodes.Output([child], lineno=child.lineno)
        then, otherwise = ([nodes.Output([nodes.TemplateData(text)])] for text in texts)
        return nodes.If(child.test, then, [], otherwise, lineno=child.lineno)


def _constant_text(node: nodes.Expr | None) -> str | None:
    if node is None:
        return ""
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        return None if node.value.strip(_COMMA_OR_SPACE) else node.value
    return None


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(_concat)
    literal = _Literal

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, autoescape=False, finalize=_finalize)
        self.globals["joiner"] = _CommaJoiner
        self.filters["tojson"] = _tojson
        # HTML has no part in this, and a value can do no harm that `safe` could allow.
        for name in ("e", "escape", "forceescape", "safe"):
            self.filters[name] = _unchanged


def _unchanged(value: Any) -> Any:
    return value


_ENVIRONMENT = _Environment()


def outline(text: str) -> str:
    """Return a template with `JINJA` for each character of Jinja, and its own text in its place.

    Newlines stay everywhere; other line ends become some, as they do when it is rendered.
    """
    text = with_newlines(text)
    parts = []
    end = 0
    for start, kind, token in _tokens(text):
        own = token if kind == "data" else re.sub(r"[^\n]", JINJA, token)
        parts += [text[end:start], own]
        end = start + len(token)
    return "".join(parts)


def with_newlines(text: str) -> str:
    """Return a text with the line ends that Jinja makes of all kinds."""
    return re.sub(r"\r\n?", "\n", text)


def _tokens(text: str) -> Iterator[tuple[int, str, str]]:
    end = 0
    for _, kind, token in _ENVIRONMENT.lex(text):
        # Only white space can be left out between tokens.
        start = text.index(token, end)
        yield start, kind, token
        end = start + len(token)


class Rendered(NamedTuple):
    """What a template rendered to.

    Args:
        text: The text.
        places: For each piece of the template's own text its start there, its start in the
            template, and its length.
    """

    text: str
    places: list[tuple[int, int, int]]

    def origin(self, index: int) -> int | None:
        """Return where in the template a character comes from; for a value, where Jinja begins."""
        at = bisect.bisect_right(self.places, (index + 1,)) - 1
        if at < 0:
            return None
        start, offset, length = self.places[at]
        return offset + min(index - start, length)


class Program:
    """A compiled template.

    Args:
        text: The template.

    Attributes:
        variables: The names that it wants from outside.
        required: Those of them that it nowhere guards with `default` or `is defined`.
        defaults: The values that `default` gives to those others, where they are constants.

    Raises:
        jinja2.TemplateSyntaxError: Jinja cannot read it, or it wants another file.
    """

    def __init__(self, text: str) -> None:
        tree = _ENVIRONMENT.parse(text)
        _refuse_unsupported(tree)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.required = self.variables - _guarded_names(tree)
        self.defaults = {name: value for name, value in _defaults(tree) if name in self.variables}
        _note_offsets(tree, with_newlines(text))
        tree = _CommaLiterals().visit(tree)
        tree.set_environment(_ENVIRONMENT)
        code = _ENVIRONMENT.compile(tree, filename=_FILENAME)
        self._template = jinja2.Template.from_code(
            _ENVIRONMENT, code, _ENVIRONMENT.make_globals(None)
        )

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        """Return the text, with every value written as JSON.

        Raises:
            DanglingBackslashError: A value follows a backslash.
            Exception: Whatever Jinja, a filter or a method of a value raises.
        """
        context = self._template.new_context(dict(variables))
        return _Writer().write(self._template.root_render_func(context))

    def line_of(self, error: BaseException) -> int | None:
        """Return the line of the template, from 1, where an error of `render` arose."""
        line = None
        step: TracebackType | None = error.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename == _FILENAME:
                line = self._template.get_corresponding_lineno(step.tb_lineno)
            step = step.tb_next
        return line


def _note_offsets(tree: nodes.Template, text: str) -> None:
    """Let each piece of the template's own text know where it stands."""
    pieces = list(tree.find_all(nodes.TemplateData))
    starts = [(start, token) for start, kind, token in _tokens(text) if kind == "data"]
    if [piece.data for piece in pieces] == [token for _, token in starts]:
        for piece, (start, _) in zip(pieces, starts):
            vars(piece)["offset"] = start


def _refuse_unsupported(tree: nodes.Template) -> None:
    for node in tree.find_all((*_NO_LOADER, nodes.ScopedEvalContextModifier)):
        if isinstance(node, _NO_LOADER):
            message = "a workflow template is one file: it cannot include, import or extend others"
        else:
            message = "autoescape has no use here: values are always written safely"
        raise jinja2.TemplateSyntaxError(message, node.lineno)


def _defaults(tree: nodes.Template) -> Iterator[tuple[str, Any]]:
    for node in _default_filters(tree):
        if isinstance(node.node, nodes.Name) and len(node.args) == 1:
            with contextlib.suppress(nodes.Impossible):
                yield node.node.name, node.args[0].as_const()


def _default_filters(tree: nodes.Template) -> list[nodes.Filter]:
    return [node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d")]


def _guarded_names(tree: nodes.Template) -> set[str]:
    guards = _default_filters(tree)
    tests = [node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined")]
    operands = [node.node for node in (*guards, *tests)]
    return {node.name for node in operands if isinstance(node, nodes.Name)}


class _Writer:
    """Joins pieces to JSON text and keeps track of where it stands."""

    def __init__(self) -> None:
        self._written: list[str] = []
        self._length = 0
        self._places: list[tuple[int, int, int]] = []
        self._in_quotes = False
        self._after_backslash = False

    def write(self, pieces: Iterable[Any]) -> Rendered:
        for piece in pieces:
            self._write_part(_part(piece))
        return Rendered("".join(self._written), self._places)

    def _write_part(self, part: _Part) -> None:
        if isinstance(part, _Literal):
            self._write_literal(part)
        elif self._after_backslash:
            raise DanglingBackslashError("".join(self._written))
        elif self._in_quotes:
            self._append(_dumps(_meaning(part))[1:-1])
        elif isinstance(part, _Value):
            self._append(part.json)
        else:
            for inner in part._parts:
                self._write_part(inner)

    def _append(self, text: str) -> None:
        self._written.append(text)
        self._length += len(text)

    def _write_literal(self, text: _Literal) -> None:
        if text.offset is not None:
            self._places.append((self._length, text.offset, len(text)))
        self._append(text)
        start = 1 if text and self._after_backslash else 0
        if text:
            self._after_backslash = False
        for match in _QUOTE_OR_ESCAPE.finditer(text, start):
            if match[0] == '"':
                self._in_quotes = not self._in_quotes
            elif match[0] == "\\":
                self._after_backslash = self._in_quotes
