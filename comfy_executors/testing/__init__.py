"""Stand-ins for what tests should not need an account for.

::

    from comfy_executors.testing import RunPodStub

    with RunPodStub() as stub:
        executor = RunPodWorkflowExecutor(stub.endpoint_id, stub.api_key, stub.url)

It needs the extra `devserver`. The stand-in for ComfyUI itself is `comfy_executors.devserver`.
"""

from __future__ import annotations

from comfy_executors.errors import MissingExtraError

try:
    import aiohttp as _aiohttp  # noqa: F401
except ImportError as error:
    raise MissingExtraError("aiohttp", extra="devserver") from error

from comfy_executors.testing.runpod_faults import RunPodFaults
from comfy_executors.testing.runpod_process import RunPodWorkerProcess
from comfy_executors.testing.runpod_records import JobRecord, Limits
from comfy_executors.testing.runpod_stub import RunPodStub

__all__ = ["JobRecord", "Limits", "RunPodFaults", "RunPodStub", "RunPodWorkerProcess"]
