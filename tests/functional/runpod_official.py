"""A stand-in for `worker-comfyui`, by its documents, under the RunPod SDK's own worker loop.

One graph a job; images of the history's `images` key that are not of type `temp`, in base64, with
their file names and nothing else; errors beside them.
"""

from __future__ import annotations

import base64
import os
import time
import uuid
from importlib import import_module
from typing import Any

import requests

COMFYUI = os.environ.get("COMFYUI_ADDRESS", "")
SHAPE = os.environ.get("OFFICIAL_SHAPE", "5")


def handler(job: dict[str, Any]) -> dict[str, Any]:
    request = job["input"]
    workflow = request.get("workflow")
    if workflow is None:
        return {"error": "Missing 'workflow' parameter"}
    for image in request.get("images") or ():
        data = base64.b64decode(image["image"].split(",", 1)[-1])
        files: Any = {"image": (image["name"], data, "image/png"), "overwrite": (None, "true")}
        _checked(requests.post(f"{COMFYUI}/upload/image", files=files, timeout=30))
    body = {"prompt": workflow, "client_id": str(uuid.uuid4())}
    answer = requests.post(f"{COMFYUI}/prompt", json=body, timeout=30)
    if answer.status_code == 400:
        return {"error": "Workflow validation failed:\n" + answer.text[:500]}
    entry = _wait_for(_checked(answer)["prompt_id"])
    errors = [
        f"Workflow execution error: Node ID: {data['node_id']}, {data['exception_message']}"
        for kind, data in entry["status"]["messages"]
        if kind == "execution_error"
    ]
    images = _images(entry["outputs"])
    if SHAPE == "4":
        return {"status": "success", "message": images[-1]["data"]}
    if images:
        return {"images": images, **({"errors": errors} if errors else {})}
    if errors:
        return {"error": "Job processing failed", "details": errors}
    return {"status": "success_no_images", "images": []}


def _wait_for(prompt_id: str) -> Any:
    while True:
        entry = _checked(requests.get(f"{COMFYUI}/history/{prompt_id}", timeout=30)).get(prompt_id)
        if entry is not None:
            return entry
        time.sleep(0.02)


def _images(outputs: dict[str, Any]) -> list[dict[str, str]]:
    images = []
    for output in outputs.values():
        for item in output.get("images", ()):
            if item["type"] != "temp":
                answer = requests.get(f"{COMFYUI}/view", params=item, timeout=30)
                data = base64.b64encode(answer.content).decode()
                images.append({"filename": item["filename"], "type": "base64", "data": data})
    return images


def _checked(answer: requests.Response) -> Any:
    answer.raise_for_status()
    return answer.json()


if __name__ == "__main__":
    import_module("runpod").serverless.start({"handler": handler})
