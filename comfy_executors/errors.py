"""The exceptions of comfy-executors, in one tree.

::

    ComfyExecutorsError
    ├── MissingExtraError               an optional package is not installed (also an ImportError)
    ├── ExecutorClosedError             work was given to a closed executor (also a RuntimeError)
    ├── ResultsTakenError               results were asked for that iteration handed out already
    ├── WaitTimeoutError                a wait took too long; the run goes on (also a TimeoutError)
    ├── TemplateError                   a workflow template is wrong (also a ValueError)
    │   ├── TemplateSyntaxError         Jinja cannot read it
    │   ├── TemplateVariablesError      variables are missing or unknown
    │   ├── TemplateRenderError         Jinja stopped while rendering
    │   └── TemplateJSONError           what was rendered is not JSON
    ├── GraphError                      the graph is no API-format workflow (also a ValueError)
    │   └── UIFormatError               it is in ComfyUI's UI format
    ├── InputImageError                 an input image cannot be used (also a ValueError)
    ├── OutputFileError                 an output cannot be saved or opened
    ├── ServerError                     a server cannot be used
    │   ├── ServerUnreachableError      nobody answers
    │   ├── ServerNotReadyError         it did not become ready in time (also a TimeoutError)
    │   ├── AuthenticationError         it answers 401 or 403
    │   └── ServerResponseError         it answers something that no ComfyUI server would
    └── WorkflowError                   a batch failed
        ├── WorkflowRejectedError       the server refused the graph; nothing ran
        ├── NodeExecutionError          a node raised
        ├── WorkflowInterruptedError    somebody else stopped it
        ├── WorkflowTimeoutError        a deadline of ours passed (also a TimeoutError)
        ├── WorkflowCancelledError      we cancelled it (also a CancelledError)
        ├── PromptLostError             the server forgot it
        └── OutputMissingError          it ran, but a file it reported cannot be had

Facts are attributes; the sentence is made from them. All of them can be pickled.
"""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

if sys.version_info >= (3, 11):
    _Timeout = TimeoutError
else:
    # Before 3.11 these are two classes; whoever waits on futures catches the second.
    class _Timeout(TimeoutError, concurrent.futures.TimeoutError):
        pass


def _rebuild(cls: type[ComfyExecutorsError], state: dict[str, Any]) -> ComfyExecutorsError:
    error: ComfyExecutorsError = cls.__new__(cls)
    error.__dict__.update(state)
    error.args = (str(error),)
    return error


class ComfyExecutorsError(Exception):
    """The root of all exceptions that this library raises on purpose."""

    def __init__(self, message: str = "") -> None:
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        # The default would call __init__ with `args`, which only fits one-argument constructors.
        return _rebuild, (type(self), self.__dict__.copy())


class MissingExtraError(ComfyExecutorsError, ImportError):
    """Raised when an optional package is needed and not installed.

    Args:
        package: The package that could not be imported.
        extra: The extra of comfy-executors that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{package} is not installed: run pip install 'comfy-executors[{extra}]'"
        )


class ExecutorClosedError(ComfyExecutorsError, RuntimeError):
    """Raised when a closed executor is given work."""


class ResultsTakenError(ComfyExecutorsError):
    """Raised when `futures` or `result()` is asked for after iteration has handed out images."""


class WaitTimeoutError(ComfyExecutorsError, _Timeout):
    """Raised when `result(timeout)` or another wait takes too long; the work itself goes on."""


class TemplateError(ComfyExecutorsError, ValueError):
    """Raised when a workflow template is wrong.

    Args:
        message: What is wrong.
        line: The line of the template or of the rendered text, from 1.
        column: The column, from 1.
        excerpt: The lines around it, with a marker.
        source: The file or URL that the template came from.
    """

    def __init__(
        self,
        message: str,
        *,
        line: int | None = None,
        column: int | None = None,
        excerpt: str | None = None,
        source: str | None = None,
    ) -> None:
        self.line = line
        self.column = column
        self.excerpt = excerpt
        self.source = source
        super().__init__(message)

    def __str__(self) -> str:
        place = ", ".join(
            part
            for part in (
                self.source,
                self.line is not None and f"line {self.line}",
                self.column is not None and f"column {self.column}",
            )
            if part
        )
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n{self.excerpt}" if self.excerpt else text


class TemplateSyntaxError(TemplateError):
    """Raised when Jinja cannot read a template."""


class TemplateRenderError(TemplateError):
    """Raised when Jinja stops while it renders: a filter fails, or the sandbox refuses."""


class TemplateJSONError(TemplateError):
    """Raised when the rendered text is not JSON; line and column are those of the rendered text."""


class TemplateVariablesError(TemplateError):
    """Raised when a template is given too few variables, or some that it does not have.

    Args:
        message: The sentence to show.
        missing: The variables that the template wants and did not get.
        unknown: The variables that were given and that the template does not have.
        known: All variables of the template.
        source: The file or URL that the template came from.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unknown: Iterable[str] = (),
        known: Iterable[str] = (),
        source: str | None = None,
    ) -> None:
        self.missing = tuple(missing)
        self.unknown = tuple(unknown)
        self.known = tuple(known)
        super().__init__(message, source=source)


class GraphError(ComfyExecutorsError, ValueError):
    """Raised when a graph is not a workflow in ComfyUI's API format.

    Args:
        message: What is wrong.
        node_id: The node concerned, if it is one node.
    """

    def __init__(self, message: str, *, node_id: str | None = None) -> None:
        self.node_id = node_id
        super().__init__(message)


class UIFormatError(GraphError):
    """Raised when a workflow is in ComfyUI's UI format, which its HTTP API does not take."""


class InputImageError(ComfyExecutorsError, ValueError):
    """Raised when an input image cannot be read, or the template has no place for it."""


class OutputFileError(ComfyExecutorsError):
    """Raised when an output cannot be saved, or cannot be opened as an image."""


class ServerError(ComfyExecutorsError):
    """Raised when a server cannot be used.

    Args:
        message: What happened and what to do.
        server: The address of the server, without keys.
        status: The HTTP status of its answer, if there was one.
        transient: Whether the same call may work a little later.
        maybe_received: Whether the server may have got the call, though its answer is missing.
        retry_after: Seconds to wait that the server asked for.
    """

    def __init__(
        self,
        message: str,
        server: str | None = None,
        status: int | None = None,
        *,
        transient: bool = False,
        maybe_received: bool = True,
        retry_after: float | None = None,
    ) -> None:
        self.server = server
        self.status = status
        self.transient = transient
        self.maybe_received = maybe_received
        self.retry_after = retry_after
        super().__init__(message)


class ServerUnreachableError(ServerError):
    """Raised when no server answers: wrong address, refused, timed out, or gone for too long."""


class ServerNotReadyError(ServerError, _Timeout):
    """Raised when a server does not become ready within the time given."""


class AuthenticationError(ServerError):
    """Raised when a server, or a proxy in front of it, answers 401 or 403."""


class ServerResponseError(ServerError):
    """Raised when an answer is none that a ComfyUI server would give, such as an HTML page."""


class WorkflowError(ComfyExecutorsError):
    """Raised when a batch fails.

    Args:
        message: What happened.
        prompt_id: The prompt concerned, when it was queued.
        server: The address of the server, without keys.

    The attribute `batch_index` names the batch, from 0, once its run has taken note of the error.
    """

    def __init__(
        self, message: str = "", *, prompt_id: str | None = None, server: str | None = None
    ) -> None:
        self.prompt_id = prompt_id
        self.server = server
        self.batch_index: int | None = None
        super().__init__(message)


@dataclass(frozen=True)
class NodeProblem:
    """One thing that is wrong with one node of a graph.

    Args:
        node_id: The node's id in the graph.
        class_type: Its class.
        title: Its title, where the graph has one.
        input_name: The input concerned, where it is one input.
        value: The value that was given.
        kind: The server's own name for the kind of problem, such as `value_not_in_list`.
        reason: Why it is wrong, as a sentence part.
        nearest: What exists and looks like the value, best first.
    """

    node_id: str
    class_type: str | None
    title: str | None
    input_name: str | None
    value: Any
    kind: str
    reason: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = node_label(self.node_id, self.title, self.class_type)
        if self.input_name:
            where += f", input {self.input_name}"
        text = f"{where}: {self.reason}"
        if self.nearest:
            text += f"; nearest: {', '.join(self.nearest)}"
        return text


def node_label(node_id: str, title: str | None, class_type: str | None) -> str:
    """Name a node as people know it: `Node 4 "Load Checkpoint" (CheckpointLoaderSimple)`."""
    label = f"Node {node_id}"
    if title:
        label += f' "{title}"'
    if class_type:
        label += f" ({class_type})"
    return label


class WorkflowRejectedError(WorkflowError):
    """Raised when a server refuses a graph, wholly or in part, before anything ran.

    Args:
        problems: What is wrong, node by node; may be empty.
        message: The server's own sentence, used where no problem is named.
        kind: The server's own name for the whole refusal, such as `missing_node_type`.
        prompt_id: The prompt concerned, when the valid part of it was queued.
        server: The address of the server, without keys.
    """

    def __init__(
        self,
        problems: Sequence[NodeProblem],
        message: str = "",
        *,
        kind: str = "",
        prompt_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.problems = tuple(problems)
        self.kind = kind
        super().__init__(message, prompt_id=prompt_id, server=server)

    def __str__(self) -> str:
        if not self.problems:
            return f"the server refused the workflow: {self.message or self.kind}"
        return "\n".join(str(problem) for problem in self.problems)


class NodeExecutionError(WorkflowError):
    """Raised when a node raises an exception while it runs.

    Args:
        node_id: The node's id in the graph.
        class_type: Its class.
        title: Its title, where the graph has one.
        exception_type: The name of the exception on the server, such as `RuntimeError`.
        exception_message: Its message.
        traceback: Its traceback as the server sent it; paths are the server's.
        prompt_id: The prompt concerned.
        server: The address of the server, without keys.
    """

    def __init__(
        self,
        *,
        node_id: str,
        class_type: str | None,
        title: str | None,
        exception_type: str,
        exception_message: str,
        traceback: str = "",
        prompt_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.node_id = node_id
        self.class_type = class_type
        self.title = title
        self.exception_type = exception_type
        self.exception_message = exception_message
        self.traceback = traceback
        where = node_label(node_id, title, class_type)
        super().__init__(
            f"{where} failed: {exception_type}: {exception_message}",
            prompt_id=prompt_id,
            server=server,
        )


class WorkflowInterruptedError(WorkflowError):
    """Raised when a prompt was interrupted by somebody else."""


class WorkflowTimeoutError(WorkflowError, _Timeout):
    """Raised when `timeout` or `batch_timeout` passed; what ran was interrupted."""


class WorkflowCancelledError(WorkflowError, concurrent.futures.CancelledError):
    """Raised when a batch was cancelled by `cancel()`, by leaving `with` on an error, or by an
    error of another batch."""


class PromptLostError(WorkflowError):
    """Raised when a prompt is in neither the queue nor the history: the server restarted, or
    somebody cleared its queue."""


class OutputMissingError(WorkflowError):
    """Raised when a prompt ended well, but an output that it reported cannot be had.

    Args:
        message: What is missing.
        cached: Whether the server answered from its cache, so that a new run with the cache
            broken makes the output again.
        node_id: The node that reported it.
        prompt_id: The prompt concerned.
        server: The address of the server, without keys.
    """

    def __init__(
        self,
        message: str,
        *,
        cached: bool = False,
        node_id: str | None = None,
        prompt_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.cached = cached
        self.node_id = node_id
        super().__init__(message, prompt_id=prompt_id, server=server)
