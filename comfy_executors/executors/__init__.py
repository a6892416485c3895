"""The executors: each runs workflow templates somewhere, and all take the same calls."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from comfy_executors.errors import WorkflowError
from comfy_executors.executors.base import BaseWorkflowExecutor
from comfy_executors.executors.comfy_server import ComfyServerWorkflowExecutor
from comfy_executors.executors.dummy import DummyWorkflowExecutor
from comfy_executors.images import WorkflowOutputImage

if TYPE_CHECKING:
    from comfy_executors.executors.modal import ModalWorkflowExecutor
    from comfy_executors.executors.runpod import (
        RunpodComfyWorkflowExecutor,
        RunPodWorkflowExecutor,
    )

__all__ = [
    "BaseWorkflowExecutor",
    "ComfyServerWorkflowExecutor",
    "DummyWorkflowExecutor",
    "ModalWorkflowExecutor",
    "RunPodWorkflowExecutor",
    "RunpodComfyWorkflowExecutor",
    "WorkflowError",
    "WorkflowOutputImage",
]

# What runs on RunPod and Modal is half of the package, and is imported by those who use it.
LATE = {
    "ModalWorkflowExecutor": "modal",
    "RunPodWorkflowExecutor": "runpod",
    "RunpodComfyWorkflowExecutor": "runpod",
}


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module(f"{__name__}.{LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
