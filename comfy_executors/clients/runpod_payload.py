"""What RunPod is sent: measured and checked before it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_executors.errors import PayloadTooLargeError

MAX_PAYLOAD_BYTES = 10_000_000  # RunPod says "MB"; the smaller reading of it
EXECUTION_TIMEOUT_SECONDS = (5.0, 7 * 86400.0)
TTL_SECONDS = (10.0, 7 * 86400.0)


def encode(input: Mapping[str, Any], execution_timeout: float, ttl: float, server: str) -> bytes:
    """Make the body of a submit.

    Args:
        input: The job's input.
        execution_timeout: Seconds that the job may run.
        ttl: Seconds after which RunPod forgets it.
        server: The address of the endpoint, for the error.

    Raises:
        ValueError: An argument is out of range, or `input` is not JSON.
        PayloadTooLargeError: It is larger than RunPod takes.
    """
    if not isinstance(input, Mapping) or not input:
        raise ValueError("the input of a RunPod job is a JSON object that is not empty")
    check_range("execution_timeout", execution_timeout, EXECUTION_TIMEOUT_SECONDS)
    check_range("ttl", ttl, TTL_SECONDS)
    policy = {"executionTimeout": int(execution_timeout * 1000), "ttl": int(ttl * 1000)}
    document = {"input": input, "policy": policy}
    body = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_PAYLOAD_BYTES:
        raise too_large(len(body), server)
    return body


def too_large(size: int, server: str) -> PayloadTooLargeError:
    """Make the error for a body of so many bytes."""
    return PayloadTooLargeError(
        f"the job is {size:,} bytes as JSON, and RunPod takes {MAX_PAYLOAD_BYTES:,}: pass large "
        "input images as https URLs, or fewer of them",
        size=size,
        limit=MAX_PAYLOAD_BYTES,
        server=server,
    )


def check_range(name: str, value: float, bounds: tuple[float, float]) -> None:
    """Raise ValueError for a time that RunPod does not take."""
    low, high = bounds
    if not low <= value <= high:
        raise ValueError(f"{name} is from {low:g} to {high:g} seconds, not {value:g}")
