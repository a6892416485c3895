"""Stand-ins for what tests should not need an account for.

::

    from comfy_executors.testing import RunPodStub

    with RunPodStub() as stub:
        executor = RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url)

It needs the extra `devserver`, and `ModalEdge` the extra `modal-worker`, too. The stand-in for
ComfyUI itself is `comfy_executors.devserver`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_executors.errors import MissingExtraError

try:
    import aiohttp as _aiohttp  # noqa: F401
except ImportError as error:
    raise MissingExtraError("aiohttp", extra="devserver") from error

from comfy_executors.testing.runpod_faults import RunPodFaults
from comfy_executors.testing.runpod_process import RunPodWorkerProcess
from comfy_executors.testing.runpod_records import JobRecord, Limits
from comfy_executors.testing.runpod_stub import RunPodStub

if TYPE_CHECKING:
    from comfy_executors.testing.modal_edge import EdgeLimits, ModalEdge
    from comfy_executors.testing.modal_faults import ModalFaults

__all__ = [
    "EdgeLimits",
    "JobRecord",
    "Limits",
    "ModalEdge",
    "ModalFaults",
    "RunPodFaults",
    "RunPodStub",
    "RunPodWorkerProcess",
]


def __getattr__(name: str) -> Any:
    # Late: who tests for RunPod need not install what only Modal's stand-in is made of.
    if name in ("EdgeLimits", "ModalEdge"):
        from comfy_executors.testing import modal_edge

        return getattr(modal_edge, name)
    if name == "ModalFaults":
        from comfy_executors.testing import modal_faults

        return modal_faults.ModalFaults
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
