"""`comfy-executors check`: render a template and hold it against a server; nothing runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict

from comfy_executors.checking import check_nodes, is_warning
from comfy_executors.cli_arguments import load_template, template_variables
from comfy_executors.cli_delivery import (
    DELIVERED,
    OPTION_OF,
    USAGE,
    counted,
    json_line,
)
from comfy_executors.cli_progress import Display
from comfy_executors.cli_server import server_object_info
from comfy_executors.errors import (
    GraphError,
    NodeProblem,
    TemplateError,
    TemplateVariablesError,
)
from comfy_executors.executors.plan import Plan, refuse_previews_only
from comfy_executors.images import InputImageSet
from comfy_executors.json_text import excerpt
from comfy_executors.locating import locate
from comfy_executors.node_info import shown
from comfy_executors.workflows import Graph, WorkflowTemplate


def check(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ComfyExecutorsError: The template cannot be rendered, or the server not be asked.
    """
    template = load_template(args.template)
    display = Display()
    try:
        graph = _render(template, args)
    except TemplateVariablesError:
        _tell_variables(template, display.result, args.json)
        raise
    except GraphError as error:
        place = locate(template.text, error.node_id) if error.node_id is not None else None
        if place is not None:
            display.note(excerpt(template.text, *place))
        raise
    _tell_variables(template, display.result if args.json else display.note, args.json)
    if not args.server:
        what = "rendered, without a --server to hold it against"
        _tell_problems(template, [], what, graph, args.json)
        return DELIVERED
    url, info = server_object_info(args)
    problems = check_nodes(graph, info)
    _tell_problems(template, problems, f"held against {url}", graph, args.json)
    return DELIVERED if all(map(is_warning, problems)) else USAGE


def _tell_problems(
    template: WorkflowTemplate,
    problems: Sequence[NodeProblem],
    what: str,
    graph: Graph,
    as_json: bool,
) -> None:
    display = Display()
    counts = {"error": 0, "warning": 0}
    for problem in problems:
        level = "warning" if is_warning(problem) else "error"
        counts[level] += 1
        line, column = _position(template, problem)
        if as_json:
            facts = {"level": level, "line": line, "column": column, "text": str(problem)}
            display.result(json_line("problem", **facts, **asdict(problem)))
        else:
            told = TemplateError(str(problem), line=line, column=column, source=template.source)
            display.result(f"{level}: {told}")
    if as_json:
        display.result(json_line("end", errors=counts["error"], warnings=counts["warning"]))
    found = " and ".join(counted(number, level) for level, number in counts.items())
    display.note(f"{counted(len(graph), 'node')} {what}: {found}; nothing was run")


def _position(template: WorkflowTemplate, problem: NodeProblem) -> tuple[int | None, int | None]:
    """Return line and column of what a problem is about in the template, or of its node."""
    ways: list[tuple[str, ...]] = [()]
    if problem.kind == "missing_node_type":
        ways = [("class_type",), ()]
    elif problem.input_name is not None:
        ways = [("inputs", problem.input_name), ()]
    for way in ways:
        found = locate(template.text, problem.node_id, *way)
        if found is not None:
            return found
    return None, None


def _render(template: WorkflowTemplate, args: argparse.Namespace) -> Graph:
    images = InputImageSet(args.input) if args.input else None
    plan = Plan(
        template,
        num_samples=1,
        batch_size=1,
        seed=0,
        randomize_seed=True,
        variables=template_variables(args),
        input_images=images,
        input_images_dir=f"input/{images.folder}" if images else "",
    )
    if not args.include_previews:
        refuse_previews_only(plan.graph)
    return plan.graph


def _tell_variables(template: WorkflowTemplate, tell: Callable[[str], None], as_json: bool) -> None:
    names = {name: _need(template, name) for name in sorted(template.variables)}
    if as_json:
        tell(json_line("variables", variables=names, defaults=template.defaults))
        return
    for name, need in names.items():
        tell(f"{name}: {need}")


def _need(template: WorkflowTemplate, name: str) -> str:
    if name in OPTION_OF:
        return f"filled in by {OPTION_OF[name]}"
    if name in template.defaults:
        return f"default {shown(template.defaults[name])}"
    return "required" if name in template.required_variables else "optional"
