"""The handler of a RunPod worker: `python -m comfy_executors.workers.runpod_handler`.

It speaks our job documents, whose events it streams, and the input of the official
`worker-comfyui`. Settings come from the environment:

- `COMFYUI_ADDRESS`: where ComfyUI listens; `127.0.0.1:8188` by default.
- `COMFYUI_READY_TIMEOUT`: seconds that it may take to start; 300 by default.
- `BUCKET_ENDPOINT_URL`, `BUCKET_ACCESS_KEY_ID`, `BUCKET_SECRET_ACCESS_KEY`, `BUCKET_NAME`: an
  S3-compatible bucket for the outputs.
- `COMFY_ORG_API_KEY`: the key of comfy.org for nodes that call paid services; an official input's
  `comfy_org_api_key` comes first.
- `INPUT_URLS_ALLOW_PRIVATE`: `1` lets input images come from private addresses, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections import ChainMap
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import import_module
from types import TracebackType
from typing import Any

from comfy_executors.errors import ComfyExecutorsError, MissingExtraError, WorkflowError
from comfy_executors.wire import DOCUMENT_KEY, End, Failed, decode_request, encode_event
from comfy_executors.workers.downloads import InputDownloader
from comfy_executors.workers.engine import Engine, Execution
from comfy_executors.workers.official import official_answer, official_document, official_key
from comfy_executors.workers.runpod_stops import EarlyStops
from comfy_executors.workers.storage import S3Storage

logger = logging.getLogger(__name__)

# RunPod takes results up to 10 MB, and loses larger ones without a word.
_RESULT_DATA_BYTES = 6_000_000
_RESULT_BYTES = 9_000_000
_ON = {"1", "true", "yes", "on"}


class RunPodWorker:
    """Answers the jobs of a RunPod endpoint.

    Args:
        environment: The settings.
        config: What `runpod.serverless.start` is given; see `_look_after`.
        shrink_result: Whether events that were streamed are made smaller afterwards; see `_Result`.
        stops: The stops that came before their jobs.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        config: dict[str, Any],
        *,
        shrink_result: bool = True,
        stops: EarlyStops | None = None,
    ) -> None:
        self._environment = environment
        self._config = config
        self._shrink_result = shrink_result
        self._stops = stops or EarlyStops()
        self._engine: Engine | None = None
        self._engine_lock = threading.Lock()

    async def handle(self, job: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Run one job and yield what it answers: the handler that the SDK is given.

        An item with a key `error` makes the SDK end the job as failed. A job document's failures
        are events instead; only the official worker's input is answered so.
        """
        request = job["input"]
        if not _is_ours(request):
            yield await self.answer(job)
            return
        self._check_stop(job)
        try:
            execution = await asyncio.to_thread(self._start, request)
        except (ComfyExecutorsError, ValueError) as error:
            for item in _refusal(error):
                yield item
            return
        async with _Stopping(execution):
            result = _Result()
            held: list[dict[str, Any]] = []
            while (event := await asyncio.to_thread(next, execution, None)) is not None:
                self._look_after(execution)
                held.append(event)
                # Alone it tells nothing that its status does not, and it would be a poll more.
                if event["kind"] == "started":
                    continue
                for ready in held:
                    yield ready
                    if self._shrink_result:
                        result.shrink(ready)
                held.clear()

    async def answer(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run one job of the official worker's input; return what that worker would.

        See `answer_whole`.
        """
        self._check_stop(job)
        try:
            execution = await asyncio.to_thread(self._start, job["input"])
        except (ComfyExecutorsError, ValueError) as error:
            return {"error": str(error)}
        async with _Stopping(execution):
            answer = await asyncio.to_thread(official_answer, execution)
            self._look_after(execution)
        size = len(json.dumps(answer))
        if size <= _RESULT_BYTES:
            return answer
        return {
            "error": f"the images are {size / 1e6:.0f} MB, and RunPod loses results over 10 MB: "
            "give the endpoint a bucket (BUCKET_ENDPOINT_URL), make fewer or smaller images, or "
            "use RunPodWorkflowExecutor, which has them streamed"
        }

    def _check_stop(self, job: Mapping[str, Any]) -> None:
        if self._stops.take(job["id"]):
            raise asyncio.CancelledError  # as if the SDK had stopped its task

    def close(self) -> None:
        """Cancel what runs and end all threads."""
        with self._engine_lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _start(self, request: Any) -> Execution:
        is_ours = _is_ours(request)
        document = decode_request(request) if is_ours else official_document(request)
        key = None if is_ours else official_key(request)
        with self._engine_lock:
            # Not when the worker starts: a wrong setting is told to whoever sent the job, while
            # a worker that cannot start would only be started again, for money.
            if self._engine is None:
                self._engine = engine_from_environment(self._environment)
            return self._engine.start(document, key)

    def _look_after(self, execution: Execution) -> None:
        """Ask for a fresh worker when ComfyUI is sick.

        The SDK looks for `refresh_worker` in its configuration after each job, and then has this
        worker replaced; in what a generator yields it does not look for it.
        """
        if execution.sick and not self._config.get("refresh_worker"):
            logger.error("asking RunPod for a fresh worker: %s", execution.sick)
            self._config["refresh_worker"] = True


def engine_from_environment(environment: Mapping[str, str]) -> Engine:
    """Make the engine that the settings describe; they stand at the top of this module.

    Raises:
        ValueError: A setting is wrong or missing.
        MissingExtraError: There is a bucket, and boto3 is not installed.
    """
    timeout = environment.get("COMFYUI_READY_TIMEOUT") or "300"
    try:
        ready_timeout = float(timeout)
    except ValueError:
        raise ValueError(f"COMFYUI_READY_TIMEOUT must be seconds, not {timeout!r}") from None
    allow_private = environment.get("INPUT_URLS_ALLOW_PRIVATE", "").lower() in _ON
    return Engine(
        environment.get("COMFYUI_ADDRESS") or "127.0.0.1:8188",
        storage=S3Storage.from_environment(environment),
        ready_timeout=ready_timeout,
        downloader=InputDownloader(allow_private=allow_private),
        comfy_org_api_key=environment.get("COMFY_ORG_API_KEY") or None,
    )


def answer_whole(
    scale: Any, answer: Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
) -> None:
    """Have jobs without a job document answered whole, as callers of the official worker expect.

    The SDK makes a list of what a generator yields, and streams it besides; another handler's
    answer it leaves as it is. It looks for the handler in its configuration at each job. Its test
    server goes another way, on which nothing shows the job before it has asked whether the handler
    is a generator: there such an answer stays the one item of a list.

    Args:
        scale: The SDK's module `rp_scale`, whose `handle_job` is replaced.
        answer: The handler of such jobs.
    """
    handle = scale.handle_job

    async def handle_job(session: Any, config: dict[str, Any], job: Mapping[str, Any]) -> Any:
        its_config: Any = config
        if not _is_ours(job["input"]):
            its_config = ChainMap({"handler": answer}, config)
        return await handle(session, its_config, job)

    scale.handle_job = handle_job


def _is_ours(request: Any) -> bool:
    return isinstance(request, Mapping) and DOCUMENT_KEY in request


def _refusal(error: BaseException) -> list[dict[str, Any]]:
    """Make the events of a job that never began."""
    if not isinstance(error, ComfyExecutorsError):
        error = WorkflowError(f"the worker is not set up: {error}")
    return [encode_event(Failed(0, 1, None, error)), encode_event(End(1, 1, 0, 0, 1))]


class _Stopping:
    """Cancels an execution that is left before its end."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    async def __aenter__(self) -> None:
        # A job that is cancelled while the SDK sends a chunk leaves our generator hanging until
        # something collects it, which can be in the middle of the next job: its task tells sooner.
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        if self._task is not None:
            self._task.add_done_callback(self._left)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.remove_done_callback(self._left)
        if exc_type is not None:
            await asyncio.to_thread(self._execution.cancel)

    def _left(self, task: asyncio.Task[Any]) -> None:
        self._loop.run_in_executor(None, self._execution.cancel)


class _Result:
    """The list of all events that the SDK makes a job's final result of.

    It holds on to the very objects that were yielded. So after an event was streamed it is made
    smaller in place, once there are too many: who missed a chunk finds most of them in the final
    result, and the names of the rest.
    """

    def __init__(self) -> None:
        self._bytes = 0

    def shrink(self, event: dict[str, Any]) -> None:
        """Take out of an event what the result has no room for; progress at once."""
        if event["kind"] == "end":
            return
        data = len(event.get("data", ""))
        if self._bytes + data > _RESULT_DATA_BYTES and event.pop("data", None) is not None:
            data = 0
            if event["part"] > 0:
                event.clear()
        rest = len(json.dumps({**event, "data": ""}))
        if event.get("kind") == "progress" or self._bytes + data + rest > _RESULT_BYTES:
            event.clear()
            rest = len("{}, ")
        self._bytes += data + rest


def main() -> None:
    """Serve jobs until RunPod ends the worker; `--rp_serve_api` is a local test server instead."""
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # on DEBUG it logs what it sends
    try:
        runpod = import_module("runpod")
    except ImportError as error:
        raise MissingExtraError("runpod", "runpod-worker") from error
    logging.basicConfig(level=logging.INFO)
    config: dict[str, Any] = {"return_aggregate_stream": True}
    # The test server sends nothing before the end: what is made smaller then would be lost.
    is_server = "--rp_serve_api" in sys.argv or "RUNPOD_REALTIME_PORT" in os.environ
    stops = EarlyStops()
    scale = import_module("runpod.serverless.modules.rp_scale")
    stops.watch(scale.JobScaler)
    worker = RunPodWorker(os.environ, config, shrink_result=not is_server, stops=stops)
    config["handler"] = worker.handle
    answer_whole(scale, worker.answer)
    try:
        runpod.serverless.start(config)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
