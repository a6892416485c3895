"""The executors: each runs workflow templates somewhere, and all take the same calls."""

from comfy_executors.errors import WorkflowError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.comfy_server import ComfyServerWorkflowExecutor
from comfy_executors.executors.dummy import DummyWorkflowExecutor
from comfy_executors.executors.runpod import RunpodComfyWorkflowExecutor, RunPodWorkflowExecutor
from comfy_executors.images import WorkflowOutputImage

__all__ = [
    "BaseWorkflowExecutor",
    "ComfyServerWorkflowExecutor",
    "DummyWorkflowExecutor",
    "RunPodWorkflowExecutor",
    "RunpodComfyWorkflowExecutor",
    "WorkflowError",
    "WorkflowOutputImage",
]
