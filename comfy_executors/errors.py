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
    │   ├── ServerResponseError         it answers something that no ComfyUI server would
    │   └── EndpointNotFoundError       RunPod does not know the endpoint, or Modal the app
    └── WorkflowError                   a batch failed
        ├── WorkflowRejectedError       the server refused the graph; nothing ran
        ├── NodeExecutionError          a node raised
        ├── WorkflowInterruptedError    somebody else stopped it
        ├── WorkflowTimeoutError        a deadline of ours passed (also a TimeoutError)
        ├── WorkflowCancelledError      we cancelled it (also a CancelledError)
        ├── PromptLostError             the server forgot it
        ├── OutputMissingError          it ran, but a file it reported cannot be had
        ├── PayloadTooLargeError        it is larger than the backend takes (also a ValueError)
        └── JobError                    a job of a serverless backend failed; `job_id` names it
            ├── SubmitUncertainError    whether the backend took the job is not known
            ├── RunPodJobFailedError    the worker reported an error
            ├── JobTimeoutError         a limit that the job was given passed (also a TimeoutError)
            ├── JobInterruptedError     somebody else cancelled it (also a WorkflowInterruptedError)
            ├── WorkerLostError         its worker died or fell silent
            ├── JobResultLostError      it completed, and its result is gone
            ├── JobLostError            the backend forgot it right after it took it (also a
            │   │                           PromptLostError)
            │   └── JobExpiredError     the backend does not know it, or its result, any more
            └── JobOutputLostError      it ended, and parts of what it made never came (also a
                                            PromptLostError)

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
    """The root of all exceptions that this library raises on purpose.

    The attribute `job_id` names the job of a serverless backend that it is about, if there is one.
    """

    job_id: str | None = None

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
        super().__init__(f"{package} is not installed: run pip install 'comfy-executors[{extra}]'")


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
        place = self._place()
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n{self.excerpt}" if self.excerpt else text

    def _place(self) -> str:
        return ", ".join(
            part
            for part in (
                self.source,
                self.line is not None and f"line {self.line}",
                self.column is not None and f"column {self.column}",
            )
            if part
        )


class TemplateSyntaxError(TemplateError):
    """Raised when Jinja cannot read a template."""


class TemplateRenderError(TemplateError):
    """Raised when Jinja stops while it renders: a filter fails, or the sandbox refuses."""


class TemplateJSONError(TemplateError):
    """Raised when the rendered text is not JSON; line and column are those of the rendered text.

    Where the template itself has the place, `template_line` and `template_column` name it.
    """

    template_line: int | None = None
    template_column: int | None = None

    def _place(self) -> str:
        place = super()._place()
        there = (self.template_line, self.template_column)
        if self.template_line is None or there == (self.line, self.column):
            return place
        return f"{place} (in the template line {there[0]}, column {there[1]})"


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
    somebody cleared its queue. On RunPod and Modal also when ComfyUI died before it came to it."""


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


class EndpointNotFoundError(ServerError):
    """Raised when RunPod does not know the endpoint, or not under this key, or Modal the app."""


class PayloadTooLargeError(WorkflowError, ValueError):
    """Raised when a job is larger than its backend takes; nothing of it was queued.

    Args:
        message: What is too large and what to do.
        size: The size of the request, in bytes.
        limit: The largest size that the backend takes, in bytes.
        server: The address of the backend, without keys.
    """

    def __init__(self, message: str, *, size: int, limit: int, server: str | None = None) -> None:
        self.size = size
        self.limit = limit
        super().__init__(message, server=server)


class JobError(WorkflowError):
    """Raised when a job of a serverless backend fails.

    Args:
        message: What happened and what to do.
        job_id: The backend's id of the job; None when it never told one.
        server: The address of the backend, without keys.
    """

    def __init__(
        self, message: str = "", *, job_id: str | None = None, server: str | None = None
    ) -> None:
        self.job_id = job_id
        super().__init__(message, server=server)

    def __str__(self) -> str:
        return f"job {self.job_id}: {self.message}" if self.job_id else self.message


class SubmitUncertainError(JobError):
    """Raised when a job was sent and its answer never came: it may be queued, or not.

    Args:
        message: What happened and what to do.
        request_id: Our own id of the job, which its input carries.
        server: The address of the backend, without keys.
    """

    def __init__(
        self, message: str, *, request_id: str | None = None, server: str | None = None
    ) -> None:
        self.request_id = request_id
        super().__init__(message, server=server)


class RunPodJobFailedError(JobError):
    """Raised when the worker of a RunPod endpoint reports that a job failed.

    Args:
        reason: What the worker said, without a traceback.
        job_id: The job.
        exception_type: The name of the exception on the worker, such as `RuntimeError`, if it
            was one.
        traceback: Its traceback as the worker sent it; paths are the worker's.
        details: Further sentences of the worker, such as one for each node that is wrong.
        worker_id: The worker that ran it.
        server: The address of the endpoint, without keys.
    """

    def __init__(
        self,
        reason: str,
        *,
        job_id: str | None = None,
        exception_type: str | None = None,
        traceback: str = "",
        details: Sequence[str] = (),
        worker_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.reason = reason
        self.exception_type = exception_type
        self.traceback = traceback
        self.details = tuple(details)
        self.worker_id = worker_id
        text = f"{exception_type}: {reason}" if exception_type else reason
        super().__init__("; ".join(("failed: " + text, *details)), job_id=job_id, server=server)


class JobTimeoutError(JobError, _Timeout):
    """Raised when a job ran, or waited, longer than the limits that it was submitted with.

    Args:
        message: What happened and what to do.
        started: Whether a worker had begun it.
        job_id: The job.
        server: The address of the backend, without keys.
    """

    def __init__(
        self,
        message: str,
        *,
        started: bool,
        job_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.started = started
        super().__init__(message, job_id=job_id, server=server)


class JobInterruptedError(JobError, WorkflowInterruptedError):
    """Raised when a job was cancelled by somebody else, or its queue was purged."""


class WorkerLostError(JobError):
    """Raised when the worker of a job died or fell silent, and the backend gave the job up.

    Args:
        message: What happened and what to do.
        retries: How often the backend had begun the job anew.
        job_id: The job.
        worker_id: The worker that had it last.
        server: The address of the backend, without keys.
    """

    def __init__(
        self,
        message: str,
        *,
        retries: int | None = None,
        job_id: str | None = None,
        worker_id: str | None = None,
        server: str | None = None,
    ) -> None:
        self.retries = retries
        self.worker_id = worker_id
        super().__init__(message, job_id=job_id, server=server)


class JobResultLostError(JobError):
    """Raised when a job completed without a result: it made none, or one that is too large."""


class JobLostError(JobError, PromptLostError):
    """Raised when the backend does not know a job that it took a moment ago."""


class JobExpiredError(JobLostError):
    """Raised when the backend does not know a job any more: it, or its result, expired or was
    lost."""


class JobOutputLostError(JobError, PromptLostError):
    """Raised when a job ended, but parts of what its batches made never arrived."""
