"""What tests see of the RunPod stub, and the limits that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class JobRecord:
    """One job that the stub took, as it is now.

    Args:
        id: Its id.
        input: Its input; None when it was empty, which RunPod loses.
        policy: Its policy as it was sent, in milliseconds.
        status: Its status in RunPod's words.
        output: Its result, or the latest progress.
        error: Its error as the worker or the platform put it.
        workers: The workers that began it, in order: as many as its executions.
        retries: How often the platform began it anew.
        chunks: How many chunks workers posted for it and the platform kept.
        lost_chunks: How many the platform dropped: too large, late, or by a fault.
        delivered: How many chunks were handed out, over connections that broke as well.
        known: Whether the client API still knows it.
    """

    id: str
    input: Any
    policy: Mapping[str, Any]
    status: str
    output: Any
    error: Any
    workers: tuple[str, ...]
    retries: int
    chunks: int
    lost_chunks: int
    delivered: int
    known: bool

    @property
    def executions(self) -> int:
        """How often a worker began it."""
        return len(self.workers)


def _documented_calls() -> dict[str, tuple[int, int]]:
    return {
        "run": (1000, 200),
        "runsync": (2000, 400),
        "status": (2000, 400),
        "stream": (2000, 400),
        "cancel": (100, 20),
        "purge-queue": (2, 2),
    }


@dataclass
class Limits:
    """The limits of the platform, as documented; a test may change them at any time.

    Args:
        run_bytes: The largest body of /run, and the largest result of such a job.
        runsync_bytes: The same for /runsync.
        chunk_bytes: The largest chunk that a worker may yield.
        retention: Seconds for which the result of a job is kept.
        sync_retention: The same for /runsync.
        worker_silence: Seconds without a ping, chunk or result after which a worker is given up.
        worker_poll: Seconds for which a worker's question for a job or a stop is held.
        calls: Calls within 10 seconds and at once, by operation; more are answered with 429.
    """

    run_bytes: int = 10_000_000
    runsync_bytes: int = 20_000_000
    chunk_bytes: int = 1_000_000
    retention: float = 1800.0
    sync_retention: float = 60.0
    worker_silence: float = 30.0
    worker_poll: float = 10.0
    calls: dict[str, tuple[int, int]] = field(default_factory=_documented_calls)
