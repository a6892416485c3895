"""Run ComfyUI workflow templates from blocking Python code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_executors import executors
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    EndpointNotFoundError,
    ExecutorClosedError,
    GraphError,
    InputImageError,
    JobError,
    JobExpiredError,
    JobInterruptedError,
    JobLostError,
    JobOutputLostError,
    JobResultLostError,
    JobTimeoutError,
    MissingExtraError,
    NodeExecutionError,
    NodeProblem,
    OutputFileError,
    OutputMissingError,
    PayloadTooLargeError,
    PromptLostError,
    ResultsTakenError,
    RunPodJobFailedError,
    ServerError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnreachableError,
    SubmitUncertainError,
    TemplateError,
    TemplateJSONError,
    TemplateRenderError,
    TemplateSyntaxError,
    TemplateVariablesError,
    UIFormatError,
    WaitTimeoutError,
    WorkerLostError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowInterruptedError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.comfy_server import ComfyServerWorkflowExecutor
from comfy_executors.executors.dummy import DummyWorkflowExecutor
from comfy_executors.executors.sweep import RowResult
from comfy_executors.images import InputImage, WorkflowOutput, WorkflowOutputImage
from comfy_executors.runs import Batch, BatchResult, ProgressEvent, WorkflowRun
from comfy_executors.workflows import WorkflowTemplate

if TYPE_CHECKING:
    from comfy_executors.executors.modal import ModalWorkflowExecutor
    from comfy_executors.executors.runpod import (
        RunpodComfyWorkflowExecutor,
        RunPodWorkflowExecutor,
    )

__version__ = "0.2.0"

__all__ = [
    "AuthenticationError",
    "BaseWorkflowExecutor",
    "Batch",
    "BatchResult",
    "ComfyExecutorsError",
    "ComfyServerWorkflowExecutor",
    "DummyWorkflowExecutor",
    "EndpointNotFoundError",
    "ExecutorClosedError",
    "GraphError",
    "InputImage",
    "InputImageError",
    "JobError",
    "JobExpiredError",
    "JobInterruptedError",
    "JobLostError",
    "JobOutputLostError",
    "JobResultLostError",
    "JobTimeoutError",
    "MissingExtraError",
    "ModalWorkflowExecutor",
    "NodeExecutionError",
    "NodeProblem",
    "OutputFileError",
    "OutputMissingError",
    "PayloadTooLargeError",
    "ProgressEvent",
    "PromptLostError",
    "ResultsTakenError",
    "RowResult",
    "RunPodJobFailedError",
    "RunPodWorkflowExecutor",
    "RunpodComfyWorkflowExecutor",
    "ServerError",
    "ServerNotReadyError",
    "ServerResponseError",
    "ServerUnreachableError",
    "SubmitUncertainError",
    "TemplateError",
    "TemplateJSONError",
    "TemplateRenderError",
    "TemplateSyntaxError",
    "TemplateVariablesError",
    "UIFormatError",
    "WaitTimeoutError",
    "WorkerLostError",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowInterruptedError",
    "WorkflowOutput",
    "WorkflowOutputImage",
    "WorkflowRejectedError",
    "WorkflowRun",
    "WorkflowTemplate",
    "WorkflowTimeoutError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in executors.LATE:
        return getattr(executors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
