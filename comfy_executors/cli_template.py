"""`comfy-executors template`: make a template of a workflow that ComfyUI exported."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_executors.cli_arguments import add_server_arguments
from comfy_executors.cli_delivery import DELIVERED, UsageError, counted, json_line
from comfy_executors.cli_progress import Display
from comfy_executors.cli_server import server_object_info
from comfy_executors.errors import node_label
from comfy_executors.exports import convert_export
from comfy_executors.graphs import (
    Graph,
    check_graph,
    class_type,
    find_seeds,
    is_ui_format,
    node_title,
    unwrapped,
)
from comfy_executors.node_info import read_object_info, shown
from comfy_executors.parametrize import Parameter, find_parameters
from comfy_executors.saving import write_whole
from comfy_executors.template_text import write_template

_SHOWN_VALUE = 40


def add_template_command(parser: argparse.ArgumentParser) -> None:
    """Add what `template` takes."""
    parser.add_argument("export", metavar="EXPORT", help="a workflow that ComfyUI saved, as JSON")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the template; default: written to stdout"
    )
    parser.add_argument("--force", action="store_true", help="write over the file of --output")
    parser.add_argument(
        "--object-info",
        metavar="FILE",
        help="what a server answers to GET /object_info, as JSON, in place of --server",
    )
    add_server_arguments(
        parser,
        "for a workflow in ComfyUI's UI format, whose conversion needs a description of the nodes: "
        "host:port or a URL; default: $COMFYUI_URL",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --output, write one JSON object a line to stdout"
    )


def template(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ComfyExecutorsError: There is no such file, it is no workflow, or the server cannot be
            asked.
    """
    if args.json and not args.output:
        raise UsageError("--json writes to stdout, where the template would go: add --output FILE")
    graph = _graph(args)
    parameters = find_parameters(graph)
    text = write_template(graph, parameters)
    if args.output:
        _write(Path(args.output), text, args.force)
        _tell(args.output, graph, parameters, args.json)
    else:
        sys.stdout.write(text)
        for line in _table(graph, parameters):
            print(line, file=sys.stderr)
    return DELIVERED


def _graph(args: argparse.Namespace) -> Graph:
    workflow = unwrapped(_read(args.export))
    if is_ui_format(workflow) and (args.object_info or args.server):
        workflow = convert_export(workflow, _object_info(args))
    check_graph(workflow, source=args.export)
    graph: Graph = workflow
    return graph


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read the export {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no export, which is JSON text; a picture has to be opened in ComfyUI, and"
            " its workflow exported there with Workflow > Export (API)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no export, which is JSON: {error}") from error


def _object_info(args: argparse.Namespace) -> Any:
    if not args.object_info:
        return server_object_info(args)[1]
    try:
        return read_object_info(args.object_info)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot read {args.object_info}: {reason}") from error


def _write(path: Path, text: str, force: bool) -> None:
    try:
        write_whole(text.encode("utf-8"), path, over=force)
    except FileExistsError as error:
        raise UsageError(f"{path} is there already: --force writes over it") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


# What became what.


def _tell(path: str, graph: Graph, parameters: Sequence[Parameter], as_json: bool) -> None:
    display = Display()
    if not as_json:
        for line in _table(graph, parameters):
            display.result(line)
        display.note(f"{counted(len(graph), 'node')} written to {path}")
        return
    for parameter in parameters:
        places = [
            {
                "node": place.node_id,
                "class_type": class_type(graph, place.node_id),
                "title": node_title(graph, place.node_id),
                "input": place.input_name,
            }
            for place in parameter.places
        ]
        line = json_line(
            "variable",
            name=parameter.name,
            required=parameter.required,
            value=parameter.value,
            places=places,
        )
        display.result(line)
    display.result(json_line("end", path=path, nodes=len(graph)))


def _table(graph: Graph, parameters: Sequence[Parameter]) -> list[str]:
    rows = [("variable", "value", "in")]
    for parameter in parameters:
        value = _short(parameter.value)
        need = f"required, was {value}" if parameter.required else value
        name = parameter.expression or parameter.name
        for place in parameter.places:
            rows.append((name, need, _where(graph, place.node_id, place.input_name)))
            name = need = ""
    seeds = find_seeds(graph)
    rows += [
        ("literal", "replaced in each batch", _where(graph, seed.node_id, seed.input_name))
        for seed in seeds
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {where}" for name, value, where in rows]
    return lines if len(rows) > 1 else ["nothing in it looks like a variable"]


def _where(graph: Graph, node_id: str, input_name: str) -> str:
    label = node_label(node_id, node_title(graph, node_id), class_type(graph, node_id))
    return f"{label}, input {input_name}"


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 1].rstrip()}…"
