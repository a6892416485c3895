"""The queue of the RunPod stub: what becomes of jobs, whoever asks over which route."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from comfy_executors.devserver.records import Journal
from comfy_executors.testing.runpod_faults import RunPodFaults
from comfy_executors.testing.runpod_jobs import Execution, StubJob
from comfy_executors.testing.runpod_records import JobRecord, Limits

T = TypeVar("T")

_WORKER_MEMORY = 30.0


class Platform:
    """All jobs of the endpoint. Its methods are called on the loop's thread, but for `records`.

    Args:
        loop: The loop.
        limits: The limits.
        faults: The faults that are switched on.
        journal: Told whenever something happened.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        faults: RunPodFaults,
        journal: Journal,
    ) -> None:
        self._loop = loop
        self._limits = limits
        self._faults = faults
        self._journal = journal
        self._lock = threading.RLock()
        self._waiting: set[asyncio.Future[None]] = set()
        self._forget()

    def _forget(self) -> None:
        self._jobs: list[StubJob] = []
        self._by_id: dict[str, StubJob] = {}
        self._queue: list[StubJob] = []
        self._stops: defaultdict[str, list[str]] = defaultdict(list)
        self._workers: dict[str, float] = {}
        self._stopped_workers: list[str] = []

    def clear(self) -> None:
        """Forget everything; workers that run something are told to stop."""
        with self._lock:
            stops = defaultdict(list, self._stops)
            for job in self._jobs:
                if job.status == "IN_PROGRESS":
                    stops[job.executions[-1].worker_id].append(job.id)
                for timer in job.timers.values():
                    timer.cancel()
            self._forget()
            self._stops = stops
        self.notify()

    @property
    def records(self) -> list[JobRecord]:
        with self._lock:
            return [job.record() for job in self._jobs]

    @property
    def stopped_workers(self) -> list[str]:
        with self._lock:
            return list(self._stopped_workers)

    # Waiting.

    def notify(self) -> None:
        """Wake everybody who waits for something to happen."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._journal.happened()

    async def until(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """Look again whenever something happened; None when it was not there in time."""
        deadline = self._loop.time() + seconds
        while (found := look()) is None:
            left = deadline - self._loop.time()
            if left <= 0:
                return None
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.add(future)
            try:
                await asyncio.wait([future], timeout=left)
            finally:
                self._waiting.discard(future)
        return found

    # The client's side.

    def find(self, job_id: str) -> StubJob | None:
        job = self._by_id.get(job_id)
        return job if job is not None and job.known else None

    def submit(self, body: Mapping[str, Any], *, sync: bool) -> StubJob:
        policy = body.get("policy")
        job = StubJob(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-u1",
            input=body["input"] or None,
            policy=policy if isinstance(policy, dict) else {},
            result_bytes=self._limits.runsync_bytes if sync else self._limits.run_bytes,
            retention=self._limits.sync_retention if sync else self._limits.retention,
            submitted=self._loop.time(),
        )
        with self._lock:
            self._jobs.append(job)
            self._by_id[job.id] = job
            self._queue.append(job)
        self._set_timer(job, "ttl", job.seconds("ttl", 86_400.0), self.expire)
        self.notify()
        return job

    def drain(self, job: StubJob) -> list[Any] | None:
        """Hand out what is buffered; None when that is nothing and more can come."""
        if not job.buffered and not job.is_terminal:
            return None
        with self._lock:
            chunks, job.buffered = job.buffered, []
            job.delivered += len(chunks)
        if chunks:
            self.notify()
        return chunks

    def cancel(self, job: StubJob) -> None:
        if not job.is_terminal:
            self._stop_workers(job)
            self._end(job, "CANCELLED")

    def retry(self, job: StubJob) -> bool:
        """Begin a job anew, or return False for one that did not fail."""
        if job.status not in ("FAILED", "TIMED_OUT"):
            return False
        with self._lock:
            job.buffered = []
        self._requeue(job)
        return True

    def purge(self) -> int:
        jobs = [job for job in self._queue if job.status == "IN_QUEUE"]
        for job in jobs:
            self._end(job, "CANCELLED")
        return len(jobs)

    def expire(self, job: StubJob) -> None:
        """Forget a job, in whatever state it is."""
        if not job.is_terminal:
            self._stop_workers(job)
        with self._lock:
            job.known = False
            self._leave(job)
        self.notify()

    def time_out(self, job: StubJob) -> None:
        """End a job as if its executionTimeout had passed."""
        self._stop_workers(job)
        status = self._faults.timeout_status
        error = "executionTimeout exceeded" if status == "FAILED" else None
        self._end(job, status, error=error)

    def health(self) -> dict[str, dict[str, int]]:
        statuses = Counter(job.status for job in self._jobs)
        busy = {j.executions[-1].worker_id for j in self._jobs if j.status == "IN_PROGRESS"}
        now = self._loop.time()
        seen = {w for w, last in self._workers.items() if now - last < _WORKER_MEMORY} | busy
        seen -= set(self._stopped_workers)
        names = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
        workers = dict.fromkeys(names, 0)
        stuck = self._faults.stuck_queue
        if stuck is None:
            idle = len(seen - busy)
            workers.update(idle=idle, ready=idle, running=len(busy))
        elif stuck != "no workers":
            workers[stuck] = 1
        jobs = {
            "completed": statuses["COMPLETED"],
            "failed": statuses["FAILED"] + statuses["TIMED_OUT"],
            "inProgress": statuses["IN_PROGRESS"],
            "inQueue": statuses["IN_QUEUE"],
            "retried": sum(job.retries for job in self._jobs),
        }
        return {"jobs": jobs, "workers": workers}

    # The workers' side.

    def take(self, worker_id: str, count: int) -> list[dict[str, Any]] | None:
        """Give up to so many jobs to a worker; None when there is none for it."""
        self._workers[worker_id] = self._loop.time()
        stopped = worker_id in self._stopped_workers
        if not self._queue or stopped or self._faults.stuck_queue is not None:
            return None
        with self._lock:
            taken, self._queue = self._queue[:count], self._queue[count:]
            for job in taken:
                self._begin(job, worker_id)
        self.notify()
        # An empty input is left out on the way, and the worker does not like that.
        return [{"id": job.id, **({"input": job.input} if job.input else {})} for job in taken]

    def chunk(self, worker_id: str, job_id: str, chunk: Any, size: int) -> bool:
        """Take a chunk of a job; False for one that is refused."""
        found = self._execution(worker_id, job_id)
        if found is None:
            return False
        job, execution = found
        with self._lock:
            heard = execution.is_heard and job.status == "IN_PROGRESS"
            lost = self._faults.loses_chunk(execution.posted) or size > self._limits.chunk_bytes
            execution.posted += 1
            if heard:
                execution.last_seen = self._loop.time()
            if heard and not lost:
                job.buffered.append(chunk)
                job.chunks += 1
            else:
                job.lost_chunks += 1
        self.notify()
        return size <= self._limits.chunk_bytes

    def done(self, worker_id: str, job_id: str, result: Mapping[str, Any], size: int) -> bool:
        """Take the result of a job, or its progress; False for one that is refused."""
        found = self._execution(worker_id, job_id)
        if found is None:
            return False
        job, execution = found
        if result.get("stopPod"):
            with self._lock:
                self._stopped_workers.append(worker_id)
        if not execution.is_heard or job.status != "IN_PROGRESS":
            return True
        execution.last_seen = self._loop.time()
        if result.get("status") == "IN_PROGRESS":
            with self._lock:
                job.output = result.get("output")
            self.notify()
        elif size > job.result_bytes or self._faults.loses_result():
            self._end(job, "COMPLETED")
            return False
        else:
            status = "FAILED" if result.get("error") else "COMPLETED"
            self._end(job, status, output=result.get("output"), error=result.get("error"))
        return True

    def ping(self, worker_id: str, job_ids: list[str]) -> None:
        self._workers[worker_id] = self._loop.time()
        for job_id in job_ids:
            found = self._execution(worker_id, job_id)
            if found is not None and found[1].is_heard:
                found[1].last_seen = self._loop.time()

    def stops(self, worker_id: str) -> list[str] | None:
        """Return, once, the jobs that a worker has to stop; None for none."""
        return self._stops.pop(worker_id, None)

    # Inside.

    def _execution(self, worker_id: str, job_id: str) -> tuple[StubJob, Execution] | None:
        job = self._by_id.get(job_id)
        if job is None:
            return None
        mine = [execution for execution in job.executions if execution.worker_id == worker_id]
        return (job, mine[-1]) if mine else None

    def _begin(self, job: StubJob, worker_id: str) -> None:
        now = self._loop.time()
        job.executions.append(Execution(worker_id, self._faults.deaf_after(), now))
        if job.status != "IN_QUEUE":
            return  # executed a second time: the first one's clocks count
        job.status = "IN_PROGRESS"
        job.started = now
        if self._faults.takes_twice():
            self._queue.append(job)
        seconds = job.seconds("executionTimeout", 600.0)
        self._set_timer(job, "execution", seconds, self.time_out)
        self._set_timer(job, "silence", self._limits.worker_silence, self._check_worker)

    def _check_worker(self, job: StubJob) -> None:
        last_seen = max(execution.last_seen for execution in job.executions)
        left = last_seen + self._limits.worker_silence - self._loop.time()
        if left > 0:
            self._set_timer(job, "silence", left, self._check_worker)
            return
        for execution in job.executions:
            execution.abandoned = True
        if job.retries:
            self._end(job, "FAILED", error=f"job timed out after {job.retries} retries")
            return
        job.retries += 1
        self._requeue(job)

    def _requeue(self, job: StubJob) -> None:
        with self._lock:
            self._leave(job)
            job.status = "IN_QUEUE"
            job.output = job.error = job.started = job.ended = None
            self._queue.append(job)
        self.notify()

    def _end(self, job: StubJob, status: str, *, output: Any = None, error: Any = None) -> None:
        with self._lock:
            again = [waiting for waiting in self._queue if waiting is job and job.executions]
            self._leave(job)
            if status == "COMPLETED":
                self._queue += again  # a second execution begins even after the first has ended
            job.status = status
            job.output = output
            job.error = error
            if job.started is not None:
                job.ended = self._loop.time()
        self._set_timer(job, "retention", job.retention, self.expire)
        self.notify()

    def _leave(self, job: StubJob) -> None:
        """Take a job off the queue and stop its clocks, but for the one of its ttl."""
        self._queue = [waiting for waiting in self._queue if waiting is not job]
        for name in [name for name in job.timers if name != "ttl"]:
            job.timers.pop(name).cancel()

    def _stop_workers(self, job: StubJob) -> None:
        if job.status == "IN_PROGRESS":
            for worker_id in {execution.worker_id for execution in job.executions}:
                self._stops[worker_id].append(job.id)

    def _set_timer(
        self, job: StubJob, name: str, seconds: float, action: Callable[[StubJob], None]
    ) -> None:
        before = job.timers.pop(name, None)
        if before is not None:
            before.cancel()
        job.timers[name] = self._loop.call_later(seconds, action, job)
