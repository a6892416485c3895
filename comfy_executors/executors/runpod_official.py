"""What the official worker, `worker-comfyui`, answers, given back to the batches of a job."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from comfy_executors.clients.result_files import fetch_result
from comfy_executors.clients.runpod_answers import RunPodStatus
from comfy_executors.errors import (
    JobResultLostError,
    RunPodJobFailedError,
    ServerError,
    ServerResponseError,
    WorkflowError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.joining import (
    JoinedGraph,
    Owner,
    can_be_joined,
    estimate_bytes,
    recognise,
)
from comfy_executors.executors.side_by_side import side_by_side
from comfy_executors.images import WorkflowOutput, WorkflowOutputImage, kind_of
from comfy_executors.runs import Batch, BatchFailure, BatchResult
from comfy_executors.wire import JobGraph

logger = logging.getLogger(__name__)

RESULT_BYTES = 9_500_000  # of the 10 MB that RunPod takes, some are names and brackets
_NO_NAME = "output.png"


@dataclass(frozen=True)
class OfficialFile:
    """A file that the worker passes on.

    Args:
        name: Its name, or an empty string where the worker does not say it.
        data: Its bytes; or
        url: where they are.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class OfficialAnswer:
    """The output of a job.

    Args:
        files: The files.
        errors: What went wrong beside them.
        is_old: Whether the worker is older than 5.0, and passes on the last image only.
    """

    files: tuple[OfficialFile, ...]
    errors: tuple[str, ...] = ()
    is_old: bool = False


def parse_official(output: Any) -> OfficialAnswer:
    """Read the output of a job, in the shape of 5.0 and later, or in the older one.

    Raises:
        ServerResponseError: It is neither.
    """
    if isinstance(output, list) and len(output) == 1:
        output = output[0]  # of a worker that yields it
    if not isinstance(output, Mapping):
        raise _unknown(output)
    if isinstance(output.get("images"), list):
        files = tuple(_file(item) for item in output["images"])
        return OfficialAnswer(files, _texts(output.get("errors")))
    message = output.get("message")
    if output.get("status") == "success" and isinstance(message, str):
        return OfficialAnswer((_content("", message),), is_old=True)
    if output.get("status") == "error" and isinstance(message, str):
        return OfficialAnswer((), (message,), is_old=True)
    raise _unknown(output)


def not_our_worker(output: Any) -> ServerResponseError:
    """Make the error of a job document that was answered with this, and with no event."""
    try:
        parse_official(output)
    except ServerResponseError as error:
        return error
    return ServerResponseError(
        'the endpoint\'s worker is worker-comfyui, not that of comfy-executors: use worker="auto" '
        'or worker="worker-comfyui"'
    )


def _unknown(output: Any) -> ServerResponseError:
    shown = sorted(output) if isinstance(output, Mapping) else type(output).__name__
    return ServerResponseError(
        f"the endpoint's worker is neither that of comfy-executors nor worker-comfyui: its output "
        f"is {str(shown)[:200]}"
    )


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _file(item: Any) -> OfficialFile:
    if not isinstance(item, Mapping) or not isinstance(item.get("data"), str):
        raise _unknown(item)
    name = str(item.get("filename") or "")
    if item.get("type") == "s3_url":
        return OfficialFile(name, url=item["data"])
    return _content(name, item["data"])


def _content(name: str, text: str) -> OfficialFile:
    if text.startswith(("http://", "https://")):
        return OfficialFile(name, url=text)
    try:
        return OfficialFile(name, base64.b64decode(text.partition(",")[2] or text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise ServerResponseError(f"the worker sent a file that is not base64: {error}") from error


@dataclass
class Shares:
    """What of an answer belongs to which batch.

    Args:
        results: The batches that have their files, in order; those that are elsewhere are fetched
            when it is their batch's turn. One that is gone for good fails its batch.
        missing: Those that have no file, or too few.
        error: Why they have not.
        can_be_repeated: Whether another job could bring them.
    """

    results: Iterator[BatchResult | BatchFailure]
    missing: list[int]
    error: WorkflowError
    can_be_repeated: bool


class OfficialWorker:
    """What is known of an endpoint's worker, if it is `worker-comfyui`.

    Args:
        is_known: Whether that is what it is.
    """

    def __init__(self, is_known: bool) -> None:
        self.is_known = is_known
        self._wants_one_by_one = False
        self._has_bucket = False

    def fitting(self, item: JobGraph, inputs: Collection[bytes]) -> int | None:
        """Return how many such batches one job's result has room for, at least 1; None for all."""
        if self._wants_one_by_one or not can_be_joined(item.graph):
            return 1
        if self._has_bucket:
            return None
        return max(1, RESULT_BYTES // estimate_bytes(item.graph, item.size, inputs))

    def warn_of_size(self, item: JobGraph, inputs: Collection[bytes]) -> None:
        """Log a warning for a batch whose result is, or would be, likely to be lost."""
        estimate = estimate_bytes(item.graph, item.size, inputs)
        if estimate > RESULT_BYTES and not self._has_bucket:
            logger.warning(
                "the images of one batch are about %.0f MB, and RunPod loses results of "
                "worker-comfyui over 10 MB: %sgive it a bucket (BUCKET_ENDPOINT_URL), make smaller "
                "batches, or use the worker of comfy-executors",
                estimate / 1e6,
                "" if self.is_known else "if the endpoint runs that, ",
            )

    def settle(
        self,
        output: Any,
        status: RunPodStatus | None,
        joined: JoinedGraph | None,
        batches: Mapping[int, Batch],
        control: JobControl,
        server: str,
    ) -> Shares:
        """Give each batch of a job what the worker answered.

        Args:
            output: The output, or None.
            status: RunPod's last word on the job.
            joined: The graph that was run; None where nobody knows it any more.
            batches: The batches by their number in the job.
            control: The deadline and the cancel signal of downloads.
            server: The endpoint's address.

        Raises:
            JobError: The job failed as a whole.
            ServerError: The output is not one of worker-comfyui; or, while the results are iterated
                over, a file of it cannot be fetched for now.
        """
        assert status is not None, "a job that is not ours is followed to its end"
        if output is None:
            error = status.failure(server)
            if error is None:  # such as an empty list
                raise _unknown(status.output)
            numbers = [*(batches if joined is None else joined.batches)]
            is_lost = isinstance(error, JobResultLostError)
            # Our own worker would have told something in its stream, and each batch by itself.
            is_official = self.is_known or (is_lost and joined is not None and len(numbers) > 1)
            if not is_official or not (is_lost or isinstance(error, RunPodJobFailedError)):
                raise error
            return Shares(iter(()), numbers, error, "validation" not in str(error).lower())
        answer = parse_official(output)
        if joined is None:
            joined = recognise((file.name for file in answer.files), [*batches])
        self.is_known = True
        self._has_bucket = self._has_bucket or any(file.url for file in answer.files)
        if len(joined.batches) > 1 and not all(joined.find(file.name) for file in answer.files):
            # An old worker that says no names, or a node that gives its files names of its own.
            self._wants_one_by_one = True
            error = _failure_of(answer, status.id, server)
            return Shares(iter(()), [*joined.batches], error, can_be_repeated=True)
        return _share_out(answer, joined, batches, control, status.id, server)


def _share_out(
    answer: OfficialAnswer,
    joined: JoinedGraph,
    batches: Mapping[int, Batch],
    control: JobControl,
    job_id: str,
    server: str,
) -> Shares:
    """Give each batch its files.

    A batch is complete when it has a file; after an error in the job, when it has as many as it was
    to make.
    """
    found: dict[int, list[_Found]] = defaultdict(list)
    for file in answer.files:
        owner, name = _owner_of(file, joined)
        found[owner.batch].append(_Found(file, name, owner))
    complete: list[int] = []
    missing: list[int] = []
    for index in joined.batches:
        savers = sum(owner.batch == index for owner in joined.owners.values())
        wanted = batches[index].size * max(1, savers) if answer.errors else 1
        (complete if len(found[index]) >= wanted else missing).append(index)
    results = (
        _settled(batches[index], found[index], control, job_id, server) for index in complete
    )
    return Shares(results, missing, _failure_of(answer, job_id, server), bool(answer.errors))


class _Found(NamedTuple):
    """A file, the name that it would have had, and whose it is."""

    file: OfficialFile
    name: str
    owner: Owner


def _settled(
    batch: Batch, found: Sequence[_Found], control: JobControl, job_id: str, server: str
) -> BatchResult | BatchFailure:
    """Fetch what is elsewhere of a batch's files, and make its result."""
    calls = [partial(fetch_result, file.url or "") for file, *_ in found if file.data is None]
    try:
        with contextlib.closing(side_by_side(calls, control)) as fetched:
            outputs = [
                _output(
                    next(fetched) if file.data is None else file.data, name, owner, batch, server
                )
                for file, name, owner in found
            ]
    except ServerError as error:
        if error.transient:
            raise  # each batch would be waited for as long
        error.job_id = job_id
        return BatchFailure(batch.index, error)
    images = [output for output in outputs if isinstance(output, WorkflowOutputImage)]
    others = [output for output in outputs if not isinstance(output, WorkflowOutputImage)]
    return BatchResult(batch.index, images, others, seed=batch.seed, server=server, job_id=job_id)


def _owner_of(file: OfficialFile, joined: JoinedGraph) -> tuple[Owner, str]:
    found = joined.find(file.name)
    if found is not None:
        return found
    name = file.name or os.path.basename(unquote(urlsplit(file.url or "").path)) or _NO_NAME
    return Owner(joined.batches[0], "", ""), name


def _output(data: bytes, name: str, owner: Owner, batch: Batch, server: str) -> WorkflowOutput:
    is_image = kind_of(name) == "image"
    return (WorkflowOutputImage if is_image else WorkflowOutput)(
        data,
        name=name,
        subfolder=owner.subfolder,
        node_id=owner.node_id or None,
        batch_index=batch.index,
        seed=batch.seed,
        server=server,
    )


def _failure_of(answer: OfficialAnswer, job_id: str, server: str) -> RunPodJobFailedError:
    """Make the error of a batch that has no files, or too few."""
    reason = (
        "made no image that worker-comfyui passes on: it drops previews, the videos of custom "
        "nodes, and images that go over the websocket only"
    )
    if answer.errors:
        reason = answer.errors[0]
    return RunPodJobFailedError(reason, job_id=job_id, details=answer.errors[1:], server=server)
