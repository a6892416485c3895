"""A sweep on the command line: `run --vars`, one run a row, with results.jsonl and --resume."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfy_executors.cli_delivery import (
    CANCELLED,
    DELIVERED,
    FAILED,
    UNREACHABLE,
    UsageError,
    counted,
    error_facts,
    error_text,
    falls_short,
    json_line,
    tell_page,
)
from comfy_executors.cli_gallery import RunGallery
from comfy_executors.cli_progress import Display, make_display
from comfy_executors.cli_results import Record, Results, Resumed, digest, row_ids
from comfy_executors.cli_rows import RowsFile, check_columns, text_switches
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    EndpointNotFoundError,
    OutputFileError,
    ServerUnreachableError,
    WorkflowCancelledError,
)
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.sweep import RowCall, RowResult, map_rows
from comfy_executors.images import WorkflowOutput
from comfy_executors.saving import next_free
from comfy_executors.workflows import WorkflowTemplate

# After these the rows to come would fail one by one, each after a long wait; or, on a full disk,
# each after the GPU has worked for it.
_ENDING = (
    ServerUnreachableError,
    AuthenticationError,
    EndpointNotFoundError,
    OutputFileError,
)


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes for sweeps."""
    parser.add_argument(
        "--vars",
        metavar="FILE",
        help="a .csv or .jsonl file: run once for each row, whose names are variables",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="for --vars: do only the rows without a result in DIR/results.jsonl",
    )


def run_sweep(
    args: argparse.Namespace,
    template: WorkflowTemplate,
    variables: Mapping[str, Any],
    make_executor: Callable[[argparse.Namespace], BaseWorkflowExecutor],
    gallery: RunGallery | None,
) -> int:
    """Run the template once for each row of `--vars`.

    Args:
        args: The arguments of `run`.
        template: The template.
        variables: The variables that all rows get.
        make_executor: Makes the executor, which is closed when this returns or raises.
        gallery: Where all rows are shown, too.

    Returns:
        The exit code.

    Raises:
        UsageError: The rows, or what `--resume` finds, cannot work.
        OutputFileError: There is no room for a copy of the rows.
        BrokenPipeError: Nobody reads stdout any more; the sweep was cancelled.
    """
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(contextlib.closing(RowsFile(args.vars)))
        summary = rows.summary(args.num_samples)
        check_columns(rows, summary, template, variables)
        folder = Path(args.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot save into {folder}: {error.strerror}") from error
        digests = _digests(args, template, variables)
        results = stack.enter_context(contextlib.closing(Results(folder, digests)))
        resumed = _begin(results, rows, resume=args.resume)
        display = stack.enter_context(
            make_display(summary.images, quiet=args.quiet, made=resumed.images)
        )
        if rows.blank:
            verb = "is" if rows.blank == 1 else "are"
            display.note(f"{rows.path}: {counted(rows.blank, 'blank row')} {verb} left out")
        for warning in text_switches(summary, template):
            display.note(warning)
        delivery = _SweepDelivery(args, display, results, folder, summary.rows, resumed)
        executor = make_executor(args)
        code = delivery.run(executor, template, rows, variables)
        if gallery is not None:
            gallery.began(getattr(executor, "url", None))
            write = partial(_write_page, gallery, results)
            if not tell_page(display, write, as_json=args.json):
                code = code or FAILED
        return code


def _write_page(gallery: RunGallery, results: Results) -> Path | None:
    gallery.add_rows(record for record in results.records() if record["row"] is not None)
    return gallery.write(is_sweep=True)


def _digests(
    args: argparse.Namespace, template: WorkflowTemplate, variables: Mapping[str, Any]
) -> dict[str, str]:
    """Tell apart what makes other images of the same rows."""
    made_with = {
        "the template": template.text,
        "--num-samples": args.num_samples,
        "--batch-size": args.batch_size,
        "--seed": args.seed,
        "--input": args.input,
        "--include-previews": args.include_previews,
        **{f"--var {name}": value for name, value in sorted(variables.items())},
    }
    return {name: digest(value) for name, value in made_with.items()}


def _begin(results: Results, rows: RowsFile, *, resume: bool) -> Resumed:
    if resume:
        return results.resume(row_ids(rows))
    if results.exists():
        raise UsageError(
            f"{results.path} is there already: --resume goes on with it; for a sweep of its own, "
            "choose another --output"
        )
    results.begin()
    return Resumed(set())


class _SweepDelivery:
    """One sweep, told and written down as it goes on."""

    def __init__(
        self,
        args: argparse.Namespace,
        display: Display,
        results: Results,
        folder: Path,
        rows: int,
        resumed: Resumed,
    ) -> None:
        self._args = args
        self._display = display
        self._results = results
        self._folder = folder
        self._rows = rows
        self._resumed = resumed
        self._ids: dict[int, str] = {}  # of the rows in flight, in order
        # Rows that were written down and are still to be told, by their index; no images.
        self._untold: list[tuple[int, Record, str | None]] = []
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._ended_by: ComfyExecutorsError | None = None
        self._started = time.monotonic()

    def run(
        self,
        executor: BaseWorkflowExecutor,
        template: WorkflowTemplate,
        rows: RowsFile,
        variables: Mapping[str, Any],
    ) -> int:
        args = self._args
        self._tell_start(executor)
        interrupted = False
        try:
            with executor:
                sweep = map_rows(
                    executor,
                    template,
                    self._calls(rows),
                    on_progress=self._display.on_progress,
                    variables=variables,
                    input_images=args.input or None,
                    num_samples=args.num_samples,
                    seed=args.seed,
                    timeout=args.timeout,
                    batch_timeout=args.batch_timeout,
                    include_previews=args.include_previews,
                )
                with contextlib.closing(sweep):
                    self._take(sweep, getattr(executor, "url", None))
        except KeyboardInterrupt:
            interrupted = True
        self._tell_end(interrupted)
        return self._exit_code(interrupted)

    def _calls(self, rows: RowsFile) -> Iterator[RowCall]:
        for index, (row, row_id) in enumerate(zip(rows, row_ids(rows))):
            if index not in self._resumed.done:
                self._ids[index] = row_id
                yield RowCall(index, row, {"output_dir": self._results.folder_of(row_id)})

    def _take(self, sweep: Iterator[RowResult], server: str | None) -> None:
        try:
            for result in sweep:
                # A worker's own server may have died of the row; the next one has a fresh one.
                is_ours = getattr(result.error, "server", None) in (None, server)
                if isinstance(result.error, _ENDING) and is_ours:
                    self._ended_by = result.error
                    self._tell_error(result.index, error_text(result.error))
                    return
                self._settle(result)
        except OutputFileError as error:
            self._ended_by = error
            self._display.error(f"error: {error}")
        except KeyboardInterrupt:
            self._display.note("cancelling, on the server too …")
            raise

    def _settle(self, result: RowResult) -> None:
        """Write down what came of a row, and tell it, with --ordered when its turn has come."""
        row_id = self._ids.pop(result.index)
        if isinstance(result.error, WorkflowCancelledError):
            return
        record = self._record(result, row_id)
        self._results.append(record)
        self._counts["rows"] += 1
        error = None
        if result.error is not None:
            self._counts["failed"] += 1
            error = error_text(result.error)
        else:
            self._counts["images"] += len(result.images)
            self._counts["files"] += len(result.outputs)
            wanted = result.row.get("num_samples", self._args.num_samples)
            self._counts["short"] += falls_short(result, wanted)
        heapq.heappush(self._untold, (result.index, record, error))
        self._tell_rows(next(iter(self._ids), math.inf) if self._args.ordered else math.inf)

    def _record(self, result: RowResult, row_id: str) -> Record:
        failed = result.error is not None
        own = self._results.folder_of(row_id)
        place = {} if failed else self._places(result, own)
        seconds = {batch.index: round(batch.seconds, 3) for batch in result.batches}

        def entry(output: WorkflowOutput) -> dict[str, Any]:
            return {
                "path": place[output],
                "name": output.name,
                "seed": output.seed,
                "batch": output.batch_index,
                "node": output.node_id,
                "prompt_id": output.prompt_id,
                "seconds": seconds[output.batch_index],
            }

        return {
            "row": result.index,
            "variables": result.row,
            "seed": result.seed,
            "error": error_facts(result.error) if result.error is not None else None,
            "images": [] if failed else [entry(image) for image in result.images],
            "outputs": [] if failed else [entry(output) for output in result.outputs],
            "seconds": round(result.seconds, 3),
            "id": row_id,
        }

    def _places(self, result: RowResult, own: Path) -> dict[WorkflowOutput, str]:
        """Give the files of a row, in its own folder, the names that they are to have."""
        places: dict[WorkflowOutput, str] = {}
        given: set[Path] = set()  # no file is there yet, so that the disk does not know of them
        for output in (*result.images, *result.outputs):
            assert output.path is not None, "they were saved as they came"
            below = output.path.relative_to(own)
            target = self._folder / below.parent / f"{result.index:05d}_{below.name}"
            while os.path.lexists(target) or target in given:
                target = next_free(target)
            given.add(target)
            place = target.relative_to(self._folder)
            try:
                os.replace(output.path, own / place)
            except OSError as error:
                raise OutputFileError(f"cannot save {target}: {error.strerror}") from error
            places[output] = place.as_posix()
        return places

    # Telling.

    def _event(self, kind: str, **facts: Any) -> None:
        if self._args.json:
            self._display.result(json_line(kind, **facts))

    def _tell_start(self, executor: BaseWorkflowExecutor) -> None:
        resumed = self._resumed
        self._event(
            "start",
            server=getattr(executor, "url", None),
            rows=self._rows,
            done=len(resumed.done),
            output=self._args.output,
        )
        if self._args.resume:
            again = f", {resumed.failed} of which failed before" if resumed.failed else ""
            left = self._rows - len(resumed.done)
            rows = f"{counted(self._rows, 'row')} {'is' if self._rows == 1 else 'are'}"
            self._display.note(f"{len(resumed.done)} of {rows} done; {left} to do{again}")
        if resumed.gone:
            self._display.note(
                f"warning: {counted(resumed.gone, 'result')} in {self._results.path} belong to "
                "rows that are not in the file any more, or were changed; they stay"
            )

    def _tell_rows(self, before: float = math.inf) -> None:
        """Tell the rows that were not told yet, and whose index is below this one."""
        while self._untold and self._untold[0][0] < before:
            index, record, error = heapq.heappop(self._untold)
            if error is not None:
                self._tell_error(index, error)
            self._tell_row(record)

    def _tell_row(self, record: Record) -> None:
        if self._args.json:
            self._event("row", **record)
            return
        paths = [str(self._folder / e["path"]) for e in (*record["images"], *record["outputs"])]
        if paths:
            self._display.result(*paths)

    def _tell_error(self, index: int, text: str) -> None:
        # What is wrong with the graph or the server is wrong for every row: say it once.
        if text not in self._said:
            self._said.add(text)
            self._display.error(f"error: row {index}: {text}")

    def _tell_end(self, interrupted: bool) -> None:
        self._tell_rows()
        self._display.end_progress()
        counts, seconds = self._counts, time.monotonic() - self._started
        delivered = len(self._resumed.done) + counts["rows"] - counts["failed"]
        self._event(
            "end",
            rows=delivered,
            delivered=counts["images"],
            outputs=counts["files"],
            failed=counts["failed"],
            missing=self._rows - delivered - counts["failed"],
            interrupted=interrupted,
            seconds=round(seconds, 3),
        )
        files = f" and {counted(counts['files'], 'other file')}" if counts["files"] else ""
        parts = [
            f"{counted(delivered, 'row', self._rows)}, {counted(counts['images'], 'image')}{files} "
            f"in {self._args.output} after {seconds:.1f} s"
        ]
        if counts["failed"]:
            parts.append(f"{counted(counts['failed'], 'row')} failed")
        if counts["short"]:
            parts.append(f"{counted(counts['short'], 'row')} made fewer images than were asked for")
        if delivered < self._rows:
            parts.append("run it again with --resume for the rest")
        tell = self._display.note if delivered == self._rows else self._display.error
        tell("; ".join(parts))

    def _exit_code(self, interrupted: bool) -> int:
        if interrupted:
            return CANCELLED
        if self._ended_by is not None:
            return FAILED if isinstance(self._ended_by, OutputFileError) else UNREACHABLE
        return FAILED if self._counts["failed"] or self._counts["short"] else DELIVERED
