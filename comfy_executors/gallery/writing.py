"""From runs and their results to a gallery."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Union

from comfy_executors.errors import WorkflowCancelledError, node_label
from comfy_executors.executors.sweep import ROW_ARGUMENTS, RowResult
from comfy_executors.gallery.commands import batch_options, shell_command, variable_options
from comfy_executors.gallery.model import Batch, File, Run
from comfy_executors.gallery.page import read_page, write_page
from comfy_executors.graphs import Graph, class_type, find_seeds, node_title
from comfy_executors.images import WorkflowOutput, kind_of
from comfy_executors.runs import BatchResult, WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

_SHOWN_TEXT = 4000

Results = Union[WorkflowRun, Iterable[RowResult]]


def write_gallery(
    folder: str | os.PathLike[str],
    results: Results,
    *,
    template: WorkflowTemplate | None = None,
    variables: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write `index.html` beside the images of a run, or add the run to the one that is there.

    It waits for the run. Files that were not saved below the folder yet are saved there.

    Args:
        folder: The folder of the images.
        results: A run, or the results of `map_workflows`.
        template: The template, for the commands that make an image again.
        variables: The variables that the run was given, which are shown.
        title: The headline; by default the template's file name.

    Returns:
        The page.

    Raises:
        OutputFileError: The folder has an index.html that is no gallery, or cannot be written.
        ResultsTakenError: The run's images were iterated over, and are not kept.
    """
    place, given = Path(folder), dict(variables or {})
    read_page(place)  # before anything is saved for nothing
    source = _Source(place, template, given)
    if isinstance(results, WorkflowRun):
        batches = source.batches_of_run(results)
    else:
        batches = [batch for row in results for batch in source.batches_of_row(row)]
    name = os.path.basename(template.source or "") if template is not None else ""
    run = Run(
        id=uuid.uuid4().hex,
        title=title or name or "Run",
        started=now(),
        server=source.server,
        variables=given,
        batches=order(batches),
    )
    return write_page(place, run)


class _Source:
    """Where the results of one call come from."""

    def __init__(
        self, folder: Path, template: WorkflowTemplate | None, variables: dict[str, Any]
    ) -> None:
        self._folder = folder
        self._template = template
        self._variables = variables
        self.server = ""

    def batches_of_run(self, run: WorkflowRun) -> list[Batch]:
        made, errors = {}, {}
        for index, future in enumerate(run.futures):
            try:
                made[index] = future.result()
            except Exception as error:  # whatever it was, it is told beside the others
                errors[index] = error
        batches = []
        for planned in run.batches:
            graph = planned.render(planned)
            if planned.index in made:
                result = made[planned.index]
                # The command line would draw another seed for a graph that kept its own.
                keeps = planned.seed is None and bool(find_seeds(graph))
                repeatable = not keeps and run.job.input_images is None
                batch = self._batch(result, planned.size, graph, self._variables, repeatable)
            elif not isinstance(errors[planned.index], WorkflowCancelledError):
                batch = Batch(planned.index, seed=planned.seed, error=str(errors[planned.index]))
            else:
                continue
            batches.append(batch)
        return batches

    def batches_of_row(self, row: RowResult) -> list[Batch]:
        given = row.row if isinstance(row.row, Mapping) else {}
        own = {name: value for name, value in given.items() if name not in ROW_ARGUMENTS}
        variables = {**self._variables, **own}
        repeatable = row.seed is not None and "input_images" not in given
        batches = [
            self._batch(result, len(result.images) or 1, {}, variables, repeatable)
            for result in row.batches
        ]
        if row.error is not None:
            batches.append(Batch(len(batches), seed=row.seed, error=str(row.error)))
        return [replace(batch, row=row.index, variables=own) for batch in batches]

    def _batch(
        self,
        result: BatchResult,
        size: int,
        graph: Graph,
        variables: Mapping[str, Any],
        repeatable: bool,
    ) -> Batch:
        self.server = result.server or self.server
        labels = node_labels(graph)
        return Batch(
            result.index,
            seed=result.seed,
            seconds=round(result.seconds, 3),
            command=self._command(result, size, variables) if repeatable else "",
            files=[
                gallery_file(self._folder, self._saved(output), output.node_id, labels)
                for output in (*result.images, *result.outputs)
            ],
        )

    def _command(self, result: BatchResult, size: int, variables: Mapping[str, Any]) -> str:
        template = self._template
        if template is None or template.source is None or not result.server or result.job_id:
            return ""
        try:
            options = variable_options(variables)
        except (TypeError, ValueError):  # what no command line can say
            return ""
        start = ["comfy-executors", "run", command_path(template.source), "--server", result.server]
        return shell_command([*start, *options, *batch_options(result.seed, size)])

    def _saved(self, output: WorkflowOutput) -> Path:
        if output.path is None or self._folder.resolve() not in output.path.resolve().parents:
            return output.save(os.path.join(self._folder, ""))
        return output.path


def now() -> str:
    """Say what time it is, for people."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")


def command_path(source: str) -> str:
    """Name a template so that a command finds it from any folder; URLs are that already."""
    return source if source.startswith(("http://", "https://")) else os.path.abspath(source)


def node_labels(graph: Graph) -> Mapping[str, str]:
    """Name the nodes of a graph as people know them: `9 "Save Image" (SaveImage)`."""
    return {
        node: node_label(node, node_title(graph, node), class_type(graph, node))[len("Node ") :]
        for node in graph
    }


def gallery_file(folder: Path, path: Path, node: str | None, labels: Mapping[str, str]) -> File:
    """Describe a file that lies below the gallery's folder.

    Args:
        folder: The gallery's folder.
        path: The file.
        node: The id of the node that made it.
        labels: How nodes are called.
    """
    kind = kind_of(path.name)
    text = ""
    if kind == "text":
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_SHOWN_TEXT)
    return File(
        path.resolve().relative_to(folder.resolve()).as_posix(),
        kind,
        path.stat().st_size,
        labels.get(node or "", node or ""),
        text,
    )


def order(batches: Sequence[Batch]) -> list[Batch]:
    """Put batches into the order of their rows and indices, however they were finished."""
    return sorted(batches, key=lambda batch: (batch.row or 0, batch.index))
