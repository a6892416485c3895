"""The app without Modal: its jobs run in threads of this process.

For tests, and for `comfy-executors modal serve-local`, which lets a client be tried against any
ComfyUI before an account is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comfy_executors.errors import WorkerLostError
from comfy_executors.saving import save_bytes
from comfy_executors.workers.job_backend import JobBackend
from comfy_executors.workers.job_records import Outcome, cancel_key
from comfy_executors.workers.modal_job import JobRunner

_PIECE_BYTES = 1024 * 1024


class _Records:
    """A dictionary for all threads, with an atomic claim."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        with self._lock:
            return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        with self._lock:
            self._values[key] = value

    def claim(self, key: str, value: Any) -> bool:
        with self._lock:
            return self._values.setdefault(key, value) is value

    def drop(self, key: str) -> None:
        with self._lock:
            self._values.pop(key, None)


class _Feed:
    """What a job has told, for coroutines of any loop that wait for more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: list[list[dict[str, Any]]] = []
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def tell(self, events: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._told.append([dict(event) for event in events])
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # its loop was closed meanwhile
                loop.call_soon_threadsafe(event.set)

    def events(self) -> list[Mapping[str, Any]]:
        with self._lock:
            return [event for events in self._told for event in events]

    async def follow(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        seen = 0
        while True:
            more = asyncio.Event()
            with self._lock:
                news = self._told[seen:]
                if not news:
                    self._waiting.append((asyncio.get_running_loop(), more))
            seen += len(news)
            for events in news:
                yield events
            if not news:
                await more.wait()


class _Call:
    """One call of the job function."""

    def __init__(self, call_id: str, document: Mapping[str, Any]) -> None:
        self.id = call_id
        self.document = document
        self.feed = _Feed()
        self.ended: Future[Outcome] = Future()
        self.attempts = 0
        self.fate: str | None = None  # what ends the present attempt from outside

    def end(self, outcome: Outcome) -> None:
        with contextlib.suppress(InvalidStateError):  # it has ended before
            self.ended.set_result(outcome)


class _LocalChannel:
    """A running job's side of the backend; see `JobChannel`."""

    def __init__(self, backend: LocalBackend, call: _Call) -> None:
        self.call_id = call.id
        self._call = call
        self._records = backend.records
        self._backend = backend

    def get(self, key: str) -> Any:
        return self._records.get(key)

    def put(self, key: str, value: Any) -> None:
        self._records.put(key, value)

    def claim(self, key: str, value: Any) -> bool:
        return self._records.claim(key, value)

    def is_cancelled(self, request_id: str) -> bool:
        return self._call.fate is not None or bool(self.get(cancel_key(request_id)))

    def emit(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._call.feed.tell(events)

    def events(self) -> list[Mapping[str, Any]]:
        return self._call.feed.events()

    def kept_outputs(self) -> set[str]:
        return {path.name for path in self._outputs.glob("*")}

    def write_output(self, name: str, data: bytes) -> None:
        save_bytes(data, self._outputs / name)

    @property
    def _outputs(self) -> Path:
        return self._backend.directory / "outputs" / self.call_id

    def read_input(self, sha256: str) -> bytes | None:
        path = self._backend.directory / "inputs" / sha256
        return path.read_bytes() if path.is_file() else None


class LocalBackend(JobBackend):
    """Jobs in threads, each of which stands for a container.

    It also does, when it is told to, what Modal does of its own accord: `restart`, `kill`,
    `expire`.

    Args:
        runner: What runs the jobs; it is closed with the backend.
        containers: How many jobs run at once.
        directory: Where inputs and outputs are kept; None takes a temporary one.
        orphan_seconds: See `JobBackend`.
    """

    name = "local"

    def __init__(
        self,
        runner: JobRunner,
        *,
        containers: int = 1,
        directory: Path | None = None,
        orphan_seconds: float = 60.0,
    ) -> None:
        super().__init__(orphan_seconds=orphan_seconds)
        self._runner = runner
        self._containers = containers
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.records = _Records()
        self._threads = ThreadPoolExecutor(containers, thread_name_prefix="comfy-local-job")

    @property
    def directory(self) -> Path:
        """Where inputs and outputs are kept; a temporary one is made when it is first needed."""
        with self._lock:
            if self._directory is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="comfy-local-")
                self._directory = Path(self._temporary.name)
            return self._directory

    def close(self) -> None:
        """Cancel what runs and end all threads; ComfyUI has been told when this returns."""
        with self._lock:
            calls = list(self._calls.values())
        for call in calls:
            self._end_attempt(call, "killed")
        self._threads.shutdown(wait=True)
        self._runner.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def aclose(self) -> None:
        """Do what `close` does, and end what follows the jobs."""
        await super().aclose()
        await asyncio.to_thread(self.close)

    # What Modal does.

    def restart(self, call_id: str) -> None:
        """End a job's container and start the job anew, as when the machine is taken away."""
        self._end_attempt(self._calls[call_id], "restarted")

    def kill(self, call_id: str) -> None:
        """End a job without a result, as when its container runs out of memory."""
        self._end_attempt(self._calls[call_id], "killed")

    def expire(self, call_id: str) -> None:
        """Forget what a job returned, as after a week."""
        call = self._calls[call_id]
        call.ended = Future()
        call.end(Outcome(is_expired=True))
        self._watches.pop(call_id, None)

    def _end_attempt(self, call: _Call, fate: str) -> None:
        with self._lock:
            call.fate = fate
            has_begun = call.attempts > 0
        self._runner.cancel(call.id)
        if not has_begun and fate != "restarted":
            call.end(_ended_by(call))

    def _work(self, call: _Call) -> None:
        channel = _LocalChannel(self, call)
        while True:
            with self._lock:
                if call.fate in ("killed", "cancelled"):
                    break
                call.fate = None
                call.attempts += 1
            returned = self._runner.run(call.document, channel)
            with self._lock:
                if call.fate in (None, "cancelled") or returned["state"] == "done":
                    call.end(Outcome(returned))
                    return
        call.end(_ended_by(call))

    # For `JobBackend`.

    async def get_record(self, key: str) -> Any:
        return self.records.get(key)

    async def claim_record(self, key: str, value: Any) -> bool:
        return self.records.claim(key, value)

    async def drop_record(self, key: str) -> None:
        self.records.drop(key)

    async def spawn(self, document: Mapping[str, Any]) -> str:
        call = _Call(f"fc-local-{uuid.uuid4().hex}", document)
        with self._lock:
            self._calls[call.id] = call
        self._threads.submit(self._work, call)
        return call.id

    async def outcome(self, call_id: str, wait: float) -> Outcome | None:
        ended = asyncio.wrap_future(self._calls[call_id].ended)
        done, _ = await asyncio.wait([ended], timeout=wait)
        return ended.result() if done else None

    async def cancel_call(self, call_id: str) -> None:
        await asyncio.to_thread(self._end_attempt, self._calls[call_id], "cancelled")

    def feed(self, call_id: str) -> AsyncGenerator[list[dict[str, Any]], None]:
        return self._calls[call_id].feed.follow()

    async def read_file(self, path: str) -> AsyncIterator[bytes] | None:
        file = self.directory / path
        return _pieces(file) if file.is_file() else None

    async def write_file(self, path: str, data: bytes) -> None:
        await asyncio.to_thread(_write_over, data, self.directory / path)

    async def written_at(self, path: str) -> float | None:
        file = self.directory / path
        return file.stat().st_mtime if file.is_file() else None

    async def counts(self) -> dict[str, int | None]:
        with self._lock:
            open_calls = [call for call in self._calls.values() if not call.ended.done()]
        running = sum(1 for call in open_calls if call.attempts)
        return {
            "queued": len(open_calls) - running,
            "running": running,
            "containers": self._containers,
        }


def _ended_by(call: _Call) -> Outcome:
    words = "was cancelled" if call.fate == "cancelled" else "its container was killed"
    return Outcome(failure=WorkerLostError(words, job_id=call.id))


def _write_over(data: bytes, path: Path) -> None:
    written = save_bytes(data, path)  # beside the one that is there
    if written != path:
        written.replace(path)


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece
