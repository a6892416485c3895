"""`comfy-executors check`: render a template and hold it against a server; nothing runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from comfy_executors.errors import NodeProblem, TemplateVariablesError
from comfy_executors.executors.plan import Plan, refuse_previews_only
from comfy_executors.images import InputImageSet
from comfy_executors.workflows import Graph, WorkflowTemplate


def check(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ComfyExecutorsError: The template cannot be rendered, or the server not be asked.
    """
    template = load_template(args.template)
    try:
        graph = _render(template, args)
    except TemplateVariablesError:
        _tell_variables(template, args.json)
        raise
    if not args.server:
        _tell_problems([], "rendered, without a --server to hold it against", graph, args.json)
        return DELIVERED
    url, info = server_object_info(args)
    problems = check_nodes(graph, info)
    _tell_problems(problems, f"held against {url}", graph, args.json)
    return DELIVERED if all(map(is_warning, problems)) else USAGE


def _tell_problems(problems: Sequence[NodeProblem], what: str, graph: Graph, as_json: bool) -> None:
    display = Display()
    counts = {"error": 0, "warning": 0}
    for problem in problems:
        level = "warning" if is_warning(problem) else "error"
        counts[level] += 1
        if as_json:
            display.result(json_line("problem", level=level, text=str(problem), **asdict(problem)))
        else:
            display.result(f"{level}: {problem}")
    if as_json:
        display.result(json_line("end", errors=counts["error"], warnings=counts["warning"]))
    found = " and ".join(counted(number, level) for level, number in counts.items())
    display.note(f"{counted(len(graph), 'node')} {what}: {found}; nothing was run")


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


def _tell_variables(template: WorkflowTemplate, as_json: bool) -> None:
    display = Display()
    names = {name: _need(template, name) for name in sorted(template.variables)}
    if as_json:
        display.result(json_line("variables", variables=names))
        return
    for name, need in names.items():
        display.result(f"{name}: {need}")


def _need(template: WorkflowTemplate, name: str) -> str:
    if name in OPTION_OF:
        return f"filled in by {OPTION_OF[name]}"
    return "required" if name in template.required_variables else "optional"
