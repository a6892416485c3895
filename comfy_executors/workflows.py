"""Workflow templates: Jinja in, a graph in ComfyUI's API format out."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2

from comfy_executors.downloads import download_template
from comfy_executors.errors import (
    GraphError,
    TemplateError,
    TemplateJSONError,
    TemplateRenderError,
    TemplateSyntaxError,
    TemplateVariablesError,
)
from comfy_executors.exports import convert_export
from comfy_executors.graphs import (
    MAX_SEED,
    Graph,
    SeedInput,
    check_graph,
    class_type,
    find_seeds,
    is_link,
    is_ui_format,
    node_title,
    output_nodes,
    plan_batches,
    set_seeds,
)
from comfy_executors.json_text import excerpt, index_of, parse_json, position
from comfy_executors.node_info import ObjectInfo, read_object_info
from comfy_executors.parametrize import find_parameters
from comfy_executors.rendering import DanglingBackslashError, Program, Rendered, with_newlines
from comfy_executors.template_text import write_template

__all__ = [
    "MAX_SEED",
    "Graph",
    "SeedInput",
    "WorkflowTemplate",
    "check_graph",
    "class_type",
    "find_seeds",
    "is_link",
    "is_ui_format",
    "node_title",
    "output_nodes",
    "plan_batches",
    "set_seeds",
]


class WorkflowTemplate:
    """A workflow in ComfyUI's API format with Jinja in it.

    Values are written as JSON and can never add or change nodes. Inside quotes a string lands
    exactly, numbers, lists and dictionaries as their JSON text, `True` as `true` and `None` as
    `null`; outside quotes every value becomes the JSON that it is, a string with its quotes.
    What a macro or a block makes is text inside quotes, and outside of them the template's own
    JSON. Templates run in Jinja's sandbox. They can be pickled, and used from many threads.

    Args:
        text: The template.
        source: The file or URL that it came from, for messages.

    Attributes:
        text: The template.
        source: The file or URL that it came from, without credentials, or None.
        variables: All names that the template wants.
        required_variables: Those that it nowhere guards with `default` or `is defined`.
        defaults: What `default(…)` gives to the others, where that is a constant.

    Raises:
        TypeError: The text is no string.
        TemplateSyntaxError: Jinja cannot read it, or it wants to include another file.
        UIFormatError: It is a workflow in ComfyUI's UI format.
    """

    def __init__(self, text: str, *, source: str | None = None) -> None:
        if not isinstance(text, str):
            raise TypeError(
                f"a template is a string, not {type(text).__name__}; for a file use from_file,"
                " for a dictionary from_graph"
            )
        self.text = text[1:] if text.startswith("\ufeff") else text
        self.source = source
        self._graph: Graph | None = None
        _refuse_ui_format(self.text, source)
        try:
            self._program = Program(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise _syntax_error(error, self.text, source) from error
        except (SyntaxError, RecursionError) as error:
            # Python's own limits, for the code that Jinja makes.
            raise TemplateSyntaxError("it is nested too deeply", source=source) from error
        self.variables: frozenset[str] = self._program.variables
        self.required_variables: frozenset[str] = self._program.required
        self.defaults: dict[str, Any] = self._program.defaults

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, object_info: ObjectInfo | None = None
    ) -> WorkflowTemplate:
        """Read a template from a UTF-8 file.

        Args:
            path: The file.
            object_info: The server's description of its node classes (`GET /object_info`), or a
                JSON file that holds it. With it, a file in ComfyUI's UI format is converted.

        Raises:
            OSError: The file cannot be read; FileNotFoundError when there is none.
            TemplateError: It is not UTF-8 text, or not a template (see the class).
            GraphError: It cannot be converted: `object_info` lacks one of its nodes.
        """
        source = os.fspath(path)
        with open(source, "rb") as file:
            text = _decoded(file.read(), source)
        workflow = _parsed(text)
        if object_info is None or not is_ui_format(workflow):
            return cls(text, source=source)
        template = cls.from_graph(workflow, object_info=object_info)
        template.source = source
        return template

    @classmethod
    def from_url(
        cls, url: str, *, timeout: float = 30.0, max_bytes: int = 16 * 1024 * 1024
    ) -> WorkflowTemplate:
        """Read a template from an http or https address.

        Args:
            url: The address. Its user name, password and query appear in no message.
            timeout: How long the whole download may take, in seconds.
            max_bytes: How large the template may be, in bytes.

        Raises:
            ServerUnreachableError: Nobody answers, or not within the timeout.
            AuthenticationError: The answer is 401 or 403.
            ServerResponseError: The answer is another error, an HTML page, or a redirection to
                another scheme.
            TemplateError: The address is none, the template is too large, not UTF-8 text, or
                not a template (see the class).
        """
        data, source = download_template(url, timeout=timeout, max_bytes=max_bytes)
        return cls(_decoded(data, source), source=source)

    @classmethod
    def from_graph(
        cls,
        graph: Mapping[str, Any],
        *,
        auto: bool = False,
        object_info: ObjectInfo | None = None,
    ) -> WorkflowTemplate:
        """Make a template from a graph: without variables, or with those that a person would want.

        Args:
            graph: A workflow in ComfyUI's API format. It is copied; `{{` in it is text.
            auto: Make variables of prompts, sizes, steps, cfg, models, batch size and input
                images; see `parametrize.find_parameters`. Batch size and input images have to be
                given then, all else has the graph's values as defaults.
            object_info: The server's description of its node classes (`GET /object_info`), or a
                JSON file that holds it. With it, a workflow in ComfyUI's UI format is converted.

        Raises:
            GraphError: It is no workflow (see `check_graph`), JSON cannot express it, or
                `object_info` lacks one of its nodes.
            UIFormatError: It is in ComfyUI's UI format, and there is no `object_info`.
        """
        nodes = dict(graph) if isinstance(graph, Mapping) else graph
        if object_info is not None and is_ui_format(nodes):
            nodes = convert_export(nodes, read_object_info(object_info))
        check_graph(nodes)
        if auto:
            return cls(write_template(nodes, find_parameters(nodes)))
        try:
            text = json.dumps(nodes, ensure_ascii=False, allow_nan=False, indent=2)
        except (TypeError, ValueError) as error:
            raise GraphError(f"the workflow cannot be written as JSON: {error}") from error
        template = cls.__new__(cls)
        template.__setstate__({"text": text, "source": None, "literal": True})
        return template

    def render(self, /, **variables: Any) -> Graph:
        """Fill in the variables.

        Args:
            **variables: A value for each of `required_variables`, and for others as wanted.

        Returns:
            The graph, checked with `check_graph`. It is the caller's own.

        Raises:
            TemplateVariablesError: Variables are missing, or the template does not have them.
            TemplateRenderError: Jinja stopped, or a value is of a type that JSON does not have.
            TemplateJSONError: What was rendered is not JSON.
            GraphError: What was rendered is no workflow.
            UIFormatError: It is a workflow in ComfyUI's UI format.
        """
        self._check_names(variables)
        if self._graph is not None:
            return copy.deepcopy(self._graph)
        graph = self._parsed(self._rendered(variables))
        check_graph(graph, source=self.source)
        checked: Graph = graph
        return checked

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.variables)) or "none"
        return f"<{type(self).__name__} {self.source or 'from text'}, variables: {names}>"

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code cannot be pickled; the text can.
        return {"text": self.text, "source": self.source, "literal": self._graph is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["literal"]:
            WorkflowTemplate.__init__(self, state["text"], source=state["source"])
            return
        self.text = state["text"]
        self.source = state["source"]
        self._graph = json.loads(self.text)
        self.variables = self.required_variables = frozenset()
        self.defaults = {}

    def _check_names(self, given: Mapping[str, Any]) -> None:
        missing = sorted(self.required_variables - given.keys())
        unknown = sorted(given.keys() - self.variables)
        if missing or unknown:
            raise self._variables_error(missing, unknown)

    def _variables_error(
        self, missing: Iterable[str], unknown: Iterable[str]
    ) -> TemplateVariablesError:
        known = sorted(self.variables)
        parts = []
        if missing:
            parts.append(f"missing variables: {', '.join(missing)}")
        if unknown:
            parts.append(f"unknown variables: {', '.join(_with_nearest(unknown, known))}")
        parts.append(f"the template has {', '.join(known) or self._how_to_get_variables()}")
        return TemplateVariablesError(
            "; ".join(parts), missing=missing, unknown=unknown, known=known, source=self.source
        )

    def _how_to_get_variables(self) -> str:
        source = self.source or ""
        export = "EXPORT" if not source or "://" in source else shlex.quote(source)
        return (
            f"no variables; `comfy-executors template {export} -o FILE` makes a template with some"
            " of an export, and so does from_graph(graph, auto=True) in Python"
        )

    def _parsed(self, rendered: Rendered) -> Any:
        try:
            return parse_json(rendered.text, self.source)
        except TemplateJSONError as error:
            if error.line is not None and error.column is not None:
                index = rendered.origin(index_of(rendered.text, error.line, error.column))
                if index is not None:
                    text = with_newlines(self.text)
                    error.template_line, error.template_column = position(text, index)
            raise

    def _rendered(self, variables: Mapping[str, Any]) -> Rendered:
        try:
            return self._program.render(variables)
        except DanglingBackslashError as error:
            line, column = position(error.written, len(error.written) - 1)
            raise TemplateJSONError(
                str(error),
                line=line,
                column=column,
                excerpt=excerpt(error.written, line, column),
                source=self.source,
            ) from error
        except jinja2.UndefinedError as error:
            raise self._undefined_error(error, variables) from error
        # Filters, and methods of values, raise what they like.
        except Exception as error:
            raise self._render_error(error) from error

    def _undefined_error(
        self, error: jinja2.UndefinedError, variables: Mapping[str, Any]
    ) -> TemplateError:
        match = re.fullmatch(r"'(\w+)' is undefined", str(error))
        if match and match[1] in self.variables:
            # It has a guard, but not everywhere.
            return self._variables_error([match[1]], [])
        match = re.fullmatch(r"(?:list|tuple) object has no element (\d+)", str(error))
        if match and f"input_images[{match[1]}]" in self.text and "input_images" in variables:
            needed = int(match[1]) + 1
            images = "an input image" if needed == 1 else f"{needed} input images"
            return self._render_error(
                error, f"the template takes input_images[{match[1]}]: give {images}"
            )
        return self._render_error(error)

    def _render_error(self, error: Exception, message: str | None = None) -> TemplateRenderError:
        ours = isinstance(error, jinja2.TemplateError)
        message = message or (str(error) if ours else f"{type(error).__name__}: {error}")
        line = self._program.line_of(error)
        return TemplateRenderError(
            message,
            line=line,
            excerpt=excerpt(self.text, line) if line else None,
            source=self.source,
        )


def _refuse_ui_format(text: str, source: str | None) -> None:
    graph = _parsed(text)
    if is_ui_format(graph):
        check_graph(graph, source=source)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # A template need not be JSON before it is rendered.
        return None


def _syntax_error(
    error: jinja2.TemplateSyntaxError, text: str, source: str | None
) -> TemplateSyntaxError:
    lines = text.split("\n")
    line = min(error.lineno, len(lines))
    column = _column_of_token(error.message or "", lines[line - 1])
    return TemplateSyntaxError(
        error.message or "Jinja cannot read the template",
        line=line,
        column=column,
        excerpt=excerpt(text, line, column),
        source=source,
    )


def _column_of_token(message: str, line: str) -> int | None:
    # Jinja tells the line only; a token that it quotes and that the line has once tells the rest.
    match = re.search(r"(?:got|unexpected|unexpected char|unknown tag|named) '([^']+)'", message)
    if match and line.count(match[1]) == 1:
        return line.index(match[1]) + 1
    return None


def _with_nearest(names: Iterable[str], known: list[str]) -> list[str]:
    result = []
    for name in names:
        nearest = difflib.get_close_matches(name, known, n=1)
        result.append(f"{name} (did you mean {nearest[0]}?)" if nearest else name)
    return result


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith(b"\x89PNG"):
            message = "this is a PNG image, not the text of a workflow template"
        else:
            message = f"the template is not UTF-8 text: {error.reason} at byte {error.start}"
        raise TemplateError(message, source=source) from error
