"""The app on Modal: calls of the job function, records, events and files in Modal's own places.

Modal's SDK is imported when one of these is made, never before: the routes and their tests do
without it.
"""

from __future__ import annotations

import builtins
import io
import logging
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

from comfy_executors.errors import (
    JobError,
    JobTimeoutError,
    MissingExtraError,
    OutputFileError,
    WorkerLostError,
)
from comfy_executors.workers.job_backend import JobBackend, RefusalError
from comfy_executors.workers.job_records import Outcome, cancel_key

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 3600.0  # without an event, after which a feed is read from its beginning again
_OVERLOAD_SECONDS = 5
_KEPT_SECONDS = 8 * 24 * 3600.0  # a day more than Modal keeps what calls return
_FOLDERS = ("inputs", "outputs")


class ModalPlaces:
    """Where an app on Modal keeps things, by the name of the app.

    Args:
        app_name: The app.

    Attributes:
        records: A Dict; an entry that nobody touches goes after a week.
        events: A Queue with a partition for each job; one goes a day after its last event.
        files: A Volume, used over Modal's API on both sides: without mounting it there is nothing
            to commit or to reload, and no open file that keeps another request from doing so.

    Raises:
        MissingExtraError: Modal's SDK is not installed.
    """

    def __init__(self, app_name: str) -> None:
        self.modal = _import_modal()
        options = {"create_if_missing": True}
        self.records = self.modal.Dict.from_name(f"{app_name}-records", **options)
        self.events = self.modal.Queue.from_name(f"{app_name}-events", **options)
        self.files = self.modal.Volume.from_name(f"{app_name}-files", **options)

    def clean(self) -> int:
        """Remove inputs and outputs that are older than what Modal remembers of their jobs.

        Returns:
            How many were removed; of outputs the folder of a job counts as one.
        """
        limit = time.time() - _KEPT_SECONDS
        old = [
            entry.path
            for folder in _FOLDERS
            for entry in self.listed(folder)
            if entry.mtime < limit
        ]
        for path in old:
            self.files.remove_file(path, recursive=True)
        return len(old)

    def listed(self, folder: str) -> list[Any]:
        """Return the entries of a folder of the Volume."""
        try:
            return list(self.files.listdir(folder))
        except (FileNotFoundError, self.modal.exception.NotFoundError):
            return []  # nothing was ever put there


class ModalChannel:
    """A running job's side of the app; see `JobChannel`.

    Args:
        places: Where the app keeps things.
        call_id: The job's id.
    """

    def __init__(self, places: ModalPlaces, call_id: str) -> None:
        self.call_id = call_id
        self._places = places
        self._error = places.modal.exception.Error
        self._is_full = False

    def get(self, key: str) -> Any:
        return self._places.records.get(key)

    def put(self, key: str, value: Any) -> None:
        try:
            self._places.records.put(key, value)
        except self._error as error:
            # It is progress, of which there will be more.
            logger.warning("job %s: %s is not written: %s", self.call_id, key, error)

    def claim(self, key: str, value: Any) -> bool:
        return bool(self._places.records.put(key, value, skip_if_exists=True))

    def is_cancelled(self, request_id: str) -> bool:
        return bool(self.get(cancel_key(request_id)))

    def emit(self, events: Sequence[Mapping[str, Any]]) -> None:
        if self._is_full:
            return
        try:
            self._places.events.put(list(events), block=False, partition=self.call_id)
        except queue.Full:
            self._is_full = True
            logger.warning("job %s has more events than a queue takes", self.call_id)
        except (self._error, builtins.TimeoutError) as error:
            # What the job returns has them all; until then an image comes late.
            logger.warning("job %s: events are not told yet: %s", self.call_id, error)

    def events(self) -> list[Mapping[str, Any]]:
        return [
            event
            for events in self._places.events.iterate(partition=self.call_id)
            for event in events
        ]

    def kept_outputs(self) -> set[str]:
        entries = self._places.listed(f"outputs/{self.call_id}")
        return {PurePosixPath(entry.path).name for entry in entries}

    def write_output(self, name: str, data: bytes) -> None:
        try:
            with self._places.files.batch_upload(force=True) as batch:
                batch.put_file(io.BytesIO(data), f"outputs/{self.call_id}/{name}")
        except (self._error, OSError) as error:
            raise OutputFileError(f"cannot keep {name} on the volume: {error}") from error

    def read_input(self, sha256: str) -> bytes | None:
        try:
            return b"".join(self._places.files.read_file(f"inputs/{sha256}"))
        except FileNotFoundError:
            return None


class ModalBackend(JobBackend):
    """Jobs as calls of a function on Modal.

    Args:
        places: Where the app keeps things.
        function: The job function, or method of a class.
    """

    name = "modal"

    def __init__(self, places: ModalPlaces, function: Any) -> None:
        super().__init__()
        self._modal = places.modal
        self._places = places
        self._function = function

    async def get_record(self, key: str) -> Any:
        return await self._places.records.get.aio(key)

    async def claim_record(self, key: str, value: Any) -> bool:
        return bool(await self._places.records.put.aio(key, value, skip_if_exists=True))

    async def drop_record(self, key: str) -> None:
        try:
            await self._places.records.pop.aio(key)
        except KeyError:
            return  # it is not there

    async def spawn(self, document: Mapping[str, Any]) -> str:
        try:
            call = await self._function.spawn.aio(dict(document))
        except self._modal.exception.ResourceExhaustedError as error:
            words = "Modal takes no more calls for now"
            raise RefusalError(503, "overloaded", words, retry_after=_OVERLOAD_SECONDS) from error
        return str(call.object_id)

    async def outcome(self, call_id: str, wait: float) -> Outcome | None:
        known = self._modal.exception
        try:
            return Outcome(await self._modal.FunctionCall.from_id(call_id).get.aio(timeout=wait))
        except (known.OutputExpiredError, known.NotFoundError, known.InvalidError):
            return Outcome(is_expired=True)
        except known.FunctionTimeoutError:
            words = (
                "ran longer than the time limit of the app: deploy it with a larger "
                "COMFY_MODAL_TIMEOUT, or give a job less to do with batches_per_job="
            )
            return Outcome(failure=JobTimeoutError(words, started=True, job_id=call_id))
        except builtins.TimeoutError as error:
            # Empty, it says that the call goes on; a job that raises one itself looks the same but
            # for the text, which is why ours never does.
            if type(error) is builtins.TimeoutError and not error.args:
                return None
            return Outcome(failure=_failure(call_id, error))
        except (known.RemoteError, known.InternalFailure) as error:
            words = f"its container was lost: {error}".rstrip(": ")
            return Outcome(failure=WorkerLostError(words, job_id=call_id))
        except (
            known.AuthError,
            known.ConnectionError,
            known.InternalError,
            known.ResourceExhaustedError,
            known.ServiceError,
        ):
            raise  # of the question, not of the call
        except Exception as error:
            return Outcome(failure=_failure(call_id, error))

    async def cancel_call(self, call_id: str) -> None:
        await self._modal.FunctionCall.from_id(call_id).cancel.aio()

    async def feed(self, call_id: str) -> AsyncGenerator[list[dict[str, Any]], None]:
        while True:
            feed = self._places.events.iterate.aio(
                partition=call_id, item_poll_timeout=_QUIET_SECONDS
            )
            async for events in feed:
                yield events

    async def read_file(self, path: str) -> AsyncIterator[bytes] | None:
        pieces = self._places.files.read_file.aio(path)
        try:
            first = await pieces.__anext__()
        except FileNotFoundError:
            return None
        except StopAsyncIteration:
            first = b""
        return _chained(first, pieces)

    async def write_file(self, path: str, data: bytes) -> None:
        async with self._places.files.batch_upload(force=True) as batch:
            batch.put_file(io.BytesIO(data), path)

    async def written_at(self, path: str) -> float | None:
        try:
            entries = await self._places.files.listdir.aio(path)
        except (FileNotFoundError, self._modal.exception.NotFoundError):
            return None
        times = (float(entry.mtime) for entry in entries if entry.path.strip("/") == path)
        return next(times, None)

    async def counts(self) -> dict[str, int | None]:
        try:
            stats = await self._function.get_current_stats.aio()
        except self._modal.exception.Error as error:
            logger.warning("Modal does not say how busy the app is: %s", error)
            return {"queued": None, "running": None, "containers": None}
        return {
            "queued": stats.backlog,
            "running": getattr(stats, "num_running_inputs", None),  # from Modal 1.3.5 on
            "containers": stats.num_total_runners,
        }


def _failure(call_id: str, error: BaseException) -> JobError:
    return JobError(f"ended with {type(error).__name__}: {error}", job_id=call_id)


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _import_modal() -> Any:
    try:
        return import_module("modal")
    except ImportError as error:
        raise MissingExtraError("modal", "modal-app") from error
