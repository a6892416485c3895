"""One run on the command line: tell what comes, count what fails, choose the exit code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from comfy_executors.cli_gallery import RunGallery
from comfy_executors.cli_progress import Display
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    NodeExecutionError,
    OutputFileError,
    ServerError,
    ServerUnreachableError,
    TemplateVariablesError,
    WorkflowRejectedError,
)
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.sweep import RowResult
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import Batch, BatchResult, WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

DELIVERED, FAILED, USAGE, UNREACHABLE, CANCELLED = 0, 1, 2, 3, 130

# Which option fills in the variables that `--var` must not.
OPTION_OF = {
    "batch_size": "--batch-size",
    "seed": "--seed",
    "input_images": "--input",
    "input_images_dir": "--input",
}


class UsageError(ComfyExecutorsError):
    """Raised when the arguments cannot work."""


class Delivery:
    """One run, told as it goes on.

    Args:
        display: Where it is told.
        as_json: Whether stdout gets one JSON object a line instead of paths.
        output: The folder that the images go to.
        keep_going: Whether the other batches go on when one fails.
        ordered: Whether batches are told in order instead of as they complete.
        gallery: What else they are told to.
    """

    def __init__(
        self,
        display: Display,
        *,
        as_json: bool,
        output: str,
        keep_going: bool,
        ordered: bool,
        gallery: RunGallery | None = None,
    ) -> None:
        self._display = display
        self._as_json = as_json
        self._output = output
        self._keep_going = keep_going
        self._ordered = ordered
        self._gallery = gallery
        self._images = self._files = self._cancelled = 0
        self._batches: Sequence[Batch] = ()
        self._fell_short = False
        self._errors: list[BaseException] = []
        self._said: set[str] = set()
        self._started = time.monotonic()

    def run(
        self,
        executor: BaseWorkflowExecutor,
        template: WorkflowTemplate,
        num_samples: int,
        **options: Any,
    ) -> int:
        """Run a template and close the executor.

        Args:
            executor: The executor, which is closed when this returns or raises.
            template: The template.
            num_samples: How many images are wanted.
            options: For `submit_workflow`.

        Returns:
            The exit code.

        Raises:
            BrokenPipeError: Nobody reads stdout any more; the run was cancelled.
            As `submit_workflow` does.
        """
        waiting: dict[Future[BatchResult], int] = {}
        interrupted = False
        try:
            with executor:
                run = self._submit(executor, template, num_samples=num_samples, **options)
                waiting.update((future, index) for index, future in enumerate(run.futures))
                self._batches = run.batches
                self._tell_start(executor, num_samples, run)
                try:
                    self._take(run, waiting)
                except KeyboardInterrupt:
                    self._display.note("cancelling, on the server too …")
                    raise
        except KeyboardInterrupt:
            # Here the executor is closed, our prompts are off the server, and all is settled.
            interrupted = True
            for future, index in waiting.items():
                self._settle(index, future)
        if self._images > num_samples and "batch_size" not in template.variables:
            self._display.note(
                "warning: one batch makes several images: write {{ batch_size }} in the template "
                "where it says how many"
            )
        self._tell_end(num_samples, interrupted)
        code = CANCELLED if interrupted else self._exit_code(num_samples)
        if self._gallery is not None:
            write = partial(self._gallery.write, seconds=time.monotonic() - self._started)
            if not tell_page(self._display, write, as_json=self._as_json):
                code = code or FAILED
        return code

    def _submit(
        self, executor: BaseWorkflowExecutor, template: WorkflowTemplate, **options: Any
    ) -> WorkflowRun:
        try:
            return executor.submit_workflow(
                template,
                output_dir=self._output,
                on_progress=self._display.on_progress,
                **options,
            )
        except ComfyExecutorsError:
            raise
        except ValueError as error:  # such as a seed that is too high for so many batches
            raise UsageError(str(error)) from error

    def _take(self, run: WorkflowRun, waiting: dict[Future[BatchResult], int]) -> None:
        futures = list(waiting)
        for future in futures if self._ordered else as_completed(futures):
            failed = self._settle(waiting.pop(future), future)
            if failed and not self._keep_going:
                run.cancel()

    def _settle(self, index: int, future: Future[BatchResult]) -> bool:
        """Wait for a batch, tell what came of it, and return whether it failed."""
        try:
            error = future.exception()
        except CancelledError as cancelled:
            error = cancelled
        if error is None:
            self._tell_result(future.result())
        elif isinstance(error, CancelledError):
            self._cancelled += 1
        else:
            self._tell_error(index, error)
            return True
        return False

    # Telling.

    def _event(self, kind: str, **facts: Any) -> None:
        if self._as_json:
            self._display.result(json_line(kind, **facts))

    def _tell_start(
        self, executor: BaseWorkflowExecutor, num_samples: int, run: WorkflowRun
    ) -> None:
        server = getattr(executor, "url", None)
        if self._gallery is not None:
            self._gallery.began(server)
        self._event(
            "start",
            server=server,
            num_samples=num_samples,
            batches=len(run.batches),
            output=self._output,
        )

    def _tell_result(self, result: BatchResult) -> None:
        if self._gallery is not None:
            self._gallery.add(self._batches[result.index], result)
        self._images += len(result.images)
        self._files += len(result.outputs)
        self._fell_short |= falls_short(result, self._batches[result.index].size)
        self._tell_files("image", result.images)
        self._tell_files("output", result.outputs)

    def _tell_files(self, kind: str, files: Sequence[WorkflowOutput]) -> None:
        if files:
            tell: Callable[[WorkflowOutput], str]
            tell = partial(_file_event, kind) if self._as_json else _path
            self._display.result(*map(tell, files))

    def _tell_error(self, index: int, error: BaseException) -> None:
        self._errors.append(error)
        if self._gallery is not None:
            self._gallery.add_error(self._batches[index], error)
        self._event("error", batch=index, **error_facts(error))
        text = error_text(error)
        # What is wrong with the graph or the server is wrong for every batch: say it once.
        if text not in self._said:
            self._said.add(text)
            common = isinstance(error, (WorkflowRejectedError, ServerError))
            self._display.error(f"error: {text}" if common else f"error: batch {index}: {text}")

    def _tell_end(self, wanted: int, interrupted: bool) -> None:
        self._display.end_progress()
        seconds = round(time.monotonic() - self._started, 3)
        failed, cancelled = len(self._errors), self._cancelled
        self._event(
            "end",
            delivered=self._images,
            outputs=self._files,
            failed=failed,
            cancelled=cancelled,
            interrupted=interrupted,
            seconds=seconds,
        )
        images = counted(self._images, "image", wanted)
        files = f" and {counted(self._files, 'other file')}" if self._files else ""
        ends = [f"{counted(failed, 'batch')} failed"] if failed else []
        ends += [f"{counted(cancelled, 'batch')} cancelled"] if cancelled else []
        tell = self._display.error if self._is_short(wanted) else self._display.note
        tell("; ".join([f"{images}{files} in {self._output} after {seconds:.1f} s", *ends]))

    def _is_short(self, wanted: int) -> bool:
        return self._fell_short and self._images < wanted

    def _exit_code(self, wanted: int) -> int:
        if self._errors and all(isinstance(error, ServerError) for error in self._errors):
            return UNREACHABLE
        if self._images or self._files:
            return FAILED if self._errors or self._is_short(wanted) else DELIVERED
        refused = any(isinstance(error, WorkflowRejectedError) for error in self._errors)
        return USAGE if refused else FAILED


def falls_short(result: BatchResult | RowResult, size: int) -> bool:
    """Tell whether too few images were made; a video stands for all, a text for no image."""
    if len(result.images) >= size or any(output.kind != "text" for output in result.outputs):
        return False
    return bool(result.images) or not result.outputs


def tell_page(display: Display, write: Callable[[], Path | None], *, as_json: bool) -> bool:
    """Write the gallery and say where it is, so that a terminal makes a link of it.

    Args:
        display: Where it is told.
        write: Writes it, and returns None where there is nothing to show.
        as_json: Whether stdout is told why it cannot be written, too.

    Returns:
        Whether it could be written.
    """
    try:
        page = write()
    except OutputFileError as error:
        if as_json:
            display.result(json_line("error", **error_facts(error)))
        display.error(f"error: {error}")
        return False
    if page is not None:
        display.note(f"gallery: {page.resolve().as_uri()}")
    return True


def _path(file: WorkflowOutput) -> str:
    return str(file.path)


def _file_event(kind: str, file: WorkflowOutput) -> str:
    return json_line(
        kind,
        path=str(file.path),
        batch=file.batch_index,
        seed=file.seed,
        node=file.node_id,
        prompt_id=file.prompt_id,
        name=file.name,
    )


def counted(number: int, noun: str, wanted: int | None = None) -> str:
    """Word a number of things: `1 batch`, `2 batches`, `3 of 4 images`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    if wanted not in (None, number):
        return f"{number} of {wanted} {plural}"
    return f"1 {noun}" if number == 1 else f"{number} {plural}"


def json_line(event: str, **facts: Any) -> str:
    """Write an event as one line of ASCII, whatever is in it."""
    return json.dumps({"event": event, **facts}, default=str)


def error_facts(error: BaseException) -> dict[str, Any]:
    """Return what a program wants to know of an error."""
    facts = {"type": type(error).__name__, "message": str(error)}
    names: Sequence[str] = ("node_id", "class_type", "title", "exception_type", "traceback")
    if isinstance(error, NodeExecutionError):
        facts.update((name, getattr(error, name)) for name in names)
        facts["node"] = facts.pop("node_id")
    elif isinstance(error, WorkflowRejectedError):
        return {**facts, "problems": [asdict(problem) for problem in error.problems]}
    return facts


def error_text(error: BaseException) -> str:
    """Word an error for somebody who sits at a terminal: what happened, and which option helps."""
    text = str(error)
    if not isinstance(error, ComfyExecutorsError):
        return f"{type(error).__name__}: {text}"
    hint = _hint(error)
    return f"{text}\n{hint}" if hint else text


def _hint(error: ComfyExecutorsError) -> str:
    if isinstance(error, TemplateVariablesError) and error.missing:
        options = [f"{OPTION_OF.get(name) or f'--var {name}=TEXT'}" for name in error.missing]
        return f"give them with {' '.join(dict.fromkeys(options))}"
    if "RUNPOD_API_KEY" in str(error):
        return ""
    if isinstance(error, AuthenticationError):
        return "send a key with --header 'Name: value'"
    if isinstance(error, ServerUnreachableError) and "pass verify=" in str(error):
        return "--ca FILE names that CA"
    if isinstance(error, ServerUnreachableError):
        return "--server names another one; `comfy-executors demo` needs none"
    if isinstance(error, WorkflowRejectedError):
        return "`comfy-executors check` tells all that is wrong, without running anything"
    return ""
