"""A job of the RunPod stub, as the platform keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_executors.testing.runpod_records import JobRecord

TERMINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})


@dataclass
class Execution:
    """One time that a worker began a job."""

    worker_id: str
    deaf_after: int | None
    last_seen: float
    posted: int = 0
    abandoned: bool = False

    @property
    def is_heard(self) -> bool:
        deaf = self.deaf_after is not None and self.posted >= self.deaf_after
        return not deaf and not self.abandoned


@dataclass
class StubJob:
    """A job; changed on the loop's thread only, under the platform's lock."""

    id: str
    input: Any
    policy: Mapping[str, Any]
    result_bytes: int
    retention: float
    submitted: float
    status: str = "IN_QUEUE"
    output: Any = None
    error: Any = None
    started: float | None = None
    ended: float | None = None
    retries: int = 0
    executions: list[Execution] = field(default_factory=list)
    buffered: list[Any] = field(default_factory=list)
    chunks: int = 0
    lost_chunks: int = 0
    delivered: int = 0
    known: bool = True
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    def seconds(self, policy: str, default: float) -> float:
        """Return a time of the policy, which is in milliseconds."""
        value = self.policy.get(policy)
        return value / 1000 if isinstance(value, (int, float)) else default

    def record(self) -> JobRecord:
        workers = tuple(execution.worker_id for execution in self.executions)
        return JobRecord(
            id=self.id,
            input=self.input,
            policy=self.policy,
            status=self.status,
            output=self.output,
            error=self.error,
            workers=workers,
            retries=self.retries,
            chunks=self.chunks,
            lost_chunks=self.lost_chunks,
            delivered=self.delivered,
            known=self.known,
        )

    def status_object(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.started is not None:
            fields["delayTime"] = int(1000 * (self.started - self.submitted))
            fields["workerId"] = self.executions[-1].worker_id
            if self.ended is not None:
                fields["executionTime"] = int(1000 * (self.ended - self.started))
        for name in ("output", "error"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        if self.retries:
            fields["retries"] = self.retries
        return fields
