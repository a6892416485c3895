"""How the ComfyUI versions differ that the dev server can stand in for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Behaviour:
    """What one ComfyUI version does.

    Args:
        version: What `GET /system_stats` names.
        own_prompt_id: Whether the server takes the client's `prompt_id`.
        uuid_prompt_id: Whether that id must be a canonical UUID.
        jobs: Whether `GET /api/jobs/{id}` exists.
        cancel: Whether `POST /api/jobs/{id}/cancel` and `POST /api/jobs/cancel` exist.
        targeted_interrupt: Whether `POST /interrupt` looks at the `prompt_id` it is sent.
        feature_flags: Whether the server answers feature flags and sends previews with metadata.
        progress_state: Whether `progress_state` messages are sent.
        detailed_errors: Whether a rejected graph names missing node types and cycles.
        previewable_count: Whether a finished job has `previewable_outputs_count`.
        cached_executed: Whether `executed` is sent for cached nodes; else their outputs are in the
            history only.
    """

    version: str
    own_prompt_id: bool = True
    uuid_prompt_id: bool = True
    jobs: bool = True
    cancel: bool = True
    targeted_interrupt: bool = True
    feature_flags: bool = True
    progress_state: bool = True
    detailed_errors: bool = True
    previewable_count: bool = True
    cached_executed: bool = True


_BEHAVIOURS = (
    Behaviour("0.33.0"),
    Behaviour(
        "0.8.0",
        uuid_prompt_id=False,
        cancel=False,
        detailed_errors=False,
        previewable_count=False,
    ),
    Behaviour(
        "0.3.40",
        own_prompt_id=False,
        uuid_prompt_id=False,
        jobs=False,
        cancel=False,
        targeted_interrupt=False,
        feature_flags=False,
        progress_state=False,
        detailed_errors=False,
        previewable_count=False,
    ),
    Behaviour(
        "0.0.8",
        own_prompt_id=False,
        uuid_prompt_id=False,
        jobs=False,
        cancel=False,
        targeted_interrupt=False,
        feature_flags=False,
        progress_state=False,
        detailed_errors=False,
        previewable_count=False,
        cached_executed=False,
    ),
)


def behaviour_of(version: str) -> Behaviour:
    """Return what a ComfyUI version does.

    Raises:
        ValueError: The dev server does not know this version.
    """
    for behaviour in _BEHAVIOURS:
        if behaviour.version == version:
            return behaviour
    known = ", ".join(behaviour.version for behaviour in _BEHAVIOURS)
    raise ValueError(f"unknown ComfyUI version {version!r}; the dev server knows {known}")
