"""The ways in which the RunPod stub can be told to misbehave."""

from __future__ import annotations

from collections.abc import Callable

from comfy_executors.devserver.faults import Faults

STUCK_QUEUES = ("throttled", "unhealthy", "no workers")


class RunPodFaults(Faults):
    """Misbehaviour that can be switched on and off at any time, from any thread.

    `fail`, `delay`, `reset_before`, `reset_after`, `truncate` and `refuse_connections` are those
    of the dev server, for paths below the endpoint: `/run`, `/status/*`, `/job-done/*`. So

    - an answer that comes late is `delay("POST", "/run", seconds)`,
    - a submit that never arrived is `reset_before("POST", "/run")`, one whose answer was lost
      `reset_after("POST", "/run")`,
    - chunks lost with an answer are `reset_after("GET", "/stream/*")`,
    - a bad gateway is `fail("GET", "/status/*")`, a job that is not known yet
      `fail("GET", "/status/*", status=404, times=3)`, too many calls
      `fail("POST", "/run", status=429, headers={"Retry-After": "1"})`.

    What the dev server does to websockets means nothing here.

    Attributes:
        timeout_status: How a job ends that ran longer than its executionTimeout: `FAILED` with
            an error that says so, as seen, or `TIMED_OUT`, as documented.
    """

    def __init__(self, on_refuse: Callable[[bool], None], on_stuck: Callable[[], None]) -> None:
        super().__init__(on_refuse)
        self._on_stuck = on_stuck
        self._forget()

    def _forget(self) -> None:
        self.timeout_status = "FAILED"
        self._stuck_queue: str | None = None
        self._duplicates = 0
        self._lost_results = 0
        self._silences: list[int] = []
        self._lost_chunks: list[int] = []

    @property
    def stuck_queue(self) -> str | None:
        """Why no worker takes a job, as /health shows it; None while they do.

        Raises:
            ValueError: Set to anything else than `throttled`, `unhealthy` or `no workers`.
        """
        return self._stuck_queue

    @stuck_queue.setter
    def stuck_queue(self, value: str | None) -> None:
        if value is not None and value not in STUCK_QUEUES:
            raise ValueError(f"a queue is stuck for one of {STUCK_QUEUES}, not {value!r}")
        self._stuck_queue = value
        self._on_stuck()

    def execute_twice(self, times: int = 1) -> None:
        """Give the next jobs that are taken to a second worker as well, or to the same one after.

        The first result counts; the chunks of both are streamed.
        """
        with self._lock:
            self._duplicates += times

    def lose_result(self, times: int = 1) -> None:
        """Refuse the next results, as if they were too large: COMPLETED without output."""
        with self._lock:
            self._lost_results += times

    def silence_worker(self, after_chunks: int = 0, times: int = 1) -> None:
        """Hear nothing more of the next executions after so many chunks, pings included."""
        with self._lock:
            self._silences += [after_chunks] * times

    def lose_chunk(self, number: int, times: int = 1) -> None:
        """Drop a chunk that the worker believes delivered: the n-th of an execution, from 0."""
        with self._lock:
            self._lost_chunks += [number] * times

    def clear(self) -> None:
        """Switch every fault off."""
        super().clear()
        with self._lock:
            self._forget()
        self._on_stuck()

    # For the platform.

    def takes_twice(self) -> bool:
        with self._lock:
            twice = self._duplicates > 0
            self._duplicates -= twice
            return twice

    def loses_result(self) -> bool:
        with self._lock:
            loses = self._lost_results > 0
            self._lost_results -= loses
            return loses

    def loses_chunk(self, number: int) -> bool:
        with self._lock:
            loses = number in self._lost_chunks
            if loses:
                self._lost_chunks.remove(number)
            return loses

    def deaf_after(self) -> int | None:
        with self._lock:
            return self._silences.pop(0) if self._silences else None
