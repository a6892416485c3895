"""The input and the answer of `worker-comfyui`, the official worker, from version 5 on.

Callers who know that worker find the same here; what it drops (videos, audio and other files) is
in the answer, too.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from typing import Any

from comfy_executors.errors import InputImageError, WorkflowError, WorkflowRejectedError
from comfy_executors.wire import (
    Assembler,
    CompleteBatch,
    Failed,
    InputFile,
    JobDocument,
    JobGraph,
    WholeOutput,
    decode_base64,
    decode_document,
    encode_document,
)
from comfy_executors.workers.engine import Execution


def official_document(request: Any) -> JobDocument:
    """Make a job document of one batch of `{"workflow": …, "images": [{"name", "image"}]}`.

    Raises:
        WorkflowRejectedError: There is no workflow, or something that this worker cannot do.
        InputImageError: An input image is wrong.
    """
    if not isinstance(request, Mapping):
        raise _refusal("the input must be an object")
    graph, images = request.get("workflow"), request.get("images") or []
    if not isinstance(graph, dict):
        raise _refusal("the input needs a workflow: an object in ComfyUI's API format")
    if not isinstance(images, list):
        raise InputImageError("images must be a list of objects with name and image")
    files = [_file(item) for item in images]
    document = JobDocument(str(uuid.uuid4()), (JobGraph(0, 1, None, graph),), tuple(files))
    # By way of JSON, so that it is checked like any other.
    return decode_document(encode_document(document))


def official_key(request: Mapping[str, Any]) -> str | None:
    """Return the key of comfy.org in an input, if there is one.

    Raises:
        WorkflowRejectedError: It is no text.
    """
    key = request.get("comfy_org_api_key")
    if key is not None and not isinstance(key, str):
        raise _refusal("comfy_org_api_key must be a string")
    return key


def official_answer(execution: Execution) -> dict[str, Any]:
    """Run a document of one batch to its end and make the official worker's answer of it.

    Returns:
        `{"images": [{"filename", "type": "base64" or "s3_url", "data"}]}`, with `"status":
        "success_no_images"` where there are none, or `{"error": …}`.
    """
    assembler = Assembler([0])
    for raw in execution:
        for news in assembler.add(raw):
            if isinstance(news, Failed):
                return {"error": str(news.error)}
            if isinstance(news, CompleteBatch):
                images = [_image(output) for output in news.outputs if output.type != "text"]
                return {"images": images} if images else _nothing()
    raise WorkflowError("the job ended without a result")


def _nothing() -> dict[str, Any]:
    return {"status": "success_no_images", "images": []}


def _image(output: WholeOutput) -> dict[str, str]:
    if output.data is None:
        return {"filename": output.name, "type": "s3_url", "data": output.url or ""}
    data = base64.b64encode(output.data).decode()
    return {"filename": output.name, "type": "base64", "data": data}


def _file(raw: Any) -> InputFile:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str) or "image" not in raw:
        raise InputImageError("images must be a list of objects with name and image")
    return InputFile(raw["name"], decode_base64(raw["image"], raw["name"]))


def _refusal(message: str) -> WorkflowRejectedError:
    return WorkflowRejectedError((), message, kind="bad_input")
