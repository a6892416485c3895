"""What `GET /api/jobs/{id}` says of a prompt."""

from __future__ import annotations

from typing import Any

from comfy_executors.devserver.prompts import Prompt
from comfy_executors.devserver.versions import Behaviour

_PREVIEWABLE_KEYS = ("images", "video", "audio", "3d", "text")


def describe_job(
    found: Prompt | dict[str, Any], is_running: bool, behaviour: Behaviour
) -> dict[str, Any]:
    """Describe a prompt that waits or runs, or the history entry of one that ran."""
    if isinstance(found, Prompt):
        return _head("in_progress" if is_running else "pending", found.describe())
    return _finished(found, behaviour)


def _head(status: str, prompt: list[Any]) -> dict[str, Any]:
    number, prompt_id, graph, extra_data, _ = prompt
    return {
        "id": prompt_id,
        "status": status,
        "priority": number,
        "create_time": extra_data["create_time"],
        "workflow": {"prompt": graph, "extra_data": extra_data},
    }


def _finished(entry: dict[str, Any], behaviour: Behaviour) -> dict[str, Any]:
    messages = dict(entry["status"]["messages"])
    terminal = next(reversed(messages))
    statuses = {"execution_success": "completed", "execution_interrupted": "cancelled"}
    job = _head(statuses.get(terminal, "failed"), entry["prompt"])
    job["execution_start_time"] = messages["execution_start"]["timestamp"]
    job["execution_end_time"] = messages[terminal]["timestamp"]
    if terminal == "execution_error":
        job["execution_error"] = messages[terminal]
    files = _files(entry["outputs"])
    job["outputs_count"] = len(files)
    if behaviour.previewable_count:
        job["previewable_outputs_count"] = sum(
            file["mediaType"] in _PREVIEWABLE_KEYS for file in files
        )
    if files:
        job["preview_output"] = files[0]
    job["outputs"] = entry["outputs"]
    job["execution_status"] = entry["status"]
    return job


def _files(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**file, "nodeId": node_id, "mediaType": kind}
        for node_id, output in outputs.items()
        for kind, entries in output.items()
        for file in entries
        if isinstance(file, dict)
    ]
