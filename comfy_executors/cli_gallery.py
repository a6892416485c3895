"""`run --gallery`: what a run made, as a page, with the commands that make it again."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from comfy_executors.errors import ComfyExecutorsError
from comfy_executors.executors.sweep import ROW_ARGUMENTS
from comfy_executors.gallery.commands import batch_options, shell_command, variable_options
from comfy_executors.gallery.model import Batch, Run
from comfy_executors.gallery.page import read_page, write_page
from comfy_executors.gallery.writing import (
    command_path,
    gallery_file,
    node_labels,
    now,
    order,
)
from comfy_executors.runs import Batch as PlannedBatch
from comfy_executors.runs import BatchResult
from comfy_executors.workflows import WorkflowTemplate, plan_batches

_SWEEP = "results.jsonl"


def add_gallery_argument(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes for a gallery."""
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="write index.html beside the images: a page to look at them",
    )


class RunGallery:
    """Collects what a run makes, and writes the page.

    Args:
        args: The arguments of `run`.
        template: The template.
        variables: The variables that all batches get.

    Raises:
        OutputFileError: The folder has an index.html that is no gallery.
    """

    def __init__(
        self, args: argparse.Namespace, template: WorkflowTemplate, variables: Mapping[str, Any]
    ) -> None:
        self._args = args
        self._template = template
        self._variables = variables
        self._folder = Path(args.output)
        read_page(self._folder)  # before any GPU time is spent
        self._started = now()
        self._server = ""
        self._batches: list[Batch] = []

    def began(self, server: str | None) -> None:
        """Take note of where it runs."""
        self._server = server or ""

    def add(self, planned: PlannedBatch, result: BatchResult) -> None:
        """Take a batch that succeeded."""
        labels = node_labels(planned.render(planned))
        batch = Batch(
            planned.index,
            seed=result.seed,
            seconds=round(result.seconds, 3),
            command=self._command(self._variables, result.seed, planned.size),
        )
        for output in (*result.images, *result.outputs):
            assert output.path is not None, "it was saved as it came"
            batch.files.append(gallery_file(self._folder, output.path, output.node_id, labels))
        self._batches.append(batch)

    def add_error(self, planned: PlannedBatch, error: BaseException) -> None:
        """Take a batch that failed."""
        command = self._command(self._variables, planned.seed, planned.size)
        batch = Batch(planned.index, seed=planned.seed, command=command, error=str(error))
        self._batches.append(batch)

    def add_rows(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of a sweep, as they stand in its results."""
        labels: Mapping[str, str] = {}
        for record in records:
            labels = labels or self._labels(record["variables"])
            self._batches += self._row(record, labels)

    def write(self, *, seconds: float | None = None, is_sweep: bool = False) -> Path | None:
        """Write the page.

        Args:
            seconds: How long the run took.
            is_sweep: Whether this is the folder's sweep, which takes its own earlier place.

        Returns:
            The page, or None where nothing was made and nothing failed.
        """
        if not self._batches:
            return None
        name = os.path.basename(self._template.source or self._args.template)
        run = Run(
            id=_SWEEP if is_sweep else os.urandom(16).hex(),
            title=f"{name}, {os.path.basename(self._args.vars)}" if is_sweep else name,
            started=self._started,
            server=self._server or self._backend(),
            seconds=seconds,
            variables=dict(self._variables),
            note=self._note(),
            batches=order(self._batches),
        )
        return write_page(self._folder, run)

    def _row(self, record: Mapping[str, Any], labels: Mapping[str, str]) -> list[Batch]:
        args, row = self._args, record["variables"]
        own = {name: value for name, value in row.items() if name not in ROW_ARGUMENTS}
        inputs = row.get("input_images")
        variables = {**self._variables, **own}
        size = args.batch_size if "batch_size" in self._template.variables else 1
        num_samples = row.get("num_samples", args.num_samples)
        if record["error"] is not None:
            # A row without a seed did not get so far as to have anything that a command can say.
            seed, command = record["seed"], ""
            if seed is not None:
                command = self._command(variables, seed, size, inputs, num_samples)
            message = record["error"]["message"]
            return [
                Batch(
                    0, row=record["row"], seed=seed, variables=own, command=command, error=message
                )
            ]
        sizes = plan_batches(num_samples, size)
        batches: dict[int, Batch] = {}
        for entry in (*record["images"], *record["outputs"]):
            path = self._folder / entry["path"]
            if not path.is_file():
                continue
            index = entry["batch"]
            if index not in batches:
                batches[index] = Batch(
                    index,
                    row=record["row"],
                    seed=entry["seed"],
                    seconds=entry["seconds"],
                    variables=own,
                    command=self._command(variables, entry["seed"], sizes[index], inputs),
                )
            batches[index].files.append(gallery_file(self._folder, path, entry["node"], labels))
        return list(batches.values())

    def _labels(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """Name the nodes by the graph of one row; the others' differ in values."""
        wants = self._template.variables
        filled = {"batch_size": 1, "seed": 0, "input_images": ["0.png"], "input_images_dir": ""}
        given = {**filled, **self._variables, **row}
        try:
            graph = self._template.render(**{n: v for n, v in given.items() if n in wants})
        except ComfyExecutorsError:
            return {}  # a row that fails; ids will do
        return node_labels(graph)

    def _backend(self) -> str:
        if self._args.modal:
            return f"Modal {self._args.modal}"
        return f"RunPod {self._args.runpod}" if self._args.runpod else ""

    def _command(
        self,
        variables: Mapping[str, Any],
        seed: int | None,
        size: int,
        inputs: Iterable[str] | None = None,
        num_samples: int | None = None,
    ) -> str:
        args = self._args
        command = ["comfy-executors", "run", command_path(self._template.source or args.template)]
        if args.modal:
            command += ["--modal", args.modal]
        elif args.runpod:
            command += ["--runpod", args.runpod, "--worker", args.worker]
        else:
            command += ["--server", self._server]
        for lines in args.header_files:
            command += ["--header", f"@{os.path.abspath(lines)}"]
        if args.verify is not True:
            ca = ["--ca", os.path.abspath(args.verify)] if args.verify else ["--insecure"]
            command += ca
        for image in inputs or args.input:
            command += ["--input", os.path.abspath(image)]
        if args.include_previews:
            command.append("--include-previews")
        try:
            command += variable_options(variables)
        except (TypeError, ValueError):  # NaN, which no command line can say
            return ""
        return shell_command([*command, *batch_options(seed, size, num_samples)])

    def _note(self) -> str:
        left_out = [f"--header {', '.join(self._args.header_names)}"] * bool(
            self._args.header_names
        )
        left_out += ["the user and password in --server"] * ("@" in (self._args.server or ""))
        if not left_out:
            return ""
        return f"Left out of the commands, because they may be keys: {'; '.join(left_out)}"
