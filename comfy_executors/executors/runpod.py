"""Running batches on a RunPod serverless endpoint. The way of one job stands in `runpod_job.py`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_executors.clients.http import DeadlineWaiter, Waiter
from comfy_executors.clients.runpod import BASE_URL, RunPodClient
from comfy_executors.clients.runpod_answers import RunPodHealth
from comfy_executors.clients.runpod_payload import (
    EXECUTION_TIMEOUT_SECONDS,
    MAX_PAYLOAD_BYTES,
    TTL_SECONDS,
    too_large,
)
from comfy_executors.errors import InputImageError, RunPodJobFailedError
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.job_budgets import JobLimits
from comfy_executors.executors.joining import JoinedGraph, join
from comfy_executors.executors.queue_watch import QueueWatch
from comfy_executors.executors.remote_inputs import RemoteInputImageSet
from comfy_executors.executors.runpod_job import RunPodJobRun, cancel_job
from comfy_executors.executors.runpod_official import OfficialWorker
from comfy_executors.executors.runpod_queue import describe
from comfy_executors.executors.serverless import (
    AttachedJob,
    ServerlessWorkflowExecutor,
    attached_batches,
    job_graph,
    unknown_graph,
)
from comfy_executors.images import InputImageSet, InputImageSource
from comfy_executors.runs import (
    Batch,
    BatchFailure,
    BatchResult,
    Job,
    ProgressCallback,
    WorkflowRun,
)
from comfy_executors.wire import (
    DOCUMENT_KEY,
    JobGraph,
    encode_request,
)

_ROOM_BYTES = MAX_PAYLOAD_BYTES * 9 // 10  # graphs differ a little in size
_OVERTIME_SECONDS = 30.0  # RunPod ends jobs some seconds after their limit
WORKERS = ("auto", "comfy-executors", "worker-comfyui")
_UNCERTAIN = ("raise", "resubmit")


class RunPodWorkflowExecutor(ServerlessWorkflowExecutor):
    """Run workflow templates on a RunPod serverless endpoint.

    Args:
        endpoint_id: The endpoint, such as `abc123def456`.
        api_key: The key; by default the environment's `RUNPOD_API_KEY`. It is shown nowhere.
        base_url: Where RunPod's API is.
        batch_size: How many images one execution of the graph makes, for templates that say
            `batch_size`.
        worker: `comfy-executors` (our own), `worker-comfyui` (the official image), or `auto`:
            requests that both understand.
        batches_per_job: How many batches a job takes; None puts the whole run into one, as far as
            RunPod's limits allow. A number spreads a run over jobs, and so over workers.
        max_workers: How many jobs are kept at RunPod at once.
        queue_timeout: Seconds that a job may wait for a worker. They begin anew whenever another
            job of this executor begins or ends.
        execution_timeout: Seconds that a job may run, from 5 to 7 days: the whole run, without
            `batches_per_job`.
        on_uncertain_submit: What is done when a job was sent and RunPod's answer never came:
            `raise` (`SubmitUncertainError`), or `resubmit`, which may run it twice.

    Raises:
        ValueError: There is no key, or an argument is out of its range.
    """

    def __init__(
        self,
        endpoint_id: str,
        api_key: str | None = None,
        base_url: str = BASE_URL,
        batch_size: int = 1,
        *,
        worker: str = "auto",
        batches_per_job: int | None = None,
        max_workers: int = 4,
        queue_timeout: float = 900.0,
        execution_timeout: float = 3600.0,
        on_uncertain_submit: str = "raise",
    ) -> None:
        _check_choice("worker", worker, WORKERS)
        _check_choice("on_uncertain_submit", on_uncertain_submit, _UNCERTAIN)
        low, high = EXECUTION_TIMEOUT_SECONDS
        if not low <= execution_timeout <= high:
            raise ValueError(f"execution_timeout is from {low:g} to {high:g} seconds")
        if not 0 < queue_timeout <= TTL_SECONDS[1] - execution_timeout - 60:
            raise ValueError("queue_timeout and execution_timeout together are at most 7 days")
        super().__init__(batch_size, max_workers=max_workers, batches_per_job=batches_per_job)
        self.worker = worker
        self._client = RunPodClient(endpoint_id, api_key, base_url)
        self.endpoint_id = endpoint_id
        self.url = self._client.url
        self._limits = JobLimits(
            queue_timeout, execution_timeout, _OVERTIME_SECONDS, at_once=self.max_workers
        )
        self._resubmits = on_uncertain_submit == "resubmit"
        self._watch = QueueWatch(lambda waiter: describe(self._client.health(waiter)))
        self._found_worker: str | None = None
        self._official = OfficialWorker(is_known=worker == "worker-comfyui")

    def attach(
        self,
        job_id: str,
        num_batches: int = 1,
        first_batch: int = 0,
        *,
        ordered: bool = False,
        ignore_errors: bool = False,
        timeout: float | None = None,
        on_progress: ProgressCallback | None = None,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> WorkflowRun:
        """Take up a job that an earlier process started, within 30 minutes of its end.

        What that process took out of the job's stream is in the job's final result, as far as
        that has room (8 MB of outputs, or any number in a bucket). What is nowhere is an error;
        nothing is run again. Seeds and sizes of the batches are not known.

        Args:
            job_id: The job, as `ProgressEvent.job_id` and `BatchResult.job_id` tell it.
            num_batches: How many batches it has.
            first_batch: The number that its first batch had in its run.
            ordered, ignore_errors, timeout, on_progress, output_dir: As for `submit_workflow`.

        Returns:
            A run of these batches, counted from 0.

        Cancelling this run, or a passed `timeout`, cancels the job, also while the run still waits
        for one of `max_workers` places: the call that cancels then waits for RunPod's answer.

        Raises:
            ValueError: An argument is out of its range.
            ExecutorClosedError: The executor is closed.
        """
        if num_batches < 1 or first_batch < 0:
            raise ValueError("num_batches must be at least 1, and first_batch at least 0")
        batches = [Batch(index, 1, None, unknown_graph) for index in range(num_batches)]
        numbers = range(first_batch, first_batch + num_batches)
        return self._attach(
            job_id, batches, numbers, ordered, ignore_errors, timeout, on_progress, output_dir
        )

    def health(self, waiter: Waiter | None = None) -> RunPodHealth:
        """Ask for the endpoint's counts of jobs and workers.

        Args:
            waiter: The deadline; 30 seconds by default.

        Raises:
            ServerError: RunPod does not answer, or does not know the endpoint or the key.
        """
        return self._client.health(waiter or DeadlineWaiter(30.0))

    @property
    def found_worker(self) -> str | None:
        """What the endpoint runs, in the words of `worker`, once a job has told; or None."""
        return self._found_worker

    def _load_inputs(self, sources: Sequence[InputImageSource]) -> InputImageSet:
        images = RemoteInputImageSet(sources)
        in_base64 = sum(-(-len(file.data or b"") // 3) * 4 for file in images.unique)
        if in_base64 > MAX_PAYLOAD_BYTES:  # and the graphs come on top of it
            raise too_large(in_base64, self.url)
        self._check_urls(images)
        return images

    def _check_urls(self, images: InputImageSet | None) -> bool:
        """Tell whether input images are given as URLs; refuse them for a worker that takes none."""
        has_urls = isinstance(images, RemoteInputImageSet) and any(f.url for f in images.inputs)
        if has_urls and self._official.is_known and self.worker != "comfy-executors":
            raise InputImageError("worker-comfyui takes no URLs of input images: pass their bytes")
        return has_urls

    def _fitting(self, first: Batch, job: Job) -> int:
        graph = job_graph(first)
        files = job.input_images.files.values() if job.input_images else ()
        if self._official.is_known or (self.worker == "auto" and self._found_worker is None):
            self._official.warn_of_size(graph, files)
        inputs = sum(map(len, {*files})) * 4 // 3
        # A graph travels twice where the request is for both workers.
        size = len(json.dumps(graph.graph)) * (2 if self.worker == "auto" else 1) + 200
        in_request = (_ROOM_BYTES - inputs) // size
        in_result = self._official.fitting(graph, files) if self._official.is_known else None
        return in_request if in_result is None else min(in_request, in_result)

    def _submit_and_follow(
        self, job: Job, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        batches = {batch.index: batch for batch in job.batches}
        waiting = [job_graph(batch) for batch in job.batches]
        most = len(waiting)
        while waiting:
            joined = self._join_graphs(waiting[:most], job, control)
            mine = {item.batch: batches[item.batch] for item in waiting}
            run = self._new_run(mine, joined, job, control)
            run.submit(self._request(waiting, joined, job, control), control.job_id)
            yield from run.follow()
            if run.started or joined is None:
                self._found_worker = "comfy-executors" if run.started else self._found_worker
                with self._hinting(run):
                    run.raise_for_rest()
                return
            # One graph for all that fit into a result: the others are still to be done.
            with run.naming_job():
                shares = self._official.settle(
                    run.output, run.status, joined, batches, control, self.url
                )
                self._found_worker = "worker-comfyui" if self._official.is_known else None
                yield from shares.results
            done = set(joined.batches)
            if shares.missing and shares.can_be_repeated and len(joined.batches) > 1:
                # One batch can spoil a job for the others: each gets one of its own.
                most = 1
                done -= set(shares.missing)
            else:
                for index in shares.missing:
                    yield BatchFailure(index, copy.copy(shares.error))
            waiting = [item for item in waiting if item.batch not in done]

    def _follow_attached(
        self, job: AttachedJob, control: JobControl
    ) -> Iterator[BatchResult | BatchFailure]:
        batches = attached_batches(job)
        run = RunPodJobRun(
            self._client, control, batches, self._limits, self._watch, output_dir=job.output_dir
        )
        run.attach(job.attachment.job_id)
        yield from run.follow()
        if run.output is None:
            run.raise_for_rest()
            return
        with run.naming_job():
            shares = self._official.settle(run.output, run.status, None, batches, control, self.url)
            yield from shares.results
        for number in shares.missing:
            yield BatchFailure(batches[number].index, copy.copy(shares.error))

    def _cancel_job(self, job_id: str) -> None:
        cancel_job(self._client, job_id)

    def _join_graphs(
        self, waiting: Sequence[JobGraph], job: Job, control: JobControl
    ) -> JoinedGraph | None:
        """Make what the official worker is to run; None for a request to our worker only."""
        images = job.input_images
        if self._check_urls(images) or self.worker == "comfy-executors":
            return None
        files = images.files.values() if images else ()
        fitting = self._official.fitting(waiting[0], files) or len(waiting)
        # Files of a job that runs twice, and of other jobs, are never overwritten or mixed up.
        return join(waiting[:fitting], control.job_id.partition("-")[0])

    @contextlib.contextmanager
    def _hinting(self, run: RunPodJobRun) -> Iterator[None]:
        """Say of a failed job that the official worker does not know what it was sent."""
        try:
            yield
        except RunPodJobFailedError as error:
            if run.started:
                raise
            hint = 'use worker="auto" or worker="worker-comfyui"'
            if self.worker == "auto":
                hint = "it takes no URLs of input images: pass their bytes"
            raise RunPodJobFailedError(
                error.reason,
                job_id=error.job_id,
                exception_type=error.exception_type,
                traceback=error.traceback,
                details=(*error.details, f"if the endpoint runs worker-comfyui, {hint}"),
                worker_id=error.worker_id,
                server=error.server,
            ) from error

    def _new_run(
        self,
        batches: Mapping[int, Batch],
        joined: JoinedGraph | None,
        job: Job,
        control: JobControl,
    ) -> RunPodJobRun:
        limits = self._limits
        announced: tuple[int, ...] = ()
        if joined is not None and self._official.is_known:
            announced = joined.batches
            batches = {index: batches[index] for index in announced}
            if control.batch_timeout is not None:
                seconds = control.batch_timeout * len(joined.batches)
                low = EXECUTION_TIMEOUT_SECONDS[0]
                limits = replace(
                    limits,
                    execution_timeout=min(limits.execution_timeout, max(low, seconds)),
                )
        return RunPodJobRun(
            self._client,
            control,
            batches,
            limits,
            self._watch,
            announced,
            output_dir=job.output_dir,
            resubmit=self._resubmits,
        )

    def _request(
        self,
        waiting: Sequence[JobGraph],
        joined: JoinedGraph | None,
        job: Job,
        control: JobControl,
    ) -> dict[str, Any]:
        document = self._document(control.job_id, waiting, job, control)
        request = encode_request(document, None if joined is None else joined.graph)
        if self.worker == "worker-comfyui":
            del request[DOCUMENT_KEY]
        return request

    def _close_backend(self) -> None:
        self._client.close()

    def _reset_backend(self) -> None:
        super()._reset_backend()
        self._client.reset()
        self._watch.reset()


RunpodComfyWorkflowExecutor = RunPodWorkflowExecutor


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
